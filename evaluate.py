"""Score a checkpoint, or a submission file, on an annotated split with CLEval.

    python evaluate.py runs/NAME/best.pt                       on the validation images
    python evaluate.py runs/NAME/best.pt --box-thresh 0.35     with another threshold than it was trained with
    python evaluate.py --submission submission.csv             without a network
    python evaluate.py runs/NAME/best.pt --json scores.json    all numbers, image by image
    python evaluate.py runs/NAME/best.pt --report report.html  a page that shows each image and each mistake
    python evaluate.py runs/NAME/best.pt --compare scores.json what got better and worse since those scores

Precision, recall and H-Mean are means over the images. A checkpoint carries its configuration; flags override it.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dbnet.config import ArgumentParser, Config
from dbnet.errors import UserError, run_script

if TYPE_CHECKING:
    from dbnet.comparison import Comparison
    from dbnet.evaluation import Evaluation
    from dbnet.report import Report

REPORTED = ("data", "backbone", "image_size", "use_polygon", "thresh", "box_thresh", "polygon_unclip_ratio", "min_size")
WORST = 10  # images in the list of the worst
CHANGED = 5  # images in the lists of the most improved and the most worsened


def main() -> None:
    parser = ArgumentParser(__doc__)
    parser.add_argument("checkpoint", nargs="?", type=Path, metavar="CKPT", help="checkpoint to score")
    parser.add_argument("--submission", type=Path, metavar="FILE.csv", help="submission to score in place of it")
    parser.add_argument("--split", default="val", help="split of the data set (val)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all scores as JSON")
    parser.add_argument("--report", type=Path, metavar="FILE.html", help="write a page that shows every image")
    parser.add_argument("--compare", type=Path, metavar="FILE", help="JSON of another evaluation to compare with")
    parser.add_config_flags()
    args, changes = parser.parse()
    if (args.checkpoint is None) == (args.submission is None):
        raise UserError("name either a checkpoint or --submission FILE.csv (see --help)")

    # Imported here, so that --help and a mistaken command line answer at once.
    from dbnet.comparison import Comparison
    from dbnet.files import check_writable, write_json
    from dbnet.report import Report

    for path in filter(None, (args.json, args.report)):
        check_writable(path)
    comparison = Comparison.read(args.compare) if args.compare else None
    report = Report() if args.report else None
    evaluate = evaluate_submission if args.submission else evaluate_checkpoint
    evaluation = evaluate(args, changes, report, comparison)
    print_scores(evaluation)
    if comparison:
        comparison.compare(evaluation.per_image)
        print_comparison(comparison)
    if args.json:
        write_json(args.json, evaluation.to_dict())
        print(f"all scores: {args.json}")
    if report:
        report.write(args.report, evaluation, comparison)
        print(f"report: {args.report} ({args.report.stat().st_size / 1e6:.1f} MB)")


def evaluate_checkpoint(
    args: argparse.Namespace, changes: dict[str, Any], report: "Report | None", comparison: "Comparison | None"
) -> "Evaluation":
    """Run the network over the split and score what it finds."""
    import torch

    from dbnet.checkpoint import load_model
    from dbnet.dataset import TextDataset
    from dbnet.device import pick_device
    from dbnet.inference import Pipeline

    model, config, _ = load_model(args.checkpoint, changes)
    dataset = TextDataset(config, args.split, train=False)
    if comparison:
        comparison.check_shares(path.name for path in dataset.paths)
    if report:
        report.title = f"{args.checkpoint} on {args.split}"
        report.settings = {field: getattr(config, field) for field in REPORTED}
    device = pick_device(config.device)
    model.to(device, memory_format=torch.channels_last)
    print(f"{args.checkpoint} ({config.backbone}, {config.image_size} px) on {args.split} of {config.data}, {device}")
    return Pipeline(dataset, config, device).evaluate(model, report=report)


def evaluate_submission(
    args: argparse.Namespace, changes: dict[str, Any], report: "Report | None", comparison: "Comparison | None"
) -> "Evaluation":
    """Score the polygons of a submission file; images that it lacks count as without detections, and are said."""
    from dbnet.annotations import find_json, read_annotations
    from dbnet.evaluation import Evaluation
    from dbnet.submission import read_submission

    data = Path(Config().changed(**changes).data)
    split = find_json(data, args.split)
    annotations = read_annotations(split)
    submission = read_submission(args.submission)
    unknown = [name for name in submission if name not in annotations]
    if unknown:
        raise UserError(
            f"{args.submission}: {unknown[0]} is not in {split} (nor are {len(unknown) - 1} others); "
            f"choose the split with --split and the data set with --data"
        )
    if comparison:
        comparison.check_shares(annotations)
    if report:
        report.title, report.settings = f"{args.submission} on {args.split}", {"data": data}
    print(f"{args.submission} on {split}")
    evaluation = Evaluation()
    for name, annotation in annotations.items():
        evaluation.update(name, annotation, submission.get(name, []))
        if report:
            report.add(data / "images" / args.split / name, annotation, submission.get(name, []))
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
    worst = evaluation.worst(WORST)
    width = max(len("worst images"), *(len(name) for name, _ in worst))
    print(f"{'worst images':<{width}}  H-Mean  precision  recall  words  detections")
    for name, image in worst:
        print(
            f"{name:<{width}}  {image.hmean:6.4f}  {image.precision:9.4f}  {image.recall:6.4f}  "
            f"{image.words:5d}  {image.detections:10d}"
        )


def print_comparison(comparison: "Comparison") -> None:
    """Print the change of the totals, and of the images that changed most."""
    before, after = comparison.means()
    better, worse = comparison.better(), comparison.worse()
    print(f"\n{'':<9}  {'there':>6}    here   change   ({comparison.path}; {len(comparison.after)} images in both)")
    for name, there, here in zip(("precision", "recall", "H-Mean"), before, after, strict=True):
        print(f"{name:<9}  {there:6.4f}  {here:6.4f}  {here - there:+7.4f}")
    same = len(comparison.after) - len(better) - len(worse)
    print(f"\n{len(better)} images better, {len(worse)} worse, {same} as before")
    for title, changes in (("most improved", better[:CHANGED]), ("most worsened", worse[:CHANGED])):
        if changes:
            width = max(len(title), *(len(name) for name, _ in changes))
            print(f"\n{title:<{width}}   there    here   H-Mean")
        for name, change in changes:
            here = comparison.after[name].hmean
            print(f"{name:<{width}}  {here - change:6.4f}  {here:6.4f}  {change:+7.4f}")


if __name__ == "__main__":
    run_script(main)
