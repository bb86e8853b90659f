"""The pages: each command runs, in the order shown, in a size for tests; the READMEs are in step; links lead somewhere.

A command is a line of a block marked `sh`. It runs in a copy of the checkout that has what a reader has: the scripts,
`photos/`, `scans/`, `receipt.jpg`, and all files that the commands before it have written.
"""

import importlib
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from dbnet.checkpoint import save_checkpoint
from dbnet.config import PRESETS
from dbnet.errors import UserError
from dbnet.model import DBNet

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "docs/index.md", "docs/your-own-data.md", "docs/presets.md", "docs/how-it-works.md")
"""Pages whose commands run here; docs/service.md has tests of its own."""
MODULES = {
    "train.py": "train",
    "evaluate.py": "evaluate",
    "predict.py": "predict",
    "export.py": "export",
    "benchmarks/plans.py": "benchmarks.plans",
    "dbnet.synth": "dbnet.synth.__main__",
}

TWO_MACHINES = (
    "torchrun --nnodes 2 --nproc-per-node 1 --node-rank {} --rdzv-backend c10d --rdzv-endpoint HOST:29500 "
    "-- train.py --preset v1 --run two"
)
NOT_RUN = {
    "make test": "is what runs this test",
    "make bench": "is minutes of measurement, which wants a quiet machine",
    "pip install .": "takes a package index; tests/test_package.py looks at what such an installation consists of",
    TWO_MACHINES.format(0): "takes two machines; tests/test_distributed.py has several processes on one",
    TWO_MACHINES.format(1): "takes two machines",
}
"""Commands that no test runs, and why not."""

SLOW = {
    "torchrun --nproc-per-node 2 -- train.py --preset v1 --effective-batch 16",
    "python benchmarks/plans.py --preset v1",
    "python benchmarks/plans.py --preset v1 --data data/mine",
}
"""Commands that only `make test-long` runs."""

FOREIGN_FLAGS = {  # of programs that are not this one
    *("--nnodes", "--nproc-per-node", "--node-rank", "--rdzv-backend", "--rdzv-endpoint", "--max-restarts"),
    *("--shm-size", "--index-url", "--output"),
    *("--data-binary", "--host", "--port", "--rm", "--no-cache-dir", "--create-home"),
}


