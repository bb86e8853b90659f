"""Detect text in images and write a submission file.

    python predict.py --out submission.csv                         newest runs/*/best.pt on DATA/images/test
    python predict.py --images photos/                             with no run in runs/: the weights that come along
    python predict.py runs/A/best.pt runs/B/best.pt --tta          mean of two networks, at several sizes
    python predict.py runs/NAME/best.pt --images photos/ --overlays overlays/
    python predict.py runs/NAME/best.pt --images a.jpg b.png --box-thresh 0.35

The CSV has a row for each image, `filename,polygons`: polygons separated by `|`, each `x1 y1 x2 y2 ...` in whole
pixels of the image as a viewer shows it. It is written whole or not at all.
"""

from pathlib import Path

from dbnet.config import ArgumentParser
from dbnet.errors import run_script


def main() -> None:
    parser = ArgumentParser(__doc__)
    parser.add_argument(
        "checkpoints",
        nargs="*",
        type=Path,
        metavar="CKPT",
        help="checkpoint, several whose probability maps are averaged, or a .onnx file (newest runs/*/best.pt)",
    )
    parser.add_argument(
        "--images", nargs="+", type=Path, metavar="DIR|FILE", help="folders or files (DATA/images/test)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("submission.csv"), metavar="FILE.csv", help="where to (submission.csv)"
    )
    parser.add_argument("--overlays", type=Path, metavar="DIR", help="also write each image with its polygons here")
    parser.add_config_flags()
    args, changes = parser.parse()

    # Imported here, so that --help and a mistaken command line answer at once.
    from tqdm import tqdm

    from dbnet.annotations import find_images_at, read_image_paths
    from dbnet.dataset import ImageDataset
    from dbnet.files import check_writable, make_folder
    from dbnet.images import read_image
    from dbnet.inference import Pipeline, load_network
    from dbnet.overlay import draw_polygons, write_image
    from dbnet.submission import write_submission

    checkpoints = args.checkpoints or [default_checkpoint()]
    network = load_network(checkpoints, changes)
    config = network.config
    paths = find_images_at(args.images) if args.images else read_image_paths(Path(config.data), "test")
    check_writable(args.out)
    if args.overlays:
        make_folder(args.overlays)
    print(f"{' '.join(map(str, checkpoints))} ({network}) on {len(paths)} images, {network.device}")

    rows = {path.name: [] for path in paths}
    unreadable = []
    pipeline = Pipeline(ImageDataset(paths, config), config, network.device)
    for detection in tqdm(pipeline.detect(network), total=len(paths), unit="img", dynamic_ncols=True, smoothing=0):
        path = paths[detection.index]
        rows[path.name] = detection.polygons
        if detection.error:
            unreadable.append(detection.error)
        elif args.overlays:
            pixels, _ = read_image(path)
            write_image(args.overlays / f"{path.stem}.jpg", draw_polygons(pixels, detection.polygons))
    write_submission(args.out, rows)
    for line in unreadable:
        print(f"no polygons: {line}")
    found = sum(map(len, rows.values()))
    print(f"{args.out}: {len(rows)} images, {found} polygons, {len(unreadable)} images could not be read")
    if args.overlays:
        print(f"{args.overlays}: the images with their polygons")


def default_checkpoint() -> Path:
    """The best checkpoint of the run that wrote one last; without a run, the weights that come with the program."""
    found = sorted(Path("runs").glob("*/best.pt"), key=lambda path: path.stat().st_mtime)
    if found:
        return found[-1]
    from dbnet.inference import shipped_weights

    weights = shipped_weights()
    print(f"no run in runs/: the weights that come with dbnet are used, {weights}")
    return weights


if __name__ == "__main__":
    run_script(main)
