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
from support import command, rejected

import predict as predict_script
from dbnet.annotations import Annotation, write_labels
from dbnet.checkpoint import change_checkpoint, load_checkpoint
from dbnet.errors import ImageError, UserError, run_script
from dbnet.formats import read_submission
from dbnet.inference import Pipeline
from dbnet.pictures import ImagePictures

ROOT = Path(__file__).resolve().parents[1]
TINY = ["--weights", "none", "--image-size", "64", "--batch-size", "2", "--epochs", "1", "--workers", "0"]


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
    following = f"Next: python {ROOT / 'predict.py'} runs/first/best.pt --out submission.csv"
    assert trained.stdout.splitlines()[-1].endswith(following)
    return folder


@pytest.fixture
def data(rendered, tmp_path):
    """A copy of the data set to spoil."""
    return Path(shutil.copytree(rendered, tmp_path / "data"))


def test_a_run_writes_its_files(place):
    run = place / "runs" / "first"
    files = {path.name for path in run.iterdir() if not path.name.startswith("events.out.tfevents")}
    assert files == {"best.pt", "last.pt", "last.prev.pt", "config.json", "log.jsonl", "curves.png"}
    [row] = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    assert row["epoch"] == 1 and row["batch"] == "2 x 1"
    assert {"total_loss", "prob_loss", "lr", "precision", "recall", "hmean", "images_per_second"} <= row.keys()
    assert json.loads((run / "config.json").read_text())["image_size"] == 64


def test_a_training_whose_screen_is_gone_goes_on_to_its_end(place):
    words = [sys.executable, ROOT / "train.py", "--preset", "lite", "--run", "piped", *TINY]
    shell = ["bash", "-o", "pipefail", "-c", '"$@" | head -c 1', "bash", *words]
    result = subprocess.run(shell, cwd=place, capture_output=True)
    assert (result.returncode, len(result.stdout)) == (0, 1), result.stderr
    assert (place / "runs" / "piped" / "best.pt").exists()
    shutil.rmtree(place / "runs" / "piped")


