"""A run that was cut short goes on as if nothing had happened."""

import signal
import sys
import time
from itertools import count

import pytest
import torch
from support import Launched, assert_same_run, copies, fail_above, make_training, rows, run, save_some

import train
from dbnet.checkpoint import load_checkpoint
from dbnet.dataset import TextDataset
from dbnet.errors import UserError, run_script
from dbnet.files import read_log
from dbnet.memory import BatchPlan
from dbnet.model import DBNet
from dbnet.training import RunningEpoch, load_last, log_row

FLAGS = [
    *("--preset", "lite", "--weights", "none", "--image-size", "96", "--train-sizes", "64,96"),
    *("--batch-size", "1", "--accumulate", "2", "--ema", "0.9", "--warmup-epochs", "1", "--epochs", "2"),
    *("--rotate90-p", "0.3", "--rotate", "5", "--deterministic", "--save-minutes", "0.00001"),
]


@pytest.fixture(scope="module")
def uninterrupted(rendered, tmp_path_factory):
    """The run that the others must not differ from."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    run("train.py", *FLAGS, "--data", rendered, "--run", "a", "--workers", "0", cwd=folder)
    return folder / "runs" / "a"


def test_out_of_memory_in_the_validation_ends_in_one_line_and_keeps_the_trained_epoch(rendered, tmp_path, monkeypatch):
    flags = {"weights": "none", "image_size": 64, "workers": 0, "epochs": 1}
    config = train.Config.from_preset("lite", data=str(rendered), **flags)

    def run_out(*_):
        raise torch.OutOfMemoryError("injected")

    with monkeypatch.context() as patch:
        patch.setattr(train, "evaluate", run_out)
        with pytest.raises(UserError, match="out of memory in the validation"):
            train.train(config, tmp_path / "a")
    save = load_checkpoint(tmp_path / "a/last.pt")
    assert save["epoch"] == 0 and save["running"]["images"] == 6
    monkeypatch.setattr(train, "optimizer_step", run_out)  # only the validation is left
    train.train(config, tmp_path / "a", last=save)
    assert [row["epoch"] for row in rows(tmp_path / "a")] == [1]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_within_an_epoch_costs_nothing(rendered, uninterrupted, tmp_path, number, status):
    """The cut falls between two steps while two workers have prefetched the samples of the next ones."""
    flags = [*FLAGS, "--data", rendered, "--run", "a"]
    first = Launched("train.py", *flags, "--workers", "2", cwd=tmp_path)
    deadline = time.monotonic() + 100
    while not (tmp_path / "runs/a/last.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    first.send(number)
    assert first.wait() == status, first.text()
    assert first.text().splitlines()[-1].endswith("go on from the last save with: python train.py --run a --resume")
    save = load_checkpoint(tmp_path / "runs/a/last.pt")
    assert save["epoch"] < 2 and save["running"]["batches"] in (0, 2, 4, 6)
    run("train.py", "--resume", "--workers", "1", cwd=tmp_path)
    assert_same_run(tmp_path / "runs/a", uninterrupted)


def test_the_log_and_the_weights_do_not_depend_on_the_number_of_workers(rendered, uninterrupted, tmp_path):
    run("train.py", *FLAGS, "--data", rendered, "--run", "a", "--workers", "3", cwd=tmp_path)
    assert_same_run(tmp_path / "runs/a", uninterrupted)


def test_a_second_ctrl_c_stops_at_once(rendered, tmp_path, monkeypatch, capsys):
    """Within one step, and from within the process: two that arrive while a library computes would count as one."""
    step, steps = train.optimizer_step, count()

    def interrupted(*arguments):
        if next(steps) == 1:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            pytest.fail("the second one was ignored")
        return step(*arguments)

    flags = [*FLAGS, "--deterministic", "false", "--data", str(rendered), "--run", "a", "--workers", "0"]
    with monkeypatch.context() as patch:
        patch.chdir(tmp_path)
        patch.setattr(sys, "argv", ["train.py", *flags])
        patch.setattr(train, "optimizer_step", interrupted)
        with pytest.raises(SystemExit) as end:
            run_script(train.main)
    assert end.value.code == 130
    assert capsys.readouterr().err.endswith("interrupted\n")
    assert next(steps) == 2
    run("train.py", "--resume", "--epochs", "1", cwd=tmp_path)


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "gone"])
def test_a_damaged_save_falls_back_to_the_one_before_and_says_so(small, tmp_path, damage, capsys):
    save_some(tmp_path, small, [1, 2])
    last = tmp_path / "last.pt"
    content = bytearray(last.read_bytes())
    if damage == "flipped":
        content[len(content) // 2] ^= 1
        last.write_bytes(content)
    elif damage == "gone":
        last.unlink()
    else:
        last.write_bytes(content[: len(content) // 2 if damage == "cut" else 0])
    assert load_last(tmp_path)["epoch"] == 1
    said = capsys.readouterr().out
    assert len(said.splitlines()) == 1 and "last.pt" in said and "the save before it" in said
    assert load_last(tmp_path)["epoch"] == 1 and not (tmp_path / "last.prev.pt").exists()
    last.write_bytes(b"")
    with pytest.raises(UserError, match=r"last\.pt"):
        load_last(tmp_path)


def test_where_both_saves_are_damaged_the_way_out_is_named(small, tmp_path):
    save_some(tmp_path, small, [1, 2])
    for name in ("last.pt", "last.prev.pt"):
        (tmp_path / name).write_bytes(b"cut")
    with pytest.raises(UserError, match=r"last\.pt: damaged, as last\.prev\.pt; .*--init .*best\.pt"):
        load_last(tmp_path)


def test_the_save_before_stays_until_the_new_one_is_whole(small, tmp_path, monkeypatch):
    save_some(tmp_path, small, [1, 2, 3])
    assert load_checkpoint(tmp_path / "last.prev.pt")["epoch"] == 2
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(UserError, match="No space left"):
        save_some(tmp_path, small, [4])
    assert load_last(tmp_path)["epoch"] == 3 and load_checkpoint(tmp_path / "last.prev.pt")["epoch"] == 2
    assert len(list(tmp_path.iterdir())) == 2


def test_a_log_loses_what_was_written_after_the_last_save(tmp_path):
    path = tmp_path / "log.jsonl"
    for epoch in (1, 2, 3):
        log_row(path, {"epoch": epoch, "hmean": 0.5})
    with path.open("a") as log:
        log.write('{"epoch": 4, "hm')
    log_row(path, {"epoch": 2, "hmean": 0.6})  # the run was resumed after its first epoch
    assert [(row["epoch"], row["hmean"]) for row in read_log(path)] == [(1, 0.5), (2, 0.6)]
    assert len(path.read_text().splitlines()) == 2


def resumed(config, changed, training=None):
    """A training that goes on under `changed` from the save of one under `config`."""
    before = training or make_training(config)
    after = make_training(changed)
    after.load_state({"config": config, **before.state()}, changed)
    return after


def test_changed_fields_hold_after_resuming(small):
    config = small.changed(batch_size=4, accumulate=2, weight_decay=0.1, amp="fp16")
    before = make_training(config)
    before.plan.shrink()
    before.scaler.load_state_dict(before.scaler.state_dict() | {"scale": 1024.0})
    before.running = RunningEpoch(128, batches=2, images=8)

    same = resumed(config, config.changed(epochs=9, lr=1e-5), before)
    assert same.plan.in_force == "2 x 4" and same.running.batches == 2 and same.scaler.get_scale() == 1024
    longer = resumed(config, config.changed(accumulate=4), before)
    assert longer.plan.in_force == "2 x 8" and longer.running.batches == 2
    larger = resumed(config, config.changed(image_size=160), before)
    assert larger.plan == BatchPlan(4, 2, 160) and larger.running is None
    assert resumed(config, config.changed(batch_size=2), before).running is None
    assert resumed(config, config.changed(data_weights=(2,)), before).running is None

    other = resumed(config, config.changed(weight_decay=0.2, optimizer="adam", amp="bf16"), before)
    assert other.optimizer.param_groups[0]["weight_decay"] == 0.2
    assert not other.optimizer.param_groups[0]["decoupled_weight_decay"]
    assert other.scaler.get_scale() == 1.0
    to_half = resumed(config.changed(amp="off"), config)
    assert to_half.scaler.get_scale() == 2.0**16 and to_half.scaler.get_growth_interval() == 2000


def test_random_numbers_go_on(small):
    state = make_training(small).state()
    expected = torch.rand(3)
    after = make_training(small)
    after.load_state({"config": small, **state}, small)
    assert torch.equal(torch.rand(3), expected)


def test_a_fallback_of_the_image_within_an_epoch_agrees_in_log_best_and_validation(rendered, tmp_path, monkeypatch):
    data = copies(rendered, tmp_path / "data", train=2, val=1)
    config = train.Config.from_preset("lite", data=str(data), weights="none", image_size=1024, workers=0)
    config = config.changed(batch_size=1, epochs=1, pad="tight", scale=1.0, enlarge=8.0)
    forward, validated = DBNet.forward, []

    def limited(self, images):
        if self.training and max(images.shape[1:3]) > 896:
            raise torch.OutOfMemoryError("injected")
        if not self.training:
            validated.append(max(images.shape[1:3]))
        return forward(self, images)

    monkeypatch.setattr(DBNet, "forward", limited)
    monkeypatch.chdir(tmp_path)
    train.train(config, tmp_path / "a")
    best, last = (load_checkpoint(tmp_path / "a" / name) for name in ("best.pt", "last.pt"))
    [row] = rows(tmp_path / "a")
    assert row["image_size"] == best["config"].image_size == last["plan"]["image_size"] == 896
    assert set(validated) == {896} and last["config"].image_size == 1024


def test_multi_scale_steps_keep_the_effective_batch_when_memory_runs_out(small, monkeypatch):
    config = small.changed(train_sizes=(64, 96, 128), batch_size=2, accumulate=2, image_size=128)
    dataset = TextDataset(config, "train", train=True)
    training, passes, original = make_training(config), [], train.optimizer_step
    fail_above(training.model, 1, passes)
    steps = []

    def note(training, batches, *args):
        steps.append((sum(len(batch["image"]) for batch in batches), {int(s) for b in batches for s in b["side"]}))
        return original(training, batches, *args)

    monkeypatch.setattr(train, "optimizer_step", note)
    for epoch in range(3):
        training.epoch, training.running = epoch, None
        train.train_epoch(training, dataset, config)
    assert [images for images, _ in steps] == [4, 2] * 3
    assert all(len(sides) == 1 for _, sides in steps) and len({min(sides) for _, sides in steps}) > 1
    assert training.plan.in_force == "1 x 4" and training.plan.image_size == 128
    sides = [min(sides) for images, sides in steps for _ in range(images)]
    assert [shape[1] for shape in passes] == sides  # (images, height) of each pass: one image, at its step's size
