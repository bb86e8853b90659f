"""A report of an evaluation: one HTML file that shows each image and each mistake, and opens without a connection.

The page is report.html beside this module. This module adds its data: names, numbers and polygons as one JSON, and the
pictures as base64, each in an element of its own, so that a browser decodes only those that it shows."""

import base64
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

from dbnet.annotations import Annotation
from dbnet.errors import ImageError
from dbnet.evaluation import Comparison, Evaluation, size_bins
from dbnet.files import write_whole
from dbnet.geometry import Letterbox
from dbnet.images import read_image
from dbnet.metric import match_image

PICTURE_SIDE, PICTURE_BYTES = 1024, 75_000  # at most: 400 images, with maps and polygons, then stay under 60 MB
MAP_SIDE, MAP_BYTES = 512, 15_000
MAP_LEVELS = 16  # of probability, 4 bits a pixel
REPORT_MARK = "report by dbnet"  # near the end of every page, which may be overwritten therefore
_FAR = 100_000  # pixels; coordinates beyond are clipped

# Low to high probability: violet, green, yellow, with growing opacity; the lowest level, noise, is transparent.
_MAP_COLORS = cv2.applyColorMap(np.linspace(0, 255, MAP_LEVELS, dtype=np.uint8)[None], cv2.COLORMAP_VIRIDIS)[0, :, ::-1]
_MAP_ALPHAS = np.linspace(-15, 215, MAP_LEVELS).clip(0).astype(np.uint8)


@dataclass
class Picture:
    """One image on the page, with sizes and points in pixels of the upright original."""

    width: int
    height: int
    jpeg: bytes  # the reduced image; empty if it cannot be read
    prob_map: bytes  # PNG of the probability map; empty if there is none
    error: str | None  # one line, if the image cannot be read: it is as large as its polygons then
    gt: list[list[Any]]
    """for each ground truth: its outcome, characters found, all that count, bin of its size, [x, y, x, y, ...]"""
    det: list[tuple[Any, ...]]  # for each detection: its outcome, score or None, [x, y, x, y, ...]


_EMBEDDED = ("jpeg", "prob_map")


def picture_of(
    path: Path,
    annotation: Annotation,
    polygons: Sequence[np.ndarray],
    scores: Sequence[float] | None = None,
    prob_map: np.ndarray | None = None,
) -> Picture:
    """The entry of an image, with its (n, 2) detections in pixels of the upright original and their `scores`, 0..1. Its
    `prob_map` is (height, width) uint8, probability x 255, of the image without padding, at any size. An image that
    cannot be read is shown as its polygons alone, with the reason."""
    try:
        pixels, (width, height) = read_image(path, PICTURE_SIDE)
        jpeg, error = encode_picture(pixels), None
    except ImageError as unreadable:
        everything = [np.ones((1, 2)), *annotation.polygons, *polygons]
        width, height = np.concatenate(everything).max(axis=0).clip(1, _FAR).astype(int).tolist()
        jpeg, error = b"", str(unreadable)
    match = match_image(annotation.polygons, polygons, annotation.dont_care)
    sizes = size_bins(annotation.polygons, (width, height)).tolist()
    words = zip(match.gt_outcomes(), match.gt_chars.tolist(), sizes, map(_flat, annotation.polygons), strict=True)
    rounded = [round(float(score), 3) for score in scores] if scores else [None] * len(polygons)
    found = zip(match.det_outcomes(), rounded, map(_flat, polygons), strict=True)
    gt = [[outcome, *chars, size, points] for outcome, chars, size, points in words]
    return Picture(width, height, jpeg, b"" if prob_map is None else encode_map(prob_map), error, gt, list(found))


def write_report(
    path: Path, evaluation: Evaluation, title: str, settings: dict[str, Any], comparison: Comparison | None, lang: str
) -> None:
    """Write the page of an evaluation whose pictures are made by `picture_of`. `title` says what was scored, `settings`
    how, by name. With a `comparison` the page shows the changes since the earlier scores. `lang` is en, ko or auto, the
    language of the browser. Raises UserError where the file cannot be written."""
    versus, earlier = None, {}
    if comparison:
        earlier = dict(zip(comparison.names, comparison.before.tolist(), strict=True))
        means = {when: getattr(comparison, when).mean(axis=0).tolist() for when in ("before", "after")}
        counts = {what: len(getattr(comparison, what)) for what in ("better", "worse", "other_labels")}
        versus = {"name": str(comparison.path), "images": len(earlier), "labels_known": comparison.labels_known}
        versus |= means | counts
    images = []
    for name, image in evaluation.images.items():
        shown = {key: value for key, value in vars(image.picture).items() if key not in _EMBEDDED}
        images.append({"name": name, **asdict(image.score), "before": earlier.get(name), **shown})
    data = {
        "title": title,
        "language": lang,
        "settings": {name: str(value) for name, value in settings.items()},
        "totals": asdict(evaluation.compute()),
        "interval": evaluation.interval(),
        "sizes": evaluation.by_size(),
        "comparison": versus,
        "images": images,
    }
    # No name can break out of this JSON: it is ASCII, and without `<` it has neither a tag nor a comment.
    content = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    before, after = Path(__file__).with_name("report.html").read_text(encoding="utf-8").split("<!-- data -->")
    with write_whole(path, "w") as file:
        file.write(f'{before}<script type="application/json" id="data">{content}</script>\n')
        for index, scored in enumerate(evaluation.images.values()):
            for kind in _EMBEDDED:
                encoded = base64.b64encode(getattr(scored.picture, kind)).decode()
                file.write(f'<script type="text/plain" id="{kind}-{index}">{encoded}</script>\n' if encoded else "")
        file.write(f"{after}<!-- {REPORT_MARK} -->\n")


def encode_picture(pixels: np.ndarray) -> bytes:
    """JPEG of (height, width, 3) uint8 RGB, at most PICTURE_SIDE pixels and PICTURE_BYTES."""
    for size in _sizes(pixels, PICTURE_SIDE):
        reduced = np.ascontiguousarray(size.resize(pixels)[..., ::-1])
        for quality in range(75, 15, -10):
            jpeg = cv2.imencode(".jpg", reduced, [cv2.IMWRITE_JPEG_QUALITY, quality, cv2.IMWRITE_JPEG_OPTIMIZE, 1])[1]
            if len(jpeg) <= PICTURE_BYTES:
                return jpeg.tobytes()
    return b""


def encode_map(prob_map: np.ndarray) -> bytes:
    """PNG of a (height, width) uint8 probability map x 255 in MAP_LEVELS, of at most MAP_SIDE pixels and MAP_BYTES."""
    for size in _sizes(prob_map, MAP_SIDE):
        reduced = cv2.resize(prob_map, size.resized, interpolation=cv2.INTER_AREA)
        image, file = Image.fromarray(np.round(reduced * ((MAP_LEVELS - 1) / 255)).astype(np.uint8)), BytesIO()
        image.putpalette(_MAP_COLORS.tobytes())
        image.save(file, "PNG", bits=4, transparency=_MAP_ALPHAS.tobytes())
        if file.tell() <= MAP_BYTES:
            return file.getvalue()
    return b""


def _sizes(pixels: np.ndarray, most: int) -> Iterator[Letterbox]:
    """Sizes to try, from the given or the image's own longer side down to a pixel."""
    height, width = pixels.shape[:2]
    side = min(most, max(width, height))
    while side:
        yield Letterbox(width, height, side)
        side = int(side * 0.8)


def _flat(polygon: np.ndarray) -> list[int]:
    return np.rint(polygon).clip(-_FAR, _FAR).astype(int).ravel().tolist()
