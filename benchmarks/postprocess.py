"""Post-processing on one core: a probability map of 1024 x 1024 pixels to polygons.

    python benchmarks/postprocess.py [--data DIR]

Maps are drawn from the annotations of receipts with about 58 words, then blurred and roughened until the competition's
baseline takes as long on them as on a network's map: 0.85 of the yardstick. thresh is 0.3 and box_thresh 0.25.
"""

import cv2
import numpy as np
from measure import parse_arguments, print_table, print_versions, time_and_ratio, use_one_core

from dbnet.augment import Augmentation
from dbnet.config import Config
from dbnet.dataset import Draw, TextDataset
from dbnet.postprocess import extract_polygons
from dbnet.targets import draw_targets

REACH = 0.28  # multiples of the yardstick; the baseline takes 0.85
MAPS = 4


def main() -> None:
    args = parse_arguments(__doc__)
    use_one_core()
    print_versions()
    config = Config.from_preset("v1", data=str(args.data))
    dataset = TextDataset(config, "train", train=True)
    receipts = sorted(range(len(dataset)), key=lambda i: abs(len(dataset.annotations[i].polygons) - 58))[:MAPS]
    maps = [draw_prob_map(dataset, index) for index in receipts]
    rows = []
    for name, settings in (("polygon", config), ("quad", config.changed(use_polygon=False))):
        for kind, convert in (
            ("float32", np.asarray),
            ("uint8", lambda prob_map: np.rint(prob_map * 255).astype("u1")),
        ):
            inputs = [convert(prob_map) for prob_map in maps]
            found = [extract_polygons(prob_map, settings)[0] for prob_map in inputs]
            words = sum(map(len, found)) / MAPS
            points = np.mean([len(polygon) for polygons in found for polygon in polygons])
            took = time_and_ratio(
                lambda inputs=inputs, by=settings: [extract_polygons(each, by) for each in inputs], MAPS
            )
            reach = REACH if name == "polygon" else ""
            rows.append((f"{name} mode, {kind}, {words:.0f} words of {points:.0f} points", *took, reach))
    print_table("One probability map of 1024 x 1024", ("what", "ms", "x yardstick", "reach"), rows)


def draw_prob_map(dataset: TextDataset, index: int) -> np.ndarray:
    """(1024, 1024) float32: the text kernels of a receipt as a network gives them, soft and not quite straight."""
    _, letterbox = dataset.load(Draw(index))
    text, _ = dataset.polygons(index, letterbox, Augmentation())
    side = dataset.config.image_size
    kernels = draw_targets(text, side, side)[0].astype(np.float32)
    noise = np.random.default_rng(index).normal(0, 1, (side // 8, side // 8)).astype(np.float32)
    rough = cv2.resize(noise, (side, side), interpolation=cv2.INTER_CUBIC)
    return np.clip(cv2.GaussianBlur(kernels, (0, 0), 1.5) + 0.14 * rough, 0, 1) * (cv2.blur(kernels, (9, 9)) > 0)


if __name__ == "__main__":
    main()
