"""What training changes and a save keeps: with it, an interrupted run goes on as if nothing had happened."""

import copy
import json
import math
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from itertools import chain
from pathlib import Path
from types import FrameType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from dbnet import distributed
from dbnet.checkpoint import load_checkpoint, save_checkpoint
from dbnet.config import Config
from dbnet.device import pick_amp_dtype, random_state, restore_random_state
from dbnet.errors import UserError
from dbnet.files import check_writable, read_log, write_whole
from dbnet.loss import Losses
from dbnet.memory import BatchPlan
from dbnet.model import DBNet


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Add the row of an epoch. Raises UserError where it cannot be written."""
    try:
        with path.open("a", encoding="utf-8") as log:
            log.write(json.dumps(row) + "\n")
            log.flush()
            os.fsync(log.fileno())
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); make room, or mend the folder") from None


def keep_rows(path: Path, epochs: int) -> None:
    """Leave the rows of the first `epochs` epochs in a log: what a run wrote after its last save, it writes again."""
    rows = [row for row in read_log(path) if row["epoch"] <= epochs]
    with write_whole(path, "w") as log:
        log.writelines(json.dumps(row) + "\n" for row in rows)


_ECHO_SECONDS = 1.0  # torchrun passes on the Ctrl-C that its processes get from the terminal as well


class Interrupted(SystemExit):
    """The end that a signal asked for, with its customary exit status: 130 for SIGINT, 143 for SIGTERM."""


class Interruption:
    """While its block runs, SIGINT (Ctrl-C) and SIGTERM only set `signal`; a second SIGINT stops at once.

    Data workers that are forked meanwhile let both pass: they end with the process that they work for.
    """

    def __init__(self) -> None:
        self.signal = 0
        self._at_once = False
        self._noted = 0.0

    def __enter__(self) -> Self:
        self._process = os.getpid()
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def stop(self) -> None:
        """End the process as the signal asked for."""
        raise Interrupted(128 + self.signal)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Work that leaves nothing half done when it is cut short: a signal ends it without waiting for its end."""
        self._at_once = True
        try:
            if self.signal:
                self.stop()
            yield
        finally:
            self._at_once = False

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return
        echo = "TORCHELASTIC_RUN_ID" in os.environ and time.monotonic() - self._noted < _ECHO_SECONDS
        if self.signal and number == signal.SIGINT and not echo:
            raise KeyboardInterrupt
        self.signal, self._noted = self.signal or number, time.monotonic()
        if self._at_once:
            self.stop()


def let_workers_die_quietly() -> None:
    """Undo what a DataLoader sets up when it starts: that the death of a worker raises an error in whatever the main
    thread is doing. Without it the loader sees the death as well, where it waits for the next batch."""
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def make_optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    """Fused, because a fused step allocates nothing once its state exists: it cannot run out of memory half-way."""
    optimizer = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.optimizer]
    return optimizer(model.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True)


@torch.no_grad()
def allocate_state(optimizer: torch.optim.Optimizer) -> None:
    """Create the optimizer's state now, all zero, by a step that changes no weight; the first real one would do it when
    memory is at its fullest."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    for state in optimizer.state.values():
        for tensor in state.values():
            tensor.zero_()


def make_scaler(config: Config, device: torch.device) -> torch.amp.GradScaler:
    """Scale the loss for fp16. In other types the scale is 1 and what is left is the scaler's other service: to skip,
    on the device and without asking the host, a step whose gradients are not finite."""
    if pick_amp_dtype(config, device) == torch.float16:
        return torch.amp.GradScaler(device.type)
    return torch.amp.GradScaler(device.type, init_scale=1.0, growth_interval=2**31 - 1)


def learning_rate(config: Config, epoch: int, progress: float = 1.0) -> float:
    """The learning rate of an epoch, counted from 0, when `progress` (0..1) of it is done.

    The schedule goes by whole epochs; within the first config.warmup_epochs the rate rises to it in proportion.
    """
    if config.schedule == "step":
        rate = config.lr * config.step_gamma ** (epoch // config.step_epochs)
    else:
        rate = config.min_lr + (config.lr - config.min_lr) * (1 + math.cos(math.pi * epoch / config.epochs)) / 2
    return rate * min(1.0, (epoch + progress) / config.warmup_epochs) if config.warmup_epochs else rate


class WeightAverage:
    """Exponential moving average of a network's weights and batch norm statistics, on the network's device.

    In the first steps the decay is (1 + n) / (10 + n) at step n, so that the average leaves the initial weights soon.
    """

    def __init__(self, model: DBNet, decay: float) -> None:
        self.decay, self.steps = decay, 0
        self.model = copy.deepcopy(model).requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take the weights after an optimizer step into the average."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        pairs = list(zip(_tensors(self.model), _tensors(model), strict=True))
        averages, current = zip(*(pair for pair in pairs if pair[0].is_floating_point()), strict=True)
        get_ema_multi_avg_fn(decay)(averages, current, None)
        for average, counter in (pair for pair in pairs if not pair[0].is_floating_point()):
            average.copy_(counter)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values, for checkpoints."""
        return {"steps": self.steps, "model": self.model.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """What `state_dict` gave."""
        self.steps = state["steps"]
        self.model.load_state_dict(state["model"])


def _tensors(model: nn.Module) -> Iterator[torch.Tensor]:
    return chain(model.parameters(), model.buffers())


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
        self.random_states = distributed.all_gather(random_state(self.device))

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
        if len(state.get("random", [])) == distributed.world_size():
            restore_random_state(state["random"][distributed.rank()], device)
        if state.get("running"):
            changed = [name for name in _ORDER if getattr(before, name) != getattr(config, name)]
            if changed:
                flag = f"--{changed[0].replace('_', '-')}"
                distributed.print0(f"epoch {self.epoch + 1} begins again: its batches are others with the new {flag}")
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
