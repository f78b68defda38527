"""patch_embed: image → tokens, one kernel."""

import torch
import torch.nn.functional as F
from torch import Tensor

from vit_fast.ops.backend import check_operands, check_rank, check_shape


def patch_embed(
    images: Tensor, weight: Tensor, bias: Tensor | None, position: Tensor | None = None, prefix: Tensor | None = None
) -> Tensor:
    check(images, weight, bias, position, prefix)
    return _torch(images, weight, bias, position, prefix)


def check(images, weight, bias, position, prefix) -> None:
    check_rank("images", images, "B C H W")
    check_rank("weight", weight, "D C P P")
    width, channels, size, _ = weight.shape
    if images.shape[1] != channels:
        raise ValueError(f"images: got {images.shape[1]} channels, takes {channels}, those of weight")
    check_shape("bias", bias, (width,))
    check_operands(images, weight=weight, bias=bias, position=position, prefix=prefix)


def _torch(images, weight, bias, position, prefix):
    tokens = F.conv2d(images, weight, bias, stride=weight.shape[-2:]).flatten(2).transpose(1, 2)
    count = 0 if prefix is None else prefix.shape[0]
    own = position is not None and count > 0 and position.shape[0] == tokens.shape[1] + count
    if position is not None and not own:
        tokens = tokens + position
    if count:
        tokens = torch.cat([prefix.expand(tokens.shape[0], -1, -1), tokens], dim=1)
    return tokens + position if own else tokens
