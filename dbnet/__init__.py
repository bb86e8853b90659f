"""DBNet text detector for receipts and documents."""

from typing import Any

from dbnet.errors import UserError

__version__ = "2.0"
__all__ = ["Detector", "UserError"]


def __getattr__(name: str) -> Any:
    """Import the detector, and torch with it, when it is first asked for."""
    if name == "Detector":
        from dbnet.inference import Detector

        return Detector
    raise AttributeError(f"module 'dbnet' has no attribute {name!r}")
