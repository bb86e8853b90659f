"""Synthetic receipts: images that look photographed or scanned, with exact word polygons, any number from a seed.

    python -m dbnet.synth --out data/synth --train 200 --val 20 --test 10 --size 640 --seed 0 [--font Korean.ttf]

In the order of this file: `develop` turns the ink of a sheet (`receipt`) into coloured paper, `lay` chooses one
homography for pixels and boxes, `photograph` or `scan` puts the paper into its scene, and `degrade` adds the faults of
a camera. All lengths follow `size`. The same seed gives the same pixels, for any number of workers, on machines with
the same fonts (`system_fonts`) and versions."""

import json
import math
from collections.abc import Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.random import Generator
from tqdm import tqdm

from dbnet.dataset import count_cores, map_in_processes
from dbnet.errors import UserError, library_errors
from dbnet.formats import rectangle
from dbnet.synth.receipt import Sheet, chance, choose_print, enclosing_box, load_font, pick, print_sheet, system_fonts

SPLITS = ("train", "val", "test")
SCAN_SHARE = 1 / 3  # of the images are flat scans, the others photographs
MIN_CONTRAST = 24  # grey levels between ink and paper; fainter print is marked illegible
MIN_SIZE, MAX_SIZE = 128, 8192  # of an image's long side: below the first, no line of print can be read

LabelledWord = tuple[np.ndarray, str, bool]  # polygon (4, 2), transcription, illegible
Frame = tuple[int, int]  # width, height of the image
Fonts = Sequence[str]  # paths of .ttf or .otf files


def smooth_noise(rng: Generator, height: int, width: int, rows: int, columns: int) -> np.ndarray:
    """(height, width) float32, about 0 to 1: rows x columns random values, enlarged smoothly."""
    return cv2.resize(rng.random((rows, columns), np.float32), (width, height), interpolation=cv2.INTER_CUBIC)


@lru_cache(maxsize=1)
def noise_tile() -> np.ndarray:
    """(2048, 2048) int16 Gaussian noise with a standard deviation of 32, made once."""
    return np.random.default_rng(0).normal(0, 32, (2048, 2048)).astype(np.int16)


def noise_window(rng: Generator, height: int, width: int) -> np.ndarray:
    """(height, width) int16 from a random position in `noise_tile`, which repeats."""
    rows, columns = ((int(rng.integers(2048)) + np.arange(length)) % 2048 for length in (height, width))
    return noise_tile()[rows[:, None], columns]


def to_image(values: np.ndarray) -> np.ndarray:
    return np.clip(values, 0, 255).astype(np.uint8)


def print_strength(rng: Generator, height: int, width: int) -> np.ndarray:
    """Darkness of the print at each pixel: (height, width) float32, from 0 (nothing) to 1 (full)."""
    strength = 1 - rng.uniform(0, 0.5) * smooth_noise(rng, height, width, 5, 3)
    strength *= rng.uniform(0.55, 1.0)
    if chance(rng, 0.25):  # dead or worn dots of the print head
        strength *= 1 - 0.6 * (rng.random(width, np.float32) < rng.uniform(0.02, 0.15))
    if chance(rng, 0.15):  # a patch bleached by heat or light, not legible in the middle
        y, x = np.ogrid[:height, :width]
        distance = np.hypot(x - rng.uniform(0, width), y - rng.uniform(0, height)) / (width * rng.uniform(0.2, 0.5))
        strength *= np.clip(distance**3, 0.02, 1)
    return np.clip(strength, 0, 1).astype(np.float32)


def fold_shading(rng: Generator, height: int, width: int) -> np.ndarray:
    """Light on folded, crumpled paper: (height, width) float32 factors around 1."""
    shading = 1 + rng.uniform(0, 0.12) * (smooth_noise(rng, height, width, 9, 5) - 0.5)
    for axis, length in ((0, height), (1, width)):
        for _ in range(rng.integers(0, 4 - 2 * axis)):
            distance = (np.arange(length, dtype=np.float32) - rng.uniform(0.1, 0.9) * length) / height
            profile = 1 + rng.uniform(-0.18, 0.18) * np.sign(distance) * np.exp(-np.abs(distance) / 0.08)
            profile -= rng.uniform(0, 0.2) * (np.abs(distance) < 1.5 / height)
            shading *= profile[:, None] if axis == 0 else profile
    return shading


