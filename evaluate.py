"""Score a checkpoint, or a submission file, on an annotated split with CLEval, or tune a checkpoint's thresholds on it.

    python evaluate.py runs/NAME/best.pt                       on the validation images
    python evaluate.py --submission submission.csv             without a network
    python evaluate.py runs/NAME/best.pt --json scores.json    all numbers, image by image
    python evaluate.py runs/A/best.pt runs/B/best.pt --tta     mean of two networks, at several sizes
    python evaluate.py runs/NAME/best.pt --report report.html  a page that shows each image and each mistake
    python evaluate.py runs/NAME/best.pt --compare scores.json what got better and worse since those scores
    python evaluate.py runs/NAME/best.pt --tune                which thresholds and unclip ratio would be best
    python evaluate.py runs/NAME/best.pt --tune --save         and keep them in the checkpoint, if the gain is certain
    torchrun --nproc-per-node 4 -- evaluate.py runs/NAME/best.pt  on four GPUs

A checkpoint carries its configuration; flags override it. What is printed:

    precision, recall, H-Mean  CLEval, 0 to 1, means over the images
    95% interval               where the H-Mean of other images of this kind lies, by resampling these
    splits, merges             words with several detections, detections over several words
    IoU over 0.5               the same by the ICDAR 2015 protocol: whole words, over all images together
    size of text               height of a word / longer side of its image; CLEval's characters of such words, and the
                               share of them that was found"""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

from dbnet.config import ArgumentParser, Config
from dbnet.errors import UserError, run_script

REPORTED = ("data", "backbone", "image_size", "use_polygon", "thresh", "box_thresh", "growth", "min_size")
# Where and how fast the network runs, not what it sees or how its maps are read: these go with --save.
FREE_TO_SAVE = {"data", "format", "workers", "strict", "batch_size", "device", "amp", "compile"}


def main() -> None:
    parser = ArgumentParser(__doc__)
    checkpoints_help = "checkpoint to score, several whose probability maps are averaged, or a .onnx file"
    parser.add_argument("checkpoints", nargs="*", type=Path, metavar="CKPT", help=checkpoints_help)
    parser.add_argument("--submission", type=Path, metavar="FILE", help="file of predict.py to score in place of it")
    parser.add_argument("--split", default="val", help="split of the data set (val)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all scores as JSON")
    parser.add_argument("--report", type=Path, metavar="FILE.html", help="write a page that shows every image")
    parser.add_argument("--lang", choices=("auto", "en", "ko"), default="auto", help="its language (the browser's)")
    parser.add_argument("--compare", type=Path, metavar="FILE", help="JSON of another evaluation to compare with")
    parser.add_switch("--tune", "search the best thresholds, unclip ratio and min_size")
    parser.add_switch("--save", "with --tune: keep the best ones in the checkpoint")
    parser.add_config_flags(of_checkpoint=True)
    args, changes = parser.parse()
    if bool(args.checkpoints) == (args.submission is not None):
        raise UserError("name either a checkpoint or --submission FILE (see --help)")
    check_tuning_flags(args, changes)
    run(args, changes)


def check_tuning_flags(args: argparse.Namespace, changes: dict[str, Any]) -> None:
    """Raise UserError for flags that do not go with --tune, and for --save with settings of another network."""
    for name in ("submission", "report", "compare"):
        if args.tune and getattr(args, name):
            raise UserError(f"--tune: scores combinations of a checkpoint's settings; leave --{name} out")
    if args.save and not args.tune:
        raise UserError("--save: belongs to --tune; add that, or leave --save out")
    others = sorted(changes.keys() - FREE_TO_SAVE)
    if args.save and others:
        values = f"values that were tuned with another --{others[0].replace('_', '-')} than its own"
        raise UserError(f"--save: the checkpoint would get {values}; leave one of the two out")
    if args.save and (len(args.checkpoints) > 1 or args.checkpoints[0].suffix.lower() == ".onnx"):
        raise UserError("--save: writes into a checkpoint; name one, and no .onnx file")


def run(args: argparse.Namespace, changes: dict[str, Any]) -> None:
    """Score or tune what is named, write what was asked for, and print the scores last."""
    # Imported here, so that --help and a mistaken command line answer at once.
    from dbnet.dataset import TextDataset
    from dbnet.device import init_process_group, is_first, print0
    from dbnet.evaluation import SCORES_MARK, Comparison, advise_on_collapse, evaluate, evaluate_submission, read_scores
    from dbnet.files import check_outputs, write_json
    from dbnet.inference import Pipeline, find_weights, load_network
    from dbnet.report import REPORT_MARK, picture_of, write_report
    from dbnet.tuning import tune_checkpoint

    init_process_group()
    args.checkpoints = [find_weights(path) for path in args.checkpoints]
    inputs = [path for path in (*args.checkpoints, args.submission, args.compare) if path]
    check_outputs((args.json, SCORES_MARK), (args.report, REPORT_MARK), inputs=inputs)
    if args.report and args.report.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--report {args.report}: is a page of HTML; end its name in .html")
    picture = picture_of if args.report else None
    names = " ".join(map(str, args.checkpoints or [args.submission]))
    if args.submission:
        if not is_first():
            return
        config = Config().changed(**changes)
        evaluation = evaluate_submission(args.submission, config, args.split, picture)
        earlier = read_scores(args.compare, evaluation.images) if args.compare else None
        settings: dict[str, Any] = {"data": config.data}
    else:
        network = load_network(args.checkpoints, changes)
        config = network.config
        dataset = TextDataset(config, args.split, train=False)
        print0(f"{names} ({network}) on {args.split} of {config.data}, {network.device}")
        pipeline = Pipeline(dataset, config, network.device)
        if args.tune:
            save_to = args.checkpoints[0] if args.save else None
            return tune_checkpoint(pipeline, network, args.split, args.json, save_to)
        earlier = read_scores(args.compare, dataset.names) if args.compare else None
        evaluation = evaluate(pipeline, network, picture=picture)
        settings = {field: getattr(config, field) for field in REPORTED}
        if advice := advise_on_collapse(evaluation, config):
            print0(advice)
    if not is_first():
        return
    comparison = Comparison(args.compare, earlier, evaluation) if earlier else None
    try:
        if args.json:
            write_json(args.json, evaluation.to_dict())
        if args.report:
            write_report(args.report, evaluation, f"{names} on {args.split}", settings, comparison, args.lang)
    finally:  # a full disk does not lose the table
        print(evaluation.table())
        if comparison:
            print(comparison.table())
    if args.json:
        print(f"all scores: {args.json}")
    if args.report:
        print(f"report: {args.report} ({args.report.stat().st_size / 1e6:.1f} MB)")


cli = partial(run_script, main)  # the command dbnet-evaluate

if __name__ == "__main__":
    cli()
