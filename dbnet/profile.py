"""Memory and speed of a preset on this device, before a night is spent on it.

    python train.py --preset v1 --profile

Real optimizer steps, on synthetic batches, for every plan that the fallback could come to (`dbnet.memory`): 8 x 2,
4 x 4, 2 x 8 and 1 x 16 at 1024, 896 and 800 px. What was not measured, for want of memory or time, says so.
"""

import multiprocessing
import resource
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
from dbnet.device import pick_amp_dtype, pick_device
from dbnet.memory import SMALLER_SIZES, BatchPlan, free_memory, is_out_of_memory, keep_freed_memory
from dbnet.splits import data_folders, read_split
from dbnet.targets import draw_targets

Start = Callable[[Config, torch.device, BatchPlan], Any]
"""`train.start`: a training at its beginning, whose steps follow the plan"""

Step = Callable[[Any, list[dict[str, Any]], Config, torch.device], object]
"""`train.optimizer_step`: one optimizer step of that training on these batches"""

COMPETITION_IMAGES = 3272  # of its training split, for the hours where there is no data set yet
_TIMED_STEPS = 5
_STEP_SECONDS = 10.0  # after so many no further step of a case begins, be it the first
_LIMIT_SECONDS = {"cpu": 120.0, "cuda": 600.0}  # no case begins that is expected to end later
_MICRO_BATCHES_ON_A_CPU = 2  # of a step: the second finds the gradients of the first, and so the peak is reached
_WORDS = (5, 20)  # across and down a synthetic image


class Case(NamedTuple):
    """A precision and a plan to measure."""

    amp: str
    image_size: int
    micro_batch: int
    accumulate: int

    @property
    def pixels(self) -> int:
        """Of a micro-batch: what memory and time go by."""
        return self.micro_batch * self.image_size**2


class Measured(NamedTuple):
    """What came out for a case."""

    memory_gb: float
    """most that tensors took on the GPU; on a CPU, by how much the data of the process grew"""

    images_per_second: float
    """of optimizer steps whose batches are ready"""

    steps: int
    """that were timed, after a first one of a single micro-batch; 0 where that took so long that it stands alone"""

    micro_batches: int
    """of each step that was timed"""


class _OnlyPlan(BatchPlan):
    """A plan without a fallback: what does not fit is a result here."""

    def shrink(self) -> None:
        raise MemoryError(f"{self.in_force} does not fit")


def print_profile(preset: str, config: Config, start: Start, step: Step) -> None:
    """Measure every case and print the table; `preset` names the configuration in it.

    Raises UserError where there is no such device, or where the data set is there and cannot be read.
    """
    device = pick_device(config.device)
    images, source = count_images(config)
    results = measure_cases(config, device, start, step)
    initial = Case(_amp_in_force(config, device), config.image_size, config.batch_size, config.accumulate)
    rows = [("", "image", "batch", "amp", "peak GB", "images/s", f"{config.epochs} epochs", "measured")]
    for case, result in results.items():
        mark = "*" if case == initial else ""
        cells = (mark, f"{case.image_size} px", f"{case.micro_batch} x {case.accumulate}", case.amp)
        if isinstance(result, str):
            rows.append((*cells, "-", "-", "-", result))
        else:
            minutes = config.epochs * images / result.images_per_second / 60
            taken = f"{minutes / 60:.1f} h" if minutes >= 60 else f"{minutes:.1f} min"
            counted = f"{result.steps} step{'s' * (result.steps > 1)}" if result.steps else "first step"
            steps = f"{counted} of {case.micro_batch} x {result.micro_batches}"
            rows.append((*cells, f"{result.memory_gb:.2f}", f"{result.images_per_second:.3g}", taken, steps))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{preset} on {name}: {config.backbone}, torch {torch.__version__}")
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        aligned = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        print("  ".join([*aligned[:-1], row[-1]]))
    print("* what training starts with; the rest is where it goes when memory runs out")
    print("peak: " + ("of tensors on the GPU" if device.type == "cuda" else "growth of a process that does only this"))
    if any(isinstance(result, Measured) and not result.steps for result in results.values()):
        print("a first step is slower than the next ones and does not find the optimizer's memory taken yet")
    print(f"epochs: {images:,} images each ({source}), training steps alone")
    if config.pad == "tight" or config.train_sizes:
        print("all images were square and of full size: what --pad tight and --train-sizes save comes on top")


def count_images(config: Config) -> tuple[int, str]:
    """How many training images an epoch has, and where that is from: config.data, or the competition without it."""
    if not all(folder.exists() for folder in data_folders(config.data)):
        return COMPETITION_IMAGES, f"the competition's; there is no {config.data}"
    return len(read_split(config.data, "train").images), config.data


