"""What each change from preset v0 to v1 is worth on real receipts, trained from scratch.

    python benchmarks/presets.py --data SROIE --out WORK [--epochs 5] [--seeds 2]

For each seed four trainings: v0, v0 with the loss weight of v1, v0 with its image size, and v1. They have the backbone
and the pyramid of `lite` and batches of 4, to be done on a CPU, and are the presets in all else. The weights of the
last epoch are scored on the validation images, with the box_thresh of v0 and that of v1. Goes on where it was cut;
each training takes up WORK/runs/NAME.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
from measure import ROOT, parse_arguments, print_table, print_versions

from dbnet.config import PRESETS

SMALL = ["--backbone", PRESETS["lite"].backbone, "--pyramid-channels", str(PRESETS["lite"].pyramid_channels)]
SMALL += ["--weights", "none", "--batch-size", "4", "--accumulate", "1"]
TRAININGS = {
    "v0": ["--preset", "v0"],
    "v0-weight7": ["--preset", "v0", "--prob-loss-weight", "7"],
    "v0-1024": ["--preset", "v0", "--image-size", "1024"],
    "v1": ["--preset", "v1"],
}
CHANGES = [  # what changes; the training and box_thresh before, and after
    ("box_thresh 0.3 -> 0.25", ("v0", 0.3), ("v0", 0.25)),
    ("box_thresh 0.3 -> 0.25, in v1", ("v1", 0.3), ("v1", 0.25)),
    ("prob_loss_weight 5 -> 7", ("v0", 0.3), ("v0-weight7", 0.3)),
    ("prob_loss_weight 5 -> 7, in v1", ("v0-1024", 0.25), ("v1", 0.25)),
    ("640 -> 1024 px", ("v0", 0.3), ("v0-1024", 0.3)),
    ("640 -> 1024 px, in v1", ("v0-weight7", 0.25), ("v1", 0.25)),
    ("all three: v0 -> v1", ("v0", 0.3), ("v1", 0.25)),
]
MEANS = ("precision", "recall", "hmean")


class Result(NamedTuple):
    """A training under a box_thresh."""

    scores: np.ndarray  # (seeds, images, 3) precision, recall and H-Mean by CLEval
    iou: float  # H-Mean by IoU, mean over the seeds


def main() -> None:
    flags = [("--out", {"type": Path, "required": True}), ("--epochs", {"type": int, "default": 5})]
    args = parse_arguments(__doc__, *flags, ("--seeds", {"type": int, "default": 2}))
    args.out.mkdir(parents=True, exist_ok=True)
    data = ["--data", str(args.data.resolve())]
    for seed in range(args.seeds):
        for name, changes in TRAININGS.items():
            run = ["--run", f"{name}-seed{seed}", "--resume", "--seed", str(seed), "--epochs", str(args.epochs)]
            call("train.py", [*changes, *SMALL, *data, *run], args.out)
    results = {(name, thresh): score(name, thresh, data, args) for name in TRAININGS for thresh in (0.3, 0.25)}
    print_versions()
    print_results(results, args.out)
    print_changes(results)


def call(script: str, words: list[str], folder: Path) -> None:
    """Run one of the scripts in `folder`, and end with it where it fails."""
    if status := subprocess.run([sys.executable, str(ROOT / script), *words], cwd=folder).returncode:
        sys.exit(status)


def score(name: str, thresh: float, data: list[str], args) -> Result:
    """The last epoch of a training, of each seed, on the validation images."""
    scores, ious = [], []
    for seed in range(args.seeds):
        file = f"{name}-seed{seed}-{thresh}.json"
        words = [f"runs/{name}-seed{seed}/last.pt", *data, "--box-thresh", str(thresh), "--json", file]
        call("evaluate.py", words, args.out)
        content = json.loads((args.out / file).read_text(encoding="utf-8"))
        scores.append([[image[mean] for mean in MEANS] for image in content["per_image"].values()])
        ious.append(content["iou"]["hmean"])
    return Result(np.array(scores), float(np.mean(ious)))


def print_results(results: dict[tuple[str, float], Result], out: Path) -> None:
    """Means over images and seeds, the H-Mean of each seed, and what a training took."""
    rows = []
    for (name, thresh), result in results.items():
        logs = [path.read_text(encoding="utf-8").splitlines() for path in out.glob(f"runs/{name}-seed*/log.jsonl")]
        epochs = [json.loads(line) for log in logs for line in log]
        rate = np.median([epoch["images_per_second"] for epoch in epochs])
        memory = max(epoch["peak_memory_gb"] for epoch in epochs)
        means = [f"{mean:.4f}" for mean in result.scores.mean(axis=(0, 1))]
        seeds = ", ".join(f"{mean:.4f}" for mean in result.scores[..., 2].mean(axis=1))
        rows.append((name, thresh, *means, seeds, f"{result.iou:.4f}", f"{rate:.2f}", f"{memory:.1f}"))
    header = ("training", "box_thresh", "precision", "recall", "H-Mean", "by seed", "by IoU", "images/s", "GB")
    print_table("Validation, last epoch, means over the seeds", header, rows)


def print_changes(results: dict[tuple[str, float], Result]) -> None:
    """Differences of means over images and seeds, with 95% intervals by resampling the images; recall by seed."""
    rng, rows = np.random.default_rng(0), []
    for title, before, after in CHANGES:
        change = results[after].scores - results[before].scores
        by_image = change.mean(axis=0)
        means = [by_image[rng.integers(len(by_image), size=len(by_image))].mean(axis=0) for _ in range(2000)]
        low, high = np.quantile(means, [0.025, 0.975], axis=0)
        cells = [
            f"{mean:+.4f} ({a:+.4f} to {b:+.4f})" for mean, a, b in zip(by_image.mean(axis=0), low, high, strict=True)
        ]
        rows.append((title, *cells, ", ".join(f"{mean:+.4f}" for mean in change[..., 1].mean(axis=1))))
    print_table("Changes", ("change", "precision", "recall", "H-Mean", "recall by seed"), rows)


if __name__ == "__main__":
    main()
