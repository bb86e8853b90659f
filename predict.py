"""Detect text in images and write a submission file.

    python predict.py --out submission.csv                         newest runs/*/best.pt on DATA/images/test
    python predict.py runs/NAME/best.pt --images photos/ --overlays overlays/
    python predict.py runs/NAME/best.pt --images a.jpg b.png --box-thresh 0.35
    torchrun --nproc-per-node 4 -- predict.py --images photos/     on four GPUs
    python predict.py --images photos/ --resume                    go on with a prediction that was cut short

The CSV has a row for each image, `filename,polygons`: polygons separated by `|`, each `x1 y1 x2 y2 ...` in whole
pixels of the image as a viewer shows it. It is written whole or not at all; until then, OUT.rankN.partial hold the
results so far.
"""

from pathlib import Path

from dbnet.config import ArgumentParser
from dbnet.errors import UserError, run_script

SETTINGS_APART = {"batch_size", "cache_gb", "compile", "data", "device", "workers"}  # results do not depend on these


def main() -> None:
    parser = ArgumentParser(__doc__)
    parser.add_argument("checkpoint", nargs="?", type=Path, metavar="CKPT", help="checkpoint (newest runs/*/best.pt)")
    parser.add_argument(
        "--images", nargs="+", type=Path, metavar="DIR|FILE", help="folders or files (DATA/images/test)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("submission.csv"), metavar="FILE.csv", help="where to (submission.csv)"
    )
    parser.add_argument("--overlays", type=Path, metavar="DIR", help="also write each image with its polygons here")
    parser.add_argument("--resume", action="store_true", help="go on with a prediction for --out that was cut short")
    parser.add_config_flags()
    args, changes = parser.parse()
    checkpoint = args.checkpoint or newest_checkpoint()

    # Imported here, so that --help and a mistaken command line answer at once.
    import torch
    from tqdm import tqdm

    from dbnet import distributed
    from dbnet.annotations import find_images_at, read_image_paths
    from dbnet.checkpoint import load_model
    from dbnet.dataset import ImageDataset
    from dbnet.files import check_writable, make_folder
    from dbnet.images import read_image
    from dbnet.inference import Pipeline
    from dbnet.overlay import draw_polygons, write_image
    from dbnet.partial import Partial
    from dbnet.submission import write_submission

    distributed.join()
    model, config, _ = load_model(checkpoint, changes)
    paths = find_images_at(args.images) if args.images else read_image_paths(Path(config.data), "test")
    device = distributed.pick_device(config.device)
    check_writable(args.out)
    if args.overlays:
        make_folder(args.overlays)
    model.to(device, memory_format=torch.channels_last)
    settings = {name: value for name, value in config.to_dict().items() if name not in SETTINGS_APART}
    settings["checkpoint"] = [checkpoint.stat().st_size, checkpoint.stat().st_mtime_ns]
    with Partial(args.out, settings, args.resume) as partial:
        done = partial.done
        rest = [path for path in paths if str(path) not in done]
        distributed.say(
            f"{checkpoint} ({config.backbone}, {config.image_size} px) on {len(rest)} images, {device}"
            + (f"; {len(paths) - len(rest)} are done" if args.resume else "")
        )
        pipeline = Pipeline(ImageDataset(rest, config), config, device)
        mine = len(pipeline.loader.batch_sampler) * config.batch_size if distributed.ranks() > 1 else len(rest)
        detections = pipeline.detect(model)
        for detection in tqdm(
            detections, total=mine, unit="img", dynamic_ncols=True, smoothing=0, disable=not distributed.is_first()
        ):
            path = rest[detection.index]
            if args.overlays and not detection.error:
                pixels, _ = read_image(path)
                write_image(args.overlays / f"{path.stem}.jpg", draw_polygons(pixels, detection.polygons))
            partial.add(str(path), detection.polygons, detection.error)
            done[str(path)] = detection.polygons, detection.error
        for others in distributed.gather(done):
            done |= others
        if not distributed.is_first():
            return
        rows = {path.name: done[str(path)][0] for path in paths}
        write_submission(args.out, rows)
    unreadable = [error for path in paths if (error := done[str(path)][1])]
    for line in unreadable:
        print(f"no polygons: {line}")
    found = sum(map(len, rows.values()))
    print(f"{args.out}: {len(rows)} images, {found} polygons, {len(unreadable)} images could not be read")
    if args.overlays:
        print(f"{args.overlays}: the images with their polygons")


def newest_checkpoint() -> Path:
    """The best checkpoint of the run that wrote one last."""
    found = sorted(Path("runs").glob("*/best.pt"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise UserError("runs/: holds no best.pt; train first, or name a checkpoint: python predict.py CKPT")
    return found[-1]


if __name__ == "__main__":
    run_script(main)
