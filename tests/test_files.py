"""Files that are read: only what ends is read at all."""

import os
import socket
from pathlib import Path

import pytest

from dbnet.annotations import read_labels_at, read_submission
from dbnet.checkpoint import load_checkpoint
from dbnet.errors import UserError
from dbnet.evaluation import Comparison
from dbnet.images import read_image, read_size
from dbnet.splits import find_images_at

READERS = {
    "a.png": read_image,
    "b.jpg": read_size,
    "a.pdf": lambda path: read_image(path.with_name("a.pdf#page=1")),
    "a.json": lambda path: read_labels_at(path, []),
    "a.zip": lambda path: read_labels_at(path, []),
    "a.csv": read_submission,
    "a.pt": load_checkpoint,
    "scores.json": Comparison.read,
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


def test_a_folder_of_images_passes_a_pipe_by(tmp_path):
    os.mkfifo(tmp_path / "a.jpg")
    (tmp_path / "b.jpg").touch()
    assert find_images_at([tmp_path]) == [tmp_path / "b.jpg"]
