"""Curves of a run: drawn from any log, the best epoch marked where it is, events read back, and never in the way."""

import importlib.util
import json
import math
import resource
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from dbnet import pictures as curves
from dbnet.pictures import BEST_COLOR, BLUE, PANELS, SIZE, draw_curves, make_axis, plot_area, read_log, show_progress

SCORE, MEMORY = 0, len(PANELS) - 1


def make_row(epoch, hmean, **values):
    """A row as train.py logs it."""
    row = {"epoch": epoch, "lr": 1e-3 / epoch, "images_per_second": 300.0, "peak_memory_gb": 11.5}
    row |= {"total_loss": 6 / epoch, "prob_loss": 0.6 / epoch, "binary_loss": 0.5 / epoch, "thresh_loss": 0.1 / epoch}
    row |= {"precision": min(1.0, hmean + 0.01), "recall": hmean - 0.01, "hmean": hmean, "batch": "8 x 2"}
    return row | {"image_size": 1024, "fallbacks": []} | values


def write_log(run, rows):
    run.mkdir(exist_ok=True)
    (run / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def marked(picture, place, color=BEST_COLOR):
    """Rows and columns of the pixels of about this color inside a panel, counted from its top left."""
    left, top, right, bottom = plot_area(place)
    pixels = np.asarray(picture, int)[top:bottom, left:right]
    return np.nonzero(np.abs(pixels - color).max(axis=2) < 40)


@pytest.mark.parametrize(("count", "best"), [(1, 1), (12, 4), (300, 212)])
def test_the_best_epoch_is_marked_where_it_lies(count, best):
    rows = [make_row(epoch, 0.97 if epoch == best else 0.9) for epoch in range(1, count + 1)]
    picture = draw_curves(rows)
    assert picture.size == SIZE
    left, top, right, bottom = plot_area(SCORE)
    ys, xs = marked(picture, SCORE)
    width = right - left
    share = (best - 1) / (count - 1) if count > 1 else 0.5
    margin = 0.025 / 1.05 if count > 1 else 0  # of the axis, before the first epoch and after the last
    assert np.median(xs) == pytest.approx(width * (margin + (1 - 2 * margin) * share), abs=1.5)
    assert ys.max() - ys.min() > 0.8 * (bottom - top)  # a line over its height, the curves before it
    ring = ys[np.abs(xs - np.median(xs)) >= 4]
    axis = make_axis("score", [row[key] for row in rows for key in ("precision", "recall", "hmean")])
    assert np.mean(ring) == pytest.approx((bottom - top) * (1 - axis.position(0.97)), abs=1.5)


def test_numbers_that_are_missing_or_not_finite_are_gaps():
    rows = [make_row(epoch, 0.9) for epoch in range(1, 11)]
    whole = draw_curves(rows)
    for row, gap in zip(rows[3:7], (math.nan, math.inf, None, -math.inf), strict=True):
        row["precision"] = gap
    del rows[7]["precision"]
    rows[5]["hmean"] = math.nan  # can never be the best
    columns = [set(marked(picture, SCORE, BLUE)[1].tolist()) for picture in (whole, draw_curves(rows))]
    width = plot_area(SCORE)[2] - plot_area(SCORE)[0]
    missing = {column / width for column in columns[0] - columns[1]}
    assert min(missing) == pytest.approx(2 / 9, abs=0.03) and max(missing) == pytest.approx(8 / 9, abs=0.03)
    nothing = draw_curves([{"epoch": 1}, {"epoch": 2, "hmean": math.nan, "total_loss": 0.0}])
    assert nothing.size == SIZE and len(marked(nothing, SCORE)[0]) == 0


def test_a_change_of_the_batch_is_marked_in_the_panel_of_memory():
    rows = [make_row(epoch, 0.9, batch="8 x 2" if epoch < 6 else "4 x 4") for epoch in range(1, 11)]
    assert curves.batch_changes(rows) == [(6, "4 x 4 at 1024 px")]
    _, xs = marked(draw_curves(rows), MEMORY, (130, 130, 130))
    counts = np.bincount(xs[xs > 3])  # without the axis itself
    left, _, right, _ = plot_area(MEMORY)
    assert counts.argmax() == pytest.approx((right - left) / 2, abs=1.5)


@pytest.mark.parametrize("scale", ["linear", "log", "score"])
@pytest.mark.parametrize(
    "values",
    [[0.5], [0.0], [1.0], [0.97, 0.98], [0.0, 1.0], [1e-6, 1e-3], [0.9811, 0.9844], [1e-9, 0.3], [math.nan], []],
)
def test_axes_hold_their_values_between_round_ticks(scale, values):
    axis = make_axis(scale, values)
    assert 2 <= len(axis.ticks) <= 10 and axis.ticks == sorted(set(axis.ticks))
    for value in filter(axis.has, values):
        assert -1e-9 <= axis.position(value) <= 1 + 1e-9
    for tick in axis.ticks:  # few digits: 0.002, 0.985, a score like 0.9985
        digits = f"{tick:e}".split("e")[0].rstrip("0").replace(".", "")
        assert len(digits) <= {"linear": 2, "log": 3, "score": 4}[scale], tick


@pytest.mark.parametrize(
    ("values", "ticks"),
    [
        ([0.93, 0.975], [0.9, 0.92, 0.94, 0.96, 0.98]),
        ([0.1, 0.975], [0, 0.5, 0.8, 0.9, 0.95, 0.98]),
        ([0.96, 0.9886], [0.95, 0.96, 0.97, 0.98, 0.99]),
    ],
)
def test_score_axes_have_room_near_one(values, ticks):
    assert make_axis("score", values).ticks == ticks


def test_a_resumed_run_goes_on_with_its_curves(tmp_path):
    write_log(tmp_path, [make_row(1, 0.5), make_row(2, 0.6), make_row(3, 0.7)])
    with (tmp_path / "log.jsonl").open("a") as log:  # epoch 3 again, after a cut between log and checkpoint
        log.write(json.dumps(make_row(3, 0.8)) + "\n" + json.dumps(make_row(4, 0.9))[:50] + "\n")
    assert [(row["epoch"], row["hmean"]) for row in read_log(tmp_path / "log.jsonl")] == [(1, 0.5), (2, 0.6), (3, 0.8)]
    show_progress(tmp_path)
    assert Image.open(tmp_path / "curves.png").size == SIZE


def read_events(run):
    """(step, value) of each tag, as TensorBoard shows them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_reads_the_numbers_of_the_log(tmp_path):
    pytest.importorskip("tensorboard")
    rows = [make_row(1, 0.5), make_row(2, math.nan), make_row(3, 0.7)]
    for count in (1, 2, 3):
        write_log(tmp_path, rows[:count])
        show_progress(tmp_path)
    events = read_events(tmp_path)
    assert events["loss/total"] == [(row["epoch"], pytest.approx(row["total_loss"])) for row in rows]
    assert events["score/hmean"] == [(1, 0.5), (2, pytest.approx(math.nan, nan_ok=True)), (3, pytest.approx(0.7))]
    numbers = {name for name, value in rows[0].items() if isinstance(value, int | float)} - {"epoch"}
    assert {tag.split("/")[1].removeprefix("total") for tag in events} >= {"lr", "images_per_second", "peak_memory_gb"}
    assert len(events) == len(numbers)

    # Epoch 3 again, after a cut between log and checkpoint.
    write_log(tmp_path, [*rows[:2], make_row(3, 0.8)])
    show_progress(tmp_path)
    assert [step for step, _ in read_events(tmp_path)["score/hmean"]] == [1, 2, 3]
    assert read_events(tmp_path)["score/hmean"][-1][1] == pytest.approx(0.8)


def test_without_tensorboard_there_are_no_events_and_no_message(tmp_path, monkeypatch, capfd):
    write_log(tmp_path, [make_row(1, 0.5)])
    monkeypatch.setattr(curves.importlib.util, "find_spec", lambda name: None)
    show_progress(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curves.png", "log.jsonl"]
    assert capfd.readouterr() == ("", "")


def test_a_full_disk_costs_the_curves_and_not_the_run(tmp_path):
    """The limit of the size of a file fails a write as a full disk does; the next epoch has room again."""
    write_log(tmp_path, [make_row(epoch, 0.5) for epoch in range(1, 21)])
    program = (
        "import resource, signal, sys; from pathlib import Path; from dbnet.pictures import show_progress\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "for limit in (40, resource.RLIM_INFINITY):\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))\n"
        "    show_progress(Path(sys.argv[1]))\n"
        "    print(sorted(path.name[:6] for path in Path(sys.argv[1]).iterdir()))\n"
    )
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    result = subprocess.run([sys.executable, "-c", program, tmp_path], capture_output=True, text=True)
    assert result.returncode == 0
    full, room = result.stdout.splitlines()
    assert "curves" not in full and "curves" in room
    lines = result.stderr.splitlines()
    assert all(line.startswith("no curves of this epoch, training goes on: ") for line in lines), result.stderr
    assert "curves.png: cannot be written" in lines[0]
    if importlib.util.find_spec("tensorboard"):
        assert len(lines) == 2 and list(read_events(tmp_path)["score/hmean"]) == [(20, 0.5)]
