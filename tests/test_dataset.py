"""Annotations, letterbox, augmentation and samples."""

import gc
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
from multiprocessing import get_context
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import ROOT, make_training

import train
from dbnet import augment
from dbnet.annotations import Annotation
from dbnet.dataset import Batches, Draw, ImageDataset, TextDataset, gather_words, load_batches, make_loader
from dbnet.errors import UserError
from dbnet.formats import read_labels_at
from dbnet.geometry import Letterbox


@given(st.integers(1, 5000), st.integers(1, 5000), st.sampled_from([32, 640, 1024]), st.integers(0, 2**32))
def test_letterbox_there_and_back_is_exact(width, height, side, seed):
    letterbox = Letterbox(width, height, side)
    points = np.random.default_rng(seed).uniform(0, (width, height), (20, 2))
    inside = letterbox.to_network(points)
    assert (inside >= 0).all() and (inside <= side + 1e-9).all()
    np.testing.assert_allclose(inside / letterbox.scale, points, atol=1e-6)


def test_letterbox_moves_pixels_with_points():
    """A white square drawn in the original lies where its points are moved, within half a pixel."""
    pixels = np.zeros((700, 300, 3), np.uint8)
    pixels[200:400, 100:200] = 255
    letterbox = Letterbox(300, 700, 640)
    resized = letterbox.resize(pixels)[..., 0] > 127
    ys, xs = np.nonzero(resized)
    corners = letterbox.to_network(np.array([[100, 200], [200, 400]]))
    found = np.array([[xs.min(), ys.min()], [xs.max() + 1, ys.max() + 1]])
    assert np.abs(found - corners).max() <= 0.5


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("quarter_turns", [0, 1, 2, 3])
def test_augmentation_moves_polygons_with_the_pixels(flip, quarter_turns):
    augmentation = augment.Augmentation(flip=flip, quarter_turns=quarter_turns)
    image = np.zeros((50, 80, 3), np.uint8)
    image[10:20, 30:60] = 255
    width, height = augmentation.size(80, 50)
    canvas = np.zeros((96, 96, 3), np.uint8)
    augmentation.render(image, canvas)
    assert not canvas[height:].any() and not canvas[:, width:].any()
    polygon = augmentation.move(np.array([[30.0, 10], [60, 10], [60, 20], [30, 20]]), 80, 50)
    ys, xs = np.nonzero(canvas[..., 0])
    assert polygon.min(axis=0).tolist() == [xs.min(), ys.min()]
    assert polygon.max(axis=0).tolist() == [xs.max() + 1, ys.max() + 1]


@given(
    augmentation=st.builds(
        augment.Augmentation,
        flip=st.booleans(),
        quarter_turns=st.integers(0, 3),
        scale=st.floats(0.6, 1.8),
        angle=st.floats(-20, 20),
        corners=st.just(()) | st.tuples(*[st.tuples(st.floats(-0.08, 0.08), st.floats(-0.08, 0.08))] * 4),
        limit=st.sampled_from([None, 150, 1000]),
        cut_position=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    )
)
def test_any_geometry_moves_polygons_with_the_pixels(augmentation):
    image = np.zeros((120, 200, 3), np.uint8)
    image[50:70, 80:130] = 255
    square = np.array([[80.0, 50], [130, 50], [130, 70], [80, 70]])
    width, height = augmentation.size(200, 120)
    canvas = np.zeros((height + 8, width + 8, 3), np.uint8)
    augmentation.render(image, canvas)
    assert not canvas[height:].any() and not canvas[:, width:].any()
    beyond = 8  # pixels around the result, so that outlines just outside of it count as borders too
    expected = np.zeros((height + 2 * beyond, width + 2 * beyond), np.uint8)
    moved = augmentation.move(square, 200, 120) + beyond
    cv2.fillPoly(expected, [np.round((moved - 0.5) * 16).astype(np.int32)], 255, shift=4)
    border = cv2.morphologyEx(expected, cv2.MORPH_GRADIENT, np.ones((5, 5))) > 0
    inside = (slice(beyond, beyond + height), slice(beyond, beyond + width))
    sure = ~border[inside]
    assert np.array_equal(canvas[:height, :width, 0][sure] > 127, expected[inside][sure] > 127)


