"""Memory and speed of a preset on this device, before a long run: `python train.py --preset v1 --profile`.

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
from itertools import product
from pathlib import Path

import torch

from dbnet.config import Config
from dbnet.dataset import Batch
from dbnet.device import keep_freed_memory, peak_memory, pick_amp_dtype, pick_device
from dbnet.errors import is_out_of_memory
from dbnet.memory import SMALLER_SIZES, BatchPlan, free_memory
from dbnet.model import DBNet
from dbnet.splits import data_folders, read_split
from dbnet.training import Training

Step = Callable[[Training, list[Batch], Config], object]  # train.optimizer_step
Result = tuple[float, float] | str  # peak memory in GB and images/s, or the reason why they are not known

COMPETITION_IMAGES = 3272  # of its training split, for the hours where there is no data set yet
_LIMIT_SECONDS = {"cpu": 120.0, "cuda": 600.0}  # no case begins later
_CASE_SECONDS = 10.0  # no further step of a case begins later


class _OnlyPlan(BatchPlan):
    def shrink(self) -> None:
        raise MemoryError(f"{self.in_force} does not fit")  # here, that is a result


def print_profile(preset: str | None, config: Config, step: Step) -> None:
    """Measure every case and print the table. Raises UserError without such a device or for a broken data set."""
    device = pick_device(config.device)
    is_gpu, images, source = device.type == "cuda", COMPETITION_IMAGES, f"the competition's; there is no {config.data}"
    if all(folder.exists() for folder in data_folders(config.data)):
        images, source = len(read_split(config.data, "train").images), config.data
    name = torch.cuda.get_device_name(device) if is_gpu else f"CPU, {torch.get_num_threads()} threads"
    dtype = str(pick_amp_dtype(config, device) or torch.float32).removeprefix("torch.")
    print(f"{preset or 'v1'} on {name}: {config.backbone}, {dtype}, torch {torch.__version__}")
    row = "{:>7}  {:>6}  {:>7}  {:>8}  {}".format
    print(row("image", "batch", "peak GB", "images/s", f"{config.epochs} epochs"))
    cases = fallback_cases(config)
    for case, result in zip(cases, measure_cases(cases, device, step), strict=True):
        memory, speed, taken = "-", "-", result
        if not isinstance(result, str):
            minutes = config.epochs * images / result[1] / 60
            taken = f"{minutes / 60:.1f} h" if minutes >= 60 else f"{minutes:.1f} min"
            memory, speed = f"{result[0]:.2f}", f"{result[1]:.3g}"
        print(row(f"{case.image_size} px", f"{case.batch_size} x {case.accumulate}", memory, speed, taken))
    print("first, what training starts with; the other rows are what it falls back to when memory runs out")
    print("peak: " + ("of tensors on the GPU" if is_gpu else "growth of a process that does only this"))
    print(f"epochs: {images:,} images each ({source}), square and of full size, training steps alone")


def fallback_cases(config: Config) -> list[Config]:
    """Every plan of the fallback, in its order."""
    sizes = [config.image_size, *(size for size in SMALLER_SIZES if size < config.image_size)]
    batches = [config.batch_size >> halvings for halvings in range(config.batch_size.bit_length())]
    together = config.batch_size * config.accumulate
    return [
        config.changed(image_size=size, batch_size=batch, accumulate=-(-together // batch))
        for size, batch in product(sizes, batches)
    ]


def measure_cases(cases: list[Config], device: torch.device, step: Step) -> list[Result]:
    """The result of each case, or the reason why there is none; small ones are measured first."""
    begun, limit = time.monotonic(), _LIMIT_SECONDS[device.type]
    results: list[Result] = [f"not measured: {limit:.0f} s are the limit"] * len(cases)
    for place, case in sorted(enumerate(cases), key=lambda item: item[1].batch_size * item[1].image_size ** 2):
        if time.monotonic() - begun < limit:
            results[place] = measure_case(case, device, step)
    return results


def measure_case(case: Config, device: torch.device, step: Step) -> Result:
    """The result of one case, or `out of memory`. On a CPU it runs in a process of its own."""
    case = case.changed(effective_batch=0, weights="none")
    try:
        if device.type == "cuda":
            return run_steps(case, device, step)
        case = case.changed(accumulate=min(case.accumulate, 2))  # 2 reach the peak
        context = multiprocessing.get_context("forkserver" if sys.platform != "win32" else "spawn")
        context.set_forkserver_preload([name for name in sys.modules if name.startswith("dbnet.")])
        with ProcessPoolExecutor(1, context) as pool:
            return pool.submit(run_steps, case, device, step).result()
    except BrokenProcessPool:
        return "out of memory: the system ended the process"
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return "out of memory"
    finally:
        free_memory()


def run_steps(config: Config, device: torch.device, step: Step) -> tuple[float, float]:
    """Peak memory in GB (on a CPU, growth of the process) and images/s of optimizer steps whose batches are ready."""
    keep_freed_memory()  # as training has it
    before = 0.0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        torch.backends.cudnn.benchmark = config.pad == "square"
    else:
        before = peak_memory(device)
        with suppress(OSError):  # when the host's memory runs out, the system ends this process and no other
            Path("/proc/self/oom_score_adj").write_text("1000")
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
    return peak_memory(device) - before, speed


def synthetic_batch(config: Config) -> Batch:
    """A batch of config.batch_size square images as the loader makes it: random pixels, a quarter of them text."""
    side, count = config.image_size, config.batch_size
    text = (torch.arange(side) % 32 < 8).to(torch.uint8).repeat(side, 1)
    return {
        "image": torch.randint(0, 256, (count, side, side, 3), dtype=torch.uint8),
        "prob_map": text.repeat(count, 1, 1),
        "thresh_levels": 255 * text.repeat(count, 1, 1),
        "mask": torch.ones(count, side, side, dtype=torch.uint8),
        "side": torch.full((count,), side),
        "failed": [],
    }
