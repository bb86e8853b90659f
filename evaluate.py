"""Score a checkpoint, or a submission file, on an annotated split with CLEval.

    python evaluate.py runs/NAME/best.pt                       on the validation images
    python evaluate.py runs/NAME/best.pt --box-thresh 0.35     with another threshold than it was trained with
    python evaluate.py --submission submission.csv             without a network
    python evaluate.py runs/NAME/best.pt --json scores.json    all numbers, image by image
    torchrun --nproc-per-node 4 -- evaluate.py runs/NAME/best.pt  on four GPUs

Precision, recall and H-Mean are means over the images. A checkpoint carries its configuration; flags override it.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dbnet.config import ArgumentParser, Config
from dbnet.errors import UserError, run_script

if TYPE_CHECKING:
    from dbnet.evaluation import Evaluation

WORST = 10  # images in the list of the worst


def main() -> None:
    parser = ArgumentParser(__doc__)
    parser.add_argument("checkpoint", nargs="?", type=Path, metavar="CKPT", help="checkpoint to score")
    parser.add_argument("--submission", type=Path, metavar="FILE.csv", help="submission to score in place of it")
    parser.add_argument("--split", default="val", help="split of the data set (val)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all scores as JSON")
    parser.add_config_flags()
    args, changes = parser.parse()
    if (args.checkpoint is None) == (args.submission is None):
        raise UserError("name either a checkpoint or --submission FILE.csv (see --help)")

    # Imported here, so that --help and a mistaken command line answer at once.
    from dbnet import distributed
    from dbnet.files import check_writable, write_json

    distributed.join()

    if args.json:
        check_writable(args.json)
    evaluation = evaluate_submission(args, changes) if args.submission else evaluate_checkpoint(args, changes)
    if not distributed.is_first():
        return
    print_scores(evaluation)
    if args.json:
        write_json(args.json, evaluation.to_dict())
        print(f"all scores: {args.json}")


def evaluate_checkpoint(args: argparse.Namespace, changes: dict[str, Any]) -> "Evaluation":
    """Run the network over the split and score what it finds."""
    import torch

    from dbnet.checkpoint import load_model
    from dbnet.dataset import TextDataset
    from dbnet.distributed import pick_device, say
    from dbnet.inference import Pipeline

    model, config, _ = load_model(args.checkpoint, changes)
    dataset = TextDataset(config, args.split, train=False)
    device = pick_device(config.device)
    model.to(device, memory_format=torch.channels_last)
    say(f"{args.checkpoint} ({config.backbone}, {config.image_size} px) on {args.split} of {config.data}, {device}")
    return Pipeline(dataset, config, device).evaluate(model)


def evaluate_submission(args: argparse.Namespace, changes: dict[str, Any]) -> "Evaluation":
    """Score the polygons of a submission file; images that it lacks count as without detections, and are said."""
    from dbnet.annotations import find_json, read_annotations
    from dbnet.evaluation import Evaluation
    from dbnet.submission import read_submission

    split = find_json(Path(Config().changed(**changes).data), args.split)
    annotations = read_annotations(split)
    submission = read_submission(args.submission)
    unknown = [name for name in submission if name not in annotations]
    if unknown:
        raise UserError(
            f"{args.submission}: {unknown[0]} is not in {split} (nor are {len(unknown) - 1} others); "
            f"choose the split with --split and the data set with --data"
        )
    print(f"{args.submission} on {split}")
    evaluation = Evaluation()
    for name, annotation in annotations.items():
        evaluation.update(name, annotation, submission.get(name, []))
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


if __name__ == "__main__":
    run_script(main)
