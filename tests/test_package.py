"""What `pip install` gives: commands, API, weights and license, beside other packages and modules of any name."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
from pathlib import Path
from types import SimpleNamespace

import pytest
from support import rejected

import dbnet
from dbnet.errors import typed
from dbnet.formats import read_submission

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("dbnet", "weights", "tests", "docs", "benchmarks", ".ci")
COMMANDS = ("train", "evaluate", "predict", "export")
SMALL = ("--image-size", "96", "--workers", "0")


def run(*words, cwd, **environment):
    """Run a program to its end; no variable leads it to this checkout."""
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "RANK", "WORLD_SIZE")}
    environment = {**clean, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run([*map(str, words)], cwd=cwd, env=environment, capture_output=True, text=True)


def succeeds(*words, cwd):
    done = run(*words, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the checkout, in which building leaves its files."""
    pytest.importorskip("setuptools", minversion="77")
    folder = tmp_path_factory.mktemp("source") / "checkout"
    folder.mkdir()
    for name in PARTS:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.iterdir():
        if path.is_file() and path.name != ".git":
            shutil.copy(path, folder)
    return folder


@pytest.fixture(scope="module")
def installed(source, tmp_path_factory):
    """The wheel in a fresh environment beside other people's modules that have the names of our scripts."""
    folder = tmp_path_factory.mktemp("installed")
    build = "from setuptools import build_meta; print(build_meta.build_wheel('out'))"
    (source / "out").mkdir()
    wheel = source / "out" / succeeds(sys.executable, "-c", build, cwd=source).splitlines()[-1]
    venv.create(folder / "environment")
    binaries = next(folder.glob("environment/*/activate")).parent
    site = next(folder.glob("environment/**/site-packages"))
    (site / "requirements.pth").write_text(sysconfig.get_path("purelib"))  # those of this environment serve
    pip = [sys.executable, "-m", "pip", "--python", binaries / "python", "install", "--no-deps", "--no-index"]
    succeeds(*pip, wheel, cwd=folder)
    (folder / "work").mkdir()
    for place in (site, folder / "work"):
        for name in COMMANDS:
            (place / f"{name}.py").write_text(f"raise SystemExit('not our {name}')")
        (place / "evaluate").mkdir()
        (place / "evaluate" / "__init__.py").write_text("raise SystemExit('not our evaluate')")
    return SimpleNamespace(work=folder / "work", site=site, python=binaries / "python", bin=binaries)


def test_the_wheel_holds_one_package_with_scripts_weights_pages_types_and_license(installed):
    [details] = installed.site.glob("dbnet_text-*.dist-info")
    assert (details / "top_level.txt").read_text().split() == ["dbnet"]
    assert "Apache License" in (details / "licenses" / "LICENSE").read_text()
    metadata = (details / "METADATA").read_text()
    assert f"\nVersion: {dbnet.__version__}\n" in metadata and "\nLicense-Expression: Apache-2.0\n" in metadata
    package = installed.site / "dbnet"
    assert {path.stem for path in (package / "scripts").glob("*.py")} == set(COMMANDS)
    ours = {path.relative_to(ROOT) for path in (ROOT / "dbnet").rglob("*") if path.is_file()}
    assert {path for path in ours if "__pycache__" not in path.parts} <= {
        path.relative_to(installed.site) for path in package.rglob("*")
    }
    assert (package / "py.typed").exists() and (package / "weights" / "lite.pt").stat().st_size > 1e6


def test_commands_and_api_run_beside_modules_named_as_our_scripts(installed, rendered):
    test_images = rendered / "images" / "test"
    out = succeeds(installed.bin / "dbnet-predict", "--images", test_images, *SMALL, cwd=installed.work)
    assert str(installed.site / "dbnet" / "weights" / "lite.pt") in out
    assert len(read_submission(installed.work / "submission.csv")) == 2
    weights = installed.site / "dbnet" / "weights" / "lite.pt"
    shown = succeeds(installed.bin / "dbnet-evaluate", weights, "--data", rendered, *SMALL, cwd=installed.work)
    assert "H-Mean" in shown
    succeeds(installed.bin / "dbnet-export", weights, "--half", "half.pt", cwd=installed.work)
    api = "import sys, dbnet; print(len(dbnet.Detector.load(device='cpu').detect(sys.argv[1])), dbnet.__version__)"
    image = next(test_images.iterdir())
    assert succeeds(installed.python, "-c", api, image, cwd=installed.work).split()[1] == dbnet.__version__
    rejected(run(installed.bin / "dbnet-predict", "absent.pt", cwd=installed.work), "absent.pt: no such checkpoint")


def test_the_help_of_a_command_names_commands(installed):
    shown = succeeds(installed.bin / "dbnet-predict", "--help", cwd=installed.work)
    assert "    dbnet-predict --out submission.csv" in shown and "-m -- dbnet.scripts.predict" in shown
    assert ".py " not in shown.partition("options:")[0]


def test_an_installed_training_names_the_next_command_as_it_was_typed(installed, rendered):
    train = ["--preset", "demo", "--data", rendered, "--epochs", "1", "--run", "first", "--batch-size", "2", *SMALL]
    shown = succeeds(installed.bin / "dbnet-train", *train, cwd=installed.work)
    assert "Next: dbnet-predict runs/first/best.pt" in shown.splitlines()[-1]


@pytest.mark.long
def test_torchrun_starts_the_installed_training(installed, rendered):
    train = ["--preset", "demo", "--data", rendered, "--epochs", "1", "--run", "two", "--batch-size", "2", *SMALL]
    torchrun = [installed.python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    shown = succeeds(*torchrun, "-m", "--", "dbnet.scripts.train", *train, cwd=installed.work)
    assert "Next: python -m dbnet.scripts.predict runs/two/best.pt" in shown


def test_the_form_in_which_a_script_was_started_is_the_form_of_the_next(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/usr/local/bin/dbnet-train"])
    assert typed("predict") == "dbnet-predict"
    assert typed("train", 4) == "torchrun --nproc-per-node 4 -m -- dbnet.scripts.train"
    monkeypatch.setattr(sys, "argv", ["train.py"])
    assert typed("predict") == "python predict.py"
    assert typed("train", 2) == "torchrun --nproc-per-node 2 -- train.py"
    monkeypatch.setattr(sys, "argv", ["../a copy/train.py"])
    assert typed("predict") == "python '../a copy/predict.py'"
    started_by_name = SimpleNamespace(__spec__=SimpleNamespace(name="dbnet.scripts.train"))
    monkeypatch.setitem(sys.modules, "__main__", started_by_name)
    assert typed("predict") == "python -m dbnet.scripts.predict"
    assert typed("train", 2) == "torchrun --nproc-per-node 2 -m -- dbnet.scripts.train"


def test_the_source_distribution_holds_the_checkout_and_its_tests_run(source, tmp_path):
    build = "from setuptools import build_meta; print(build_meta.build_sdist('sdist'))"
    name = succeeds(sys.executable, "-c", build, cwd=source).splitlines()[-1]
    with tarfile.open(source / "sdist" / name) as archive:
        archive.extractall(tmp_path, filter="data")
    [unpacked] = tmp_path.iterdir()
    files = {path.relative_to(source) for name in PARTS for path in (source / name).rglob("*") if path.is_file()}
    assert files <= {path.relative_to(unpacked) for path in unpacked.rglob("*")}
    assert {"Makefile", "LICENSE", "train.py", "requirements-dev.txt"} <= {path.name for path in unpacked.iterdir()}
    shown = succeeds(
        sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests/test_config.py", "-k", "preset", cwd=unpacked
    )
    assert "passed" in shown
