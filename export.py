"""Export a checkpoint: to the ONNX format, for programs without PyTorch, or at half its size, to share it.

    python export.py runs/NAME/best.pt --onnx best.onnx
    python predict.py best.onnx --images photos/            on ONNX Runtime
    python export.py runs/NAME/best.pt --half small.pt      kernels in 16 bits, nothing that only training needs
    python export.py runs/NAME/best.pt --half small.onnx    the same in the ONNX format

A .onnx file holds the network, for batches and images of any size, and its configuration, which flags change. Where
onnxruntime is installed the file is checked: it must find the same polygons as the checkpoint."""

from functools import partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from dbnet.config import ArgumentParser, Config
from dbnet.errors import UserError, run_script

if TYPE_CHECKING:
    from dbnet.model import DBNet

TOLERANCE = 1e-3  # largest difference of a probability: a quarter of a step of the maps that polygons are read off
SHAPES = ((1, 64, 64, 3), (2, 90, 160, 3))  # of the random images that the probabilities are compared on


def main() -> None:
    parser = ArgumentParser(__doc__)
    parser.add_argument("checkpoint", type=Path, metavar="CKPT", help="checkpoint to export")
    parser.add_argument("--onnx", type=Path, metavar="FILE.onnx", help="write the network in the ONNX format")
    parser.add_argument("--half", type=Path, metavar="FILE", help="write it at half its size, to FILE.pt or FILE.onnx")
    parser.add_config_flags(of_checkpoint=True)
    args, changes = parser.parse()
    if not (args.onnx or args.half):
        raise UserError("name what to write: --onnx FILE.onnx or --half FILE.pt (see --help)")
    if args.onnx and args.onnx.suffix.lower() != ".onnx":
        raise UserError(f"--onnx {args.onnx}: name a file that ends in .onnx; predict.py recognizes it by this suffix")

    # Imported here, so that --help and a mistaken command line answer at once.
    from dbnet.checkpoint import HALF_MARK, load_model, write_half
    from dbnet.files import check_outputs
    from dbnet.inference import find_weights

    outputs = [path for path in (args.onnx, args.half) if path]
    marks = ["dbnet_config" if path.suffix.lower() == ".onnx" else HALF_MARK for path in outputs]
    args.checkpoint = find_weights(args.checkpoint)
    check_outputs(*zip(outputs, marks, strict=True), inputs=[args.checkpoint])
    for path in outputs:
        model, config, _ = load_model(args.checkpoint, changes)
        if path.suffix.lower() == ".onnx":
            export_onnx(path, model, config, half=path == args.half)
        else:
            write_half(args.checkpoint, path, changes)
            print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


def export_onnx(path: Path, model: "DBNet", config: Config, half: bool) -> None:
    """Write a network in the ONNX format; where ONNX Runtime is installed, only a file that passes the check."""
    from dbnet.files import write_whole
    from dbnet.inference import write_onnx

    if config.tta:
        print("a .onnx file has one view of an image: test-time augmentation is left out")
        config = config.changed(tta=False)
    with TemporaryDirectory() as folder:
        draft = Path(folder, path.name)
        write_onnx(draft, model, config, half)
        if find_spec("onnxruntime"):
            check(draft, model, config)
        else:
            print("not checked against PyTorch; for that: pip install onnxruntime")
        content = draft.read_bytes()
    with write_whole(path) as file:
        file.write(content)
    print(f"{path}: {config.backbone}, {config.image_size} px, {len(content) / 1e6:.1f} MB")


def check(path: Path, model: "DBNet", config: Config) -> None:
    """Compare the exported file with the network: probabilities of random images, and polygons of a rendered receipt.
    Raises UserError where they differ: the exporter keeps the sizes of its example for some backbones (Swin)."""
    import numpy as np
    import torch

    from dbnet.ensemble import Ensemble
    from dbnet.inference import Detector, OnnxNetwork
    from dbnet.model import AnySize
    from dbnet.synth.scene import render_receipt

    exported = OnnxNetwork(path, {"device": "cpu"})
    rng = np.random.default_rng(0)
    difference = 0.0
    for shape in SHAPES:
        images = rng.integers(0, 256, shape, dtype=np.uint8)
        with torch.inference_mode():
            expected = AnySize(model)(torch.from_numpy(images)).numpy()
        if not np.isfinite(expected).all():
            raise UserError(f"{path.name}: not written: the checkpoint gives no finite probabilities")
        difference = np.maximum(difference, np.abs(exported.probabilities(images) - expected).max())  # keeps NaN
    receipt, _ = render_receipt(rng, config.image_size)
    networks = Ensemble.of(model, config, torch.device("cpu")), exported
    ours, theirs = ([text.polygon.tolist() for text in Detector(network).detect(receipt)] for network in networks)
    if not difference <= TOLERANCE or ours != theirs:
        found = f"ONNX Runtime finds {len(theirs)} polygons where PyTorch finds {len(ours)}, with a difference"
        reason = f"these versions of torch and onnxruntime cannot export a {config.backbone}"
        raise UserError(f"{path.name}: not written: {found} of at most {difference:.0e}; {reason}")
    print(f"checked: probabilities within {difference:.0e} of PyTorch's, and the same {len(ours)} polygons")


cli = partial(run_script, main)  # the command dbnet-export

if __name__ == "__main__":
    cli()
