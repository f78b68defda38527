"""block: both halves of a Transformer block in one op."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vit_fast.ops.attention import attention_qkv, measured_form, refusal
from vit_fast.ops.backend import (
    as_rows,
    cast,
    check_device,
    check_linear,
    check_operands,
    check_rank,
    check_shape,
    compute_dtype,
    float32_precision,
    likes,
    needs_grad,
    on_device_of,
    one_of,
    or_empty,
    or_none,
    ready,
    shaped,
    use_triton,
)
from vit_fast.ops.linear_residual import linear_residual, refuse_drop
from vit_fast.ops.ln_linear import ln_linear
from vit_fast.ops.mlp import ACTIVATIONS, mlp

PARAMETERS = (
    "Tensor norm1_weight, Tensor norm1_bias, Tensor qkv_weight, Tensor? qkv_bias, "
    "Tensor proj_weight, Tensor? proj_bias, Tensor? layer_scale1, Tensor? drop1, "
    "Tensor norm2_weight, Tensor norm2_bias, Tensor fc1_weight, Tensor? fc1_bias, "
    "Tensor fc2_weight, Tensor? fc2_bias, Tensor? layer_scale2, Tensor? drop2"
)
AS_WIDE_AS_A_TOKEN = (
    *("norm1_weight", "norm1_bias", "proj_bias", "layer_scale1"),
    *("norm2_weight", "norm2_bias", "fc2_bias", "layer_scale2"),
)
SETTINGS = "int num_heads, str activation, float eps1, float eps2"
KEPT = 9  # what training keeps: qkv, o, lse, the residual stream between the halves, h, two means and two rstds


def _grouped(parameters: Sequence) -> list[tuple]:
    """The 16 parameters in the order of the schema as the kernels take them: in pairs, each of one layer."""
    taken = [ready(parameter) for parameter in parameters]
    return list(zip(taken[::2], taken[1::2]))


def _forward(training: bool, x: Tensor, parameters: tuple, settings: tuple):
    from vit_fast.kernels import block as kernel

    with on_device_of(x):
        y, kept = kernel.forward(
            as_rows(x),
            *_grouped(parameters),
            *settings,
            x.shape[1],
            float32_precision(parameters[2].dtype),
            training,
        )
    return shaped(y, x.shape), kept


@torch.library.custom_op(
    "vit_fast::block",
    mutates_args=(),
    schema=f"(Tensor x, {PARAMETERS}, {SETTINGS}) -> Tensor",
)
def _block(x, *parameters_and_settings):
    return _forward(False, x, parameters_and_settings[:16], parameters_and_settings[16:])[0]


@_block.register_fake
def _(x, *_):
    return x.new_empty(x.shape)


@torch.library.custom_op(
    "vit_fast::block_train",
    mutates_args=(),
    schema=f"(Tensor x, {PARAMETERS}, {SETTINGS}) -> ({', '.join(['Tensor'] * (1 + KEPT))})",
)
def _block_train(x, *parameters_and_settings):
    y, kept = _forward(True, x, parameters_and_settings[:16], parameters_and_settings[16:])
    return y, *kept


@_block_train.register_fake
def _(x, *parameters_and_settings):
    qkv_weight, fc1_weight, num_heads = (parameters_and_settings[index] for index in (2, 10, 16))
    batch, tokens, width = x.shape
    rows, dtype = batch * tokens, qkv_weight.dtype
    lse = x.new_empty(batch, num_heads, tokens, dtype=torch.float64 if dtype == torch.float32 else torch.float32)
    return (
        x.new_empty(x.shape),
        x.new_empty(rows, 3 * width, dtype=dtype),
        x.new_empty(rows, width, dtype=dtype),
        lse,
        x.new_empty(rows, width),
        x.new_empty(rows, fc1_weight.shape[0], dtype=dtype),
        *(x.new_empty(rows, dtype=torch.float32) for _ in range(4)),
    )


@torch.library.custom_op(
    "vit_fast::block_backward",
    mutates_args=(),
    # No list of tensors: PyTorch has no rule for one where gradients come in batches.
    schema=f"(Tensor dy, Tensor x, {', '.join(f'Tensor kept{index}' for index in range(KEPT))}, {PARAMETERS}, "
    f"int num_heads, str activation, bool trained) -> ({', '.join(['Tensor'] * 15)})",
)
def _backward(dy, x, *kept_and_parameters):
    from vit_fast.kernels import block as kernel

    kept, (*parameters, num_heads, activation, trained) = kept_and_parameters[:KEPT], kept_and_parameters[KEPT:]
    with on_device_of(x):
        dx, *gradients = kernel.backward(
            as_rows(dy),
            as_rows(x),
            kept,
            *_grouped(parameters),
            num_heads,
            activation,
            x.shape[1],
            float32_precision(parameters[2].dtype),
            trained,
        )
    return dx.view(x.shape), *(or_empty(gradient, dy) for gradient in gradients)


def _differentiable(parameters: tuple) -> list:
    """The parameters without the two draws of the drop path."""
    return [*parameters[:7], *parameters[8:15]]


@_backward.register_fake
def _(dy, x, *kept_and_parameters):
    return likes(dy, x, _differentiable(kept_and_parameters[KEPT:]), kept_and_parameters[-1])


def _setup_context(ctx, inputs, output):
    x, *parameters, ctx.num_heads, ctx.activation, _, _ = inputs
    _, *kept = output
    ctx.mark_non_differentiable(*kept)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, *kept, *parameters)


def _autograd(ctx, dy, *_):
    if dy is None:
        return (None,) * 21
    gradients = _backward(dy, *ctx.saved_tensors, ctx.num_heads, ctx.activation, any(ctx.needs_input_grad[1:17]))
    gradients = [or_none(gradient) for gradient in gradients]
    return *gradients[:8], None, *gradients[8:], None, None, None, None, None


_block_train.register_autograd(_autograd, setup_context=_setup_context)


def check(x, parameters: dict, num_heads: int, activation: str) -> None:
    check_rank("x", x, "B T D")
    width = x.shape[-1]
    if num_heads < 1 or width % num_heads:
        raise ValueError(f"num_heads: got {num_heads}, takes a divisor of the width, {width}")
    one_of("activation", activation, ACTIVATIONS)
    features, _ = check_linear(x, parameters["qkv_weight"], parameters["qkv_bias"], "qkv_")
    if features != 3 * width:
        raise ValueError(f"qkv_weight: got shape {list(parameters['qkv_weight'].shape)}, takes [{3 * width}, {width}]")
    hidden, _ = check_linear(x, parameters["fc1_weight"], parameters["fc1_bias"], "fc1_")
    check_shape("proj_weight", parameters["proj_weight"], (width, width))
    check_shape("fc2_weight", parameters["fc2_weight"], (width, hidden))
    for name in AS_WIDE_AS_A_TOKEN:
        check_shape(name, parameters[name], (width,))
    operands = dict(parameters)
    drops = {name: operands.pop(name) for name in ("drop1", "drop2")}
    for name, drop in drops.items():
        check_shape(name, drop, (x.shape[0],))
    check_operands(x, **operands)
    check_device(x, **drops)


def _better_apart(x: Tensor, parameters: dict, num_heads: int) -> bool:
    """Whether inference shall run the ops one by one, for PyTorch was measured to be faster in attention.

    In inference the ops launch what the block's op launches; in training more, and what that costs was not measured.
    """
    batch, tokens, width = x.shape
    work = (x,), (tokens, tokens, width // num_heads), batch * num_heads
    return bool(measured_form(*work)) and not needs_grad(x, *parameters.values())


def block(
    x: Tensor,
    norm1_weight: Tensor,
    norm1_bias: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    layer_scale1: Tensor | None,
    drop1: Tensor | None,
    norm2_weight: Tensor,
    norm2_bias: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    layer_scale2: Tensor | None,
    drop2: Tensor | None,
    num_heads: int,
    activation: str = "gelu",
    eps1: float = 1e-6,
    eps2: float = 1e-6,
) -> Tensor:
    """m = x + drop1∘layer_scale1∘(attention(LN(x)·Wqkvᵀ + bqkv)·Wprojᵀ + bproj), then `mlp` of m: a block.

    Dosovitskiy et al. 2021, equations 2 and 3.

    Args:
        x: [B, T, D], fp32, fp16, bf16, or fp64 (PyTorch only). Any strides.
        norm1_weight, norm1_bias, norm2_weight, norm2_bias: [D].
        qkv_weight: [3·D, D].    qkv_bias: [3·D] or None.
        proj_weight: [D, D].    proj_bias: [D] or None.
        layer_scale1, layer_scale2: [D] or None.
        drop1, drop2: [B] or None, the factor of each image's branch: 0, or 1/keep.
        fc1_weight: [F, D].    fc1_bias: [F] or None.
        fc2_weight: [D, F].    fc2_bias: [D] or None.
        num_heads: a divisor of D; the scores are multiplied by 1/√(D/num_heads).
        activation: "gelu" (exact, erf), "gelu_tanh" or "quick_gelu".
        eps1, eps2: added to the norms' variances.

    It is `ln_linear`, `attention_qkv`, `linear_residual` and `mlp` in turn; where no kernel takes one of them, or in
    inference PyTorch was measured to be faster in attention, that is what runs. As one op it launches fewer kernels,
    and the gradients of its branches are added where they are made.

    Returns:
        [B, T, D] in the dtype of x.

    Raises:
        ValueError: for a shape, device or activation that does not fit. TypeError: for a dtype that does not.
    """
    parameters: dict[str, Any] = {
        "norm1_weight": norm1_weight,
        "norm1_bias": norm1_bias,
        "qkv_weight": qkv_weight,
        "qkv_bias": qkv_bias,
        "proj_weight": proj_weight,
        "proj_bias": proj_bias,
        "layer_scale1": layer_scale1,
        "drop1": drop1,
        "norm2_weight": norm2_weight,
        "norm2_bias": norm2_bias,
        "fc1_weight": fc1_weight,
        "fc1_bias": fc1_bias,
        "fc2_weight": fc2_weight,
        "fc2_bias": fc2_bias,
        "layer_scale2": layer_scale2,
        "drop2": drop2,
    }
    check(x, parameters, num_heads, activation)
    head_width = x.shape[-1] // num_heads
    alone = refusal(head_width, head_width**-0.5) or refuse_drop(drop1) or refuse_drop(drop2)
    if alone or not use_triton("block", x, fc1_weight) or _better_apart(x, parameters, num_heads):
        # No name for qkv and for the heads' results: memory still in a cache is taken again at once.
        x = linear_residual(
            attention_qkv(
                ln_linear(x, norm1_weight, norm1_bias, qkv_weight, qkv_bias, eps1).view(
                    *x.shape[:-1], 3, num_heads, head_width
                )
            ),
            *(proj_weight, proj_bias, x, layer_scale1, drop1),
        )
        half = (norm2_weight, norm2_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, layer_scale2, drop2)
        return mlp(x, *half, activation, eps2)
    dtype = compute_dtype(x)
    for name in ("qkv_weight", "proj_weight", "fc1_weight", "fc2_weight"):
        parameters[name] = cast(parameters[name], dtype)
    settings = (num_heads, activation, eps1, eps2)
    if needs_grad(x, *parameters.values()):
        return _block_train(x, *parameters.values(), *settings)[0]
    return _block(x, *parameters.values(), *settings)
