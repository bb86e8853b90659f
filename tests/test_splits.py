"""Which images and labels a split or a command names, in one folder or several, with any names."""

import json
import os
import shutil
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support import command

from dbnet.annotations import Annotation
from dbnet.config import Config
from dbnet.dataset import Batches, TextDataset
from dbnet.errors import UserError
from dbnet.splits import check_scorable, find_images_at, list_images, read_images, read_split
from dbnet.synth.scene import write_dataset

SQUARE = [[1, 1], [20, 1], [20, 9], [1, 9]]


def make_data(folder, names, split="val", labels=None):
    """A data set of small images of these names, each with one word."""
    (folder / "jsons").mkdir(parents=True, exist_ok=True)
    for name in names:
        path = folder / "images" / split / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30), "white").save(path)
    words = {"words": {"1": {"points": SQUARE}}}
    content = {"images": dict.fromkeys(labels or names, words)}
    (folder / "jsons" / f"{split}.json").write_text(json.dumps(content))
    return folder


# ---- splits


def test_missing_images_and_images_without_an_entry_are_said(tmp_path, capsys):
    data = make_data(tmp_path, ["a.png", "b.png"], labels=["a.png"])
    assert list(read_split(data, "val").images) == ["a.png"]
    assert "1 images have no entry in jsons/val.json" in capsys.readouterr().out
    make_data(tmp_path, ["a.png"], labels=["a.png", "absent.png"])
    with pytest.raises(UserError, match=r"absent\.png: no such image, but jsons/val\.json names it"):
        read_split(data, "val")
    assert read_split(data, "val", need_images=False).images["absent.png"] == data / "images" / "val" / "absent.png"


def test_names_match_in_any_unicode_form_and_rows_have_the_files(tmp_path):
    """macOS decomposes Korean in the names of files."""
    decomposed = unicodedata.normalize("NFD", "영수증.png")
    data = make_data(tmp_path, [decomposed], labels=["영수증.png"])
    assert list(read_split(data, "val").images) == list(read_split(data, "val").annotations) == [decomposed]
    make_data(tmp_path, ["영수증.png"], labels=["영수증.png"])
    assert sorted(read_images(data, "val")) == ["영수증.png"]
    make_data(tmp_path, [decomposed], labels=["영수증.png", decomposed])
    assert len(read_split(data, "val").images) == 2
    (data / "images" / "val" / decomposed).unlink()
    with pytest.raises(UserError, match="are there twice"):
        read_split(data, "val")


def test_a_submission_may_spell_names_in_another_unicode_form(tmp_path):
    data = make_data(tmp_path / "data", [unicodedata.normalize("NFD", "영수증.png")])
    (tmp_path / "a.csv").write_text("filename,polygons\n영수증.png,1 1 20 1 20 9 1 9\n", encoding="utf-8")
    result = command("evaluate.py", "--submission", "a.csv", "--data", data, cwd=tmp_path)
    assert result.returncode == 0 and "1.0000" in result.stdout and "no row" not in result.stdout, result.stderr


def test_a_name_that_is_no_text_is_named(tmp_path):
    make_data(tmp_path, ["a.png"])
    folder = tmp_path / "images" / "val"
    shutil.copy(folder / "a.png", Path(os.fsdecode(bytes(folder) + "/영수증.png".encode("euc-kr"))))
    with pytest.raises(UserError, match="not UTF-8; rename it") as caught:
        list_images(folder)
    assert str(caught.value).isprintable()


def test_images_in_sub_folders_have_their_path_as_name(tmp_path):
    data = make_data(tmp_path, ["a.png", "x/a.png", "x/y/b.png"], labels=["x/a.png", "a.png", "b.png"])
    images, annotations, _ = read_split(data, "val")
    assert list(images) == list(annotations) == ["x/a.png", "a.png", "x/y/b.png"]
    assert images["x/y/b.png"] == data / "images" / "val" / "x" / "y" / "b.png"


def test_hidden_files_are_no_images(tmp_path):
    data = make_data(tmp_path, ["a.png", "._a.png", ".cache/b.png"], labels=["a.png"])
    assert list(read_split(data, "val").images) == ["a.png"]
    assert list(find_images_at([data / "images" / "val"])) == ["a.png"]
    assert list(find_images_at([data / "images" / "val" / "**" / "*.png"])) == ["a.png"]


