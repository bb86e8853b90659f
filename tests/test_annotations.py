"""Labels that are written, corrected and read again: point order, reading order, crops, and the loop over them."""

import csv
import importlib
import json
import shutil
import string
import sys
import unicodedata

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw
from support import ROOT, answered, command, damages, hostile, rejected, run

from dbnet.annotations import (
    Annotation,
    as_labels,
    choose_format,
    uncertainty,
    write_detections,
    write_labels,
)
from dbnet.checkpoint import save_checkpoint
from dbnet.config import Config
from dbnet.errors import UserError
from dbnet.evaluation import evaluate_submission
from dbnet.formats import read_labels_at, read_submission
from dbnet.geometry import fit_outline, order_outlines, reading_order
from dbnet.metric import score_image
from dbnet.model import DBNet
from dbnet.pictures import crop_words
from dbnet.splits import read_split
from dbnet.synth.scene import write_dataset


def read_annotations(path):
    return read_labels_at(path, [], "competition")[1]


WIDE = np.array([[50, 40], [250, 42], [249, 80], [50, 78]], float)
TALL = np.array([[400, 40], [420, 40], [420, 90], [400, 90]], float)


# ---- order of points


@pytest.mark.parametrize(
    "order",
    [(0, 1, 2, 3), (1, 2, 3, 0), (2, 3, 0, 1), (3, 0, 1, 2), (0, 3, 2, 1), (3, 2, 1, 0), (0, 1, 3, 2), (0, 3, 1, 2)],
)
def test_quadrilaterals_are_put_in_order_from_any_corner_way_round_and_zigzag(order):
    ordered, changed, doubtful = order_outlines([WIDE[list(order)], WIDE[list(order)] + 100])
    assert ordered[0].tolist() == WIDE.tolist() and doubtful == 0
    assert changed == (0 if order == (0, 1, 2, 3) else 2)


def test_narrow_letters_follow_the_long_words_of_their_image():
    shifted = [np.roll(polygon, -1, axis=0) for polygon in (WIDE, WIDE + 50, WIDE + 90, TALL)]
    assert order_outlines(shifted)[0][3].tolist() == TALL.tolist()


def test_words_of_a_page_that_lies_on_its_side_keep_their_corners():
    running_down = [np.roll(np.add(TALL, (40 * index, 0)), -1, axis=0) for index in range(3)]
    letter = np.roll(WIDE, -1, axis=0)
    ordered, changed, doubtful = order_outlines([*running_down, letter])
    assert [polygon.tolist() for polygon in ordered] == [polygon.tolist() for polygon in [*running_down, letter]]
    assert (changed, doubtful) == (0, 0)


def test_outlines_that_begin_elsewhere_are_counted_and_arrowheads_and_points_stay():
    line = np.array([[0, 0], [50, 0], [100, 0], [150, 0], [150, 20], [100, 20], [50, 20], [0, 20]], float)
    arrowhead = np.array([[0, 0], [100, 0], [30, 10], [0, 100]], float)
    point = np.full((4, 2), 7.0)
    ordered, changed, doubtful = order_outlines([line, np.roll(line, -2, axis=0), arrowhead, point, line[:3]])
    assert (changed, doubtful) == (0, 1)
    assert ordered[1].tolist() == np.roll(line, -2, axis=0).tolist()
    assert ordered[2].tolist() == arrowhead.tolist() and ordered[3].tolist() == point.tolist()


def test_a_closing_point_goes():
    closed = np.concatenate([WIDE, WIDE[:1]])
    assert order_outlines([closed])[0][0].tolist() == WIDE.tolist()


@pytest.mark.parametrize("turn", [0, 1, 2, 3])
def test_a_contour_becomes_a_rectangle_from_the_upper_left_wherever_it_begins(turn):
    contour = np.array([[60, 10], [110, 10], [112, 20], [110, 30], [60, 31], [10, 30], [8, 20], [10, 10]])
    outline = fit_outline(np.roll(contour, 2 * turn, axis=0))
    assert np.abs(outline - [[8, 10], [112, 10], [112, 31], [8, 31]]).max() < 1.5
    assert score_image([outline], [contour]).hmean == 1


