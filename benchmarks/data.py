"""The data path on one core: one training sample, from the file to what the network takes.

    python benchmarks/data.py [--data DIR]

The preset is v0 with all its augmentation; a receipt has about 54 polygons. In the first epoch an image is decoded and
resized, later it comes from the cache. Below that, what the loader's workers hold in memory as epochs go by.
"""

from pathlib import Path

import numpy as np
from measure import parse_arguments, print_table, print_versions, time_and_ratio, use_one_core

from dbnet.config import Config
from dbnet.dataset import Batches, Draw, TextDataset, make_loader
from dbnet.geometry import Letterbox
from dbnet.images import read_image
from dbnet.targets import draw_targets

REACH = {640: 0.24, 1024: 0.33}  # multiples of the yardstick; the baseline takes 2.2 and 3.05
RECEIPTS = 20


def main() -> None:
    args = parse_arguments(__doc__)
    use_one_core()
    print_versions()
    rows = []
    for side in REACH:
        rows += measure_sample(Config.from_preset("v0", data=str(args.data), image_size=side))
    print_table("One training sample, preset v0", ("what", "ms", "x yardstick", "reach"), rows)
    memory = measure_memory(Config.from_preset("v0", data=str(args.data), image_size=640))
    print_table("A loader worker's own memory, MB", ("epochs", "private", "resident"), memory)


def measure_sample(config: Config) -> list[tuple[str, str, str, str]]:
    """The sample as a whole, and its largest parts."""
    dataset = TextDataset(config, "train", train=True)
    by_polygons = sorted(range(len(dataset)), key=lambda i: abs(len(dataset.annotations[i].polygons) - 54))
    receipts = by_polygons[:RECEIPTS]
    epoch = 0

    def each(work):
        def run() -> None:
            nonlocal epoch
            epoch += 1  # new augmentation each time
            for index in receipts:
                work(Draw(index, epoch))

        return time_and_ratio(run, RECEIPTS)

    def decode(draw: Draw) -> None:
        pixels, size = read_image(dataset.paths[draw.place], config.image_size)
        Letterbox(*size, config.image_size).resize(pixels)

    def augment(draw: Draw) -> None:
        pixels, _ = dataset.load(draw)
        dataset.augmentation(draw).render(pixels, np.zeros((side, side, 3), np.uint8))

    def targets(draw: Draw) -> None:
        _, letterbox = dataset.load(draw)
        text, _ = dataset.polygons(draw.place, letterbox, dataset.augmentation(draw))
        draw_targets(text, side, side, config.shrink_ratio)

    side = config.image_size
    polygons = np.mean([len(dataset.annotations[i].polygons) for i in receipts])
    return [
        (
            f"{side} px, {polygons:.0f} polygons, whole sample",
            *each(lambda draw: dataset.__getitems__([draw])),
            REACH[side],
        ),
        (f"{side} px, of it: image from the cache, augmented", *each(augment), ""),
        (f"{side} px, of it: image from the cache, target maps", *each(targets), ""),
        (f"{side} px, in the first epoch besides: decode and resize", *each(decode), ""),
    ]


def measure_memory(config: Config) -> list[tuple[int, str, str]]:
    """Private and resident memory of a worker after each of some epochs."""
    dataset = TextDataset(config, "train", train=True)
    batches = Batches(dataset, config.batch_size, config.seed)
    loader = make_loader(batches, workers=1, pin_memory=False)
    rows = []
    for epoch in range(4):
        batches.epoch = epoch
        iterator = iter(loader)
        for _ in iterator:
            pass
        status = Path(f"/proc/{iterator._workers[0].pid}/smaps_rollup").read_text()
        sizes = {line.split()[0].rstrip(":"): int(line.split()[1]) / 1024 for line in status.splitlines()[1:]}
        rows.append((epoch + 1, f"{sizes['Private_Clean'] + sizes['Private_Dirty']:.0f}", f"{sizes['Rss']:.0f}"))
    return rows


if __name__ == "__main__":
    main()
