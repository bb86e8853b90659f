"""Which device the network runs on, and in which precision."""

import os
import random
import shutil
import sys
from typing import Any

import numpy as np
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
        # GPUs before Ampere only emulate bfloat16, at a fraction of the speed that they have with float16.
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    return {"off": None, "fp16": torch.float16, "bf16": torch.bfloat16}[config.amp]


def has_fast_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware, where inference takes half of the time."""
    return any(getattr(torch.cpu, name, bool)() for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))


def compile_model(model: torch.nn.Module) -> None:
    """Compile `model` in place at its first call, for batches of any shape; its state_dict stays as it is.

    Raises UserError where there is no C++ compiler for it.
    """
    if not shutil.which(os.environ.get("CXX", "g++")) and not shutil.which("clang++"):
        raise UserError("--compile: needs a C++ compiler (g++, or CXX in the environment); leave it out")
    model.compile(dynamic=True)


def seed_all(config: Config) -> None:
    """Seed every source of random numbers, and with config.deterministic let no algorithm depend on chance."""
    random.seed(config.seed)
    np.random.seed(config.seed)
    torch.manual_seed(config.seed)
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when the GPU is first used
        torch.backends.cudnn.benchmark = False
        torch.use_deterministic_algorithms(True)


def random_state(device: torch.device) -> dict[str, Any]:
    """Where every source of random numbers of this process is, as tensors and plain values."""
    version, numbers, gauss = random.getstate()
    numpy_state: Any = np.random.get_state()  # a tuple, which its type leaves open
    name, keys, *position = numpy_state
    return {
        "python": [version, list(numbers), gauss],
        "numpy": [name, keys.tolist(), *position],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def restore_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Go back to what `random_state` gave."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, *position = state["numpy"]
    np.random.set_state((name, np.array(keys, np.uint32), *position))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)


def peak_memory(device: torch.device) -> float:
    """Most memory that tensors took on the GPU, or the process on the host, in GB; 0 where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
