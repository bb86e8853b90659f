"""Networks in the ONNX format: written from a checkpoint, run by ONNX Runtime on the CPU, without PyTorch.

The file takes (batch, height, width, 3) uint8 `images`, RGB, of any size in multiples of 32, and gives
(batch, height, width) float32 `prob_maps`. Its metadata holds the configuration as JSON under `dbnet_config`, so that
one file is all that is needed to detect text.
"""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dbnet.config import Config, ModelConfig
from dbnet.dataset import count_cores
from dbnet.errors import UserError
from dbnet.files import write_whole
from dbnet.memory import BatchPlan

if TYPE_CHECKING:
    from dbnet.model import DBNet

OPSET = 17
CONFIG_KEY = "dbnet_config"


class OnnxNetwork:
    """An exported network on the CPU, as `inference.Pipeline` runs it (an `inference.Network`)."""

    device = "cpu"

    def __init__(self, path: Path, changes: dict[str, Any]) -> None:
        """Load `path`, with `changes` made to the configuration that it holds.

        Raises UserError where the file is missing, damaged, or not one that `export.py` wrote, where `changes` ask for
        what it cannot do, or ONNX Runtime is not installed.
        """
        onnxruntime = _import("onnxruntime")
        if not path.is_file():
            raise UserError(f"{path}: no such file")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors
        options.intra_op_num_threads = count_cores()  # by itself it takes those of the machine
        try:
            self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # of classes that ONNX Runtime does not name
            raise UserError(f"{path}: not an ONNX file, or a damaged one ({_one_line(error)})") from None
        metadata = self.session.get_modelmeta().custom_metadata_map
        try:
            trained = Config.from_dict(json.loads(metadata[CONFIG_KEY]))
        except (KeyError, ValueError, TypeError, AttributeError, UserError):
            raise UserError(f"{path}: holds no configuration of this dbnet; export it with export.py") from None
        self.config = trained.changed(**changes)
        if self.config.tta:
            raise UserError(f"{path}: --tta needs the checkpoint; a .onnx file looks at an image once")
        if not self.config.device.startswith(("auto", "cpu")):
            raise UserError(f"--device {self.config.device}: {path} runs on the CPU; use auto or cpu")
        for field in fields(ModelConfig):
            if getattr(trained, field.name) != getattr(self.config, field.name):
                raise UserError(f"--{field.name.replace('_', '-')}: the network of {path} is what it is; leave it out")
        self.sides = (self.config.image_size,)

    def __str__(self) -> str:
        return f"{self.config.backbone}, {self.config.image_size} px, ONNX Runtime"

    def infer(
        self, images: Sequence[np.ndarray], sizes: list[tuple[int, int]], plan: BatchPlan
    ) -> Callable[[], np.ndarray]:
        """As `inference.Network` says; the work is done when this returns."""
        prob_maps = np.concatenate(
            [
                np.rint(255 * np.nan_to_num(self.probabilities(images[0][start : start + plan.micro_batch])))
                for start in range(0, len(sizes), plan.micro_batch)
            ]
        ).astype(np.uint8)
        return lambda: prob_maps

    def probabilities(self, images: np.ndarray) -> np.ndarray:
        """(N, height, width) float32 of (N, height, width, 3) uint8 images. Raises RuntimeError."""
        try:
            return self.session.run(None, {"images": images})[0]
        except Exception as error:  # of classes of ONNX Runtime's own, which dbnet.memory does not know
            raise RuntimeError(_one_line(error)) from error


def write_onnx(path: Path, model: DBNet, config: Config) -> None:
    """Write a network in eval mode, on the CPU, with its configuration; whole or not at all.

    Raises UserError where the file cannot be written or the `onnx` package is not installed.
    """
    import torch

    onnx = _import("onnx")
    example = torch.zeros(2, 64, 96, 3, dtype=torch.uint8)
    axes = {0: "batch", 1: "height", 2: "width"}
    file: Any = io.BytesIO()  # the exporter takes it, though its signature names paths alone
    with warnings.catch_warnings():
        # The exporter by tracing is called deprecated, but the network is a plain graph, and its successor takes six
        # times as long, one package more, and puts the weights into a file of their own.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model,
            (example,),
            file,
            dynamo=False,
            opset_version=OPSET,
            input_names=["images"],
            output_names=["prob_maps"],
            dynamic_axes={"images": axes, "prob_maps": axes},
        )
    graph = onnx.load_model_from_string(file.getvalue())
    onnx.helper.set_model_props(graph, {CONFIG_KEY: json.dumps(config.to_dict())})
    onnx.checker.check_model(graph)
    with write_whole(path) as output:
        output.write(graph.SerializeToString())


def _import(name: str) -> Any:
    """A package of the `onnx` extra. Raises UserError where it is not installed."""
    try:
        return import_module(name)
    except ImportError:
        raise UserError(f"{name} is not installed: pip install {name}") from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