def test_a_folder_that_links_to_itself_is_read_once(tmp_path):
    make_data(tmp_path, ["a.png"])
    (tmp_path / "images" / "val" / "again").symlink_to(tmp_path / "images")
    assert len(find_images_at([tmp_path / "images" / "val"])) == 1


def test_the_second_source_of_labels_is_said(tmp_path, capsys):
    data = make_data(tmp_path, ["a.png"])
    (data / "labels" / "val").mkdir(parents=True)
    (data / "labels" / "val" / "a.txt").write_text("1,1,30,1,30,9,1,9\n")
    assert read_split(data, "val").annotations["a.png"].polygons[0][1].tolist() == [20, 1]
    assert f"{data}/jsons/val.json: read; {data}/labels/val: annotations too, not read" in capsys.readouterr().out
    assert read_split(data, "val", "icdar").annotations["a.png"].polygons[0][1].tolist() == [30, 1]
    assert "not read" not in capsys.readouterr().out


# ---- several folders


def test_several_folders_are_one_data_set_each_in_its_format(tmp_path):
    first = make_data(tmp_path / "first", ["a.png", "b.png"])
    second = make_data(tmp_path / "sets" / "second", ["a.png", "c.png"])
    (second / "jsons" / "val.json").unlink()
    (second / "labels" / "val").mkdir(parents=True)
    for name in ("a", "c"):
        (second / "labels" / "val" / f"{name}.txt").write_text("1,1,30,1,30,9,1,9,text\n")
    images, annotations, sizes = read_split(f"{first},{second}", "val")
    assert list(images) == list(annotations) == ["first/a.png", "b.png", "sets/second/a.png", "c.png"]
    assert images["sets/second/a.png"] == second / "images" / "val" / "a.png" and sizes == [2, 2]
    assert [annotation.polygons[0][1, 0] for annotation in annotations.values()] == [20, 20, 30, 30]
    assert list(read_images(f"{first},{second}", "val")) == list(images)
    with pytest.raises(UserError, match=r"absent: no such folder"):
        read_split(f"{first},{tmp_path}/absent", "val")
    with pytest.raises(UserError, match="names a folder twice"):
        read_split(f"{first},{first}/", "val")


def test_each_image_of_a_folder_comes_as_often_as_its_weight_says(tmp_path):
    folders = []
    for name, count in (("a", 4), ("b", 5), ("c", 6)):
        folders.append(make_data(tmp_path / name, [f"{name}{i}.png" for i in range(count)], "train"))
    config = Config(data=",".join(map(str, folders)), data_weights=(2, 1, 0.5), image_size=64, cache_gb=0)
    dataset = TextDataset(config, "train", train=True)
    together = Counter()
    for epoch in range(4):
        batches = Batches(dataset, 4, config.seed)
        batches.epoch = epoch
        draws = [draw for batch in batches for draw in batch]
        counts = Counter(draw.place for draw in draws)
        assert len(batches) == 4 and len(draws) == 4 * 2 + 5 + 3
        assert [counts[place] for place in range(9)] == [2] * 4 + [1] * 5
        assert set(counts) <= set(range(15)) and max(counts[place] for place in range(9, 15)) == 1
        assert len({(draw.place, draw.repeat) for draw in draws}) == len(draws)
        assert draws == [draw for batch in batches for draw in batch]
        together += counts
    assert {together[place] for place in range(9, 15)} == {2}  # half of four epochs, every image alike
    once, again = (dataset.augmentation(draw) for draw in draws if draw.place == draws[0].place)
    assert once != again or draws[0].place >= 4


@pytest.mark.parametrize(
    ("weights", "message"),
    [((1, 2), "a number for each of the 1 folders"), ((0,), "must be above 0"), ((float("nan"),), "must be above 0")],
)
def test_weights_that_do_not_fit_are_named(tmp_path, weights, message):
    data = make_data(tmp_path, ["a.png"], "train")
    with pytest.raises(UserError, match=f"--data-weights .*{message}"):
        TextDataset(Config(data=str(data), data_weights=weights), "train", train=True)


