"""Several processes train, evaluate and predict as one."""

import contextlib
import csv
import hashlib
import json
import os
import pickle
import queue
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from support import (
    ROOT,
    SECONDS,
    Launched,
    context,
    copies,
    environments,
    fail_above,
    make_training,
    run,
)
from torch.utils.data import default_collate

import train
from dbnet import device
from dbnet.checkpoint import load_checkpoint, save_checkpoint
from dbnet.dataset import Batches, TextDataset
from dbnet.errors import UserError
from dbnet.model import DBNet
from dbnet.training import accumulation

TINY = ["--preset", "lite", "--weights", "none", "--image-size", "64", "--workers", "0"]


def run_together(count, name, *arguments, cwd, status=0):
    """Run a script in `count` processes, and return what each printed."""
    launched = [Launched(name, *arguments, cwd=cwd, **environment) for environment in environments(count)]
    texts = []
    for each in launched:
        assert each.wait() == status, "\n".join(each.text() for each in launched)
        texts.append(each.text())
    return texts


def work(function, environment, results, arguments):
    """Run `function(rank, ...)` as one of several processes."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    device.init_process_group()
    results.put((device.rank(), pickle.dumps(function(device.rank(), *arguments))))
    results.close()
    results.join_thread()
    device.destroy_process_group()


def together(count, function, *arguments):
    """What `function(rank, ...)` gives in each of `count` processes."""
    results = context().Queue()
    processes = [
        context().Process(target=work, args=(function, environment, results, arguments))
        for environment in environments(count)
    ]
    for process in processes:
        process.start()
    found, end = {}, time.monotonic() + SECONDS
    try:
        while len(found) < count:
            with contextlib.suppress(queue.Empty):
                rank, value = results.get(timeout=0.1)
                found[rank] = pickle.loads(value)
            assert time.monotonic() < end and not any(process.exitcode for process in processes)
    finally:
        for process in processes:
            process.join(10)
            process.kill()
    return [found[rank] for rank in range(count)]


def digest(model):
    """Of all weights and running statistics."""
    content = [tensor.numpy().tobytes() for name, tensor in model.state_dict().items() if "num_batches" not in name]
    return hashlib.sha256(b"".join(content)).hexdigest()


def one_step(rank, config, sizes):
    """An optimizer step in which rank r has sizes[r] of the samples, and the weights after it."""
    training = make_training(config)
    for layer in training.model.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.eval()
    whole = first_batch(config)
    start = sum(sizes[:rank])
    batches = [{name: values[start : start + sizes[rank]] for name, values in whole.items()}]
    losses, norm = train.optimizer_step(training, batches if sizes[rank] else [], config, sum(sizes))
    return losses.tolist(), float(norm), some_gradients(training.model), digest(training.model)


def first_batch(config):
    """The same samples in every process."""
    dataset = TextDataset(config, "train", train=True)
    return default_collate([dataset[place] for place in range(config.batch_size)])


def some_gradients(model):
    """Of the first, the last and a middle layer."""
    parameters = list(model.parameters())
    return [parameters[i].grad.numpy() for i in (0, len(parameters) // 2, -2)]


@pytest.mark.parametrize("sizes", [(3, 1), (2, 0, 2)])
def test_every_sample_weighs_the_same_however_the_ranks_share_them(small, sizes):
    """Batch norm in eval mode, micro-batches of one image: then the mean over samples does not depend on the split."""
    config = small.changed(clip_grad_norm=0.0, batch_size=4, image_size=64)

    def alone():
        training = make_training(config)
        training.plan.halvings = 2
        for layer in training.model.modules():
            if isinstance(layer, torch.nn.BatchNorm2d):
                layer.eval()
        losses, _ = train.optimizer_step(training, [first_batch(config)], config)
        return losses, some_gradients(training.model)

    losses, gradients = alone()
    results = together(len(sizes), one_image_at_a_time, config, sizes)
    assert len({result[-1] for result in results}) == 1
    torch.testing.assert_close(torch.tensor(results[0][0]), losses, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(results[0][2], gradients, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-5)


def one_image_at_a_time(rank, config, sizes):
    """`one_step` in micro-batches of one image."""
    original = train.micro_batches

    def single(batches, plan, device):
        plan.halvings = 2
        return original(batches, plan, device)

    train.micro_batches = single
    return one_step(rank, config, sizes)


def run_short_of_memory(rank, config, limit=4):
    """An epoch whose rank 1 alone cannot hold more than `limit` images, half-way through the network."""
    training, passes = make_training(config), []
    fail_above(training.model, 99, passes)
    if rank == 1:
        fail_above(training.model.backbone.stages[2], limit)
    dataset = TextDataset(config, "train", train=True)
    row = train.train_epoch(training, dataset, config)
    return training.plan.in_force, training.plan.fallbacks, row["total_loss"], digest(training.model), passes


def test_out_of_memory_on_one_rank_makes_all_fall_back_together(rendered, small, tmp_path):
    data = copies(rendered, tmp_path / "data", train=39, val=1)
    config = small.changed(batch_size=8, accumulate=2, image_size=64, data=str(data))
    first, second = together(2, run_short_of_memory, config)
    assert first[0] == second[0] == "4 x 4"
    assert first[1] == second[1] == ["8 x 2 at 64 px -> 4 x 4 at 64 px"]
    assert first[2:4] == second[2:4]  # the losses in the log, and all weights and statistics
    failed, *passes = [images for images, *_ in second[4]]
    assert failed > 4 and max(passes) == 4 and sum(passes) in (15, 16)  # two batches of the five, one of which has 7
    assert sum(images for images, *_ in first[4]) - sum(passes) >= 23  # the other three, and the work that was lost


def test_the_effective_batch_is_held_whatever_the_ranks(small, monkeypatch):
    config = small.changed(batch_size=2, effective_batch=12)
    assert accumulation(config) == 6
    monkeypatch.setattr(device, "_world_size", 3)
    assert accumulation(config) == 2
    assert accumulation(config.changed(effective_batch=0, accumulate=5)) == 5
    with pytest.raises(UserError, match="--effective-batch 10: is no multiple of batch 2 x 3 processes"):
        accumulation(config.changed(effective_batch=10))


def test_shares_are_the_whole_without_repetition(small, monkeypatch):
    dataset = TextDataset(small, "train", train=True)
    whole = list(Batches(dataset, 1, small.seed))
    monkeypatch.setattr(device, "_world_size", 4)
    for start in (0, 3):
        seen = []
        for rank in range(4):
            monkeypatch.setattr(device, "_rank", rank)
            share = Batches(dataset, 1, small.seed, start=start)
            assert len(list(share)) == len(share)
            seen += [draw for batch in share for draw in batch]
        assert sorted(seen) == sorted(draw for batch in whole[start:] for draw in batch)


@pytest.fixture(scope="module")
def checkpoint(rendered, tmp_path_factory):
    """A network that finds something: the initial weights, biased towards text."""
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    config = train.Config.from_preset("lite", weights="none", data=str(rendered), image_size=64, workers=0)
    config = config.changed(batch_size=1, thresh=0.5, box_thresh=0.0)
    save_checkpoint(folder / "a.pt", config, DBNet(config))
    return folder / "a.pt"


def test_two_processes_evaluate_to_the_last_digit_like_one(checkpoint, tmp_path):
    words = [checkpoint, "--split", "train"]
    run("evaluate.py", *words, "--json", tmp_path / "one.json", cwd=tmp_path)
    first, second = run_together(2, "evaluate.py", *words, "--json", tmp_path / "two.json", cwd=tmp_path)
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "two.json").read_bytes()
    assert json.loads((tmp_path / "one.json").read_text())["detections"] > 0
    assert "H-Mean" in first and "H-Mean" not in second


def test_prediction_by_two_processes_is_that_of_one_and_goes_on_when_cut_short(checkpoint, rendered, tmp_path):
    words = ["--images", rendered / "images" / "train"]
    run("predict.py", checkpoint, *words, "--out", tmp_path / "one.csv", cwd=tmp_path)
    run_together(2, "predict.py", checkpoint, *words, "--out", tmp_path / "two.csv", cwd=tmp_path)
    assert (tmp_path / "one.csv").read_bytes() == (tmp_path / "two.csv").read_bytes()
    assert not list(tmp_path.glob("*.partial"))

    images = Path(shutil.copytree(rendered / "images" / "train", tmp_path / "images"))
    for number, path in enumerate(sorted(images.iterdir())):
        if number % 3 == 2:
            path.write_bytes(b"broken")
    words = ["--images", images, "--out", tmp_path / "three.csv"]
    texts = run_together(2, "predict.py", checkpoint, *words, "--strict", cwd=tmp_path, status=2)
    assert any("error: " in text for text in texts) and not (tmp_path / "three.csv").exists()
    partial = next(tmp_path.glob("three.csv.rank*.partial"))
    with partial.open("a") as file:
        file.write('\n["cut sho')
    for path in images.iterdir():
        if path.read_bytes() == b"broken":
            shutil.copy(rendered / "images" / "train" / path.name, path)
    said = run("predict.py", checkpoint, *words, "--resume", "--strict", cwd=tmp_path)
    done = int(said.split(" are done")[0].split()[-1])
    assert 0 < done < 6 and f"on {6 - done} images" in said
    assert (tmp_path / "three.csv").read_bytes() == (tmp_path / "one.csv").read_bytes()
    assert len(list(csv.reader((tmp_path / "three.csv").open()))) == 7
    assert not list(tmp_path.glob("*.partial"))


def torchrun(count, *arguments, cwd, restarts=0):
    """torchrun with a script of the project, as a user starts it; before `--`, --run would be one of its own flags."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    command += [f"--max-restarts={restarts}", "--monitor-interval=0.1", "--", ROOT / arguments[0], *arguments[1:]]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    with (Path(cwd) / "output.txt").open("w") as output:
        return subprocess.Popen(list(map(str, command)), cwd=cwd, env=environment, stdout=output, stderr=output)


