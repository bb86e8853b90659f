"""The network: a backbone, a feature pyramid, the differentiable binarization head (arXiv 1911.08947)."""

from collections import Counter
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import fuse_conv_bn_eval
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dbnet.backbone import Backbone
from dbnet.config import STRIDE, Config

_CONVOLUTIONS = (nn.Conv2d, nn.ConvTranspose2d)
EXAMPLE = (64, 64)  # height and width of an image that shows what a network does
BATCH_NORM_MOMENTUM = 0.1  # torchvision gives its mobile networks 0.01, too slow for the few steps of a short run


class Maps(NamedTuple):
    """What the network gives in training mode, (N, H, W) each, before the sigmoid."""

    prob_logits: Tensor
    thresh_logits: Tensor


class DBNet(nn.Module):
    """Text detector: (N, H, W, 3) uint8 RGB images in, H and W multiples of 32, maps of their own size out.

    In training mode these are `Maps`; in eval mode the probability map alone, (N, H, W) float32 in 0..1. Images are
    normalized here, on the device, so that a quarter of the bytes travels to it, and are channels_last as they come."""

    mean: Tensor
    std: Tensor | None  # None after `fold`

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.backbone = Backbone(config.backbone, config.weights)
        self.pyramid: nn.Module = FeaturePyramid(self.backbone.channels, config.pyramid_channels, config.fusion)
        self.prob_branch = _branch(config.pyramid_channels)
        self.thresh_branch = _branch(config.pyramid_channels)
        for layer in self.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.momentum = BATCH_NORM_MOMENTUM
            elif type(layer) is nn.Conv2d and layer.groups == layer.in_channels > 1:
                layer.__class__ = Depthwise
        self.register_buffer("mean", 255 * torch.tensor(self.backbone.mean), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(self.backbone.std), persistent=False)

    def forward(self, images: Tensor) -> Maps | Tensor:
        # A row of pixels times 3 at once: channels of 3 alone would take seven times as long on a CPU.
        width = images.shape[2]
        rows = images.flatten(2).to(self.mean.dtype) - self.mean.repeat(width)
        if self.std is not None:
            rows = rows / self.std.repeat(width)
        normalized = rows.view(images.shape).permute(0, 3, 1, 2)
        features = self.pyramid(self.backbone(normalized))
        prob_logits = self.prob_branch(features).squeeze(1)
        if not self.training:
            return prob_logits.float().sigmoid()
        return Maps(prob_logits, self.thresh_branch(features).squeeze(1))


class Depthwise(nn.Conv2d):
    """A depthwise convolution. On a CPU it trains in float32: its gradient in bfloat16 takes ten times as long."""

    def forward(self, images: Tensor) -> Tensor:
        if not self.training or images.device.type != "cpu":
            return super().forward(images)
        with torch.autocast("cpu", enabled=False):
            return super().forward(images.to(self.weight.dtype))


class AnySize(nn.Module):
    """A network in eval mode for images of any size: black fills them up to multiples of 32, and is cut off again."""

    def __init__(self, model: DBNet) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        height, width = images.shape[1], images.shape[2]
        padded = F.pad(images, (0, 0, 0, -width % STRIDE, 0, -height % STRIDE))
        return self.model(padded)[:, :height, :width]


