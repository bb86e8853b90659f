"""Which device the network runs on, and in which precision."""

import os
import shutil

import torch

from dbnet.config import Config
from dbnet.errors import UserError


def pick_device(name: str) -> torch.device:
    """The device of `--device`: auto, cpu, cuda or cuda:N. Raises UserError where it does not exist."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise UserError(f"--device {name}: not available here; use auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name}: takes auto, cpu, cuda or cuda:N")
    return device


def pick_amp_dtype(config: Config, device: torch.device) -> torch.dtype | None:
    """The type of mixed precision on `device`, None for float32 throughout."""
    if config.amp == "auto":
        if device.type == "cpu":
            return None
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return {"off": None, "fp16": torch.float16, "bf16": torch.bfloat16}[config.amp]


def compile_model(model: torch.nn.Module) -> None:
    """Compile `model` in place at its first call, for batches of any shape; its state_dict stays as it is.

    Raises UserError where there is no C++ compiler for it.
    """
    if not shutil.which(os.environ.get("CXX", "g++")) and not shutil.which("clang++"):
        raise UserError("--compile: needs a C++ compiler (g++, or CXX in the environment); leave it out")
    model.compile(dynamic=True)
