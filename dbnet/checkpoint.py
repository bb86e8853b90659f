"""Checkpoints: written whole or not at all, read without running code, refused in one line when they do not fit."""

import re
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dbnet.config import Config
from dbnet.device import compile_model
from dbnet.errors import UserError
from dbnet.files import write_whole
from dbnet.model import DBNet, fold_batch_norms

FORMAT = 1


def save_checkpoint(path: Path, config: Config, model: nn.Module, **state: Any) -> None:
    """Write the configuration, the weights and `state` (tensors and plain values) to `path`, atomically."""
    content = {"format": FORMAT, "config": config.to_dict(), "model": model.state_dict(), **state}
    with write_whole(path) as file:
        torch.save(content, file)


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
        theirs, ours = (
            f"{each.backbone}, {each.pyramid_channels} pyramid channels, fusion {each.fusion}"
            for each in (content["config"], config)
        )
        raise UserError(
            f"{path}: holds another architecture ({theirs}) than asked for ({ours}); "
            f"set --backbone, --pyramid-channels and --fusion alike"
        ) from None


def start_from(model: nn.Module, content: dict[str, Any], path: Path) -> None:
    """Copy what fits of a loaded checkpoint of any architecture into `model`, and say in one line what does not.

    A layer is taken where all of its tensors agree in name and shape; the backbone as a whole or not at all, because
    some layers of another one are worth less than the weights that ours came with. Raises UserError where nothing fits.
    """
    ours, theirs = model.state_dict(), content["model"]
    if not isinstance(theirs, dict) or not all(isinstance(name, str) for name in theirs):
        raise UserError(f"{path}: holds no weights; leave out --init")

    def agrees(name: str) -> bool:
        return name in ours and isinstance(theirs.get(name), Tensor) and theirs[name].shape == ours[name].shape

    misfits = {_layer(name) for name in ours.keys() | theirs.keys() if not agrees(name)}
    taken = {name: theirs[name] for name in ours if _layer(name) not in misfits}
    if not taken:
        raise UserError(f"{path}: none of its weights fits this network; leave out --init")
    model.load_state_dict(taken, strict=False)
    print(
        f"{path}: {len(taken)} of {len(ours)} tensors taken"
        + _list_parts("left as they were", ours.keys() - taken.keys())
        + _list_parts("not used", theirs.keys() - taken.keys() - ours.keys())
    )


def _layer(name: str) -> str:
    """The layer that a tensor belongs to; the backbone counts as one."""
    return "backbone" if name.startswith("backbone.") else name.rpartition(".")[0]


def _list_parts(title: str, names: set[str]) -> str:
    """The parts of the network, such as pyramid.lateral or thresh_branch, that tensors belong to."""
    parts = {re.match(r"[^.]+(\.[^.\d]+(?=\.))?", _layer(name) + ".")[0] for name in names}
    return f"; {title}: {', '.join(sorted(parts))}" if parts else ""


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


def change_checkpoint(path: Path, changes: dict[str, Any], **state: Any) -> None:
    """Change fields of the configuration in a checkpoint and add `state` (tensors and plain values), atomically.

    All else in the file, be it a `best.pt` or a `last.pt`, stays as it was. Raises UserError as `load_checkpoint` does,
    and where the file cannot be written.
    """
    content = load_checkpoint(path)
    content["config"] = content["config"].changed(**changes).to_dict()
    with write_whole(path) as file:
        torch.save({**content, **state}, file)
