"""What nights bring: after each fault the run goes on, or has stopped with one clear line and is resumed."""

import contextlib
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from support import ROOT, SECONDS, Launched, assert_same_run, copies, environments, make_training, rows, run, save_some

import train
from dbnet.checkpoint import load_checkpoint
from dbnet.config import Config
from dbnet.errors import UserError
from dbnet.files import locked, remove_leftovers, write_whole
from dbnet.pictures import PICTURE_MARK
from dbnet.training import load_last, log_row

FLAGS = [
    *("--preset", "lite", "--weights", "none", "--image-size", "64", "--batch-size", "1", "--ema", "0.9"),
    *("--rotate", "5", "--deterministic", "--save-minutes", "0.005", "--run", "a"),
]


def stopped_with_one_line(launched, *words):
    """Assert exit status 2 and one line of error that holds `words`, and no traceback."""
    assert launched.wait() == 2, launched.text()
    text = launched.text()
    errors = [line for line in text.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in text, text
    for word in words:
        assert word in errors[0], errors
    assert "--resume" in text


def until_saved(launched):
    """Wait for the first save of the run."""
    end = time.monotonic() + SECONDS
    while not (launched.folder / "runs/a/last.pt").exists():
        assert launched.process.is_alive() and time.monotonic() < end, launched.text()
        time.sleep(0.005)


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.long)])
def test_killed_at_random_moments_a_run_ends_with_the_weights_of_one_left_in_peace(rendered, tmp_path, kills):
    seed = random.randrange(1000)
    print(f"seed {seed}")
    moments = random.Random(seed)
    # By this schedule an epoch is the same however many follow.
    words = [*FLAGS, "--data", rendered, "--schedule", "step", "--workers", "1"]
    folder = tmp_path / "runs" / "a"
    epochs = 999
    launched = Launched("train.py", *words, "--epochs", epochs, cwd=tmp_path)
    until_saved(launched)
    reached = 0  # epochs, by the saves
    for kill in range(kills):
        launched.until("runs/a: 6 training")
        time.sleep(moments.uniform(0, 1.5))
        launched.kill()
        save = load_last(folder)  # whole, at any moment
        assert reached <= save["epoch"] < epochs
        reached = save["epoch"]
        if (folder / "best.pt").exists():
            assert load_checkpoint(folder / "best.pt")["epoch"] <= save["epoch"] + 1
        if kill == kills - 1:
            epochs = reached + 1
        launched = Launched("train.py", "--resume", "--epochs", epochs, cwd=tmp_path)
    assert launched.wait() == 0, launched.text()
    (tmp_path / "peace").mkdir()
    run("train.py", *words, "--epochs", epochs, cwd=tmp_path / "peace")
    assert_same_run(folder, tmp_path / "peace/runs/a")
    written = {path.name for path in folder.iterdir()} - {"events.out.tfevents.dbnet"}  # where TensorBoard is there
    assert written == {"best.pt", "last.pt", "last.prev.pt", "config.json", "log.jsonl", "curves.png"}


WRITE_AND_DIE = """
import os, sys
from pathlib import Path
from dbnet.files import write_whole

folder, moment = Path(sys.argv[1]), int(sys.argv[2])

def die(event, _):
    global moment
    moment -= event in ("open", "os.link", "os.rename", "os.remove")
    if moment == 0:
        os._exit(1)

sys.addaudithook(die)
with write_whole(folder / "last", keep=folder / "before") as file:
    file.write(b"3")
"""


def test_killed_at_each_step_of_a_save_a_writer_leaves_whole_files_and_the_next_one_no_others(tmp_path):
    for moment in range(1, 20):
        folder = tmp_path / str(moment)
        folder.mkdir()
        (folder / "before").write_bytes(b"1")
        (folder / "last").write_bytes(b"2")
        code = subprocess.run([sys.executable, "-c", WRITE_AND_DIE, folder, str(moment)], cwd=ROOT).returncode
        last = (folder / "last").read_bytes() if (folder / "last").exists() else b""
        before = (folder / "before").read_bytes()
        assert (last, before) in ((b"2", b"1"), (b"", b"2"), (b"3", b"2"))
        remove_leftovers(folder)
        with write_whole(folder / "last", keep=folder / "before") as file:
            file.write(b"4")
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == {"last": b"4", "before": last or before}
        if code == 0:
            break
    assert code == 0 and moment > 5  # the last one was not killed any more


