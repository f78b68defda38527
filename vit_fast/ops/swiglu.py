"""swiglu: LayerNorm, a gated MLP, LayerScale, drop path and residual."""

import torch
import torch.nn.functional as F
from torch import Tensor

from vit_fast.ops.backend import (
    as_rows,
    cast,
    check_linear,
    compute_dtype,
    float32_precision,
    needs_grad,
    on_device_of,
    or_empty,
    or_none,
    ready,
    shaped,
    use_triton,
)
from vit_fast.ops.linear_residual import refuse_drop, residual_branch
from vit_fast.ops.mlp import KEPT, PARAMETERS, check_half, fake_backward, fake_train


def check(x, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, layer_scale, drop) -> None:
    features, _ = check_linear(x, fc1_weight, fc1_bias, "fc1_")
    if features % 2:
        raise ValueError(f"fc1_weight: got {features} rows, takes an even number, the gates and then their values")
    check_half(x, features // 2, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, layer_scale, drop)


def _forward(training: bool, x: Tensor, *operands) -> tuple:
    """The kernels on the operands of the op: y, then what training keeps (elsewhere the hidden layer is None)."""
    from vit_fast.kernels import swiglu as kernel

    *parameters, eps = operands
    with on_device_of(x):
        y, *kept = kernel.forward(
            as_rows(x),
            *map(ready, parameters),
            eps,
            x.shape[1:-1].numel(),
            float32_precision(parameters[2].dtype),
            training,
        )
    return shaped(y, x.shape), *kept


@torch.library.custom_op("vit_fast::swiglu", mutates_args=(), schema=f"(Tensor x, {PARAMETERS}, float eps) -> Tensor")
def _swiglu(x, *operands):
    return _forward(False, x, *operands)[0]


@_swiglu.register_fake
def _(x, *_):
    return x.new_empty(x.shape)


@torch.library.custom_op(
    "vit_fast::swiglu_train",
    mutates_args=(),
    schema=f"(Tensor x, {PARAMETERS}, float eps) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _swiglu_train(x, *operands):
    return _forward(True, x, *operands)


_swiglu_train.register_fake(fake_train)


@torch.library.custom_op(
    "vit_fast::swiglu_backward",
    mutates_args=(),
    schema=f"(Tensor dy, Tensor x, {KEPT}, {PARAMETERS}, bool trained) -> ({', '.join(['Tensor'] * 8)})",
)
def _backward(dy, x, hidden, mean, rstd, *parameters_and_trained):
    from vit_fast.kernels import swiglu as kernel

    *parameters, trained = parameters_and_trained
    with on_device_of(x):
        dx, *gradients = kernel.backward(
            as_rows(dy),
            as_rows(x),
            hidden,
            mean,
            rstd,
            *map(ready, parameters),
            x.shape[1:-1].numel(),
            float32_precision(parameters[2].dtype),
            trained,
        )
    return dx.view(x.shape), *(or_empty(gradient, dy) for gradient in gradients)


_backward.register_fake(fake_backward)


def _setup_context(ctx, inputs, output):
    x, *parameters, _ = inputs
    _, hidden, mean, rstd = output
    ctx.mark_non_differentiable(hidden, mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, hidden, mean, rstd, *parameters)


def _autograd(ctx, dy, *_):
    if dy is None:
        return (None,) * 10
    gradients = _backward(dy, *ctx.saved_tensors, any(ctx.needs_input_grad[1:8]))
    return *map(or_none, gradients), None, None


_swiglu_train.register_autograd(_autograd, setup_context=_setup_context)


def swiglu(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    layer_scale: Tensor | None = None,
    drop: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """x + drop∘layer_scale∘((silu(a)∘b)·W₂ᵀ + b₂), [a | b] = LN(x)·W₁ᵀ + b₁: a gated MLP, residual included.

    Shazeer 2020, GLU Variants Improve Transformer, equation 6, with biases, as DINOv2 has it (Oquab et al. 2023).

    Args:
        x: [B, ..., D], fp32, fp16, bf16, or fp64 (PyTorch only). Any strides.
        norm_weight, norm_bias: [D], the norm's scale and shift.
        fc1_weight: [2F, D], the rows of the gates a, then those of their values b.    fc1_bias: [2F] or None.
        fc2_weight: [D, F].    fc2_bias: [D] or None.
        layer_scale: [D] or None.
        drop: [B] or None, the factor of each image's branch: 0, or 1/keep.
        eps: added to the norm's variance.

    Returns:
        [B, ..., D] in the dtype of x. Where a gradient is wanted, a and b are kept for backward; otherwise nothing is.

    Raises:
        ValueError: for a shape or device that does not fit. TypeError: for a dtype that does not.
    """
    check(x, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, layer_scale, drop)
    if not use_triton("swiglu", x, fc1_weight, refusal=refuse_drop(drop)):
        hidden = F.linear(F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, eps), fc1_weight, fc1_bias)
        gate, value = hidden.chunk(2, dim=-1)
        return residual_branch(F.linear(F.silu(gate) * value, fc2_weight, fc2_bias), x, layer_scale, drop)
    dtype = compute_dtype(x)
    parameters = (norm_weight, norm_bias, cast(fc1_weight, dtype), fc1_bias, cast(fc2_weight, dtype), fc2_bias)
    if needs_grad(x, *parameters, layer_scale):
        return _swiglu_train(x, *parameters, layer_scale, drop, eps)[0]
    return _swiglu(x, *parameters, layer_scale, drop, eps)
