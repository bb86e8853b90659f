"""What tests share: scripts in processes forked from one that has imported PyTorch, small trainings, hostile input."""

import faulthandler
import importlib
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from functools import cache
from multiprocessing.forkserver import ensure_running
from pathlib import Path

import numpy as np
import pytest
import shapely
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from dbnet.checkpoint import load_checkpoint
from dbnet.dataset import Batches, TextDataset, make_loader
from dbnet.errors import UserError, printable, run_script
from dbnet.model import DBNet
from dbnet.training import LastSave, Training

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 240  # until a process counts as hanging, on a busy machine


@cache
def context():
    """Of processes that are forked from one which has imported the scripts."""
    forking = multiprocessing.get_context("forkserver")
    forking.set_forkserver_preload(["support", "train"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{ROOT / 'tests'}")
        ensure_running()
    return forking


def script(name, arguments, folder, output, environment):
    """Become the process of a script, in a process group with the workers that it starts."""
    os.setpgid(0, 0)
    opened = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(opened, 1)
    os.dup2(opened, 2)
    os.chdir(folder)
    os.environ.update(environment)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # a test run under nohup ignores it, and so would the script
    torch.set_num_threads(1)
    sys.argv = [name, *arguments]
    run_script(importlib.import_module(Path(name).stem).main)


class Launched:
    """A script that runs in `folder`; what it prints is in `output`."""

    def __init__(self, name, *arguments, cwd, **environment):
        self.folder, self.output = Path(cwd), Path(cwd) / f"output-{time.monotonic_ns()}.txt"
        words = (name, [str(word) for word in arguments], cwd, self.output, environment)
        self.process = context().Process(target=script, args=words)
        self.process.start()
        self.pid = self.process.pid

    def text(self):
        """What it has printed so far."""
        return self.output.read_text() if self.output.exists() else ""

    def until(self, pattern):
        """Wait until it has printed what matches, and return the match."""
        end = time.monotonic() + SECONDS
        while not (found := re.search(pattern, self.text())):
            assert self.process.is_alive() and time.monotonic() < end, self.text()
            time.sleep(0.01)
        return found

    def send(self, number):
        """Send a signal to the script alone."""
        os.kill(self.pid, number)

    def wait(self):
        """Its exit status; a script that hangs is killed, and fails the test."""
        self.process.join(SECONDS)
        if self.process.is_alive():
            os.killpg(self.pid, signal.SIGKILL)
            raise AssertionError(f"hangs: {self.text()}")
        return self.process.exitcode

    def kill(self):
        """End it, and the workers that it has started, as a machine that loses power does."""
        os.killpg(self.pid, signal.SIGKILL)
        self.process.join()

    def workers(self):
        """Process ids of its children."""
        return [int(pid) for pid in Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()]


def run(name, *arguments, cwd, status=0, **environment):
    """Run a script to its end, check its exit status, and return what it printed."""
    launched = Launched(name, *arguments, cwd=cwd, **environment)
    assert launched.wait() == status, launched.text()
    return launched.text()


def copies(data, folder, train, val):
    """A data set of so many images, copies of those of `data`."""
    for split, count in (("train", train), ("val", val)):
        (folder / "images" / split).mkdir(parents=True)
        (folder / "jsons").mkdir(exist_ok=True)
        content = json.loads((data / "jsons" / f"{split}.json").read_text())
        originals, images = sorted(content["images"]), {}
        for number in range(count):
            name = originals[number % len(originals)]
            images[f"{number}-{name}"] = content["images"][name]
            shutil.copy(data / "images" / split / name, folder / "images" / split / f"{number}-{name}")
        (folder / "jsons" / f"{split}.json").write_text(json.dumps({"images": images}))
    return folder


CPU = torch.device("cpu")


def make_training(config, model=None, device=CPU):
    torch.manual_seed(0)
    model = model or DBNet(config)
    return Training(model, config, device)


def fail_above(model, limit, record=None):
    """Let the network run out of memory for micro-batches above `limit` images; note the others in `record`."""

    def check(_module, inputs):
        images = inputs[0]
        if len(images) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory (injected)")
        if record is not None:
            record.append(tuple(images.shape[:2]))

    return model.register_forward_pre_hook(check)


def step_batches(config):
    dataset = TextDataset(config, "train", train=True)
    batches = Batches(dataset, config.batch_size, config.seed)
    return list(make_loader(batches, 0, False))[: config.accumulate]


@st.composite
def convex_quads(draw):
    """(4, 2) convex quadrilaterals of small integers, which often share parts of their outlines."""
    points = draw(st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), min_size=4, max_size=12, unique=True))
    outline = shapely.get_coordinates(shapely.convex_hull(shapely.multipoints(points)))
    return outline[:4] if len(outline) > 4 else np.array([[0, 0], [3, 0], [3, 3], [0, 3]])