def draw_pen(rng: Generator, paper: np.ndarray) -> None:
    """A ring, tick or scribble by hand, which is not text."""
    height, width = paper.shape[:2]
    turn = np.linspace(0, rng.uniform(3, 16), 40)
    centre = rng.uniform(0.2, 0.8, 2) * (width, height)
    radius = width * rng.uniform(0.04, 0.14, 2)
    points = centre + np.stack([np.cos(turn), np.sin(turn)], 1) * radius + np.outer(turn, rng.normal(0, width / 100, 2))
    colour = pick(rng, ((30, 40, 150), (40, 40, 40), (170, 30, 40)))
    cv2.polylines(paper, [np.round(points).astype(np.int32)], False, colour, max(1, width // 180), cv2.LINE_AA)


def draw_specks(rng: Generator, paper: np.ndarray) -> None:
    """Dirt and stains."""
    height, width = paper.shape[:2]
    for _ in range(rng.integers(10, 150)):
        centre = (int(rng.integers(width)), int(rng.integers(height)))
        axes = (rng.exponential(height / 500, 2) + 0.5).astype(int).tolist()
        cv2.ellipse(paper, centre, axes, rng.uniform(0, 180), 0, 360, [int(rng.integers(0, 200))] * 3, -1, cv2.LINE_AA)


def develop(rng: Generator, sheet: Sheet, flat: bool, varied: bool) -> tuple[np.ndarray, np.ndarray]:
    """Paper (height, width, 3) uint8 with the sheet printed on it, and the contrast of print there in grey levels."""
    height, width = sheet.ink.shape
    brightness, warmth = (rng.uniform(243, 255), 0) if flat else (rng.uniform(205, 248), rng.uniform(-4, 12))
    white = np.array([brightness, brightness - warmth * 0.4, brightness - warmth], np.float32) + rng.uniform(-2, 2, 3)
    ink = np.float32(pick(rng, ((20, 20, 24), (45, 45, 50), (60, 50, 110), (70, 60, 50)))) + rng.uniform(-15, 25)
    strength = print_strength(rng, height, width)
    alpha = strength * sheet.ink * np.float32(1 / 255)
    if chance(rng, 0.5):  # rough print
        alpha *= np.clip(1 + noise_window(rng, height, width) * np.float32(rng.uniform(0, 0.01)), 0, 1)
    tone = white + alpha[..., None] * np.float32(ink - white)
    paper = to_image(tone if flat else tone * fold_shading(rng, height, width)[..., None])
    if chance(rng, 0.2):
        draw_pen(rng, paper)
    if varied and chance(rng, 0.3):
        draw_specks(rng, paper)
    if varied and chance(rng, 0.25):  # light print on dark paper
        paper = to_image(255 - paper * np.float32(rng.uniform(0.7, 1)))
    return paper, strength * float(white.mean() - ink.mean())


def transform(homography: np.ndarray, points: np.ndarray) -> np.ndarray:
    """(n, 2) points through a (3, 3) homography."""
    return cv2.perspectiveTransform(np.asarray(points, np.float64).reshape(1, -1, 2), homography)[0]


def lay(rng: Generator, sheet: Sheet, frame: Frame, flat: bool) -> np.ndarray:
    """The (3, 3) homography from sheet to image: tilt and perspective, then all words moved inside `frame` (w, h)."""
    height, width = sheet.ink.shape
    outline = rectangle(0, 0, width, height)
    angle = math.radians(rng.normal(0, 0.8 if flat else 5))
    turn = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    seen = outline @ turn + (0 if flat else rng.uniform(-0.06, 0.06, (4, 2)) * width)
    homography = cv2.getPerspectiveTransform(outline.astype(np.float32), seen.astype(np.float32))
    boxes = [box for _, box in sheet.labels(lines=False)] or [np.array((0, 0, width, height))]
    text = transform(homography, rectangle(*enclosing_box(boxes)))
    low, high = text.min(0), text.max(0)
    room = np.array(frame) - 4.0
    zoom = min(1.0, *(room / (high - low)))
    shift = 2 + (room - zoom * (high - low)) * rng.uniform(0.3, 0.7, 2) - zoom * low
    return np.array([[zoom, 0, shift[0]], [0, zoom, shift[1]], [0, 0, 1]]) @ homography


def draw_face(rng: Generator, scene: np.ndarray) -> None:
    """A simple face: a head with hair, eyes and mouth."""
    height, width = scene.shape[:2]
    x, y = (rng.random(2) * (width, height)).astype(int).tolist()
    r = max(6, int(height * rng.uniform(0.03, 0.15)))
    skin = (np.array([225, 180, 150]) * rng.uniform(0.35, 1.1)).clip(0, 255).tolist()
    dark = rng.integers(0, 70, 3).tolist()
    cv2.circle(scene, (x, y - r // 4), round(r * 1.1), dark, -1, cv2.LINE_AA)
    cv2.ellipse(scene, (x, y), (round(r * 0.8), r), 0, 0, 360, skin, -1, cv2.LINE_AA)
    for side in (-1, 1):
        cv2.ellipse(scene, (x + side * r // 3, y - r // 5), (r // 6 + 1, r // 10 + 1), 0, 0, 360, dark, -1, cv2.LINE_AA)
    cv2.ellipse(scene, (x, y + r // 2), (r // 3, r // 8 + 1), 0, 0, 180, (150, 60, 60), r // 12 + 1, cv2.LINE_AA)


def draw_pattern(rng: Generator, scene: np.ndarray) -> None:
    """Lines at equal distances all over the scene, as of tiles, bricks, shutters or a fence."""
    height, width = scene.shape[:2]
    pace, shade = max(4, int(height * rng.uniform(0.01, 0.08))), rng.integers(0, 256, 3).tolist()
    thickness, rows, columns = 1 + int(pace * rng.uniform(0, 0.5)), chance(rng, 0.8), chance(rng, 0.7)
    for y in range(0, height if rows else 0, pace):
        cv2.line(scene, (0, y), (width, y), shade, thickness)
    for x in range(0, width if columns else 0, pace * pick(rng, (1, 2, 3))):
        cv2.line(scene, (x, 0), (x, height), shade, thickness)


def table_top(rng: Generator, width: int, height: int, varied: bool) -> np.ndarray:
    """A background (height, width, 3) uint8: wood, cloth or plain, with objects; if varied, with patterns and faces."""
    colour = np.float32(rng.uniform(30, 210) + np.multiply((1, 0.2, -1), rng.uniform(-10, 45)) + rng.uniform(-8, 8, 3))
    grain = smooth_noise(rng, height, width, *pick(rng, ((60, 3), (3, 60), (40, 30), (4, 4)))) - 0.5
    if chance(rng, 0.12):  # a checked cloth
        y, x = np.ogrid[:height, :width]
        pace = rng.uniform(60, 250) / height
        grain += 0.5 * np.sign(np.sin(y * pace) + np.sin(x * pace))
    scene = to_image(colour + grain[..., None] * rng.uniform(15, 60, 3).astype(np.float32))
    if varied and chance(rng, 0.3):
        draw_pattern(rng, scene)
    for _ in range(rng.integers(0, 5) if varied and chance(rng, 0.4) else 0):
        draw_face(rng, scene)
    for _ in range(rng.integers(0, 6)):  # cups, cables, cards, phones, other pieces of paper
        darkest, lightest = pick(rng, ((0, 80), (0, 256), (190, 250)))
        shade = rng.integers(darkest, lightest, 3).tolist()
        start, end = (rng.random((2, 2)) * (width, height)).astype(int).tolist()
        radius = int(height * rng.uniform(0.02, 0.2))
        if chance(rng, 0.25):
            cv2.circle(scene, start, radius, shade, pick(rng, (-1, 2, 5)), cv2.LINE_AA)
        elif chance(rng, 0.25):
            cv2.line(scene, start, end, shade, radius // 8 + 1, cv2.LINE_AA)
        else:
            box = cv2.boxPoints((start, (2 * radius, 3 * radius), rng.uniform(0, 180)))
            cv2.fillConvexPoly(scene, box.astype(np.int32), shade, cv2.LINE_AA)
    return scene


def uneven_light(rng: Generator, width: int, height: int) -> np.ndarray:
    """(height, width, 3) float32 factors: light that falls off, its colour and, in some images, a shadow."""
    light = 1 - rng.uniform(0, 0.5) * smooth_noise(rng, height, width, 2, 2)
    if chance(rng, 0.35):
        shadow = np.zeros((height // 4, width // 4), np.float32)
        outline = rng.uniform(-0.3, 1.3, (3, 2)) * (width / 4, height / 4)
        cv2.fillConvexPoly(shadow, outline.astype(np.int32), rng.uniform(0.15, 0.45))
        light -= cv2.resize(cv2.GaussianBlur(shadow, (0, 0), width * rng.uniform(0.005, 0.03)), (width, height))
    warmth = rng.normal(0, 0.05)
    return light[..., None] * np.array([1 + warmth, 1, 1 - warmth], np.float32)


def photograph(rng: Generator, paper: np.ndarray, homography: np.ndarray, frame: Frame, varied: bool) -> np.ndarray:
    """The paper and its shadow on a table, in uneven light: (h, w, 3) uint8 for a frame (w, h)."""
    width, height = frame
    outline = transform(homography, rectangle(0, 0, *paper.shape[1::-1]))
    mask, reach = np.zeros((height, width), np.float32), width // 20 + 1
    cv2.fillConvexPoly(mask, np.round(outline * 16).astype(np.int32), 1.0, shift=4)
    table = table_top(rng, width, height, varied)
    table = table * (1 - np.float32(rng.uniform(0, 0.6)) * cv2.blur(mask, (reach, reach)))[..., None]
    sheet = cv2.warpPerspective(paper, homography, frame, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    covered = cv2.blur(mask, (3, 3))[..., None]
    return to_image((table + (sheet - table) * covered) * uneven_light(rng, width, height))


def scan(rng: Generator, paper: np.ndarray, homography: np.ndarray, frame: Frame, varied: bool) -> np.ndarray:
    """The paper under the white or black lid of a scanner, some with high contrast; result as of `photograph`."""
    lid = [int(rng.integers(0, 30) if varied and chance(rng, 0.2) else rng.integers(244, 256))] * 3
    image = cv2.warpPerspective(paper, homography, frame, flags=cv2.INTER_LINEAR, borderValue=lid)
    if chance(rng, 0.3):
        image = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    return cv2.convertScaleAbs(image, alpha=1.25, beta=0) if chance(rng, 0.4) else image


def degrade(rng: Generator, image: np.ndarray, size: int, flat: bool) -> np.ndarray:
    """Effects of lens, sensor and file: blur, loss of resolution, noise, JPEG. (h, w, 3) uint8 to the same."""
    height, width = image.shape[:2]
    if chance(rng, 0.2):
        share = rng.uniform(0.6, 0.9)
        image = cv2.resize(image, None, fx=share, fy=share, interpolation=cv2.INTER_AREA)
        image = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
    elif chance(rng, 0.2):  # motion blur
        reach = max(2, round(size / 640 * rng.uniform(2, 4)))
        image = cv2.blur(image, pick(rng, ((1, reach), (reach, 1))))
    elif chance(rng, 0.6):
        image = cv2.GaussianBlur(image, (0, 0), size / 640 * rng.uniform(0.3, 0.5 if flat else 0.9))
    noise = noise_window(rng, height, width) * np.float32(rng.uniform(0, 0.08 if flat else 0.3))
    image = cv2.add(image, cv2.merge([noise, noise, noise]), dtype=cv2.CV_8U)
    if chance(rng, 0.5):
        _, encoded = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(30, 85))])
        image = np.asarray(cv2.imdecode(encoded, cv2.IMREAD_COLOR))
    return image


def render_receipt(
    rng: Generator, size: int = 640, fonts: Fonts = (), lines: bool = False, varied: bool = False, others: Fonts = ()
) -> tuple[np.ndarray, list[LabelledWord]]:
    """One receipt: image (height, width, 3) uint8 RGB, long side about `size`, and its words.

    A word is (polygon, transcription, illegible): polygon (4, 2) float64 in pixels of the image, clockwise from the
    word's top left, tight around its ink, always inside the image; illegible where the print is too faint to read.
    With `lines`, the words of a line in one column are one polygon. With `varied`, also light print on dark paper,
    tight lines, rows of marks, specks, large empty margins, patterns and faces in the background, and turned pages.
    `fonts` are those of 3 of 4 receipts; the rest has Pillow's own font or one of `others`. Fonts with Hangul give
    Korean receipts. Raises UserError for a file that is not a font."""
    flat = chance(rng, SCAN_SHARE)
    face, words = choose_print(rng, fonts, others)
    long_side = round(size * rng.uniform(0.9, 1.0))
    sparse = varied and chance(rng, 0.25)
    share = rng.uniform(0.3, 0.6) if sparse else 1.0  # of the height that print may take
    if flat:
        width = round(long_side * rng.uniform(0.38, 0.75))
        sheet = print_sheet(rng, width, round(long_side * share), face, words, varied)
        frame = width, max(sheet.ink.shape[0], round(long_side * rng.uniform(0.85, 1.0)))
    else:
        frame = round(long_side * pick(rng, (9 / 16, 9 / 16, 3 / 4, 3 / 4, 2 / 3, 1.0))), long_side
        width = round(min(frame[0] * rng.uniform(0.6, 0.98), long_side * 0.7))
        sheet = print_sheet(rng, width, round(long_side * rng.uniform(0.85, 1.05) * share), face, words, varied)
    if sparse:  # large empty margins
        top, bottom, left, right = (rng.uniform(0, 0.5, 4) * long_side).astype(int).tolist()
        cells = [[(text, box + np.array((left, top, left, top))) for text, box in cell] for cell in sheet.cells]
        sheet = Sheet(np.pad(sheet.ink, ((top, bottom), (left, right))), cells)
        frame = tuple(np.minimum(np.maximum(frame, sheet.ink.shape[::-1]), long_side).tolist())
    homography = lay(rng, sheet, frame, flat)
    paper, contrast = develop(rng, sheet, flat, varied)
    image = (scan if flat else photograph)(rng, paper, homography, frame, varied)
    labelled = []
    for text, box in sheet.labels(lines):
        x0, y0, x1, y1 = (max(0, round(edge)) for edge in box)
        faint = float(contrast[y0:y1, x0:x1].mean()) < MIN_CONTRAST
        polygon = transform(homography, rectangle(*box) - 0.5) + 0.5  # OpenCV counts from the centre of pixel 0
        labelled.append((polygon, text, faint))
    image = degrade(rng, image, size, flat)
    for _ in range(pick(rng, (0, 0, 1, 2, 3)) if varied else 0):  # turn by 90 degrees, counter-clockwise
        labelled = [(np.stack([x[:, 1], image.shape[1] - x[:, 0]], 1), text, faint) for x, text, faint in labelled]
        image = np.ascontiguousarray(np.rot90(image))
    return image, labelled


def write_receipt(job: tuple[str, int], folder: Path, size: int, seed: int, **options: Any) -> tuple[str, dict]:
    """Render and write the image of a job (split, index). Returns its file name and its entry in the json."""
    split, index = job
    image, words = render_receipt(np.random.default_rng([seed, SPLITS.index(split), index]), size, **options)
    name = f"synth_{split}_{index:05d}.jpg"
    _, encoded = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 90])
    (folder / "images" / split / name).write_bytes(encoded.tobytes())
    entries = {
        f"{number:04d}": {"points": polygon.round(2).tolist(), "transcription": text, "illegibility": illegible}
        for number, (polygon, text, illegible) in enumerate(words, 1)
    }
    return name, {"img_w": image.shape[1], "img_h": image.shape[0], "words": entries}


def write_dataset(
    folder: str | Path,
    train: int = 200,
    val: int = 20,
    test: int = 10,
    size: int = 640,
    seed: int = 0,
    fonts: Fonts = (),
    workers: int | None = None,
    lines: bool = False,
    varied: bool = False,
) -> int:
    """Write a data set of receipts in the layout of the README, and return the number of its words. `folder` must be
    absent or empty. The jsons are written last: without them, an interrupted run is not taken for a data set. An image
    depends on its seed, split and index alone, not on `workers` (processes; default: one a core) and counts. Workers
    are spawned: call this under `if __name__ == "__main__"` in a script. Raises UserError."""
    folder, fonts, counts = Path(folder), tuple(map(str, fonts)), {"train": train, "val": val, "test": test}
    for name, value in {**counts, "seed": seed, "size": size}.items():
        least, limit = (MIN_SIZE, f" to {MAX_SIZE}") if name == "size" else (0, " or more")
        if value < least or (name == "size" and value > MAX_SIZE):
            raise UserError(f"--{name} {value}: give {least}{limit}")
    if not any(counts.values()):
        raise UserError("--train, --val and --test are all 0: ask for at least one image")
    for path in fonts:
        load_font(path, 16)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--out {folder}: is not empty, and nothing is overwritten; delete it or name a new folder")
    jobs = [(split, index) for split in SPLITS for index in range(counts[split])]
    workers = min(workers or count_cores(), len(jobs))
    images: dict[str, dict[str, dict]] = {split: {} for split in SPLITS}
    options: dict[str, Any] = {"fonts": fonts, "lines": lines, "varied": varied, "others": system_fonts()}
    render = partial(write_receipt, folder=folder, size=size, seed=seed, **options)
    with library_errors(f"--out {folder}: cannot be written", "choose another folder", of=OSError):
        for split in SPLITS:
            (folder / "images" / split).mkdir(parents=True, exist_ok=True)
        entries = tqdm(map_in_processes(render, jobs, workers), "receipts", len(jobs), unit="image")
        for (split, _), (name, entry) in zip(jobs, entries, strict=True):
            images[split][name] = entry
        (folder / "jsons").mkdir()
        for split in SPLITS:
            text = json.dumps({"images": images[split]}, ensure_ascii=False)
            (folder / "jsons" / f"{split}.json").write_text(text, encoding="utf-8")
    return sum(len(entry["words"]) for entries in images.values() for entry in entries.values())
