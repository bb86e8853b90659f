"""The commands as a user types them: the whole path, and every mistake answered in one line with exit status 2."""

import csv
import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dbnet.errors import UserError, run_script
from dbnet.submission import read_submission, write_submission

ROOT = Path(__file__).resolve().parents[1]
TINY = ["--weights", "none", "--image-size", "64", "--batch-size", "2", "--epochs", "1", "--workers", "0"]


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


@pytest.fixture
def typed(monkeypatch, capfd):
    """Run a script like `command`, but in this process: a mistake should not cost the start of another one."""

    def run(script, *arguments, cwd):
        monkeypatch.chdir(cwd)
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            run_script(importlib.import_module(Path(script).stem).main)
        return SimpleNamespace(returncode=stop.value.code, stderr=capfd.readouterr().err)

    return run


@pytest.fixture(scope="module")
def place(rendered, tmp_path_factory):
    """A folder with a data set and a run that was trained, by the command, for one epoch."""
    folder = tmp_path_factory.mktemp("place with a space")
    shutil.copytree(rendered, folder / "data" / "datasets")
    trained = command("train.py", "--preset", "lite", "--run", "first", *TINY, cwd=folder)
    assert trained.returncode == 0, trained.stderr
    assert trained.stdout.splitlines()[-1].endswith("python predict.py runs/first/best.pt --out submission.csv")
    return folder


@pytest.fixture
def data(rendered, tmp_path):
    """A copy of the data set to spoil."""
    return Path(shutil.copytree(rendered, tmp_path / "data"))


def test_a_run_writes_its_files(place):
    run = place / "runs" / "first"
    assert {path.name for path in run.iterdir()} == {"best.pt", "last.pt", "config.json", "log.jsonl"}
    [row] = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    assert row["epoch"] == 1 and row["batch"] == "2 x 1"
    assert {"total_loss", "prob_loss", "lr", "precision", "recall", "hmean", "images_per_second"} <= row.keys()
    assert json.loads((run / "config.json").read_text())["image_size"] == 64


def test_evaluate_writes_scores_image_by_image(place, tmp_path):
    result = command("evaluate.py", "runs/first/best.pt", "--json", tmp_path / "scores.json", cwd=place)
    assert result.returncode == 0, result.stderr
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["images"] == len(scores["per_image"]) == 2
    assert scores["hmean"] == pytest.approx(np.mean([image["hmean"] for image in scores["per_image"].values()]))


def test_predict_takes_the_newest_run_and_writes_a_row_an_image(place, tmp_path):
    out = tmp_path / "submission.csv"
    result = command("predict.py", "--out", out, "--overlays", tmp_path / "overlays", cwd=place)
    assert result.returncode == 0, result.stderr
    assert "runs/first/best.pt" in result.stdout
    order = list(json.loads((place / "data/datasets/jsons/test.json").read_text())["images"])
    assert list(read_submission(out)) == order
    assert len(list((tmp_path / "overlays").iterdir())) == len(order)
    scored = command("evaluate.py", "--submission", out, "--split", "test", cwd=place)
    assert scored.returncode == 0, scored.stderr


def test_a_submission_scores_what_its_checkpoint_scores(place, tmp_path):
    flags = ["--thresh", "0.4", "--box-thresh", "0"]
    out = tmp_path / "val.csv"
    images = place / "data/datasets/images/val"
    command("predict.py", "runs/first/best.pt", "--images", images, "--out", out, *flags, cwd=place)
    command("evaluate.py", "--submission", out, "--json", tmp_path / "a.json", cwd=place)
    command("evaluate.py", "runs/first/best.pt", "--json", tmp_path / "b.json", *flags, cwd=place)
    ours, theirs = (json.loads((tmp_path / name).read_text()) for name in ("a.json", "b.json"))
    assert ours == theirs


def test_without_a_run_the_weights_that_ship_are_taken(place, tmp_path):
    for name in ("dbnet", "predict.py"):
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, tmp_path / name)
    arguments = [sys.executable, "predict.py", "--images", place / "data/datasets/images/test"]
    without = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True)
    refused(without, "weights/lite.pt")
    (tmp_path / "weights").mkdir()
    shutil.copy(place / "runs/first/best.pt", tmp_path / "weights/lite.pt")
    result = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("no run in runs/") and "weights/lite.pt" in result.stdout
    assert len(read_submission(tmp_path / "submission.csv")) == 2


