"""Detect text in images and write a submission file.

    python predict.py --out submission.csv                         newest runs/*/best.pt on DATA/images/test
    python predict.py --images photos/                             with no run in runs/: the weights that come along
    python predict.py runs/A/best.pt runs/B/best.pt --tta          mean of two networks, at several sizes
    python predict.py runs/NAME/best.pt --images photos/ --overlays overlays/
    python predict.py --images scans/*.pdf 'photos/**/*.jpg' --out found.json
    python predict.py --images photos/ --resume                    continue an interrupted prediction
    torchrun --nproc-per-node 4 -- predict.py --images photos/     on four GPUs

The CSV has a row for each image, `filename,polygons`: polygons separated by `|`, each `x1 y1 x2 y2 ...` in whole
pixels of the image as a viewer shows it. Other formats, by the suffix of --out or --out-format:

    .csv    csv           the submission
    .json   competition   the annotation format of jsons/SPLIT.json, with a score for each word
    .zip    icdar         res_NAME.txt for each image, lines of x1,y1,...,xn,yn (ICDAR 2015 wants --use-polygon false)
            coco          COCO annotations with scores, whose list of annotations is COCO's results; CVAT imports it
    folder  labelme       NAME.json for each image, for LabelMe; into the folder of the images, or another
    .txt    ppocrlabel    Label.txt of PPOCRLabel, into the folder of the images

All but the CSV are labels to correct: in reading order, outlines of 4 points, or of 4 + 4 where no rectangle fits, from
the upper left along the top and back along the bottom. --data reads the corrected files as they are.

The file is written whole or not at all; until then, OUT.rankN.partial hold the results so far, and --resume detects
again what failed, or whose image, checkpoint or settings have changed. An image that cannot be read is listed without
polygons; if none can, the exit status is 2. A page of a PDF is an image FILE.pdf#page=NUMBER, in pixels at 200 dpi."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dbnet.config import ArgumentParser
from dbnet.errors import ImageError, UserError, printable, run_script

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Iterable

    from dbnet.annotations import Annotation
    from dbnet.files import Journal
    from dbnet.inference import Detection
    from dbnet.pictures import ImagePictures

SETTINGS_APART = {"batch_size", "cache_gb", "compile", "data", "device", "workers"}  # results do not depend on these


def main() -> None:
    parser = ArgumentParser(__doc__)
    weights_help = "checkpoint, several whose probability maps are averaged, a .onnx file, or lite (finds lines) or "
    weights_help += "lite-words, which come with the program (newest runs/*/best.pt, else lite)"
    parser.add_argument("checkpoints", nargs="*", type=Path, metavar="CKPT", help=weights_help)
    images_help = "folders, images, PDFs, quoted patterns (DATA/images/test)"
    parser.add_argument("--images", nargs="+", type=Path, metavar="PLACE", help=images_help)
    out = Path("submission.csv")
    parser.add_argument("--out", type=Path, default=out, metavar="FILE", help=f"file to write ({out})")
    formats = ("auto", "csv", "competition", "icdar", "coco", "labelme", "ppocrlabel")
    parser.add_argument("--out-format", choices=formats, default="auto", help="format of that file (by its suffix)")
    parser.add_argument("--overlays", type=Path, metavar="DIR", help="also write the images with their polygons here")
    crops_help = "also write each word here, upright, with index.csv in reading order"
    parser.add_argument("--crops", type=Path, metavar="DIR", help=crops_help)
    order_help = "order of the images in the file: uncertainty puts first those whose labels need most correction"
    parser.add_argument("--sort-by", choices=("name", "uncertainty"), default="name", help=order_help)
    parser.add_switch("--resume", "continue an interrupted prediction for --out")
    parser.add_config_flags(of_checkpoint=True)
    run(*parser.parse())


def run(args: Namespace, changes: dict[str, Any]) -> None:
    """Detect text in the images that `args` names; the first process writes the results of all."""
    from dbnet.annotations import Annotation, choose_format, result_mark, uncertainty, write_detections
    from dbnet.dataset import ImageDataset
    from dbnet.device import all_gather, from_first, init_process_group, is_first, print0, progress, rank, world_size
    from dbnet.files import Journal, check_outputs, make_folder, stamp
    from dbnet.images import file_of
    from dbnet.inference import Pipeline, find_weights, load_network, print_full
    from dbnet.pictures import ImagePictures
    from dbnet.splits import find_images_at, find_labels, read_images

    init_process_group()
    checkpoints = [find_weights(path) for path in args.checkpoints or [from_first(default_checkpoint)]]
    for place in args.images or []:
        if place.suffix.lower() in (".pt", ".onnx"):  # --images takes all words that follow it
            raise UserError(f"--images {place}: is a checkpoint, not an image; name it in front of --images")
    network = load_network(checkpoints, changes)
    config = network.config
    images = find_images_at(args.images) if args.images else read_images(config.data, "test", config.format)
    labels = [] if args.images else find_labels(config.data, "test", config.format)
    paths = list(images.values())
    form = choose_format(args.out, args.out_format, list(images))
    pictures = ImagePictures(args.overlays, args.crops, images)
    if form == "labelme":
        make_folder(args.out)
    out = None if form == "labelme" else args.out  # choose_format has seen that no file of the folder is overwritten
    check_outputs((out, result_mark(form)), *pictures.outputs(), inputs=[*checkpoints, *labels, *map(file_of, paths)])

    settings = {name: value for name, value in config.to_dict().items() if name not in SETTINGS_APART}
    made_by = [settings, *map(str, (args.overlays, args.crops)), *map(stamp, checkpoints)]
    journal = Journal(args.out, rank(), made_by, args.resume)
    keys = {path: journal.key(path, file_of(path)) for path in paths}
    done = {path: Annotation.detected(*journal.done[keys[path]]) for path in paths if keys[path] in journal.done}
    found = {path: annotation for path, annotation in done.items() if pictures.are_there(path, annotation)}
    rest = [path for path in paths if path not in found]
    all_gather(None)  # no process writes before each has read
    earlier = f"; {len(found)} are done" if args.resume else ""
    print0(f"{' '.join(map(str, checkpoints))} ({network}) on {len(rest)} images, {network.device}{earlier}")
    detections = Pipeline(ImageDataset(rest, config), config, network.device).detect(network)
    detections = progress(detections, total=-(-len(rest) // world_size()))
    newly, unreadable = collect(detections, rest, pictures, journal, keys)
    for theirs, failed in all_gather((newly, unreadable)):
        found |= theirs
        unreadable |= failed
    if is_first():
        rows = {name: found[path] for name, path in images.items()}
        if args.sort_by == "uncertainty":
            rows = dict(sorted(rows.items(), key=lambda row: -uncertainty(row[1])))
        write_detections(args.out, form, rows, images)
        pictures.write_index(images, {name: row for name, row in rows.items() if images[name] not in unreadable})
        journal.remove()
        lines = [unreadable[path] for path in paths if path in unreadable]
        print_summary(args, form, rows, lines)
        print_full(((name, len(row.polygons), row.size) for name, row in rows.items()), config)
        if not any(row.size for row in rows.values()):
            raise UserError(f"{args.out}: is written, but none of the {len(rows)} images could be read; {lines[0]}")


def collect(
    detections: Iterable[Detection], paths: list[Path], pictures: ImagePictures, journal: Journal, keys: dict[Path, str]
) -> tuple[dict[Path, Annotation], dict[Path, str]]:
    """Write pictures and journal of the images that this process detects text in. Returns what is found in them, and a
    line for each that could not be read."""
    from dbnet.annotations import Annotation

    found: dict[Path, Annotation] = {}
    unreadable: dict[Path, str] = {}
    for detection in detections:
        path = paths[detection.index]
        found[path] = Annotation.detected(detection.polygons, detection.scores, detection.size)
        if detection.error:
            unreadable[path] = f"no polygons: {detection.error}"
            continue
        try:
            pictures.write(path, found[path])
        except ImageError as error:  # it is gone since, or can be read at reduced size alone
            unreadable[path] = f"no pictures: {error}"
        else:
            journal.add(keys[path], [[each.tolist() for each in detection.polygons], detection.scores, detection.size])
    return found, unreadable


def print_summary(args: Namespace, form: str, rows: dict[str, Annotation], failures: list[str]) -> None:
    """Say what was written where, and what failed."""
    for line in failures:
        print(line)
    polygons, unreadable = sum(len(row.polygons) for row in rows.values()), sum(not row.size for row in rows.values())
    print(f"{args.out}: {len(rows)} images, {polygons} polygons, {unreadable} images could not be read")
    if form == "icdar" and any(len(polygon) != 4 for row in rows.values() for polygon in row.polygons):
        print(f"{args.out}: has polygons of more than four points; if a website rejects them, add --use-polygon false")
    if args.sort_by == "uncertainty":
        print(f"to correct first: {', '.join(printable(name) for name in list(rows)[:10])}")


def default_checkpoint() -> Path:
    """The newest best.pt of all runs; without a run, `lite`, which comes with the program."""
    found = sorted(Path("runs").glob("*/best.pt"), key=lambda path: path.stat().st_mtime)
    if not found:
        print("no run in runs/: the weights lite, which come with dbnet, are used")
    return found[-1] if found else Path("lite")


cli = partial(run_script, main)  # the command dbnet-predict

if __name__ == "__main__":
    cli()
