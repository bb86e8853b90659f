"""Train the shipped weights: one command for each file, hours on a CPU.

    python benchmarks/weights.py lines DATA WORK           writes WORK/lite.pt
    python benchmarks/weights.py words DATA WORK           writes WORK/lite-words.pt

DATA has the folders sroie, doclaynet, tapus, fondue and icdar2015; weights/README.md names their sources. WORK keeps
the data sets that are made of them, which a second call finds again, and the runs. Fonts: fonts-nanum.

What is made, and why:

    rendered        receipts in English and Korean, with lines, or words, as labels
    dark            inverted pages, and light print on dark
    dull            pages and photographs in bad light: less contrast and sharpness, grain
    scenes          street photographs with more text printed on them, in all fonts that are installed
    street          street photographs beside a page: in the loss, an image has negative pixels in proportion to its
                    positive ones, so a photograph with little text alone would teach little
    sparse          pieces of pages on large empty paper with specks, rules and rows of asterisks
"""

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from measure import ROOT
from PIL import Image, ImageDraw, ImageFont

FONTS = tuple(
    f"/usr/share/fonts/truetype/nanum/{name}.ttf"  # of the package fonts-nanum
    for name in ("NanumGothic", "NanumBarunGothic", "NanumGothicCoding", "NanumMyeongjo")
)
TRAINING = (
    "--preset lite --batch-size 1 --accumulate 2 --lr 5e-4 --min-lr 5e-6 --warmup-epochs 0.2 --ema 0.999 "
    "--freeze-batch-norm true --rotate 3 --rotate90-p 0.1"
)


class Word(NamedTuple):
    """A labelled word or line."""

    points: np.ndarray  # (n, 2) in pixels
    dont_care: bool
    text: str = ""


class Sample(NamedTuple):
    """An image and its labels."""

    image: np.ndarray  # (height, width, 3) uint8, BGR
    words: list[Word]


def read(folder: Path, split: str = "train") -> Iterator[Sample]:
    """The samples of a folder in the competition's format."""
    entries = json.loads((folder / "jsons" / f"{split}.json").read_text(encoding="utf-8"))["images"]
    for name, entry in entries.items():
        image = cv2.imread(str(folder / "images" / split / name))
        words = [
            Word(np.array(word["points"], float), _is_dont_care(word), word.get("transcription") or "")
            for word in entry["words"].values()
        ]
        yield Sample(image, words)


def _is_dont_care(word: dict) -> bool:
    return bool(word.get("illegibility")) or word.get("transcription") == "###"


def write(folder: Path, samples: Iterator[Sample], split: str = "train") -> None:
    """Write a folder in the competition's format; the json comes last, so that an interrupted call is no data set."""
    (folder / "images" / split).mkdir(parents=True, exist_ok=True)
    (folder / "jsons").mkdir(exist_ok=True)
    entries = {}
    for number, sample in enumerate(samples):
        name = f"{number:04d}.jpg"
        cv2.imwrite(str(folder / "images" / split / name), sample.image, [cv2.IMWRITE_JPEG_QUALITY, 93])
        entries[name] = {
            "words": {
                str(index): {"points": word.points.round(1).tolist(), "illegibility": bool(word.dont_care)}
                for index, word in enumerate(sample.words)
            }
        }
    (folder / "jsons" / f"{split}.json").write_text(json.dumps({"images": entries}), encoding="utf-8")


# ---- changes of one sample


def darken(sample: Sample, rng: np.random.Generator) -> Sample:
    """Inverts the image, or prints its grey levels in a light colour on a dark one."""
    if rng.random() < 0.5:
        return sample._replace(image=255 - sample.image)
    share = (255 - cv2.cvtColor(sample.image, cv2.COLOR_BGR2GRAY)).astype(np.float32)[..., None] / 255
    paper = rng.uniform(0, 110, 3)
    ink = paper + rng.uniform(80, 200) + rng.uniform(-40, 40, 3)
    return sample._replace(image=np.clip(paper + share * (ink - paper), 0, 255).astype(np.uint8))


