"""Pictures: curves of any log, overlays with a name each, and none of them in the way."""

import gc
import importlib.util
import json
import math
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import same_color
from matplotlib.figure import Figure
from PIL import Image

from dbnet import pictures
from dbnet.files import read_log
from dbnet.pictures import BLUE, VERMILION, draw_curves, plan_overlays, show_progress, write_curves


def make_row(epoch, hmean, **values):
    """A row as train.py logs it."""
    row = {"epoch": epoch, "lr": 1e-3 / epoch, "images_per_second": 300.0, "peak_memory_gb": 11.5}
    row |= {"total_loss": 6 / epoch, "prob_loss": 0.6 / epoch, "binary_loss": 0.5 / epoch, "thresh_loss": 0.1 / epoch}
    row |= {"precision": min(1.0, hmean + 0.01), "recall": hmean - 0.01, "hmean": hmean, "batch": "8 x 2"}
    return row | {"image_size": 1024, "fallbacks": []} | values


def write_log(run, rows):
    run.mkdir(exist_ok=True)
    (run / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def lines(axes, color):
    """The data of the lines of this color in a panel."""
    return [line.get_xydata() for line in axes.get_lines() if same_color(line.get_color(), color)]


# ---------------------------------------------------------------------------------------------------------- curves


@pytest.mark.parametrize(("count", "best"), [(1, 1), (12, 4), (300, 212)])
def test_the_best_epoch_is_marked_where_it_lies(count, best):
    figure = draw_curves([make_row(epoch, 0.97 if epoch == best else 0.9) for epoch in range(1, count + 1)])
    for place, axes in enumerate(figure.axes):
        upright, *ring = lines(axes, VERMILION)
        assert set(upright[:, 0]) == {best}
        assert [each.tolist() for each in ring] == ([[[best, 0.97]]] if place == 0 else [])
    assert figure._suptitle.get_text().endswith(f"best: 0.9700 in epoch {best}")


def test_axes_begin_at_zero_but_for_losses_and_scores_near_one():
    figure = draw_curves([make_row(epoch, 0.95 + epoch / 1000) for epoch in range(1, 20)])
    assert [axes.get_yscale() for axes in figure.axes] == ["linear", "log", "log", "linear", "linear", "linear"]
    assert [axes.get_ylim()[0] for axes in figure.axes[3:]] == [0, 0, 0]
    assert figure.axes[0].get_ylim() == pytest.approx((0.869, 0.989))


def test_numbers_that_are_missing_or_not_finite_are_gaps():
    rows = [make_row(epoch, 0.9) for epoch in range(1, 11)]
    for row, gap in zip(rows[3:7], (math.nan, math.inf, None, -math.inf), strict=True):
        row["precision"] = gap
    del rows[7]["precision"]
    rows[5]["hmean"] = math.nan
    [curve] = lines(draw_curves(rows).axes[0], BLUE)
    assert np.flatnonzero(np.isnan(curve[:, 1])).tolist() == [3, 4, 5, 6, 7]


def test_a_log_without_numbers_or_scores_is_drawn(tmp_path):
    for rows in ([{"epoch": 1}, {"epoch": 2, "hmean": math.nan, "total_loss": 0.0}], [make_row(1, 0.0)]):
        figure = draw_curves(rows)
        assert not any(lines(axes, VERMILION) for axes in figure.axes)  # 0 is not the best of anything
        write_curves(tmp_path, rows)
        assert Image.open(tmp_path / "curves.png").size == (1500, 820)


def test_a_resumed_run_goes_on_with_its_curves(tmp_path):
    write_log(tmp_path, [make_row(1, 0.5), make_row(2, 0.6), make_row(3, 0.7)])
    with (tmp_path / "log.jsonl").open("a") as log:  # epoch 3 again, after a cut between log and checkpoint
        log.write(json.dumps(make_row(3, 0.8)) + "\n" + json.dumps(make_row(4, 0.9))[:50] + "\n")
    assert [(row["epoch"], row["hmean"]) for row in read_log(tmp_path / "log.jsonl")] == [(1, 0.5), (2, 0.6), (3, 0.8)]
    show_progress(tmp_path)
    assert Image.open(tmp_path / "curves.png").size == (1500, 820)


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
    monkeypatch.setattr(pictures, "find_spec", lambda name: None)
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
        assert len(lines) == 2 and len(read_events(tmp_path)["score/hmean"]) == 20


def test_the_curves_of_an_epoch_are_freed_once_they_are_written(tmp_path):
    write_log(tmp_path, [make_row(1, 0.5)])
    show_progress(tmp_path)
    assert not [each for each in gc.get_objects() if isinstance(each, Figure)]


# -------------------------------------------------------------------------------------------------------- overlays


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a.jpg", "b.PNG", "c.d.jpg"], ["a.jpg", "b.jpg", "c.d.jpg"]),
        (["a.jpg", "a.png"], ["a.jpg.jpg", "a.png.jpg"]),
        (["a.jpg", "a.png", "a.jpg.jpg"], ["a.jpg.jpg", "a.png.jpg", "a.jpg.jpg.jpg"]),
        (["x/a.jpg", "y/a.jpg", "a.png"], ["x/a.jpg", "y/a.jpg", "a.jpg"]),
        (["s/a.pdf#page=1", "s/a.pdf#page=2"], ["s/a.pdf#page=1.jpg", "s/a.pdf#page=2.jpg"]),
    ],
)
def test_each_image_has_an_overlay_of_its_own_name(tmp_path, names, expected):
    overlays = plan_overlays(tmp_path / "o", {name: Path("photos", name) for name in names})
    assert list(overlays) == [Path("photos", name) for name in names]
    assert list(overlays.values()) == [tmp_path / "o" / name for name in expected]
    assert all(path.parent.is_dir() for path in overlays.values())
