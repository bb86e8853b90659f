"""Checkpoints: written whole or not at all, read without running code, rejected in one line when they do not fit."""

import io
import os
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dbnet.config import Config
from dbnet.device import from_first
from dbnet.errors import UserError, library_errors, one_line
from dbnet.files import check_regular, write_whole
from dbnet.model import DBNet, fold

HALF_MARK = "halved by dbnet"  # in every file of `write_half`, which may be overwritten therefore
FORMAT = 3
"""Format that `save_checkpoint` writes; checkpoints of a higher one are rejected.

A field that old checkpoints lack gets its default, which must mean what the program did before. A removed one goes into
`config.REMOVED_FIELDS`. When a layer is removed or renamed, or values change their meaning: raise FORMAT, and translate
in `load_checkpoint`; reject what can no longer be honoured. Format 2 has a batch norm more in the fusion asf. Format 3
lacks the label format totaltext. tests/data/format-1.pt and weights/lite.pt (format 2) have to stay readable."""


def save_checkpoint(path: Path, config: Config, model: nn.Module, keep: Path | None = None, **state: Any) -> None:
    """Write the configuration, the weights and `state` (tensors and plain values) to `path`, atomically. A checkpoint
    that was there goes to `keep`. Raises UserError, with that one kept, where `path` cannot be written."""
    _write(path, {"format": FORMAT, "config": config.to_dict(), "model": model.state_dict(), **state}, keep)


def _write(path: Path, content: dict[str, Any], keep: Path | None = None) -> None:
    serialized = io.BytesIO()  # torch.save into a file hides a full disk behind an error of its own
    torch.save(content, serialized)
    with write_whole(path, keep=keep) as file:
        file.write(serialized.getbuffer())


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read what `save_checkpoint` wrote, onto the CPU; `config` is a Config again. Raises UserError where the file is
    missing, damaged, no checkpoint of this program, of a newer format, or a pickle of anything but tensors and plain
    values (such a file could run code; it is not executed)."""
    check_regular(path)
    if not os.path.isfile(path):
        is_folder = ", but a folder; name the best.pt in it (images go with --images)" if path.is_dir() else ""
        raise UserError(f"{path}: no such checkpoint{is_folder}")
    fix = "" if path.suffix == ".pt" else "images go with --images"
    with library_errors(f"{path}: not a checkpoint, or a damaged one", fix), warnings.catch_warnings():
        _check_archive(path)
        warnings.simplefilter("ignore")  # about pickle protocols: what matters is whether it can be read
        content = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(content, dict) or not {"format", "config", "model"} <= content.keys():
        raise UserError(f"{path}: not a checkpoint of dbnet; it lacks the configuration or the weights")
    written_by = content["format"]
    if type(written_by) is not int or not 1 <= written_by <= FORMAT:
        shown = str(written_by)[:9] if isinstance(written_by, int | float | str) else type(written_by).__name__
        raise UserError(f"{path}: has format {shown}; update dbnet if it is by a newer dbnet")
    try:
        values = dict(content["config"])
        if written_by < 3 and values.get("format") == "totaltext":
            values["format"] = "auto"
        content["config"] = Config.from_dict(values)
    except (UserError, TypeError, ValueError, RecursionError) as error:  # but the first, where it is no dict of fields
        reason = f"its configuration is unknown here ({one_line(error)})"
        raise UserError(f"{path}: {reason}; update dbnet if it is of a newer one") from None
    if written_by == 1 and content["config"].fusion == "asf":
        raise UserError(f"{path}: has the fusion asf of an older dbnet, which often failed to learn; train it anew")
    return content


def _check_archive(path: Path) -> None:
    """Raise ValueError unless a file is a zip archive as torch.save writes it, with right checksums, which torch does
    not check. Compressed or overlapping parts could unfold to more than memory holds."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ValueError("it is compressed")
        if sum(entry.file_size for entry in entries) > path.stat().st_size:
            raise ValueError("its parts overlap")
        if harmed := archive.testzip():
            raise ValueError(f"the checksum of {harmed} does not fit")


def load_weights(model: nn.Module, content: dict[str, Any], path: Path, config: Config) -> None:
    """Copy the weights of a loaded checkpoint into `model`. Raises UserError if they do not fit or are not finite."""
    try:
        model.load_state_dict(content["model"])
    except MemoryError:
        raise
    except Exception:  # missing, unexpected or wrongly shaped tensors, or no state_dict at all
        names = "{0.backbone}, {0.pyramid_channels} pyramid channels, fusion {0.fusion}".format
        theirs, ours = names(content["config"]), names(config)
        reason = f"its weights are not those of {theirs}, as it says; take another checkpoint"
        if theirs != ours:
            fix = "set --backbone, --pyramid-channels and --fusion alike"
            reason = f"holds another architecture ({theirs}) than asked for ({ours}); {fix}"
        raise UserError(f"{path}: {reason}") from None
    _check_finite(path, content["model"], model.state_dict())