def test_a_run_goes_on_where_it_stopped_and_its_weights_start_another_preset(place, tmp_path):
    work = Path(shutil.copytree(place, tmp_path / "work"))
    result = command("train.py", "--run", "first", "--resume", "--epochs", "2", cwd=work)
    assert result.returncode == 0, result.stderr
    rows = [json.loads(line) for line in (work / "runs/first/log.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2]
    larger = ["--image-size", "96", "--batch-size", "2", "--epochs", "1", "--workers", "0"]
    result = command("train.py", "--preset", "lite", "--init", "runs/first/best.pt", "--run", "b", *larger, cwd=work)
    assert result.returncode == 0, result.stderr


def test_show_samples_draws_a_picture(place, tmp_path):
    picture = tmp_path / "a.png"
    result = command("train.py", "--preset", "v1", "--image-size", "128", "--show-samples", picture, cwd=place)
    assert result.returncode == 0, result.stderr
    assert Image.open(picture).width == 3 * 480


def spoil_image(data, split, name="broken"):
    """Cut the first image of a split short."""
    path = sorted((data / "images" / split).iterdir())[0]
    path.write_bytes(path.read_bytes()[:-300])
    return path.name


def test_training_goes_on_without_a_truncated_image_and_says_so(data, tmp_path):
    name = spoil_image(data, "train")
    arguments = ["train.py", "--preset", "lite", "--data", data, *TINY]
    result = command(*arguments, "--run", "a", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert any(line.startswith("left out:") and name in line for line in result.stdout.splitlines())
    assert json.loads((tmp_path / "runs/a/log.jsonl").read_text())["unreadable_images"] == 1
    refused(command(*arguments, "--run", "b", "--strict", cwd=tmp_path), name, "truncated")


def test_prediction_goes_on_with_an_empty_row_for_a_broken_image(place, data, tmp_path):
    checkpoint = place / "runs/first/best.pt"
    name = spoil_image(data, "test")
    out = tmp_path / "submission.csv"
    arguments = ["predict.py", checkpoint, "--data", data, "--out", out]
    result = command(*arguments, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "1 images could not be read" in result.stdout and name in result.stdout
    assert read_submission(out)[name] == []
    out.unlink()
    refused(command(*arguments, "--strict", cwd=tmp_path), name)
    assert not out.exists()


def test_a_mistake_ends_the_process_with_status_2_and_one_line(tmp_path):
    refused(command("predict.py", "absent.pt", cwd=tmp_path), "absent.pt: no such checkpoint")
    refused(command("train.py", "--preset", "v9", cwd=tmp_path), "v9", "v1")


def test_mistakes_of_train(place, data, tmp_path, typed):
    def train(*words):
        return typed("train.py", "--preset", "lite", *TINY, *words, cwd=place)

    refused(train("--data", tmp_path / "absent"), "absent", "--data")
    refused(train("--run", "first"), "runs/first: exists", "--resume")
    refused(train("--run", "absent", "--resume"), "runs/absent", "leave out --resume")
    refused(train("--init", tmp_path / "absent.pt"), "absent.pt: no such checkpoint")
    refused(train("--batch-size", "0"), "--batch-size 0")
    refused(train("--batch-size", "many"), "--batch-size")
    refused(train("--no-such-flag"), "--no-such-flag")
    refused(train("--device", "cuda:99"), "--device cuda:99")
    refused(typed("train.py", "--preset", "v9", cwd=place), "v9", "v1")
    refused(train("--weights", "absent.pth"), "absent.pth", "--weights none")
    (data / "jsons" / "train.json").unlink()
    refused(train("--data", data), "train.json: no such file")
    shutil.rmtree(data / "images" / "train")
    refused(train("--data", data), "no such f")
    assert [path.name for path in (place / "runs").iterdir()] == ["first"]


def test_mistakes_of_evaluate_and_predict(place, tmp_path, typed):
    checkpoint = place / "runs/first/best.pt"
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    refused(typed("evaluate.py", cwd=place), "--submission")
    refused(typed("evaluate.py", checkpoint, "--split", "absent", cwd=place), "absent")
    refused(typed("evaluate.py", checkpoint, "--json", tmp_path / "file" / "a.json", cwd=place), "a.json")
    refused(typed("evaluate.py", checkpoint, "--backbone", "resnet18", cwd=place), "another architecture")
    refused(typed("evaluate.py", checkpoint, "--submission", "a.csv", cwd=place), "--submission")
    refused(typed("predict.py", checkpoint, "--images", tmp_path / "empty", cwd=place), "holds no images")
    refused(typed("predict.py", checkpoint, "--images", tmp_path / "absent", cwd=place), "no such file or folder")
    refused(typed("predict.py", checkpoint, "--out", tmp_path / "absent" / "a.csv", cwd=place), "a.csv")
    refused(typed("predict.py", checkpoint, "--overlays", tmp_path / "file", cwd=place), "file", "another folder")
    refused(typed("predict.py", tmp_path / "file", cwd=place), "file: not a checkpoint")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name,polygons\n", "filename and polygons"),
        ("", "filename and polygons"),
        ("filename,polygons\na.jpg,1 2 3\n", "row 2: a polygon has 3 coordinates"),
        ("filename,polygons\na.jpg,1 2 x 4\n", "row 2: coordinates must be numbers"),
        ("filename,polygons\na.jpg,1 2 nan 4\n", "row 2: a coordinate is not a finite number"),
        ("filename,polygons\na.jpg,\na.jpg,\n", "row 3: a.jpg is there twice"),
        ("filename,polygons\na.jpg\n", "row 2 has 1 columns"),
        ("filename,polygons\nunknown.jpg,\n", "unknown.jpg is not in"),
    ],
)
def test_broken_submissions_are_refused(place, tmp_path, typed, text, words):
    path = tmp_path / "a.csv"
    path.write_text(text)
    refused(typed("evaluate.py", "--submission", path, "--data", place / "data/datasets", cwd=tmp_path), "a.csv", words)


names = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0/\r"), min_size=1, max_size=40)
polygons = st.lists(
    st.lists(st.tuples(st.integers(-9, 9999), st.integers(-9, 9999)), min_size=1, max_size=9), max_size=5
)


@given(st.dictionaries(names, polygons, max_size=5))
def test_submissions_round_trip_with_any_file_name(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("csv") / "a.csv"
    write_submission(path, {name: [np.array(polygon) for polygon in found] for name, found in rows.items()})
    with path.open(newline="", encoding="utf-8") as file:
        assert next(csv.reader(file)) == ["filename", "polygons"]
    back = read_submission(path)
    assert list(back) == list(rows)
    for name, found in rows.items():
        assert [list(map(tuple, polygon.astype(int).tolist())) for polygon in back[name]] == found


def test_a_submission_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("before")
    with pytest.raises(AttributeError):
        write_submission(path, {"a.jpg": [np.zeros((4, 2), int)], "b.jpg": ["no array"]})
    assert path.read_text() == "before" and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(UserError, match=r"absent/a\.csv"):
        write_submission(tmp_path / "absent" / "a.csv", {})
