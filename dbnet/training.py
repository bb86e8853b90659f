"""What training changes and a save keeps: with it, an interrupted run goes on as if nothing had happened."""

import time
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from dbnet import distributed
from dbnet.checkpoint import load_checkpoint, save_checkpoint
from dbnet.config import Config
from dbnet.device import random_state, restore_random_state
from dbnet.errors import UserError
from dbnet.files import check_writable
from dbnet.loss import Losses
from dbnet.memory import BatchPlan
from dbnet.model import DBNet
from dbnet.optim import WeightAverage


@dataclass
class RunningEpoch:
    """How far an epoch is, over all ranks, and its sums for the log. The tensors are on the device."""

    image_size: int
    """that its samples are loaded at; after a fallback they run smaller"""

    batches: int = 0
    """of the epoch's order that are done"""

    images: int = 0
    failed: int = 0
    """images that could not be read"""

    dropped: int = 0
    """degenerate polygons left out"""

    seconds: float = 0.0
    losses: Tensor = field(default_factory=lambda: torch.zeros(len(Losses._fields)))
    """sums over the steps whose loss was finite"""

    steps: Tensor = field(default_factory=lambda: torch.zeros(()))
    """how many those were"""

    skipped: Tensor = field(default_factory=lambda: torch.zeros(()))
    """steps whose gradient was not finite"""

    non_finite_streak: Tensor = field(default_factory=lambda: torch.zeros(()))
    """steps in a row, the last ones, whose loss was not finite"""

    row: dict[str, Any] | None = None
    """what the training half of the epoch came to, once it is done"""

    def to(self, device: torch.device) -> Self:
        """Bring the tensors to the device."""
        for name in ("losses", "steps", "skipped", "non_finite_streak"):
            setattr(self, name, getattr(self, name).to(device))
        return self

    def to_dict(self) -> dict[str, Any]:
        """Tensors and plain values, for checkpoints."""
        return {each.name: getattr(self, each.name) for each in fields(self)}


@dataclass
class Training:
    """What an optimizer step changes, and how far the run is: together with the configuration, all of `last.pt`."""

    model: DBNet
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    plan: BatchPlan
    average: WeightAverage | None = None
    """of the weights, where config.ema asks for it"""
    epoch: int = 0
    """epochs finished"""
    best_hmean: float = -1.0
    best_epoch: int = 0
    running: RunningEpoch | None = None
    """the epoch after those, once it has begun"""
    random_states: list[dict[str, Any]] = field(default_factory=list)
    """of each rank, as of the last call of `note_random_states`"""

    @property
    def scored_model(self) -> DBNet:
        """The network that is validated and kept in best.pt."""
        return self.average.model if self.average else self.model

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.model.parameters()).device

    def note_random_states(self) -> None:
        """Take down where the random numbers of all ranks are; every rank calls it."""
        self.random_states = distributed.gather(random_state(self.device))

    def state(self) -> dict[str, Any]:
        """Tensors and plain values, for checkpoints."""
        return {
            "average": self.average.state_dict() if self.average else None,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "plan": self.plan.to_dict(),
            "epoch": self.epoch,
            "best_hmean": self.best_hmean,
            "best_epoch": self.best_epoch,
            "running": self.running.to_dict() if self.running else None,
            "random": self.random_states,
        }

    def load_state(self, state: dict[str, Any], config: Config) -> None:
        """Go on from what `state` gave, in a save of another configuration perhaps: what `config` says holds.

        A running epoch begins again where its batches have become others.
        """
        device, before = self.device, state["config"]
        # The optimizer's own settings (weight decay, say) are those of the configuration, not of the save.
        settings = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict(state["optimizer"] | {"param_groups": settings})
        # A scale found for fp16 is wrong for other types, and theirs for fp16.
        if state["scaler"].get("growth_interval") == self.scaler.get_growth_interval():
            self.scaler.load_state_dict(state["scaler"])
        if self.average and state.get("average"):
            self.average.load_state_dict(state["average"])
        if (before.batch_size, before.image_size) == (config.batch_size, config.image_size):
            self.plan = BatchPlan.from_dict(state["plan"] | {"accumulate": self.plan.accumulate})
        self.epoch, self.best_hmean, self.best_epoch = state["epoch"], state["best_hmean"], state["best_epoch"]
        if len(state.get("random", [])) == distributed.ranks():
            restore_random_state(state["random"][distributed.rank()], device)
        if state.get("running"):
            changed = [name for name in _ORDER if getattr(before, name) != getattr(config, name)]
            if changed:
                flag = f"--{changed[0].replace('_', '-')}"
                distributed.say(f"epoch {self.epoch + 1} begins again: its batches are others with the new {flag}")
            else:
                self.running = RunningEpoch(**state["running"]).to(device)


_ORDER = ("data", "batch_size", "image_size", "pad", "seed")  # what the batches of an epoch follow from


class LastSave:
    """last.pt of a run and, until it is whole, the save before it."""

    def __init__(self, run: Path, config: Config) -> None:
        self.path, self.config = run / "last.pt", config
        self._saved = time.monotonic()  # a clock that nobody sets

    def is_due(self) -> bool:
        """Whether config.save_minutes have passed; it counts in the first process alone."""
        return distributed.is_first() and 0 < self.config.save_minutes * 60 <= time.monotonic() - self._saved

    def save(self, training: Training) -> None:
        """Save the run as it is; every rank calls it."""
        training.note_random_states()
        self.write(training)

    def write(self, training: Training) -> None:
        """Save the run with the random states that were noted last. Only the first process writes."""
        if distributed.is_first():
            save_checkpoint(self.path, self.config, training.model, keep=save_before(self.path), **training.state())
        self._saved = time.monotonic()


def save_before(path: Path) -> Path:
    """Where the save before `path` is."""
    return path.with_name(f"{path.stem}.prev{path.suffix}")


def load_last(run: Path) -> dict[str, Any]:
    """The last save of a run that is whole. If it is not the last that was written, that is said."""
    path, before = run / "last.pt", save_before(run / "last.pt")
    try:
        return load_checkpoint(path)
    except UserError as error:
        if not before.exists():
            raise
        content = load_checkpoint(before)
        print(f"{error}; going on from the save before it")
    check_writable(path)
    before.replace(path)  # or the next save would keep the damaged one in its place
    return content
