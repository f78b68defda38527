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
from .activation import activate, activate_with_grad
from .linear import linear_weight_grad
from .ln_linear import normalised_product
from .product import (
    column_pieces,
    count_tiles,
    launch_tiles,
    load_drop,
    load_tile,
    load_vector,
    matrix,
    product,
    rounded,
    rows_inner,
    scaled_rows_outer,
    store_tile,
    tile_of,
)
from .statistics import load_statistics, part_width, statistics_of
from .tile_table import lookup, rows_class


@triton.jit
def _fc1_kernel(
    x_ptr, statistics_ptr,
    norm,
    weight_ptr, bias_ptr, activated_ptr,
    kept, M, N, K, stride_x, stride_weight, part_width, eps,
    PARTS: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PIECES: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """act(h); norm as in ln_linear's; kept is (h, mean, rstd) for backward, or None."""
    DTYPE: tl.constexpr = weight_ptr.dtype.element_ty
    WIDTH: tl.constexpr = BLOCK_N // PIECES
    norm_weight_ptr, norm_bias_ptr, row_sums_ptr = norm
    x = matrix(x_ptr, M, K, stride_x, BLOCK_M, BLOCK_K, TMA)
    weight = matrix(weight_ptr, N, K, stride_weight, BLOCK_N, BLOCK_K, TMA)
    activated = matrix(activated_ptr, M, N, N, BLOCK_M, WIDTH, TMA)
    if kept is not None:
        hidden = matrix(kept[0], M, N, N, BLOCK_M, WIDTH, TMA)
    for tile in tl.range(tl.program_id(0), count_tiles(M, N, BLOCK_M, BLOCK_N), tl.num_programs(0), flatten=True):
        row, first_col = tile_of(tile, M, N, BLOCK_M, BLOCK_N)
        rows = row + tl.arange(0, BLOCK_M)
        mean, rstd = load_statistics(statistics_ptr, rows, M, K, part_width, eps, PARTS)
        sums = normalised_product(
            x, weight, mean, rstd, norm_weight_ptr, norm_bias_ptr, row_sums_ptr, row, first_col, N, K,
            DTYPE, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
        )  # fmt: skip
        pieces = column_pieces(sums, PIECES)
        for piece in tl.static_range(PIECES):
            col = first_col + piece * WIDTH
            h = pieces[piece]
            if bias_ptr is not None:
                h += load_vector(bias_ptr, col + tl.arange(0, WIDTH), N)[None, :]
            if kept is not None:
                store_tile(hidden, h, row, col, DTYPE)
                # What backward will read is h as it was rounded: the activation is that of the same number.
                h = rounded(h, DTYPE)
            store_tile(activated, activate(h, ACTIVATION, DTYPE), row, col, DTYPE)
        if kept is not None:
            first = (rows < M) & (first_col == 0)
            tl.store(kept[1] + rows, mean, mask=first)
            tl.store(kept[2] + rows, rstd, mask=first)


@triton.jit
def _hidden_grad_kernel(
    dy_ptr, weight_ptr, scale_ptr, drop_ptr, hidden_ptr, folded_ptr, dhidden_ptr, activated_ptr, row_sums_ptr,
    M, N, K, stride_dy, stride_weight, tokens_per_image,
    ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PIECES: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dh [M, N], act(h) once for the gradient of fc2's weight, and the row sums that the LayerNorm's gradient needs:
    Σ dh∘(W₁·γ) and Σ dh∘(h − c) of this piece of columns, [2, parts, M]."""
    DTYPE: tl.constexpr = weight_ptr.dtype.element_ty
    WIDTH: tl.constexpr = BLOCK_N // PIECES
    dy = (matrix(dy_ptr, M, K, stride_dy, BLOCK_M, BLOCK_K, TMA), scale_ptr, K)
    weight = matrix(weight_ptr, K, N, stride_weight, BLOCK_K, BLOCK_N, TMA)
    hidden = matrix(hidden_ptr, M, N, N, BLOCK_M, WIDTH, TMA)
    dhidden = matrix(dhidden_ptr, M, N, N, BLOCK_M, WIDTH, TMA)
    activated = matrix(activated_ptr, M, N, N, BLOCK_M, WIDTH, TMA)
    for tile in tl.range(tl.program_id(0), count_tiles(M, N, BLOCK_M, BLOCK_N), tl.num_programs(0), flatten=True):
        row, first_col = tile_of(tile, M, N, BLOCK_M, BLOCK_N)
        rows = row + tl.arange(0, BLOCK_M)
        sums = product(
            scaled_rows_outer, dy, rows_inner, weight, row, first_col, 0, K, DTYPE, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION
        )  # fmt: skip
        if drop_ptr is not None:
            sums *= load_drop(drop_ptr, rows, tokens_per_image, M)
        pieces = column_pieces(sums, PIECES)
        for piece in tl.static_range(PIECES):
            col = first_col + piece * WIDTH
            cols = col + tl.arange(0, WIDTH)
            h = load_tile(hidden, row, col, BLOCK_M, WIDTH).to(tl.float32)
            a, slope = activate_with_grad(h, ACTIVATION, DTYPE)
            store_tile(activated, a, row, col, DTYPE)
            # The sums are those of dh as it is stored, for that is what the products behind it read.
            dh = rounded(pieces[piece] * slope, DTYPE)
            store_tile(dhidden, dh, row, col, DTYPE)
            place = row_sums_ptr + tl.cast(col // WIDTH, tl.int64) * M + rows
            scaled_weight, shift = load_vector(folded_ptr, cols, N), load_vector(folded_ptr + N, cols, N)
            inside = (rows < M) & (col < N)
            tl.store(place, tl.sum(dh * scaled_weight[None, :], axis=1), mask=inside)
            place += tl.cdiv(N, WIDTH).to(tl.int64) * M
            tl.store(place, tl.sum(dh * (h - shift[None, :]), axis=1), mask=inside)


def forward(
    x, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, layer_scale, drop, activation, eps,
    tokens_per_image, precision, training, statistics=None, row_sums=None,
):  # fmt: skip
    """y [M, D] in the dtype of x; then h [M, F], mean and rstd [M], None unless training.

    `statistics` are those of x where they are at hand; row_sums as in `ln_linear.forward`.
    """
    (M, D), width = x.shape, fc1_weight.shape[0]
    statistics = statistics_of(x) if statistics is None else statistics
    activated = torch.empty((M, width), dtype=fc1_weight.dtype, device=x.device)
    kept = None
    if training:
        mean, rstd = (torch.empty((M,), dtype=torch.float32, device=x.device) for _ in range(2))
        kept = (torch.empty((M, width), dtype=fc1_weight.dtype, device=x.device), mean, rstd)
    launch_tiles(
        _fc1_kernel, "mlp_fc1", M, width, fc1_weight.dtype, (x, fc1_weight, activated),
        x_ptr=x, statistics_ptr=statistics, norm=(norm_weight, norm_bias, row_sums), weight_ptr=fc1_weight,
        bias_ptr=fc1_bias, activated_ptr=activated, kept=kept, K=D, stride_x=x.stride(0),
        stride_weight=fc1_weight.stride(0), part_width=part_width(statistics, D), eps=eps, PARTS=statistics.shape[1],
        ACTIVATION=activation, PRECISION=precision,
    )  # fmt: skip
    y, _ = linear_residual.forward(activated, fc2_weight, fc2_bias, x, layer_scale, drop, tokens_per_image, precision)
    return y, *(kept or (None, None, None))


def backward(
    dy, x, hidden, mean, rstd, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, layer_scale, drop,
    activation, tokens_per_image, precision,
):  # fmt: skip
    """dx, the shares of dγ and dβ that `ln_linear.norm_grads` adds up, dW₁, db₁, dW₂, db₂ and dγ of the LayerScale
    (None where absent)."""
    (M, D), width = x.shape, fc1_weight.shape[0]
    dhidden = torch.empty((M, width), dtype=fc1_weight.dtype, device=x.device)
    activated = torch.empty((M, width), dtype=fc1_weight.dtype, device=x.device)
    tile = lookup("mlp_hidden_grad", x.device, fc1_weight.dtype, rows_class(M))
    parts = -(-width // (tile["BLOCK_N"] // tile["PIECES"]))
    row_sums = torch.empty((2, parts, M), dtype=torch.float32, device=x.device)
    launch_tiles(
        _hidden_grad_kernel, "mlp_hidden_grad", M, width, fc1_weight.dtype, (dy, fc2_weight, hidden),
        dy_ptr=dy, weight_ptr=fc2_weight, scale_ptr=layer_scale, drop_ptr=drop, hidden_ptr=hidden,
        folded_ptr=ln_linear.fold(norm_weight, norm_bias, fc1_weight, fc1_bias), dhidden_ptr=dhidden,
        activated_ptr=activated, row_sums_ptr=row_sums, K=D, stride_dy=dy.stride(0), stride_weight=fc2_weight.stride(0),
        tokens_per_image=tokens_per_image, ACTIVATION=activation, PRECISION=precision,
    )  # fmt: skip
    fc2_grads = linear_weight_grad(dy, activated, fc2_weight, fc2_bias, layer_scale, drop, tokens_per_image, precision)
    dx = ln_linear.summed_input_grad(dhidden, x, mean, rstd, norm_weight, fc1_weight, row_sums, dy, precision)
    dfc1_weight, dfc1_bias, dnorm = ln_linear.weight_grads(
        dhidden, x, mean, rstd, norm_weight, norm_bias, fc1_weight, fc1_bias, precision
    )
    return dx, dnorm, dfc1_weight, dfc1_bias, *fc2_grads
