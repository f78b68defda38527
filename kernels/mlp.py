"""LayerNorm, fc1, GELU, fc2, LayerScale, drop path and residual: the second half of a block.

forward    h = LN(x)·W₁ᵀ + b₁     a = act(h)     y = x + drop∘γ∘(a·W₂ᵀ + b₂)
backward   dh = drop∘((dy∘γ)·W₂)∘act′(h), the rest as in ln_linear for x → h and in linear_residual for a → y
shapes     x, y [M, D]   W₁ [F, D]   b₁ [F]   W₂ [D, F]   b₂, γ [D]   h, a [M, F]   drop [B]
saved      x, h, mean, rstd; a is computed again in the epilogue that makes dh
limit      4·M·D·F operations forward, twice that backward; (4·M·D + 2·M·F + 2·D·F) elements moved forward
"""

import torch
import triton
import triton.language as tl

from . import linear_residual, ln_linear
from .activation import activate, activate_grad
from .linear import input_grad_tile, linear_weight_grad
from .ln_linear import normalised_product_tile
from .product import matrix, store, tile_offsets, tiles
from .tile_table import lookup


@triton.jit
def _fc1_kernel(
    x_ptr,
    mean_ptr,
    rstd_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    weight_ptr,
    bias_ptr,
    hidden_ptr,
    activated_ptr,
    M,
    N,
    K,
    stride_x,
    stride_weight,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """act(h), and h itself where training keeps it."""
    rows, cols = tile_offsets(M, N, BLOCK_M, BLOCK_N)
    h = normalised_product_tile(
        x_ptr, mean_ptr, rstd_ptr, norm_weight_ptr, norm_bias_ptr, weight_ptr, bias_ptr, M, N, K,
        stride_x, stride_weight, rows, cols, BLOCK_K, PRECISION,
    )  # fmt: skip
    if hidden_ptr is not None:
        store(hidden_ptr, N, h, rows, cols, M, N)
        # What backward will read is h as it was rounded: the activation is that of the same number.
        h = h.to(hidden_ptr.dtype.element_ty).to(tl.float32)
    store(activated_ptr, N, activate(h, ACTIVATION), rows, cols, M, N)


@triton.jit
def _hidden_grad_kernel(
    dy_ptr,
    weight_ptr,
    scale_ptr,
    drop_ptr,
    hidden_ptr,
    dhidden_ptr,
    activated_ptr,
    M,
    N,
    K,
    stride_dy,
    stride_weight,
    tokens_per_image,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dh, and act(h) once for the gradient of fc2's weight."""
    rows, cols = tile_offsets(M, K, BLOCK_M, BLOCK_N)
    da = input_grad_tile(
        dy_ptr, weight_ptr, scale_ptr, drop_ptr, M, N, K, stride_dy, stride_weight, tokens_per_image,
        rows, cols, BLOCK_K, PRECISION,
    )  # fmt: skip
    h = matrix((hidden_ptr, K, 1, M, K, None, 1), rows, cols).to(tl.float32)
    store(dhidden_ptr, K, da * activate_grad(h, ACTIVATION), rows, cols, M, K)
    store(activated_ptr, K, activate(h, ACTIVATION), rows, cols, M, K)


def forward(
    x,
    norm_weight,
    norm_bias,
    fc1_weight,
    fc1_bias,
    fc2_weight,
    fc2_bias,
    layer_scale,
    drop,
    activation,
    eps,
    tokens_per_image,
    precision,
    training,
):
    """y [M, D] in the dtype of x; h [M, F], mean and rstd [M] too, h None unless training."""
    (M, D), width = x.shape, fc1_weight.shape[0]
    mean, rstd = ln_linear.statistics(x, eps)
    hidden = torch.empty((M, width), dtype=fc1_weight.dtype, device=x.device) if training else None
    activated = torch.empty((M, width), dtype=fc1_weight.dtype, device=x.device)
    tile = lookup("mlp_fc1", x.device, fc1_weight.dtype)
    _fc1_kernel[(tiles(M, width, tile),)](
        x_ptr=x,
        mean_ptr=mean,
        rstd_ptr=rstd,
        norm_weight_ptr=norm_weight,
        norm_bias_ptr=norm_bias,
        weight_ptr=fc1_weight,
        bias_ptr=fc1_bias,
        hidden_ptr=hidden,
        activated_ptr=activated,
        M=M,
        N=width,
        K=D,
        stride_x=x.stride(0),
        stride_weight=fc1_weight.stride(0),
        ACTIVATION=activation,
        PRECISION=precision,
        **tile,
    )
    y = linear_residual.forward(activated, fc2_weight, fc2_bias, x, layer_scale, drop, tokens_per_image, precision)
    return y, hidden, mean, rstd


def backward(
    dy,
    x,
    hidden,
    mean,
    rstd,
    norm_weight,
    norm_bias,
    fc1_weight,
    fc1_bias,
    fc2_weight,
    fc2_bias,
    layer_scale,
    drop,
    activation,
    tokens_per_image,
    precision,
):
    """dx, then the gradients of the norm's and fc1's parameters, of fc2's and of the LayerScale (None where absent)."""
    (M, D), width = x.shape, fc1_weight.shape[0]
    dhidden = torch.empty((M, width), dtype=fc1_weight.dtype, device=x.device)
    activated = torch.empty((M, width), dtype=fc1_weight.dtype, device=x.device)
    tile = lookup("mlp_hidden_grad", x.device, fc1_weight.dtype)
    _hidden_grad_kernel[(tiles(M, width, tile),)](
        dy_ptr=dy,
        weight_ptr=fc2_weight,
        scale_ptr=layer_scale,
        drop_ptr=drop,
        hidden_ptr=hidden,
        dhidden_ptr=dhidden,
        activated_ptr=activated,
        M=M,
        N=D,
        K=width,
        stride_dy=dy.stride(0),
        stride_weight=fc2_weight.stride(0),
        tokens_per_image=tokens_per_image,
        ACTIVATION=activation,
        PRECISION=precision,
        **tile,
    )
    fc2_grads = linear_weight_grad(dy, activated, fc2_weight, fc2_bias, layer_scale, drop, tokens_per_image, precision)
    fc1_grads = ln_linear.backward(
        dhidden, x, mean, rstd, norm_weight, norm_bias, fc1_weight, fc1_bias, precision, residual_grad=dy
    )
    return *fc1_grads, *fc2_grads