def in_bad_light(
    image: np.ndarray, seed: int | np.random.Generator, grain: float, blur: float, contrast: float, light: float = 40
) -> np.ndarray:
    """A photograph with little light: less contrast, blur and grain in grey levels, as wide as at 800 px."""
    height, width = image.shape[:2]
    scale = 800 / max(height, width)
    noise = np.random.default_rng(seed).normal(0, grain, (round(scale * height), round(scale * width)))
    blurred = cv2.GaussianBlur(contrast * image.astype(np.float32) + light, (0, 0), blur / scale)
    return np.clip(blurred + cv2.resize(noise, (width, height))[..., None], 0, 255).astype(np.uint8)


def dull(sample: Sample, rng: np.random.Generator) -> Sample:
    """The image in light that is more or less bad."""
    bad = rng.random()
    grain, blur, contrast = 3 + 13 * bad, rng.uniform(0.3, 1.4), rng.uniform(0.35, 0.9)
    image = in_bad_light(sample.image, rng, grain, blur, contrast, rng.uniform(0, 255 * (1 - contrast)))
    if rng.random() < 0.3:
        image = shaken(image, rng, max(image.shape) / 100)
    return sample._replace(image=image)


def shaken(image: np.ndarray, rng: np.random.Generator, longest: float) -> np.ndarray:
    """An image of a camera that moved, by up to so many pixels in any direction."""
    way, angle = rng.uniform(1, longest), rng.uniform(0, np.pi)
    half = int(way / 2) + 1
    kernel = np.zeros((2 * half + 1, 2 * half + 1), np.float32)
    end = np.array([np.cos(angle), np.sin(angle)]) * way / 2
    cv2.line(kernel, *(tuple((half + each).round().astype(int).tolist()) for each in (-end, end)), 1.0)
    return cv2.filter2D(image, -1, kernel / kernel.sum(), borderType=cv2.BORDER_REPLICATE)


# ---- compositions of several samples


def zoom(sample: Sample, factor: float) -> Sample:
    """Scales an image and its labels."""
    way = cv2.INTER_AREA if factor < 1 else cv2.INTER_LINEAR
    image = cv2.resize(sample.image, None, fx=factor, fy=factor, interpolation=way)
    return Sample(image, [word._replace(points=word.points * factor) for word in sample.words])


def crop(sample: Sample, x: int, y: int, width: int, height: int) -> Sample:
    """A part of an image; words that its edge cuts are don't care."""
    image, words = sample.image[y : y + height, x : x + width], []
    for word in sample.words:
        moved = word.points - (x, y)
        inside = np.clip(moved, 0, image.shape[1::-1])
        if np.ptp(inside, axis=0).min() >= 1:
            words.append(word._replace(points=inside, dont_care=word.dont_care or np.abs(inside - moved).max() > 2))
    return Sample(image, words)


def paste(canvas: Sample, sample: Sample, x: int, y: int) -> None:
    """Put an image and its labels on a larger one."""
    height, width = sample.image.shape[:2]
    canvas.image[y : y + height, x : x + width] = sample.image
    offset = np.array([x, y])
    canvas.words.extend(word._replace(points=word.points + offset) for word in sample.words)


def street(rng: np.random.Generator, pages: list[Sample], photos: list[Sample]) -> Sample:
    """A page, and beside it a column of street photographs."""
    page = pages[rng.integers(len(pages))]
    page = zoom(page, 1224 / len(page.image) * rng.uniform(0.8, 1.0))
    if rng.random() < 0.25:
        page = page._replace(image=255 - page.image)
    height, width = page.image.shape[:2]
    tall, wide = max(height, 1224), int(rng.integers(380, 620))
    canvas = Sample(np.zeros((tall, width + wide, 3), np.uint8), [])
    canvas.image[:] = rng.integers(0, 256, 3)
    on_left = rng.random() < 0.5
    paste(canvas, page, 0 if on_left else wide, int(rng.integers(0, tall - height + 1)))
    y = 0
    while y < tall:
        photo = zoom(photos[rng.integers(len(photos))], rng.uniform(0.8, 1.5))
        x = int(rng.integers(0, max(1, photo.image.shape[1] - wide)))
        part = crop(photo, x, 0, wide, min(len(photo.image), tall - y))
        paste(canvas, part, width if on_left else 0, y)
        y += len(part.image)
    return canvas