@pytest.mark.parametrize(("redirect", "status"), [("| true", 0), ("> /dev/full", 2), (">&-", 0)])
def test_results_are_written_when_the_screen_is_gone(data, tmp_path, redirect, status):
    (tmp_path / "a.csv").write_text("filename,polygons\n")
    words = [ROOT / "evaluate.py", "--submission", tmp_path / "a.csv", "--data", data, "--json", tmp_path / "a.json"]
    shell = ["bash", "-o", "pipefail", "-c", f'"$@" {redirect}', "bash", sys.executable, *words]
    result = subprocess.run(shell, capture_output=True, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert result.returncode == status, result.stderr
    assert json.loads((tmp_path / "a.json").read_text())["images"] == 2


def test_evaluate_writes_scores_image_by_image(place, tmp_path):
    result = command("evaluate.py", "runs/first/best.pt", "--json", tmp_path / "scores.json", cwd=place)
    assert result.returncode == 0, result.stderr
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["images"] == len(scores["per_image"]) == 2
    assert scores["hmean"] == pytest.approx(np.mean([image["hmean"] for image in scores["per_image"].values()]))


@pytest.fixture
def evaluate(place, monkeypatch, capsys):
    """Run evaluate.py in this process, to success, and return what it says."""

    def run(*arguments):
        monkeypatch.chdir(place)
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
        capsys.readouterr()
        importlib.import_module("evaluate").main()
        return capsys.readouterr().out

    return run


def test_tuned_values_are_saved_if_they_are_better_and_evaluation_then_uses_them(place, data, tmp_path, evaluate):
    def scores(*flags):
        evaluate(checkpoint, "--data", data, "--json", tmp_path / "a.json", *flags)
        return json.loads((tmp_path / "a.json").read_text())

    # A network that was hardly trained finds something in one of the two images; copies of it are the data set.
    checkpoint = Path(shutil.copy(place / "runs/first/best.pt", tmp_path / "best.pt"))
    found = scores("--thresh", "0.3", "--box-thresh", "0.2")["per_image"]
    name = max(found, key=lambda name: found[name]["hmean"])
    annotations = json.loads((data / "jsons/val.json").read_text())["images"]
    copies = [f"{number}{Path(name).suffix}" for number in range(10)]
    for copy in copies:
        shutil.copy(data / "images/val" / name, data / "images/val" / copy)
    (data / "jsons/val.json").write_text(json.dumps({"images": dict.fromkeys(copies, annotations[name])}))
    change_checkpoint(checkpoint, {"thresh": 0.95, "box_thresh": 0.95})
    before = load_checkpoint(checkpoint)
    assert scores()["hmean"] == 0

    tune = [checkpoint, "--data", data, "--tune", "--workers", "0"]
    shown = evaluate(*tune, "--json", tmp_path / "tuning.json")
    assert load_checkpoint(checkpoint)["config"] == before["config"]  # nothing is saved unasked
    best = json.loads((tmp_path / "tuning.json").read_text())["combinations"][0]
    assert best["hmean"] > 0 and f"{best['hmean']:+.4f}" in shown

    shown = evaluate(*tune, "--save")
    assert "\nsaved: " in shown
    assert f"which also choose what is looked at twice: H-Mean {scores()['hmean']:.4f}" in shown
    after = load_checkpoint(checkpoint)
    values = {"thresh": best["thresh"], "box_thresh": best["box_thresh"]}
    values |= {"growth": best["growth"], "min_size": best["min_size"]}
    assert after["config"] == before["config"].changed(**values)
    assert after["tunings"][0]["before"]["thresh"] == 0.95 and after["tunings"][0]["after"] == values
    assert after["epoch"] == before["epoch"] and after["model"].keys() == before["model"].keys()
    assert scores()["hmean"] == pytest.approx(best["hmean"])

    content = checkpoint.read_bytes()
    assert "\nnot saved: " in evaluate(*tune, "--save")
    assert checkpoint.read_bytes() == content


def test_evaluate_shows_iou_and_recall_by_size_of_text(evaluate, tmp_path):
    shown = evaluate("runs/first/best.pt", "--json", tmp_path / "scores.json")
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert f"IoU over 0.5: precision {scores['iou']['precision']:.4f}" in shown
    assert len(scores["by_size"]) == 8
    assert sum(row["chars_gt"] for row in scores["by_size"]) == scores["chars_gt"] > 0
    assert sum(row["chars_tp"] for row in scores["by_size"]) == scores["chars_tp"]
    assert f"{scores['by_size'][5]['chars_gt']}" in shown.split("characters")[1].split("recall")[0]


def test_a_submission_is_scored_without_the_images_except_by_size(data, tmp_path, evaluate):
    images = json.loads((data / "jsons/val.json").read_text())["images"]
    words = {
        name: Annotation([np.array(word["points"], int) for word in image["words"].values()])
        for name, image in images.items()
    }
    write_labels(tmp_path / "a.csv", "csv", words)
    arguments = ["--submission", tmp_path / "a.csv", "--data", data, "--json", tmp_path / "a.json"]
    assert "left out" not in evaluate(*arguments)
    shutil.rmtree(data / "images")
    assert "2 images whose files are missing" in evaluate(*arguments)
    scores = json.loads((tmp_path / "a.json").read_text())
    assert scores["iou"]["recall"] == 1 and sum(row["chars_gt"] for row in scores["by_size"]) == 0


def test_evaluate_writes_a_report_and_compares(place, tmp_path):
    earlier, page, empty = tmp_path / "earlier.json", tmp_path / "report.html", tmp_path / "empty.csv"
    flags = ["--thresh", "0.4", "--box-thresh", "0", "--json", earlier, "--report", page]
    result = command("evaluate.py", "runs/first/best.pt", *flags, cwd=place)
    assert result.returncode == 0, result.stderr
    assert all(f'id="{kind}-{index}"' in page.read_text() for kind in ("jpeg", "prob_map") for index in range(2))

    empty.write_text("filename,polygons\n")
    result = command("evaluate.py", "--submission", empty, "--report", page, "--compare", earlier, cwd=place)
    assert result.returncode == 0, result.stderr
    precision = json.loads(earlier.read_text())["precision"]
    assert (
        f"precision  {precision:.4f}  0.0000  {0 - precision:+.4f}" in result.stdout
        and "2 images in both" in result.stdout
    )
    assert 'id="jpeg-1"' in page.read_text() and 'id="prob_map-' not in page.read_text()
    assert page.read_text().count('"error":null') == 2


def test_a_report_or_a_comparison_that_cannot_be_is_refused_before_the_work(place, tmp_path, typed):
    score = ["evaluate.py", "runs/first/best.pt"]
    rejected(
        typed(*score, "--report", tmp_path / "no" / "report.html", cwd=place), "no/report.html", "cannot be written"
    )
    rejected(typed(*score, "--compare", tmp_path / "no.json", cwd=place), "no.json", "cannot be read")
    other = tmp_path / "other.json"
    other.write_text('{"per_image": {"elsewhere.jpg": {"precision": 1, "recall": 1, "hmean": 1}}}')
    rejected(typed(*score, "--compare", other, cwd=place), "other.json", "no image of this split")
    (tmp_path / "empty.csv").write_text("filename,polygons\n")
    submission = ["evaluate.py", "--submission", tmp_path / "empty.csv"]
    rejected(typed(*submission, "--compare", other, cwd=place), "other.json", "no image of this split")


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


def test_images_of_one_name_but_for_their_suffix_get_an_overlay_each(place, tmp_path):
    for name, image in zip(("a.jpg", "a.png"), (place / "data/datasets/images/test").iterdir(), strict=True):
        shutil.copy(image, tmp_path / name)
    flags = ["--images", tmp_path, "--out", tmp_path / "a.csv", "--overlays", tmp_path / "overlays"]
    result = command("predict.py", "runs/first/best.pt", *flags, cwd=place)
    assert result.returncode == 0, result.stderr
    assert {path.name for path in (tmp_path / "overlays").iterdir()} == {"a.jpg.jpg", "a.png.jpg"}


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
    rejected(without, "weights/lite.pt")
    (tmp_path / "weights").mkdir()
    shutil.copy(place / "runs/first/best.pt", tmp_path / "weights/lite.pt")
    result = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("no run in runs/") and "weights/lite.pt" in result.stdout
    assert len(read_submission(tmp_path / "submission.csv")) == 2
    arguments[2:2] = ["lite"]
    result = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True)
    assert result.stdout.startswith(f"{tmp_path}/weights/lite.pt ("), result.stderr
    arguments[2] = "lite-words"
    rejected(subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True), "weights/lite-words.pt")