def test_of_several_folders_some_may_lack_a_split(tmp_path):
    folders = [make_data(tmp_path / name, [f"{name}.png"], "train") for name in ("a", "b")]
    make_data(folders[0], ["c.png"], "val")
    data = ",".join(map(str, folders))
    assert read_split(data, "train").folder_sizes == [1, 1]
    assert read_split(data, "val").folder_sizes == [1, 0] and list(read_images(data, "val")) == ["c.png"]
    with pytest.raises(UserError, match="a/images/test: no such folder"):
        read_split(data, "test")


def test_a_training_on_two_folders_runs_and_is_scored_by_name(tmp_path):
    for name, seed in (("one", 1), ("two", 2)):
        write_dataset(tmp_path / name, train=2, val=1, test=1, size=128, seed=seed, workers=1)
    words = ["--preset", "demo", "--data", "one,two", "--data-weights", "2,0.5", "--image-size", "96", "--epochs", "1"]
    result = command("train.py", *words, "--workers", "0", "--run", "r", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert " 5/5 " in result.stderr
    result = command("evaluate.py", "runs/r/best.pt", "--json", "a.json", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    scores = json.loads((tmp_path / "a.json").read_text())["per_image"]
    assert len(scores) == 2 and all(np.isfinite(score["hmean"]) for score in scores.values())


# ---- places


@pytest.fixture
def tree(tmp_path) -> Path:
    for name in ("a.jpg", "b.PNG", "c.tif", "notes.txt", "deep/er/d.jpg", "[x]/e.jpg", "f.mov", ".g.jpg"):
        path = tmp_path / "tree" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    return tmp_path / "tree"


@pytest.mark.parametrize(
    ("places", "names"),
    [
        (["."], ["[x]/e.jpg", "a.jpg", "b.PNG", "c.tif", "deep/er/d.jpg"]),
        (["*"], ["a.jpg", "b.PNG", "c.tif"]),
        (["**/*.jpg"], ["a.jpg", "d.jpg", "e.jpg"]),
        (["*.mov", "deep/**"], ["d.jpg", "f.mov"]),
        (["c.tif", "?.jpg"], ["a.jpg", "c.tif"]),
        (["[x]"], ["e.jpg"]),
        (["a.jpg", "*"], ["a.jpg", "b.PNG", "c.tif"]),
        (["deep", "deep/er"], ["er/d.jpg"]),
        ([".g.jpg"], [".g.jpg"]),
    ],
)
def test_places_are_folders_files_and_patterns(tree, places, names):
    assert sorted(find_images_at([tree / place for place in places])) == sorted(names)


def test_what_a_folder_holds_beside_images_is_counted_by_suffix(tree, capsys):
    find_images_at([tree])
    assert f"{tree}: passed over 1 .mov, 1 .txt" in capsys.readouterr().out


def test_images_of_one_name_in_two_places_are_told_apart_by_their_folders(tmp_path):
    for name in ("p/a.jpg", "q/a.jpg", "q/b.jpg"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    assert list(find_images_at([tmp_path / "p", tmp_path / "q"])) == ["p/a.jpg", "q/a.jpg", "b.jpg"]
    assert list(find_images_at([tmp_path / "**" / "*.jpg"])) == ["p/a.jpg", "q/a.jpg", "b.jpg"]


@pytest.mark.parametrize(
    ("places", "message"),
    [
        (["absent"], "absent: no such file or folder"),
        (["absent.pdf#page=1"], "absent.pdf#page=1: no such file or folder"),
        (["*.bmp"], r"\*\.bmp: holds no images"),
        (["empty"], r"empty: holds no images"),
    ],
)
def test_places_without_images_are_named(tree, places, message):
    (tree / "empty").mkdir()
    with pytest.raises(UserError, match=message):
        find_images_at([tree / place for place in places])


@pytest.mark.parametrize("points", [[[5, 5], [9, 5], [9, 9]], [[150, 5], [190, 5], [190, 9], [150, 9]]])
def test_words_of_three_points_or_outside_of_the_image_cannot_be_scored(points):
    word = [[5, 5], [9, 5], [9, 9], [5, 9]]
    for polygon, ignore in ((points, False), (word, True)):
        with pytest.raises(UserError, match="no image of val has a word that can be scored"):
            check_scorable("data", "val", [(Annotation([np.array(polygon)], [ignore]), (100, 50))])
    check_scorable("data", "val", [(Annotation([np.array(points), np.array(word)], [False, False]), None)])
