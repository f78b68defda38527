"""mlp: LayerNorm, fc1, GELU, fc2, LayerScale, drop path and residual."""

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
    one_of,
    or_empty,
    or_none,
    ready,
    shaped,
    use_triton,
)
from vit_fast.ops.linear_residual import refuse_drop, residual_branch

# The same formulas as kernels/activation.py, by the names that both know.
ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}

# The schema of an MLP with a gate has these too.
PARAMETERS = (
    "Tensor norm_weight, Tensor norm_bias, Tensor fc1_weight, Tensor? fc1_bias, "
    "Tensor fc2_weight, Tensor? fc2_bias, Tensor? layer_scale, Tensor? drop"
)
KEPT = "Tensor hidden, Tensor mean, Tensor rstd"  # by training


def check(x, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, layer_scale, drop, activation) -> None:
    one_of("activation", activation, ACTIVATIONS)
    hidden, _ = check_linear(x, fc1_weight, fc1_bias, "fc1_")
    check_half(x, hidden, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, layer_scale, drop)


def check_half(
    x, hidden: int, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, layer_scale, drop
) -> None:
    """What holds of an MLP with a gate too; fc2 reads `hidden` numbers."""
    width = x.shape[-1]
    for name, vector in (("norm_weight", norm_weight), ("norm_bias", norm_bias), ("fc2_bias", fc2_bias)):
        check_shape(name, vector, (width,))
    check_shape("fc2_weight", fc2_weight, (width, hidden))
    check_shape("layer_scale", layer_scale, (width,))
    check_shape("drop", drop, (x.shape[0],))
    check_operands(
        x,
        norm_weight=norm_weight,
        norm_bias=norm_bias,
        fc1_weight=fc1_weight,
        fc1_bias=fc1_bias,
        fc2_weight=fc2_weight,
        fc2_bias=fc2_bias,
        layer_scale=layer_scale,
    )
    check_device(x, drop=drop)


def _forward(training: bool, x: Tensor, *operands) -> tuple:
    """The kernels on the operands of the op: y, then what training keeps (elsewhere the hidden layer is None)."""
    from vit_fast.kernels import mlp as kernel

    *parameters, activation, eps = operands
    with on_device_of(x):
        y, *kept = kernel.forward(
            as_rows(x),
            *map(ready, parameters),
            activation,
            eps,
            x.shape[1:-1].numel(),
            float32_precision(parameters[2].dtype),
            training,
        )
    return shaped(y, x.shape), *kept


@torch.library.custom_op(
    "vit_fast::mlp", mutates_args=(), schema=f"(Tensor x, {PARAMETERS}, str activation, float eps) -> Tensor"
)
def _mlp(x, *operands):
    return _forward(False, x, *operands)[0]


@_mlp.register_fake
def _(x, *_):
    return x.new_empty(x.shape)


@torch.library.custom_op(
    "vit_fast::mlp_train",
    mutates_args=(),
    schema=f"(Tensor x, {PARAMETERS}, str activation, float eps) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _mlp_train(x, *operands):
    return _forward(True, x, *operands)


@_mlp_train.register_fake
def fake_train(x, norm_weight, norm_bias, fc1_weight, *_):
    """What training returns, of an MLP with a gate too."""
    rows = x.numel() // x.shape[-1]
    hidden = x.new_empty(rows, fc1_weight.shape[0], dtype=fc1_weight.dtype)
    return x.new_empty(x.shape), hidden, *(x.new_empty(rows, dtype=torch.float32) for _ in range(2))


@torch.library.custom_op(
    "vit_fast::mlp_backward",
    mutates_args=(),
    schema=f"(Tensor dy, Tensor x, {KEPT}, {PARAMETERS}, bool trained, str activation) -> "
    f"({', '.join(['Tensor'] * 8)})",
)
def _backward(dy, x, hidden, mean, rstd, *operands):
    from vit_fast.kernels import mlp as kernel

    *parameters, trained, activation = operands
    with on_device_of(x):
        dx, *gradients = kernel.backward(
            as_rows(dy),
            as_rows(x),
            hidden,
            mean,
            rstd,
            *map(ready, parameters),
            activation,
            x.shape[1:-1].numel(),
            float32_precision(parameters[2].dtype),
            trained,
        )
    return dx.view(x.shape), *(or_empty(gradient, dy) for gradient in gradients)


@_backward.register_fake
def fake_backward(dy, x, hidden, mean, rstd, *operands):
    """The gradients of x and of all parameters but the draw of the drop path, of an MLP with a gate too."""
    return likes(dy, x, operands[:7], operands[8])


def _setup_context(ctx, inputs, output):
    x, *parameters, ctx.activation, _ = inputs
    _, hidden, mean, rstd = output
    ctx.mark_non_differentiable(hidden, mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, hidden, mean, rstd, *parameters)


def _autograd(ctx, dy, *_):
    if dy is None:
        return (None,) * 11
    gradients = _backward(dy, *ctx.saved_tensors, any(ctx.needs_input_grad[1:8]), ctx.activation)
    return *map(or_none, gradients), None, None, None


_mlp_train.register_autograd(_autograd, setup_context=_setup_context)


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
    """x + drop∘layer_scale∘(act(LN(x)·W₁ᵀ + b₁)·W₂ᵀ + b₂): the second half of a block, residual included.

    Dosovitskiy et al. 2021, equation 3; GELU of Hendrycks and Gimpel 2016.

    Args:
        x: [B, ..., D], fp32, fp16, bf16, or fp64 (PyTorch only). Any strides.
        norm_weight, norm_bias: [D], the norm's scale and shift.
        fc1_weight: [F, D].    fc1_bias: [F] or None.
        fc2_weight: [D, F].    fc2_bias: [D] or None.
        layer_scale: [D] or None.
        drop: [B] or None, the factor of each image's branch: 0, or 1/keep.
        activation: "gelu" (exact, erf), "gelu_tanh" or "quick_gelu".
        eps: added to the norm's variance.

    Returns:
        [B, ..., D] in the dtype of x. Where a gradient is wanted, fc1's output before its activation is kept for
        backward; otherwise nothing is.

    Raises:
        ValueError: for a shape, device or activation that does not fit. TypeError: for a dtype that does not.
    """
    check(x, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, layer_scale, drop, activation)
    operands = (x, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, layer_scale)
    work = operands, fc2_weight.shape, x.shape[:-1].numel()
    if not use_triton("mlp", x, fc1_weight, refusal=refuse_drop(drop)) or measured_faster("mlp", *work):
        # Without a name for it the hidden layer's memory is free again behind the activation.
        branch = F.linear(F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, eps), fc1_weight, fc1_bias)
        branch = ACTIVATIONS[activation](branch)
        branch = F.linear(branch, fc2_weight, fc2_bias)
        return residual_branch(branch, x, layer_scale, drop)
    dtype = compute_dtype(x)
    parameters = (norm_weight, norm_bias, cast(fc1_weight, dtype), fc1_bias, cast(fc2_weight, dtype), fc2_bias)
    if needs_grad(x, *parameters, layer_scale):
        return _mlp_train(x, *parameters, layer_scale, drop, activation, eps)[0]
    return _mlp(x, *parameters, layer_scale, drop, activation, eps)