def test_detections_score_alike_in_every_format(place, tmp_path, monkeypatch):
    monkeypatch.chdir(place)

    def run(script, *words):
        monkeypatch.setattr(sys, "argv", [script, *map(str, words)])
        importlib.import_module(script).main()

    scores = {}
    for name, flags in {"a.csv": [], "a.json": [], "a.zip": [], "coco.json": ["--out-format", "coco"]}.items():
        out = tmp_path / name
        images = ["--images", "data/datasets/images/v*/*.jpg", "--thresh", "0.4", "--box-thresh", "0"]
        run("predict", "runs/first/best.pt", *images, "--out", out, *flags)
        run("evaluate", "--submission", out, "--json", tmp_path / "scores.json")
        scores[name] = json.loads((tmp_path / "scores.json").read_text())
    assert scores["a.csv"]["detections"] > 0
    assert all(score == scores["a.csv"] for score in scores.values())


def test_pages_of_a_pdf_get_rows_and_overlays(place, tmp_path):
    first, second = (
        Image.open(path).convert("RGB") for path in sorted((place / "data/datasets/images/test").iterdir())
    )
    first.save(tmp_path / "two pages.pdf", save_all=True, append_images=[second])
    out = tmp_path / "a.csv"
    arguments = ["--images", tmp_path / "two pages.pdf", "--out", out, "--overlays", tmp_path / "overlays"]
    result = command("predict.py", "runs/first/best.pt", *arguments, cwd=place)
    assert result.returncode == 0, result.stderr
    names = ["two pages.pdf#page=1", "two pages.pdf#page=2"]
    assert list(read_submission(out)) == names
    assert sorted(path.name for path in (tmp_path / "overlays").iterdir()) == [f"{name}.jpg" for name in names]