@pytest.mark.parametrize("how", [{}, {"scale": 2.0}, {"angle": 3.0}, {"corners": ((0.01, 0),) * 4}])
def test_an_image_without_words_moves_none(how):
    assert augment.Augmentation(**how).move(np.empty((0, 2)), 80, 50).shape == (0, 2)


def test_words_that_a_cut_parts_are_masked_and_those_outside_are_gone(small):
    """Scaled by two and cut at the top left: of three words one is left whole, one is parted, one is outside."""
    dataset = TextDataset(small, "train", train=True)
    letterbox = Letterbox(128, 128, 128)
    words = [
        [[4, 4], [40, 4], [40, 12], [4, 12]],
        [[50, 30], [90, 30], [90, 38], [50, 38]],
        [[70, 90], [99, 99], [70, 99]],
    ]
    dataset.words = [gather_words(Annotation([np.array(word, float) for word in words], [False] * 3))]
    cut = augment.Augmentation(scale=2.0, limit=128, cut_position=(0.0, 0.0))
    text, masked = dataset.polygons(0, letterbox, cut)
    assert [polygon.tolist() for polygon in text] == [[[8, 8], [80, 8], [80, 24], [8, 24]]]
    assert [polygon.tolist() for polygon in masked] == [[[100, 60], [180, 60], [180, 76], [100, 76]]]


def test_words_are_counted_by_what_training_makes_of_them(small):
    dataset = TextDataset(small, "train", train=True)
    width, _ = dataset.size(0)
    square = np.array([[0.0, 0], [10, 0], [10, 10], [0, 10]])
    far = square + np.array((width + 5, 0))
    words = [square, square + 3, far, square - 50, square[:2], square * np.array((1, 0)), np.empty((0, 2)), square]
    dont_care = [False] * 7 + [True]
    none = [gather_words(Annotation()) for _ in dataset.paths[1:]]
    dataset.words = [gather_words(Annotation(words, dont_care)), *none]
    masked = "1 don't care, 3 without area, tangled or of too many points"
    assert dataset.count_words() == f"2 words are learned; masked: {masked}; 2 lie outside of their images"
    tangle = np.random.default_rng(0).uniform(0, min(dataset.size(0)), (400, 2))
    angles = np.linspace(0, 2 * np.pi, 400, endpoint=False)
    page = (1 + np.stack([np.cos(angles), np.sin(angles)], axis=1)) * np.divide(dataset.size(0), 2)
    for nothing in ([far], [square[:2]], [tangle], [page], []):
        dataset.words = [gather_words(Annotation(nothing, [False] * len(nothing))), *none]
        with pytest.raises(UserError, match="there is nothing to learn: 0 words are learned"):
            dataset.count_words()


def test_the_micro_batches_of_a_step_share_one_of_the_train_sizes(small):
    for pad in ("square", "tight"):
        config = small.changed(train_sizes=(64, 96, 160), batch_size=1, accumulate=2, pad=pad)
        dataset = TextDataset(config, "train", train=True)
        batches = Batches(dataset, 1, config.seed, config.accumulate)
        sides = []
        for epoch in range(4):
            batches.epoch = epoch
            loaded = list(make_loader(batches, 0, False))
            assert sorted(int(batch["index"]) for batch in loaded) == list(range(len(dataset)))
            for batch in loaded:
                side = int(batch["side"])
                assert max(batch["image"].shape[1:3]) == side and batch["prob_map"].any()
                sides.append(side)
        assert sides[::2] == sides[1::2]
        assert set(sides) == {64, 96, 128}  # none larger than image_size


def test_photometric_augmentation_keeps_shape_and_changes_values():
    image = np.random.default_rng(0).integers(60, 120, (64, 64, 3), dtype=np.uint8)
    dark = np.full((64, 64, 3), 20, np.uint8)

    def changed(pixels, **how):
        canvas = np.zeros_like(pixels)
        augment.Augmentation(**how).render(pixels.copy(), canvas)
        return canvas

    assert np.array_equal(changed(image, brightness=0.2), image + 51)
    assert changed(image, clahe_clip=2.0).std() > image.std()
    assert not changed(dark, brightness=-0.2).any()


