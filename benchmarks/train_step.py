"""The training step: what the network, the data path and the allocator take of it.

    python benchmarks/train_step.py [--preset lite] [--image-size 512] [--batch-size 4] [--amp bf16] [--data DIR]

The time from the command to the first step is that of a run of its own.
"""

import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from measure import ROOT, milliseconds, parse_arguments, print_table, print_versions
from plans import synthetic_batch

import train
from dbnet.config import Config
from dbnet.dataset import Batches, TextDataset, count_workers, make_loader
from dbnet.device import keep_freed_memory, pick_device
from dbnet.model import DBNet

STEPS = 6


def main() -> None:
    flags = [
        ("--preset", {"default": "lite"}),
        ("--image-size", {"type": int, "default": 512}),
        ("--batch-size", {"type": int, "default": 4}),
        ("--amp", {"default": "auto"}),
    ]
    args = parse_arguments(__doc__, *flags)
    changes = {"image_size": args.image_size, "batch_size": args.batch_size, "data": str(args.data), "amp": args.amp}
    config = Config.from_preset(args.preset, weights="none", accumulate=1, **changes)
    device = pick_device(config.device)
    print_versions()

    batch = synthetic_batch(config)
    rows = []
    training = train.Training(DBNet(config), config, device)
    for name in ("as the C library gives memory", "with freed memory kept"):
        took = milliseconds(lambda: step(training, [batch], config, device), repeats=5) / config.batch_size
        rows.append((f"square, random images, {name}", f"{took:.0f}"))
        keep_freed_memory()

    for pad in ("square", "tight"):
        padded = config.changed(pad=pad)
        dataset = TextDataset(padded, "train", train=True)
        loader = make_loader(Batches(dataset, config.batch_size, config.seed), count_workers(config), False)
        iterator = iter(loader)
        batches = [next(iterator) for _ in range(STEPS)]
        step(training, batches[:1], padded, device)
        begin = time.perf_counter()
        for each in batches:
            step(training, [each], padded, device)
        ready = 1e3 * (time.perf_counter() - begin) / (STEPS * config.batch_size)
        begin = time.perf_counter()
        for _ in range(STEPS):
            step(training, [next(iterator)], padded, device)
        whole = 1e3 * (time.perf_counter() - begin) / (STEPS * config.batch_size)
        rows.append((f"{pad}, receipts in memory", f"{ready:.0f}"))
        rows.append((f"{pad}, receipts from files", f"{whole:.0f}"))
    title = f"Training step of {args.preset}, {config.image_size} px, batch {config.batch_size}, on {device}"
    print_table(title, ("what", "ms an image"), rows)
    print(f"\nfrom the command to the first step: {seconds_to_first_step(config):.1f} s on {len(dataset)} images")


def step(training: train.Training, batches: list[dict], config: Config, device: torch.device) -> None:
    """One optimizer step, to its end on the device."""
    train.optimizer_step(training, batches, config)
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_to_first_step(config: Config) -> float:
    """From the command until the progress bar has counted images."""
    folder = Path(tempfile.mkdtemp())
    command = [sys.executable, str(ROOT / "train.py"), "--preset", "lite", "--weights", "none", "--run", "first"]
    command += ["--image-size", str(config.image_size), "--batch-size", "1", "--data", str(Path(config.data).resolve())]
    begin = time.perf_counter()
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    shown = b""
    while b"| 1/" not in shown:
        shown = (shown + process.stderr.read(1))[-200:]
    took = time.perf_counter() - begin
    process.terminate()
    process.wait()
    shutil.rmtree(folder)
    return took


if __name__ == "__main__":
    main()