def sparse(rng: np.random.Generator, pages: list[Sample]) -> Sample:
    """A piece of a page on large empty paper with marks that are no text."""
    page = pages[rng.integers(len(pages))]
    height, width = page.image.shape[:2]
    part_height = int(height * rng.uniform(0.12, 0.5))
    part = crop(page, 0, int(rng.integers(0, height - part_height)), width, part_height)
    part = zoom(part, rng.uniform(0.7, 1.5))
    height, width = part.image.shape[:2]
    tall, wide = max(1200, height + 10), max(int(rng.integers(700, 1100)), width + 10)
    light = cv2.resize(rng.uniform(0.85, 1.05, (4, 4)), (wide, tall), interpolation=cv2.INTER_CUBIC)[..., None]
    paper = np.median(page.image, axis=(0, 1)) * light + rng.normal(0, 4, (tall, wide, 1))
    canvas = Sample(np.clip(paper, 0, 255).astype(np.uint8), [])
    litter(rng, canvas.image)
    paste(canvas, part, int(rng.integers(0, wide - width)), int(rng.integers(0, tall - height)))
    return canvas


def scene(rng: np.random.Generator, photo: Sample, texts: list[str]) -> Sample:
    """A street photograph with more text on it: any font and colour, on signs or not, sharp or not, in perspective."""
    canvas = Sample(photo.image.copy(), list(photo.words))
    edges = np.abs(cv2.Laplacian(cv2.cvtColor(photo.image, cv2.COLOR_BGR2GRAY), cv2.CV_32F))
    rough = cv2.boxFilter(edges, -1, (31, 31))
    taken = np.zeros(photo.image.shape[:2], np.uint8)
    for word in photo.words:
        cv2.fillPoly(taken, [word.points.round().astype(np.int32)], 1)
    size = float(np.exp(rng.uniform(np.log(14), np.log(80))))
    for _ in range(int(rng.integers(4, 14))):
        if rng.random() < 0.4:
            size = float(np.exp(rng.uniform(np.log(12), np.log(240))))
        text = texts[rng.integers(len(texts))]
        ink, boxes = ink_of(rng, text if size < 80 else text.split()[0], size)
        quad = _in_perspective(rng, *ink.shape)
        place = _smooth_place(rng, taken, rough, *quad.max(0).astype(int) + 3)
        if place is None:
            continue
        print_on(rng, canvas.image[place], ink, quad)
        taken[place] = 1
        corner = np.array([place[1].start, place[0].start])
        labels = cv2.perspectiveTransform(boxes, _bend(ink, quad))
        canvas.words.extend(Word(label + corner, False) for label in labels)
    return canvas


def ink_of(rng: np.random.Generator, text: str, size: float) -> tuple[np.ndarray, np.ndarray]:
    """A text of `size` pixels in a font drawn at random.

    Returns the share of ink, (height, width) float32 in 0..1, and the boxes of its words, (n, 4, 2) float32 corners.
    """
    font = ImageFont.truetype(str(rng.choice(_fonts())), round(size))
    left, top, right, bottom = (round(side) for side in font.getbbox(text))
    margin = max(1, round(0.05 * size))
    image = Image.new("L", (right - left + 2 * margin, bottom - top + 2 * margin))
    ImageDraw.Draw(image).text((margin - left, margin - top), text, 255, font)
    boxes = []
    for word in re.finditer(r"\S+", text):
        x0, y0, x1, y1 = font.getbbox(word[0])
        x, y = font.getlength(text[: word.start()]) - left, -top
        boxes.append(_corners(y1 - y0, x1 - x0, margin) + np.float32([x + x0 + margin, y + y0 + margin]))
    return np.asarray(image, np.float32) / 255, np.stack(boxes)


def _bend(ink: np.ndarray, quad: np.ndarray) -> np.ndarray:
    """(3, 3) perspective that moves the corners of an image of ink to a quad."""
    return cv2.getPerspectiveTransform(_corners(*ink.shape), quad.astype(np.float32))