def test_points_outside_are_clipped_to_the_image():
    square = np.array([[-10.0, -10], [20, -10], [20, 20], [-10, 20]])
    outside, line = square + 500, np.array([[0.0, 0], [10, 10], [20, 20]])
    polygons = [outside, square, line, line[:2], np.empty((0, 2))]
    dataset = TextDataset.__new__(TextDataset)
    dataset.words = [gather_words(Annotation(polygons, [False] * 5))]
    text, masked = dataset.polygons(0, Letterbox(100, 100, 100), augment.Augmentation())
    assert [polygon.tolist() for polygon in text] == [square.clip(0).tolist()]
    assert [len(polygon) for polygon in masked] == [4, 3, 2, 0]
    assert (masked[0] == 100).all()


def test_text_that_cannot_be_learned_is_masked_and_not_left_as_background(small):
    dataset = TextDataset(small, "train", train=True)
    word, line, vanishes = [[4, 4], [60, 4], [60, 20], [4, 20]], [[10, 40], [30, 40], [50, 40]], [[10, 60], [40, 62]]
    (left, top), (right, bottom) = vanishes
    thin = [[left, top], [right, top], [right, bottom], [left, bottom]]
    words = [np.array(each, float) for each in (word, line, [[70, 70], [90, 90]], thin)]
    dataset.words = [gather_words(Annotation(words, [False] * 4))]
    sample = dataset.labels(Draw(0), Letterbox(128, 128, 128), augment.Augmentation(), (128, 128))
    assert sample["mask"][12, 30] == 1 and sample["prob_map"][12, 30] == 1
    for x, y in ((30, 40), (80, 80), (25, 61)):
        assert sample["mask"][y, x] == 0 and sample["prob_map"][y, x] == 0


def test_a_sample_is_uint8_and_depends_on_seed_epoch_and_index_alone(small):
    dataset = TextDataset(small, "train", train=True)
    sample, again, next_epoch = dataset[2], dataset[2], dataset[2 + len(dataset)]
    side = small.image_size
    assert sample["image"].shape == (side, side, 3) and sample["image"].dtype == np.uint8
    assert sample["prob_map"].shape == sample["thresh_levels"].shape == sample["mask"].shape == (side, side)
    assert sample["prob_map"].any() and sample["thresh_levels"].max() > 200
    assert np.array_equal(sample["image"], again["image"])
    assert not np.array_equal(sample["image"], next_epoch["image"])


def test_a_cached_image_is_the_decoded_one_until_its_file_changes(rendered, small, tmp_path):
    data = Path(shutil.copytree(rendered, tmp_path / "data"))
    cached = TextDataset(small.changed(data=str(data)), "train", train=True)
    decoded = TextDataset(small.changed(data=str(data), cache_gb=0.0), "train", train=True)
    for index in (1, 1 + len(cached), 1 + 2 * len(cached)):  # the first fills the cache, the others read it
        for name, value in cached[index].items():
            assert np.array_equal(value, decoded[index][name]), name
    assert cached._cache.load(1, [0, 0, 0]) is None
    shutil.copy(data / "images" / "train" / cached.paths[2].name, cached.paths[1])
    assert np.array_equal(cached.load(Draw(1))[0], cached.load(Draw(2))[0])


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux alone")
def test_workers_share_the_cache_whatever_the_default_way_to_start_them(rendered, small, tmp_path, monkeypatch):
    """It is another one from Python 3.14 on."""
    data = shutil.copytree(rendered, tmp_path / "data")
    dataset = TextDataset(small.changed(data=str(data)), "train", train=True)
    monkeypatch.setattr(multiprocessing.context._default_context, "_actual_context", get_context("forkserver"))
    list(make_loader(Batches(dataset, 2), 1, False))
    for path in dataset.paths:  # from here on the pixels can only come from the cache
        status = path.stat()
        path.write_bytes(bytes(status.st_size))
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert not [error for batch in make_loader(Batches(dataset, 2), 1, False) for error in batch["failed"]]


def test_without_room_for_the_cache_images_are_decoded_each_time(small, monkeypatch, capsys):
    dataset = TextDataset(small, "train", train=True)
    expected = dataset[0]["image"]
    fresh = TextDataset(small, "train", train=True)
    usage = shutil.disk_usage("/")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=1 << 20))
    assert np.array_equal(fresh[0]["image"], expected) and np.array_equal(fresh[0]["image"], expected)
    assert capsys.readouterr().err.count("no longer cached") == 1

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.mkstemp", full)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=1 << 40))
    assert np.array_equal(TextDataset(small, "train", train=True)[0]["image"], expected)
    assert "images are not cached ([Errno 28] No space left" in capsys.readouterr().err


