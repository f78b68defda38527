"""ln_linear: LayerNorm and the product behind it."""

import torch
import torch.nn.functional as F
from torch import Tensor

from vit_fast.ops.backend import (
    as_rows,
    cast,
    check_linear,
    check_operands,
    check_shape,
    compute_dtype,
    float32_precision,
    likes,
    measured_faster,
    on_device_of,
    or_empty,
    or_none,
    ready,
    shaped,
    use_triton,
)


def check(x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    _, width = check_linear(x, weight, bias)
    check_shape("norm_weight", norm_weight, (width,))
    check_shape("norm_bias", norm_bias, (width,))
    check_operands(x, norm_weight=norm_weight, norm_bias=norm_bias, weight=weight, bias=bias)


@torch.library.custom_op("vit_fast::ln_linear", mutates_args=())
def _ln_linear(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    from vit_fast.kernels import ln_linear as kernel

    with on_device_of(x):
        y, mean, rstd = kernel.forward(
            as_rows(x),
            *map(ready, (norm_weight, norm_bias, weight, bias)),
            eps,
            float32_precision(weight.dtype),
        )
    return shaped(y, (*x.shape[:-1], weight.shape[0])), mean, rstd


@_ln_linear.register_fake
def _(x, norm_weight, norm_bias, weight, bias, eps):
    rows = x.numel() // x.shape[-1]
    statistics = (x.new_empty(rows, dtype=torch.float32) for _ in range(2))
    return x.new_empty(*x.shape[:-1], weight.shape[0], dtype=weight.dtype), *statistics


@torch.library.custom_op("vit_fast::ln_linear_backward", mutates_args=())
def _backward(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    trained: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from vit_fast.kernels import ln_linear as kernel

    with on_device_of(x):
        dx, *gradients = kernel.backward(
            as_rows(dy),
            as_rows(x),
            mean,
            rstd,
            *map(ready, (norm_weight, norm_bias, weight, bias)),
            float32_precision(weight.dtype),
            trained,
        )
    dnorm_weight, dnorm_bias, dweight, dbias = (or_empty(gradient, dy) for gradient in gradients)
    return dx.view(x.shape), dnorm_weight, dnorm_bias, dweight, dbias


@_backward.register_fake
def _(dy, x, mean, rstd, norm_weight, norm_bias, weight, bias, trained):
    return likes(dy, x, (norm_weight, norm_bias, weight, bias), trained)


def _setup_context(ctx, inputs, output):
    x, norm_weight, norm_bias, weight, bias, _ = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, mean, rstd, norm_weight, norm_bias, weight, bias)


def _autograd(ctx, dy, _dmean, _drstd):
    if dy is None:
        return (None,) * 6
    gradients = _backward(dy, *ctx.saved_tensors, any(ctx.needs_input_grad[1:5]))
    return *map(or_none, gradients), None


_ln_linear.register_autograd(_autograd, setup_context=_setup_context)


def ln_linear(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor | None, eps: float = 1e-6
) -> Tensor:
    """LayerNorm over the last axis, then a linear map: the first step of each half of a block.

    Dosovitskiy et al. 2021, equation 2 (the LN inside MSA and the product that makes its queries, keys and values).

    Args:
        x: [..., K], fp32, fp16, bf16, or fp64 (PyTorch only). Any strides.
        norm_weight, norm_bias: [K], the norm's scale γ and shift β.
        weight: [N, K].    bias: [N] or None.
        eps: added to the variance.

    Returns:
        [..., N] in the dtype of x, or autocast's where it is on. Statistics and sums are fp32.

    Raises:
        ValueError: for a shape or a device that does not fit. TypeError: for a dtype that does not.
    """
    check(x, norm_weight, norm_bias, weight, bias)
    work = (x, norm_weight, norm_bias, weight, bias), weight.shape, x.shape[:-1].numel()
    if not use_triton("ln_linear", x, weight) or measured_faster("ln_linear", *work):
        return F.linear(F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, eps), weight, bias)
    return _ln_linear(x, norm_weight, norm_bias, cast(weight, compute_dtype(x)), bias, eps)[0]
