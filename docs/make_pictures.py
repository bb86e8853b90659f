"""Make the pictures of the documentation: the steps from pixels to polygons on one receipt, and the text found in four.

    python docs/make_pictures.py weights/lite.pt --seed 0
    python docs/make_pictures.py runs/NAME/best.pt --image receipt.jpg

Writes detections.jpg, input.jpg, shrinking.jpg, targets.jpg, maps.jpg and polygons.jpg beside this script. The receipts
are rendered, so that their exact outlines are known; --image gives only input.jpg, maps.jpg and polygons.jpg.
"""

import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # finds dbnet from any folder

from dbnet.checkpoint import load_checkpoint, load_weights
from dbnet.config import ArgumentParser, Config
from dbnet.errors import run_script
from dbnet.files import make_folder
from dbnet.geometry import Letterbox, padded
from dbnet.images import read_image
from dbnet.model import DBNet
from dbnet.pictures import DONT_CARE_COLOR, draw_polygons
from dbnet.postprocess import extract_polygons, find_regions
from dbnet.synth.receipt import system_fonts
from dbnet.synth.scene import LabelledWord, render_receipt
from dbnet.targets import draw_targets, make_targets

HEIGHT = 640  # of a picture, in pixels
GAP = 12  # between its panels
ZOOM = 6  # of shrinking.jpg
ZOOMED = (150, 64)  # width and height that it shows, in pixels of the network's image


def main() -> None:
    parser = ArgumentParser(__doc__)
    parser.add_argument("checkpoint", type=Path, metavar="CKPT", help="checkpoint whose maps are shown")
    parser.add_argument("--image", type=Path, metavar="FILE", help="an image to show in place of a rendered receipt")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, metavar="DIR", help="where to (docs/)")
    parser.add_config_flags(of_checkpoint=True)
    args, changes = parser.parse()
    model, config = load_network(args.checkpoint, changes)
    make_folder(args.out)
    if args.image:
        pixels, words = read_image(args.image, None)[0], []
    else:
        pixels, words = render(config, 0)
    letterbox = Letterbox(pixels.shape[1], pixels.shape[0], config.image_size)
    image = letterbox.resize(pixels)
    save(args.out / "input.jpg", [image])
    if not args.image:
        save(args.out / "detections.jpg", draw_detections(model, config))
        polygons = [letterbox.to_network(polygon) for polygon, _, _ in words]
        save(args.out / "shrinking.jpg", [zoom(image, polygons, config)])
        save(args.out / "targets.jpg", draw_learned(image, polygons, config))
    prob_map, thresh_map = run_network(model, image)
    save(args.out / "maps.jpg", draw_maps(prob_map, thresh_map, config))
    save(args.out / "polygons.jpg", draw_post_processing(image, prob_map, config))


def load_network(path: Path, changes: dict[str, Any]) -> tuple[DBNet, Config]:
    """The network with both branches; `dbnet.checkpoint.load_model` gives one without the threshold branch."""
    content = load_checkpoint(path)
    config = content["config"].changed(**changes)
    model = DBNet(config.changed(weights="none"))
    load_weights(model, content, path, config)
    return model.eval(), config


def render(config: Config, place: int) -> tuple[np.ndarray, list[LabelledWord]]:
    """A receipt with labelled pieces of lines; the seed is `config.seed + place`."""
    rng = np.random.default_rng(config.seed + place)
    return render_receipt(rng, config.image_size, lines=True, others=system_fonts())


def draw_detections(model: DBNet, config: Config) -> list[np.ndarray]:
    """Four receipts with the polygons found in each."""
    panels = []
    for place in range(4):
        pixels, _ = render(config, place)
        image = Letterbox(pixels.shape[1], pixels.shape[0], config.image_size).resize(pixels)
        prob_map, _ = run_network(model, image)
        polygons, _ = extract_polygons(prob_map, config, max_size=image.shape[1::-1])
        panels.append(draw_polygons(image, polygons))
    return panels


def draw_learned(image: np.ndarray, polygons: list[np.ndarray], config: Config) -> list[np.ndarray]:
    """The image with its annotation, and the two target maps that are made of it."""
    prob_map, thresh_map = make_targets(polygons, *image.shape[:2], config.shrink_ratio)
    return [draw_polygons(image, polygons), gray(prob_map), coloured(thresh_map, config)]


