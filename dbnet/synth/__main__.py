"""The command `python -m dbnet.synth`: write a data set of synthetic receipts."""

from dbnet.config import ArgumentParser
from dbnet.errors import run_script


def main() -> None:
    parser = ArgumentParser("Write a data set of synthetic receipts.")
    parser.prog = "python -m dbnet.synth"
    parser.add_argument("--out", dest="folder", required=True, metavar="DIR", help="folder to make, absent or empty")
    for split, count in (("train", 200), ("val", 20), ("test", 10)):
        parser.add_argument(f"--{split}", type=int, default=count, metavar="N", help=f"{split} images ({count})")
    parser.add_argument("--size", type=int, default=640, help="longer side of the images in pixels (640)")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same data set (0)")
    parser.add_argument("--font", dest="fonts", action="append", default=[], metavar="FILE", help="font; repeatable")
    parser.add_argument("--lines", action="store_true", help="label lines of a column, not words")
    parser.add_argument("--varied", action="store_true", help="also dark paper, tight lines, dirt, turned pages")
    args = parser.parse_args()
    from dbnet.synth.scene import write_dataset  # here, because --help needs no library

    count = write_dataset(**vars(args))
    images = f"{args.train} train, {args.val} val, {args.test} test images"
    print(f"{args.folder}: {images} with {count} {'lines' if args.lines else 'words'}")


if __name__ == "__main__":
    run_script(main)
