"""Score a checkpoint, or a submission file, on an annotated split with CLEval, or tune a checkpoint's thresholds on it.

    python evaluate.py runs/NAME/best.pt                       on the validation images
    python evaluate.py runs/NAME/best.pt --box-thresh 0.35     with another threshold than it was trained with
    python evaluate.py --submission submission.csv             without a network
    python evaluate.py runs/NAME/best.pt --json scores.json    all numbers, image by image
    python evaluate.py runs/NAME/best.pt --tune                which thresholds and unclip ratio would be best
    python evaluate.py runs/NAME/best.pt --tune --save         and keep them in the checkpoint, if they really are

Precision, recall and H-Mean are means over the images. A checkpoint carries its configuration; flags override it.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dbnet.config import ArgumentParser, Config
from dbnet.errors import UserError, run_script

if TYPE_CHECKING:
    from dbnet.evaluation import Evaluation
    from dbnet.inference import Pipeline
    from dbnet.model import DBNet
    from dbnet.tuning import Tuning

WORST = 10  # images in the list of the worst
BEST = 10  # combinations in the list of the best
# What says where and how fast, but not what the network sees or how its maps are read: --save leaves these as they are.
FREE_TO_SAVE = {"data", "workers", "strict", "batch_size", "device", "amp", "compile"}


def main() -> None:
    parser = ArgumentParser(__doc__)
    parser.add_argument("checkpoint", nargs="?", type=Path, metavar="CKPT", help="checkpoint to score")
    parser.add_argument(
        "--submission",
        type=Path,
        metavar="FILE",
        help="submission to score in place of it, in any format that predict.py writes",
    )
    parser.add_argument("--split", default="val", help="split of the data set (val)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all scores as JSON")
    parser.add_argument("--tune", action="store_true", help="search the best thresholds, unclip ratio and min_size")
    parser.add_argument("--save", action="store_true", help="with --tune: keep the best ones in the checkpoint")
    parser.add_argument(
        "--tune-picture", type=Path, metavar="FILE.png", help="picture of the search (tuning.png beside the checkpoint)"
    )
    parser.add_config_flags()
    args, changes = parser.parse()
    if (args.checkpoint is None) == (args.submission is None):
        raise UserError("name either a checkpoint or --submission FILE (see --help)")
    check_tuning_flags(args, changes)

    # Imported here, so that --help and a mistaken command line answer at once.
    from dbnet.files import check_writable, write_json

    if args.json:
        check_writable(args.json)
    if args.tune:
        tune_checkpoint(args, changes)
        return
    evaluation = evaluate_submission(args, changes) if args.submission else evaluate_checkpoint(args, changes)
    print_scores(evaluation)
    if args.json:
        write_json(args.json, evaluation.to_dict())
        print(f"all scores: {args.json}")


def check_tuning_flags(args: argparse.Namespace, changes: dict[str, Any]) -> None:
    """Raise UserError for --save and --tune-picture without --tune, and for --save with settings of another network."""
    if args.tune and args.submission:
        raise UserError("--tune: a submission has no probability maps; name a checkpoint in place of --submission")
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


def open_checkpoint(args: argparse.Namespace, changes: dict[str, Any]) -> "tuple[DBNet, Pipeline]":
    """The network on its device, and the pipeline that runs it over the split."""
    import torch

    from dbnet.checkpoint import load_model
    from dbnet.dataset import TextDataset
    from dbnet.device import pick_device
    from dbnet.inference import Pipeline

    model, config, _ = load_model(args.checkpoint, changes)
    dataset = TextDataset(config, args.split, train=False)
    device = pick_device(config.device)
    model.to(device, memory_format=torch.channels_last)
    print(f"{args.checkpoint} ({config.backbone}, {config.image_size} px) on {args.split} of {config.data}, {device}")
    return model, Pipeline(dataset, config, device)


def evaluate_checkpoint(args: argparse.Namespace, changes: dict[str, Any]) -> "Evaluation":
    """Run the network over the split and score what it finds."""
    model, pipeline = open_checkpoint(args, changes)
    return pipeline.evaluate(model)


def tune_checkpoint(args: argparse.Namespace, changes: dict[str, Any]) -> None:
    """Run the network over the split once, score all combinations of post-processing values, and show the best."""
    from tqdm import tqdm

    from dbnet.device import count_workers
    from dbnet.files import check_writable, write_json
    from dbnet.overlay import write_image
    from dbnet.tuning import Page, draw_tuning, tune

    picture = args.tune_picture or args.checkpoint.with_name("tuning.png")
    model, pipeline = open_checkpoint(args, changes)
    check_writable(picture)
    dataset, config = pipeline.dataset, pipeline.config
    pages = []
    for found in tqdm(
        pipeline.detect(model), total=len(dataset), unit="img", leave=False, dynamic_ncols=True, smoothing=0
    ):
        name, annotation = dataset.paths[found.index].name, dataset.annotations[found.index]
        pages.append(Page(name, found.prob_map, dataset.size(found.index), annotation))
        if found.error:
            print(f"counts 0: {found.error}")
    tuning = tune(pages, config, workers=count_workers(config))
    print_tuning(tuning, config)
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

    own, best = tuning.combinations[0], tuning.combinations[tuning.best]
    if not tuning.pays:
        print(f"not saved: cross-validated, other values are no better; {args.checkpoint} keeps its own")
        return
    record = {"before": own.changes(config), "after": best.changes(config), "split": args.split}
    record |= {"own_hmean": float(tuning.means[0, 2]), "cross_validated_hmean": tuning.cross_validated}
    tunings = [*load_checkpoint(args.checkpoint).get("tunings", []), record]
    change_checkpoint(args.checkpoint, best.changes(config), tunings=tunings)
    print(f"saved: {args.checkpoint} now has the best values; its old ones are kept in it, under `tunings`")


def print_tuning(tuning: "Tuning", config: Config) -> None:
    """Print the best combinations beside the checkpoint's own, and what of the gain lasts on unseen images."""
    own = tuning.means[0, 2]
    names = tuning.combinations[0].names(config)
    print(f"\n{len(tuning.combinations)} combinations on {tuning.scores.shape[1]} images\n")
    header = [f"{name:>{max(len(name), 6)}}" for name in names]
    print("  ".join([f"{'':>6}", *header, "precision", "recall", "H-Mean", "   gain"]))
    for place, index in [("own", 0), *enumerate(tuning.ranking(BEST), start=1)]:
        precision, recall, hmean = tuning.means[index]
        cells = [f"{value:>{len(cell)}g}" for value, cell in zip(tuning.combinations[index], header, strict=True)]
        print(
            "  ".join([f"{place:>6}", *cells, f"{precision:9.4f}", f"{recall:6.4f}", f"{hmean:6.4f}"]),
            f" {hmean - own:+7.4f}",
        )
    print(
        f"\ncross-validated, each half of the images with the values that are best on the other half:\n"
        f"H-Mean {tuning.cross_validated:.4f}, {tuning.cross_validated - own:+.4f} to the checkpoint's own {own:.4f}\n"
    )


