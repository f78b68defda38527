"""ln_linear: LayerNorm and the product behind it."""

import torch.nn.functional as F
from torch import Tensor


def ln_linear(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor | None, eps: float = 1e-6
) -> Tensor:
    return F.linear(F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, eps), weight, bias)