def test_torchrun_restarts_a_run_whose_process_was_killed_and_it_goes_on_from_its_save(receipts, tmp_path):
    few = copies(receipts, tmp_path / "data", train=4, val=1)
    flags = ["--data", few, "--run", "a", "--resume", "--epochs", "3", "--batch-size", "1"]
    process = torchrun(2, "train.py", *TINY, *flags, "--save-minutes", "0.00001", cwd=tmp_path, restarts=1)
    log, output = tmp_path / "runs/a/log.jsonl", tmp_path / "output.txt"
    try:
        end = time.monotonic() + SECONDS
        while not (log.exists() and log.read_text()):
            assert process.poll() is None and time.monotonic() < end, output.read_text()
            time.sleep(0.01)
        pids = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        ranks = {pid: Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") for pid in pids}
        [victim] = [int(pid) for pid, variables in ranks.items() if b"RANK=1" in variables]
        os.kill(victim, signal.SIGKILL)
        assert process.wait(SECONDS) == 0, output.read_text()
    finally:
        process.terminate()
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2, 3] and all(row["ranks"] == 2 for row in rows)
    assert output.read_text().count("runs/a: 4 training") == 2  # it was started, and started again
    assert load_checkpoint(tmp_path / "runs/a/last.pt")["epoch"] == 3