@pytest.mark.parametrize(
    "contour",
    [
        [[42, 202], [56, 187], [70, 173], [98, 202], [70, 230]],
        [[196, 279], [208, 266], [221, 254], [245, 279], [221, 303]],
        [[119, 83], [125, 63], [132, 44], [145, 49], [132, 87]],
    ],
)
def test_labels_of_words_at_45_degrees_begin_at_the_upper_left_in_whole_pixels(contour):
    labels = as_labels(Annotation([np.array(contour)], [False])).polygons
    ordered, changed, doubtful = order_outlines(labels.copy())
    assert (changed, doubtful) == (0, 0) and np.array_equal(ordered[0], labels[0])


def test_a_curved_contour_becomes_four_points_along_the_top_and_four_back():
    angles = np.linspace(np.pi, 2 * np.pi, 20)
    circle = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    contour = np.rint(np.concatenate([150 + 140 * circle, 150 + 100 * circle[::-1]])).astype(int)
    outline = fit_outline(np.roll(contour, 7, axis=0))
    assert outline.shape == (8, 2)
    assert (np.diff(outline[:4, 0]) > 0).all() and (np.diff(outline[4:, 0]) < 0).all()
    assert (outline[:4, 1] < outline[4:][::-1, 1]).all()


@pytest.mark.parametrize("polygon", [[[5, 5]] * 4, [[0, 0], [9, 0], [4, 0], [2, 0], [1, 0]], [[0, 0], [9, 9], [3, 3]]])
def test_contours_without_area_have_an_outline_too(polygon):
    assert np.isfinite(fit_outline(np.array(polygon))).all()


# ---- reading order and crops


def test_words_are_read_line_by_line_on_a_skewed_page():
    cosine, sine = np.cos(np.radians(8)), np.sin(np.radians(8))
    places = [(column * 60, row * 20 + column % 2) for row in range(4) for column in range(5)]
    words = [(WIDE * (0.2, 0.3) + place) @ [[cosine, sine], [-sine, cosine]] for place in places]
    shuffled = np.random.default_rng(0).permutation(20).tolist()
    order, lines = reading_order([words[index] for index in shuffled])
    assert [shuffled[index] for index in order] == list(range(20))
    assert [lines[index] for index in order] == [row + 1 for row in range(4) for _ in range(5)]
    assert reading_order([]) == ([], [])


def test_words_of_a_page_that_lies_on_its_side_are_read_downwards():
    words = [np.add(TALL, (-60 * line, 70 * place)) for line in range(3) for place in range(4)]
    order, lines = reading_order(words[::-1])
    assert [11 - index for index in order] == list(range(12))
    assert [lines[index] for index in order] == [1] * 4 + [2] * 4 + [3] * 4


def test_a_crop_is_upright_and_as_long_as_the_word():
    sheet = Image.new("RGB", (300, 200), "white")
    word = Image.new("RGB", (120, 40), "white")
    ImageDraw.Draw(word).rectangle((0, 0, 20, 39), fill="red")  # its beginning
    sheet.paste(word.rotate(-30, expand=True, fillcolor="white"), (50, 50))
    cosine, sine = np.cos(np.radians(30)), np.sin(np.radians(30))
    corners = np.array([[0, 0], [120, 0], [120, 40], [0, 40]]) @ [[cosine, sine], [-sine, cosine]]
    corners += (50, 50) - corners.min(axis=0)
    [crop] = crop_words(np.asarray(sheet), [fit_outline(corners)])
    assert crop.shape == (40, 120, 3)
    assert (crop[5:35, 3:17] == (255, 0, 0)).mean() > 0.95 and (crop[5:35, 25:115] == 255).all()


# ---- files


def test_uncertainty_is_the_share_of_low_scores():
    assert uncertainty(Annotation.detected([], [])) == 1
    assert uncertainty(Annotation.detected([WIDE, TALL], [0.9, 0.3])) == 0.5


def test_labelme_opens_the_image_and_corrected_files_are_not_overwritten(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "labels").mkdir()
    found = {"a b.jpg": Annotation.detected([np.rint(WIDE)], [0.8], (640, 480))}
    images = {"a b.jpg": tmp_path / "photos" / "a b.jpg"}
    assert choose_format(tmp_path / "labels", "labelme", ["a b.jpg"]) == "labelme"
    write_detections(tmp_path / "labels", "labelme", found, images)
    content = json.loads((tmp_path / "labels" / "a b.json").read_text())
    assert content["imagePath"] == "../photos/a b.jpg" and content["imageData"] is None
    assert (content["imageWidth"], content["imageHeight"]) == (640, 480) and content["version"]
    [shape] = content["shapes"]
    assert shape["shape_type"] == "polygon" and shape["points"] == WIDE.tolist()
    with pytest.raises(UserError, match=r"a b\.json: is there already, and may be corrected"):
        choose_format(tmp_path / "labels", "labelme", ["a b.jpg"])


