"""Detect text in images and write a submission file.

    python predict.py --out submission.csv                         newest runs/*/best.pt on DATA/images/test
    python predict.py --images photos/                             with no run in runs/: the weights that come along
    python predict.py runs/A/best.pt runs/B/best.pt --tta          mean of two networks, at several sizes
    python predict.py runs/NAME/best.pt --images photos/ --overlays overlays/
    python predict.py runs/NAME/best.pt --images a.jpg b.png --box-thresh 0.35
    python predict.py --images scans/*.pdf 'photos/**/*.jpg' --out found.json
    python predict.py --images photos/ --resume                    go on with a prediction that was cut short
    torchrun --nproc-per-node 4 -- predict.py --images photos/     on four GPUs

The CSV has a row for each image, `filename,polygons`: polygons separated by `|`, each `x1 y1 x2 y2 ...` in whole
pixels of the image as a viewer shows it. Other formats, by the suffix of --out or --out-format:

    .csv    csv           the submission
    .json   competition   the annotation format of jsons/SPLIT.json, with a score for each word
    .zip    icdar         res_NAME.txt for each image, lines of x1,y1,...,xn,yn (ICDAR 2015 wants --use-polygon false)
            coco          COCO annotations with scores, whose list of annotations is COCO's results

The file is written whole or not at all; until then, OUT.rankN.partial hold the results so far. A page of a PDF is an
image called FILE.pdf#page=NUMBER, in pixels at 200 dpi.
"""

from pathlib import Path

from dbnet.config import ArgumentParser
from dbnet.errors import run_script

SETTINGS_APART = {"batch_size", "cache_gb", "compile", "data", "device", "workers"}  # results do not depend on these


def main() -> None:
    parser = ArgumentParser(__doc__)
    parser.add_argument(
        "checkpoints",
        nargs="*",
        type=Path,
        metavar="CKPT",
        help="checkpoint, several whose probability maps are averaged, or a .onnx file (newest runs/*/best.pt, else "
        "weights/lite.pt)",
    )
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
    parser.add_argument("--resume", action="store_true", help="go on with a prediction for --out that was cut short")
    parser.add_config_flags(of_checkpoint=True)
    args, changes = parser.parse()

    # Imported here, so that --help and a mistaken command line answer at once.
    from tqdm import tqdm

    from dbnet import distributed
    from dbnet.annotations import Annotation, choose_format, write_detections
    from dbnet.dataset import ImageDataset
    from dbnet.files import check_writable, make_folder
    from dbnet.images import read_image, read_size
    from dbnet.inference import Pipeline, load_network
    from dbnet.partial import Found, Partial
    from dbnet.pictures import draw_polygons, overlay_names, write_image
    from dbnet.splits import find_images_at, read_image_paths

    distributed.init()
    checkpoints = args.checkpoints or [distributed.from_first(default_checkpoint)]
    network = load_network(checkpoints, changes)
    config = network.config
    paths = find_images_at(args.images) if args.images else read_image_paths(Path(config.data), "test", config.format)
    form = choose_format(args.out, args.out_format, [path.name for path in paths])
    check_writable(args.out)
    if args.overlays:
        make_folder(args.overlays)
    names = overlay_names([path.name for path in paths])
    settings = {name: value for name, value in config.to_dict().items() if name not in SETTINGS_APART}
    settings["checkpoints"] = [[path.stat().st_size, path.stat().st_mtime_ns] for path in checkpoints]
    with Partial(args.out, settings, args.resume) as partial:
        rest = [path for path in paths if str(path) not in partial.done]
        distributed.print0(
            f"{' '.join(map(str, checkpoints))} ({network}) on {len(rest)} images, {network.device}"
            + (f"; {len(paths) - len(rest)} are done" if args.resume else "")
        )
        pipeline = Pipeline(ImageDataset(rest, config), config, network.device)
        for detection in tqdm(
            pipeline.detect(network),
            total=-(-len(rest) // distributed.world_size()),
            unit="img",
            dynamic_ncols=True,
            smoothing=0,
            disable=not distributed.is_first(),
        ):
            path = rest[detection.index]
            found = Annotation(detection.polygons, [False] * len(detection.polygons), detection.scores)
            if not detection.error and form in ("competition", "coco"):
                found.size = read_size(path)
            if not detection.error and args.overlays:
                pixels, _ = read_image(path)
                write_image(args.overlays / names[path.name], draw_polygons(pixels, detection.polygons))
            partial.add(str(path), found, detection.error)
        done: dict[str, Found] = {}
        for share in distributed.all_gather(partial.done):
            done |= share
        if not distributed.is_first():
            return
        rows = {path.name: done[str(path)][0] for path in paths}
        write_detections(args.out, form, rows)
    unreadable = [error for path in paths if (error := done[str(path)][1])]
    for line in unreadable:
        print(f"no polygons: {line}")
    polygons = sum(len(annotation.polygons) for annotation in rows.values())
    print(f"{args.out}: {len(rows)} images, {polygons} polygons, {len(unreadable)} images could not be read")
    if form == "icdar" and any(len(polygon) != 4 for row in rows.values() for polygon in row.polygons):
        print(f"{args.out}: has polygons of more than four points; where a form refuses them, add --use-polygon false")
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


def cli() -> None:
    """Run `main`: the entry point of the command dbnet-predict."""
    run_script(main)


if __name__ == "__main__":
    cli()
