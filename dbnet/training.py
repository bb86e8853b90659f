"""A run: its folder, optimizer, schedule and average of weights, and all that a save keeps, so that an interrupted run
goes on as if it had not been."""

import copy
import json
import math
import os
import re
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from itertools import islice
from pathlib import Path
from shlex import quote
from types import FrameType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dbnet.checkpoint import load_checkpoint, save_checkpoint
from dbnet.config import Config
from dbnet.dataset import Batch, load_batches
from dbnet.device import all_gather, all_reduce, from_first, is_first, print0, rank, world_size
from dbnet.device import compile_model, peak_memory, pick_amp_dtype
from dbnet.errors import UserError, is_out_of_memory, library_errors, typed
from dbnet.files import check_writable, locked, read_log, remove_leftovers, write_json, write_whole
from dbnet.loss import Losses
from dbnet.memory import BatchPlan, free_memory
from dbnet.model import BATCH_NORM_MOMENTUM, DBNet
from dbnet.splits import find_loss

RUNS = Path("runs")
_RUN_NAME = re.compile(r'(?!(?i:con|prn|aux|nul|com\d|lpt\d)(\.|$))[^\x00-\x1f/\\:*?"<>|]{1,80}(?<![. ])')
NON_FINITE_LIMIT = 5  # steps in a row without finite loss and gradients; then training stops
FP16_HALVINGS = 16  # of the loss scale, from 2**16 to 1: so many steps in a row may be lost to find it
ADAM_MOMENTS = ("exp_avg", "exp_avg_sq")
_BEFORE = "last.prev.pt"  # the save before last.pt
_ECHO_SECONDS = 1.0  # torchrun passes on the Ctrl-C that its processes get from the terminal as well


def run_folder(name: str) -> Path:
    """The folder of a run. Raises UserError for a name that is not that of a folder in runs/, on any system."""
    if not _RUN_NAME.fullmatch(name):
        raise UserError(f"--run {name}: takes a plain folder name that any system allows, such as first for runs/first")
    return RUNS / name


def new_run(name: str | None, preset: str | None) -> Path:
    """The folder of a new run. Raises UserError where it is there already, and as `run_folder` does."""
    run = run_folder(f"{preset or 'v1'}-{datetime.now():%Y%m%d-%H%M%S}" if name is None else name)
    if run.exists():
        raise UserError(f"{run}: exists; go on with it by --run {quote(run.name)} --resume, or name another with --run")
    return run


def find_run(name: str | None) -> tuple[Path, dict[str, Any] | None]:
    """The folder of the run to resume and its last save; without a name, the newest run. A named run that has no save
    yet starts anew, with None: so the same command serves for each start of a job."""
    run = None if name is None else run_folder(name)
    saves = [*(run.glob("last*.pt") if run else RUNS.glob("*/last*.pt"))]
    if not (run or saves):
        raise UserError("runs/: holds no last.pt to resume; leave out --resume to start a run")
    if run and not saves and (run / "best.pt").exists():
        raise UserError(f"{run}: has a best.pt, but no last.pt to resume; name another --run with --init {run}/best.pt")
    run = run or max(saves, key=lambda path: path.stat().st_mtime).parent
    if not saves:
        print(f"{run}: nothing is saved yet, so this starts anew", file=sys.stderr)
    return run, load_last(run) if saves else None


@contextmanager
def lock_run(run: Path) -> Iterator[None]:
    """Let only one process train in a run's folder. When its block ends early, print how to go on. Raises UserError
    where another process trains there."""
    with ExitStack() as held:
        from_first(lambda: held.enter_context(locked(run / ".lock", f"{run}: is being trained")))
        try:
            yield
        except (UserError, SystemExit, KeyboardInterrupt):
            if (run / "last.pt").exists():
                resume = f"{typed('train', world_size())} --run {quote(run.name)} --resume"
                print0(f"\ngo on from the last save with: {resume}", flush=True)
            raise


def prepare_folder(run: Path, config: Config) -> None:
    """Make the folder of a run ready for its epochs."""
    run.mkdir(parents=True, exist_ok=True)
    remove_leftovers(run)
    write_json(run / "config.json", config.to_dict())