def test_killed_data_workers_stop_the_run_in_one_line_and_nothing_is_lost(rendered, tmp_path):
    words = [*FLAGS, "--data", rendered, "--schedule", "step", "--workers", "2", "--epochs", "300"]
    launched = Launched("train.py", *words, cwd=tmp_path)
    until_saved(launched)
    while launched.process.is_alive():  # they are others in each epoch; kill any
        with contextlib.suppress(ProcessLookupError, FileNotFoundError):  # a worker or the run has just ended
            for pid in launched.workers():
                os.kill(pid, signal.SIGKILL)
    stopped_with_one_line(launched, "DataLoader worker", "--workers 0")
    save = load_last(tmp_path / "runs/a")
    epochs = save["epoch"] + 1
    run("train.py", "--resume", "--epochs", epochs, cwd=tmp_path)
    (tmp_path / "peace").mkdir()
    run("train.py", *words, "--epochs", epochs, "--workers", "0", cwd=tmp_path / "peace")
    assert_same_run(tmp_path / "runs/a", tmp_path / "peace/runs/a")


def test_when_one_rank_is_killed_the_others_stop_and_the_run_is_resumed(rendered, tmp_path):
    words = [*FLAGS, "--data", rendered, "--epochs", "200", "--workers", "0"]
    first, second = (Launched("train.py", *words, cwd=tmp_path, **each) for each in environments(2))
    until_saved(first)
    second.kill()
    stopped_with_one_line(first, "another process of the run has ended")
    save = load_last(tmp_path / "runs/a")
    run("train.py", "--resume", "--epochs", save["epoch"] + 1, cwd=tmp_path)
    assert [row["epoch"] for row in rows(tmp_path / "runs/a")] == list(range(1, save["epoch"] + 2))


@contextlib.contextmanager
def file_system(folder, size):
    """A small file system in memory, mounted at `folder`. Gives the command that mounts it with other options."""
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"a file system cannot be mounted here: {mounted.stderr.decode().strip()}")
    try:
        yield lambda options: subprocess.run(["mount", "-o", f"remount,{options}", folder], check=True)
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_stops_the_run_in_one_line_and_with_room_it_goes_on(rendered, tmp_path):
    # Saved at the end of each epoch only, so that the speed of the machine changes nothing.
    words = [*FLAGS, "--data", rendered, "--epochs", "2", "--workers", "0", "--save-minutes", "0"]
    with file_system(tmp_path / "runs", "100m") as remount:  # one save of 54 MB fits, and not another beside it
        launched = Launched("train.py", *words, cwd=tmp_path)
        stopped_with_one_line(launched, "last.pt", "No space left on device", "make room")
        folder = tmp_path / "runs/a"
        load_last(folder)
        assert not list(folder.glob(".*.tmp"))
        remount("size=600m")
        run("train.py", "--resume", cwd=tmp_path)
        assert [row["epoch"] for row in rows(folder)] == [1, 2]
        load_checkpoint(folder / "best.pt")


def test_an_output_folder_that_becomes_read_only_stops_the_run_in_one_line(rendered, tmp_path):
    words = [*FLAGS, "--data", rendered, "--epochs", "200", "--workers", "0"]
    with file_system(tmp_path / "runs", "600m") as remount:
        launched = Launched("train.py", *words, cwd=tmp_path)
        until_saved(launched)
        # Mounted once more on itself: a mount with a file open for writing, the lock, cannot become read-only.
        subprocess.run(["mount", "--bind", "runs", "runs"], cwd=tmp_path, check=True)
        remount("bind,ro")
        stopped_with_one_line(launched, "runs/a", "Read-only file system")
        save = load_last(tmp_path / "runs/a")
        again = Launched("train.py", "--resume", cwd=tmp_path)
        assert again.wait() == 2 and "error: runs/a/probe: cannot be written (Read-only file system)" in again.text()
        subprocess.run(["umount", "runs"], cwd=tmp_path, check=True)
        run("train.py", "--resume", "--epochs", save["epoch"] + 1, cwd=tmp_path)


