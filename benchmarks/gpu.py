"""Everything that is to be measured on a GPU, in about half an hour: in stages that go on where they were cut.

    python benchmarks/gpu.py --out gpu-results                      nine minutes of it; again until it says "complete"
    python benchmarks/gpu.py --out gpu-results --stages steps       one stage
    python benchmarks/gpu.py --out tried --image-size 64 --steps 1 --images 3 --epochs 1      a trial on a CPU

Stages: tests (those with a CUDA variant), sync (no step waits for the device), steps (rates and memory of the presets),
fallback (with real memory limits), train (v0, v1 and lite in full), rates (evaluate.py and predict.py), trace (v1).

OUT/results.jsonl has a line for each measurement, written as soon as it is made; OUT/tables.md the tables;
OUT/*.log what the commands printed; OUT/trace.json.gz is a trace. A measurement that fails is recorded with
its error and not repeated: delete its line to repeat it.
"""

import argparse
import gc
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measure import ROOT, parse_arguments, print_versions
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import train
from dbnet.config import Config
from dbnet.dataset import Batches, TextDataset, count_workers, make_loader
from dbnet.device import pick_amp_dtype, pick_device
from dbnet.model import DBNet
from dbnet.training import Training

# Name in the device's name: dense TFLOP/s at 16 bits and TF32 as on the data sheet, at 16 bits as measured, TB/s.
DEVICES = {"H200": (989, 494, 790, 4.8), "H100": (989, 494, 790, 3.35), "A100": (312, 156, 250, 2.0)}
STEPS = {  # of the stage steps: what is measured of each preset, most important first
    "v1": ("bf16", "fp16", "bf16 compiled", "off", "fp16 compiled"),
    "v0": ("bf16", "fp16", "bf16 compiled", "off"),
    "lite": ("bf16", "bf16 compiled"),
    "v3": ("bf16",),
    "v2": ("bf16",),
    "best": ("bf16",),
}
MAX_SECONDS = 15.0  # of one timing, which then has fewer steps
MEMORY_SHARES = (0.9, 0.5, 0.3, 0.2, 0.15, 0.1)
COMPETITION_IMAGES = 3272
TESTS = ["-k", "cuda", "-q", "-rs", "-p", "no:cacheprovider", "tests"]


def main() -> None:
    args = parse_arguments(
        __doc__,
        ("--out", {"type": Path, "default": Path("gpu-results"), "help": "folder of the results (gpu-results)"}),
        ("--stages", {"nargs": "+", "choices": tuple(STAGES), "default": list(STAGES)}),
        ("--minutes", {"type": float, "default": 8.0, "help": "after which nothing new begins (8)"}),
        ("--steps", {"type": int, "default": 200, "help": "steps that are timed (200)"}),
        ("--images", {"type": int, "default": 600, "help": "images that predict.py is timed on (600)"}),
        ("--epochs", {"type": int, "default": 0, "help": "of the trainings, in place of the preset's"}),
        ("--image-size", {"type": int, "default": 0, "help": "in place of the preset's"}),
    )
    args.out.mkdir(parents=True, exist_ok=True)
    args.data = args.data.resolve()
    args.deadline = time.monotonic() + 60 * args.minutes
    device = pick_device("auto")
    print_versions()
    results = Results(args.out / "results.jsonl")
    for stage in args.stages:
        for name, measure in STAGES[stage](args, device):
            if time.monotonic() > args.deadline:
                print("time is up: the same command goes on from here")
                return
            results.take(f"{stage}: {name}", measure)
    (args.out / "tables.md").write_text(results.tables())
    print(f"{args.out / 'tables.md'}\ncomplete")