def log_row(path: Path, row: dict[str, Any]) -> None:
    """Add the row of an epoch to a log; rows of this and later epochs, from before the run was resumed, go."""
    rows = [each for each in read_log(path) if each["epoch"] < row["epoch"]]
    with write_whole(path, "w") as log:
        log.writelines(json.dumps(each) + "\n" for each in [*rows, row])


def step_batches(loader: Iterable[Batch], accumulate: int) -> Iterator[tuple[list[Batch], str]]:
    """The batches of each optimizer step, `accumulate` at a time (the last step may have fewer), and an empty text.
    After the end come empty lists, without end: a process whose batches have ended goes on while others have samples.
    Where the data workers have failed, the text says so."""
    batches = load_batches(loader)
    while True:
        try:
            yield list(islice(batches, accumulate)), ""
        except UserError as error:
            yield [], str(error)


def accumulation(config: Config) -> int:
    """Micro-batches of one optimizer step in each process. Raises UserError where they cannot make up the batch."""
    if not config.effective_batch:
        return config.accumulate
    accumulate, rest = divmod(config.effective_batch, config.batch_size * world_size())
    if rest:
        flag, together = f"--effective-batch {config.effective_batch}", f"{config.batch_size} x {world_size()}"
        raise UserError(f"{flag}: is no multiple of batch {together} processes; change --batch-size")
    return accumulate


def make_optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    """Fused, its state made before memory is full: so a step allocates nothing and cannot end half-way."""
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.optimizer]
    optimizer = kind(model.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True)
    for each in model.parameters():
        moments = {name: torch.zeros_like(each) for name in ADAM_MOMENTS}
        optimizer.state[each] = {"step": torch.zeros((), device=each.device), **moments}
    return optimizer


def make_scaler(config: Config, device: torch.device) -> torch.amp.GradScaler:
    """Scale the loss for fp16. In other types the scale stays 1 (train.optimizer_step), and the scaler does the rest of
    its work: it skips a step whose gradients are not finite, on the device and without asking the host."""
    scale = 2.0**FP16_HALVINGS if pick_amp_dtype(config, device) == torch.float16 else 1.0
    scaler = torch.amp.GradScaler(device.type, init_scale=scale)
    scaler.scale(torch.zeros(1, device=device))  # creates the scale on the device
    return scaler


