"""LayerNorm, a gated MLP, LayerScale, drop path and residual: the second half of a block of DINOv2's giants.

forward    [a | b] = LN(x)·W₁ᵀ + b₁     h = silu(a)∘b     y = x + drop∘γ∘(h·W₂ᵀ + b₂)
backward   dh = (drop∘dy∘γ)·W₂     da = dh∘b∘silu′(a)     db = dh∘silu(a), the rest as in ln_linear for x → [a | b] and
           in linear for h → y
shapes     x, y [M, D]   W₁ [2F, D]   b₁ [2F]   W₂ [D, F]   b₂, γ [D]   a, b, h [M, F]   drop [B]
saved      x, [a | b], mean, rstd; h is computed again in the epilogue that makes da and db
limit      6·M·D·F operations forward, twice that backward; (5·M·D + 2·M·F + 3·D·F) elements moved forward, and 2·M·F
           more in training

A program makes the same tile of a and of b, two products that share the tile of z, so that the gate meets its value in
registers; the tile is half as wide as that of a plain fc1 for it. What training keeps is 4·F bytes a token in half
precision, written and read once: for DINOv2's giant (D = 1536, F = 4096) 4 ns each way at an H200's 4.3 TB/s. To
compute it again from z would be 4·D·F operations a token, 32 ns at 790 TFLOP/s. Were h kept too, 2·F bytes more a token
would be held from forward to backward, to save the epilogue one write of it.
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
    product_pair,
    rounded,
    rows_inner,
    rows_outer,
    store_tile,
    tile_of,
    wait_for_launch_before,
)


@triton.jit(do_not_specialize=["M"])
def _gated_fc1_kernel(
    z_ptr, gate_weight_ptr, value_weight_ptr, bias_ptr, gate_ptr, value_ptr, h_ptr,
    M, N, K, stride_weight,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PIECES: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """h = silu(a)∘b of z = LN(x), and a and b for backward where they are wanted, side by side in rows of 2N."""
    wait_for_launch_before()
    DTYPE: tl.constexpr = gate_weight_ptr.dtype.element_ty
    WIDTH: tl.constexpr = BLOCK_N // PIECES
    z = matrix(z_ptr, M, K, K, BLOCK_M, BLOCK_K, TMA)
    gate_weight = matrix(gate_weight_ptr, N, K, stride_weight, BLOCK_N, BLOCK_K, TMA)
    value_weight = matrix(value_weight_ptr, N, K, stride_weight, BLOCK_N, BLOCK_K, TMA)
    h = matrix(h_ptr, M, N, N, BLOCK_M, WIDTH, TMA == 1)
    if gate_ptr is not None:
        gate = matrix(gate_ptr, M, N, 2 * N, BLOCK_M, WIDTH, TMA == 1)
        value = matrix(value_ptr, M, N, 2 * N, BLOCK_M, WIDTH, TMA == 1)
    for tile in tl.range(tl.program_id(0), count_tiles(M, N, BLOCK_M, BLOCK_N), tl.num_programs(0), flatten=True):
        row, first_col = tile_of(tile, M, N, BLOCK_M, BLOCK_N)
        gates, values = product_pair(
            rows_outer, z, rows_outer, gate_weight, value_weight, row, first_col, 0, K, DTYPE, BLOCK_M, BLOCK_N,
            BLOCK_K, PRECISION,
        )  # fmt: skip
        gates, values = column_pieces(gates, PIECES), column_pieces(values, PIECES)
        for piece in tl.static_range(PIECES):
            col = first_col + piece * WIDTH
            a, b = gates[piece], values[piece]
            if bias_ptr is not None:
                cols = col + tl.arange(0, WIDTH)
                a += load_vector(bias_ptr, cols, N)[None, :]
                b += load_vector(bias_ptr + N, cols, N)[None, :]
            if gate_ptr is not None:
                store_tile(gate, a, row, col, DTYPE)
                store_tile(value, b, row, col, DTYPE)
                # What backward will read is a and b as they were rounded: h is that of the same numbers.
                a, b = rounded(a, DTYPE), rounded(b, DTYPE)
            store_tile(h, activate(a, "silu", DTYPE) * b, row, col, DTYPE)


@triton.jit(do_not_specialize=["M"])
def _hidden_grad_kernel(
    dy_ptr, weight_ptr, gate_ptr, value_ptr, dgate_ptr, dvalue_ptr, h_ptr,
    M, N, K, stride_dy, stride_weight,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PIECES: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """da and db side by side in rows of 2N, as a and b lie, and h [M, N] once for the gradient of fc2's weight."""
    wait_for_launch_before()
    DTYPE: tl.constexpr = weight_ptr.dtype.element_ty
    WIDTH: tl.constexpr = BLOCK_N // PIECES
    dy = matrix(dy_ptr, M, K, stride_dy, BLOCK_M, BLOCK_K, TMA)
    weight = matrix(weight_ptr, K, N, stride_weight, BLOCK_K, BLOCK_N, TMA)
    gate = matrix(gate_ptr, M, N, 2 * N, BLOCK_M, WIDTH, TMA == 1)
    value = matrix(value_ptr, M, N, 2 * N, BLOCK_M, WIDTH, TMA == 1)
    dgate = matrix(dgate_ptr, M, N, 2 * N, BLOCK_M, WIDTH, TMA == 1)
    dvalue = matrix(dvalue_ptr, M, N, 2 * N, BLOCK_M, WIDTH, TMA == 1)
    h = matrix(h_ptr, M, N, N, BLOCK_M, WIDTH, TMA == 1)
    for tile in tl.range(tl.program_id(0), count_tiles(M, N, BLOCK_M, BLOCK_N), tl.num_programs(0), flatten=True):
        row, first_col = tile_of(tile, M, N, BLOCK_M, BLOCK_N)
        sums = product(
            rows_outer, dy, rows_inner, weight, row, first_col, 0, K, DTYPE, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION
        )  # fmt: skip
        pieces = column_pieces(sums, PIECES)
        for piece in tl.static_range(PIECES):
            col = first_col + piece * WIDTH
            a = load_tile(gate, row, col, BLOCK_M, WIDTH).to(tl.float32)
            b = load_tile(value, row, col, BLOCK_M, WIDTH).to(tl.float32)
            activated, slope = activate_with_grad(a, "silu", DTYPE)
            store_tile(h, activated * b, row, col, DTYPE)
            store_tile(dvalue, pieces[piece] * activated, row, col, DTYPE)
            store_tile(dgate, pieces[piece] * b * slope, row, col, DTYPE)


