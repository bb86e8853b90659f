"""Train a text detector.

    python train.py --preset v1                                one GPU and a night
    python train.py --preset lite --weights none               a CPU and an afternoon
    python train.py --run first --resume                       go on with runs/first
    python train.py --preset v1 --init runs/first/best.pt      start from trained weights
    python train.py --preset v1 --show-samples samples.png     look at augmented samples, and exit
    python train.py --preset v1 --profile                      measure memory and speed on this device, and exit

A run writes runs/NAME/: config.json, best.pt (by validation H-Mean), last.pt (all that resuming needs), log.jsonl
(a line an epoch), curves.png, and events for `tensorboard --logdir runs` after `pip install tensorboard`.
"""

import argparse
import json
import math
import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader
from tqdm import tqdm

from dbnet.checkpoint import load_checkpoint, load_weights, save_checkpoint, start_from
from dbnet.config import PRESETS, ArgumentParser, Config, print_config, print_difference
from dbnet.curves import show_progress
from dbnet.dataset import Batches, TextDataset, count_workers, make_loader
from dbnet.device import compile_model, pick_amp_dtype, pick_device
from dbnet.ensemble import Ensemble
from dbnet.errors import UserError, run_script
from dbnet.evaluation import Evaluation
from dbnet.files import make_folder, write_json
from dbnet.geometry import padded
from dbnet.inference import Pipeline
from dbnet.loss import Losses, db_loss
from dbnet.memory import BatchPlan, run_until_it_fits
from dbnet.model import DBNet
from dbnet.optim import WeightAverage, learning_rate, make_optimizer, make_scaler
from dbnet.overlay import sample_sheet, write_image
from dbnet.profile import print_profile