def text_of(page):
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page):
    """(language, content) of each fenced block, in order."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", text_of(page), re.MULTILINE | re.DOTALL)


def shown(page):
    """The commands and Python blocks of a page in their order."""
    for language, content in blocks(page):
        if language == "python":
            yield content
        elif language == "sh":
            yield from (re.sub(r"\s+#.*", "", line) for line in content.splitlines())


def known_as(item):
    """What NOT_RUN and SLOW call it: a command by itself, a Python block by its first line."""
    return item.splitlines()[0]


@pytest.fixture
def place(rendered, small, tmp_path, monkeypatch):
    """The copy of the checkout, which is made the current folder."""
    for name in ("dbnet", "docs", "weights"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in (ROOT / "Makefile", *ROOT.glob("*.py"), *ROOT.glob("requirements*.txt")):
        shutil.copy(path, tmp_path)
    if not (tmp_path / "weights" / "lite.pt").exists():  # until there are trained ones
        (tmp_path / "weights").mkdir(exist_ok=True)
        torch.manual_seed(0)
        config = small.changed(data="data/datasets", image_size=64, thresh=0.5, box_thresh=0.0)
        save_checkpoint(tmp_path / "weights" / "lite.pt", config, DBNet(config))
    (tmp_path / "photos").mkdir()
    images = sorted((rendered / "images").glob("*/*.jpg"))
    for number, path in enumerate([*images, *images]):
        shutil.copy(path, tmp_path / "photos" / f"photo_{number:02d}.jpg")
    shutil.copy(images[0], tmp_path / "receipt.jpg")
    (tmp_path / "scans").mkdir()
    Image.open(tmp_path / "receipt.jpg").convert("RGB").save(tmp_path / "scans" / "scan.pdf")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return tmp_path


def in_test_size(words):
    """The words of a command with flags added that make its work small; of a flag given twice the last counts."""
    if "dbnet.synth" in words:
        return [*words, "--train", "6", "--val", "2", "--test", "2", "--size", "192"]
    if {"train.py", "benchmarks/plans.py"} & {*words}:
        epochs = "2" if "--resume" in words else "1"
        small = ["--image-size", "64", "--batch-size", "2", "--epochs", epochs, "--weights", "none", "--workers", "0"]
        small += ["--max-candidates", "20"]  # or tuning would take in hundreds of specks of a hardly trained network
        sizes = ["--train-sizes", "32,64"] if {"v2", "best"} & set(words) else []
        return [*words, *small, *sizes]
    if "docs/make_pictures.py" in words:
        return [*words, "--image-size", "256"]
    # A run was trained at 64 px; what is tuned must be evaluated as it was trained.
    return [*words, "--workers", "0", *(["--image-size", "224"] if "weights/lite.pt" in words else [])]


def run(command, place):
    """Run a command as in a shell; Python scripts run in this process, which has imported torch already."""
    program, *words = shlex.split(command)
    if command == "make demo":
        (place / ".venv").mkdir()
        (place / ".venv" / ".installed").touch()
        # As from a shell, also where make runs these tests.
        alone = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "VENV", "PYTHON"))}
        recipe = subprocess.check_output(["make", "-n", "demo"], cwd=place, env=alone, text=True)
        steps = [line for line in recipe.splitlines() if line.startswith(".venv/bin/python ")]
        assert len(steps) > 3
        for line in steps:
            run(line.removeprefix(".venv/bin/"), place)
    elif program == "python":
        run_python(in_test_size(words))
    elif program == "torchrun":
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        result = subprocess.run(
            [*torchrun, *in_test_size(words)], cwd=place, env=environment, capture_output=True, text=True
        )
        assert result.returncode == 0, f"{command}\n{result.stderr}"
    else:
        assert program in ("mkdir", "cp"), f"{command}: no test knows how to run it"
        subprocess.run(["bash", "-c", command], cwd=place, check=True)


def run_python(words):
    script, *arguments = words[1:] if words[0] == "-m" else words
    sys.argv = [script, *arguments]
    try:
        if script in MODULES or words[0] == "-m":
            importlib.import_module(MODULES.get(script, script)).main()
        else:
            runpy.run_path(script, run_name="__main__")
    except UserError as error:
        pytest.fail(f"{' '.join(words)}: {error}")
    except SystemExit as stop:
        assert not stop.code, words


def run_page(page, place, monkeypatch, left_out):
    monkeypatch.setattr(sys, "argv", sys.argv)
    for item in shown(page):
        if known_as(item) in left_out:
            continue
        if "\n" in item:
            exec(compile(item, page, "exec"), {"__name__": page})
        else:
            run(item, place)


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_run_in_the_order_shown(page, place, rendered, monkeypatch):
    if page != "README.md":  # which shows how to come by a data set
        shutil.copytree(rendered, place / "data" / "datasets")
    run_page(page, place, monkeypatch, NOT_RUN.keys() | SLOW)
    if page == "README.md":
        for name in ("submission.csv", "found.json", "scores.json", "report.html", "samples.png", "overlays"):
            assert (place / name).exists()
        assert (place / "runs/first/log.jsonl").read_text().count("\n") == 2  # resumed for one epoch more


@pytest.mark.long
@pytest.mark.parametrize("page", [page for page in PAGES if SLOW & {known_as(item) for item in shown(page)}])
def test_the_slow_commands_run_in_their_place(page, place, monkeypatch):
    run_page(page, place, monkeypatch, NOT_RUN.keys())


def test_what_is_not_run_is_shown_and_known():
    items = {known_as(item) for page in PAGES for item in shown(page)}
    assert items >= NOT_RUN.keys() | SLOW
    targets = re.findall(r"^([a-z-]+):", text_of("Makefile"), re.MULTILINE)
    shown_targets = {item.removeprefix("make ") for item in items if item.startswith("make ")}
    assert shown_targets <= set(targets)


def test_the_readmes_have_the_same_sections_commands_tables_and_links():
    english, korean = text_of("README.md"), text_of("README.ko.md")
    assert [without_comments(*block) for block in blocks("README.md")] == [
        without_comments(*block) for block in blocks("README.ko.md")
    ]
    for pattern in (r"^#+ ", r"^\|.*\|$", r"^!\["):
        assert len(re.findall(pattern, english, re.MULTILINE)) == len(re.findall(pattern, korean, re.MULTILINE))
    levels, levels_korean = (re.findall(r"^(#+) ", text, re.MULTILINE) for text in (english, korean))
    assert levels == levels_korean
    sections, sections_korean = (re.split(r"^#+ .*$", text, flags=re.MULTILINE) for text in (english, korean))
    for section, section_korean in zip(sections, sections_korean, strict=True):
        assert inline(section) == inline(section_korean)
        assert links(section) - {"README.ko.md"} == links(section_korean) - {"README.md"}


def without_comments(language, content):
    """A block without its comments, which are translated."""
    return language, content if language == "json" else re.sub(r"\s+# .*", "", content)


def inline(text):
    """The code in running text that is not a number's or a word's own business: flags, files, names."""
    return set(re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)))


def links(text):
    """Where the links of a text lead to; without those to its own sections."""
    return set(re.findall(r"\]\(([^#)\s][^)\s]*)\)", text))


def anchors(page):
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", page, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_and_pictures_of_all_pages_are_there():
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("weights/*.md"), *ROOT.glob("benchmarks/*.md")]
    assert len(pages) >= 6
    for page in pages:
        for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
            if link.startswith(("https://", "http://")):
                continue
            name, _, anchor = link.partition("#")
            target = page.parent / name if name else page
            assert target.is_file(), f"{page}: {link}"
            assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), f"{page}: {link}"


def test_every_picture_is_shown_and_small():
    pictures = [path for suffix in ("jpg", "png") for path in ROOT.glob(f"docs/*.{suffix}")]
    pages = "".join(text_of(page) for page in PAGES)
    for path in pictures:
        assert path.name in pages or path.name == "report.jpg"
        assert path.stat().st_size < 200_000
    assert sum(path.stat().st_size for path in pictures) < 800_000


def test_flags_that_the_pages_name_exist(place, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", sys.argv)
    for script in (*(name for name in MODULES if name.endswith(".py")), "docs/make_pictures.py"):
        run_python([script, "--help"])
    run_python(["-m", "dbnet.synth", "--help"])
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    for name in ("accuracy", "weights"):
        run_python([str(ROOT / "benchmarks" / f"{name}.py"), "--help"])
    known = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", capsys.readouterr().out))
    for page in (*PAGES, "README.ko.md", "docs/service.md", "weights/README.md"):
        named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", text_of(page)))
        assert named <= known | FOREIGN_FLAGS, page


def test_the_readmes_name_every_module_and_every_preset():
    modules = {path.stem for path in (ROOT / "dbnet").glob("*.py")} - {"__init__"} | {"synth"}
    for page in ("README.md", "README.ko.md"):
        text = text_of(page)
        rows = re.findall(r"^\| (`.*`) \|", re.split(r"^## ", text, flags=re.MULTILINE)[-1], re.MULTILINE)
        named = re.findall(r"`(\w+)`", " ".join(rows))
        assert len(named) == len(set(named))
        assert set(named) == modules
        assert all(f"`{preset}`" in text for preset in PRESETS)
