"""Evaluation of a checkpoint: the network's own time, what reading, post-processing and metric add, what padding costs.

    python benchmarks/inference.py [CKPT] [--data DIR]

On the validation images; without a checkpoint, the newest of runs/.
"""

import time
from pathlib import Path
from statistics import median

from measure import parse_arguments, print_table, print_versions

from dbnet.dataset import ArrayLoader, Batches, TextDataset
from dbnet.ensemble import Ensemble
from dbnet.evaluation import evaluate
from dbnet.inference import Pipeline
from dbnet.memory import BatchPlan
from dbnet.metric import score_image
from predict import default_checkpoint

REPEATS = {"square": 1, "tight": 5}


def main() -> None:
    flags = [
        ("checkpoint", {"nargs": "?", "type": Path}),
        ("--image-size", {"type": int}),
        ("--batch-size", {"type": int}),
    ]
    args = parse_arguments(__doc__, *flags)
    changes = {"image_size": args.image_size, "batch_size": args.batch_size}
    changes = {name: value for name, value in changes.items() if value}
    checkpoint = args.checkpoint or default_checkpoint()
    network = Ensemble.load([checkpoint], changes | {"data": str(args.data), "tta": False})
    config = network.config
    print_versions()
    print(f"{checkpoint}: {config.backbone}, {config.image_size} px, batch {config.batch_size}")

    rows = []
    for pad, repeats in REPEATS.items():
        dataset = TextDataset(config, "val", train=False)
        dataset.pad = pad
        images = len(dataset)
        batches = list(ArrayLoader(Batches(dataset, config.batch_size)))
        pipeline = Pipeline(dataset, config, network.device)
        run_network(network, batches[:2])
        times = [[], []]
        for _ in range(repeats):  # in turn, so that a slow moment of the machine touches both
            times[0].append(run_network(network, batches))
            start = time.perf_counter()
            evaluation = evaluate(pipeline, network)
            times[1].append(time.perf_counter() - start)
        alone, whole = (1e3 * median(each) / images for each in times)
        score = evaluation.compute().hmean
        rows.append((pad, f"{alone:.1f}", f"{whole:.1f}", f"{100 * (whole / alone - 1):.0f}%", f"{score:.4f}"))
    header = ("padding", "network alone", "whole evaluation", "added", "H-Mean")
    print_table(f"{images} validation images, ms an image", header, rows)

    detections = [(detection.index, detection.polygons) for detection in pipeline.detect(network)]
    parts = {
        "read and resize": lambda: [dataset.load(index) for index in range(images)],
        "score": lambda: [
            score_image(dataset.annotations[index].polygons, polygons, dataset.annotations[index].dont_care)
            for index, polygons in detections
        ],
    }
    print_table(
        "Parts, one after the other, ms an image", ("what", "ms"), [(n, part_time(f, images)) for n, f in parts.items()]
    )


def run_network(network: Ensemble, batches: list[dict]) -> float:
    """Seconds for the maps of all batches, which are in memory."""
    start = time.perf_counter()
    for batch in batches:
        prob_maps = network.infer([batch["image"]], batch["size"].tolist(), BatchPlan(len(batch["image"])))
    prob_maps()
    return time.perf_counter() - start


def part_time(work, images: int) -> str:
    """Milliseconds an image."""
    start = time.perf_counter()
    work()
    return f"{1e3 * (time.perf_counter() - start) / images:.1f}"


if __name__ == "__main__":
    main()