class Results:
    """Measurements by name in a file of JSON lines, the last line of a name holds."""

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self.rows: dict[str, dict[str, Any]] = {row.pop("name"): row for row in map(json.loads, lines)}

    def take(self, name: str, measure: Callable[[], dict[str, Any]]) -> None:
        """Make a measurement unless it is there, and keep what it gives or how it fails.

        One that the process ended in (it was cut, or the measurement has killed it) is tried once more.
        """
        before = self.rows.get(name, {})
        if before and not before.get("unfinished") and before.get("tries") != 1:
            return
        begin = time.monotonic()
        self._keep(name, {"error": "the process ended in it", "tries": before.get("tries", 0) + 1})
        try:
            result = measure()
        except Exception as error:
            traceback.print_exc()
            result = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        self._keep(name, result | {"took": round(time.monotonic() - begin, 1)})
        print(f"{name}: {self.rows[name]}", flush=True)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _keep(self, name: str, row: dict[str, Any]) -> None:
        self.rows[name] = row
        with self.path.open("a") as file:
            file.write(json.dumps({"name": name} | row) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def tables(self) -> str:
        """A table in Markdown for each stage, one row a measurement."""
        text = ""
        for stage in STAGES:
            rows = {name.split(": ", 1)[1]: row for name, row in self.rows.items() if name.startswith(f"{stage}: ")}
            columns = list(dict.fromkeys(column for row in rows.values() for column in row))
            text += f"\n## {stage}\n\n| measured | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}\n"
            for name, row in rows.items():
                text += f"| {name} | {' | '.join(str(row.get(column, '')) for column in columns)} |\n"
        return text


Measurements = Iterator[tuple[str, Callable[[], dict[str, Any]]]]


def tests(args: argparse.Namespace, device: torch.device) -> Measurements:
    yield "with a CUDA variant", partial(run, args, "pytest", [sys.executable, "-m", "pytest", *TESTS], ROOT)


def sync(args: argparse.Namespace, device: torch.device) -> Measurements:
    for amp in ("fp16", "bf16"):
        yield amp, partial(step_without_sync, settings(args, "v1", amp), device)


def steps(args: argparse.Namespace, device: torch.device) -> Measurements:
    ways = [(preset, how) for preset, all_ways in STEPS.items() for how in all_ways]
    for preset, how in sorted(ways, key=lambda way: STEPS[way[0]].index(way[1])):
        if device.type == "cpu" and how != "bf16":
            continue  # a trial need not take an hour
        yield f"{preset} {how}", partial(measure_steps, args, preset, how, device)


def fallback(args: argparse.Namespace, device: torch.device) -> Measurements:
    for amp in ("bf16", "fp16"):
        for share in MEMORY_SHARES if device.type == "cuda" else ():
            yield f"v1 {amp}, {share} of the memory", partial(fall_back, settings(args, "v1", amp), share, device)


def trainings(args: argparse.Namespace, device: torch.device) -> Measurements:
    for preset in ("v1", "v0", "lite"):
        yield preset, partial(train_in_full, args, preset)


def rates(args: argparse.Namespace, device: torch.device) -> Measurements:
    for preset in ("v1", "v0", "lite"):
        yield f"predict.py {preset}", partial(rate, args, preset, ["predict.py", "--out", "found.csv", "--images"])
        yield f"evaluate.py {preset}", partial(rate, args, preset, ["evaluate.py", "--data", str(args.data)])


def trace(args: argparse.Namespace, device: torch.device) -> Measurements:
    yield "v1 bf16", partial(trace_steps, args, settings(args, "v1", "bf16"), device)


STAGES = {
    "tests": tests,
    "sync": sync,
    "steps": steps,
    "train": trainings,
    "rates": rates,
    "fallback": fallback,
    "trace": trace,
}


def settings(args: argparse.Namespace, preset: str, amp: str) -> Config:
    """The preset from scratch, as the flags change it."""
    size = {"image_size": args.image_size, "train_sizes": ()} if args.image_size else {}
    return Config.from_preset(preset, weights="none", amp=amp, data=str(args.data), **size)


def begin(config: Config, device: torch.device) -> Training:
    """A training before its first step."""
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = config.pad == "square"
    return Training(DBNet(config), config, device)


def endless_groups(config: Config, device: torch.device) -> Iterator[list[dict[str, Any]]]:
    """The batches of one optimizer step after the other, epoch after epoch, from a loader as train.py has it."""
    batches = Batches(TextDataset(config, "train", train=True), config.batch_size, config.seed)
    loader = make_loader(batches, count_workers(config), device.type == "cuda")
    group = []
    while True:
        for batch in loader:
            group.append(batch)
            if len(group) == config.accumulate:
                yield group
                group = []
        batches.epoch += 1


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_a_step(work: Callable[[], object], count: int, device: torch.device) -> float:
    """Mean over `count` calls, or as many as fit into MAX_SECONDS, after a tenth of them (at least two) to warm up."""
    for _ in range(max(2, count // 10)):
        work()
    wait_for(device)
    begun = time.perf_counter()
    for number in range(1, count + 1):
        work()
        if number % 10 == 0:  # so that launching ahead of the device does not look like speed
            wait_for(device)
            if time.perf_counter() - begun > MAX_SECONDS:
                break
    wait_for(device)
    return (time.perf_counter() - begun) / number


def measure_steps(args: argparse.Namespace, preset: str, how: str, device: torch.device) -> dict[str, Any]:
    """Images a second with samples in memory and from files, peak memory, and what counting predicts."""
    amp, _, compiled = how.partition(" ")
    config = settings(args, preset, amp).changed(compile=bool(compiled))
    training = begin(config, device)
    groups = endless_groups(config, device)
    in_memory = next(groups)
    images = sum(len(batch["image"]) for batch in in_memory)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    train.optimizer_step(training, in_memory, config)
    wait_for(device)
    first = time.perf_counter() - started
    ready = seconds_a_step(lambda: train.optimizer_step(training, in_memory, config), args.steps, device)
    row: dict[str, Any] = {"first step s": round(first, 1), "ms a step": round(1e3 * ready, 1)}
    row["images/s"] = round(images / ready, 1)
    if amp == "bf16":
        whole = seconds_a_step(lambda: train.optimizer_step(training, next(groups), config), args.steps, device)
        row["images/s with data"] = round(images / whole, 1)
        row["20 epochs min"] = round(20 * COMPETITION_IMAGES * whole / images / 60, 1)
    if device.type == "cuda":
        row["peak GB"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
        row["reserved GB"] = round(torch.cuda.max_memory_reserved() / 1e9, 2)
    return row | predict_step(config, device, images, ready)


class Traffic(TorchDispatchMode):
    """Bytes that the operations inside it read and write, each as if alone."""

    bytes = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        if not operation.is_view:
            for each in torch.utils._pytree.tree_leaves((args, kwargs, result)):
                self.bytes += each.nbytes if isinstance(each, torch.Tensor) else 0
        return result


def predict_step(config: Config, device: torch.device, images: int, seconds: float) -> dict[str, Any]:
    """What a step costs by counting, on a network without numbers, and the share of the device's rate that was used."""
    bits16 = pick_amp_dtype(config, device) is not None
    model = DBNet(config).to("meta").train()
    if bits16:
        model.to(torch.bfloat16)
    pixels = torch.zeros(2, config.image_size, config.image_size, 3, dtype=torch.uint8, device="meta")
    with FlopCounterMode(display=False) as counter, Traffic() as traffic:
        features = model.pyramid(model.backbone(pixels.permute(0, 3, 1, 2).to(next(model.parameters()).dtype)))
        (model.prob_branch(features).sum() + model.thresh_branch(features).sum()).backward()
    flop, moved = counter.get_total_flops() * images / 2, traffic.bytes * images / 2
    row = {"TFLOP a step": round(flop / 1e12, 2), "GB a step": round(moved / 1e9, 1)}
    name = torch.cuda.get_device_name() if device.type == "cuda" else ""
    known = next((rates for part, rates in DEVICES.items() if part in name), None)
    if known:
        sheet, tf32, measured, bandwidth = known
        best = 1e12 * (measured if bits16 else tf32)
        row["predicted ms"] = round(1e3 * (flop / best + moved / 1e12 / bandwidth), 1)
        row["% of measured rate"] = round(100 * flop / seconds / best, 1)
        row["% of data sheet"] = round(100 * flop / seconds / (1e12 * (sheet if bits16 else tf32)), 1)
    return row


def step_without_sync(config: Config, device: torch.device) -> dict[str, Any]:
    """Three steps, the last two in the mode in which CUDA raises where the host waits for the device."""
    training, group = begin(config, device), next(endless_groups(config, device))
    for number in range(3):
        if number and device.type == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        try:
            losses, _ = train.optimizer_step(training, group, config)
        finally:
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
    return {"waits": "none", "loss": round(float(losses[0]), 3)}


def fall_back(config: Config, share: float, device: torch.device) -> dict[str, Any]:
    """Three steps within a share of the GPU's memory, against three that start at the plan which that led to."""
    groups = endless_groups(config, device)
    samples = [next(groups) for _ in range(3)]
    torch.cuda.set_per_process_memory_fraction(share)
    try:
        limited = begin(config, device)
        for group in samples:
            train.optimizer_step(limited, group, config)
        plan = limited.plan
    except Exception as error:
        return {"ended": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    weights = {name: tensor.cpu() for name, tensor in limited.model.state_dict().items()}
    row = {"plan": f"{plan.in_force} at {plan.image_size} px", "fallbacks": len(plan.fallbacks)}
    del limited
    torch.cuda.empty_cache()
    small = begin(config, device)
    small.plan = plan
    for group in samples:
        train.optimizer_step(small, group, config)
    moved = max(
        float((tensor.cpu().double() - weights[name].double()).abs().max())
        for name, tensor in small.model.state_dict().items()
    )
    return row | {"largest difference of a weight": f"{moved:.1e}"}


def run(args: argparse.Namespace, name: str, command: list[str], cwd: Path) -> dict[str, Any]:
    """Run a command with its output in a log, and stop it (SIGTERM, so that it saves) when the time is up."""
    begun = time.monotonic()
    with (args.out / f"{name}.log").open("a") as log:
        process = subprocess.Popen(command, cwd=cwd, stdout=log, stderr=subprocess.STDOUT)
        try:
            process.wait(max(20.0, args.deadline - begun))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)
            process.wait(60)
            return {"unfinished": True}
    last = [line for line in (args.out / f"{name}.log").read_text(errors="replace").splitlines() if line.strip()][-1:]
    return {"status": process.returncode, "seconds": round(time.monotonic() - begun, 1), "last line": " ".join(last)}


def train_in_full(args: argparse.Namespace, preset: str) -> dict[str, Any]:
    """A whole run on the receipts, from scratch: its best epoch."""
    words = ["--preset", preset, "--weights", "none", "--data", str(args.data), "--run", preset, "--resume"]
    words += ["--epochs", str(args.epochs)] if args.epochs else []
    words += ["--image-size", str(args.image_size)] if args.image_size else []
    row = run(args, f"train-{preset}", [sys.executable, str(ROOT / "train.py"), *words], args.out)
    if row.get("unfinished") or row["status"]:
        return row
    epochs = [json.loads(line) for line in (args.out / "runs" / preset / "log.jsonl").read_text().splitlines()]
    best = max(epochs, key=lambda epoch: epoch["hmean"])
    rate = sum(epoch["images_per_second"] for epoch in epochs) / len(epochs)
    return {
        **{name: round(best[name], 4) for name in ("precision", "recall", "hmean")},
        "best epoch": best["epoch"],
        "epochs": len(epochs),
        "images/s": round(rate, 1),
        "peak GB": round(max(epoch["peak_memory_gb"] for epoch in epochs), 2),
        "minutes": round(sum(epoch["train_seconds"] for epoch in epochs) / 60, 2),
    }


def rate(args: argparse.Namespace, preset: str, words: list[str]) -> dict[str, Any]:
    """Images a second of a command with the weights of the stage train: the time for many less that for one."""
    checkpoint = Path("runs") / preset / "best.pt"
    if not (args.out / checkpoint).exists():
        return {"error": f"{checkpoint}: not trained yet"}
    script, *rest = words
    command = [sys.executable, str(ROOT / script), str(checkpoint), *rest]
    if script == "evaluate.py":
        row = run(args, f"{script}-{preset}", command, args.out)
        text = (args.out / f"{script}-{preset}.log").read_text()
        return row | {"table": [line for line in text.splitlines() if "H-Mean" in line][:1]}
    seconds = []
    for count in (1, args.images):
        images = (args.out / f"images-{count}").resolve()
        images.mkdir(exist_ok=True)
        receipts = sorted((args.data / "images" / "train").iterdir())
        for number in range(count):
            link = images / f"{number}{receipts[number % len(receipts)].suffix}"
            if not link.is_symlink():
                link.symlink_to(receipts[number % len(receipts)])
        (args.out / "found.csv").unlink(missing_ok=True)
        row = run(args, f"{script}-{preset}", [*command, str(images)], args.out)
        if row.get("unfinished") or row["status"]:
            return row
        seconds.append(row["seconds"])
    more = seconds[1] - seconds[0]
    return {"images/s": round((args.images - 1) / more, 1) if more > 0 else "too few images", "start s": seconds[0]}


def trace_steps(args: argparse.Namespace, config: Config, device: torch.device) -> dict[str, Any]:
    """Five steps with the data path under the profiler: a trace, and the operations that take longest."""
    from torch.profiler import ProfilerActivity, profile

    training, groups = begin(config, device), endless_groups(config, device)
    for _ in range(3):
        train.optimizer_step(training, next(groups), config)
    wait_for(device)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as profiler:
        for _ in range(5):
            train.optimizer_step(training, next(groups), config)
        wait_for(device)
    profiler.export_chrome_trace(str(args.out / "trace.json.gz"))
    order = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    table = profiler.key_averages().table(sort_by=order, row_limit=40, max_name_column_width=60)
    (args.out / "trace.txt").write_text(table)
    return {"table": "trace.txt"}


if __name__ == "__main__":
    main()
