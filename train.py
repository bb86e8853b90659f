"""Train a text detector.

    python train.py --preset v1                                on a GPU
    python train.py --preset lite --weights none               on a CPU
    torchrun --nproc-per-node 4 -- train.py --preset v1        on four GPUs
    python train.py --run first --resume                       go on with runs/first
    python train.py --preset v1 --init runs/first/best.pt      start from trained weights
    python train.py --preset v1 --show-samples samples.png     look at augmented samples, and exit

A run writes runs/NAME/: config.json, best.pt (by validation H-Mean), last.pt (all that resuming needs; last.prev.pt is
the save before it), log.jsonl (a line an epoch), curves.png, and events for `tensorboard --logdir runs` after
`pip install tensorboard`. Ctrl-C, SIGTERM and a closed terminal finish the optimizer step and save."""

import argparse
import json
import math
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from dbnet.config import PRESETS, ArgumentParser, Config, print_difference
from dbnet.errors import is_out_of_memory, one_line_errors, run_script


def parse_arguments() -> tuple[argparse.Namespace, dict[str, Any]]:
    """The script's own arguments, and the fields of the configuration that the command changes."""
    parser = ArgumentParser(__doc__)
    parser.add_argument("--preset", choices=PRESETS, help="configuration to start from (v1)")
    parser.add_argument("--run", metavar="NAME", help="folder of the run under runs/ (preset and time)")
    parser.add_switch("--resume", "go on with the run; without --run, the newest one")
    parser.add_argument("--init", type=Path, metavar="CKPT", help="start from this checkpoint's weights, or from lite")
    parser.add_switch("--print-config", "print the resolved configuration as JSON and exit")
    parser.add_argument("--diff", choices=PRESETS, metavar="PRESET", help="print what differs from it and exit")
    parser.add_argument("--show-samples", type=Path, metavar="FILE.png", help="picture some training samples and exit")
    parser.add_config_flags()
    return parser.parse()


if Path(sys.argv[0]).stem in ("train", "dbnet-train") and {"-h", "--help"} & {*sys.argv}:
    parse_arguments()  # prints the help and ends, before the seconds that PyTorch takes to be imported

with one_line_errors():  # where PyTorch is not installed, or a library that OpenCV needs
    import torch
    from torch import Tensor, nn

    from dbnet.checkpoint import build_model, save_checkpoint
    from dbnet.dataset import Batch, Batches, TextDataset, count_workers, make_loader
    from dbnet.device import all_gather, from_first, is_first, print0, progress, world_size
    from dbnet.device import destroy_process_group, init_process_group, peak_memory, pick_amp_dtype, pick_device
    from dbnet.ensemble import Ensemble
    from dbnet.evaluation import Evaluation, advise_on_collapse, evaluate
    from dbnet.files import Row, check_outputs
    from dbnet.images import file_of
    from dbnet.inference import Pipeline, find_weights
    from dbnet.loss import Losses, db_loss
    from dbnet.memory import micro_batches
    from dbnet.pictures import PICTURE_MARK, sample_sheet, show_progress, write_image
    from dbnet.training import LastSave, NothingTwice, Training, find_run, learning_rate, load_last, lock_run, log_row
    from dbnet.training import new_run, prepare_folder, seed_all, step_batches

READING_INTERVAL = 1.0  # seconds between two looks at the losses, each of which waits for the device


def main() -> None:
    args, changes = parse_arguments()
    init_process_group()
    run, last = from_first(lambda: find_run(args.run)) if args.resume else (None, None)
    config = last["config"].changed(**changes) if last else Config.from_preset(args.preset or "v1", **changes)
    if last and (args.preset or args.init):
        print0("--preset and --init: ignored; the run keeps its settings, except for single flags")
    if args.diff:
        print_difference(config, args.diff, Config.from_preset(args.diff))
    elif args.print_config:
        print(json.dumps(config.to_dict(), indent=2))
    elif args.show_samples:
        check_outputs((args.show_samples, PICTURE_MARK))
        samples = TextDataset(config, "train", train=True)
        check_outputs((args.show_samples, PICTURE_MARK), inputs=map(file_of, samples.paths))
        write_image(args.show_samples, sample_sheet(samples))
        print(f"{args.show_samples}: image with polygons, probability map, threshold map")
    else:
        run = run or from_first(lambda: new_run(args.run, args.preset))
        with lock_run(run):
            last = from_first(lambda: load_last(run)) if last else None  # before the lock, another may have trained on
            train(config, run, args.init and find_weights(args.init), last)
        destroy_process_group()