def test_a_quota_reached_while_saving_keeps_the_last_save(small, tmp_path):
    save_some(tmp_path, small, [1, 2])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, before[1]))
    try:
        with pytest.raises(UserError, match=r"last\.pt: cannot be written \(File too large\)"):
            save_some(tmp_path, small, [3])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert load_last(tmp_path)["epoch"] == 2 and len(list(tmp_path.iterdir())) == 2


def test_a_data_folder_that_disappears_stops_the_run_in_one_line_and_costs_nothing(rendered, tmp_path):
    data = copies(rendered, tmp_path / "data", train=6, val=2)
    words = [*FLAGS, "--data", data, "--epochs", "200", "--workers", "0"]
    launched = Launched("train.py", *words, cwd=tmp_path)
    until_saved(launched)
    data.rename(tmp_path / "away")
    stopped_with_one_line(launched, "data", "is missing")
    (tmp_path / "away").rename(data)
    save = load_last(tmp_path / "runs/a")
    run("train.py", "--resume", "--epochs", save["epoch"] + 1, cwd=tmp_path)
    assert rows(tmp_path / "runs/a")[-1]["unreadable_images"] == 0


def test_files_that_change_in_mid_epoch_are_read_anew_or_left_out(rendered, tmp_path):
    data = copies(rendered, tmp_path / "data", train=6, val=2)
    launched = Launched(
        "train.py", *FLAGS, "--data", data, "--epochs", "4", "--workers", "1", "--pad", "tight", cwd=tmp_path
    )
    until_saved(launched)
    first, second, third, *_ = sorted((data / "images" / "train").iterdir())
    first.write_bytes(b"no image any more")
    shutil.copy(ROOT / "docs" / "detections.jpg", second)  # of another shape
    third.unlink()
    assert launched.wait() == 0, launched.text()
    assert "Traceback" not in launched.text()
    left_out = [line for line in launched.text().splitlines() if line.startswith("left out: ")]
    assert len(left_out) == 2 and any(first.name in line for line in left_out)
    assert rows(tmp_path / "runs/a")[-1]["unreadable_images"] == 2


def test_a_clock_that_goes_backwards_changes_nothing(rendered, tmp_path, monkeypatch):
    """The clock that can be set, in this process: an hour back at each look at it."""
    hours = iter(range(10**6))
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now - 3600 * next(hours))
    config = Config.from_preset("lite", weights="none", image_size=64, data=str(rendered), workers=0, epochs=2)
    saved = []
    save = train.LastSave.save
    monkeypatch.setattr(train.LastSave, "save", lambda self, training: (saved.append(1), save(self, training)))
    train.train(config.changed(batch_size=1, save_minutes=1e-5), tmp_path / "a")
    log = [json.loads(line) for line in (tmp_path / "a/log.jsonl").read_text().splitlines()]
    assert all(0 < row["train_seconds"] < 600 and row["images_per_second"] > 0 for row in log)
    assert len(saved) == 18  # of each epoch: before its six steps, after them, before and after its validation


