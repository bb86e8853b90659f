"""The training loss of DBNet: balanced cross entropy, dice and L1 (arXiv 1911.08947, section 3.3)."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from dbnet.config import Config
from dbnet.model import Maps
from dbnet.targets import thresh_mask, thresh_of_levels

_EPSILON = 1e-6


class Losses(NamedTuple):
    """The weighted sum and its three unweighted parts, 0-d float32 tensors."""

    total: Tensor
    prob: Tensor
    binary: Tensor
    thresh: Tensor


def db_loss(maps: Maps, prob_map: Tensor, thresh_levels: Tensor, mask: Tensor, config: Config) -> Losses:
    """w_p BCE(P) + w_b dice(B) + w_t L1(T) over the pixels that are not don't-care, in float32. All maps are (N, H, W).
    `maps` are logits of any float type. `prob_map` is 1 on text kernels, `mask` 0 on don't-care text. `thresh_levels`
    are 0 to 255 for config.thresh_min to config.thresh_max; L1 counts where `targets.thresh_mask` says."""
    with torch.autocast(maps.prob_logits.device.type, enabled=False):
        prob_logits, thresh_logits = maps.prob_logits.float(), maps.thresh_logits.float()
        target, mask, thresh_levels = prob_map.float(), mask.float(), thresh_levels.float()
        thresh = thresh_logits.sigmoid()
        binary = torch.sigmoid(config.binarization_k * (prob_logits.sigmoid() - thresh))
        near_text = mask * thresh_mask(target, thresh_levels)
        prob_loss = balanced_cross_entropy(prob_logits, target, mask, config.negative_ratio)
        binary_loss = dice_loss(binary, target, mask)
        thresh_map = thresh_of_levels(thresh_levels, config.thresh_min, config.thresh_max)
        thresh_loss = ((thresh - thresh_map).abs() * near_text).sum() / (near_text.sum() + _EPSILON)
        total = config.prob_loss_weight * prob_loss + config.binary_loss_weight * binary_loss
        total = total + config.thresh_loss_weight * thresh_loss
    return Losses(total, prob_loss, binary_loss, thresh_loss)


def balanced_cross_entropy(logits: Tensor, target: Tensor, mask: Tensor, negative_ratio: float) -> Tensor:
    """Mean cross entropy of the positives and, for each of them, the `negative_ratio` hardest negatives. All maps are
    (N, H, W) float32; `target` is 0 or 1, `mask` 0 where a pixel does not count. With fewer negatives in the batch, all
    count; without any positive the loss is 0. Negatives that tie at the border share the places left, so that the
    result does not depend on their order."""
    losses = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    positive, negative = target * mask, (1 - target) * mask
    positive_count = positive.sum()
    negative_count = torch.minimum(negative.sum(), (positive_count * negative_ratio).floor())
    weights = positive + hardest(losses.detach() * negative, negative_count) * negative
    return (losses * weights).sum() / (positive_count + negative_count + _EPSILON)


def dice_loss(prediction: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """1 - 2 |P T| / (|P| + |T|) over the pixels in `mask`; all (N, H, W) float32 in 0..1."""
    overlap = (prediction * target * mask).sum()
    return 1 - 2 * overlap / ((prediction * mask).sum() + (target * mask).sum() + _EPSILON)


def hardest(losses: Tensor, count: Tensor) -> Tensor:
    """Weights that pick the `count` largest of `losses`, float32 of any shape, none negative; zeros are never picked.
    `count` is a 0-d tensor, which the host need not know, as topk would ask. The weights sum to it (or to the number of
    losses above 0): 1 above the value of rank `count`, 0 below, and an equal share on that value itself. The value is
    found by bisection over the bits: floats that are not negative compare like their bit patterns."""
    bits = losses.contiguous().view(torch.int32)
    value = torch.zeros((), dtype=torch.int32, device=losses.device)
    for bit in reversed(range(31)):  # the highest, the sign, is 0
        candidate = value | (1 << bit)
        value = torch.where((bits >= candidate).sum() >= count, candidate, value)
    above, level = bits > value, (bits == value) & (losses > 0)
    share = (count - above.sum()) / level.sum().clamp(min=1)
    return above + level * share.clamp(0, 1)
