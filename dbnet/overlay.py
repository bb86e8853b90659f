"""Pictures to look at: polygons over images, and a sheet of training samples with their target maps."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import cv2
import numpy as np

from dbnet.dataset import Draw, TextDataset
from dbnet.errors import UserError
from dbnet.geometry import Letterbox
from dbnet.images import name_stem

TEXT_COLOR = (0, 158, 115)  # bluish green and vermilion stay apart for the colour-blind (Okabe and Ito)
DONT_CARE_COLOR = (213, 94, 0)


def draw_polygons(
    image: np.ndarray, polygons: Iterable[np.ndarray], color: tuple[int, int, int] = TEXT_COLOR
) -> np.ndarray:
    """A copy of (height, width, 3) uint8 RGB pixels with the outlines of (n, 2) polygons on it, in an RGB color."""
    canvas = image.copy()
    thickness = max(1, round(max(image.shape[:2]) / 800))
    outlines = [np.round(polygon).astype(np.int32) for polygon in polygons]
    cv2.polylines(canvas, outlines, isClosed=True, color=color, thickness=thickness, lineType=cv2.LINE_AA)
    return canvas


def overlay_names(names: list[str]) -> dict[str, str]:
    """What the picture of each image is called: a.jpg of a.png; a.png.jpg where there is another image a."""
    stems = Counter(map(name_stem, names))
    return {name: f"{name_stem(name) if stems[name_stem(name)] == 1 else name}.jpg" for name in names}


def sample_sheet(dataset: TextDataset, count: int = 4, side: int = 480) -> np.ndarray:
    """Augmented training samples, a row each: image with polygons, probability map, threshold map over the image.

    Returns (count x side, 3 x side, 3) uint8 RGB. Raises ImageError for one that cannot be read.
    """
    rows = []
    for index in range(min(count, len(dataset))):
        _, letterbox = dataset.load(index)
        text, illegible, _ = dataset.polygons(index, letterbox, dataset.augmentation(Draw(index)))
        sample = dataset[index]
        image = sample["image"]
        panels = [
            draw_polygons(draw_polygons(image, text), illegible, DONT_CARE_COLOR),
            cv2.cvtColor(sample["prob_map"] * 255, cv2.COLOR_GRAY2RGB),
            cv2.applyColorMap(sample["thresh_levels"], cv2.COLORMAP_VIRIDIS)[..., ::-1],
        ]
        size = Letterbox(image.shape[1], image.shape[0], side).resized
        row = np.zeros((side, 3 * side, 3), np.uint8)
        for left, panel in zip(range(0, 3 * side, side), panels, strict=True):
            row[: size[1], left : left + size[0]] = cv2.resize(panel, size, interpolation=cv2.INTER_AREA)
        rows.append(row)
    return np.vstack(rows)


def write_image(path: Path, image: np.ndarray) -> None:
    """Write (height, width, 3) uint8 RGB pixels as .png or .jpg. Raises UserError where it cannot."""
    suffix = path.suffix.lower()
    if suffix not in (".png", ".jpg", ".jpeg"):
        raise UserError(f"{path}: pictures are written as .png or .jpg; name such a file")
    _, data = cv2.imencode(suffix, np.ascontiguousarray(image[..., ::-1]))
    try:
        path.write_bytes(data.tobytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); name another file") from None