RUNS = Path("runs")
NON_FINITE_LIMIT = 5  # steps in a row whose loss is not finite; then training stops
READING_INTERVAL = 1.0  # seconds between two looks at the losses, each of which waits for the device


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

    @property
    def scored_model(self) -> DBNet:
        """The network that is validated and kept in best.pt."""
        return self.average.model if self.average else self.model

    def state(self) -> dict[str, Any]:
        return {
            "average": self.average.state_dict() if self.average else None,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "plan": self.plan.to_dict(),
            "epoch": self.epoch,
            "best_hmean": self.best_hmean,
            "best_epoch": self.best_epoch,
            "torch_rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }

    def load_state(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        if self.average and state.get("average"):
            self.average.load_state_dict(state["average"])
        plan = BatchPlan.from_dict(state["plan"])
        if (plan.batch_size, plan.accumulate) == (self.plan.batch_size, self.plan.accumulate):
            self.plan = plan  # else the user asks for another batch, to start from afresh
        self.epoch, self.best_hmean, self.best_epoch = state["epoch"], state["best_hmean"], state["best_epoch"]
        torch.set_rng_state(state["torch_rng"])
        if len(state["cuda_rng"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(state["cuda_rng"])


def main() -> None:
    parser = ArgumentParser(__doc__)
    parser.add_argument("--preset", default="v1", help=f"configuration to start from: {', '.join(PRESETS)} (v1)")
    parser.add_argument("--run", metavar="NAME", help="folder of the run under runs/ (preset and time)")
    parser.add_argument("--resume", action="store_true", help="go on with the run; without --run, the newest one")
    parser.add_argument("--init", type=Path, metavar="CKPT", help="start from the weights of this checkpoint")
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration as JSON and exit")
    parser.add_argument("--diff", metavar="PRESET", help="print what differs from this preset and exit")
    parser.add_argument("--show-samples", type=Path, metavar="FILE.png", help="picture some training samples and exit")
    parser.add_argument("--profile", action="store_true", help="measure memory and speed on this device and exit")
    parser.add_config_flags()
    args, changes = parser.parse()
    config = Config.from_preset(args.preset, **changes)
    if args.diff:
        print_difference(config, args.diff, Config.from_preset(args.diff))
    elif args.print_config:
        print_config(config)
    elif args.show_samples:
        write_image(args.show_samples, sample_sheet(TextDataset(config, "train", train=True)))
        print(f"{args.show_samples}: image with polygons, probability map, threshold map")
    elif args.profile:
        print_profile(args.preset, config, start, optimizer_step)
    else:
        run = find_run(args) if args.resume else name_run(args)
        last = load_checkpoint(run / "last.pt") if args.resume else None
        try:
            train(last["config"].changed(**changes) if last else config, run, args.init, last)
        except KeyboardInterrupt:
            if (run / "last.pt").exists():
                print(f"\nfinished epochs are kept; go on with: python train.py --run {run.name} --resume")
            raise


def name_run(args: argparse.Namespace) -> Path:
    """The folder of a new run."""
    run = RUNS / (args.run or f"{args.preset}-{datetime.now():%Y%m%d-%H%M%S}")
    if run.exists():
        raise UserError(f"{run}: exists; go on with it by --run {run.name} --resume, or name another with --run")
    return run


def find_run(args: argparse.Namespace) -> Path:
    """The folder of the run to resume."""
    if args.init:
        raise UserError("--init starts a new run; leave it out with --resume")
    if args.run:
        if not (RUNS / args.run / "last.pt").exists():
            raise UserError(f"{RUNS / args.run}: holds no last.pt to resume; leave out --resume to start it")
        return RUNS / args.run
    found = sorted(RUNS.glob("*/last.pt"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise UserError("runs/: holds no last.pt to resume; leave out --resume to start a run")
    return found[-1].parent


def train(config: Config, run: Path, init: Path | None = None, last: dict[str, Any] | None = None) -> None:
    """Train in the folder `run`: from scratch, from the weights of `init`, or on from the content of last.pt."""
    device = pick_device(config.device)
    torch.manual_seed(config.seed)
    train_set = TextDataset(config, "train", train=True)
    val_set = TextDataset(config, "val", train=False)

    start = last or (load_checkpoint(init) if init else None)
    has_backbone = last or (start and start["config"].backbone == config.backbone)
    model = DBNet(config.changed(weights="none") if has_backbone else config)
    if last:
        load_weights(model, last, run / "last.pt", config)
    elif start:
        start_from(model, start, init)
    model.to(device, memory_format=torch.channels_last)
    if config.compile:
        compile_model(model)
    training = Training(
        model,
        make_optimizer(model, config),
        make_scaler(config, device),
        BatchPlan(config.batch_size, config.accumulate, config.image_size),
        WeightAverage(model, config.ema) if config.ema else None,
    )
    if last:
        training.load_state(last)
    make_folder(run)
    write_json(run / "config.json", config.to_dict())
    print(
        f"{run}: {len(train_set)} training and {len(val_set)} validation images on {device}, {config.backbone}, "
        f"{training.plan.image_size} px, batch {training.plan.in_force}, epochs {training.epoch + 1} to {config.epochs}"
    )
    unreadable: set[str] = set()
    loader = validation = None
    while training.epoch < config.epochs:
        in_force = config.changed(image_size=training.plan.image_size)
        if loader is None or train_set.config != in_force:
            train_set.config = in_force
            batches = Batches(train_set, config.batch_size, config.seed, config.accumulate)
            loader = make_loader(batches, count_workers(config), device.type == "cuda")
        batches.epoch = training.epoch
        row = train_epoch(training, loader, in_force, device, unreadable)
        in_force = config.changed(image_size=training.plan.image_size)  # memory may have run out since
        if validation is None or validation.config != in_force:
            val_set.config = in_force
            validation = Pipeline(val_set, in_force, device)
        evaluation = validation.evaluate(Ensemble.of(training.scored_model, in_force, device), "validation")
        training.epoch += 1
        finish_epoch(training, config, run, row, evaluation)
        if config.patience and training.epoch - training.best_epoch >= config.patience:
            print(f"no better H-Mean in {config.patience} epochs: stopped early")
            break
    for line in sorted(unreadable):
        print(f"left out: {line}")
    print(
        f"best H-Mean {training.best_hmean:.4f} in epoch {training.best_epoch}. Next: "
        f"python predict.py {run / 'best.pt'} --out submission.csv"
    )


def start(config: Config, device: torch.device, plan: BatchPlan | None = None) -> Training:
    """A training from scratch at its beginning: for --profile and the benchmarks."""
    model = DBNet(config.changed(weights="none")).to(device, memory_format=torch.channels_last).train()
    if config.compile:
        compile_model(model)
    plan = plan or BatchPlan(config.batch_size, config.accumulate, config.image_size)
    average = WeightAverage(model, config.ema) if config.ema else None
    return Training(model, make_optimizer(model, config), make_scaler(config, device), plan, average)


def train_epoch(
    training: Training, loader: DataLoader, config: Config, device: torch.device, unreadable: set[str]
) -> dict[str, Any]:
    """One pass over the training images. Returns its row of the log; adds to `unreadable` what could not be read."""
    training.model.train()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        # Shapes that hardly ever come again would each be measured anew.
        torch.backends.cudnn.benchmark = config.pad == "square"
    totals = torch.zeros(len(Losses._fields), device=device)
    steps = skipped = non_finite_streak = torch.zeros((), device=device)
    images = dropped = 0
    started = reading = time.monotonic()
    title = f"epoch {training.epoch + 1}/{config.epochs}"
    with tqdm(total=len(loader.dataset), desc=title, unit="img", dynamic_ncols=True) as bar:
        for batches in group_batches(loader, config.accumulate):
            lr = learning_rate(config, training.epoch, (images + 1) / len(loader.dataset))
            for group in training.optimizer.param_groups:
                group["lr"] = lr
            for batch in batches:
                for _, error in batch["failed"]:
                    if config.strict:
                        raise UserError(error)
                    unreadable.add(error)
            readable = [batch for batch in batches if "image" in batch]
            bar.update(sum(len(batch["failed"]) for batch in batches))
            if not readable:
                continue
            losses, gradient_norm = optimizer_step(training, readable, config, device)
            if training.average:
                training.average.update(training.model)

            # All of this stays on the device: no step waits for the one before.
            finite = losses[0].isfinite()
            totals = totals + torch.where(finite, losses, 0)
            steps = steps + finite
            skipped = skipped + ~gradient_norm.isfinite()
            non_finite_streak = torch.where(finite, 0, non_finite_streak + 1)

            images += sum(len(batch["image"]) for batch in readable)
            dropped += sum(int(batch["dropped"].sum()) for batch in readable)
            if time.monotonic() - reading > READING_INTERVAL:
                reading = time.monotonic()
                stop_unless_finite(non_finite_streak, training)
                bar.set_postfix_str(
                    f"loss {losses[0]:.3f}, lr {lr:.1e}, {images / (reading - started):.1f} img/s, "
                    f"{peak_memory(device):.1f} GB, batch {training.plan.in_force}"
                )
            bar.update(sum(len(batch["image"]) for batch in readable))
    stop_unless_finite(non_finite_streak, training)
    if not images:
        raise UserError(f"{config.data}: none of the training images can be read")
    seconds = time.monotonic() - started
    means = (totals / steps.clamp(min=1)).tolist()
    return {
        "epoch": training.epoch + 1,
        "lr": lr,
        **{f"{name}_loss": mean for name, mean in zip(Losses._fields, means, strict=True)},
        "train_seconds": seconds,
        "images_per_second": images / seconds,
        "peak_memory_gb": peak_memory(device),
        "skipped_steps": int(skipped),
        "unreadable_images": len(unreadable),
        "dropped_polygons": dropped,
    }


def group_batches(loader: DataLoader, accumulate: int) -> Iterator[list[dict[str, Any]]]:
    """Batches of the loader, `accumulate` at a time: the samples of one optimizer step. The last may have fewer."""
    group = []
    for batch in loader:
        group.append(batch)
        if len(group) == accumulate:
            yield group
            group = []
    if group:
        yield group


def optimizer_step(
    training: Training, batches: list[dict[str, Any]], config: Config, device: torch.device
) -> tuple[Tensor, Tensor]:
    """One optimizer step on all samples of `batches`, in micro-batches that fit into memory.

    Out of memory anywhere in it, the very same samples run again under a smaller plan, from the state before the step.
    Every sample has the weight 1 / (their number), however they are split.

    Returns the mean Losses, (4,), and the norm of the gradient before clipping, both on the device.
    """
    model, optimizer = training.model, training.optimizer
    amp_dtype = pick_amp_dtype(config, device)
    count = sum(len(batch["image"]) for batch in batches)
    buffers_before = [buffer.clone() for buffer in model.buffers()]

    def attempt() -> tuple[Tensor, Tensor]:
        optimizer.zero_grad(set_to_none=True)
        mean_losses = torch.zeros(len(Losses._fields), device=device)
        for micro in micro_batches(batches, training.plan, device):
            weight = len(micro["image"]) / count
            with torch.autocast(device.type, amp_dtype, enabled=amp_dtype is not None):
                maps = model(micro["image"])
            losses = db_loss(maps, micro["prob_map"], micro["thresh_levels"], micro["mask"], config)
            training.scaler.scale(losses.total * weight).backward()
            mean_losses += torch.stack(losses).detach() * weight
        training.scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_grad_norm or math.inf)
        training.scaler.step(optimizer)  # leaves the weights alone where a gradient is not finite
        training.scaler.update()
        for buffer, before in zip(model.buffers(), buffers_before, strict=True):
            buffer.copy_(torch.where(norm.isfinite(), buffer, before))  # and so do the batch norm statistics
        return mean_losses, norm

    def reset() -> None:
        optimizer.zero_grad(set_to_none=True)
        for buffer, before in zip(model.buffers(), buffers_before, strict=True):
            buffer.copy_(before)
        for parameter in [p for p, state in optimizer.state.items() if "exp_avg_sq" not in state]:
            del optimizer.state[parameter]  # its allocation was cut short
        scaler = make_scaler(config, device)  # without the note that this step's gradients were unscaled already
        scaler.load_state_dict(training.scaler.state_dict())
        training.scaler = scaler

    return run_until_it_fits(attempt, training.plan, reset)


def micro_batches(batches: list[dict[str, Any]], plan: BatchPlan, device: torch.device) -> Iterator[dict[str, Tensor]]:
    """The tensors of `batches` on the device, in micro-batches and at the image size of the plan in force."""
    for batch in batches:
        for start in range(0, len(batch["image"]), plan.micro_batch):
            micro = {
                name: batch[name][start : start + plan.micro_batch].to(device, non_blocking=True)
                for name in ("image", "prob_map", "thresh_levels", "mask")
            }
            loaded_at = int(batch["side"][0])
            yield micro if loaded_at <= plan.image_size else resize_sample(micro, plan.image_size / loaded_at)


def resize_sample(micro: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    """Images and target maps loaded before a fallback of the image size, at the new size."""
    size = tuple(padded(round(side * scale)) for side in micro["image"].shape[1:3])

    def resize(maps: Tensor, **how: Any) -> Tensor:
        return F.interpolate(maps.float(), size=size, **how)

    image = resize(micro["image"].permute(0, 3, 1, 2), mode="bilinear", antialias=True)
    return {
        "image": image.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1),
        "prob_map": resize(micro["prob_map"][:, None], mode="nearest-exact")[:, 0],
        "thresh_levels": resize(micro["thresh_levels"][:, None], mode="bilinear")[:, 0],
        "mask": resize(micro["mask"][:, None], mode="nearest-exact")[:, 0],
    }


def stop_unless_finite(streak: Tensor, training: Training) -> None:
    """Raise UserError after too many steps in a row without a finite loss."""
    if int(streak) >= NON_FINITE_LIMIT:
        raise UserError(
            f"the loss was not finite for {int(streak)} steps in a row in epoch {training.epoch + 1}; "
            f"lower --lr, or try --amp off"
        )


def finish_epoch(training: Training, config: Config, run: Path, row: dict[str, Any], evaluation: Evaluation) -> None:
    """Say, log and save what the epoch came to."""
    score = evaluation.compute()
    plan = training.plan
    row |= {
        "precision": score.precision,
        "recall": score.recall,
        "hmean": score.hmean,
        "detections": score.detections,
        "image_size": plan.image_size,
        "micro_batch": plan.micro_batch,
        "batch": plan.in_force,
        "fallbacks": list(plan.fallbacks),
    }
    better = score.hmean > training.best_hmean
    if better:
        training.best_hmean, training.best_epoch = score.hmean, training.epoch
    print(
        f"epoch {training.epoch}/{config.epochs}: loss {row['total_loss']:.3f}, precision {score.precision:.4f}, "
        f"recall {score.recall:.4f}, H-Mean {score.hmean:.4f}{' (best)' if better else ''}"
        + (f", {row['skipped_steps']} steps skipped" if row["skipped_steps"] else "")
    )
    with (run / "log.jsonl").open("a") as log:
        log.write(json.dumps(row) + "\n")
    in_force = config.changed(image_size=plan.image_size)
    if better:
        save_checkpoint(run / "best.pt", in_force, training.scored_model, hmean=score.hmean, epoch=training.epoch)
    save_checkpoint(run / "last.pt", config, training.model, **training.state())
    show_progress(run)


def peak_memory(device: torch.device) -> float:
    """Most memory that tensors took on the GPU, or the process on the host, in GB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


if __name__ == "__main__":
    run_script(main)