def _in_perspective(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """(4, 2) corners of a rectangle that is turned, sheared and bent, 2 px from the upper left."""
    turn = rng.normal(0, 0.06 if rng.random() < 0.8 else 0.4)
    turned = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    sheared = np.array([[1, rng.normal(0, 0.08)], [rng.normal(0, 0.05), 1]])
    quad = _corners(height, width) @ sheared @ turned + rng.normal(0, 0.04 * height, (4, 2))
    return quad - quad.min(0) + 2


def _corners(height: int, width: int, margin: float = 0) -> np.ndarray:
    """(4, 2) corners of a rectangle that begins at (0, 0), grown by a margin."""
    unit = np.array([[0, 0], [1, 0], [1, 1], [0, 1]], np.float32)
    return unit * np.float32([width + 2 * margin, height + 2 * margin]) - np.float32(margin)


def _smooth_place(
    rng: np.random.Generator, taken: np.ndarray, rough: np.ndarray, width: int, height: int
) -> tuple[slice, slice] | None:
    """Rows and columns of the smoothest of twelve places where nothing is written; None if there is none."""
    tall, wide = taken.shape
    if width >= wide or height >= tall:
        return None
    corners = [(int(rng.integers(wide - width)), int(rng.integers(tall - height))) for _ in range(12)]
    places = [(slice(y, y + height), slice(x, x + width)) for x, y in corners]
    free = [place for place in places if not taken[place].any()]
    return min(free, key=lambda place: rough[place].mean(), default=None)


def print_on(rng: np.random.Generator, part: np.ndarray, ink: np.ndarray, quad: np.ndarray) -> None:
    """Print ink, bent to a quad, on a part of a photograph, in place."""
    size = part.shape[1::-1]
    bend = _bend(ink, quad)
    result = part.astype(np.float32)
    if rng.random() < 0.3:  # on a sign
        board = cv2.perspectiveTransform(_corners(*ink.shape, rng.uniform(0.1, 0.5) * len(ink))[None], bend)[0]
        area = cv2.fillConvexPoly(np.zeros(part.shape[:2], np.float32), board.round().astype(np.int32), 1)
        _blend(result, area * rng.uniform(0.7, 1), rng.uniform(0, 255, 3))
    ground, colour = result.mean((0, 1)), rng.uniform(0, 255, 3)
    if np.abs(colour - ground).max() < rng.uniform(25, 60):
        colour = np.full(3, 255.0 if ground.mean() < 128 else 0.0)
    share = cv2.warpPerspective(ink, bend, size, flags=cv2.INTER_LINEAR) * rng.uniform(0.6, 1)
    if rng.random() < 0.3:  # with an outline, or a shadow
        edge = cv2.dilate(share, np.ones((3, 3))) if rng.random() < 0.5 else np.roll(share, (1, 2), (0, 1))
        _blend(result, edge, 255 - colour)
    _blend(result, share, colour)
    if rng.random() < 0.5:
        result = cv2.GaussianBlur(result, (0, 0), rng.uniform(0.4, 0.4 + 0.03 * min(len(ink), 80)))
    if rng.random() < 0.2:
        result = shaken(result, rng, 2 + 0.25 * min(len(ink), 80))
    noise = rng.normal(0, rng.uniform(0, 8), part.shape)
    part[:] = np.clip(result + noise, 0, 255).astype(np.uint8)


def _blend(image: np.ndarray, share: np.ndarray, colour: np.ndarray) -> None:
    """Move the pixels of a float image towards a colour by a share for each, in place."""
    image += share[..., None] * (colour - image)


@cache
def _fonts() -> list[str]:
    """All installed fonts but those of symbols."""
    files = [str(path) for path in Path("/usr/share/fonts").rglob("*.[to]tf")]
    return sorted(file for file in files if not re.search("dseg|awesome|math|symbol|emoji", file, re.I))


def litter(rng: np.random.Generator, paper: np.ndarray) -> None:
    """Draw specks, rules, rows of asterisks and dashes, and stains."""
    height, width = paper.shape[:2]
    ink = [int(rng.integers(0, 120))] * 3
    for _ in range(int(rng.integers(20, 200))):
        centre = (int(rng.integers(width)), int(rng.integers(height)))
        cv2.ellipse(paper, centre, tuple(rng.integers(0, 4, 2).tolist()), 0, 0, 360, ink, -1)
    for _ in range(int(rng.integers(2, 7))):
        y, x0, x1 = int(rng.integers(height)), int(rng.integers(width // 2)), int(rng.integers(width // 2, width))
        mark, size, thickness = rng.choice(list("_*-=")), float(rng.uniform(0.5, 1.4)), int(rng.integers(1, 3))
        if mark == "_":
            cv2.line(paper, (x0, y), (x1, y + int(rng.integers(-4, 5))), ink, thickness)
        else:
            row = mark * int((x1 - x0) / (18 * size))
            cv2.putText(paper, row, (x0, y), cv2.FONT_HERSHEY_SIMPLEX, size, ink, thickness, cv2.LINE_AA)
    for _ in range(int(rng.integers(0, 4))):
        centre = (int(rng.integers(width)), int(rng.integers(height)))
        shade = (paper[centre[1], centre[0]] * rng.uniform(0.6, 0.95)).tolist()
        axes, tilt = tuple(rng.integers(15, 120, 2).tolist()), float(rng.uniform(0, 180))
        cv2.ellipse(paper, centre, axes, tilt, 0, 360, shade, int(rng.choice([-1, 2, 5])))


# ---- the two files


def make(folder: Path, samples: Callable[[np.random.Generator], Iterator[Sample]], seed: int) -> Path:
    """Write a training set unless it is there, and return its folder."""
    if not (folder / "jsons" / "train.json").exists():
        print(f"making {folder}", flush=True)
        write(folder, samples(np.random.default_rng(seed)))
    return folder


def render(folder: Path, train: int, val: int, seed: int, *flags: str) -> Path:
    """Render receipts unless they are there, and return their folder."""
    if not (folder / "jsons" / "val.json").exists():
        fonts = [word for font in FONTS for word in ("--font", font)]
        counts = ["--train", str(train), "--val", str(val), "--test", "0", "--size", "1024", "--seed", str(seed)]
        run(["-m", "dbnet.synth", "--out", str(folder), *counts, *flags, *fonts], ROOT)
    return folder


def some(rng: np.random.Generator, samples: Iterator[Sample], count: int) -> list[Sample]:
    """`count` samples drawn at random."""
    found = list(samples)
    return [found[place] for place in sorted(rng.permutation(len(found))[:count])]


def lines_data(data: Path, work: Path) -> dict[Path, float]:
    """Folders of the lines file, with the passes over each in an epoch. The labels of street photographs are words."""
    photos, receipts = data / "icdar2015", render(work / "rendered-lines", 400, 30, 7, "--lines")

    def changed(change: Callable[[Sample, np.random.Generator], Sample], source: Path, count: int) -> Path:
        def samples(rng: np.random.Generator) -> Iterator[Sample]:
            return (change(sample, rng) for sample in some(rng, read(source), count))

        return make(work / f"{source.name}-{change.__name__}", samples, 1)

    def sparse_pages(rng: np.random.Generator) -> Iterator[Sample]:
        pages = [page for name in ("sroie", "tapus", "doclaynet") for page in read(data / name)]
        return (sparse(rng, pages) for _ in range(80))

    return {
        data / "sroie": 0.6,
        changed(darken, data / "sroie", 120): 0.3,
        changed(dull, data / "sroie", 300): 0.5,
        receipts: 0.1,
        changed(dull, receipts, 200): 0.4,
        data / "doclaynet": 1,
        changed(darken, data / "doclaynet", 60): 0.3,
        changed(dull, data / "doclaynet", 100): 0.3,
        data / "tapus": 1,
        data / "fondue": 0.5,
        photos: 1.5,
        changed(dull, photos, 200): 0.3,
        streets(work / "street", photos, data / "sroie"): 0.3,
        scenes(work / "word-scenes", 800, photos, data / "sroie"): 0.4,
        make(work / "sparse", sparse_pages, 3): 0.5,
    }


def words_data(data: Path, work: Path) -> dict[Path, float]:
    """Folders of the words file, with the passes over each in an epoch."""
    photos, pages = data / "icdar2015", word_pages(data, work)
    receipts = render(work / "rendered-words", 260, 30, 11)
    return {
        photos: 3,
        scenes(work / "word-scenes", 800, photos, data / "sroie"): 0.5,
        streets(work / "word-street", photos, receipts, pages): 0.4,
        pages: 1.5,
        render(work / "rendered-words2", 500, 2, 29): 0.4,
        receipts: 0.2,
    }


def streets(folder: Path, photos: Path, *pages: Path) -> Path:
    """240 pages beside street photographs."""

    def samples(rng: np.random.Generator) -> Iterator[Sample]:
        beside, columns = [page for source in pages for page in read(source)], list(read(photos))
        return (street(rng, beside, columns) for _ in range(240))

    return make(folder, samples, 2)


def scenes(folder: Path, count: int, photos: Path, receipts: Path) -> Path:
    """Street photographs with more text printed on them: up to three words of a line of a receipt, in any case."""

    def samples(rng: np.random.Generator) -> Iterator[Sample]:
        texts = [" ".join(word.text.split()[:3]) for page in read(receipts) for word in page.words]
        texts = [way(text) for text in texts if len(text) > 1 for way in (str, str.title, str.lower)]
        originals = list(read(photos))
        return (scene(rng, originals[place % len(originals)], texts) for place in range(count))

    return make(folder, samples, 5)


def word_pages(data: Path, work: Path) -> Path:
    """DocLayNet with words as labels."""
    pages = work / "doclaynet-words"
    if not pages.exists():
        pages.mkdir(parents=True)
        (pages / "images").symlink_to((data / "doclaynet" / "images").resolve())
        (pages / "jsons").symlink_to((data / "doclaynet" / "jsons_words").resolve())
    return pages


class Stage(NamedTuple):
    """What one file is trained on, and the share of the weights at the start in the result."""

    folders: Callable[[Path, Path], dict[Path, float]]
    file: str
    kept: float


STAGES = {"lines": Stage(lines_data, "lite.pt", 0.5), "words": Stage(words_data, "lite-words.pt", 0.0)}


def run(words: list[str], folder: Path) -> None:
    """Run Python on a command of this checkout in `folder`. Ends with its exit status where it fails."""
    print("python", *words, flush=True)
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    status = subprocess.run([sys.executable, *words], cwd=folder, env=os.environ | {"PYTHONPATH": paths}).returncode
    if status:
        sys.exit(status)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("data", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--init", type=Path, help="start from this checkpoint (the shipped file)")
    parser.add_argument("--epochs", type=int, default=10, help="passes over the data (10)")
    args = parser.parse_args()
    stage, data, work = STAGES[args.stage], args.data.resolve(), args.work.resolve()
    init, result = (args.init or ROOT / "weights" / stage.file).resolve(), work / stage.file
    work.mkdir(parents=True, exist_ok=True)
    folders = stage.folders(data, work)
    shares = ["--data", ",".join(map(str, folders)), "--data-weights", ",".join(f"{n:g}" for n in folders.values())]
    resumed = (work / "runs" / args.stage / "last.pt").exists()
    start = ["--resume"] if resumed else ["--init", str(init)]
    length = ["--epochs", str(args.epochs)]
    run([str(ROOT / "train.py"), "--run", args.stage, *start, *TRAINING.split(), *length, *shares], work)
    run([str(ROOT / "export.py"), str(work / "runs" / args.stage / "best.pt"), "--half", str(result)], work)
    if stage.kept:
        keep(stage.kept, init, result)


def keep(share: float, former: Path, result: Path) -> None:
    """Average the weights in `result` with this share of those in `former`, whose configuration stays."""
    old, new = (torch.load(path, weights_only=True) for path in (former, result))
    for name, tensor in old["model"].items():
        if tensor.is_floating_point():
            tensor.copy_(tensor.float().lerp(new["model"][name].float(), 1 - share))
    torch.save(old, result)


if __name__ == "__main__":
    main()