def command(*words, cwd):
    """Run a script of the project in the folder `cwd`."""
    script, *arguments = map(str, words)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, ROOT / script, *arguments], cwd=cwd, env=environment, capture_output=True, text=True
    )


def rejected(result, *words):
    """Assert exit status 2 and one line on stderr that holds `words`."""
    assert result.returncode == 2, result.stderr
    lines = [line for line in result.stderr.splitlines() if line.strip() and "img" not in line]
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    for word in words:
        assert word in lines[0]


def environments(count):
    """What torchrun sets, for each of `count` processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(count), "GLOO_SOCKET_IFNAME": "lo"}
    return [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]


def rows(run_folder):
    """The log without what depends on time and place."""
    measured = {"train_seconds", "images_per_second", "peak_memory_gb"}
    lines = map(json.loads, (run_folder / "log.jsonl").read_text().splitlines())
    return [{name: value for name, value in row.items() if name not in measured} for row in lines]


def weights(run_folder):
    content = load_checkpoint(run_folder / "last.pt")
    return {**content["model"], **{f"average.{name}": t for name, t in content["average"]["model"].items()}}


def assert_same_run(ours, theirs):
    assert rows(ours) == rows(theirs)
    a, b = weights(ours), weights(theirs)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def save_some(folder, config, epochs):
    """Saves of a run, one for each number of epochs."""
    training, saver = make_training(config), LastSave(folder, config)
    for epoch in epochs:
        training.epoch = epoch
        saver.save(training)


CASE_SECONDS = 30  # of processor time for a hostile case: the longest took 5 on a slow, busy machine


def hostile(test):
    """Mark a property test of hostile input: `make test-long` runs these with many more examples."""
    unhurried = settings(
        deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    )
    return pytest.mark.hostile(unhurried(test))


@contextmanager
def in_time():
    """Fail a case that takes longer than it may; end the whole process for one that does not even return from C."""

    def give_up(*_):
        raise AssertionError(f"over {CASE_SECONDS} s")

    previous = signal.signal(signal.SIGPROF, give_up)
    signal.setitimer(signal.ITIMER_PROF, CASE_SECONDS)
    faulthandler.dump_traceback_later(10 * CASE_SECONDS, exit=True, file=sys.__stderr__)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, previous)


def answered(path, read, *arguments):
    """The result of `read` for a file, or None if it rejects the file with one line that names it."""
    with in_time():
        try:
            return read(path, *arguments)
        except UserError as error:
            message = str(error)
    assert printable(str(path)) in message and message == printable(message), message
    return None


@st.composite
def damages(draw):
    """A function that cuts bytes short, flips some of their bits, or takes a piece out or doubles it."""
    kind = draw(st.sampled_from(["cut", "flip", "flip", "drop", "double"]))
    places = draw(st.lists(st.floats(0, 1, exclude_max=True), min_size=2, max_size=5))
    bit = draw(st.integers(0, 7))

    def damage(data):
        at = [int(place * len(data)) for place in places]
        if kind == "cut":
            return data[: at[0]]
        if kind == "flip":
            flipped = bytearray(data)
            for place in at[1:]:
                flipped[place] ^= 1 << bit
            return bytes(flipped)
        first, last = sorted(at[:2])
        return data[:first] + data[last:] if kind == "drop" else data[:last] + data[first:]

    damage.kind = kind
    return damage


@st.composite
def wild_polygons(draw):
    """(n, 2) of 0 to 1,000 points: simple or crossing itself, of any size and direction, degenerate, or no numbers."""
    kind = draw(st.sampled_from(["star", "star", "scribble", "line", "repeated", "huge", "nan", "inf"]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    count = draw(st.integers(0, 12) | st.sampled_from([63, 64, 65, 300, 1000]))
    points = rng.uniform(-40, 140, (count, 2))
    if kind == "star":
        angles = np.sort(rng.uniform(0, 2 * math.pi, count))
        radii = rng.uniform(5, draw(st.sampled_from([20, 100, 1e4])), count)
        points = np.stack([np.cos(angles), np.sin(angles)], axis=1) * radii[:, None] + rng.uniform(0, 100, 2)
    if kind == "line":
        points[:, 1] = 2 * points[:, 0]
    if kind == "repeated":
        points = points[rng.integers(0, max(1, count // 3), count)] if count else points
    if kind == "huge":
        points *= 10.0 ** draw(st.integers(1, 300))
    if kind in ("nan", "inf") and count:
        points[rng.integers(count), rng.integers(2)] = float(kind) * draw(st.sampled_from([1, -1]))
    if draw(st.booleans()):
        points = np.rint(points)
    return points[:: draw(st.sampled_from([1, -1]))]