class FeaturePyramid(nn.Module):
    """Bring four stages to `width` channels, add coarse to fine, and join all at stride 4: (N, width, H / 4, W / 4)."""

    def __init__(self, channels: list[int], width: int, fusion: str) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(count, width, 1, bias=False) for count in channels)
        self.smooth = nn.ModuleList(nn.Conv2d(width, width // 4, 3, padding=1, bias=False) for _ in channels)
        self.attention = ScaleAttention(width, len(channels)) if fusion == "asf" else nn.Identity()

    def forward(self, features: list[Tensor]) -> Tensor:
        levels = [lateral(feature) for lateral, feature in zip(self.lateral, features, strict=True)]
        for fine, coarse in ((2, 3), (1, 2), (0, 1)):
            levels[fine] = levels[fine] + F.interpolate(levels[coarse], scale_factor=2.0)
        smooth = [layer(level) for layer, level in zip(self.smooth, levels, strict=True)]
        joined = torch.cat([F.interpolate(level, size=smooth[0].shape[-2:]) for level in reversed(smooth)], dim=1)
        return self.attention(joined)


class ScaleAttention(nn.Module):
    """Adaptive scale fusion of DBNet++ (arXiv 2202.10304, section 3.2): each level of the joined (N, width, H, W) maps
    is weighed at each place by a number in 0..1 made of all levels. The paper has no batch norm here; without it,
    unbounded features drove all weights to 0, where no gradient is, in one training of two (benchmarks/RESULTS.md)."""

    def __init__(self, width: int, levels: int) -> None:
        super().__init__()
        inner = width // levels
        self.reduce = nn.Sequential(nn.Conv2d(width, inner, 3, padding=1, bias=False), nn.BatchNorm2d(inner))
        first, second = nn.Conv2d(1, 1, 3, padding=1, bias=False), nn.Conv2d(1, 1, 1, bias=False)
        self.spatial = nn.Sequential(first, nn.ReLU(inplace=True), second, nn.Sigmoid())
        self.weigh = nn.Sequential(nn.Conv2d(inner, levels, 1, bias=False), nn.Sigmoid())

    def forward(self, joined: Tensor) -> Tensor:
        reduced = self.reduce(joined)
        weights = self.weigh(reduced + self.spatial(reduced.mean(dim=1, keepdim=True)))
        return (joined.unflatten(1, (weights.shape[1], -1)) * weights.unsqueeze(2)).flatten(1, 2)


@torch.no_grad()
def fold_batch_norms(model: DBNet) -> None:
    """Fold each batch norm that runs in eval mode into the convolution that it follows, in place: the network then
    computes the same, to rounding, in less time. A run on a small image shows which follows which: the order of
    registration may differ (HRNet). A pair is folded if the batch norm alone takes the result, and each runs once."""
    calls = _calls(model)
    uses = Counter(id(tensor) for taken, _ in calls for tensor in taken)
    names = {layer: name for name, layer in model.named_modules()}
    # A subclass of the batch norm, as timm has it, does more than one.
    layers = [each for each in names if isinstance(each, _CONVOLUTIONS) or type(each) is nn.BatchNorm2d]
    by_weight = {id(layer.weight): layer for layer in layers}
    makers: dict[int, Any] = {}
    for taken, result in calls:
        layer: Any = by_weight.get(id(taken[1])) if len(taken) > 1 else None
        if layer is None or uses[id(layer.weight)] > 1:
            continue
        if isinstance(layer, _CONVOLUTIONS):
            makers[id(result)] = layer
        elif (maker := makers.get(id(taken[0]))) and uses[id(taken[0])] == 1:
            fused = fuse_conv_bn_eval(maker, layer, transpose=isinstance(maker, nn.ConvTranspose2d))
            model.set_submodule(names[maker], fused)
            model.set_submodule(names[layer], nn.Identity())


@torch.no_grad()
def fold_deviations(model: DBNet) -> None:
    """Let the kernels of the first convolution be divided by the deviations of the channels, in place of the images. If
    the backbone does something else with images first, nothing changes."""
    takers = [taken for taken, _ in _calls(model) if any(tensor.shape == (1, 3, *EXAMPLE) for tensor in taken)]
    layers = {id(layer.weight): layer for layer in model.modules() if isinstance(layer, nn.Conv2d)}
    first = [layers[id(tensor)] for taken in takers for tensor in taken if id(tensor) in layers]
    if len(takers) == len(first) == 1 and model.std is not None:
        first[0].weight /= model.std[:, None, None]
        model.std = None


class _Calls(TorchDispatchMode):
    """While it is entered, keeps the tensors that each operation takes and what it gives."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[list[Tensor], Any]] = []

    def __torch_dispatch__(self, operation: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        self.calls.append(([item for item in tree_leaves(args) if isinstance(item, Tensor)], result))
        return result


def _calls(model: DBNet) -> list[tuple[list[Tensor], Any]]:
    """What `_Calls` keeps of a run on a small image."""
    with _Calls() as run:
        model(torch.zeros(1, *EXAMPLE, 3, dtype=torch.uint8, device=model.mean.device))
    return run.calls


@torch.no_grad()
def fold(model: DBNet) -> None:
    """Make a network in eval mode faster, in place; it computes the same, to rounding, and can no longer be trained.
    Batch norms go into the convolutions before them, the deviations of the channels into the first one. The pyramid and
    the first convolution of the head are linear: what they do at stride 4 with coarser features is done at the strides
    of these (`UpConvolution`). The head's transposed convolutions, each as wide as its step, are 1 x 1 convolutions at
    stride 4. The threshold branch goes."""
    fold_batch_norms(model)
    fold_deviations(model)
    model.thresh_branch = nn.Sequential()
    if isinstance(model.pyramid, FeaturePyramid) and isinstance(model.pyramid.attention, nn.Identity):
        first, _, relu, second, _, _, third = list[Any](model.prob_branch)
        model.pyramid = FoldedPyramid(model.pyramid, first)
        model.prob_branch = nn.Sequential(relu, *_pointwise_head(second, third))


class UpConvolution(nn.Module):
    """A 3 x 3 convolution of a feature that nearest-neighbour interpolation has doubled, by 2 x 2 convolutions of the
    feature itself: (N, C, H, W) to (N, out, 2 H, 2 W). Each result sees two of its rows and two of its columns."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        # Which of three rows or columns of the weight fall on which of two, for even and odd results.
        rows = weight.new_tensor([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]])
        self.convolution = _convolution(torch.einsum("ayi,bxj,ocij->abocyx", rows, rows, weight).flatten(0, 2))

    def forward(self, feature: Tensor) -> Tensor:
        phases = self.convolution(feature).permute(0, 2, 3, 1).chunk(4, dim=3)  # (N, H + 1, W + 1, out)
        even = torch.stack([phases[0][:, :-1, :-1], phases[1][:, :-1, 1:]], dim=3).flatten(2, 3)
        odd = torch.stack([phases[2][:, 1:, :-1], phases[3][:, 1:, 1:]], dim=3).flatten(2, 3)
        return torch.stack([even, odd], dim=2).flatten(1, 2).permute(0, 3, 1, 2)


class FoldedPyramid(nn.Module):
    """A FeaturePyramid and the convolution of its 4 `width // 4` channels that follows; see `fold`."""

    def __init__(self, pyramid: Any, head: nn.Conv2d) -> None:
        super().__init__()
        self.lateral = pyramid.lateral
        self.own = nn.ModuleList(
            _convolution(torch.einsum("omij,mc->ocij", smooth.weight, lateral.weight[:, :, 0, 0]))
            for lateral, smooth in zip(pyramid.lateral, pyramid.smooth, strict=True)
        )
        self.coarser = nn.ModuleList(UpConvolution(smooth.weight) for smooth in pyramid.smooth[:3])
        finest = pyramid.smooth[0].out_channels  # channels of stride 4 come last, as FeaturePyramid joins them
        self.head = _convolution(head.weight[:, -finest:], head.bias)
        self.head_of_coarser = UpConvolution(head.weight[:, :-finest])

    def forward(self, features: list[Tensor]) -> Tensor:
        levels = [lateral(feature) for lateral, feature in zip(self.lateral[1:], features[1:], strict=True)]
        for fine, coarse in ((1, 2), (0, 1)):
            levels[fine] = levels[fine] + F.interpolate(levels[coarse], scale_factor=2.0)
        smooth = [own(feature) for own, feature in zip(self.own, features, strict=True)]
        for place, coarser in enumerate(self.coarser):
            smooth[place] = smooth[place] + coarser(levels[place])
        joined = torch.cat([F.interpolate(level, size=smooth[1].shape[-2:]) for level in reversed(smooth[1:])], dim=1)
        return self.head(smooth[0]) + self.head_of_coarser(joined)


def _convolution(weight: Tensor, bias: Tensor | None = None) -> nn.Conv2d:
    """A convolution with this (out, in, size, size) weight that keeps height and width; of size 2 they grow by one."""
    out, channels, size, _ = weight.shape
    layer = nn.Conv2d(channels, out, size, padding=size // 2, bias=bias is not None)
    layer.load_state_dict({"weight": weight} if bias is None else {"weight": weight, "bias": bias})
    return layer


def _pointwise_head(second: Any, third: Any) -> list[nn.Module]:
    """Two transposed convolutions of 2 x 2 at a step of 2, with a ReLU between them, as layers at stride 4."""
    # (row, column, channel) of each of four results; then, of each of those, row and column of four again.
    first = _convolution(second.weight.permute(2, 3, 1, 0).flatten(0, 2)[:, :, None, None], second.bias.repeat(4))
    place = torch.eye(2)
    weight = torch.einsum("ry,cx,iab->racbyxi", place, place, third.weight[:, 0]).reshape(16, -1, 1, 1)
    return [first, nn.ReLU(inplace=True), _convolution(weight, third.bias.repeat(16)), ShuffledPixels()]


class ShuffledPixels(nn.Module):
    """As nn.PixelShuffle(4), for channels_last in a quarter of the time: (N, 16, H, W) to (N, 1, 4 H, 4 W)."""

    def forward(self, squares: Tensor) -> Tensor:
        rows = squares.permute(0, 2, 3, 1).unflatten(3, (4, 4)).transpose(2, 3)  # (N, H, 4, W, 4)
        return rows.flatten(3).flatten(1, 2).unsqueeze(1)


class FusedConvolution(nn.Module):
    """A convolution and what follows, an activation or a sum, in one call of oneDNN, faster than PyTorch's own 1 x 1.
    The weight is kept in the layout that is best for the shape of the input, or each call would store it anew."""

    def __init__(self, layer: nn.Conv2d, activation: str) -> None:
        super().__init__()
        self.how: Any = (layer.padding, layer.stride, layer.dilation, layer.groups)
        self.activation, self.weight, self.bias = activation, layer.weight.detach(), layer.bias
        self.of_layout: dict[bytes, Tensor] = {}
        self.of_shape: dict[torch.Size, Tensor] = {}

    def forward(self, images: Tensor, added: Tensor | None = None) -> Tensor:
        images = images.to(self.weight.dtype)
        packed = self.of_shape.get(images.shape)
        if packed is None:
            packed = torch.ops.mkldnn._reorder_convolution_weight(self.weight, *self.how, images.shape)
            layout = torch.ops.mkldnn._get_mkldnn_serialized_md(packed).numpy().tobytes()
            packed = self.of_shape[images.shape] = self.of_layout.setdefault(layout, packed)
        convolve = torch.ops.mkldnn._convolution_pointwise
        if added is not None:
            return convolve.binary(images, added, packed, self.bias, *self.how, "add", None, None, [], None)
        return convolve(images, packed, self.bias, *self.how, self.activation, [], "")


class Residual(nn.Module):
    """An inverted residual of torchvision whose last convolution adds what the block has taken."""

    def __init__(self, first: nn.Module, last: FusedConvolution) -> None:
        super().__init__()
        self.first, self.last = first, last

    def forward(self, images: Tensor) -> Tensor:
        return self.last(self.first(images), images)


class GlobalAverage(nn.Module):
    """As nn.AdaptiveAvgPool2d(1), in a fifth of the time on a CPU."""

    def forward(self, images: Tensor) -> Tensor:
        return F.avg_pool2d(images, images.shape[2:])


@torch.no_grad()
def prepare_for_cpu(model: DBNet, dtype: torch.dtype | None) -> None:
    """Let a folded network compute in `dtype` (None: float32), and through oneDNN if that has it here, in place."""
    for part in (model.backbone, model.pyramid, model.prob_branch):
        part.to(dtype)
    model.mean = model.mean.to(dtype)
    checks = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    if not torch.backends.mkldnn.is_available() or (dtype and not getattr(torch.ops.mkldnn, checks[dtype])()):
        return
    activations = {nn.ReLU: "relu", nn.Hardswish: "hardswish"}
    for parent in list(model.modules()):
        layers = [(name, child) for name, child in parent.named_children() if not isinstance(child, nn.Identity)]
        for (name, layer), (next_name, follower) in pairwise(list[Any]([*layers, ("", nn.Identity())])):
            plain = type(layer) in (nn.Conv2d, Depthwise) and layer.padding_mode == "zeros"
            if plain and not isinstance(layer.padding, str):
                activation = activations.get(type(follower)) if isinstance(parent, nn.Sequential) else None
                parent.set_submodule(name, FusedConvolution(layer, activation or "none"))
                if activation:
                    parent.set_submodule(next_name, nn.Identity())
    for parent in list(model.modules()):
        for name, child in list[tuple[str, Any]](parent.named_children()):
            if isinstance(child, nn.AdaptiveAvgPool2d) and child.output_size == 1:
                parent.set_submodule(name, GlobalAverage())
            elif getattr(child, "use_res_connect", False) and hasattr(child, "block"):
                last = [layer for layer in child.block[-1].children() if not isinstance(layer, nn.Identity)]
                if [type(layer) for layer in last] == [FusedConvolution] and last[0].activation == "none":
                    parent.set_submodule(name, Residual(child.block[:-1], last[0]))


def _branch(width: int) -> nn.Sequential:
    """From the pyramid's features to one map of logits, 4 times their size (section 3.1 of the paper)."""
    inner = width // 4
    branch = nn.Sequential(
        *(nn.Conv2d(width, inner, 3, padding=1, bias=False), nn.BatchNorm2d(inner), nn.ReLU(inplace=True)),
        *(nn.ConvTranspose2d(inner, inner, 2, stride=2, bias=False), nn.BatchNorm2d(inner), nn.ReLU(inplace=True)),
        nn.ConvTranspose2d(inner, 1, 2, stride=2),
    )
    for layer in branch:
        if isinstance(layer, _CONVOLUTIONS):
            nn.init.kaiming_normal_(layer.weight)
    return branch