def train(config: Config, run: Path, init: Path | None = None, last: dict[str, Any] | None = None) -> None:
    """Train in the folder `run`: from scratch, from the weights of `init`, or on from the content of last.pt."""
    device = pick_device(config.device)
    seed_all(config)
    train_set = TextDataset(config, "train", train=True)
    print0(f"{config.data}: {train_set.count_words()}")
    val_set = TextDataset(config, "val", train=False)
    validation = Pipeline(val_set, config, device)
    training = Training(build_model(config, run, last, init), config, device)
    if last:
        training.load_state(last, config, run / "last.pt")
    from_first(lambda: prepare_folder(run, config))
    images = f"{len(train_set)} training and {len(val_set)} validation images"
    print0(f"{run}: {images} on {device}, {training.describe(config)}")
    with LastSave(run, config) as saver:
        while training.epoch < config.epochs and not training.is_stuck(config):
            image_size = training.running.image_size if training.running else training.plan.image_size
            if train_set.config.image_size != image_size:  # memory has run out
                train_set = TextDataset(config.changed(image_size=image_size), "train", train=True)
            row = train_epoch(training, train_set, config, saver)
            saver.save(training)  # where the validation is cut short, it alone is missing
            in_force = config.changed(image_size=training.plan.image_size)  # memory may have run out since
            if validation.config != in_force:
                validation = Pipeline(TextDataset(in_force, "val", train=False), in_force, device)
            with saver.validation():
                evaluation = evaluate(validation, Ensemble.of(training.scored_model, in_force, device), "validation")
            training.running = None
            training.epoch += 1
            log_epoch(training, config, run, row, evaluation)
            saver.save(training)
            if saver.signal:
                saver.stop()
    training.print_end(config, run)


def train_epoch(training: Training, train_set: TextDataset, config: Config, saver: LastSave | None = None) -> Row:
    """One pass over the training images, or the rest of one that has begun (training.running). Returns its row of the
    log. Saves when `saver` is due, and ends with a save at a signal, or where a data worker has died or the data folder
    has gone."""
    device, plan, epoch = training.device, training.plan, training.begin_epoch(config)
    order = (config.batch_size, config.seed, plan.accumulate * world_size(), training.epoch, epoch.batches)
    loader = make_loader(Batches(train_set, *order), count_workers(config), device.type == "cuda")
    total = len(train_set.draws(training.epoch))
    started, read_at = time.monotonic() - epoch.seconds, time.monotonic()
    title, seen = f"epoch {training.epoch + 1}/{config.epochs}", min(epoch.batches * config.batch_size, total)
    with progress(None, title, total, initial=seen, leave=True) as bar:
        for batches, death in step_batches(loader, plan.accumulate):
            epoch.seconds = time.monotonic() - started
            batch_count, images = training.count_step(batches, config, death, saver)  # saves or stops if due
            if not batch_count:
                break
            if images:
                done = (epoch.batches * config.batch_size + 1) / total
                epoch.lr = learning_rate(config, training.epoch, min(done, 1.0))
                for group in training.optimizer.param_groups:
                    group["lr"] = epoch.lr
                losses, gradient_norm = optimizer_step(training, batches, config, images)
                epoch.note(losses, gradient_norm)
            epoch.batches += batch_count
            epoch.images += images
            if images and time.monotonic() - read_at > READING_INTERVAL:
                read_at = time.monotonic()
                training.stop_unless_finite(config)
                memory = f"{peak_memory(device):.1f} GB, batch {plan.in_force}"
                bar.set_postfix_str(f"loss {losses[0]:.3f}, lr {epoch.lr:.1e}, {memory}")
            bar.update(min(epoch.batches * config.batch_size, total) - bar.n)
    training.stop_unless_finite(config)
    epoch.seconds = time.monotonic() - started
    return training.finish_epoch(config)


