"""Memory and speed of a preset on this device, before a long run.

    python train.py --preset v1 --profile

Real optimizer steps on synthetic batches, for each plan of the fallback (`dbnet.memory`): 8 x 2, 4 x 4, 2 x 8 and
1 x 16 at 1024, 896 and 800 px. A plan that was not measured, for lack of memory or time, says so.
"""

import multiprocessing
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from dbnet.config import Config
from dbnet.device import keep_freed_memory, peak_memory, pick_amp_dtype, pick_device
from dbnet.errors import is_out_of_memory
from dbnet.memory import SMALLER_SIZES, BatchPlan, free_memory
from dbnet.model import DBNet
from dbnet.splits import data_folders, read_split
from dbnet.targets import draw_targets
from dbnet.training import Training

Step = Callable[[Training, list[dict[str, Any]], Config], object]
"""`train.optimizer_step`: one optimizer step on these batches"""

COMPETITION_IMAGES = 3272  # of its training split, for the hours where there is no data set yet
_LIMIT_SECONDS = {"cpu": 120.0, "cuda": 600.0}  # no case begins later
_CASE_SECONDS = 10.0  # no further step of a case begins later


class Case(NamedTuple):
    """A precision and a plan to measure."""

    amp: str
    image_size: int
    micro_batch: int
    accumulate: int


class Measured(NamedTuple):
    """Peak memory (on a CPU, growth of a process that does only this), and speed of steps whose batches are ready."""

    memory_gb: float
    images_per_second: float


class _OnlyPlan(BatchPlan):
    """A plan without a fallback: here, a plan that does not fit is a result."""

    def shrink(self) -> None:
        raise MemoryError(f"{self.in_force} does not fit")


def print_profile(preset: str | None, config: Config, step: Step) -> None:
    """Measure every case and print the table. Raises UserError without such a device or for a broken data set."""
    device = pick_device(config.device)
    images, source = COMPETITION_IMAGES, f"the competition's; there is no {config.data}"
    if all(folder.exists() for folder in data_folders(config.data)):
        images, source = len(read_split(config.data, "train").images), config.data
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{preset or 'v1'} on {name}: {config.backbone}, torch {torch.__version__}")
    row = "{:1}  {:>7}  {:>6}  {:>4}  {:>7}  {:>8}  {}".format
    print(row("", "image", "batch", "amp", "peak GB", "images/s", f"{config.epochs} epochs"))
    initial = Case(_amp_in_force(config, device), config.image_size, config.batch_size, config.accumulate)
    for case, result in measure_cases(config, device, step).items():
        plan = f"{case.image_size} px", f"{case.micro_batch} x {case.accumulate}", case.amp
        memory, speed, taken = "-", "-", str(result)
        if isinstance(result, Measured):
            memory, speed = f"{result.memory_gb:.2f}", f"{result.images_per_second:.3g}"
            minutes = config.epochs * images / result.images_per_second / 60
            taken = f"{minutes / 60:.1f} h" if minutes >= 60 else f"{minutes:.1f} min"
        print(row("*" if case == initial else "", *plan, memory, speed, taken))
    print("* what training starts with; the other rows are what it falls back to when memory runs out")
    print("peak: " + ("of tensors on the GPU" if device.type == "cuda" else "growth of a process that does only this"))
    print(f"epochs: {images:,} images each ({source}), square and of full size, training steps alone")