def test_label_txt_names_the_folder_of_the_image(tmp_path):
    assert choose_format(tmp_path / "Label.txt", "auto", []) == "ppocrlabel"
    found = {"a.jpg": Annotation([WIDE, TALL], [False, True])}
    write_labels(tmp_path / "Label.txt", "ppocrlabel", found, {"a.jpg": tmp_path / "photos" / "a.jpg"})
    path, _, words = (tmp_path / "Label.txt").read_text().partition("\t")
    assert path == "photos/a.jpg"
    assert [(word["points"], word["difficult"]) for word in json.loads(words)] == [
        (WIDE.tolist(), False),
        (TALL.tolist(), True),
    ]


def test_labels_stand_in_reading_order_with_their_lines(tmp_path):
    found = {"a.jpg": Annotation.detected([np.add(WIDE, (0, 100)), np.add(WIDE, (300, 3)), WIDE], [0.7, 0.8, 0.9])}
    write_detections(tmp_path / "a.json", "competition", found, None)
    words = json.loads((tmp_path / "a.json").read_text())["images"]["a.jpg"]["words"].values()
    assert [(word["score"], word["order"], word["line"]) for word in words] == [(0.9, 1, 1), (0.8, 2, 1), (0.7, 3, 2)]
    write_detections(tmp_path / "b.json", "coco", found, None)
    words = json.loads((tmp_path / "b.json").read_text())["annotations"]
    assert [(word["score"], word["order"], word["line"]) for word in words] == [(0.9, 1, 1), (0.8, 2, 1), (0.7, 3, 2)]
    assert as_labels(found["a.jpg"]).lines == [1, 1, 2]


def test_detections_that_cover_each_other_are_labels_for_a_person_to_decide(tmp_path, capsys):
    around = np.array([[40, 30], [260, 30], [260, 90], [40, 90]])
    found = {"a.jpg": Annotation.detected([WIDE.astype(int), around, TALL], [0.9, 0.8, 0.7])}
    write_detections(tmp_path / "a.json", "competition", found, None)
    assert "a.json: 2 outlines overlap others by much" in capsys.readouterr().out
    assert sorted(read_annotations(tmp_path / "a.json")["a.jpg"].dont_care) == [False, True, True]
    write_detections(tmp_path / "a.zip", "icdar", found, None)
    assert read_labels_at(tmp_path / "a.zip", ["a.jpg"])[1]["a.jpg"].dont_care == [False] * 3


# ---- the loop: predict, correct, train


@pytest.fixture(scope="module")
def receipts(tmp_path_factory):
    """Rendered receipts, and detections of the shipped weights on those to train on."""
    folder = tmp_path_factory.mktemp("loop")
    write_dataset(folder / "truth", train=3, val=1, test=0, size=640, seed=9, workers=1)
    (folder / "unlabelled" / "images").mkdir(parents=True)
    shutil.copytree(folder / "truth" / "images" / "train", folder / "unlabelled" / "images" / "train")
    return folder


LABELS = [("labelme", "labels/train"), ("ppocrlabel", "images/train/Label.txt"), ("coco", "jsons/train.json")]


@pytest.mark.parametrize(("form", "out"), LABELS)
def test_labels_that_nobody_has_corrected_score_what_the_weights_find(receipts, tmp_path, form, out):
    data = shutil.copytree(receipts / "unlabelled", tmp_path / "data")
    (data / out).parent.mkdir(parents=True, exist_ok=True)
    words = ["predict.py", ROOT / "weights" / "lite.pt", "--images", data / "images" / "train", "--workers", 0]
    labels = command(*words, "--out", data / out, "--out-format", form, "--resume", cwd=tmp_path)
    assert labels.returncode == 0, labels.stderr
    contours = command(*words, "--out", "a.csv", "--crops", "crops", "--sort-by", "uncertainty", cwd=tmp_path)
    assert contours.returncode == 0 and "to correct first: " in contours.stdout, contours.stderr
    config = Config(data=str(data))
    assert evaluate_submission(tmp_path / "a.csv", config, "train").compute().hmean >= 0.99
    rows = list(csv.DictReader((tmp_path / "crops" / "index.csv").open()))
    assert len(rows) == sum(len(each.polygons) for each in read_split(data, "train").annotations.values()) > 50
    assert all((tmp_path / "crops" / row["crop"]).is_file() for row in rows)
    crops = [*words, "--out", "a.csv", "--crops", "crops"]
    (tmp_path / "crops" / "index.csv").unlink()  # as after a killed job
    assert command(*crops, "--resume", cwd=tmp_path).returncode == 0
    shutil.copy(next((data / "images").rglob("*.jpg")), tmp_path / "crops" / rows[0]["crop"])
    rejected(command(*crops, cwd=tmp_path), f"{rows[0]['crop']}: exists, and is not an earlier result")
    if form == "labelme":
        rejected(command(*words, "--out", data / out, "--out-format", form, cwd=tmp_path), "is there already")


