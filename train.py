"""Train a text detector.

    python train.py --preset v1                                one GPU and a night
    python train.py --preset lite --weights none               a CPU and an afternoon
    torchrun --nproc-per-node 4 -- train.py --preset v1        four GPUs
    python train.py --run first --resume                       go on with runs/first
    python train.py --preset v1 --init runs/first/best.pt      start from trained weights
    python train.py --preset v1 --show-samples samples.png     look at augmented samples, and exit
    python train.py --preset v1 --profile                      measure memory and speed on this device, and exit

A run writes runs/NAME/: config.json, best.pt (by validation H-Mean), last.pt (all that resuming needs; last.prev.pt is
the save before it), log.jsonl (a line an epoch), curves.png, and events for `tensorboard --logdir runs` after
`pip install tensorboard`. Ctrl-C and SIGTERM finish the optimizer step and save.
"""

import argparse
import math
import sys
import time
from collections.abc import Iterator
from datetime import datetime
from itertools import chain, repeat
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from dbnet import distributed
from dbnet.batch_norm import synchronize_batch_norms
from dbnet.checkpoint import load_checkpoint, load_weights, save_checkpoint, start_from
from dbnet.config import PRESETS, ArgumentParser, Config, print_config, print_difference
from dbnet.dataset import Batches, TextDataset, count_workers, make_loader
from dbnet.device import compile_model, peak_memory, pick_amp_dtype, seed_all
from dbnet.ensemble import Ensemble
from dbnet.errors import UserError, run_script, typed
from dbnet.evaluation import Evaluation, advise_on_collapse, evaluate
from dbnet.files import check_outputs, make_folder, remove_leftovers, write_json
from dbnet.inference import Pipeline
from dbnet.loss import Losses, db_loss
from dbnet.memory import BatchPlan, agreed, all_or_none, as_many_on_each_rank, micro_batches, run_until_it_fits
from dbnet.model import DBNet
from dbnet.pictures import PICTURE_MARK, sample_sheet, show_progress, write_image
from dbnet.profile import print_profile
from dbnet.splits import data_folders
from dbnet.training import (
    Interrupted,
    Interruption,
    LastSave,
    RunningEpoch,
    Training,
    WeightAverage,
    allocate_state,
    append_row,
    keep_rows,
    learning_rate,
    let_workers_die_quietly,
    load_last,
    make_optimizer,
    make_scaler,
    save_before,
)

RUNS = Path("runs")
NON_FINITE_LIMIT = 5  # steps in a row whose loss is not finite; then training stops
READING_INTERVAL = 1.0  # seconds between two looks at the losses, each of which waits for the device
WORKER_DEATHS = 3  # of data workers in one epoch; the next one stops training


def main() -> None:
    parser = ArgumentParser(__doc__)
    parser.add_argument("--preset", help=f"configuration to start from: {', '.join(PRESETS)} (v1)")
    parser.add_argument("--run", metavar="NAME", help="folder of the run under runs/ (preset and time)")
    parser.add_argument("--resume", action="store_true", help="go on with the run; without --run, the newest one")
    parser.add_argument("--init", type=Path, metavar="CKPT", help="start from the weights of this checkpoint")
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration as JSON and exit")
    parser.add_argument("--diff", metavar="PRESET", help="print what differs from this preset and exit")
    parser.add_argument("--show-samples", type=Path, metavar="FILE.png", help="picture some training samples and exit")
    parser.add_argument("--profile", action="store_true", help="measure memory and speed on this device and exit")
    parser.add_config_flags()
    args, changes = parser.parse()
    distributed.init()
    run = last = None
    started_before = distributed.remembered()
    if args.resume or started_before:
        run, last = distributed.from_first(lambda: resume_run(args, started_before))
    config = last["config"].changed(**changes) if last else Config.from_preset(args.preset or "v1", **changes)
    if args.preset and args.resume and not started_before:
        distributed.print0(f"--preset {args.preset}: not looked at; the run keeps its settings but for single flags")
    if args.diff:
        print_difference(config, args.diff, Config.from_preset(args.diff))
    elif args.print_config:
        print_config(config)
    elif args.show_samples:
        check_outputs((args.show_samples, PICTURE_MARK))
        write_image(args.show_samples, sample_sheet(TextDataset(config, "train", train=True)))
        print(f"{args.show_samples}: image with polygons, probability map, threshold map")
    elif args.profile:
        print_profile(args.preset, config, start, optimizer_step)
    else:
        run = run or distributed.from_first(lambda: name_run(args))
        try:
            train(config, run, None if last else args.init, last)
        except (UserError, Interrupted, KeyboardInterrupt):
            if (run / "last.pt").exists():
                resume = f"{typed('train', distributed.world_size())} --run {run.name} --resume"
                distributed.print0(f"\ngo on from the last save with: {resume}", flush=True)
            raise
        distributed.destroy()


