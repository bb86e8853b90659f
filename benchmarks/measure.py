"""What the benchmarks share: where the receipts are, how a time is taken, how a table is printed.

Machines differ and are noisy, so where `../shared/yardstick.py` is at hand, times are also given as multiples of its
fixed piece of work, which is measured in turn with them.
"""

import argparse
import importlib.util
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
import torchvision

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
sys.path.insert(0, str(ROOT))  # for `import dbnet` in the benchmarks, which import this module first


def parse_arguments(description: str, *flags: tuple[str, dict]) -> argparse.Namespace:
    """`--data DIR` and the benchmark's own flags; without --data, the real receipts, or rendered ones instead."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="data set (the real receipts if at hand, else rendered ones)")
    for flag, options in flags:
        parser.add_argument(flag, **options)
    args = parser.parse_args()
    if args.data is None:
        args.data = SHARED / "data" / "sroie"
        if not args.data.is_dir():
            from dbnet.synth.scene import write_dataset

            args.data = Path(tempfile.mkdtemp()) / "receipts"
            write_dataset(args.data, train=60, val=20, test=4, size=1024, seed=0)
    return args


def use_one_core() -> None:
    """Leave OpenCV and PyTorch one thread each."""
    cv2.setNumThreads(1)
    torch.set_num_threads(1)


def milliseconds(function: Callable[[], object], repeats: int = 7) -> float:
    """Median time of a call, after one that does not count."""
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def time_and_ratio(function: Callable[[], object], calls: int = 1, repeats: int = 9) -> tuple[str, str]:
    """Milliseconds of one of the `calls` that `function` consists of, and as a multiple of the yardstick."""
    yardstick = SHARED / "yardstick.py"
    took = f"{milliseconds(function, repeats) / calls:.2f}"
    if not yardstick.exists():
        return took, "-"
    spec = importlib.util.spec_from_file_location("yardstick", yardstick)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return took, f"{module.ratio(function, repeats) / calls:.3f}"


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A table in Markdown, ready for RESULTS.md."""
    print(f"\n{title}\n")
    cells = [list(map(str, row)) for row in (header, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    for number, row in enumerate(cells):
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |")
        if number == 0:
            print("|" + "|".join("-" * (width + 2) for width in widths) + "|")


def print_versions() -> None:
    """The machine and what runs on it."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} threads"
    print(
        f"{time.strftime('%Y-%m-%d')}: {device}; Python {platform.python_version()}, torch {torch.__version__}, "
        f"torchvision {torchvision.__version__}, OpenCV {cv2.__version__}, numpy {np.__version__}"
    )
