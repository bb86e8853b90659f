"""Score a checkpoint, or a submission file, on an annotated split with CLEval, or tune a checkpoint's thresholds on it.

    python evaluate.py runs/NAME/best.pt                       on the validation images
    python evaluate.py runs/NAME/best.pt --box-thresh 0.35     with another threshold than it was trained with
    python evaluate.py --submission submission.csv             without a network
    python evaluate.py runs/NAME/best.pt --json scores.json    all numbers, image by image
    python evaluate.py runs/A/best.pt runs/B/best.pt --tta     mean of two networks, at several sizes
    python evaluate.py runs/NAME/best.pt --report report.html  a page that shows each image and each mistake
    python evaluate.py runs/NAME/best.pt --compare scores.json what got better and worse since those scores
    python evaluate.py runs/NAME/best.pt --tune                which thresholds and unclip ratio would be best
    python evaluate.py runs/NAME/best.pt --tune --save         and keep them in the checkpoint, if they really are
    torchrun --nproc-per-node 4 -- evaluate.py runs/NAME/best.pt  on four GPUs

Precision, recall and H-Mean are means over the images. A checkpoint carries its configuration; flags override it.
"""

import argparse
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dbnet.config import ArgumentParser, Config
from dbnet.errors import UserError, run_script

if TYPE_CHECKING:
    from dbnet.evaluation import Comparison, Evaluation
    from dbnet.inference import Network, Pipeline
    from dbnet.tuning import Tuning

REPORTED = ("data", "backbone", "image_size", "use_polygon", "thresh", "box_thresh", "polygon_unclip_ratio", "min_size")
# What says where and how fast, but not what the network sees or how its maps are read: --save leaves these as they are.
FREE_TO_SAVE = {"data", "format", "workers", "strict", "batch_size", "device", "amp", "compile"}


def main() -> None:
    parser = ArgumentParser(__doc__)
    parser.add_argument(
        "checkpoints",
        nargs="*",
        type=Path,
        metavar="CKPT",
        help="checkpoint to score, several whose probability maps are averaged, or a .onnx file",
    )
    parser.add_argument(
        "--submission",
        type=Path,
        metavar="FILE",
        help="submission to score in place of it, in any format that predict.py writes",
    )
    parser.add_argument("--split", default="val", help="split of the data set (val)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all scores as JSON")
    parser.add_argument("--report", type=Path, metavar="FILE.html", help="write a page that shows every image")
    parser.add_argument("--compare", type=Path, metavar="FILE", help="JSON of another evaluation to compare with")
    parser.add_argument("--tune", action="store_true", help="search the best thresholds, unclip ratio and min_size")
    parser.add_argument("--save", action="store_true", help="with --tune: keep the best ones in the checkpoint")
    parser.add_argument(
        "--tune-picture", type=Path, metavar="FILE.png", help="picture of the search (tuning.png beside the checkpoint)"
    )
    parser.add_config_flags(of_checkpoint=True)
    args, changes = parser.parse()
    if bool(args.checkpoints) == (args.submission is not None):
        raise UserError("name either a checkpoint or --submission FILE (see --help)")
    check_tuning_flags(args, changes)

    # Imported here, so that --help and a mistaken command line answer at once.
    from dbnet import distributed
    from dbnet.files import check_writable

    distributed.init()
    for path in filter(None, (args.json, args.report)):
        check_writable(path)
    if args.tune:
        tune_checkpoint(args, changes)
    else:
        score(args, changes)


def check_tuning_flags(args: argparse.Namespace, changes: dict[str, Any]) -> None:
    """Raise UserError for flags that do not go with --tune, and for --save with settings of another network."""
    if args.tune:
        for flag, value in (("--submission", args.submission), ("--report", args.report), ("--compare", args.compare)):
            if value:
                raise UserError(f"--tune: scores combinations of a checkpoint's settings; leave {flag} out")
    for flag, value in (("--save", args.save), ("--tune-picture", args.tune_picture)):
        if value and not args.tune:
            raise UserError(f"{flag}: belongs to --tune; add that, or leave {flag} out")
    if args.tune_picture and args.tune_picture.suffix.lower() != ".png":
        raise UserError(f"--tune-picture {args.tune_picture}: the picture is a PNG; name a FILE.png")
    others = sorted(changes.keys() - FREE_TO_SAVE)
    if args.save and others:
        raise UserError(
            f"--save: the checkpoint would get values that were tuned with another --{others[0].replace('_', '-')} "
            f"than its own; leave one of the two out"
        )
    if args.save and (len(args.checkpoints) > 1 or args.checkpoints[0].suffix.lower() == ".onnx"):
        raise UserError("--save: writes into a checkpoint; name one, and no .onnx file")


def score(args: argparse.Namespace, changes: dict[str, Any]) -> None:
    """Score the checkpoint or the submission, and show and write what was asked for."""
    from dbnet import distributed
    from dbnet.evaluation import Comparison
    from dbnet.files import write_json
    from dbnet.report import write_report

    comparison = Comparison.read(args.compare) if args.compare else None
    score_it = evaluate_submission if args.submission else evaluate_checkpoint
    if args.submission and not distributed.is_first():
        return
    evaluation, settings = score_it(args, changes, comparison)
    if not distributed.is_first():
        return
    print(evaluation.table())
    if comparison:
        comparison.compare(evaluation.per_image)
        print(comparison.table())
    if args.json:
        write_json(args.json, evaluation.to_dict())
        print(f"all scores: {args.json}")
    if args.report:
        title = f"{args.submission or names(args.checkpoints)} on {args.split}"
        write_report(args.report, evaluation, title, settings, comparison)
        print(f"report: {args.report} ({args.report.stat().st_size / 1e6:.1f} MB)")


