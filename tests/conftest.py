"""What several tests share: the real receipts where they are at hand, and a small data set that is rendered."""

from pathlib import Path

import pytest
import torch
from hypothesis import settings

from dbnet.config import Config
from dbnet.device import pick_device
from dbnet.synth.scene import write_dataset

settings.register_profile("short", deadline=None)  # no test depends on the speed of the machine
settings.register_profile("long", max_examples=1500, deadline=None)  # make test-long; the default is a hundred
settings.load_profile("short")

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def receipts() -> Path:
    """The real receipts in the layout of the README."""
    folder = SHARED / "data" / "sroie"
    if not folder.is_dir():
        pytest.skip("the real receipts (../shared/data/sroie) are not here")
    return folder


@pytest.fixture(scope="session")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six training, two validation and two test receipts of 192 px. Tests copy it before they change anything."""
    folder = tmp_path_factory.mktemp("rendered") / "data"
    write_dataset(folder, train=6, val=2, test=2, size=192, seed=3, workers=1)
    return folder


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Each device in turn, for what a GPU must do as well (`pytest -k cuda`); its results are made exact."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    if request.param == "cuda":
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
        monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
        torch.use_deterministic_algorithms(True)
        request.addfinalizer(lambda: torch.use_deterministic_algorithms(False))
    return pick_device(request.param)


@pytest.fixture
def small(rendered: Path) -> Config:
    """A network and images small enough for a step in a fraction of a second."""
    return Config.from_preset(
        "demo",
        data=str(rendered),
        weights="none",
        image_size=128,
        pad="square",
        batch_size=4,
        accumulate=1,
        workers=0,
        epochs=1,
        lr=1e-3,
        flip_p=0.5,
        box_thresh=0.25,
    )
