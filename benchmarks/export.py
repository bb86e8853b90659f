"""PyTorch and ONNX Runtime side by side on this CPU, and what 8-bit integers would make of speed and score.

    python benchmarks/export.py [CKPT] [--data DIR]

Without a checkpoint, the newest of runs/. `--images 0` leaves the scores out, which take most of the time. The 8-bit
network is quantized statically, channel by channel, with activations calibrated on training images. It exists here
only: its score hangs on which images it was calibrated with, which is too little to rely on for a flag of export.py.
"""

import tempfile
from pathlib import Path

import numpy as np
import torch
from measure import milliseconds, parse_arguments, print_table, print_versions

from dbnet.checkpoint import load_model
from dbnet.config import Config
from dbnet.dataset import Batches, ImageDataset, TextDataset
from dbnet.ensemble import Ensemble
from dbnet.evaluation import evaluate
from dbnet.inference import Network, OnnxNetwork, Pipeline, find_weights, write_onnx
from dbnet.memory import BatchPlan
from predict import default_checkpoint

SIZES = ((448, 320), (640, 448), (1024, 704))  # height and width: receipts
CALIBRATION_IMAGES = 24


def main() -> None:
    flags = [
        ("checkpoint", {"nargs": "?", "type": Path}),
        ("--images", {"type": int, "default": 60, "help": "validation images to score"}),
    ]
    args = parse_arguments(__doc__, *flags)
    checkpoint = find_weights(args.checkpoint or default_checkpoint())
    model, config, _ = load_model(checkpoint, {"data": str(args.data), "device": "cpu", "tta": False})
    model.to(memory_format=torch.channels_last)
    print_versions()
    print(f"{checkpoint}: {config.backbone}, {config.image_size} px")
    with tempfile.TemporaryDirectory() as folder:
        exported, quantized = Path(folder) / "float.onnx", Path(folder) / "int8.onnx"
        write_onnx(exported, model, config)
        quantize(exported, quantized, TextDataset(config, "train", train=False))
        networks = {
            "PyTorch": Ensemble.of(model, config, torch.device("cpu")),
            "ONNX Runtime": OnnxNetwork(exported, {}),
            "ONNX Runtime, int8": OnnxNetwork(quantized, {}),
        }
        rows = [
            (name, *(f"{time_image(network, *size):.1f}" for size in SIZES), score(network, config, args.images))
            for name, network in networks.items()
        ]
    header = ("network", *(f"{width} x {height}" for height, width in SIZES), "H-Mean")
    print_table(f"ms an image, one at a time; H-Mean on {args.images} validation images", header, rows)


def time_image(network: Network, height: int, width: int) -> float:
    """Milliseconds from an image in memory to its probability map."""
    image = np.random.default_rng(0).integers(0, 256, (1, height, width, 3), dtype=np.uint8)
    return milliseconds(lambda: network.infer([image], [(width, height)], BatchPlan(1))())


def score(network: Network, config: Config, images: int) -> str:
    """H-Mean of what the network finds in the first validation images."""
    if not images:
        return "-"
    dataset = TextDataset(config, "val", train=False)
    del dataset.paths[images:]
    return f"{evaluate(Pipeline(dataset, config, 'cpu'), network).compute().hmean:.4f}"


def quantize(path: Path, quantized: Path, dataset: ImageDataset) -> None:
    """Write the network of `path` with 8-bit weights and activations."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Images(CalibrationDataReader):
        """Training images, one at a time."""

        def __init__(self) -> None:
            del dataset.paths[CALIBRATION_IMAGES:]
            self.batches = map(dataset.batch, Batches(dataset, 1))

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(self.batches, None)
            return batch and {"images": batch["image"]}

    prepared = path.with_name("prepared.onnx")
    quant_pre_process(path, prepared, skip_symbolic_shape=True)
    quantize_static(
        prepared,
        quantized,
        Images(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        op_types_to_quantize=["Conv"],
    )


if __name__ == "__main__":
    main()