def _check_finite(path: Path, theirs: dict[str, Tensor], ours: dict[str, Tensor]) -> None:
    for name, tensor in theirs.items():
        is_whole = ours[name].is_floating_point() > tensor.is_floating_point()  # as after a quantization
        is_odd = tensor.is_meta or tensor.is_complex() or tensor.layout != torch.strided or is_whole
        is_negative = not is_odd and name.endswith("running_var") and (tensor < 0).any()
        if is_odd or is_negative or not tensor.float().isfinite().all():
            raise UserError(f"{path}: its weights are not finite, so its training had failed; take another checkpoint")


def build_model(config: Config, run: Path, last: dict[str, Any] | None, init: Path | None) -> DBNet:
    """The network of a training: of the save `last` of `run`, else from the weights of `init`, else from scratch."""
    content = last or (from_first(lambda: load_checkpoint(init)) if init else None)
    has_backbone = last or (content and content["config"].backbone == config.backbone)
    model = DBNet(config.changed(weights="none") if has_backbone else config)
    if last:
        load_weights(model, last, run / "last.pt", config)
    elif content and init:
        start_from(model, content, init)
    return model


def start_from(model: nn.Module, content: dict[str, Any], path: Path) -> None:
    """Copy what fits of a checkpoint of any architecture into `model`, and print what is left as it was: of each layer
    all tensors or none, by name and shape, and so for the whole backbone. Raises UserError where nothing fits."""
    ours, theirs = model.state_dict(), content["model"]
    if not isinstance(theirs, dict) or not all(isinstance(name, str) for name in theirs):
        raise UserError(f"{path}: holds no weights; leave out --init")
    misfits = {_layer(name) for name in ours.keys() ^ theirs.keys()}
    common = ours.keys() & theirs.keys()
    odd = {name for name in common if getattr(theirs[name], "is_nested", True)}  # no tensor, or one without a shape
    misfits |= {_layer(name) for name in common if name in odd or theirs[name].shape != ours[name].shape}
    taken = {name: theirs[name] for name in ours if _layer(name) not in misfits}
    if not taken:
        raise UserError(f"{path}: none of its weights fits this network; leave out --init")
    _check_finite(path, taken, ours)
    model.load_state_dict(taken, strict=False)
    left = [_layer(name) + "." for name in ours.keys() - taken.keys()]
    parts = sorted({match[0] for name in left if (match := re.match(r"[^.]+(\.[^.\d]+(?=\.))?", name))})
    rest = f"; left as they were: {', '.join(parts)}" if parts else ""
    print(f"{path}: {len(taken)} of {len(ours)} tensors taken{rest}")


def _layer(name: str) -> str:
    """The layer that a tensor belongs to; the backbone counts as one."""
    return "backbone" if name.startswith("backbone.") else name.rpartition(".")[0]


def load_model(path: Path, changes: dict[str, Any]) -> tuple[DBNet, Config, dict[str, Any]]:
    """The folded network of a checkpoint, its configuration with `changes` applied, and the whole content."""
    content = load_checkpoint(path)
    config = content["config"].changed(**changes)
    model = DBNet(config.changed(weights="none"))
    load_weights(model, content, path, config)
    fold(model.eval())
    return model, config, content


def change_checkpoint(path: Path, changes: dict[str, Any], **state: Any) -> None:
    """Change fields of the configuration in a checkpoint and add `state` (tensors and plain values), atomically."""
    content = load_checkpoint(path)
    content["config"] = content["config"].changed(**changes).to_dict()
    _write(path, {**content, **state})


def write_half(source: Path, path: Path, changes: dict[str, Any]) -> None:
    """Write the network and the configuration of a checkpoint, with `changes`, at half the size: kernels as 16-bit
    floats, which loading widens again, without what only training needs. Raises UserError as `load_checkpoint` does,
    where a weight is too large for 16 bits, and where `path` cannot be written."""
    content = load_checkpoint(source)
    halved = {name: tensor.half() if tensor.ndim > 1 else tensor for name, tensor in content["model"].items()}
    if not all(tensor.isfinite().all() for tensor in halved.values()):
        raise UserError(f"{source}: a weight is too large for 16 bits; ship the checkpoint as it is")
    config = content["config"].changed(**changes).to_dict()
    _write(path, {"made_by": HALF_MARK, "format": content["format"], "config": config, "model": halved})
