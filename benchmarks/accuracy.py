"""H-Mean of weights and of other detectors' submissions on every validation set, as a table.

    python benchmarks/accuracy.py DATA WORK weights/lite.pt [--peer NAME=FOLDER ...] [--words]

DATA is the folder of data sets that benchmarks/weights.py takes, and WORK keeps what is made of them: SROIE inverted,
turned by quarters and in bad light, and rendered receipts. FOLDER holds submissions of another detector as SET.csv.
With `--words` the sets are those that label words. Each cell: H-Mean by CLEval (by IoU).
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import cv2
import numpy as np

from weights import ROOT, Sample, in_bad_light, read, render, write

LINES = ("sroie", "wildreceipt", "doclaynet", "tapus", "fondue", "icdar2015")


def changed(folder: Path, source: Path, change: Callable[[np.ndarray], np.ndarray], turns: int = 0) -> Path:
    """A copy of a validation set whose images are changed, and then turned clockwise by quarters; made once."""
    if not (folder / "jsons" / "val.json").exists():
        write(
            folder,
            (turned(sample._replace(image=change(sample.image)), turns) for sample in read(source, "val")),
            "val",
        )
    return folder


def turned(sample: Sample, turns: int) -> Sample:
    """The sample turned clockwise by quarters; each polygon still starts at its word's upper left corner."""
    image, words = sample
    for _ in range(turns):
        height = len(image)
        image = cv2.rotate(image, cv2.ROTATE_90_CLOCKWISE)
        words = [
            word._replace(points=np.stack([height - word.points[:, 1], word.points[:, 0]], axis=1)) for word in words
        ]
    return Sample(image, words)


def same(image: np.ndarray) -> np.ndarray:
    return image


def line_sets(data: Path, work: Path) -> Iterator[tuple[str, Path]]:
    """Names and folders of the sets that label lines."""
    yield from ((name, data / name) for name in LINES)
    yield "sroie, inverted", changed(work / "sroie-inverted", data / "sroie", lambda image: 255 - image)
    for turns in (1, 2, 3):
        yield f"sroie, turned by {90 * turns}", changed(work / f"sroie-{90 * turns}", data / "sroie", same, turns)
    for name, (grain, blur, contrast) in {"dim": (6, 0.7, 0.65), "dimmer": (12, 1.2, 0.5)}.items():
        light = partial(in_bad_light, seed=0, grain=grain, blur=blur, contrast=contrast)
        yield f"sroie, {name}", changed(work / f"sroie-{name}", data / "sroie", light)
    yield "rendered, Korean and English", render(work / "rendered-lines", 400, 30, 7, "--lines")


def word_sets(data: Path, work: Path) -> Iterator[tuple[str, Path]]:
    """Names and folders of the sets that label words."""
    yield "doclaynet, words", work / "doclaynet-words"
    yield "icdar2015", data / "icdar2015"
    yield "rendered, words", render(work / "rendered-words", 260, 30, 11)


def score(words: list[str], folder: Path) -> str:
    """H-Mean by CLEval, and by IoU, as evaluate.py gives them for the validation images of a folder."""
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "scores.json"
        command = [sys.executable, str(ROOT / "evaluate.py"), *words, "--data", str(folder), "--split", "val"]
        done = subprocess.run([*command, "--json", str(path)], capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr)
        total = json.loads(path.read_text(encoding="utf-8"))
    return f"{total['hmean']:.4f} ({total['iou']['hmean']:.4f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("checkpoints", nargs="*")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--words", action="store_true", help="score against the sets that label words")
    args = parser.parse_args()
    peers = dict(peer.split("=", 1) for peer in args.peer)
    columns = [*args.checkpoints, *peers]
    print("| validation set |", " | ".join(columns), "|")
    print("|---" * (len(columns) + 1) + "|")
    for name, folder in (word_sets if args.words else line_sets)(args.data.resolve(), args.work.resolve()):
        cells = [score([checkpoint], folder) for checkpoint in args.checkpoints]
        for submissions in map(Path, peers.values()):
            path = submissions / f"{folder.name}.csv"
            cells.append(score(["--submission", str(path)], folder) if path.exists() else "-")
        print(f"| {name} |", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    main()
