"""linear_residual: product, bias, LayerScale, drop path and residual."""

import torch
import torch.nn.functional as F
from torch import Tensor

from vit_fast.ops.backend import (
    as_rows,
    cast,
    check_device,
    check_linear,
    check_operands,
    check_shape,
    compute_dtype,
    float32_precision,
    likes,
    measured_faster,
    needs_grad,
    on_device_of,
    or_empty,
    or_none,
    ready,
    shaped,
    use_triton,
)


def check(x, weight, bias, residual, layer_scale, drop) -> None:
    features, _ = check_linear(x, weight, bias)
    check_shape("residual", residual, (*x.shape[:-1], features))
    check_shape("layer_scale", layer_scale, (features,))
    check_shape("drop", drop, (x.shape[0],))
    check_operands(x, weight=weight, bias=bias)
    check_device(x, residual=residual, layer_scale=layer_scale, drop=drop)
    if not residual.is_floating_point():
        raise TypeError(f"residual: got {residual.dtype}, takes a floating dtype")


@torch.library.custom_op("vit_fast::linear_residual", mutates_args=())
def _linear_residual(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    layer_scale: Tensor | None,
    drop: Tensor | None,
) -> Tensor:
    from vit_fast.kernels import linear_residual as kernel

    with on_device_of(x):
        y = kernel.forward(
            as_rows(x),
            ready(weight),
            ready(bias),
            as_rows(residual),
            ready(layer_scale),
            ready(drop),
            x.shape[1:-1].numel(),
            float32_precision(weight.dtype),
        )
    return shaped(y, residual.shape)


@_linear_residual.register_fake
def _(x, weight, bias, residual, layer_scale, drop):
    return residual.new_empty(residual.shape)


@torch.library.custom_op("vit_fast::linear_residual_backward", mutates_args=())
def _backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    layer_scale: Tensor | None,
    drop: Tensor | None,
    trained: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from vit_fast.kernels import linear_residual as kernel

    with on_device_of(x):
        dx, *gradients = kernel.backward(
            as_rows(dy),
            as_rows(x),
            *map(ready, (weight, bias, layer_scale, drop)),
            x.shape[1:-1].numel(),
            float32_precision(weight.dtype),
            trained,
        )
    dweight, dbias, dscale = (or_empty(gradient, dy) for gradient in gradients)
    return dx.view(x.shape), dweight, dbias, dscale


@_backward.register_fake
def _(dy, x, weight, bias, layer_scale, drop, trained):
    return likes(dy, x, (weight, bias, layer_scale), trained)


def _setup_context(ctx, inputs, output):
    x, weight, bias, _, layer_scale, drop = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, bias, layer_scale, drop)


def _autograd(ctx, dy):
    if dy is None:
        return (None,) * 6
    _, weight, bias, _, layer_scale, _ = ctx.needs_input_grad
    gradients = _backward(dy, *ctx.saved_tensors, weight or bias or layer_scale)
    dx, dweight, dbias, dscale = map(or_none, gradients)
    return dx, dweight, dbias, dy, dscale, None


_linear_residual.register_autograd(_autograd, setup_context=_setup_context)


def linear_residual(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    layer_scale: Tensor | None = None,
    drop: Tensor | None = None,
) -> Tensor:
    """residual + drop∘layer_scale∘(x·Wᵀ + b): the projection that ends a residual branch.

    Dosovitskiy et al. 2021, equation 2, with the LayerScale of Touvron et al. 2021 (CaiT) and the stochastic depth of
    Huang et al. 2016.

    Args:
        x: [B, ..., K], fp32, fp16, bf16, or fp64 (PyTorch only). Any strides.
        weight: [N, K].    bias: [N] or None.
        residual: [B, ..., N], any floating dtype.
        layer_scale: [N] or None.
        drop: [B] or None, the factor of each image's branch: 0, or 1/keep.

    Returns:
        [B, ..., N] in the dtype of the residual.

    Raises:
        ValueError: for a shape or a device that does not fit. TypeError: for a dtype that does not.
    """
    check(x, weight, bias, residual, layer_scale, drop)
    work = (x, weight, bias, residual, layer_scale), weight.shape, x.shape[:-1].numel()
    takes = use_triton("linear_residual", x, residual, refusal=refuse_drop(drop))
    if not takes or measured_faster("linear_residual", *work):
        return residual_branch(F.linear(x, weight, bias), residual, layer_scale, drop)
    dtype = compute_dtype(x)
    return _linear_residual(x.to(dtype), cast(weight, dtype), bias, residual, layer_scale, drop)


def refuse_drop(drop: Tensor | None) -> str:
    """Why no kernel takes this draw, or ""."""
    return "drop requires a gradient" if needs_grad(drop) else ""


def residual_branch(branch: Tensor, residual: Tensor, layer_scale: Tensor | None, drop: Tensor | None) -> Tensor:
    """residual + drop∘layer_scale∘branch in PyTorch, in the dtype of the residual."""
    if layer_scale is not None:
        branch = branch * layer_scale
    if drop is not None:
        branch = branch * drop.view(-1, *[1] * (branch.dim() - 1))
    return (residual + branch).to(residual.dtype)