def optimizer_step(training: Training, batches: list[Batch], config: Config, images: int = 0) -> tuple[Tensor, Tensor]:
    """One optimizer step on all samples of `batches`, in micro-batches that fit into memory. When memory runs out, in
    any process, the same samples run again under a smaller plan, from the state before the step. Each sample has the
    weight 1 / `images`, the number of samples in all processes, however they are split. Returns the mean Losses, (4,),
    and the norm of the gradient before clipping, both on the device."""
    model, optimizer, scaler = training.model, training.optimizer, training.scaler
    plan, device = training.plan, training.device
    batches = [batch for batch in batches if "image" in batch]  # of the others, no image could be read
    ours = sum(len(batch["image"]) for batch in batches)
    images = images or ours
    amp_dtype = pick_amp_dtype(config, device)
    autocast = torch.autocast(device.type, amp_dtype, enabled=amp_dtype is not None)
    training.note_start()
    fits = False
    while not fits:
        maps = losses = micro = None
        try:
            optimizer.zero_grad(set_to_none=True)
            mean_losses = torch.zeros(len(Losses._fields), device=device)
            for micro in micro_batches(batches, plan, device):
                with autocast:
                    maps = model(micro["image"])
                losses = db_loss(maps, micro["prob_map"], micro["thresh_levels"], micro["mask"], config)  # in float32
                weight = len(micro["image"]) / images
                scaler.scale(losses.total * weight).backward()
                mean_losses += torch.stack(losses).detach() * weight
            fits = True
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        maps = losses = micro = None  # here, past the except block, which held its tensors too, their memory is free
        fits = all(all_gather(fits))  # all processes fall back together
        if not fits:
            plan.shrink()  # 8 x 2 -> 4 x 4 -> 2 x 8 -> 1 x 16, then 896 and 800 px
            training.restore_start()
    training.sum_over_processes(mean_losses, ours / images)  # with gradients and batch norm statistics: one call
    with NothingTwice():
        gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
        is_finite = nn.utils.get_total_norm(gradients).isfinite()  # each gradient may be, and their norm not
        gradients[0].mul_(torch.where(is_finite, 1.0, math.nan))  # which tells the scaler
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(model.parameters(), config.clip_grad_norm or math.inf)
        scaler.step(optimizer)  # on the device, it leaves the weights alone where a gradient is not finite,
        training.keep_statistics(norm.isfinite())  # and so do the batch norm statistics
        scaler.update(None if amp_dtype == torch.float16 else 1.0)
        if training.average:
            training.average.update(model)
    return mean_losses, norm


def log_epoch(training: Training, config: Config, run: Path, row: Row, evaluation: Evaluation) -> None:
    """Print and log the result of an epoch, and keep the best network."""
    score, plan = evaluation.compute(), training.plan
    row |= {name: getattr(score, name) for name in ("precision", "recall", "hmean", "detections")}
    row |= {"image_size": plan.image_size, "micro_batch": plan.micro_batch, "batch": plan.in_force}
    row |= {"fallbacks": plan.fallbacks.copy(), "ranks": world_size()}
    better = score.hmean > training.best_hmean
    if better:
        training.best_hmean, training.best_epoch = score.hmean, training.epoch
    if not is_first():
        return
    log_row(run / "log.jsonl", row)
    if better:
        in_force = config.changed(image_size=plan.image_size)
        save_checkpoint(run / "best.pt", in_force, training.scored_model, hmean=score.hmean, epoch=training.epoch)
    skipped = f", {row['skipped_steps']} steps skipped" if row["skipped_steps"] else ""
    print(
        f"epoch {training.epoch}/{config.epochs}: loss {row['total_loss']:.3f}, precision {score.precision:.4f}, "
        f"recall {score.recall:.4f}, H-Mean {score.hmean:.4f}{' (best)' if better and score.hmean else ''}{skipped}"
    )
    if advice := advise_on_collapse(evaluation, config):
        print(advice)
    show_progress(run)


cli = partial(run_script, main)  # the command dbnet-train

if __name__ == "__main__":
    cli()
