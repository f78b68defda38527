"""LayerNorm and the linear map behind it: a pass over x for z, and a product.

forward    z = LN(x)     y = z·Wᵀ + b
folded     y = rstd·(x·Vᵀ) − rstd·mean·u + c,  V = W∘γ as rounded,  u = Σₖ V,  c = W·β + b
backward   dz = dy·W     dW = dyᵀ·z     db = Σ dy, and of LN as in kernels/layer_norm.py
shapes     x, z [M, K]   γ, β [K]   W, V [N, K]   b, u, c [N]   y [M, N]   mean, rstd [M]
saved      x, mean, rstd in fp32; z is written again by the pass through LN's gradient: cheaper than 2·M·K bytes
limit      2·M·N·K operations forward, twice that backward; (3·M·K + N·K + M·N) elements moved forward

The folded form, for frozen weights in half precision, multiplies x as it is, so that no z is written; what it subtracts
afterwards has cancelled where |mean|·rstd is large, so a tile with such a row takes the exact form, x̂·Vᵀ + c.
"""

import torch
import triton
import triton.language as tl

from . import layer_norm
from .linear import finish, input_grad, weight_grad
from .product import (
    column_pieces,
    count_tiles,
    launch_tiles,
    load_tile,
    load_vector,
    matrix,
    product,
    rows_outer,
    store_tile,
    tile_of,
)
from .statistics import load_statistics, part_width, statistics_of

# |mean|·rstd up to which the folded form is as exact as the unfused one in half precision: it was found to be so up to
# 100, and is a multiple of it off at 10,000.
FOLD_LIMIT = tl.constexpr(64.0)

# ---- forward -------------------------------------------------------------------------------------------------------


@triton.jit
def _standardised(operand, outer, inner, OUTER: tl.constexpr, INNER: tl.constexpr):
    """x̂, of rows that are the outer index, and zero past their end: what stands there, −mean·rstd, may overflow fp16,
    and infinity times the weight's zero is NaN."""
    source, mean, rstd, K = operand
    x = (load_tile(source, outer, inner, OUTER, INNER).to(tl.float32) - mean[:, None]) * rstd[:, None]
    return tl.where((inner + tl.arange(0, INNER) < K)[None, :], x, 0.0)


@triton.jit
def norm_product(
    x, weight,
    folded, row, col, M, N, K,
    PARTS: tl.constexpr, DTYPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of z·Wᵀ in fp32; or of LN(x)·Wᵀ − W·β in its folded form, where `folded` is (statistics of x in PARTS
    parts, the width of a part, eps, u) and the weight is V."""
    if folded is None:
        y = product(
            rows_outer, x, rows_outer, weight, row, col, 0, K, DTYPE, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION
        )  # fmt: skip
    else:
        statistics_ptr, part_width, eps, row_sums_ptr = folded
        rows = row + tl.arange(0, BLOCK_M)
        mean, rstd = load_statistics(statistics_ptr, rows, M, K, part_width, eps, PARTS)
        if tl.max(tl.abs(mean) * rstd, axis=0) <= FOLD_LIMIT:
            sums = product(
                rows_outer, x, rows_outer, weight, row, col, 0, K, DTYPE, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION
            )  # fmt: skip
            u = load_vector(row_sums_ptr, col + tl.arange(0, BLOCK_N), N)
            y = rstd[:, None] * (sums - mean[:, None] * u[None, :])
        else:
            y = product(
                _standardised, (x, mean, rstd, K), rows_outer, weight, row, col, 0, K,
                DTYPE, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
            )  # fmt: skip
    return y


@triton.jit
def _forward_kernel(
    x_ptr, weight_ptr, bias_ptr, y_ptr,
    folded, M, N, K, stride_x, stride_weight,
    PARTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PIECES: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """x is z where nothing is folded."""
    DTYPE: tl.constexpr = weight_ptr.dtype.element_ty
    WIDTH: tl.constexpr = BLOCK_N // PIECES
    x = matrix(x_ptr, M, K, stride_x, BLOCK_M, BLOCK_K, TMA)
    weight = matrix(weight_ptr, N, K, stride_weight, BLOCK_N, BLOCK_K, TMA)
    y = matrix(y_ptr, M, N, N, BLOCK_M, WIDTH, TMA)
    for tile in tl.range(tl.program_id(0), count_tiles(M, N, BLOCK_M, BLOCK_N), tl.num_programs(0), flatten=True):
        row, first_col = tile_of(tile, M, N, BLOCK_M, BLOCK_N)
        sums = norm_product(
            x, weight, folded, row, first_col, M, N, K, PARTS, DTYPE, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION
        )  # fmt: skip
        pieces = column_pieces(sums, PIECES)
        for piece in tl.static_range(PIECES):
            col = first_col + piece * WIDTH
            out = pieces[piece]
            if bias_ptr is not None:
                out += load_vector(bias_ptr, col + tl.arange(0, WIDTH), N)[None, :]
            store_tile(y, out, row, col, DTYPE)


def norm_operand(x, norm_weight, norm_bias, eps, dtype, training, row_sums, statistics=None):
    """What the product reads; the `folded` and PARTS of its kernel; the mean and rstd that training keeps.

    With row_sums, u, that is x itself, whose statistics may be at hand; elsewhere z, and None.
    """
    if row_sums is None:
        z, mean, rstd = layer_norm.forward(x, norm_weight, norm_bias, eps, dtype, training)
        return z, {"folded": None, "PARTS": 1}, mean, rstd
    statistics = statistics_of(x) if statistics is None else statistics
    folded = statistics, part_width(statistics, x.shape[1]), eps, row_sums
    return x, {"folded": folded, "PARTS": statistics.shape[1]}, None, None


def forward(x, norm_weight, norm_bias, weight, bias, eps, precision, row_sums=None, training=True):
    """y [M, N] in the dtype of the weight, mean and rstd [M], None unless training.

    The last axis of x and weight has stride 1.
    With row_sums, u, the weight is V, the bias c, and the norm's weight and bias are None.
    """
    (M, K), N = x.shape, weight.shape[0]
    z, folded, mean, rstd = norm_operand(x, norm_weight, norm_bias, eps, weight.dtype, training, row_sums)
    y = torch.empty((M, N), dtype=weight.dtype, device=x.device)
    launch_tiles(
        _forward_kernel, "ln_linear_forward", M, N, weight.dtype, (z, weight, y),
        x_ptr=z, weight_ptr=weight, bias_ptr=bias, y_ptr=y, K=K, stride_x=z.stride(0),
        stride_weight=weight.stride(0), PRECISION=precision, **folded,
    )  # fmt: skip
    return y, mean, rstd


# ---- backward ------------------------------------------------------------------------------------------------------


def first_stage(dy, x, mean, rstd, norm_weight, norm_bias, weight, bias, precision, residual_grad=None):
    """dx, to which the residual's gradient is added where it is given, and the first stages of the other gradients:
    of γ and β for `layer_norm.finish`, of W and b for `linear.finish`."""
    dz = input_grad(dy, weight, precision)
    dx, z, shares = layer_norm.backward(dz, x, mean, rstd, norm_weight, norm_bias, residual_grad)
    return dx, shares, weight_grad(dy, z, weight, bias, None, precision)


def backward(dy, x, mean, rstd, norm_weight, norm_bias, weight, bias, precision):
    """dx, dγ, dβ, dW and db (None without b), each in the dtype of what it is the gradient of."""
    dx, shares, partials = first_stage(dy, x, mean, rstd, norm_weight, norm_bias, weight, bias, precision)
    return dx, *layer_norm.finish((shares, norm_weight, norm_bias)), *finish(partials)[:2]
