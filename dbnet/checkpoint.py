"""Checkpoints: written whole or not at all, read without running code, refused in one line when they do not fit."""

import io
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dbnet.config import Config
from dbnet.device import compile_model
from dbnet.errors import UserError
from dbnet.files import write_whole
from dbnet.model import DBNet, fold_batch_norms

FORMAT = 1


def save_checkpoint(path: Path, config: Config, model: nn.Module, keep: Path | None = None, **state: Any) -> None:
    """Write the configuration, the weights and `state` (tensors and plain values) to `path`, atomically.

    `keep` names a place for the checkpoint that was there. Raises UserError, with that one kept, where it cannot be
    written.
    """
    content = io.BytesIO()  # torch.save into a file hides a full disk behind an error of its own
    torch.save({"format": FORMAT, "config": config.to_dict(), "model": model.state_dict(), **state}, content)
    with write_whole(path, keep=keep) as file:
        file.write(content.getbuffer())


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read what `save_checkpoint` wrote, onto the CPU; `config` is a Config again.

    Raises UserError where the file is missing, damaged, no checkpoint of this program, of a newer format, or a pickle
    of anything but tensors and plain values (such a file could run code; it is not executed).
    """
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols: what matters is whether it can be read
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle, encoding and storage errors of many kinds
        reason = str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
        raise UserError(f"{path}: not a checkpoint, or a damaged one ({reason[:150]})") from None
    if not isinstance(content, dict) or not {"format", "config", "model"} <= content.keys():
        raise UserError(f"{path}: not a checkpoint of dbnet; it lacks the configuration or the weights")
    if not isinstance(content["format"], int) or content["format"] > FORMAT:
        raise UserError(f"{path}: written by a newer dbnet (format {content['format']}); update dbnet to read it")
    try:
        content["config"] = Config.from_dict(content["config"])
    except (UserError, TypeError) as error:
        raise UserError(f"{path}: its configuration is not of this dbnet: {error}") from None
    return content


def load_weights(model: nn.Module, content: dict[str, Any], path: Path, config: Config) -> None:
    """Copy the weights of a loaded checkpoint into `model`. Raises UserError where they are of another architecture."""
    try:
        model.load_state_dict(content["model"])
    except Exception:  # missing, unexpected or wrongly shaped tensors, or no state_dict at all
        theirs, ours = content["config"], config
        raise UserError(
            f"{path}: holds another architecture ({theirs.backbone}, {theirs.pyramid_channels} pyramid channels) than "
            f"asked for ({ours.backbone}, {ours.pyramid_channels}); set --backbone and --pyramid-channels alike"
        ) from None


def load_model(path: Path, changes: dict[str, Any]) -> tuple[DBNet, Config, dict[str, Any]]:
    """The network of a checkpoint, ready for inference (eval mode, batch norms folded, compiled where the configuration
    says so), its configuration with `changes` applied, and the whole content."""
    content = load_checkpoint(path)
    config = content["config"].changed(**changes)
    model = DBNet(config.changed(weights="none"))
    load_weights(model, content, path, config)
    fold_batch_norms(model.eval())
    if config.compile:
        compile_model(model)
    return model, config, content
