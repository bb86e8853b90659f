"""Windows and macOS lack modules and functions of Linux: everything is imported, and works, without them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT

# What the process and all that it starts see: for this program alone, since PyTorch and Python here are those of Linux.
WITHOUT = """
import builtins, ctypes, os, shutil, signal, sys

MODULES = {"resource", "fcntl", "pwd", "grp", "termios", "posix"}
FUNCTIONS = ["preadv", "pwritev", "pread", "pwrite", "sched_getaffinity", "statvfs", "fstatvfs", "posix_fallocate",
             "fork", "getuid", "geteuid", "mkfifo", "killpg", "setpgid", "getpgid", "setsid", "sync"]
imported = builtins.__import__
usage = shutil.disk_usage(".")
shutil.disk_usage = lambda path: usage  # Windows has it without statvfs

def without(name, globals=None, *rest, **more):
    module = (globals or {}).get("__name__", "")
    if name in MODULES and module.split(".")[0] in {"dbnet", "train", "evaluate", "predict", "export", "__main__"}:
        raise ImportError(f"{name} is not there, for {module}")
    return imported(name, globals, *rest, **more)

builtins.__import__ = without
for function in FUNCTIONS:
    if hasattr(os, function):
        delattr(os, function)
for number in ("SIGHUP", "SIGUSR1", "SIGUSR2", "SIGQUIT"):
    if hasattr(signal, number):
        delattr(signal, number)
"""


@pytest.fixture
def elsewhere(tmp_path):
    """Run Python as on another system, in a folder of its own."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(WITHOUT)

    def run(*words):
        path = os.pathsep.join([str(tmp_path / "site"), str(ROOT)])
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        words = [sys.executable, *map(str, words)]
        result = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500)
        assert result.returncode == 0, result.stderr
        return result.stdout

    return run


def test_every_module_is_imported_without_what_linux_has(elsewhere):
    files = [*(ROOT / "dbnet").rglob("*.py"), *(ROOT / name for name in ("train.py", "predict.py"))]
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in files if path.stem != "__main__"]
    names = [name.removesuffix(".__init__") for name in names]
    code = f"import importlib\nfor name in {names}:\n    importlib.import_module(name)\nprint('all')"
    assert elsewhere("-c", code) == "all\n"


LOAD = """
from pathlib import Path
from dbnet.config import PRESETS
from dbnet.dataset import Batches, TextDataset, make_loader
from dbnet.files import locked

Path("a").mkdir()
lock = locked(Path("a/lock"), "is in use")
lock.__enter__()
dataset = TextDataset(PRESETS["v0"].changed(data=%r, image_size=64), "train", train=True)
batches = make_loader(Batches(dataset, 2, seed=0), workers=1, pin_memory=False)
print([len(batch["image"]) for batch in batches])
lock.__exit__(None, None, None)
assert not Path("a").exists()
"""


def test_a_spawned_worker_loads_training_samples_without_what_linux_has(elsewhere, rendered, tmp_path):
    assert elsewhere("-c", LOAD % str(rendered)) == "[2, 2, 2]\n"
    assert not list(tmp_path.glob("**/dbnet-cache-*"))


@pytest.mark.long
def test_the_scripts_run_with_spawned_workers_without_what_linux_has(elsewhere, rendered, tmp_path):
    train = ["--preset", "demo", "--weights", "none", "--data", rendered, "--image-size", "64", "--epochs", "1"]
    elsewhere(ROOT / "train.py", *train, "--workers", "1", "--run", "r", "--batch-size", "4")
    images = rendered / "images" / "test"
    elsewhere(ROOT / "predict.py", "runs/r/best.pt", "--images", images, "--overlays", "overlays", "--out", "a.csv")
    assert len((tmp_path / "a.csv").read_text().splitlines()) == 1 + len(list(images.iterdir()))
    assert not list(Path(tmp_path).glob("**/dbnet-cache-*"))


@pytest.mark.parametrize(
    ("module", "error", "words"),
    [
        # As on a server without a screen, where the wheel opencv-python finds no libGL.
        ("cv2", "ImportError('libGL.so.1: cannot open shared object file')", ("libGL.so.1", "opencv-python-headless")),
        ("torch", "ModuleNotFoundError('No module named torch', name='torch')", ("pip install torch",)),
    ],
)
def test_a_missing_library_is_one_line_with_the_way_out(tmp_path, module, error, words):
    (tmp_path / f"{module}.py").write_text(f"raise {error}")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    for script in ("train.py", "predict.py a.pt", "evaluate.py a.pt", "export.py a.pt --onnx a.onnx"):
        name, *arguments = script.split()
        command = [sys.executable, ROOT / name, *arguments]
        result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        lines = result.stderr.strip().splitlines()
        assert result.returncode == 2 and len(lines) == 1, result.stderr
        assert all(word in lines[0] for word in words)
    help_ = [sys.executable, ROOT / "train.py", "--help"]
    assert subprocess.run(help_, cwd=tmp_path, env=environment, capture_output=True).returncode == 0