def test_labels_of_a_weak_network_corrected_and_learned_make_it_better_on_the_rest(tmp_path):
    """Small light text on dark paper, of which the shipped weights find a part."""
    data, weights = tmp_path / "data", ROOT / "weights" / "lite.pt"
    write_dataset(data, train=12, val=6, test=0, size=384, seed=9, workers=1)
    for path in (data / "images").rglob("*.jpg"):
        dark = (255 - np.asarray(Image.open(path))) * (0.9, 0.5, 0.3)
        Image.fromarray(dark.astype(np.uint8)).save(path, quality=92)
    truth = read_split(data, "train")
    (data / "jsons" / "train.json").unlink()
    size = ["--image-size", 320, "--workers", 0]

    def hmean(checkpoint, split):
        run("evaluate.py", checkpoint, "--data", data, "--split", split, "--json", "a.json", *size, cwd=tmp_path)
        return json.loads((tmp_path / "a.json").read_text())["hmean"]

    for form, out in LABELS:
        words = ["--images", data / "images" / "train", "--out", data / out, "--out-format", form, *size]
        run("predict.py", weights, *words, cwd=tmp_path)
        assert len(read_split(data, "train", form).images) == 12
        assert hmean(weights, "train") >= 0.99
        if form == "labelme":
            write_labels(data / out, form, truth.annotations, truth.images)  # what a person corrects
            words = ["--preset", "lite", "--init", weights, "--data", data, "--epochs", 5, "--lr", 1e-3, *size]
            words += ["--batch-size", 2, "--accumulate", 1, "--ema", 0.9, "--run", "mine"]
            run("train.py", *words, cwd=tmp_path)
        shutil.rmtree(data / "labels", ignore_errors=True)
        (data / out).unlink(missing_ok=True)
    assert hmean(tmp_path / "runs" / "mine" / "best.pt", "val") > hmean(weights, "val") + 0.05


# ---- hostile files


NAMES = [
    "a b.png",
    "a,b.png",
    "a\"b'c.png",
    "new\nline.png",
    "return\r\n.png",
    "영수증.png",
    unicodedata.normalize("NFD", "영수증.png"),
    "-rf.png",
    "--images.png",
    "=1+1.png",
    " .png",
    "가" * 83 + "xy.png",  # 255 bytes
]
names = st.sampled_from(NAMES) | st.text(min_size=1, max_size=9)
numbers = st.integers() | st.floats() | st.sampled_from([0, 1, 50, 1e9, -1e300, 10**400])
wild_points = st.lists(st.lists(numbers, min_size=1, max_size=3) | numbers, max_size=5)
tame_points = st.lists(st.tuples(st.integers(-9, 99), st.floats(-9, 99)), min_size=1, max_size=5)


@hostile
@given(st.dictionaries(names, st.lists(wild_points | tame_points, max_size=3), max_size=3), damages() | st.none())
def test_any_annotations_are_read_as_they_are_or_rejected(tmp_path, images, damage):
    path = tmp_path / "train.json"
    content = {
        name: {"words": {str(i): {"points": points} for i, points in enumerate(words)}}
        for name, words in images.items()
    }
    data = json.dumps({"images": content}).encode()
    path.write_bytes(damage(data) if damage else data)
    found = answered(path, read_annotations)
    if found is None:
        return
    for name, annotation in found.items():
        assert tmp_path.resolve() in (tmp_path / name).resolve().parents
        name.encode()
        assert all(np.isfinite(polygon).all() and polygon.shape[1:] == (2,) for polygon in annotation.polygons)
        if not damage:
            assert [polygon.tolist() for polygon in annotation.polygons] == [
                [[float(value) for value in point] for point in points] for points in images[name]
            ]


