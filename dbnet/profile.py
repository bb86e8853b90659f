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
from tqdm import tqdm

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
_TIMED_STEPS = 5
_STEP_SECONDS = 10.0  # after so many no further step of a case begins
_LIMIT_SECONDS = {"cpu": 120.0, "cuda": 600.0}  # no case begins that is expected to end later
_MICRO_BATCHES_ON_A_CPU = 2  # of a step: the second finds the gradients of the first, and so the peak is reached


class Case(NamedTuple):
    """A precision and a plan to measure."""

    amp: str
    image_size: int
    micro_batch: int
    accumulate: int

    @property
    def pixels(self) -> int:
        """Pixels of a micro-batch: memory and time are in proportion to them."""
        return self.micro_batch * self.image_size**2


class Measured(NamedTuple):
    """Result of a case: peak memory (on a CPU, growth of the process), and speed of steps whose batches are ready."""

    memory_gb: float
    images_per_second: float


class _OnlyPlan(BatchPlan):
    """A plan without a fallback: here, a plan that does not fit is a result."""

    def shrink(self) -> None:
        raise MemoryError(f"{self.in_force} does not fit")


def print_profile(preset: str | None, config: Config, step: Step) -> None:
    """Measure every case and print the table. Raises UserError without such a device or for a broken data set."""
    device = pick_device(config.device)
    images, source = count_images(config)
    results = measure_cases(config, device, step)
    initial = Case(_amp_in_force(config, device), config.image_size, config.batch_size, config.accumulate)
    rows: list[tuple[str, ...]] = [("", "image", "batch", "amp", "peak GB", "images/s", f"{config.epochs} epochs")]
    for case, result in results.items():
        cells = ["*" if case == initial else "", f"{case.image_size} px", f"{case.micro_batch} x {case.accumulate}"]
        if isinstance(result, str):
            rows.append((*cells, case.amp, "-", "-", result))
        else:
            minutes = config.epochs * images / result.images_per_second / 60
            taken = f"{minutes / 60:.1f} h" if minutes >= 60 else f"{minutes:.1f} min"
            rows.append((*cells, case.amp, f"{result.memory_gb:.2f}", f"{result.images_per_second:.3g}", taken))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{preset or 'v1'} on {name}: {config.backbone}, torch {torch.__version__}")
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    for row in rows:
        print("  ".join([*(cell.rjust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]))
    print("* what training starts with; the other rows are what it falls back to when memory runs out")
    print("peak: " + ("of tensors on the GPU" if device.type == "cuda" else "growth of a process that does only this"))
    print(f"epochs: {images:,} images each ({source}), square and of full size, training steps alone")


def count_images(config: Config) -> tuple[int, str]:
    """Training images in an epoch and their source: config.data, or the competition where that does not exist."""
    if not all(folder.exists() for folder in data_folders(config.data)):
        return COMPETITION_IMAGES, f"the competition's; there is no {config.data}"
    return len(read_split(config.data, "train").images), config.data


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
    """The result of each case, or the reason why there is none, in the order of `fallback_cases`.

    Small cases come first. A case that has no memory or time, judged by the one before, does not begin: on a CPU the
    system would end a process for it, and not necessarily this one.
    """
    begun, limit = time.monotonic(), _LIMIT_SECONDS[device.type]
    cases = fallback_cases(config, device)
    results: dict[Case, Measured | str] = dict.fromkeys(cases, "")
    known: tuple[Case, Measured] | None = None
    order = sorted(cases, key=lambda case: (case.pixels, cases.index(case)))
    for case in tqdm(order, desc="measuring", unit="case", dynamic_ncols=True, leave=False):
        if known:
            larger = case.pixels / known[0].pixels
            seconds = larger * known[0].micro_batch / known[1].images_per_second
            seconds *= 1 + _micro_batches(case, device) if seconds < _STEP_SECONDS else 1
            memory, free = larger * known[1].memory_gb, free_host_gb()
            if time.monotonic() - begun + seconds > limit:
                results[case] = f"no: about {seconds:.0f} s more, and {limit:.0f} s are the limit"
                continue
            if device.type == "cpu" and memory > free:
                results[case] = f"no: needs about {memory:.1f} GB, and {free:.1f} GB are free"
                continue
        results[case] = result = measure_case(config, case, device, step)
        if isinstance(result, Measured):
            known = case, result
    return results


def measure_case(config: Config, case: Case, device: torch.device, step: Step) -> Measured | str:
    """The result of one case, or `out of memory`. On a CPU it runs in a process of its own."""
    changes = {"amp": case.amp, "image_size": case.image_size, "batch_size": case.micro_batch}
    config = config.changed(**changes, accumulate=_micro_batches(case, device), effective_batch=0, weights="none")
    try:
        if device.type == "cuda":
            return run_steps(config, device, step)
        context = multiprocessing.get_context("forkserver" if sys.platform != "win32" else "spawn")
        context.set_forkserver_preload([name for name in sys.modules if name.startswith("dbnet.")])
        with ProcessPoolExecutor(1, context, _kill_this_process_first) as pool:
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
    """Measure some optimizer steps of config.batch_size x config.accumulate. Raises out-of-memory errors."""
    keep_freed_memory()  # as training has it
    with suppress(OSError):  # resets the peak
        Path("/proc/self/clear_refs").write_text("5")
    before = resident_gb()["RssAnon"]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        torch.backends.cudnn.benchmark = config.pad == "square"
    batch = synthetic_batch(config)
    plan = _OnlyPlan(config.batch_size, config.accumulate, config.image_size)
    training = Training.begin(DBNet(config), config, device, plan)

    def run(micro_batches: int) -> float:
        begun = time.perf_counter()
        step(training, [batch] * micro_batches, config)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - begun

    first = run(1)  # finds the fastest kernels
    seconds: list[float] = []
    while first < _STEP_SECONDS and len(seconds) < _TIMED_STEPS and sum(seconds) < _STEP_SECONDS:
        seconds.append(run(config.accumulate))
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device) / 1e9
    else:
        after = resident_gb()
        peak = after["VmHWM"] - after["RssFile"] - before
    images = config.batch_size * (len(seconds) * config.accumulate or 1)
    return Measured(peak, images / (sum(seconds) or first))


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