def fallback_cases(config: Config, device: torch.device) -> list[Case]:
    """Every plan of the fallback, in its order, in each precision of the device (on a CPU, in config.amp alone)."""
    amps = [_amp_in_force(config, device)]
    if device.type == "cuda" and config.amp == "auto":
        amps = ["off", "fp16", "bf16"] if torch.cuda.is_bf16_supported() else ["off", "fp16"]
    sizes = [config.image_size, *(size for size in SMALLER_SIZES if size < config.image_size)]
    batches = [config.batch_size >> halvings for halvings in range(config.batch_size.bit_length())]
    together = config.batch_size * config.accumulate
    return [Case(amp, size, batch, -(-together // batch)) for amp in amps for size in sizes for batch in batches]


def measure_cases(config: Config, device: torch.device, step: Step) -> dict[Case, Measured | str]:
    """The result of each case, or the reason why there is none, in the order of `fallback_cases`; small ones first."""
    begun, limit = time.monotonic(), _LIMIT_SECONDS[device.type]
    cases = fallback_cases(config, device)
    results: dict[Case, Measured | str] = dict.fromkeys(cases, f"not measured: {limit:.0f} s are the limit")
    for case in sorted(cases, key=lambda case: case.micro_batch * case.image_size**2):
        if time.monotonic() - begun < limit:
            results[case] = measure_case(config, case, device, step)
    return results


def measure_case(config: Config, case: Case, device: torch.device, step: Step) -> Measured | str:
    """The result of one case, or `out of memory`. On a CPU it runs in a process of its own."""
    accumulate = case.accumulate if device.type == "cuda" else min(case.accumulate, 2)  # 2 reach the peak
    changes = {"amp": case.amp, "image_size": case.image_size, "batch_size": case.micro_batch}
    config = config.changed(**changes, accumulate=accumulate, effective_batch=0, weights="none")
    try:
        if device.type == "cuda":
            return run_steps(config, device, step)
        context = multiprocessing.get_context("forkserver" if sys.platform != "win32" else "spawn")
        context.set_forkserver_preload([name for name in sys.modules if name.startswith("dbnet.")])
        with ProcessPoolExecutor(1, context) as pool:
            return pool.submit(run_steps, config, device, step).result()
    except BrokenProcessPool:
        return "out of memory: the system ended the process"
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return "out of memory"
    finally:
        free_memory()


def run_steps(config: Config, device: torch.device, step: Step) -> Measured:
    """Measure optimizer steps of config.batch_size x config.accumulate. Raises out-of-memory errors."""
    keep_freed_memory()  # as training has it
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        torch.backends.cudnn.benchmark = config.pad == "square"
    else:
        with suppress(OSError):  # when the host's memory runs out, the system ends this process and no other
            Path("/proc/self/oom_score_adj").write_text("1000")
    before = 0.0 if device.type == "cuda" else peak_memory(device)
    batches = [synthetic_batch(config)] * config.accumulate
    plan = _OnlyPlan(config.batch_size, config.accumulate, config.image_size)
    training = Training.begin(DBNet(config), config, device, plan)
    seconds: list[float] = []
    while len(seconds) < 6 and sum(seconds) < _CASE_SECONDS:
        begun = time.perf_counter()
        step(training, batches, config)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - begun)
    timed = seconds[1:] or seconds  # the first step finds the fastest kernels
    speed = config.batch_size * config.accumulate * len(timed) / sum(timed)
    return Measured(peak_memory(device) - before, speed)


def synthetic_batch(config: Config) -> dict[str, Any]:
    """A batch of config.batch_size square images as the loader makes it: random pixels, the targets of 100 words."""
    side, count = config.image_size, config.batch_size
    word = np.array([[0.1, 0.2], [0.9, 0.2], [0.9, 0.8], [0.1, 0.8]])  # of its cell in a grid over the image
    words = [(word + np.array([column, row])) * (side / 5, side / 20) for row in range(20) for column in range(5)]
    prob_map, thresh_levels = (torch.from_numpy(levels) for levels in draw_targets(words, side, side)[:2])
    return {
        "image": torch.randint(0, 256, (count, side, side, 3), dtype=torch.uint8),
        "prob_map": prob_map.repeat(count, 1, 1),
        "thresh_levels": thresh_levels.repeat(count, 1, 1),
        "mask": torch.ones(count, side, side, dtype=torch.uint8),
        "side": torch.full((count,), side),
        "dropped": torch.zeros(count, dtype=torch.int64),
        "failed": [],
    }


def _amp_in_force(config: Config, device: torch.device) -> str:
    return {None: "off", torch.float16: "fp16", torch.bfloat16: "bf16"}[pick_amp_dtype(config, device)]
