"""Checkpoints: damaged, of other content, hostile, and of earlier formats."""

import builtins
import io
import math
import os
import pickle
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import answered, damages, hostile

from dbnet.checkpoint import load_checkpoint, load_model, save_checkpoint
from dbnet.config import PRESETS, REMOVED_FIELDS, Config
from dbnet.errors import UserError
from dbnet.model import DBNet

DATA = Path(__file__).resolve().parent / "data"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint with a few weights, and its bytes."""
    path = tmp_path_factory.mktemp("saved") / "best.pt"
    save_checkpoint(path, PRESETS["v1"], torch.nn.Linear(7, 5), hmean=0.5)
    return path, path.read_bytes()


@hostile
@given(damages())
def test_a_damaged_checkpoint_is_rejected_or_whole(saved, damage):
    path, data = saved
    path.write_bytes(data)
    expected = load_checkpoint(path)
    path.write_bytes(damage(data))
    found = answered(path, load_checkpoint)
    if found is not None:
        assert found["config"] == expected["config"] and found["hmean"] == 0.5
        assert all(torch.equal(found["model"][name], tensor) for name, tensor in expected["model"].items())


fields = st.sampled_from(["thresh", "epochs", "backbone", "x"])
plain = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.builds(torch.zeros, st.integers(0, 3))
)


@hostile
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "format": plain | st.just(1),
            "config": plain | st.dictionaries(fields | plain, plain, max_size=3),
            "model": plain | st.dictionaries(plain, plain, max_size=3),
        },
    )
)
def test_a_checkpoint_of_other_content_is_rejected(saved, content):
    path, _ = saved
    torch.save(content, path)
    found = answered(path, load_model, {"weights": "none", "backbone": "resnet18"}) if content else None
    assert found is None


def test_weights_that_are_not_finite_are_rejected(tmp_path):
    config = Config.from_preset("lite", weights="none", pyramid_channels=32)
    model = DBNet(config)
    next(model.parameters()).data[0] = math.nan
    save_checkpoint(tmp_path / "best.pt", config, model)
    assert answered(tmp_path / "best.pt", load_model, {}) is None


class Call:
    """Pickled, a call of a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("place", ["config", "model", "optimizer"])
@pytest.mark.parametrize(
    "call",
    [
        (os.system, "touch went-off"),
        (builtins.eval, "open('went-off', 'w')"),
        (builtins.exec, "open('went-off', 'w')"),
        (builtins.open, "went-off", "w"),
        (subprocess.Popen, ["touch", "went-off"]),
        (os.mkdir, "went-off"),
        (pickle.loads, pickle.dumps(Call(os.mkdir, "went-off"))),
        (torch.hub.load, "somewhere/else", "model"),
        (np.memmap, "went-off", "uint8", "w+", 0, (5,)),
    ],
    ids=lambda call: getattr(call[0], "__name__", "call"),
)
def test_no_pickle_runs_code(tmp_path, monkeypatch, place, call):
    monkeypatch.chdir(tmp_path)
    content = {"format": 1, "config": PRESETS["v1"].to_dict(), "model": {}}
    path = Path("best.pt")
    torch.save(content | {place: Call(*call)}, path)
    assert answered(path, load_checkpoint) is None
    path.write_bytes(pickle.dumps(content | {place: Call(*call)}))
    assert answered(path, load_checkpoint) is None
    assert [found.name for found in Path().iterdir()] == ["best.pt"]


def test_an_archive_that_would_unfold_is_rejected(saved, tmp_path):
    _, data = saved
    path = tmp_path / "best.pt"
    with zipfile.ZipFile(io.BytesIO(data)) as archive, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for entry in archive.infolist():
            packed.writestr(entry.filename, archive.read(entry))
    with pytest.raises(UserError, match=r"best\.pt: .*compressed"):
        load_checkpoint(path)


def test_a_checkpoint_of_format_1_stays_readable_and_computes_the_same():
    """Its weights are one run of numbers, seen with overlapping strides, so that it takes a few kilobytes."""
    model, config, content = load_model(DATA / "format-1.pt", {})
    expected = PRESETS["v1"].changed(backbone="resnet18", pyramid_channels=32, weights="none").to_dict()
    stored = torch.load(DATA / "format-1.pt", weights_only=True)["config"]
    assert stored["clahe_clip"] == 2.0  # a field that has been removed since
    kept = {name: value for name, value in stored.items() if name not in REMOVED_FIELDS}
    assert config.to_dict() == expected and expected.items() >= kept.items()
    assert content["epoch"] == 3 and content["hmean"] == 0.5
    images = (torch.arange(64 * 64 * 3) % 251).to(torch.uint8).reshape(1, 64, 64, 3)
    with torch.inference_mode():
        prob_map = model(images)
    assert prob_map.mean().item() == pytest.approx(0.05109, abs=2e-3)
    assert prob_map.std().item() == pytest.approx(0.2086, rel=0.02)


def test_fields_that_a_checkpoint_lacks_get_their_defaults_and_unknown_ones_are_rejected(saved, tmp_path):
    path = tmp_path / "best.pt"
    content = {"format": 1, "config": {"backbone": "resnet34"}, "model": {}}
    torch.save(content, path)
    assert load_checkpoint(path)["config"] == Config(backbone="resnet34")
    torch.save(content | {"config": {"backbone": "resnet34", "of_tomorrow": 1}}, path)
    with pytest.raises(UserError, match=r"of_tomorrow.*update dbnet"):
        load_checkpoint(path)
