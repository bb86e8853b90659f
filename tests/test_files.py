"""Files: only what ends is read, and nothing is overwritten but earlier results."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest

import evaluate
import export
import predict
import train
from dbnet.annotations import RESULT_MARK, Annotation, choose_format, result_mark, write_detections
from dbnet.checkpoint import load_checkpoint, save_checkpoint
from dbnet.config import Config
from dbnet.errors import UserError
from dbnet.evaluation import SCORES_MARK, Evaluation, read_scores
from dbnet.files import Journal, check_outputs, write_json, write_whole
from dbnet.formats import read_labels_at, read_submission
from dbnet.images import read_image, read_size
from dbnet.model import DBNet
from dbnet.pictures import PICTURE_MARK, ImagePictures, write_image
from dbnet.report import REPORT_MARK, write_report

READERS = {
    "a.png": read_image,
    "b.jpg": read_size,
    "a.pdf": lambda path: read_image(path.with_name("a.pdf#page=1")),
    "a.json": lambda path: read_labels_at(path, []),
    "a.zip": lambda path: read_labels_at(path, []),
    "a.csv": read_submission,
    "a.pt": load_checkpoint,
    "scores.json": lambda path: read_scores(path, []),
}


def make_pipe(path):
    os.mkfifo(path)


def make_socket(path):
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))


def make_device(path):
    path.symlink_to("/dev/zero")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs a system with pipes that have names")
@pytest.mark.parametrize(("make", "kind"), [(make_pipe, "pipe"), (make_socket, "socket"), (make_device, "device")])
@pytest.mark.parametrize("name", READERS)
def test_what_may_never_end_is_named_and_not_read(tmp_path, monkeypatch, name, make, kind):
    monkeypatch.chdir(tmp_path)  # the name of a socket is short
    make(Path(name))
    with pytest.raises(UserError, match=rf"{name.split('.')[0]}\..*is a {kind}, not a file"):
        READERS[name](Path(name))


# ------------------------------------------------------------------------------------- outputs, before the work begins

MARK = "results of this test"


def test_an_output_that_is_an_input_is_rejected_by_any_of_its_names(tmp_path):
    photo, link, hard = tmp_path / "a.jpg", tmp_path / "link.jpg", tmp_path / "hard.jpg"
    photo.write_text(MARK)
    link.symlink_to(photo)
    os.link(photo, hard)
    for name in (photo, link, hard, tmp_path / "folder" / ".." / "a.jpg"):
        (tmp_path / "folder").mkdir(exist_ok=True)
        with pytest.raises(UserError, match="is an input of this command"):
            check_outputs((name, MARK), inputs=[photo])
    assert photo.read_text() == MARK


def test_a_file_that_is_no_earlier_result_of_its_kind_is_rejected(tmp_path):
    theirs, ours, empty, new = (tmp_path / name for name in ("theirs", "ours", "empty", "new"))
    theirs.write_text("x" * 200_000)
    ours.write_text("x" * 200_000 + MARK)
    empty.touch()
    with pytest.raises(UserError, match="theirs: exists, and is not an earlier result of this kind"):
        check_outputs((theirs, MARK))
    check_outputs((ours, MARK), (empty, MARK), (new, MARK), (None, MARK))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "ours", "theirs"]


def test_two_results_have_two_names(tmp_path):
    with pytest.raises(UserError, match="is named for two results"):
        check_outputs((tmp_path / "a", MARK), (tmp_path / "no" / ".." / "a", MARK))


def test_an_output_where_the_command_prints_is_rejected(tmp_path):
    command = [sys.executable, "-c", "from pathlib import Path; from dbnet.files import check_outputs\n"]
    command[-1] += "check_outputs((Path('/dev/stdout'), 'mark'))"
    for target in (subprocess.PIPE, (tmp_path / "printed").open("w")):
        result = subprocess.run(command, stdout=target, stderr=subprocess.PIPE, text=True)
        assert "/dev/stdout: what the command prints would be mixed into it" in result.stderr


def test_what_is_no_file_is_written_through_or_rejected_and_stays_what_it_is(tmp_path):
    device = tmp_path / "null"
    device.symlink_to("/dev/null")
    check_outputs((device, MARK))
    write_json(device, {"a": 1})
    assert device.is_symlink() and device.is_char_device()

    reading, writing = os.pipe()
    pipe = Path(f"/dev/fd/{writing}")  # as the shell's >(gzip) is
    check_outputs((pipe, MARK))
    write_json(pipe, {"a": 1})
    os.close(writing)
    with os.fdopen(reading) as file:
        assert file.read() == '{\n  "a": 1\n}\n'

    make_pipe(tmp_path / "pipe")
    make_socket(Path(os.path.relpath(tmp_path / "socket")))
    for name in ("pipe", "socket"):
        for attempt in (lambda path: check_outputs((path, MARK)), lambda path: write_json(path, {})):
            with pytest.raises(UserError, match=f"is a {name}; name a file"):
                attempt(tmp_path / name)


def test_beside_a_device_or_a_pipe_no_results_are_kept():
    reading, writing = os.pipe()
    for out in (Path("/dev/null"), Path(f"/dev/fd/{writing}")):
        before = sorted(os.listdir("/dev"))
        journal = Journal(out, 0, [], resume=False)
        journal.add("a", 1)
        assert sorted(os.listdir("/dev")) == before
        journal.remove()
    os.close(reading)
    os.close(writing)


def test_a_full_device_is_one_line():
    with pytest.raises(UserError, match=r"/dev/full: cannot be written \(No space left on device\)"):
        write_json(Path("/dev/full"), {"a": 1})


def test_a_link_stays_a_link_and_its_file_is_replaced(tmp_path):
    (tmp_path / "folder").mkdir()
    link, file = tmp_path / "link", tmp_path / "folder" / "file"
    link.symlink_to(Path("folder") / "file")
    for content in ({"a": 1}, {"a": 2}):  # the first time it points to nothing
        write_json(link, content)
        assert link.is_symlink() and json.loads(file.read_text()) == content
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["file"]


WRITERS = {
    "scores.json": (SCORES_MARK, lambda path: write_json(path, Evaluation().to_dict())),
    "page.html": (REPORT_MARK, lambda path: write_report(path, Evaluation(), "", {}, None, "auto")),
    "a.png": (PICTURE_MARK, lambda path: write_image(path, PIXELS)),
    "a.jpg": (PICTURE_MARK, lambda path: write_image(path, PIXELS)),
    "a.csv": (result_mark("csv"), lambda path: write_detections(path, "csv", FOUND, None)),
    "a.json": (RESULT_MARK, lambda path: write_detections(path, "competition", FOUND, None)),
    "coco.json": (RESULT_MARK, lambda path: write_detections(path, "coco", FOUND, None)),
    "a.zip": (RESULT_MARK, lambda path: write_detections(path, "icdar", FOUND, None)),
}
PIXELS = np.random.default_rng(0).integers(0, 256, (600, 800, 3), dtype=np.uint8)
FOUND = {f"{number}.jpg": Annotation([np.full((4, 2), number)], [False], [0.5]) for number in range(9999)}


@pytest.mark.parametrize("name", WRITERS)
def test_each_kind_of_result_is_known_again_and_may_be_overwritten(tmp_path, name):
    mark, write = WRITERS[name]
    for _ in range(2):
        check_outputs((tmp_path / name, mark))
        write(tmp_path / name)
    with pytest.raises(UserError, match="not an earlier result of this kind"):
        check_outputs((tmp_path / name, "results of another kind"))


@pytest.mark.parametrize("flag", ["--json", "--report"])
def test_evaluate_overwrites_no_file_of_its_user(tmp_path, monkeypatch, flag):
    image = tmp_path / "images" / "val" / "a.jpg"
    image.parent.mkdir(parents=True)
    write_image(image, PIXELS)
    labels = tmp_path / "labels.json"
    labels.write_text('{"images": {"a.jpg": {"words": {}}}}')
    submission = tmp_path / "a.csv"
    submission.write_text("filename,polygons\na.jpg,\n")
    before = {path: path.read_bytes() for path in (image, labels, submission)}
    for path in before:
        monkeypatch.setattr(sys, "argv", ["evaluate.py", "--submission", str(submission), flag, str(path)])
        with pytest.raises(UserError, match=r"is an input|not an earlier result"):
            evaluate.main()
    assert before == {path: path.read_bytes() for path in before}


def test_no_script_overwrites_a_file_of_its_user(tmp_path, monkeypatch):
    theirs = {name: tmp_path / name for name in ("a.png", "a.jpg", "a.onnx", "a.pt", "labels.json", "a.csv", "a.zip")}
    for path in theirs.values():
        path.write_bytes(b"years of work")
    config = Config.from_preset("lite", weights="none", image_size=64, pyramid_channels=32)
    save_checkpoint(tmp_path / "best.pt", config, DBNet(config))
    shutil.copy(tmp_path / "best.pt", tmp_path / "last.pt")
    write_image(tmp_path / "photo.jpg", PIXELS[:64, :64])
    photo = (tmp_path / "photo.jpg").read_bytes()
    monkeypatch.chdir(tmp_path)
    for script, *words in (
        (train, "--weights", "none", "--show-samples", "a.png"),
        (export, "best.pt", "--onnx", "a.onnx"),
        (export, "best.pt", "--half", "a.pt"),
        (export, "best.pt", "--half", "best.pt"),
        (export, "best.pt", "--half", "last.pt"),
        (evaluate, "best.pt", "--tune", "--json", "labels.json"),
        (evaluate, "best.pt", "--json", "best.pt"),
        (predict, "best.pt", "--images", "photo.jpg", "--out", "a.csv"),
        (predict, "best.pt", "--images", "photo.jpg", "--out", "labels.json"),
        (predict, "best.pt", "--images", "photo.jpg", "--out", "labels.json", "--out-format", "coco"),
        (predict, "best.pt", "--images", "photo.jpg", "--out", "a.zip"),
        (predict, "best.pt", "--images", "photo.jpg", "--out", "photo.jpg", "--out-format", "csv"),
        (predict, "best.pt", "--images", "photo.jpg", "--out", "b.csv", "--overlays", "."),
    ):
        monkeypatch.setattr(sys, "argv", ["script", *words])
        with pytest.raises(UserError, match=r"is an input of this command|not an earlier result of this kind"):
            script.main()
    assert {path.read_bytes() for path in theirs.values()} == {b"years of work"}
    assert (tmp_path / "photo.jpg").read_bytes() == photo
    for name in ("best.pt", "last.pt"):
        assert "made_by" not in load_checkpoint(tmp_path / name)
    monkeypatch.setattr(sys, "argv", ["script", "best.pt", "--half", "half.pt"])
    for _ in range(2):
        export.main()


def test_names_of_255_bytes_are_written_whole_or_not_at_all(tmp_path):
    name = "나" * 83 + "na.jpg"
    with write_whole(tmp_path / name, "w") as file:
        file.write("x")
    assert len(name.encode()) == 255 and [found.name for found in tmp_path.iterdir()] == [name]


def test_the_key_of_a_file_changes_when_another_of_its_size_and_time_takes_its_place(tmp_path):
    images = tmp_path / "a.bmp", tmp_path / "b.bmp"
    for image in images:
        image.write_bytes(image.name.encode())
        os.utime(image, (10**9, 10**9))
    journal = Journal(tmp_path / "out.csv", 0, None, resume=True)
    before = journal.key(images[0], images[0])
    assert journal.key(images[0], images[0]) == before
    time.sleep(0.02)  # the clock of file systems ticks every few milliseconds
    images[1].rename(images[0])
    assert journal.key(images[0], images[0]) != before


def test_a_table_that_somebody_has_saved_again_or_text_about_one_is_not_overwritten(tmp_path):
    table, pictures = tmp_path / "a.csv", ImagePictures(None, tmp_path / "crops", {})
    pictures.write_index({}, {})
    write_detections(table, "csv", {"a.jpg": Annotation([np.ones((4, 2), int)], [False])}, None)
    for path, mark in ((table, result_mark("csv")), pictures.outputs()[0]):
        written = path.read_bytes()
        check_outputs((path, mark))
        for theirs in (written.replace(b"\r\n", b"\n"), b'HEADER = "' + mark.encode() + b'"', b"# a\r\n" + written):
            path.write_bytes(theirs)
            with pytest.raises(UserError, match="is not an earlier result of this kind"):
                check_outputs((path, mark))


def test_names_that_get_too_long_with_what_is_added_are_told_before_the_work(tmp_path):
    for letters, too_long in ((250, "csv"), (246, ""), (251, "labelme csv")):
        name = "a" * letters + ".jpg"
        pictures = ImagePictures(None, tmp_path / "crops", {name: tmp_path / name})
        told = pytest.raises(UserError, match="the name is too long for a file; shorten it")
        with told if "csv" in too_long else nullcontext():
            check_outputs((tmp_path / "a.csv", MARK), *pictures.outputs())
        with told if "labelme" in too_long else nullcontext():
            choose_format(tmp_path / "labels", "labelme", [f"x/{name}"])