def resident_gb() -> dict[str, float]:
    """Memory of this process in RAM: RssAnon (its data) and RssFile (code of libraries) now, and VmHWM, the largest sum
    so far. Where the system tells only the last, it stands for the first as well."""
    try:
        lines = [line.split() for line in Path("/proc/self/status").read_text().splitlines()]
        wanted = ("RssAnon:", "RssFile:", "VmHWM:")
        return {line[0].rstrip(":"): int(line[1]) * 1024 / 1e9 for line in lines if line[0] in wanted}
    except OSError:
        peak = peak_memory(torch.device("cpu"))
        return {"RssAnon": peak, "RssFile": 0.0, "VmHWM": peak}


def free_host_gb() -> float:
    """Memory that this process can still have: of the host, and of its control group; infinite where unknown."""
    free = [float("inf")]
    with suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free.append(next(int(line.split()[1]) * 1024 / 1e9 for line in lines if line.startswith("MemAvailable:")))
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        with suppress(OSError, ValueError):  # no control group, or one without a limit ("max")
            group = Path("/sys/fs/cgroup")
            free.append((int((group / limit).read_text()) - int((group / used).read_text())) / 1e9)
    return max(0.0, min(free))


def _kill_this_process_first() -> None:
    """Let the system end this process, and no other, when the host's memory runs out."""
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


def _micro_batches(case: Case, device: torch.device) -> int:
    """Micro-batches of a step that is measured."""
    return min(case.accumulate, _MICRO_BATCHES_ON_A_CPU) if device.type == "cpu" else case.accumulate


def _amp_in_force(config: Config, device: torch.device) -> str:
    return {None: "off", torch.float16: "fp16", torch.bfloat16: "bf16"}[pick_amp_dtype(config, device)]
