"""Detection on a CPU, ours beside other detectors: time and H-Mean on validation images, in turn, image by image.

    python benchmarks/inference.py [CKPT] [--data DIR] [--images 60] [--peers PYTHON] [--compiled]

Each detector runs in a process of its own (benchmarks/serve.py). PYTHON is that of an environment with
rapidocr-onnxruntime, rapidocr and openvino, and what requirements-onnx.txt lists; without it, the other detectors and
OpenVINO are left out. --compiled adds `--compile`, which takes a minute or two before its first image.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections import deque
from pathlib import Path
from statistics import mean, median

from measure import ROOT, milliseconds, parse_arguments, print_table, print_versions

from dbnet.checkpoint import load_model
from dbnet.dataset import TextDataset
from dbnet.ensemble import Ensemble
from dbnet.evaluation import evaluate
from dbnet.inference import Pipeline, find_weights, write_onnx
from dbnet.metric import score_image
from predict import default_checkpoint


class Server:
    """A detector in a process of its own, and what it has answered."""

    def __init__(self, python: str, kind: str, cores: int, *files: Path) -> None:
        command = [python, str(ROOT / "benchmarks" / "serve.py"), kind, str(cores), *map(str, files)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self.answers: list[dict] = []

    def ask(self, path: Path) -> bool:
        """Whether the detector is there and has answered on an image."""
        try:
            self.process.stdin.write(f"{path}\n")
            self.process.stdin.flush()
            self.answers.append(json.loads(self.process.stdout.readline()))
        except (OSError, ValueError):
            return False
        return True

    def ms(self, what: str, of=median) -> float:
        """Milliseconds of an image."""
        return 1e3 * of(answer[what] for answer in self.answers)


def main() -> None:
    flags = [
        ("checkpoint", {"nargs": "?", "type": Path}),
        ("--images", {"type": int, "default": 60}),
        ("--peers", {"metavar": "PYTHON"}),
        ("--compiled", {"action": "store_true"}),
    ]
    args = parse_arguments(__doc__, *flags)
    checkpoint = find_weights(args.checkpoint or default_checkpoint())
    model, config, _ = load_model(checkpoint, {"data": str(args.data), "device": "cpu", "tta": False})
    dataset = TextDataset(config, "val", train=False)
    del dataset.paths[args.images :], dataset.names[args.images :], dataset.annotations[args.images :]
    print_versions()
    print(f"{checkpoint}: {config.backbone}, {config.image_size} px; {len(dataset)} validation images")

    with tempfile.TemporaryDirectory() as folder:
        whole, half = Path(folder) / "whole.onnx", Path(folder) / "half.onnx"
        write_onnx(whole, model, config)
        write_onnx(half, model, config, half=True)
        kinds = [
            ("ours", sys.executable, "auto", checkpoint),
            ("ours, float32", sys.executable, "float32", checkpoint),
            ("ours, float32, PyTorch's own convolutions", sys.executable, "plain", checkpoint),
            ("exported, ONNX Runtime", sys.executable, "onnxruntime", whole),
            ("exported at half the size, ONNX Runtime", sys.executable, "onnxruntime", half),
        ]
        if args.compiled:
            kinds.insert(1, ("ours, compiled", sys.executable, "compiled", checkpoint))
        if args.peers:
            kinds += [
                ("exported, OpenVINO", args.peers, "openvino", whole),
                ("PP-OCRv4 mobile, RapidOCR", args.peers, "v4"),
                ("PP-OCRv6 small, RapidOCR", args.peers, "v6"),
            ]
        servers = {name: Server(python, kind, 1, *files) for name, python, kind, *files in kinds}
        take_turns(servers, dataset)
    print_table(
        "One thread, ms an image", ("detector", "median", "mean", "times ours", "H-Mean"), rows(servers, dataset)
    )
    compare_all_cores(args.peers, checkpoint, dataset)


def take_turns(servers: dict[str, Server], dataset: TextDataset) -> None:
    """Let every detector look at every image; those that cannot run here are left out."""
    for name, server in list(servers.items()):
        if not all(server.ask(path) for path in dataset.paths[:2]):  # these warm up
            print(f"{name}: not measured; it does not run here")
            del servers[name]
            continue
        server.answers.clear()
    for number, path in enumerate(dataset.paths):
        for server in list(servers.values())[:: 1 if number % 2 else -1]:
            if not server.ask(path):
                raise SystemExit(f"a detector has ended on {path}")
    for server in servers.values():
        server.process.stdin.close()
        server.process.wait()


def rows(servers: dict[str, Server], dataset: TextDataset) -> list[tuple]:
    """A row of the table for each detector."""
    ours = servers["ours"].ms("detect")
    table = []
    for name, server in servers.items():
        scores = [
            score_image(annotation.polygons, answer["polygons"], annotation.dont_care).hmean
            for annotation, answer in zip(dataset.annotations, server.answers, strict=True)
        ]
        middle, average = server.ms("detect"), server.ms("detect", mean)
        table.append((name, f"{middle:.1f}", f"{average:.1f}", f"{middle / ours:.2f}", f"{mean(scores):.4f}"))
    return table


def compare_all_cores(peers: str | None, checkpoint: Path, dataset: TextDataset) -> None:
    """Everything from the file to the polygons, on all cores: our pipeline, and with the metric, beside the others'."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    network = Ensemble.load([checkpoint], {"data": dataset.config.data, "device": "cpu", "tta": False})
    pipeline = Pipeline(dataset, network.config, network.device)
    score = evaluate(pipeline, network).compute().hmean  # warms up
    took = {
        "ours": milliseconds(lambda: deque(pipeline.detect(network), 0), 5) / len(dataset),
        "ours, with the metric": milliseconds(lambda: evaluate(pipeline, network).compute(), 3) / len(dataset),
    }
    ours = took["ours"]
    table = [(name, f"{ms:.1f}", f"{ms / ours:.2f}", f"{score:.4f}") for name, ms in took.items()]
    if peers:
        servers = {"PP-OCRv4 mobile, RapidOCR": Server(peers, "v4", cores)}
        take_turns(servers, dataset)
        table += [
            (name, f"{(ms := server.ms('all', mean)):.1f}", f"{ms / ours:.2f}", "") for name, server in servers.items()
        ]
    print_table(f"{cores} cores, everything, mean ms an image", ("what", "ms", "times ours", "H-Mean"), table)


if __name__ == "__main__":
    main()
