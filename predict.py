"""Detect text in images and write a submission file.

    python predict.py --out submission.csv                         newest runs/*/best.pt on DATA/images/test
    python predict.py runs/NAME/best.pt --images photos/ --overlays overlays/
    python predict.py runs/NAME/best.pt --images a.jpg b.png --box-thresh 0.35
    python predict.py --images scans/*.pdf 'photos/**/*.jpg' --out found.json

The CSV has a row for each image, `filename,polygons`: polygons separated by `|`, each `x1 y1 x2 y2 ...` in whole
pixels of the image as a viewer shows it. Other formats, by the suffix of --out or --out-format:

    .csv    csv           the submission
    .json   competition   the annotation format of jsons/SPLIT.json, with a score for each word
    .zip    icdar         res_NAME.txt for each image, lines of x1,y1,...,xn,yn (ICDAR 2015 wants --use-polygon false)
            coco          COCO annotations with scores, whose list of annotations is COCO's results

The file is written whole or not at all. A page of a PDF is an image called FILE.pdf#page=NUMBER, in pixels at 200 dpi.
"""

from pathlib import Path

from dbnet.config import ArgumentParser
from dbnet.errors import UserError, run_script


def main() -> None:
    parser = ArgumentParser(__doc__)
    parser.add_argument("checkpoint", nargs="?", type=Path, metavar="CKPT", help="checkpoint (newest runs/*/best.pt)")
    parser.add_argument(
        "--images",
        nargs="+",
        type=Path,
        metavar="PLACE",
        help="folders, images, PDFs, quoted patterns (DATA/images/test)",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("submission.csv"), metavar="FILE", help="where to (submission.csv)"
    )
    parser.add_argument(
        "--out-format",
        choices=("auto", "csv", "competition", "icdar", "coco"),
        default="auto",
        help="format of that file (by its suffix)",
    )
    parser.add_argument("--overlays", type=Path, metavar="DIR", help="also write each image with its polygons here")
    parser.add_config_flags()
    args, changes = parser.parse()
    checkpoint = args.checkpoint or newest_checkpoint()

    # Imported here, so that --help and a mistaken command line answer at once.
    import torch
    from tqdm import tqdm

    from dbnet.annotations import Annotation, find_images_at, read_image_paths
    from dbnet.checkpoint import load_model
    from dbnet.dataset import ImageDataset
    from dbnet.device import pick_device
    from dbnet.files import check_writable, make_folder
    from dbnet.images import name_stem, read_image, read_size
    from dbnet.inference import Pipeline
    from dbnet.overlay import draw_polygons, write_image
    from dbnet.submission import choose_format, write_detections

    model, config, _ = load_model(checkpoint, changes)
    paths = find_images_at(args.images) if args.images else read_image_paths(Path(config.data), "test", config.format)
    form = choose_format(args.out, args.out_format, [path.name for path in paths])
    device = pick_device(config.device)
    check_writable(args.out)
    if args.overlays:
        make_folder(args.overlays)
    model.to(device, memory_format=torch.channels_last)
    print(f"{checkpoint} ({config.backbone}, {config.image_size} px) on {len(paths)} images, {device}")

    rows = {path.name: Annotation() for path in paths}
    unreadable = []
    pipeline = Pipeline(ImageDataset(paths, config), config, device)
    for detection in tqdm(pipeline.detect(model), total=len(paths), unit="img", dynamic_ncols=True, smoothing=0):
        path = paths[detection.index]
        rows[path.name] = Annotation(detection.polygons, [False] * len(detection.polygons), detection.scores)
        if detection.error:
            unreadable.append(detection.error)
            continue
        if form in ("competition", "coco"):
            rows[path.name].size = read_size(path)
        if args.overlays:
            pixels, _ = read_image(path)
            write_image(args.overlays / f"{name_stem(path.name)}.jpg", draw_polygons(pixels, detection.polygons))
    write_detections(args.out, form, rows)
    for line in unreadable:
        print(f"no polygons: {line}")
    found = sum(len(annotation.polygons) for annotation in rows.values())
    print(f"{args.out}: {len(rows)} images, {found} polygons, {len(unreadable)} images could not be read")
    if form == "icdar" and any(len(polygon) != 4 for row in rows.values() for polygon in row.polygons):
        print(f"{args.out}: has polygons of more than four points; where a form refuses them, add --use-polygon false")
    if args.overlays:
        print(f"{args.overlays}: the images with their polygons")


def newest_checkpoint() -> Path:
    """The best checkpoint of the run that wrote one last."""
    found = sorted(Path("runs").glob("*/best.pt"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise UserError("runs/: holds no best.pt; train first, or name a checkpoint: python predict.py CKPT")
    return found[-1]


if __name__ == "__main__":
    run_script(main)