def test_a_run_goes_on_where_it_stopped_and_its_weights_start_another_preset(place, tmp_path):
    work = Path(shutil.copytree(place, tmp_path / "work"))
    result = command("train.py", "--run", "first", "--resume", "--epochs", "2", cwd=work)
    assert result.returncode == 0, result.stderr
    rows = [json.loads(line) for line in (work / "runs/first/log.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2]
    larger = ["--image-size", "96", "--batch-size", "2", "--epochs", "1", "--workers", "0"]
    result = command("train.py", "--preset", "lite", "--init", "runs/first/best.pt", "--run", "b", *larger, cwd=work)
    assert result.returncode == 0, result.stderr
    result = command("train.py", "--preset", "lite", "--init", "lite", "--run", "c", *larger, cwd=work)
    assert result.returncode == 0 and "344 of 344 tensors taken" in result.stdout, result.stderr


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
    rejected(command(*arguments, "--run", "b", "--strict", cwd=tmp_path), name, "truncated")


def test_where_no_image_can_be_read_what_is_written_is_no_success(place, data, tmp_path, typed):
    for split in ("val", "test"):
        for each in (data / "images" / split).iterdir():
            each.write_bytes(each.read_bytes()[:-300])
    checkpoint, out = place / "runs/first/best.pt", tmp_path / "a.csv"
    found = typed("predict.py", checkpoint, "--data", data, "--out", out, cwd=place)
    rejected(found, "none of the 2 images", ".jpg: broken")
    assert len(read_submission(out)) == 2
    for flags in ((), ("--tune",), ("--json", tmp_path / "a.json")):
        rejected(
            typed("evaluate.py", checkpoint, "--data", data, *flags, cwd=place), "none of the 2 images", "truncated"
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.csv", "data"]
    trained = typed("train.py", "--preset", "lite", "--data", data, *TINY, "--run", "a", cwd=tmp_path)
    rejected(trained, f"{data}: none of the 2 images can be read", "truncated")
    assert (tmp_path / "runs/a/last.pt").exists()
    for each in (data / "images/train").iterdir():
        each.write_bytes(each.read_bytes()[:-300])
    trained = typed("train.py", "--preset", "lite", "--data", data, *TINY, "--run", "b", cwd=tmp_path)
    rejected(trained, f"{data}: none of the training images can be read", "truncated")


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
    rejected(command(*arguments, "--strict", cwd=tmp_path), name)
    assert not out.exists()


@pytest.fixture
def predict_hard(rendered, tmp_path, monkeypatch):
    """Predict an image that is hard to read, in/a.*, and one that is not, with overlays and labels as JSON."""
    (tmp_path / "in").mkdir()
    shutil.copy(next((rendered / "images/test").iterdir()), tmp_path / "in/b.png")

    def predict(*flags):
        places = ["--images", tmp_path / "in", "--out", tmp_path / "a.json", "--overlays", tmp_path / "overlays"]
        words = ["predict.py", ROOT / "weights/lite.pt", "--image-size", "192", *places, *flags]
        monkeypatch.setattr(sys, "argv", list(map(str, words)))
        predict_script.main()
        overlays = {path.name: Image.open(path).size for path in (tmp_path / "overlays").iterdir()}
        assert overlays.pop("b.jpg")
        return json.loads((tmp_path / "a.json").read_text()), overlays

    return predict


def test_a_photo_that_is_only_read_at_reduced_size_gets_its_overlay(predict_hard, tmp_path, monkeypatch):
    """In proportion as a JPEG of 132 megapixels under the limit of 100."""
    monkeypatch.setattr("dbnet.images.MAX_PIXELS", 600 * 400 * 100 // 132)
    monkeypatch.setattr("dbnet.pictures.MAX_OVERLAY", 200)
    Image.new("RGB", (600, 400), "gray").save(tmp_path / "in/a.jpg")
    content, overlays = predict_hard()
    assert len(content["images"]) == 2 and overlays == {"a.jpg": (200, 133)}


def test_an_image_wider_than_a_jpeg_can_be_gets_its_overlay(predict_hard, tmp_path):
    Image.new("L", (70_000, 5)).save(tmp_path / "in/a.png")
    content, overlays = predict_hard()
    assert len(content["images"]) == 2 and max(overlays["a.jpg"]) <= 4096


@pytest.mark.parametrize("out_format", ["competition", "coco"])
def test_an_image_that_vanishes_before_it_is_read_ends_no_prediction(
    predict_hard, tmp_path, monkeypatch, capsys, out_format
):
    gone, detect = tmp_path / "in/a.png", Pipeline.detect
    shutil.copy(tmp_path / "in/b.png", gone)

    def detect_later(*arguments):
        gone.unlink()
        return detect(*arguments)

    monkeypatch.setattr(Pipeline, "detect", detect_later)
    content, overlays = predict_hard("--out-format", out_format)
    assert len(content["images"]) == 2 and not overlays
    printed = capsys.readouterr().out
    assert f"no polygons: {gone}: cannot be read" in printed and "1 images could not be read" in printed


def test_an_image_that_vanishes_before_it_is_drawn_keeps_its_polygons(predict_hard, tmp_path, monkeypatch, capsys):
    gone, write = tmp_path / "in/a.png", ImagePictures.write
    shutil.copy(tmp_path / "in/b.png", gone)

    def write_later(self, path, annotation):
        gone.unlink(missing_ok=True)
        write(self, path, annotation)

    monkeypatch.setattr(ImagePictures, "write", write_later)
    content, overlays = predict_hard("--thresh", "0.01", "--box-thresh", "0")
    words = {name: len(image["words"]) for name, image in content["images"].items()}
    assert words["a.png"] == words["b.png"] > 0 and not overlays
    said = capsys.readouterr().out
    assert f"no pictures: {gone}: cannot be read" in said and "0 images could not be read" in said


def test_a_prediction_goes_on_but_for_what_has_changed_since(place, data, tmp_path, monkeypatch, capsys):
    first, last = sorted((data / "images/test").iterdir())
    whole, out = last.read_bytes(), tmp_path / "a.csv"
    words = ["predict.py", place / "runs/first/best.pt", "--images", data / "images/test", "--out", out]

    def predict(*flags):
        monkeypatch.setattr(sys, "argv", list(map(str, [*words, *flags])))
        predict_script.main()

    def cut_short(*_):
        raise KeyboardInterrupt

    def resumed(*flags):
        """How many of the two images count as done after a prediction that was cut short just before its end."""
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr("dbnet.annotations.write_detections", cut_short)
            predict()
        last.write_bytes(whole)
        if flags == ("change",):
            shutil.copy(last, first)
            flags = ()
        capsys.readouterr()
        predict("--resume", *flags)
        assert len(read_submission(out)) == 2 and not list(tmp_path.glob("*.partial"))
        return int(capsys.readouterr().out.split(" are done")[0].split()[-1])

    assert resumed("--thresh", "0.4") == 0
    assert resumed("--overlays", tmp_path / "overlays") == 0  # there are none yet
    last.write_bytes(whole[:100])
    assert resumed() == 1  # what failed is done again
    assert resumed("change") == 0  # both were written anew
    predict("--thresh", "0.4", "--overlays", tmp_path / "overlays")
    assert resumed("--overlays", tmp_path / "overlays") == 0  # those that are there show other polygons


def test_a_mistake_ends_the_process_with_status_2_and_one_line(tmp_path):
    rejected(command("predict.py", "absent.pt", cwd=tmp_path), "absent.pt: no such checkpoint")
    rejected(command("train.py", "--preset", "v9", cwd=tmp_path), "v9", "v1")


def test_mistakes_of_train(place, data, tmp_path, typed):
    def train(*words):
        return typed("train.py", "--preset", "lite", *TINY, *words, cwd=place)

    rejected(train("--data", tmp_path / "absent"), "absent", "--data")
    rejected(train("--run", "first"), "runs/first: exists", "--resume")
    rejected(train("--init", tmp_path / "absent.pt"), "absent.pt: no such checkpoint")
    rejected(train("--batch-size", "0"), "--batch-size 0")
    rejected(train("--batch-size", "many"), "--batch-size")
    rejected(train("--no-such-flag"), "--no-such-flag")
    rejected(train("--device", "cuda:99"), "--device cuda:99")
    rejected(typed("train.py", "--preset", "v9", cwd=place), "v9", "v1")
    rejected(train("--weights", "absent.pth"), "absent.pth", "--weights none")
    for name in ("../x", "/x", "a/b", "a\\b", " ", ".", "..", "runs/first", "NUL", "com1.txt", "a.", "x" * 300):
        for flags in ((), ("--resume",)):
            rejected(train("--run", name, *flags), f"--run {name}: takes a plain folder name")
    answer = train("--run", "nothere", "--resume", "--data", tmp_path / "absent").stderr.splitlines()
    assert answer[0] == "runs/nothere: nothing is saved yet, so this starts anew" and "absent" in answer[1]
    (data / "jsons" / "train.json").unlink()
    rejected(train("--data", data), "has no annotations of train", "jsons/train.json")
    shutil.rmtree(data / "images" / "train")
    rejected(train("--data", data), "no such f")
    assert [path.name for path in (place / "runs").iterdir()] == ["first"]


def test_mistakes_of_evaluate_and_predict(place, tmp_path, typed):
    checkpoint = place / "runs/first/best.pt"
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    rejected(typed("evaluate.py", cwd=place), "--submission")
    rejected(typed("evaluate.py", checkpoint, "--split", "absent", cwd=place), "absent")
    rejected(typed("evaluate.py", checkpoint, "--json", tmp_path / "file" / "a.json", cwd=place), "a.json")
    rejected(typed("evaluate.py", checkpoint, "--save", cwd=place), "--save: belongs to --tune")
    rejected(typed("evaluate.py", "--submission", "a.csv", "--tune", cwd=place), "--tune: ", "leave --submission out")
    rejected(typed("evaluate.py", checkpoint, "--tune", "--save", "--thresh", "0.2", cwd=place), "another --thresh")
    rejected(typed("evaluate.py", checkpoint, "--backbone", "resnet18", cwd=place), "another architecture")
    rejected(typed("evaluate.py", checkpoint, "--submission", "a.csv", cwd=place), "--submission")
    rejected(typed("predict.py", "--images", tmp_path, checkpoint, cwd=place), "best.pt: is a checkpoint, not an image")
    rejected(typed("predict.py", "runs/first", cwd=place), "runs/first: no such checkpoint, but a folder", "best.pt")
    rejected(typed("predict.py", checkpoint, "--images", tmp_path / "empty", cwd=place), "holds no images")
    rejected(typed("predict.py", checkpoint, "--images", tmp_path / "absent", cwd=place), "no such file or folder")
    rejected(typed("predict.py", checkpoint, "--out", tmp_path / "a.txt", cwd=place), "a.txt", "--out-format")
    rejected(typed("evaluate.py", checkpoint, "--format", "voc", cwd=place), "--format", "labelme")
    rejected(typed("evaluate.py", checkpoint, "--format", "icdar", cwd=place), "--format icdar of val", "labels/val")
    rejected(
        typed("evaluate.py", checkpoint, "--report", "r.jpg", cwd=place), "--report r.jpg", "end its name in .html"
    )
    rejected(typed("predict.py", checkpoint, "--out-format", "coco", cwd=place), "submission.csv", "not coco")
    rejected(typed("predict.py", checkpoint, "--images", "http://x.org/a.jpg?b=1", cwd=place), "is a URL; download it")
    rejected(typed("predict.py", checkpoint, "--out", tmp_path / "absent" / "a.csv", cwd=place), "a.csv")
    rejected(typed("predict.py", checkpoint, "--overlays", tmp_path / "file", cwd=place), "file", "another folder")
    rejected(typed("predict.py", tmp_path / "file", cwd=place), "file: not a checkpoint", "images go with --images")


def test_a_split_without_a_word_to_score_is_rejected_before_the_work(place, data, tmp_path, typed):
    content = json.loads((data / "jsons/val.json").read_text())
    for image in content["images"].values():
        for word in image["words"].values():
            word["illegibility"] = True
    (data / "jsons/val.json").write_text(json.dumps(content))
    (tmp_path / "a.csv").write_text("filename,polygons\n")
    words = f"{data}: no image of val has a word that can be scored"
    for scored in ([place / "runs/first/best.pt"], ["--submission", tmp_path / "a.csv"]):
        rejected(typed("evaluate.py", *scored, "--data", data, cwd=tmp_path), words)
    rejected(typed("train.py", "--preset", "lite", *TINY, "--data", data, cwd=tmp_path), words)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name,polygons\n", "filename and polygons"),
        ("", "filename and polygons"),
        ("filename,polygons\na.jpg,1 2 3\n", "row 2: coordinates must be numbers, x and y in pairs"),
        ("filename,polygons\na.jpg,1 2 x 4\n", "row 2: coordinates must be numbers"),
        ("filename,polygons\na.jpg,1 2 nan 4\n", "row 2: a coordinate is not a finite number"),
        ("filename,polygons\na.jpg,\na.jpg,\n", "row 3: a.jpg is there twice"),
        ("filename,polygons\na.jpg\n", "row 2 has more or fewer columns"),
        ("filename,polygons\nunknown.jpg,\n", "unknown.jpg is not in"),
    ],
)
def test_broken_submissions_are_rejected(place, tmp_path, typed, text, words):
    path = tmp_path / "a.csv"
    path.write_text(text)
    rejected(
        typed("evaluate.py", "--submission", path, "--data", place / "data/datasets", cwd=tmp_path), "a.csv", words
    )


names = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0/\r"), min_size=1, max_size=40)
polygons = st.lists(
    st.lists(st.tuples(st.integers(-9, 9999), st.integers(-9, 9999)), min_size=1, max_size=9), max_size=5
)


@given(st.dictionaries(names, polygons, max_size=5))
def test_submissions_round_trip_with_any_file_name(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("csv") / "a.csv"
    written = {name: Annotation([np.array(polygon) for polygon in found]) for name, found in rows.items()}
    write_labels(path, "csv", written)
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
        write_labels(path, "csv", {"a.jpg": Annotation([np.zeros((4, 2), int)]), "b.jpg": Annotation(["no array"])})
    assert path.read_text() == "before" and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(UserError, match=r"absent/a\.csv"):
        write_labels(tmp_path / "absent" / "a.csv", "csv", {})


def test_labels_that_are_read_are_no_place_for_a_result(place, data, tmp_path, typed):
    labels = data / "jsons" / "test.json"
    before = labels.read_bytes()
    words = ("predict.py", place / "runs/first/best.pt", "--data", data, "--workers", "0", "--out", labels)
    rejected(typed(*words, cwd=tmp_path), "test.json: is an input of this command")
    assert labels.read_bytes() == before


def test_a_table_is_printed_where_the_scores_cannot_be_written(place, tmp_path):
    words = ("runs/first/best.pt", "--workers", "0", "--json", "/dev/full")
    said = command("evaluate.py", *words, cwd=place)
    assert said.returncode == 2 and "H-Mean" in said.stdout
    assert said.stderr.splitlines()[-1].startswith("error: /dev/full: cannot be written")


def test_outlines_of_fewer_than_four_points_are_counted(data, tmp_path):
    names = sorted(path.name for path in (data / "images" / "val").iterdir())
    rows = "".join(f"{name},10 10 200 10 200 40|10 10 90 10 90 40 10 40\n" for name in names)
    (tmp_path / "s.csv").write_text(f"filename,polygons\n{rows}")
    said = command("evaluate.py", "--submission", "s.csv", "--data", data, cwd=tmp_path)
    assert said.returncode == 0 and f"{len(names)} outlines have fewer than four points" in said.stdout, said.stderr


LONG = "x" * 300


@pytest.mark.parametrize(
    "words",
    [
        ("predict.py", f"{LONG}.pt"),
        ("predict.py", f"{LONG}.onnx"),
        ("predict.py", "lite", "--images", "a.png", "--out", f"{LONG}.csv"),
        ("predict.py", "lite", "--images", "a.png", "--out", f"{LONG}/", "--out-format", "labelme"),
        ("predict.py", "lite", "--data", LONG),
        ("evaluate.py", "--submission", f"{LONG}.csv"),
        ("evaluate.py", "lite", "--data", LONG),
        ("evaluate.py", "lite", "--json", f"{LONG}.json"),
        ("train.py", "--init", f"{LONG}.pt", "--data", "data"),
        ("train.py", "--weights", f"{LONG}.pt", "--data", "data"),
        ("export.py", f"{LONG}.pt", "--onnx", "a.onnx"),
        ("export.py", "lite", "--onnx", f"{LONG}.onnx"),
    ],
)
def test_a_name_that_is_too_long_for_a_file_is_one_line(data, tmp_path, typed, words):
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    answer = typed(*words, cwd=tmp_path)
    assert answer.returncode == 2, answer.stderr
    assert answer.stderr.count("error: ") == 1 and "Traceback" not in answer.stderr


def test_crops_that_could_not_be_written_are_not_in_their_index(predict_hard, rendered, tmp_path, monkeypatch):
    shutil.copy(tmp_path / "in/b.png", tmp_path / "in/a.png")
    write = ImagePictures.write

    def write_or_lose(pictures, path, annotation):
        if path.name == "a.png":
            raise ImageError(f"{path}: no such file")
        write(pictures, path, annotation)

    monkeypatch.setattr(ImagePictures, "write", write_or_lose)
    predict_hard("--crops", tmp_path / "crops")
    index = (tmp_path / "crops" / "index.csv").read_text()
    assert "b_0001.png" in index and "a_0001.png" not in index


def test_crops_of_earlier_runs_are_counted(predict_hard, tmp_path, capsys):
    predict_hard("--crops", tmp_path / "crops", "--box-thresh", "0.1")
    count = len(list((tmp_path / "crops").glob("b_*.png")))
    assert count and "earlier runs" not in capsys.readouterr().out
    predict_hard("--crops", tmp_path / "crops", "--box-thresh", "1")
    assert f"{tmp_path / 'crops'}: {count} crops of earlier runs, b_0001.png first" in capsys.readouterr().out
