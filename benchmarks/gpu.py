"""What the presets reach on a GPU: images a second, peak memory and the share of the matrix rate.

    python benchmarks/gpu.py [--presets v0 v1] [--amp off fp16 bf16] [--data DIR] [--peak-tflops 989]

For each preset and precision: the training step with its samples in memory and with the whole data path, inference, the
whole of predict.py, peak memory, and what 20 epochs of 3,272 images would take. Runs on a CPU too, to try it out, with
--image-size 64 --steps 2 --images 8 say.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from measure import ROOT, parse_arguments, print_table, print_versions
from torch.utils.flop_counter import FlopCounterMode
from train_step import step

import train
from dbnet.checkpoint import save_checkpoint
from dbnet.config import PRESETS, Config
from dbnet.dataset import Batches, TextDataset, count_workers, make_loader
from dbnet.device import pick_device
from dbnet.ensemble import Ensemble
from dbnet.memory import BatchPlan
from dbnet.model import DBNet, fold

# Dense rates of the data sheets in TFLOP/s: 16 bits, and TF32, which convolutions of float32 use.
PEAK_TFLOPS = {"H200": (989, 494), "H100": (989, 494), "A100": (312, 156), "RTX 4090": (165, 82), "RTX 3090": (71, 35)}
EPOCH_IMAGES, EPOCHS = 3272, 20
HEADER = ("preset", "amp", "train", "with data", "of peak", "20 epochs", "inference", "predict.py", "memory")


def main() -> None:
    args = parse_arguments(
        __doc__,
        ("--presets", {"nargs": "+", "default": [name for name in PRESETS if name != "demo"]}),
        ("--amp", {"nargs": "+", "default": ["off", "fp16", "bf16"]}),
        ("--steps", {"type": int, "default": 20, "help": "steps that are timed, after as many that are not"}),
        ("--images", {"type": int, "default": 400, "help": "images that predict.py is timed on"}),
        ("--image-size", {"type": int, "help": "in place of the preset's own"}),
        ("--peak-tflops", {"type": float, "help": "the device's dense rate at 16 bits, if it is not known here"}),
    )
    device = pick_device("auto")
    print_versions()
    rows = []
    for preset in args.presets:
        for amp in args.amp:
            size = {"image_size": args.image_size} if args.image_size else {}
            config = Config.from_preset(preset, weights="none", amp=amp, data=str(args.data), **size)
            rows.append((preset, amp, *measure(config, args, device)))
            print(" | ".join(map(str, rows[-1])), flush=True)
    print_table("Images a second; share of the matrix rate; peak memory in GB", HEADER, rows)


def measure(config: Config, args: argparse.Namespace, device: torch.device) -> tuple[str, ...]:
    """One row of the table, after preset and amp."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        torch.backends.cudnn.benchmark = config.pad == "square"
    training = train.Training.begin(DBNet(config), config, device)
    groups = endless_groups(config, device)
    in_memory = next(groups)
    seconds = time_steps(lambda: step(training, in_memory, config, device), args.steps)
    images = sum(len(batch["image"]) for batch in in_memory)
    from_files = time_steps(lambda: step(training, next(groups), config, device), args.steps)
    memory = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else 0.0
    share = count_training_flops(config) * images / seconds / peak_flops(config, args)
    twenty_epochs = EPOCHS * EPOCH_IMAGES * from_files / images / 60

    model = training.model
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "model.pt"
        save_checkpoint(checkpoint, config, model)
        predicted = time_predict(checkpoint, args, Path(folder))
    fold(model.eval())
    batch = in_memory[0]["image"]
    network, sizes, plan = Ensemble.of(model, config, device), [batch.shape[2:0:-1]] * len(batch), BatchPlan(len(batch))
    inferred = time_steps(lambda: network.infer([batch], sizes, plan)(), args.steps)
    return (
        f"{images / seconds:.1f}",
        f"{images / from_files:.1f}",
        f"{100 * share:.0f}%",
        f"{twenty_epochs:.1f} min",
        f"{len(batch) / inferred:.1f}",
        f"{args.images / predicted:.1f}" if predicted > 0 else "too few",
        f"{memory:.1f}",
    )


def endless_groups(config: Config, device: torch.device) -> Iterator[list[dict]]:
    """The batches of one optimizer step after the other, epoch after epoch, from a loader as train.py has it."""
    dataset = TextDataset(config, "train", train=True)
    batches = Batches(dataset, config.batch_size, config.seed)
    loader = make_loader(batches, count_workers(config), device.type == "cuda")
    group = []
    while True:
        for batch in loader:
            group.append(batch)
            if len(group) == config.accumulate:
                yield group
                group = []
        batches.epoch += 1


def time_steps(work, steps: int) -> float:
    """Seconds of a call, on average over `steps` after as many to warm up."""
    for _ in range(steps):
        work()
    begin = time.perf_counter()
    for _ in range(steps):
        work()
    return (time.perf_counter() - begin) / steps


def time_predict(checkpoint: Path, args: argparse.Namespace, folder: Path) -> float:
    """Seconds that predict.py takes for --images images, less what it takes to start (its time for a single one)."""
    receipts = sorted((args.data / "images" / "train").iterdir())
    images = folder / "images"
    images.mkdir()
    for number in range(args.images):
        receipt = receipts[number % len(receipts)]
        os.symlink(receipt.resolve(), images / f"{number}{receipt.suffix}")
    command = [sys.executable, str(ROOT / "predict.py"), str(checkpoint), "--out", str(folder / "out.csv"), "--images"]
    seconds = []
    for place in (next(images.iterdir()), images):
        begin = time.perf_counter()
        subprocess.run([*command, str(place)], check=True, capture_output=True)
        seconds.append(time.perf_counter() - begin)
    return seconds[1] - seconds[0]


def count_training_flops(config: Config) -> float:
    """Floating-point operations of a training step an image, counted on a network without numbers."""
    model = DBNet(config).to("meta").train()
    with FlopCounterMode(display=False) as counter:
        maps = model(torch.zeros(1, config.image_size, config.image_size, 3, dtype=torch.uint8, device="meta"))
        (maps.prob_logits.sum() + maps.thresh_logits.sum()).backward()
    return counter.get_total_flops()


def peak_flops(config: Config, args: argparse.Namespace) -> float:
    """The device's dense matrix rate in the precision of the configuration, FLOP/s; infinite where it is not known."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    known = next((rates for part, rates in PEAK_TFLOPS.items() if part in name), (float("inf"),) * 2)
    at_16_bits, at_32_bits = (args.peak_tflops, args.peak_tflops / 2) if args.peak_tflops else known
    return 1e12 * (at_32_bits if config.amp == "off" else at_16_bits)


if __name__ == "__main__":
    main()