def test_spawned_workers_share_the_cache_and_leave_no_file(rendered, small, tmp_path, monkeypatch):
    data = shutil.copytree(rendered, tmp_path / "data")
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    monkeypatch.setattr("dbnet.dataset._START_METHOD", "spawn")
    dataset = TextDataset(small.changed(data=str(data)), "train", train=True)
    expected = [dataset[i]["image"] for i in range(len(dataset))]
    for path in dataset.paths:  # from here on the pixels can only come from the cache
        status = path.stat()
        path.write_bytes(bytes(status.st_size))
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert list(folder.glob("dbnet-cache-*"))
    [batch] = make_loader(Batches(dataset, len(dataset)), 1, False)
    assert not batch["failed"]
    for i, image in zip(batch["index"].tolist(), batch["image"], strict=True):
        assert np.array_equal(image, expected[i])
    del dataset, batch
    gc.collect()
    assert not list(folder.glob("dbnet-cache-*"))


HOLD_BATCHES = """
import resource, sys
from dbnet.config import Config
from dbnet.dataset import Batches, TextDataset, make_loader
config = Config(data=sys.argv[1], image_size=64)
batches = Batches(TextDataset(config, "train", train=True), 1, 0)
resource.setrlimit(resource.RLIMIT_NOFILE, (48, 48))
held = [batch for epoch in range(5) for batch in make_loader(batches, 2, False)]
print(len(held), "batches of", len(held[0]), "tensors")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit of descriptors")
def test_batches_that_wait_hold_no_descriptors(rendered):
    """An optimizer step that accumulates holds all its batches at once, each of several tensors."""
    words = [sys.executable, "-c", HOLD_BATCHES, rendered]
    result = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert result.stdout.startswith("30 batches of"), result.stderr


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible"), "--shm-size"),
        (OSError(28, "No space left on device"), "--shm-size"),
        (OSError(30, "Read-only file system"), "--shm-size"),
        (FileNotFoundError(2, "No such file or directory"), "--shm-size"),  # of a semaphore, without /dev/shm
        (
            RuntimeError(
                "Caught RuntimeError in DataLoader worker process 0.\n"
                "RuntimeError: Shared memory manager connection has timed out\nframe #1: c10::Error\n"
            ),
            "machine with too much to do",
        ),
        (RuntimeError("Caught RuntimeError\nunable to write to file </torch_1_2_3>: No space left"), "--workers 0"),
        (
            MemoryError("Caught MemoryError in DataLoader worker process 0.\nOriginal Traceback"),
            "not enough memory",
        ),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), "by signal: Killed.; if memory"),
    ],
)
def test_what_ends_the_workers_is_one_line_with_the_way_out(error, message):
    class Failing:
        def __iter__(self):
            yield {}
            raise error

    batches = load_batches(Failing())
    assert next(batches) == {}
    with pytest.raises(UserError) as told:
        next(batches)
    assert message in str(told.value) and "\\n" not in str(told.value)


class DeadlyDataset(ImageDataset):
    """Its second image ends the process that reads it, as the system does when memory is short."""

    def load(self, draw):
        if draw.place == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().load(draw)


def test_a_worker_that_dies_ends_the_loading_in_one_line(small, rendered):
    dataset = DeadlyDataset(sorted((rendered / "images" / "train").iterdir()), small)
    with pytest.raises(UserError, match=r"DataLoader worker \(pid.*--workers 0"):
        list(load_batches(make_loader(Batches(dataset, 1), 1, False)))


def test_tight_batches_are_padded_to_32_and_hold_each_image_once(small):
    """Half of the receipts lie on their side, so that there are two shapes to keep apart."""
    config = small.changed(pad="tight", batch_size=2, rotate90_p=1.0)
    dataset = TextDataset(config, "train", train=True)
    batches = Batches(dataset, config.batch_size, config.seed)
    batches.epoch = 3
    seen = []
    for batch in make_loader(batches, 0, False):
        height, width = batch["image"].shape[1:3]
        assert height % 32 == width % 32 == 0 and max(height, width) == config.image_size
        assert batch["prob_map"].shape == batch["mask"].shape == batch["image"].shape[:3]
        seen += batch["index"].tolist()
    assert sorted(seen) == list(range(len(dataset)))
    assert len(batches) == len(list(batches)) == 3
    for batch in batches:
        shapes = {dataset.__getitems__([draw])[0]["image"].shape for draw in batch}
        assert shapes == {(*dataset.shape(draw), 3) for draw in batch}  # what the headers say is what comes


def test_an_image_however_small_leaves_a_batch_norm_more_than_one_pixel(small):
    config = small.changed(image_size=32, pad="tight", batch_size=1, scale=4.0)
    batches = Batches(TextDataset(config, "train", train=True), 1, config.seed)
    training = make_training(config)
    for batch in make_loader(batches, 0, False):
        assert batch["image"].shape[1:3].numel() >= 2 * 32 * 32
        losses, _ = train.optimizer_step(training, [batch], config, 1)
        assert losses.isfinite().all()


def test_evaluation_pads_tightly_and_in_order_of_shape(rendered, small):
    dataset = TextDataset(small, "val", train=False)
    side = small.image_size
    for index in range(len(dataset)):
        height, width = dataset[index]["image"].shape[:2]
        resized = Letterbox(*dataset[index]["size"].tolist(), side).resized
        assert (width, height) == tuple(-(-length // 32) * 32 for length in resized)


def test_a_broken_image_fails_alone_in_its_batch(rendered, small, tmp_path):
    data = Path(shutil.copytree(rendered, tmp_path / "data"))
    dataset = TextDataset(small.changed(data=str(data), pad="tight"), "train", train=True)
    dataset.paths[0].write_bytes(b"no image")
    [batch] = make_loader(Batches(dataset, len(dataset), seed=0), 0, False)
    assert [index for index, _ in batch["failed"]] == [0]
    assert len(batch["image"]) == len(dataset) - 1


def test_batches_are_the_same_with_any_number_of_workers(small):
    dataset = TextDataset(small, "train", train=True)
    loads = []
    for workers in (0, 2):
        batches = Batches(dataset, 4, small.seed)
        loads.append(list(make_loader(batches, workers, False)))
    for ours, theirs in zip(*loads, strict=True):
        assert torch.equal(ours["image"], theirs["image"])


def test_dont_care_words_are_masked_and_no_target(rendered, small, tmp_path):
    data = Path(shutil.copytree(rendered, tmp_path / "data"))
    path = data / "jsons" / "train.json"
    content = json.loads(path.read_text())
    for entry in content["images"].values():
        for i, word in enumerate(entry["words"].values()):
            word.update({"illegibility": True} if i % 2 else {"transcription": "###"})
    path.write_text(json.dumps(content))
    sample = TextDataset(small.changed(data=str(data)), "train", train=True)[0]
    assert not sample["prob_map"].any()
    assert (sample["mask"] == 0).any()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "not JSON"),
        ("[]", 'lacks "images"'),
        ('{"images": {"a.jpg": 3}}', 'a.jpg: lacks "words"'),
        ('{"images": {"../a.jpg": {"words": {}}}}', "not a plain file name"),
        ('{"images": {"a.jpg": {"words": {"7": {"points": [[1, 2, 3]]}}}}}', "word 7"),
        ('{"images": {"a.jpg": {"words": {"7": {"points": [[1, "2"]]}}}}}', "word 7"),
        ('{"images": {"a.jpg": {"words": {"7": {"points": [[1, null]]}}}}}', "word 7"),
        ('{"images": {"a.jpg": {"words": {"7": {"points": 5}}}}}', "word 7"),
        ('{"images": {"a.jpg": {"words": {"7": {}}}}}', "word 7"),
        ('{"images": {"a.jpg": {"words": {"7": {"points": [[1, NaN]]}}}}}', "not a finite number"),
        ('{"images": {"a.jpg": {"words": {"7": {"points": [[1, 1e999]]}}}}}', "not a finite number"),
    ],
)
def test_broken_annotations_are_named_in_one_line(tmp_path, content, words):
    path = tmp_path / "train.json"
    path.write_text(content)
    with pytest.raises(UserError, match=re.escape(words)) as caught:
        read_labels_at(path, [])
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from(["images", "words", "points", "a.jpg"]), inner, max_size=3)
        ),
        max_leaves=12,
    )
)
def test_any_json_is_read_or_refused(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("json") / "train.json"
    path.write_text(json.dumps(content))
    try:
        read_labels_at(path, [])
    except UserError as error:
        assert str(path) in str(error)