def name_run(args: argparse.Namespace) -> Path:
    """The folder of a new run."""
    run = RUNS / (args.run or f"{args.preset or 'v1'}-{datetime.now():%Y%m%d-%H%M%S}")
    if run.exists():
        raise UserError(f"{run}: exists; go on with it by --run {run.name} --resume, or name another with --run")
    distributed.remember(run.name)
    return run


def resume_run(args: argparse.Namespace, started_before: str | None) -> tuple[Path, dict[str, Any] | None]:
    """The folder of the run to resume and its last save.

    Processes that torchrun starts in place of others get the command of the first ones and go on by themselves with the
    run that those have named, with None where nothing was saved yet.
    """
    if started_before:
        run = RUNS / started_before
        return run, load_last(run) if is_saved(run) else None
    if args.init:
        raise UserError("--init starts a new run; leave it out with --resume")
    if args.run:
        if not is_saved(RUNS / args.run):
            raise UserError(f"{RUNS / args.run}: holds no last.pt to resume; leave out --resume to start it")
        return RUNS / args.run, load_last(RUNS / args.run)
    found = sorted(RUNS.glob("*/last*.pt"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise UserError("runs/: holds no last.pt to resume; leave out --resume to start a run")
    return found[-1].parent, load_last(found[-1].parent)


def is_saved(run: Path) -> bool:
    """Whether there is something to resume in a run's folder."""
    return (run / "last.pt").exists() or save_before(run / "last.pt").exists()


def train(config: Config, run: Path, init: Path | None = None, last: dict[str, Any] | None = None) -> None:
    """Train in the folder `run`: from scratch, from the weights of `init`, or on from the content of last.pt."""
    device = distributed.pick_device(config.device)
    seed_all(config)
    accumulate = accumulation(config)
    train_set = TextDataset(config, "train", train=True)
    val_set = TextDataset(config, "val", train=False)

    start = last or (distributed.from_first(lambda: load_checkpoint(init)) if init else None)
    has_backbone = last or (start and start["config"].backbone == config.backbone)
    model = DBNet(config.changed(weights="none") if has_backbone else config)
    if last:
        load_weights(model, last, run / "last.pt", config)
    elif start and init:
        start_from(model, start, init)
    model.to(device).to(memory_format=torch.channels_last)
    if config.sync_batch_norm:
        synchronize_batch_norms(model)
    if config.compile:
        compile_model(model)
    training = begin(model, config, device, BatchPlan(config.batch_size, accumulate, config.image_size))
    allocate_state(training.optimizer)
    if last:
        training.load_state(last, config)
    if distributed.is_first():
        make_folder(run)
        remove_leftovers(run)
        keep_rows(run / "log.jsonl", training.epoch)
        write_json(run / "config.json", config.to_dict())
    saver = LastSave(run, config)
    done = f", {training.running.images} images of it done" if training.running else ""
    distributed.print0(
        f"{run}: {len(train_set)} training and {len(val_set)} validation images on {device}, {config.backbone}, "
        f"{training.plan.image_size} px, batch {training.plan.in_force}"
        + (f" x {distributed.world_size()} processes" if distributed.world_size() > 1 else "")
        + f", epochs {training.epoch + 1}{done} to {config.epochs}"
    )
    unreadable: set[str] = set()
    loader = validation = None
    with Interruption() as interruption:
        while training.epoch < config.epochs and not is_stuck(training, config):
            deaths = 0
            while not (training.running and training.running.row):
                side = training.running.image_size if training.running else training.plan.image_size
                if loader is None or train_set.config.image_size != side:
                    train_set.config = config.changed(image_size=side)
                    batches = Batches(train_set, config.batch_size, config.seed, accumulate * distributed.world_size())
                    loader = make_loader(batches, count_workers(config), device.type == "cuda")
                batches.epoch = training.epoch
                batches.start = training.running.batches if training.running else 0
                try:
                    train_epoch(training, loader, train_set.config, device, unreadable, saver, interruption)
                except WorkerDied as death:
                    loader, deaths = None, deaths + 1
                    if deaths > WORKER_DEATHS:
                        raise UserError(f"{death}; if memory is short, lower --workers, or use --workers 0") from None
                    print(f"\n{death}; going on with new ones", file=sys.stderr)
            in_force = config.changed(image_size=training.plan.image_size)  # memory may have run out since
            if validation is None or validation.config != in_force:
                val_set.config = in_force
                validation = Pipeline(val_set, in_force, device)
            training.note_random_states()
            scored = Ensemble.of(training.scored_model, in_force, device)
            try:
                with interruption.at_once():
                    evaluation = evaluate(validation, scored, "validation")
            except Interrupted:
                saver.write(training)  # the trained epoch; its validation starts again
                raise
            row, training.running = training.running.row, None
            training.epoch += 1
            finish_epoch(training, config, run, row, evaluation)
            saver.save(training)
            if interruption.signal:
                interruption.stop()
    for line in sorted(unreadable):
        distributed.print0(f"left out: {line}")
    if is_stuck(training, config):
        distributed.print0(f"no better H-Mean in {config.patience} epochs: stopped early")
    distributed.print0(
        f"best H-Mean {training.best_hmean:.4f} in epoch {training.best_epoch}. Next: "
        f"{typed('predict')} {run / 'best.pt'} --out submission.csv"
    )


def start(config: Config, device: torch.device, plan: BatchPlan | None = None) -> Training:
    """A training from scratch at its beginning: for --profile and the benchmarks."""
    model = DBNet(config.changed(weights="none")).to(device).to(memory_format=torch.channels_last).train()
    if config.compile:
        compile_model(model)
    return begin(model, config, device, plan or BatchPlan(config.batch_size, config.accumulate, config.image_size))


def begin(model: DBNet, config: Config, device: torch.device, plan: BatchPlan) -> Training:
    """Training of a network that is on its device, before its first step."""
    average = WeightAverage(model, config.ema) if config.ema else None
    return Training(model, make_optimizer(model, config), make_scaler(config, device), plan, average)


def accumulation(config: Config) -> int:
    """Micro-batches of one optimizer step in each process. Raises UserError where they cannot make up the batch."""
    if not config.effective_batch:
        return config.accumulate
    together = config.batch_size * distributed.world_size()
    if config.effective_batch % together:
        raise UserError(
            f"--effective-batch {config.effective_batch}: is no multiple of batch {config.batch_size} x "
            f"{distributed.world_size()} processes; change --batch-size"
        )
    return config.effective_batch // together


def is_stuck(training: Training, config: Config) -> bool:
    """Whether it is time to stop early."""
    return 0 < config.patience <= training.epoch - training.best_epoch


class WorkerDied(Exception):
    """A process that loads images has ended; nothing of the run is lost."""


def train_epoch(
    training: Training,
    loader: DataLoader,
    config: Config,
    device: torch.device,
    unreadable: set[str],
    saver: LastSave | None = None,
    interruption: Interruption | None = None,
) -> dict[str, Any]:
    """One pass over the training images, or the rest of one that has begun, as training.running says.

    Returns its row of the log, also kept there; adds to `unreadable` what could not be read. Saves by the clock of
    `saver`, and ends with a save where `interruption` has noted a signal. Raises WorkerDied between two steps.
    """
    training.model.train()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        # Shapes that hardly ever come again would each be measured anew.
        torch.backends.cudnn.benchmark = config.pad == "square" and not config.deterministic
    if training.running is None or training.running.row:
        training.running = RunningEpoch(training.plan.image_size or config.image_size).to(device)
    epoch, plan = training.running, training.plan
    started, read_at, images_before = time.monotonic() - epoch.seconds, time.monotonic(), epoch.images
    title = f"epoch {training.epoch + 1}/{config.epochs}"
    seen, total = epoch.images + epoch.failed, len(cast(TextDataset, loader.dataset).draws(training.epoch))
    with tqdm(
        total=total,
        desc=title,
        initial=seen,
        unit="img",
        dynamic_ncols=True,
        disable=not distributed.is_first(),
    ) as bar:
        # A rank whose batches have ended goes on with empty ones, for as long as another has samples.
        for batches in chain(group_batches(loader, plan.accumulate), repeat([])):
            errors = [error for batch in batches for _, error in batch["failed"]]
            if errors and config.strict:
                raise UserError(errors[0])
            unreadable.update(errors)
            readable = [batch for batch in batches if "image" in batch]
            in_step, images, dropped, failed, gone, stop, save = distributed.sum_counts(
                len(batches),
                sum(len(batch["image"]) for batch in readable),
                sum(int(batch["dropped"].sum()) for batch in readable),
                len(errors),
                bool(errors) and not all(folder.is_dir() for folder in data_folders(config.data)),
                bool(interruption and interruption.signal),
                bool(saver and saver.is_due()),
            )
            epoch.seconds = time.monotonic() - started
            if saver and (stop or save or gone):
                saver.save(training)  # before this step: nothing of its samples has been used
            if gone:
                raise UserError(f"{config.data}: the folder has gone; bring it back and go on with --resume")
            if stop and interruption:
                interruption.stop()
            if not in_step:
                break
            if images:
                progress = (epoch.batches * config.batch_size + 1) / total
                for group in training.optimizer.param_groups:
                    group["lr"] = learning_rate(config, training.epoch, min(progress, 1.0))
                losses, gradient_norm = optimizer_step(training, readable, config, device, images)
                if training.average:
                    training.average.update(training.model)

                # All of this stays on the device: no step waits for the one before.
                finite = losses[0].isfinite()
                epoch.losses = epoch.losses + torch.where(finite, losses, 0)
                epoch.steps = epoch.steps + finite
                epoch.skipped = epoch.skipped + ~gradient_norm.isfinite()
                epoch.non_finite_streak = torch.where(finite, 0, epoch.non_finite_streak + 1)
            epoch.batches += in_step
            epoch.images += images
            epoch.dropped += dropped
            epoch.failed += failed
            if images and time.monotonic() - read_at > READING_INTERVAL:
                speed = (epoch.images - images_before) / (time.monotonic() - read_at)
                read_at, images_before = time.monotonic(), epoch.images
                stop_unless_finite(epoch.non_finite_streak, training)
                bar.set_postfix_str(
                    f"loss {losses[0]:.3f}, lr {training.optimizer.param_groups[0]['lr']:.1e}, {speed:.1f} img/s, "
                    f"{peak_memory(device):.1f} GB, batch {plan.in_force}"
                )
            bar.update(images + failed)
    stop_unless_finite(epoch.non_finite_streak, training)
    if not epoch.images:
        raise UserError(f"{config.data}: none of the training images can be read")
    epoch.seconds = time.monotonic() - started
    unreadable.update(*distributed.all_gather(unreadable))
    means = (epoch.losses / epoch.steps.clamp(min=1)).tolist()
    epoch.row = {
        "epoch": training.epoch + 1,
        "lr": training.optimizer.param_groups[0]["lr"],
        **{f"{name}_loss": mean for name, mean in zip(Losses._fields, means, strict=True)},
        "train_seconds": epoch.seconds,
        "images_per_second": epoch.images / epoch.seconds,
        "peak_memory_gb": peak_memory(device),
        "skipped_steps": int(epoch.skipped),
        "unreadable_images": len(unreadable),
        "dropped_polygons": epoch.dropped,
    }
    return epoch.row


def group_batches(loader: DataLoader, accumulate: int) -> Iterator[list[dict[str, Any]]]:
    """Batches of the loader, `accumulate` at a time: the samples of one optimizer step. The last may have fewer.

    Raises WorkerDied where a process that loads them has ended.
    """
    group = []
    loaded = iter(loader)
    let_workers_die_quietly()
    while True:
        try:
            batch = next(loaded, None)
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise WorkerDied(str(error)) from None
        if batch is None:
            break
        group.append(batch)
        if len(group) == accumulate:
            yield group
            group = []
    if group:
        yield group


def optimizer_step(
    training: Training, batches: list[dict[str, Any]], config: Config, device: torch.device, images: int = 0
) -> tuple[Tensor, Tensor]:
    """One optimizer step on all samples of `batches`, in micro-batches that fit into memory.

    Out of memory anywhere in it, on any rank, the very same samples run again under a smaller plan, from the state
    before the step. Every sample has the weight 1 / (their number), however they are split: `images` over all ranks.

    Returns the mean Losses, (4,), and the norm of the gradient before clipping, both on the device.
    """
    model, optimizer = training.model, training.optimizer
    amp_dtype = pick_amp_dtype(config, device)
    ours = sum(len(batch["image"]) for batch in batches)
    images = images or ours
    buffers_before = [buffer.clone() for buffer in model.buffers()]

    def attempt() -> tuple[Tensor, Tensor]:
        optimizer.zero_grad(set_to_none=True)
        mean_losses = torch.zeros(len(Losses._fields), device=device)
        training.scaler.scale(mean_losses)  # its first call creates the scale, which a rank without samples needs too
        micros = micro_batches(batches, training.plan, device)
        if config.sync_batch_norm and distributed.world_size() > 1:
            micros = as_many_on_each_rank(micros, batches, training.plan, device)
        with all_or_none():
            for micro in micros:
                weight = len(micro["image"]) / images
                with torch.autocast(device.type, amp_dtype, enabled=amp_dtype is not None):
                    maps = model(micro["image"])
                losses = db_loss(maps, micro["prob_map"], micro["thresh_levels"], micro["mask"], config)
                training.scaler.scale(losses.total * weight).backward()
                mean_losses += torch.stack(losses).detach() * weight
            if distributed.world_size() > 1:
                added_up = [mean_losses, *gradients(model), *weighted_statistics(model, ours / images)]
                packed = torch.cat([tensor.reshape(-1) for tensor in added_up])
        if distributed.world_size() > 1:
            distributed.all_reduce(packed)
            for tensor, numbers in zip(added_up, packed.split([t.numel() for t in added_up]), strict=True):
                tensor.copy_(numbers.view(tensor.shape))
        with agreed():
            training.scaler.unscale_(optimizer)
            norm = nn.utils.clip_grad_norm_(model.parameters(), config.clip_grad_norm or math.inf)
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


def gradients(model: nn.Module) -> list[Tensor]:
    """The gradients that the ranks add up: where a rank had no samples, zeros."""
    found = []
    for parameter in model.parameters():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        found.append(parameter.grad)
    return found


def weighted_statistics(model: nn.Module, weight: float) -> list[Tensor]:
    """The batch norm statistics of this rank times its share of the samples: their sum over the ranks is the mean."""
    norms = [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]
    statistics = [each for norm in norms for each in (norm.running_mean, norm.running_var) if each is not None]
    torch._foreach_mul_(statistics, weight)
    return statistics


def stop_unless_finite(streak: Tensor, training: Training) -> None:
    """Raise UserError after too many steps in a row without a finite loss."""
    if int(streak) >= NON_FINITE_LIMIT:
        raise UserError(
            f"the loss was not finite for {int(streak)} steps in a row in epoch {training.epoch + 1}; "
            f"lower --lr, or try --amp off"
        )


def finish_epoch(training: Training, config: Config, run: Path, row: dict[str, Any], evaluation: Evaluation) -> None:
    """Say and log what the epoch came to, and keep the best network."""
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
        "ranks": distributed.world_size(),
        "fallbacks": list(plan.fallbacks),
    }
    better = score.hmean > training.best_hmean
    if better:
        training.best_hmean, training.best_epoch = score.hmean, training.epoch
    if not distributed.is_first():
        return
    print(
        f"epoch {training.epoch}/{config.epochs}: loss {row['total_loss']:.3f}, precision {score.precision:.4f}, "
        f"recall {score.recall:.4f}, H-Mean {score.hmean:.4f}{' (best)' if better else ''}"
        + (f", {row['skipped_steps']} steps skipped" if row["skipped_steps"] else "")
    )
    advice = advise_on_collapse(score, evaluation.highest, config)
    if advice:
        print(advice)
    append_row(run / "log.jsonl", row)
    if better:
        in_force = config.changed(image_size=plan.image_size)
        save_checkpoint(run / "best.pt", in_force, training.scored_model, hmean=score.hmean, epoch=training.epoch)
    show_progress(run)


def cli() -> None:
    """Run `main`: the entry point of the command dbnet-train."""
    run_script(main)


if __name__ == "__main__":
    cli()
