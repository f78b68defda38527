"""mlp: LayerNorm, fc1, GELU, fc2, LayerScale, drop path and residual."""

import torch
import torch.nn.functional as F
from torch import Tensor

from vit_fast.ops.linear_residual import residual_branch

ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}


def mlp(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    layer_scale: Tensor | None = None,
    drop: Tensor | None = None,
    activation: str = "gelu",
    eps: float = 1e-6,
) -> Tensor:
    hidden = F.linear(F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, eps), fc1_weight, fc1_bias)
    branch = F.linear(ACTIVATIONS[activation](hidden), fc2_weight, fc2_bias)
    return residual_branch(branch, x, layer_scale, drop)