@pytest.mark.parametrize(
    "name", ["..", ".", "../a.png", "/etc/passwd", "a//b.png", "a/../b.png", "", "a\0.png", "\ud800"]
)
def test_a_name_in_a_json_cannot_leave_the_folder(tmp_path, name):
    path = tmp_path / "train.json"
    path.write_text(json.dumps({"images": {name: {"words": {}}}}))
    with pytest.raises(UserError, match="not a plain file name") as caught:
        read_annotations(path)
    assert str(caught.value).isprintable()


def test_a_name_that_is_there_twice_in_a_json_is_rejected(tmp_path):
    path = tmp_path / "train.json"
    path.write_text('{"images": {"a.png": {"words": {}}, "a.png": {"words": {}}}}')
    with pytest.raises(UserError, match=r"train\.json: 'a\.png' is there twice"):
        read_annotations(path)


@hostile
@given(st.dictionaries(names, st.lists(tame_points, max_size=3), max_size=4), damages())
def test_any_csv_is_read_or_rejected(tmp_path, rows, damage):
    path = tmp_path / "a.csv"
    rows = {name: found for name, found in rows.items() if name.isprintable() or name in NAMES}
    written = {name: Annotation([np.array(points).astype(int) for points in found]) for name, found in rows.items()}
    write_labels(path, "csv", written)
    back = answered(path, read_submission)
    assert list(back) == list(rows)
    path.write_bytes(damage(path.read_bytes()))
    for polygons in (answered(path, read_submission) or {}).values():
        assert all(np.isfinite(polygon).all() and polygon.shape[1:] == (2,) for polygon in polygons)


@hostile
@given(st.text(st.sampled_from('0123456789_.eE-+ |,"\n\r\tnaif') | st.characters(codec="utf-8"), max_size=60))
def test_any_text_in_a_row_is_read_or_rejected(tmp_path, text):
    path = tmp_path / "a.csv"
    path.write_text(f"filename,polygons\na.png,{text}", encoding="utf-8", newline="")
    found = answered(path, read_submission)
    if found and all(letter in string.digits + " " for letter in text):
        expected = [list(map(float, text.split()))] if text.strip() else []
        assert [polygon.ravel().tolist() for polygon in found["a.png"]] == expected


def test_a_csv_that_ends_within_quotes_is_rejected(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('filename,polygons\n"a.png,1 2 3 4 5 6 7 8\nb.png,\n')
    assert answered(path, read_submission) is None
    path.write_text("filename,polygons\na.png,1_0 2 3 4 5 6 7 8\n")
    assert answered(path, read_submission) is None


def test_every_file_name_comes_through_the_commands(tmp_path, monkeypatch, capsys):
    """From the folder into the CSV, and from there against the json."""
    config = Config.from_preset("lite", weights="none", image_size=64, pyramid_channels=32)
    save_checkpoint(tmp_path / "best.pt", config, DBNet(config))
    images, jsons = tmp_path / "data" / "images" / "test", tmp_path / "data" / "jsons"
    images.mkdir(parents=True)
    jsons.mkdir()
    for name in NAMES:
        Image.new("RGB", (90, 70)).save(images / name, "PNG")
    quad = [[0, 0], [50, 0], [50, 20], [0, 20]]
    content = {name: {"words": {"1": {"points": quad}}} for name in NAMES}
    (jsons / "test.json").write_text(json.dumps({"images": content}))
    out = tmp_path / ("나" * 83 + ".csv")

    def run(script, *words):
        monkeypatch.setattr(sys, "argv", [script, *map(str, words)])
        importlib.import_module(script).main()

    monkeypatch.chdir(tmp_path)
    run("predict", "best.pt", "--data", "data", "--out", out.name)
    assert list(read_submission(out)) == NAMES
    capsys.readouterr()
    run("evaluate", "--submission", out.name, "--data", "data", "--split", "test", "--json", "scores.json")
    assert list(json.loads((tmp_path / "scores.json").read_text())["per_image"]) == NAMES
    printed = capsys.readouterr().out
    assert "new\\nline.png" in printed and "new\nline" not in printed
    run("predict", "best.pt", "--images", *(images / name for name in NAMES), "--out", "again.csv")
    assert list(read_submission(tmp_path / "again.csv")) == NAMES
