"""LayerNorm, fc1, GELU, fc2, LayerScale, drop path and residual: the second half of a block.

forward    h = LN(x)·W₁ᵀ + b₁     a = act(h)     y = x + drop∘γ∘(a·W₂ᵀ + b₂)
backward   dh = ((drop∘dy∘γ)·W₂)∘act′(h), the rest as in ln_linear for x → h and in linear for a → y
shapes     x, y [M, D]   W₁ [F, D]   b₁ [F]   W₂ [D, F]   b₂, γ [D]   h, a [M, F]   drop [B]
saved      x, h, mean, rstd; a is computed again in the epilogue that makes dh
limit      4·M·D·F operations forward, twice that backward; (5·M·D + 2·M·F + 2·D·F) elements moved forward
"""

import torch
import triton
import triton.language as tl

from . import layer_norm, linear_residual, ln_linear
from .activation import activate, activate_with_grad
from .linear import branch_gradient, finish, weight_grad
from .product import (
    column_pieces,
    count_tiles,
    launch_tiles,
    load_tile,
    load_vector,
    matrix,
    product,
    rounded,
    rows_inner,
    rows_outer,
    store_tile,
    tile_of,
    wait_for_launch_before,
)


@triton.jit(do_not_specialize=["M"])
def _fc1_kernel(
    z_ptr, weight_ptr, bias_ptr, hidden_ptr, activated_ptr,
    M, N, K, stride_weight,
    ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PIECES: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """act(h) of z = LN(x), and h for backward where it is wanted."""
    wait_for_launch_before()
    DTYPE: tl.constexpr = weight_ptr.dtype.element_ty
    WIDTH: tl.constexpr = BLOCK_N // PIECES
    z = matrix(z_ptr, M, K, K, BLOCK_M, BLOCK_K, TMA)
    weight = matrix(weight_ptr, N, K, stride_weight, BLOCK_N, BLOCK_K, TMA)
    activated = matrix(activated_ptr, M, N, N, BLOCK_M, WIDTH, TMA == 1)
    if hidden_ptr is not None:
        hidden = matrix(hidden_ptr, M, N, N, BLOCK_M, WIDTH, TMA == 1)
    for tile in tl.range(tl.program_id(0), count_tiles(M, N, BLOCK_M, BLOCK_N), tl.num_programs(0), flatten=True):
        row, first_col = tile_of(tile, M, N, BLOCK_M, BLOCK_N)
        sums = product(
            rows_outer, z, rows_outer, weight, row, first_col, 0, K, DTYPE, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION
        )  # fmt: skip
        pieces = column_pieces(sums, PIECES)
        for piece in tl.static_range(PIECES):
            col = first_col + piece * WIDTH
            h = pieces[piece]
            if bias_ptr is not None:
                h += load_vector(bias_ptr, col + tl.arange(0, WIDTH), N)[None, :]
            if hidden_ptr is not None:
                store_tile(hidden, h, row, col, DTYPE)
                # What backward will read is h as it was rounded: the activation is that of the same number.
                h = rounded(h, DTYPE)
            store_tile(activated, activate(h, ACTIVATION, DTYPE), row, col, DTYPE)


@triton.jit(do_not_specialize=["M"])
def _hidden_grad_kernel(
    dy_ptr, weight_ptr, hidden_ptr, dhidden_ptr, activated_ptr,
    M, N, K, stride_dy, stride_weight,
    ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PIECES: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dh [M, N], and act(h) once for the gradient of fc2's weight."""
    wait_for_launch_before()
    DTYPE: tl.constexpr = weight_ptr.dtype.element_ty
    WIDTH: tl.constexpr = BLOCK_N // PIECES
    dy = matrix(dy_ptr, M, K, stride_dy, BLOCK_M, BLOCK_K, TMA)
    weight = matrix(weight_ptr, K, N, stride_weight, BLOCK_K, BLOCK_N, TMA)
    hidden = matrix(hidden_ptr, M, N, N, BLOCK_M, WIDTH, TMA == 1)
    dhidden = matrix(dhidden_ptr, M, N, N, BLOCK_M, WIDTH, TMA == 1)
    activated = matrix(activated_ptr, M, N, N, BLOCK_M, WIDTH, TMA == 1)
    for tile in tl.range(tl.program_id(0), count_tiles(M, N, BLOCK_M, BLOCK_N), tl.num_programs(0), flatten=True):
        row, first_col = tile_of(tile, M, N, BLOCK_M, BLOCK_N)
        sums = product(
            rows_outer, dy, rows_inner, weight, row, first_col, 0, K, DTYPE, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION
        )  # fmt: skip
        pieces = column_pieces(sums, PIECES)
        for piece in tl.static_range(PIECES):
            col = first_col + piece * WIDTH
            h = load_tile(hidden, row, col, BLOCK_M, WIDTH).to(tl.float32)
            a, slope = activate_with_grad(h, ACTIVATION, DTYPE)
            store_tile(activated, a, row, col, DTYPE)
            store_tile(dhidden, pieces[piece] * slope, row, col, DTYPE)


def forward(
    x, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, layer_scale, drop, activation, eps,
    tokens_per_image, precision, training,
):  # fmt: skip
    """y [M, D] in the dtype of x; then h [M, F], mean and rstd [M], None unless training."""
    (M, D), width = x.shape, fc1_weight.shape[0]
    z, mean, rstd = layer_norm.forward(x, norm_weight, norm_bias, eps, fc1_weight.dtype, training)
    activated = torch.empty((M, width), dtype=fc1_weight.dtype, device=x.device)
    hidden = torch.empty_like(activated) if training else None
    launch_tiles(
        _fc1_kernel, "mlp_fc1", M, width, fc1_weight.dtype, (z, fc1_weight, activated),
        z_ptr=z, weight_ptr=fc1_weight, bias_ptr=fc1_bias, hidden_ptr=hidden, activated_ptr=activated, K=D,
        stride_weight=fc1_weight.stride(0), ACTIVATION=activation, PRECISION=precision,
    )  # fmt: skip
    del z
    y = linear_residual.forward(activated, fc2_weight, fc2_bias, x, layer_scale, drop, tokens_per_image, precision)
    return y, hidden, mean, rstd


def first_stage(
    dy, x, hidden, mean, rstd, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, layer_scale, drop,
    activation, tokens_per_image, precision, trained, branch=None,
):  # fmt: skip
    """dx, and the first stages of the other gradients, of the LayerNorm, of fc1 and of fc2, None where no parameter is
    trained. `branch`, of `branch_of`, is that of the half before: what dx is to it is written too."""
    (M, D), width = x.shape, fc1_weight.shape[0]
    dropped, scaled = branch_gradient(dy, layer_scale, drop, tokens_per_image, fc2_weight.dtype)
    dhidden, activated = torch.empty_like(hidden), torch.empty_like(hidden)
    launch_tiles(
        _hidden_grad_kernel, "mlp_hidden_grad", M, width, fc1_weight.dtype, (scaled, fc2_weight, hidden),
        dy_ptr=scaled, weight_ptr=fc2_weight, hidden_ptr=hidden, dhidden_ptr=dhidden, activated_ptr=activated, K=D,
        stride_dy=scaled.stride(0), stride_weight=fc2_weight.stride(0), ACTIVATION=activation, PRECISION=precision,
    )  # fmt: skip
    fc2 = weight_grad(dropped, activated, fc2_weight, fc2_bias, layer_scale, precision) if trained else None
    del activated, dropped, scaled
    dx, shares, fc1 = ln_linear.first_stage(
        dhidden, x, mean, rstd, norm_weight, norm_bias, fc1_weight, fc1_bias, precision, trained, dy, branch
    )  # fmt: skip
    return dx, shares, fc1, fc2


def backward(dy, x, hidden, mean, rstd, norm_weight, norm_bias, *parameters_and_settings):
    """dx, dγ and dβ of the LayerNorm, dW₁, db₁, dW₂, db₂ and dγ of the LayerScale; None where absent, and all but dx
    where no parameter is trained. The arguments are those of `first_stage`."""
    dx, shares, fc1, fc2 = first_stage(dy, x, hidden, mean, rstd, norm_weight, norm_bias, *parameters_and_settings)
    (dnorm,) = layer_norm.finish((shares, norm_weight, norm_bias))
    dfc1, dfc2 = finish(fc1, fc2)
    return dx, *dnorm, *dfc1[:2], *dfc2
