"""What tests share: scripts in processes forked from one that has imported PyTorch, small trainings, checks."""

import importlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from functools import cache
from multiprocessing.forkserver import ensure_running
from pathlib import Path

import numpy as np
import pytest
import shapely
import torch
from hypothesis import strategies as st

import train
from dbnet.checkpoint import load_checkpoint
from dbnet.dataset import Batches, TextDataset, make_loader
from dbnet.errors import run_script
from dbnet.memory import BatchPlan
from dbnet.model import DBNet
from dbnet.training import (
    LastSave,
    make_optimizer,
    make_scaler,
)

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


def make_training(config, model=None):
    torch.manual_seed(0)
    model = model or DBNet(config)
    return train.Training(
        model.train(),
        make_optimizer(model, config),
        make_scaler(config, CPU),
        BatchPlan(config.batch_size, config.accumulate, config.image_size),
    )


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


def refused(result, *words):
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