@pytest.mark.long
def test_a_system_clock_that_goes_backwards_changes_nothing(rendered, tmp_path):
    """The system's own clock, seen through a library that turns it back an hour at each look."""
    (tmp_path / "back.c").write_text(
        "#define _GNU_SOURCE\n#include <time.h>\n#include <unistd.h>\n#include <sys/syscall.h>\n"
        "int clock_gettime(clockid_t id, struct timespec *t) {\n"
        "  static long looks; int r = syscall(SYS_clock_gettime, id, t);\n"
        "  if (id == CLOCK_REALTIME) t->tv_sec -= 3600 * ++looks;\n  return r; }\n"
    )
    compiler = shutil.which("cc") or pytest.skip("no C compiler")
    library = tmp_path / "back.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, tmp_path / "back.c"], check=True)
    environment = {**os.environ, "LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1"}
    looks = subprocess.run(
        [sys.executable, "-c", "import time; print(time.time() > time.time())"],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert looks.stdout == "True\n"
    command = [sys.executable, ROOT / "train.py", *FLAGS, "--data", rendered, "--epochs", "2", "--workers", "1"]
    subprocess.run(list(map(str, command)), cwd=tmp_path, env=environment, check=True, timeout=SECONDS)
    log = [json.loads(line) for line in (tmp_path / "runs/a/log.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in log] == [1, 2] and all(0 < row["train_seconds"] < SECONDS for row in log)


@pytest.mark.parametrize(
    ("epochs", "settled", "mebibytes"),
    [pytest.param(10, 5, 24, id="10"), pytest.param(300, 60, 48, marks=pytest.mark.long, id="300")],
)
def test_memory_of_a_long_run_is_flat(rendered, tmp_path, epochs, settled, mebibytes):
    words = ["--preset", "lite", "--weights", "none", "--image-size", "64", "--batch-size", "3", "--run", "a"]
    process = Launched("train.py", *words, "--data", rendered, "--epochs", epochs, "--workers", "0", cwd=tmp_path)
    process.process.join(SECONDS * (1 + epochs // 50))
    assert process.wait() == 0, process.text()
    log = [json.loads(line) for line in (tmp_path / "runs/a/log.jsonl").read_text().splitlines()]
    assert len(log) == epochs
    grown = (log[-1]["peak_memory_gb"] - log[settled - 1]["peak_memory_gb"]) * 1e9 / 2**20
    print(f"{grown:.1f} MiB more after epoch {epochs} than after epoch {settled}")
    assert grown < mebibytes


def test_the_newest_of_several_runs_is_resumed_and_an_unsaved_one_is_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", "--resume"])
    with pytest.raises(UserError, match=r"holds no last\.pt to resume"):
        train.main()
    Path("runs/a").mkdir(parents=True)
    with pytest.raises(UserError, match=r"holds no last\.pt to resume"):
        train.main()


def test_a_run_that_is_being_trained_is_not_trained_twice(rendered, tmp_path):
    words = [*FLAGS, "--data", rendered, "--epochs", "300", "--workers", "0"]
    first = Launched("train.py", *words, cwd=tmp_path)
    first.until("H-Mean")
    log = (tmp_path / "runs/a/log.jsonl").read_text()
    second = Launched("train.py", "--resume", "--run", "a", cwd=tmp_path)
    assert second.wait() == 2
    [line] = [line for line in second.text().splitlines() if line.startswith("error: ")]
    assert f"runs/a: is being trained by process {first.pid}" in line
    assert (tmp_path / "runs/a/log.jsonl").read_text().startswith(log)
    first.kill()  # its lock does not count any more
    run("train.py", "--resume", "--epochs", load_last(tmp_path / "runs/a")["epoch"] + 1, cwd=tmp_path)
    assert not (tmp_path / "runs/a/.lock").exists()


def test_a_folder_in_the_place_of_a_lock_is_named(tmp_path):
    (tmp_path / "lock").mkdir()
    with pytest.raises(UserError, match="lock: is a folder"), locked(tmp_path / "lock", "is in use"):
        raise AssertionError


def tiny(data, **changes):
    """A configuration whose epochs take a moment."""
    return Config.from_preset("lite", weights="none", image_size=64, data=str(data), workers=0, epochs=1).changed(
        batch_size=2, **changes
    )


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda word: word.update(illegibility=True), "[1-9]\\d* don't care"),
        (lambda word: word.update(points=[[x + 9999, y] for x, y in word["points"]]), "[1-9]\\d* lie outside"),
        (None, "0 lie outside"),
    ],
)
def test_training_on_nothing_stops_before_the_first_epoch(rendered, tmp_path, spoil, words):
    data = copies(rendered, tmp_path / "data", train=3, val=1)
    path = data / "jsons" / "train.json"
    content = json.loads(path.read_text())
    for image in content["images"].values():
        for word in image["words"].values() if spoil else []:
            spoil(word)
        if not spoil:
            image["words"] = {}
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=f"nothing to learn.*{words}"):
        train.train(tiny(data), tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_words_that_are_not_learned_are_counted_and_a_score_of_0_is_not_the_best(rendered, tmp_path, capsys):
    data = copies(rendered, tmp_path / "data", train=2, val=1)
    path = data / "jsons" / "train.json"
    content = json.loads(path.read_text())
    word = next(iter(next(iter(content["images"].values()))["words"].values()))
    word["illegibility"] = True
    path.write_text(json.dumps(content))
    train.train(tiny(data, box_thresh=1.0), tmp_path / "a")
    said = capsys.readouterr().out
    assert re.search(r"\d+ words are learned; masked: [1-9] don't care", said)
    assert "H-Mean 0.0000" in said and "(best)" not in said and "no epoch has found any text" in said
    assert (tmp_path / "a" / "best.pt").exists()


def test_a_copy_of_best_pt_is_not_resumed_and_a_finished_run_says_so(rendered, tmp_path, capsys):
    config = tiny(rendered)
    train.train(config, tmp_path / "a")
    capsys.readouterr()
    train.train(config, tmp_path / "a", last=load_last(tmp_path / "a"))
    said = capsys.readouterr().out
    assert "all 1 epochs done; train longer with --epochs" in said and "H-Mean" in said.splitlines()[-1]
    last = torch.load(tmp_path / "a/last.pt", weights_only=True)
    moments = last["optimizer"]["state"][0]
    for damaged in (
        {"epoch": -5},
        {"epoch": 1.5},
        {"best_hmean": None},
        {"best_hmean": math.nan},
        {"plan": {**last["plan"], "batch_size": "x"}},
        {"optimizer": {**last["optimizer"], "state": {0: {**moments, "exp_avg": moments["exp_avg"][:1]}}}},
        {"optimizer": {**last["optimizer"], "state": {0: {**moments, "exp_avg_sq": moments["exp_avg_sq"] + math.nan}}}},
    ):
        torch.save({**last, **damaged}, tmp_path / "a/last.pt")
        with pytest.raises(UserError, match=r"last.pt: holds no state of a run"):
            train.train(config.changed(epochs=2), tmp_path / "a", last=load_last(tmp_path / "a"))
    shutil.copy(tmp_path / "a/best.pt", tmp_path / "a/last.pt")
    with pytest.raises(UserError, match=r"last.pt: holds no state of a run.*--init"):
        train.train(config, tmp_path / "a", last=load_last(tmp_path / "a"))


def test_the_learning_rate_is_logged_where_a_run_was_cut_after_the_last_step_of_an_epoch(rendered, tmp_path):
    config = tiny(rendered, warmup_epochs=2.0, save_minutes=1e-9)
    saves, save = [], train.LastSave.save

    def keep(self, training):
        save(self, training)
        saves.append(self.path.read_bytes())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.LastSave, "save", keep)
        train.train(config, tmp_path / "a")
    expected = rows(tmp_path / "a")
    for content in saves[-3:-1]:  # within the epoch, with all steps done, and before its validation
        (tmp_path / "a/last.pt").write_bytes(content)
        last = load_last(tmp_path / "a")
        assert last["epoch"] == 0 and last["running"]["images"] == 6
        train.train(config, tmp_path / "a", last=last)
        assert rows(tmp_path / "a") == expected and expected[0]["lr"] < config.lr


def test_the_smallest_training_size_learns_from_single_images(rendered, tmp_path):
    config = tiny(rendered, train_sizes=(32, 64), pad="square").changed(batch_size=1)
    train.train(config, tmp_path / "a")
    assert rows(tmp_path / "a")[0]["total_loss"] > 0


def test_a_best_pt_without_a_last_pt_is_not_replaced_by_a_resume(rendered, tmp_path):
    best = tmp_path / "runs" / "a" / "best.pt"
    best.parent.mkdir(parents=True)
    best.write_bytes(b"kept")
    said = run("train.py", *FLAGS, "--data", rendered, "--resume", cwd=tmp_path, status=2)
    assert "runs/a: has a best.pt, but no last.pt to resume" in said and "Traceback" not in said
    assert best.read_bytes() == b"kept"


def test_a_lock_that_is_a_pipe_is_one_line(rendered, tmp_path):
    (tmp_path / "runs" / "a").mkdir(parents=True)
    os.mkfifo(tmp_path / "runs" / "a" / ".lock")
    said = run("train.py", *FLAGS, "--data", rendered, "--resume", cwd=tmp_path, status=2)
    assert ".lock: is a pipe" in said and "Traceback" not in said


def test_an_epoch_without_a_pixel_of_text_ends_the_training_in_one_line(rendered, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(rendered, data)
    path = data / "jsons" / "train.json"
    content = json.loads(path.read_text())
    for image in content["images"].values():
        everything = [[0, 0], [9999, 0], [9999, 9999], [0, 9999]]
        image["words"]["all"] = {"points": everything, "illegibility": True, "transcription": "###"}
    path.write_text(json.dumps(content))
    said = run("train.py", *FLAGS, "--epochs", "2", "--data", data, cwd=tmp_path, status=2)
    assert "words are learned" in said and "nothing to learn in epoch 1" in said and "Traceback" not in said


def test_training_images_are_no_place_for_samples(rendered, tmp_path):
    shutil.copytree(rendered, tmp_path / "data")
    image = next((tmp_path / "data" / "images" / "train").iterdir())
    before = image.read_bytes() + PICTURE_MARK.encode()  # as an overlay has it, on which somebody trains
    image.write_bytes(before)
    said = run("train.py", *FLAGS, "--data", "data", "--show-samples", image, cwd=tmp_path, status=2)
    assert "is an input of this command" in said and image.read_bytes() == before


def test_a_save_of_an_older_version_in_mid_epoch_is_resumed(small):
    training = make_training(small)
    training.begin_epoch(small)
    state = training.state()
    del state["running"]["lr"], state["streak"]
    again = make_training(small)
    again.load_state(state | {"config": small}, small)
    assert again.running and again.running.lr == 0


def test_damaged_rows_of_a_log_are_left_out(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"epoch": "1", "lr": 1}\n' + "[" * 200_000 + '\n[1]\n{"epoch": 2}\n')
    log_row(path, {"epoch": 3})
    assert [row["epoch"] for row in map(json.loads, path.read_text().splitlines())] == [1, 2, 3]


def test_words_that_are_too_small_at_the_image_size_end_the_training_in_one_line(rendered, tmp_path):
    data = copies(rendered, tmp_path / "data", train=3, val=1)
    path = data / "jsons" / "train.json"
    content = json.loads(path.read_text())
    for image in content["images"].values():
        corners = [[5.6, 5.6], [6.6, 5.6], [6.6, 6.6], [5.6, 6.6]]  # within a pixel at 64 px
        image["words"] = {"small": {"points": corners, "transcription": "small"}}
    path.write_text(json.dumps(content))
    still = [word for name in ("rotate", "perspective", "flip-p") for word in (f"--{name}", "0")]
    said = run("train.py", *FLAGS, *still, "--scale", "1", "--data", data, cwd=tmp_path, status=2)
    assert "nothing to learn in epoch 1: all text is masked, too small at --image-size" in said
    assert "Traceback" not in said


def test_a_run_that_another_process_has_trained_on_is_resumed_from_there(rendered, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["--preset", "lite", "--weights", "none", "--image-size", "64", "--data", rendered, "--workers", "0"]

    def command(*more):
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, (*words, "--run", "a", *more))])
        train.main()

    command("--epochs", "1")
    first, lock = Path("runs/a/last.pt").read_bytes(), train.lock_run
    command("--epochs", "2", "--resume")
    second = Path("runs/a/last.pt").read_bytes()
    Path("runs/a/last.pt").write_bytes(first)

    def lock_later(run):
        Path("runs/a/last.pt").write_bytes(second)  # between the first look at the run and the lock
        return lock(run)

    monkeypatch.setattr(train, "lock_run", lock_later)
    capsys.readouterr()
    command("--epochs", "3", "--resume")
    said = capsys.readouterr().out
    assert "epoch 3/3: loss" in said and "epoch 2/3: loss" not in said


def test_a_validation_that_is_cut_says_so(rendered, tmp_path, capsys):
    train.train(tiny(rendered, thresh=0.0, box_thresh=0.0, min_size=0.0, max_candidates=1), tmp_path / "a")
    assert "images have as many polygons as --max-candidates allows" in capsys.readouterr().out