def fallback_cases(config: Config, device: torch.device) -> list[Case]:
    """Every plan of the fallback, in its order, in each precision that the device has; on a CPU, and where the
    configuration names a precision, in that alone."""
    amps = [_amp_in_force(config, device)]
    if device.type == "cuda" and config.amp == "auto":
        amps = ["off", "fp16", "bf16"] if torch.cuda.is_bf16_supported() else ["off", "fp16"]
    sizes = [config.image_size, *(size for size in SMALLER_SIZES if size < config.image_size)]
    batches = [config.batch_size >> halvings for halvings in range(config.batch_size.bit_length())]
    return [
        Case(amp, size, batch, -(-(config.batch_size * config.accumulate) // batch))
        for amp in amps
        for size in sizes
        for batch in batches
    ]


def measure_cases(config: Config, device: torch.device, start: Start, step: Step) -> dict[Case, Measured | str]:
    """The result of each case, or a few words on why there is none, in the order of `fallback_cases`.

    Small cases come first, to have many in the time. On a CPU each has a process of its own, and none begins that, to
    judge by the one before, has no room: the system would end a process for it, and not surely this one.
    """
    begun = time.monotonic()
    cases = fallback_cases(config, device)
    results: dict[Case, Measured | str] = dict.fromkeys(cases, "")
    known: tuple[Case, Measured] | None = None
    order = sorted(cases, key=lambda case: (case.pixels, cases.index(case)))
    for case in tqdm(order, desc="measuring", unit="case", dynamic_ncols=True, leave=False):
        if known:
            larger = case.pixels / known[0].pixels
            left = _LIMIT_SECONDS[device.type] - (time.monotonic() - begun)
            seconds = larger * known[0].micro_batch / known[1].images_per_second
            seconds *= 1 + _micro_batches(case, device) if seconds < _STEP_SECONDS else 1
            if seconds > left:
                results[case] = f"no: about {seconds:.0f} s more, and {_LIMIT_SECONDS[device.type]:.0f} s are the limit"
                continue
            memory, free = larger * known[1].memory_gb, free_host_gb()
            if device.type == "cpu" and memory > free:
                results[case] = f"no: needs about {memory:.1f} GB, and {free:.1f} GB are free"
                continue
        results[case] = result = measure_case(config, case, device, start, step)
        if isinstance(result, Measured):
            known = case, result
    return results


def measure_case(config: Config, case: Case, device: torch.device, start: Start, step: Step) -> Measured | str:
    """The result of one case, or `out of memory`."""
    changes = {"amp": case.amp, "image_size": case.image_size, "batch_size": case.micro_batch}
    config = config.changed(**changes, accumulate=_micro_batches(case, device))
    try:
        if device.type == "cuda":
            return run_steps(config, device, start, step)
        context = multiprocessing.get_context("forkserver")  # fresh processes, without seconds of imports for each
        context.set_forkserver_preload([name for name in sys.modules if name.startswith("dbnet.")])
        with ProcessPoolExecutor(1, context, _be_the_first_to_go) as pool:
            return pool.submit(run_steps, config, device, start, step).result()
    except BrokenProcessPool:
        return "out of memory: the system ended the process"
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return "out of memory"
    finally:
        free_memory()


def run_steps(config: Config, device: torch.device, start: Start, step: Step) -> Measured:
    """Some optimizer steps of config.batch_size x config.accumulate, measured. Raises what says out of memory."""
    keep_freed_memory()  # as training has it
    with suppress(OSError):  # the largest so far begins anew
        Path("/proc/self/clear_refs").write_text("5")
    before = resident_gb()["RssAnon"]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        torch.backends.cudnn.benchmark = config.pad == "square"
    batch = synthetic_batch(config)
    training = start(config, device, _OnlyPlan(config.batch_size, config.accumulate, config.image_size))

    def run(micro_batches: int) -> float:
        begun = time.perf_counter()
        step(training, [batch] * micro_batches, config, device)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - begun

    first = run(1)  # creates the optimizer's state and finds the fastest kernels
    seconds: list[float] = []
    while first < _STEP_SECONDS and len(seconds) < _TIMED_STEPS and sum(seconds) < _STEP_SECONDS:
        seconds.append(run(config.accumulate))
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device) / 1e9
    else:
        after = resident_gb()
        peak = after["VmHWM"] - after["RssFile"] - before
    if not seconds:
        return Measured(peak, config.batch_size / first, 0, 1)
    return Measured(
        peak, len(seconds) * (config.batch_size * config.accumulate) / sum(seconds), len(seconds), config.accumulate
    )


def synthetic_batch(config: Config) -> dict[str, Any]:
    """A batch of config.batch_size square images as the loader makes it: random pixels, the targets of 100 words."""
    side, count = config.image_size, config.batch_size
    across, down = _WORDS
    word = np.array([[0.1, 0.2], [0.9, 0.2], [0.9, 0.8], [0.1, 0.8]])  # of its cell in a grid over the image
    cells = [(column, row) for row in range(down) for column in range(across)]
    words = [(word + cell) * (side / across, side / down) for cell in cells]
    prob_map, thresh_levels = (torch.from_numpy(levels) for levels in draw_targets(words, side, side))
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
    """Memory of this process in RAM: RssAnon (its data) and RssFile (the code of its libraries) now, and VmHWM, the
    largest sum so far. Where the system tells the last alone, it stands for the first as well."""
    try:
        lines = [line.split() for line in Path("/proc/self/status").read_text().splitlines()]
        wanted = ("RssAnon:", "RssFile:", "VmHWM:")
        return {line[0].rstrip(":"): int(line[1]) * 1024 / 1e9 for line in lines if line[0] in wanted}
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9
        return {"RssAnon": peak, "RssFile": 0.0, "VmHWM": peak}


def free_host_gb() -> float:
    """Memory of the host that a process can still have; infinite where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 / 1e9 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return float("inf")


def _be_the_first_to_go() -> None:
    """Ask the system to end this process, and no other, when the host's memory runs out."""
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


def _micro_batches(case: Case, device: torch.device) -> int:
    """Micro-batches of a step that is measured."""
    return min(case.accumulate, _MICRO_BATCHES_ON_A_CPU) if device.type == "cpu" else case.accumulate


def _amp_in_force(config: Config, device: torch.device) -> str:
    return {None: "off", torch.float16: "fp16", torch.bfloat16: "bf16"}[pick_amp_dtype(config, device)]