def open_network(args: argparse.Namespace, changes: dict[str, Any]) -> "tuple[Network, Pipeline]":
    """The network, and the pipeline that runs it over the split."""
    from dbnet.dataset import TextDataset
    from dbnet.distributed import print0
    from dbnet.inference import Pipeline, load_network

    network = load_network(args.checkpoints, changes)
    config = network.config
    dataset = TextDataset(config, args.split, train=False)
    print0(f"{names(args.checkpoints)} ({network}) on {args.split} of {config.data}, {network.device}")
    return network, Pipeline(dataset, config, network.device)


def names(paths: list[Path]) -> str:
    """The paths as they are typed."""
    return " ".join(map(str, paths))


def evaluate_checkpoint(
    args: argparse.Namespace, changes: dict[str, Any], comparison: "Comparison | None"
) -> "tuple[Evaluation, dict[str, Any]]":
    """Run the network over the split and score what it finds; also the settings that the scores depend on."""
    from dbnet.distributed import print0
    from dbnet.evaluation import advise_on_collapse, evaluate
    from dbnet.report import picture_of

    network, pipeline = open_network(args, changes)
    if comparison:
        comparison.check_shares(path.name for path in pipeline.dataset.paths)
    evaluation = evaluate(pipeline, network, picture=picture_of if args.report else None)
    advice = advise_on_collapse(evaluation.compute(), evaluation.highest, pipeline.config)
    if advice:
        print0(advice)
    return evaluation, {field: getattr(pipeline.config, field) for field in REPORTED}


def evaluate_submission(
    args: argparse.Namespace, changes: dict[str, Any], comparison: "Comparison | None"
) -> "tuple[Evaluation, dict[str, Any]]":
    """Score the polygons of a submission file; images that it lacks count as without detections, and are said."""
    from dbnet.annotations import read_detections
    from dbnet.errors import ImageError
    from dbnet.evaluation import Evaluation
    from dbnet.images import read_size
    from dbnet.report import picture_of
    from dbnet.splits import read_labels

    config = Config().changed(**changes)
    split, annotations = read_labels(Path(config.data), args.split, config.format)
    submission = read_detections(args.submission, list(annotations))
    unknown = [name for name in submission if name not in annotations]
    if unknown:
        raise UserError(
            f"{args.submission}: {unknown[0]} is not in {split} (nor are {len(unknown) - 1} others); "
            f"choose the split with --split and the data set with --data"
        )
    if comparison:
        comparison.check_shares(annotations)
    print(f"{args.submission} on {split}")
    evaluation = Evaluation()
    for name, annotation in annotations.items():
        path = Path(config.data) / "images" / args.split / name
        try:
            size = read_size(path)
        except ImageError:  # a submission can be scored without the images, except by size of text
            size = None
        polygons = submission[name].polygons if name in submission else []
        evaluation.update(name, annotation, polygons, size=size)
        if args.report:
            evaluation.pictures[name] = picture_of(path, annotation, polygons)
    missing = [name for name in annotations if name not in submission]
    if missing:
        print(f"{len(missing)} images of the split have no row and count 0, {missing[0]} first")
    return evaluation, {"data": config.data}


def tune_checkpoint(args: argparse.Namespace, changes: dict[str, Any]) -> None:
    """Run the network over the split once, score all combinations of post-processing values, and show the best."""
    from tqdm import tqdm

    from dbnet import distributed
    from dbnet.dataset import TextDataset, count_workers
    from dbnet.files import check_writable, write_json
    from dbnet.pictures import write_image
    from dbnet.tuning import Page, draw_tuning, tune

    picture = args.tune_picture or args.checkpoints[0].with_name("tuning.png")
    network, pipeline = open_network(args, changes)
    check_writable(picture)
    dataset, config = pipeline.dataset, pipeline.config
    assert isinstance(dataset, TextDataset)
    pages = []
    for found in tqdm(
        pipeline.detect(network), total=len(dataset), unit="img", leave=False, dynamic_ncols=True, smoothing=0
    ):
        name, annotation = dataset.paths[found.index].name, dataset.annotations[found.index]
        pages.append(Page(name, found.prob_map, dataset.size(found.index), annotation))
        if found.error:
            print(f"counts 0: {found.error}")
    pages = list(chain.from_iterable(distributed.all_gather(pages)))
    if not distributed.is_first():
        return
    tuning = tune(pages, config, workers=count_workers(config))
    print(tuning.table(config))
    write_image(picture, draw_tuning(tuning))
    print(f"picture of H-Mean over thresh and box_thresh: {picture}")
    if args.json:
        write_json(args.json, tuning.to_dict())
        print(f"all combinations: {args.json}")
    if args.save:
        save_tuning(args, tuning, config)


def save_tuning(args: argparse.Namespace, tuning: "Tuning", config: Config) -> None:
    """Write the best values into the checkpoint, unless values chosen like that score no better on unseen images."""
    from dbnet.checkpoint import change_checkpoint, load_checkpoint

    checkpoint = args.checkpoints[0]
    own, best = tuning.combinations[0], tuning.combinations[tuning.best]
    if not tuning.pays:
        print(f"not saved: cross-validated, other values are no better; {checkpoint} keeps its own")
        return
    record = {"before": own.changes(config), "after": best.changes(config), "split": args.split}
    record |= {"own_hmean": float(tuning.means[0, 2]), "cross_validated_hmean": tuning.cross_validated}
    tunings = [*load_checkpoint(checkpoint).get("tunings", []), record]
    change_checkpoint(checkpoint, best.changes(config), tunings=tunings)
    print(f"saved: {checkpoint} now has the best values; its old ones are kept in it, under `tunings`")


def cli() -> None:
    """Run `main`: the entry point of the command dbnet-evaluate."""
    run_script(main)


if __name__ == "__main__":
    cli()