def forward(
    x, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, layer_scale, drop, eps, tokens_per_image,
    precision, training,
):  # fmt: skip
    """y [M, D] in the dtype of x; then [a | b] [M, 2F], mean and rstd [M], None unless training."""
    (M, D), width = x.shape, fc2_weight.shape[1]
    z, mean, rstd = layer_norm.forward(x, norm_weight, norm_bias, eps, fc1_weight.dtype, training)
    h = torch.empty((M, width), dtype=fc1_weight.dtype, device=x.device)
    hidden = torch.empty((M, 2 * width), dtype=h.dtype, device=x.device) if training else None
    gate, value = hidden.split(width, 1) if training else (None, None)
    gate_weight, value_weight = fc1_weight.split(width)
    matrices = (z, gate_weight, value_weight, h, *((gate, value) if training else ()))
    launch_tiles(
        _gated_fc1_kernel, "swiglu_fc1", M, width, h.dtype, matrices,
        z_ptr=z, gate_weight_ptr=gate_weight, value_weight_ptr=value_weight, bias_ptr=fc1_bias, gate_ptr=gate,
        value_ptr=value, h_ptr=h, K=D, stride_weight=fc1_weight.stride(0), PRECISION=precision,
    )  # fmt: skip
    del z, matrices
    y = linear_residual.forward(h, fc2_weight, fc2_bias, x, layer_scale, drop, tokens_per_image, precision)
    return y, hidden, mean, rstd


def backward(
    dy, x, hidden, mean, rstd, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, layer_scale, drop,
    tokens_per_image, precision, trained,
):  # fmt: skip
    """dx, dγ and dβ of the LayerNorm, dW₁, db₁, dW₂, db₂ and dγ of the LayerScale; None where absent, and all but dx
    where no parameter is trained."""
    (M, D), width = x.shape, fc2_weight.shape[1]
    dropped, scaled = branch_gradient(dy, layer_scale, drop, tokens_per_image, fc2_weight.dtype)
    dhidden, h = torch.empty_like(hidden), torch.empty((M, width), dtype=hidden.dtype, device=x.device)
    (gate, value), (dgate, dvalue) = hidden.split(width, 1), dhidden.split(width, 1)
    launch_tiles(
        _hidden_grad_kernel, "swiglu_hidden_grad", M, width, fc1_weight.dtype, (scaled, fc2_weight, gate, value, h),
        dy_ptr=scaled, weight_ptr=fc2_weight, gate_ptr=gate, value_ptr=value, dgate_ptr=dgate, dvalue_ptr=dvalue,
        h_ptr=h, K=D, stride_dy=scaled.stride(0), stride_weight=fc2_weight.stride(0), PRECISION=precision,
    )  # fmt: skip
    fc2 = weight_grad(dropped, h, fc2_weight, fc2_bias, layer_scale, precision) if trained else None
    del h, dropped, scaled
    dx, shares, fc1 = ln_linear.first_stage(
        dhidden, x, mean, rstd, norm_weight, norm_bias, fc1_weight, fc1_bias, precision, trained, dy
    )  # fmt: skip
    (dnorm,) = layer_norm.finish((shares, norm_weight, norm_bias))
    dfc1, dfc2 = finish(fc1, fc2)
    return dx, *dnorm, *dfc1[:2], *dfc2
