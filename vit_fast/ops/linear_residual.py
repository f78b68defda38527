"""linear_residual: product, bias, LayerScale, drop path and residual."""

import torch.nn.functional as F
from torch import Tensor


def linear_residual(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    layer_scale: Tensor | None = None,
    drop: Tensor | None = None,
) -> Tensor:
    return residual_branch(F.linear(x, weight, bias), residual, layer_scale, drop)


def residual_branch(branch: Tensor, residual: Tensor, layer_scale: Tensor | None, drop: Tensor | None) -> Tensor:
    """residual + drop·layer_scale·branch in PyTorch, in the dtype of the residual."""
    if layer_scale is not None:
        branch = branch * layer_scale
    if drop is not None:
        branch = branch * drop.view(-1, *[1] * (branch.dim() - 1))
    return (residual + branch).to(residual.dtype)
