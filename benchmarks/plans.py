"""Memory and speed of a preset on this device, before a long run.

    python benchmarks/plans.py --preset v1 [--data DIR] [--FIELD VALUE ...]      flags as of train.py

Real optimizer steps on synthetic batches, for each plan of the fallback (`dbnet.memory`): 8 x 2, 4 x 4, 2 x 8 and
1 x 16 at 1024, 896 and 800 px, each printed once it is measured: Ctrl-C leaves out the rest.
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

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `import dbnet` and `import train`

import train
from dbnet.config import PRESETS, ArgumentParser, Config
from dbnet.dataset import Batch
from dbnet.device import keep_freed_memory, peak_memory, pick_amp_dtype, pick_device
from dbnet.errors import is_out_of_memory, run_script
from dbnet.memory import SMALLER_SIZES, BatchPlan, free_memory
from dbnet.model import DBNet
from dbnet.splits import data_folders, read_split
from dbnet.training import Training

Step = Callable[[Training, list[Batch], Config], object]

COMPETITION_IMAGES = 3272  # of its training split, for the hours where there is no data set yet
_CASE_SECONDS = 10.0  # no further step of a case begins later


class _OnlyPlan(BatchPlan):
    def shrink(self) -> None:
        raise MemoryError(f"{self.in_force} does not fit")  # here, that is a result


def main() -> None:
    parser = ArgumentParser(__doc__)
    parser.add_argument("--preset", choices=PRESETS, default="v1", help="configuration to measure (v1)")
    parser.add_config_flags()
    args, changes = parser.parse()
    print_plans(args.preset, Config.from_preset(args.preset, **changes))


def print_plans(preset: str, config: Config, step: Step = train.optimizer_step) -> None:
    """Measure each plan and print its row. Raises UserError without such a device or for a broken data set."""
    device = pick_device(config.device)
    is_gpu, images, source = device.type == "cuda", COMPETITION_IMAGES, f"the competition's; there is no {config.data}"
    if all(folder.exists() for folder in data_folders(config.data)):
        images, source = len(read_split(config.data, "train").images), config.data
    name = torch.cuda.get_device_name(device) if is_gpu else f"CPU, {torch.get_num_threads()} threads"
    dtype = str(pick_amp_dtype(config, device) or torch.float32).removeprefix("torch.")
    print(f"{preset} on {name}: {config.backbone}, {dtype}, torch {torch.__version__}")
    row = "{:>7}  {:>6}  {:>7}  {:>8}  {}".format
    print(row("image", "batch", "peak GB", "images/s", f"{config.epochs} epochs"))
    for case in fallback_cases(config):
        memory, speed, taken = "-", "-", "out of memory"
        try:
            peak, images_per_second = measure_case(case, device, step)
            hours = config.epochs * images / images_per_second / 3600
            taken = f"{hours:.1f} h" if hours >= 1 else f"{60 * hours:.1f} min"
            memory, speed = f"{peak:.2f}", f"{images_per_second:.3g}"
        except (RuntimeError, MemoryError) as error:  # BrokenProcessPool: the system has ended the process
            if not isinstance(error, BrokenProcessPool) and not is_out_of_memory(error):
                raise
        free_memory()
        print(row(f"{case.image_size} px", f"{case.batch_size} x {case.accumulate}", memory, speed, taken), flush=True)
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


def measure_case(case: Config, device: torch.device, step: Step) -> tuple[float, float]:
    """`run_steps` of a case; on a CPU, in a process of its own."""
    case = case.changed(effective_batch=0, weights="none")
    if device.type == "cuda":
        return run_steps(case, device, step)
    case = case.changed(accumulate=min(case.accumulate, 2))  # 2 reach the peak
    context = multiprocessing.get_context("forkserver" if sys.platform != "win32" else "spawn")
    context.set_forkserver_preload([name for name in sys.modules if name.startswith("dbnet.")])
    with ProcessPoolExecutor(1, context) as pool:
        return pool.submit(run_steps, case, device, step).result()


def run_steps(config: Config, device: torch.device, step: Step) -> tuple[float, float]:
    """Peak memory in GB (on a CPU, growth of the process) and images/s of optimizer steps whose batches are ready."""
    keep_freed_memory()  # as training has it
    before = 0.0 if device.type == "cuda" else peak_memory(device)
    if device.type == "cpu":
        with suppress(OSError):  # when the host's memory runs out, the system ends this process and no other
            Path("/proc/self/oom_score_adj").write_text("1000")
    batches = [synthetic_batch(config)] * config.accumulate
    plan = _OnlyPlan(config.batch_size, config.accumulate, config.image_size)
    training = Training(DBNet(config), config, device, plan)
    training.begin_epoch(config)
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
    text = (torch.arange(side) % 32 < 8).to(torch.uint8).repeat(count, side, 1)
    return {
        "image": torch.randint(0, 256, (count, side, side, 3), dtype=torch.uint8),
        "prob_map": text,
        "thresh_levels": 255 * text,
        "mask": torch.ones_like(text),
        "side": torch.full((count,), side),
    }


if __name__ == "__main__":
    run_script(main)