def zoom(image: np.ndarray, polygons: list[np.ndarray], config: Config) -> np.ndarray:
    """A line of text enlarged, one that fills most of the picture: its outline, its kernel (the shrunk outline) and the
    levels of the threshold map."""
    shown = min(polygons, key=lambda polygon: abs(np.ptp(polygon[:, 0]) - 0.7 * ZOOMED[0]))
    left, top = (shown.mean(axis=0) - np.array(ZOOMED) / 2).clip(0).astype(int)
    window = image[top : top + ZOOMED[1], left : left + ZOOMED[0]]
    enlarged = cv2.resize(window, None, fx=ZOOM, fy=ZOOM, interpolation=cv2.INTER_CUBIC)
    moved = [(polygon - (left, top) + 0.5) * ZOOM for polygon in polygons]
    kernels, levels, _ = draw_targets(moved, *enlarged.shape[:2], config.shrink_ratio)
    contours, _ = cv2.findContours(kernels, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    glow = coloured(levels / 255, config, low=0, high=1)
    border = cv2.addWeighted(enlarged, 0.45, glow, 0.55, 0)
    drawn = draw_polygons(np.where(levels[..., None] > 0, border, enlarged), moved)
    return draw_polygons(drawn, [contour[:, 0] for contour in contours], DONT_CARE_COLOR)


@torch.inference_mode()
def run_network(model: DBNet, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Probability and threshold map, (height, width) float32 each, of (height, width, 3) uint8 RGB pixels."""
    height, width = image.shape[:2]
    canvas = np.zeros((padded(height), padded(width), 3), np.uint8)
    canvas[:height, :width] = image
    model.eval()
    model.training = True  # for the outermost module alone: returns both maps, with the layers in eval mode
    maps = model(torch.from_numpy(canvas)[None])
    prob_map, thresh_map = (logits[0, :height, :width].float().sigmoid().numpy() for logits in maps)
    return prob_map, thresh_map


def draw_maps(prob_map: np.ndarray, thresh_map: np.ndarray, config: Config) -> list[np.ndarray]:
    """The maps P and T of the network, and their approximate binary map, which the dice loss compares."""
    binary_map = 1 / (1 + np.exp(-config.binarization_k * (prob_map - thresh_map)))
    return [gray(prob_map), coloured(thresh_map, config), gray(binary_map)]


def draw_post_processing(image: np.ndarray, prob_map: np.ndarray, config: Config) -> list[np.ndarray]:
    """The thresholded map, the regions in it whose score is enough, and the same grown to polygons."""
    regions = [region.shrunk for region in find_regions(prob_map, config)]
    polygons, _ = extract_polygons(prob_map, config, max_size=image.shape[1::-1])
    return [
        gray(prob_map > config.thresh),
        draw_polygons(image, regions, DONT_CARE_COLOR),
        draw_polygons(image, polygons),
    ]


def gray(values: np.ndarray) -> np.ndarray:
    """(height, width, 3) uint8 of (height, width) values in 0..1."""
    return cv2.cvtColor((np.asarray(values, np.float32) * 255).astype(np.uint8), cv2.COLOR_GRAY2RGB)


def coloured(values: np.ndarray, config: Config, low: float | None = None, high: float | None = None) -> np.ndarray:
    """(height, width, 3) uint8 RGB of (height, width) values from thresh_min, dark, to thresh_max, bright."""
    low, high = config.thresh_min if low is None else low, config.thresh_max if high is None else high
    levels = ((values - low) / (high - low)).clip(0, 1) * 255
    return np.ascontiguousarray(cv2.applyColorMap(levels.astype(np.uint8), cv2.COLORMAP_VIRIDIS)[..., ::-1])


def save(path: Path, panels: list[np.ndarray]) -> None:
    """Write panels beside each other, all as high as the lowest of them."""
    height = min(HEIGHT, *(panel.shape[0] for panel in panels))
    gap = np.full((height, GAP, 3), 255, np.uint8)
    parts = []
    for panel in panels:
        width = round(panel.shape[1] * height / panel.shape[0])
        parts += [gap, cv2.resize(panel, (width, height), interpolation=cv2.INTER_AREA)]
    _, data = cv2.imencode(".jpg", np.hstack(parts[1:])[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 80])
    path.write_bytes(data.tobytes())
    print(f"{path} ({path.stat().st_size // 1000} kB)")


if __name__ == "__main__":
    run_script(main)