def learning_rate(config: Config, epoch: int, progress: float = 1.0) -> float:
    """The learning rate of an epoch, counted from 0, when `progress` (0..1) of it is done; only warm-up goes by it."""
    if config.schedule == "step":
        rate = config.lr * config.step_gamma ** (epoch // config.step_epochs)
    else:
        rate = config.min_lr + (config.lr - config.min_lr) * (1 + math.cos(math.pi * epoch / config.epochs)) / 2
    return rate * min(1.0, (epoch + progress) / config.warmup_epochs) if config.warmup_epochs else rate


def seed_all(config: Config) -> None:
    """Seed the random numbers of PyTorch (samples have seeds of their own), and obey config.deterministic."""
    torch.manual_seed(config.seed)
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when the GPU is first used
        torch.backends.cudnn.benchmark = False
        torch.use_deterministic_algorithms(True)


def random_state(device: torch.device) -> dict[str, Any]:
    """State of PyTorch's random numbers, on the CPU and on the device."""
    is_gpu = device.type == "cuda"
    return {"torch": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state(device) if is_gpu else None}


def restore_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Go back to what `random_state` gave."""
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)


class WeightAverage:
    """Exponential moving average of a network's weights and batch norm statistics, on the network's device. In the
    first steps the decay is (1 + n) / (10 + n) at step n, so that the average leaves the initial weights soon. torch's
    AveragedModel asks the device for its count at each step, which would wait for the GPU."""

    def __init__(self, model: DBNet, decay: float) -> None:
        self.decay, self.steps = decay, 0
        self.model = copy.deepcopy(model).requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take the weights after an optimizer step into the average."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        ours, theirs = ([*each.parameters(), *each.buffers()] for each in (self.model, model))
        averages, current = ([each for each in some if each.is_floating_point()] for some in (ours, theirs))
        torch._foreach_lerp_(averages, current, 1 - decay)
        for average, count in zip(ours, theirs, strict=True):
            if not average.is_floating_point():
                average.copy_(count)

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "model": self.model.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]
        self.model.load_state_dict(state["model"])


class NothingTwice(TorchDispatchMode):
    """Within its block, an operation that runs out of memory is tried once more after unused memory was returned. It
    is for what must not run again from its beginning: the update of the weights. Raises UserError if that fails too."""

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for _ in range(2):
            try:
                return operation(*args, **(kwargs or {}))
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            free_memory()
        raise UserError("out of memory while the weights were updated; lower --batch-size and go on with --resume")


@dataclass
class RunningEpoch:
    """Progress of an epoch, over all processes, and its sums for the log. The tensors are on the device."""

    image_size: int  # at which its samples are loaded; after a fallback they run smaller
    batches: int = 0
    images: int = 0
    seconds: float = 0.0
    lr: float = 0.0  # of the last step
    losses: Tensor = field(default_factory=lambda: torch.zeros(len(Losses._fields)))  # sums over steps of finite loss
    steps: Tensor = field(default_factory=lambda: torch.zeros(()))  # number of those steps
    skipped: Tensor = field(default_factory=lambda: torch.zeros(()))  # steps whose gradient was not finite
    non_finite_streak: Tensor = field(default_factory=lambda: torch.zeros(()))  # last steps in a row that were not

    def to(self, device: torch.device) -> Self:
        moved: dict[str, Any] = {name: x.to(device) for name, x in vars(self).items() if isinstance(x, Tensor)}
        return replace(self, **moved)

    def note(self, losses: Tensor, gradient_norm: Tensor) -> None:
        """Add the losses of a step, on the device: no step waits for the one before."""
        with NothingTwice():
            finite, stepped = losses[0].isfinite(), gradient_norm.isfinite()
            self.losses = self.losses + torch.where(finite, losses, 0)
            self.steps = self.steps + finite
            self.skipped = self.skipped + ~stepped
            self.non_finite_streak = torch.where(finite & stepped, 0, self.non_finite_streak + 1)


class Training:
    """What an optimizer step changes, and the progress of the run: with the configuration, all of `last.pt`."""

    def __init__(self, model: DBNet, config: Config, device: torch.device, plan: BatchPlan | None = None) -> None:
        model.to(device).to(memory_format=torch.channels_last).train()
        if config.compile:
            compile_model(model)
        self.model, self.device = model, next(model.parameters()).device
        self.average = WeightAverage(model, config.ema) if config.ema else None
        self.optimizer, self.scaler = make_optimizer(model, config), make_scaler(config, device)
        self.plan = plan or BatchPlan(config.batch_size, accumulation(config), config.image_size)
        self.epoch = 0  # number of epochs that are finished
        self.running: RunningEpoch | None = None  # the epoch after those, once it has begun
        self.best_hmean, self.best_epoch = -1.0, 0
        self.streak = 0  # steps without finite loss and gradients in a row, over the ends of epochs
        self.unreadable: set[str] = set()  # a line for each image, since the start of the process
        self._norms = [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]
        self._buffers_before = [torch.empty_like(buffer) for buffer in model.buffers()]
        self._statistics = [buffer for name, buffer in model.named_buffers() if "running_" in name]
        summed = sum(each.numel() for each in [*model.parameters(), *self._statistics]) + len(Losses._fields)
        self._flat = torch.zeros(summed if world_size() > 1 else 0, device=device)
        all_reduce(self._flat)  # NCCL allocates at its first sum; once the processes have agreed on a step, it must not

    @property
    def scored_model(self) -> DBNet:
        """The network that is validated and kept in best.pt."""
        return self.average.model if self.average else self.model

    def is_stuck(self, config: Config) -> bool:
        return 0 < config.patience <= self.epoch - self.best_epoch

    def begin_epoch(self, config: Config) -> RunningEpoch:
        """Make the network and the device ready for an epoch, or for the rest of the running one."""
        image_size, streak = self.plan.image_size or config.image_size, torch.tensor(float(self.streak))
        self.running = self.running or RunningEpoch(image_size, non_finite_streak=streak).to(self.device)
        self.model.train()
        if config.freeze_batch_norm:
            for layer in self._norms:
                layer.eval()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            # Shapes that hardly ever come again would each be measured anew.
            torch.backends.cudnn.benchmark = config.pad == "square" and not config.deterministic
        return self.running

    def count_step(self, batches: list[Batch], config: Config, death: str, saver: "LastSave | None") -> tuple[int, int]:
        """How many batches and readable images an optimizer step has in all processes, each of which calls this. Notes
        what could not be read. Saves where that is due or the run has to end: none of the samples has been used. Raises
        UserError for the `death` of a data worker, a lost data folder, and with config.strict an unreadable image."""
        errors = [error for batch in batches for _, error in batch["failed"]]
        self.unreadable.update(errors)
        stop = errors[0] if errors and config.strict else death
        stop = (errors and find_loss(config.data)) or stop
        ours = [len(batches), sum(len(batch.get("image", ())) for batch in batches), bool(stop)]
        ours += [bool(saver.signal), saver.is_due()] if saver else [False, False]
        count, images, stops, signals, saves_due = map(sum, zip(*all_gather(ours), strict=True))
        if saver and (stops or signals or saves_due):
            saver.save(self)
        if stops:
            reason = stop or "another process has stopped and says why"
            raise UserError(f"{reason}; remove the cause and go on with --resume")
        if saver and signals:
            saver.stop()
        return count, images

    def stop_unless_finite(self, config: Config) -> None:
        """Raise UserError after too many steps in a row without finite loss and gradients. Waits for the device."""
        assert self.running
        self.streak = streak = int(self.running.non_finite_streak)
        is_fp16 = pick_amp_dtype(config, self.device) == torch.float16
        if streak >= NON_FINITE_LIMIT + (FP16_HALVINGS if is_fp16 else 0):
            steps = f"{streak} steps in a row in epoch {self.epoch + 1}"
            raise UserError(f"loss or gradients were not finite for {steps}; lower --lr, or try --amp off")

    def finish_epoch(self, config: Config) -> dict[str, Any]:
        """The row of the log for the running epoch, whose batches are done, without the validation. Raises UserError
        where there was nothing to learn."""
        running = self.running
        assert running
        self.unreadable.update(*all_gather(self.unreadable))
        if not running.images:
            raise UserError(f"{config.data}: none of the training images can be read; {min(self.unreadable)}")
        means = (running.losses / running.steps.clamp(min=1)).tolist()
        if self.epoch == 0 and running.steps and not means[1]:  # the cross entropy without a single pixel of text
            where = "masked, too small at --image-size, in unreadable images, or in a folder of a low --data-weights"
            raise UserError(f"{config.data}: nothing to learn in epoch 1: all text is {where}; look at --show-samples")
        return {
            "epoch": self.epoch + 1,
            "lr": running.lr,
            **{f"{name}_loss": mean for name, mean in zip(Losses._fields, means, strict=True)},
            "train_seconds": running.seconds,
            "images_per_second": running.images / running.seconds,
            "peak_memory_gb": peak_memory(self.device),
            "skipped_steps": int(running.skipped),
            "unreadable_images": len(self.unreadable),
        }

    def describe(self, config: Config) -> str:
        processes = f" x {world_size()} processes" if world_size() > 1 else ""
        done = f", {self.running.images} images of it done" if self.running else ""
        epochs = f"epochs {self.epoch + 1}{done} to {config.epochs}"
        if self.epoch >= config.epochs:
            epochs = f"all {config.epochs} epochs done; train longer with --epochs"
        return f"{config.backbone}, {self.plan.image_size} px, batch {self.plan.in_force}{processes}, {epochs}"

    def print_end(self, config: Config, run: Path) -> None:
        for line in sorted(self.unreadable):
            print0(f"left out: {line}")
        if self.is_stuck(config):
            print0(f"no better H-Mean in {config.patience} epochs: stopped early")
        if self.best_hmean > 0:
            following = f"{typed('predict')} {quote(str(run / 'best.pt'))} --out submission.csv"
            print0(f"best H-Mean {self.best_hmean:.4f} in epoch {self.best_epoch}. Next: {following}")
        else:
            print0("no epoch has found any text; look at --show-samples, train longer, or lower --lr")

    def note_start(self) -> None:
        with NothingTwice(), torch.no_grad():
            torch._foreach_copy_(self._buffers_before, list(self.model.buffers()))
            self._random_before = random_state(self.device)
        self._set_momentum()

    def restore_start(self) -> None:
        """Go back to where `note_start` was called, without the gradients since, for the plan that is in force now."""
        self.optimizer.zero_grad(set_to_none=True)
        free_memory()
        with torch.no_grad():
            torch._foreach_copy_(list(self.model.buffers()), self._buffers_before)
        restore_random_state(self._random_before, self.device)
        self._set_momentum()

    def _set_momentum(self) -> None:
        """However many micro-batches a fallback makes of a step, they move the batch norm statistics as far."""
        share = self.plan.micro_batch / self.plan.batch_size
        momentum = BATCH_NORM_MOMENTUM if share == 1 else 1 - (1 - BATCH_NORM_MOMENTUM) ** share
        for layer in self._norms:
            layer.momentum = momentum

    @torch.no_grad()
    def keep_statistics(self, finite: Tensor) -> None:
        """Go back to the batch norm statistics of `note_start` where `finite`, a bool on the device, is false."""
        for buffer, before in zip(self.model.buffers(), self._buffers_before, strict=True):
            torch.where(finite, buffer, before, out=buffer)

    @torch.no_grad()
    def sum_over_processes(self, losses: Tensor, share: float) -> None:
        """Replace losses, gradients and batch norm statistics by their sums over the processes, in one collective call.
        The statistics are weighted by `share`, this process's part of the samples: their sum is the mean."""
        if world_size() == 1:
            return
        torch._foreach_mul_(self._statistics, share)
        for parameter in self.model.parameters():
            if parameter.grad is None:  # a process without samples
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        parts = [losses, *gradients, *self._statistics]
        pieces = self._flat.split([part.numel() for part in parts])
        views = [piece.view(part.shape) for piece, part in zip(pieces, parts, strict=True)]
        torch._foreach_copy_(views, parts)
        all_reduce(self._flat)
        torch._foreach_copy_(parts, views)

    def state(self) -> dict[str, Any]:
        """Tensors and plain values for a save, with the random states of all processes, each of which calls this."""
        return {
            "average": self.average.state_dict() if self.average else None,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "plan": asdict(self.plan),
            **{name: getattr(self, name) for name in ("epoch", "best_hmean", "best_epoch", "streak")},
            "running": dict(vars(self.running)) if self.running else None,
            "random": all_gather(random_state(self.device)),
        }

    def load_state(self, state: dict[str, Any], config: Config, path: Path = Path("last.pt")) -> None:
        """Go on from what `state` gave, the content of `path`; where the configurations differ, `config` holds. A
        running epoch begins again where its batches have changed. Raises UserError where it is no state of a run."""
        changed = [name for name in _ORDER if getattr(state["config"], name) != getattr(config, name)]
        what = f"{path}: holds no state of a run (a copy of best.pt, or of the first version?)"
        with library_errors(what, "start a new run from its weights with --init"):
            # The optimizer's own settings (weight decay, say) are those of the configuration, not of the save.
            settings = self.optimizer.state_dict()["param_groups"]
            self.optimizer.load_state_dict(state["optimizer"] | {"param_groups": settings})
            if pick_amp_dtype(state["config"], self.device) == pick_amp_dtype(config, self.device):
                self.scaler.load_state_dict(state["scaler"])
            if self.average and state["average"]:
                self.average.load_state_dict(state["average"])
            if not {"batch_size", "image_size"} & set(changed):
                self.plan = BatchPlan(**state["plan"] | {"accumulate": self.plan.accumulate})
            self.epoch, self.best_hmean, self.best_epoch = state["epoch"], state["best_hmean"], state["best_epoch"]
            self.streak = state.get("streak", 0)  # which older saves lack
            moments = [(each, kept[name]) for each, kept in self.optimizer.state.items() for name in ADAM_MOMENTS]
            is_whole = all(each.shape == moment.shape and moment.isfinite().all() for each, moment in moments)
            counts = self.epoch, self.best_epoch, self.streak, self.plan.halvings, self.plan.batch_size
            if not (is_whole and math.isfinite(self.best_hmean) and all(type(n) is int and n >= 0 for n in counts)):
                raise ValueError("its values are damaged")
            if len(state["random"]) == world_size():
                restore_random_state(state["random"][rank()], self.device)
            if state["running"] and changed:
                print0(f"epoch {self.epoch + 1} begins again: --{changed[0].replace('_', '-')} has changed its batches")
            elif state["running"]:
                known = {name: state["running"][name] for name in vars(RunningEpoch(0)) if name in state["running"]}
                self.running = RunningEpoch(**known).to(self.device)


_ORDER = ("data", "data_weights", "batch_size", "image_size", "pad", "seed")  # fields that decide an epoch's batches


class LastSave:
    """last.pt of a run and, until it is whole, the save before it; when to write it, and when to end with it. Within
    its block, SIGINT (Ctrl-C), SIGTERM and SIGHUP (the terminal is closed) only set `signal`; a second SIGINT stops at
    once. Data workers that are forked meanwhile ignore them: they end with the process that they work for."""

    def __init__(self, run: Path, config: Config) -> None:
        self.path, self.config = run / "last.pt", config
        self._saved = time.monotonic()  # unaffected by clock changes
        self.signal, self._noted = 0, 0.0
        self._process, self._stops_at_once = os.getpid(), False

    def __enter__(self) -> Self:
        handled = [signal.SIGINT, signal.SIGTERM]
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup ignores it
            handled.append(signal.SIGHUP)
        self._before = {number: signal.signal(number, self._note) for number in handled}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return
        echo = "TORCHELASTIC_RUN_ID" in os.environ and time.monotonic() - self._noted < _ECHO_SECONDS
        if self.signal and number == signal.SIGINT and not echo:
            raise KeyboardInterrupt
        self.signal, self._noted = self.signal or number, time.monotonic()
        if self._stops_at_once:
            self.stop()

    def stop(self) -> None:
        """End the program as the signal asks: with 128 and its number as exit status."""
        raise SystemExit(128 + self.signal)

    def is_due(self) -> bool:
        """Whether config.save_minutes have passed; only the first process counts them."""
        return is_first() and 0 < self.config.save_minutes * 60 <= time.monotonic() - self._saved

    def save(self, training: Training) -> None:
        """Save the run as it is; all processes call it, the first one writes."""
        state = training.state()
        if is_first():
            save_checkpoint(self.path, self.config, training.model, keep=self.path.with_name(_BEFORE), **state)
        self._saved = time.monotonic()

    @contextmanager
    def validation(self) -> Iterator[None]:
        """In this block a signal ends the run at once: what comes before is saved, and nothing is left half done."""
        self._stops_at_once = True
        try:
            if self.signal:
                self.stop()
            yield
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error):
                raise UserError("out of memory in the validation; lower --image-size, --resume") from None
            raise
        finally:
            self._stops_at_once = False


def load_last(run: Path) -> dict[str, Any]:
    """The last whole save of a run; where a later one is damaged, that is printed."""
    path, before = run / "last.pt", run / _BEFORE
    try:
        return load_checkpoint(path)
    except UserError as error:
        if not before.exists():
            raise
        try:
            content = load_checkpoint(before)
        except UserError:
            raise UserError(f"{path}: damaged, as {before.name}; start another --run: --init {run}/best.pt") from None
        print(f"{error}; going on from the save before it")
    check_writable(path)
    before.replace(path)  # or the next save would keep the damaged one in its place
    return content