def evaluate_submission(args: argparse.Namespace, changes: dict[str, Any]) -> "Evaluation":
    """Score the polygons of a submission file; images that it lacks count as without detections, and are said."""
    from dbnet.annotations import read_labels
    from dbnet.evaluation import Evaluation
    from dbnet.images import ImageError, read_size
    from dbnet.submission import read_detections

    config = Config().changed(**changes)
    split, annotations = read_labels(Path(config.data), args.split, config.format)
    submission = read_detections(args.submission, list(annotations))
    unknown = [name for name in submission if name not in annotations]
    if unknown:
        raise UserError(
            f"{args.submission}: {unknown[0]} is not in {split} (nor are {len(unknown) - 1} others); "
            f"choose the split with --split and the data set with --data"
        )
    print(f"{args.submission} on {split}")
    evaluation = Evaluation()
    for name, annotation in annotations.items():
        try:
            size = read_size(Path(config.data) / "images" / args.split / name)
        except ImageError:  # a submission can be scored without the images, except by size of text
            size = None
        evaluation.update(name, annotation, submission[name].polygons if name in submission else [], size=size)
    missing = [name for name in annotations if name not in submission]
    if missing:
        print(f"{len(missing)} images of the split have no row and count 0, {missing[0]} first")
    return evaluation


def print_scores(evaluation: "Evaluation") -> None:
    """Print totals and the worst images."""
    score = evaluation.compute()
    for line in evaluation.unreadable:
        print(f"counts 0: {line}")
    print(f"\nprecision {score.precision:.4f}\nrecall    {score.recall:.4f}\nH-Mean    {score.hmean:.4f}\n")
    print(
        f"{score.images} images, {score.words} words, {score.detections} detections, "
        f"{score.splits} splits, {score.merges} merges\n"
    )
    iou = evaluation.total_iou()
    print(f"IoU over 0.5: precision {iou.precision:.4f}, recall {iou.recall:.4f}, H-Mean {iou.hmean:.4f}\n")
    print_recall_by_size(evaluation)
    worst = evaluation.worst(WORST)
    width = max(len("worst images"), *(len(name) for name, _ in worst))
    print(f"{'worst images':<{width}}  H-Mean  precision  recall  words  detections")
    for name, image in worst:
        print(
            f"{name:<{width}}  {image.hmean:6.4f}  {image.precision:9.4f}  {image.recall:6.4f}  "
            f"{image.words:5d}  {image.detections:10d}"
        )


def print_recall_by_size(evaluation: "Evaluation") -> None:
    """Print CLEval's characters, and the share of them that was found, by height of text over the longer side."""
    rows = evaluation.by_size()
    print("size of text  " + "".join(f"{row['from']:>8g}" for row in rows) + f"{rows[-1]['to']:>5g}")
    print("characters    " + "".join(f"{row['chars_gt']:>8d}" for row in rows))
    print("recall        " + "".join(f"{row['recall']:>8.4f}" if row["chars_gt"] else f"{'-':>8}" for row in rows))
    without_size = len(evaluation.per_image) - len(evaluation.chars_per_image)
    if without_size:
        print(f"{without_size} images whose files are not there to tell their size are left out of these")
    print()


if __name__ == "__main__":
    run_script(main)
