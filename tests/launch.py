"""The scripts in processes of their own, forked from one that has imported PyTorch already: a start costs no import."""

import importlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import time
from functools import cache
from multiprocessing.forkserver import ensure_running
from pathlib import Path

import pytest
import torch

from dbnet.errors import run_script

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 240  # until a process counts as hanging, on a busy machine


@cache
def context():
    """Of processes that are forked from one which has imported the scripts."""
    forking = multiprocessing.get_context("forkserver")
    forking.set_forkserver_preload(["launch", "train"])
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
