"""LayerNorm and the linear map behind it, one pass over x for its statistics and one for the product.

forward    x̂ = (x − mean)·rstd          z = x̂∘γ + β          y = z·Wᵀ + b
folded     y = rstd·(x·Vᵀ) − rstd·mean·u + c,  V = W∘γ as rounded,  u = Σₖ V,  c = W·β + b
backward   dz = dy·W     g = dz∘γ     dx = rstd·(g − mean(g) − x̂·mean(g∘x̂))
           P = dyᵀ·x̂     db = Σ dy    dW = P∘γ + db·βᵀ    dγ = Σₙ W∘P    dβ = Wᵀ·db      (Σ over tokens)
shapes     x [M, K]   γ, β [K]   W, V [N, K]   b, u, c [N]   y [M, N]
saved      mean, rstd [M] in fp32; x̂ is computed again: cheaper than 2·M·K bytes
limit      2·M·N·K operations forward, twice that backward; (2·M·K + N·K + M·N) elements moved forward

The exact form centres and scales each tile of x in registers before the product. The folded form, for frozen weights in
half precision, multiplies x as it is; what it subtracts afterwards has cancelled where |mean|·rstd is large, so a tile
with such a row takes the exact form, x̂·Vᵀ + c.

dγ and dβ ride on the weight gradient. The means of g and g∘x̂ need no pass either where the kernel that makes dy knows
y too, as the MLP's does: mean(g) = dy·(W·γ)/K and mean(g∘x̂) = Σₙ dy∘(y − c)/K, with c as above. Then dx is made by the
epilogue of dy·W, and dz is never written. Elsewhere that pass over dy and y would cost more than one over dz and x.
"""

import torch
import triton
import triton.language as tl

from .linear import launch_weight_grad, linear_input_grad, sum_partials, weight_grad_tile
from .product import (
    column_pieces,
    count_tiles,
    launch_tiles,
    load_tile,
    load_vector,
    matrix,
    product,
    rows_inner,
    rows_outer,
    store_tile,
    tile_of,
)
from .statistics import load_statistics, part_width, statistics_of, whole_rows

# |mean|·rstd up to which the folded form is as exact as the unfused one in half precision: it was found to be so up to
# 100, and is a multiple of it off at 10,000.
FOLD_LIMIT = tl.constexpr(64.0)

# ---- loaders -------------------------------------------------------------------------------------------------------


@triton.jit
def normalised(operand, outer, inner, OUTER: tl.constexpr, INNER: tl.constexpr):
    """z, or x̂ where there is no γ: of rows that are the outer index, with their mean and rstd."""
    source, mean, rstd, weight_ptr, bias_ptr, K = operand
    z = (load_tile(source, outer, inner, OUTER, INNER).to(tl.float32) - mean[:, None]) * rstd[:, None]
    if weight_ptr is not None:
        cols = inner + tl.arange(0, INNER)
        z = z * load_vector(weight_ptr, cols, K)[None, :] + load_vector(bias_ptr, cols, K)[None, :]
    return z


@triton.jit
def standardised_rows(operand, outer, inner, OUTER: tl.constexpr, INNER: tl.constexpr):
    """As `normalised` without γ, and zero past the row's end: what stands there, −mean·rstd, may overflow fp16, and
    infinity times the weight's zero is NaN."""
    _, _, _, _, _, K = operand
    cols = inner + tl.arange(0, INNER)
    return tl.where((cols < K)[None, :], normalised(operand, outer, inner, OUTER, INNER), 0.0)


@triton.jit
def standardised(operand, outer, inner, OUTER: tl.constexpr, INNER: tl.constexpr):
    """x̂, of rows that are the inner index."""
    source, mean_ptr, rstd_ptr, M = operand
    rows = inner + tl.arange(0, INNER)
    x = load_tile(source, inner, outer, INNER, OUTER).to(tl.float32)
    return ((x - load_vector(mean_ptr, rows, M)[:, None]) * load_vector(rstd_ptr, rows, M)[:, None]).T


# ---- forward -------------------------------------------------------------------------------------------------------


@triton.jit
def normalised_product(
    x, weight, mean, rstd,
    norm_weight_ptr, norm_bias_ptr, row_sums_ptr,
    row, col, N, K,
    DTYPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of z·Wᵀ in fp32, or of its folded form where row_sums_ptr, u, is given and the weight is V."""
    z = (x, mean, rstd, norm_weight_ptr, norm_bias_ptr, K)
    if row_sums_ptr is None:
        y = product(
            normalised, z, rows_outer, weight, row, col, 0, K, DTYPE, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION
        )  # fmt: skip
    else:
        if tl.max(tl.abs(mean) * rstd, axis=0) <= FOLD_LIMIT:
            sums = product(
                rows_outer, x, rows_outer, weight, row, col, 0, K, DTYPE, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION
            )  # fmt: skip
            u = load_vector(row_sums_ptr, col + tl.arange(0, BLOCK_N), N)
            y = rstd[:, None] * (sums - mean[:, None] * u[None, :])
        else:
            y = product(
                standardised_rows, z, rows_outer, weight, row, col, 0, K, DTYPE, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION
            )  # fmt: skip
    return y


@triton.jit
def _forward_kernel(
    x_ptr, statistics_ptr,
    norm,
    weight_ptr, bias_ptr, y_ptr, mean_ptr, rstd_ptr,
    M, N, K, stride_x, stride_weight, part_width, eps,
    PARTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PIECES: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """norm is (γ, β, None), or (None, None, u) where the weight is folded."""
    DTYPE: tl.constexpr = weight_ptr.dtype.element_ty
    WIDTH: tl.constexpr = BLOCK_N // PIECES
    norm_weight_ptr, norm_bias_ptr, row_sums_ptr = norm
    x = matrix(x_ptr, M, K, stride_x, BLOCK_M, BLOCK_K, TMA)
    weight = matrix(weight_ptr, N, K, stride_weight, BLOCK_N, BLOCK_K, TMA)
    y = matrix(y_ptr, M, N, N, BLOCK_M, WIDTH, TMA)
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
            out = pieces[piece]
            if bias_ptr is not None:
                out += load_vector(bias_ptr, col + tl.arange(0, WIDTH), N)[None, :]
            store_tile(y, out, row, col, DTYPE)
        if mean_ptr is not None:
            first = (rows < M) & (first_col == 0)
            tl.store(mean_ptr + rows, mean, mask=first)
            tl.store(rstd_ptr + rows, rstd, mask=first)


def forward(x, norm_weight, norm_bias, weight, bias, eps, precision, row_sums=None, training=True):
    """y [M, N] in the dtype of the weight, mean and rstd [M], None unless training.

    The last axis of x and weight has stride 1.
    With row_sums, u, the weight is V, the bias c, and the norm's weight and bias are None.
    """
    (M, K), N = x.shape, weight.shape[0]
    statistics = statistics_of(x)
    mean, rstd = None, None
    if training:
        mean, rstd = (torch.empty((M,), dtype=torch.float32, device=x.device) for _ in range(2))
    y = torch.empty((M, N), dtype=weight.dtype, device=x.device)
    launch_tiles(
        _forward_kernel, "ln_linear_forward", M, N, weight.dtype, (x, weight, y),
        x_ptr=x, statistics_ptr=statistics, norm=(norm_weight, norm_bias, row_sums), weight_ptr=weight, bias_ptr=bias,
        y_ptr=y, mean_ptr=mean, rstd_ptr=rstd, K=K, stride_x=x.stride(0), stride_weight=weight.stride(0),
        part_width=part_width(statistics, K), eps=eps, PARTS=statistics.shape[1], PRECISION=precision,
    )  # fmt: skip
    return y, mean, rstd


# ---- input gradient ------------------------------------------------------------------------------------------------


@triton.jit
def norm_grad_tile(g, x, mean_g, mean_gx, rstd):
    """dx = rstd·(g − mean(g) − x̂·mean(g∘x̂)) of a tile; what belongs to a row is a vector."""
    return (g - mean_g[:, None] - x * mean_gx[:, None]) * rstd[:, None]


@triton.jit
def _norm_grad_kernel(
    dz_ptr, x_ptr, mean_ptr, rstd_ptr, norm_weight_ptr, residual_grad_ptr, dx_ptr,
    M, K, stride_x, stride_residual_grad,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dx from dz, of rows that fit in registers, and what reached x past the branch where that is given."""
    row = tl.program_id(0) * BLOCK_M
    rows, cols = row + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    mean, rstd = load_vector(mean_ptr, rows, M), load_vector(rstd_ptr, rows, M)
    source = matrix(x_ptr, M, K, stride_x, BLOCK_M, BLOCK_K, False)
    x = normalised((source, mean, rstd, None, None, K), row, 0, BLOCK_M, BLOCK_K)
    dz = load_tile(matrix(dz_ptr, M, K, K, BLOCK_M, BLOCK_K, False), row, 0, BLOCK_M, BLOCK_K)
    # γ is zero past the row's end, and so is g; x̂ is not, but every sum has g as a factor.
    g = dz.to(tl.float32) * load_vector(norm_weight_ptr, cols, K)[None, :]
    dx = norm_grad_tile(g, x, tl.sum(g, axis=1) / K, tl.sum(g * x, axis=1) / K, rstd)
    if residual_grad_ptr is not None:
        residual_grad = matrix(residual_grad_ptr, M, K, stride_residual_grad, BLOCK_M, BLOCK_K, False)
        dx += load_tile(residual_grad, row, 0, BLOCK_M, BLOCK_K).to(tl.float32)
    store_tile(matrix(dx_ptr, M, K, K, BLOCK_M, BLOCK_K, False), dx, row, 0, dx_ptr.dtype.element_ty)


def input_grad(dy, x, mean, rstd, norm_weight, weight, precision, residual_grad=None):
    """dx [M, K] in the dtype of x, the gradient past the branch added where it is given."""
    M, K = x.shape
    dz = linear_input_grad(dy, weight, None, None, M, precision)
    dx = torch.empty((M, K), dtype=x.dtype, device=x.device)
    tile = whole_rows(K)
    _norm_grad_kernel[(-(-M // tile["BLOCK_M"]),)](
        dz_ptr=dz, x_ptr=x, mean_ptr=mean, rstd_ptr=rstd, norm_weight_ptr=norm_weight, residual_grad_ptr=residual_grad,
        dx_ptr=dx, M=M, K=K, stride_x=x.stride(0),
        stride_residual_grad=0 if residual_grad is None else residual_grad.stride(0), **tile,
    )  # fmt: skip
    return dx


@triton.jit
def _fold_kernel(
    weight_ptr, norm_weight_ptr, norm_bias_ptr, bias_ptr, folded_ptr,
    N, K, stride_weight,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Rows of W·γ and c = W·β + b, folded [2, N]."""
    row = tl.program_id(0) * BLOCK_M
    rows = row + tl.arange(0, BLOCK_M)
    weight = matrix(weight_ptr, N, K, stride_weight, BLOCK_M, BLOCK_K, False)
    scaled_sums = tl.zeros([BLOCK_M], tl.float32)
    shift = tl.zeros([BLOCK_M], tl.float32)
    for col in range(0, K, BLOCK_K):
        cols = col + tl.arange(0, BLOCK_K)
        w = load_tile(weight, row, col, BLOCK_M, BLOCK_K).to(tl.float32)
        scaled_sums += tl.sum(w * load_vector(norm_weight_ptr, cols, K)[None, :], axis=1)
        shift += tl.sum(w * load_vector(norm_bias_ptr, cols, K)[None, :], axis=1)
    if bias_ptr is not None:
        shift += load_vector(bias_ptr, rows, N)
    tl.store(folded_ptr + rows, scaled_sums, mask=rows < N)
    tl.store(folded_ptr + N + rows, shift, mask=rows < N)


def fold(norm_weight, norm_bias, weight, bias):
    """W·γ and c, [2, N] in fp32: what the kernel that makes dy needs for the two means of dx."""
    N, K = weight.shape
    folded = torch.empty((2, N), dtype=torch.float32, device=weight.device)
    _fold_kernel[(-(-N // 8),)](
        weight_ptr=weight, norm_weight_ptr=norm_weight, norm_bias_ptr=norm_bias, bias_ptr=bias, folded_ptr=folded, N=N,
        K=K, stride_weight=weight.stride(0), BLOCK_M=8, BLOCK_K=256, num_warps=4,
    )  # fmt: skip
    return folded


@triton.jit
def sum_parts(parts_ptr, rows, M, PARTS: tl.constexpr):
    """Sums over the parts of [PARTS, M], of these rows."""
    SLOTS: tl.constexpr = triton.next_power_of_2(PARTS)
    parts = tl.arange(0, SLOTS)
    mask = (rows[:, None] < M) & (parts[None, :] < PARTS)
    return tl.sum(tl.load(parts_ptr + parts[None, :].to(tl.int64) * M + rows[:, None], mask=mask, other=0.0), axis=1)


@triton.jit
def _summed_input_grad_kernel(
    dy_ptr, weight_ptr, x_ptr, mean_ptr, rstd_ptr, norm_weight_ptr, row_sums_ptr, residual_grad_ptr, dx_ptr,
    M, N, K, stride_dy, stride_weight, stride_x, stride_residual_grad,
    PARTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PIECES: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dx [M, N] from dy [M, K], W [K, N] and Σ g, Σ g∘x̂ in parts, [2, PARTS, M]; K is what the map gives."""
    DTYPE: tl.constexpr = weight_ptr.dtype.element_ty
    WIDTH: tl.constexpr = BLOCK_N // PIECES
    dy = matrix(dy_ptr, M, K, stride_dy, BLOCK_M, BLOCK_K, TMA)
    weight = matrix(weight_ptr, K, N, stride_weight, BLOCK_K, BLOCK_N, TMA)
    source = matrix(x_ptr, M, N, stride_x, BLOCK_M, WIDTH, TMA)
    residual_grad = matrix(residual_grad_ptr, M, N, stride_residual_grad, BLOCK_M, WIDTH, TMA)
    dx = matrix(dx_ptr, M, N, N, BLOCK_M, WIDTH, TMA)
    for tile in tl.range(tl.program_id(0), count_tiles(M, N, BLOCK_M, BLOCK_N), tl.num_programs(0), flatten=True):
        row, first_col = tile_of(tile, M, N, BLOCK_M, BLOCK_N)
        dz = product(
            rows_outer, dy, rows_inner, weight, row, first_col, 0, K, DTYPE, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION
        )  # fmt: skip
        rows = row + tl.arange(0, BLOCK_M)
        mean, rstd = load_vector(mean_ptr, rows, M), load_vector(rstd_ptr, rows, M)
        mean_g = sum_parts(row_sums_ptr, rows, M, PARTS) / N
        mean_gx = sum_parts(row_sums_ptr + tl.cast(PARTS, tl.int64) * M, rows, M, PARTS) / N
        pieces = column_pieces(dz, PIECES)
        for piece in tl.static_range(PIECES):
            col = first_col + piece * WIDTH
            g = pieces[piece] * load_vector(norm_weight_ptr, col + tl.arange(0, WIDTH), N)[None, :]
            x = normalised((source, mean, rstd, None, None, N), row, col, BLOCK_M, WIDTH)
            out = norm_grad_tile(g, x, mean_g, mean_gx, rstd)
            out += load_tile(residual_grad, row, col, BLOCK_M, WIDTH).to(tl.float32)
            store_tile(dx, out, row, col, dx_ptr.dtype.element_ty)


def summed_input_grad(dy, x, mean, rstd, norm_weight, weight, row_sums, residual_grad, precision):
    """As `input_grad`, from Σ g and Σ g∘x̂ in parts [2, parts, M] that the kernel which made dy has left."""
    (M, K), N = x.shape, weight.shape[0]
    dx = torch.empty((M, K), dtype=x.dtype, device=x.device)
    launch_tiles(
        _summed_input_grad_kernel, "ln_linear_input_grad", M, K, weight.dtype, (dy, weight, x, residual_grad, dx),
        dy_ptr=dy, weight_ptr=weight, x_ptr=x, mean_ptr=mean, rstd_ptr=rstd, norm_weight_ptr=norm_weight,
        row_sums_ptr=row_sums, residual_grad_ptr=residual_grad, dx_ptr=dx, K=N, stride_dy=dy.stride(0),
        stride_weight=weight.stride(0), stride_x=x.stride(0), stride_residual_grad=residual_grad.stride(0),
        PARTS=row_sums.shape[1], PRECISION=precision,
    )  # fmt: skip
    return dx


# ---- parameter gradients -------------------------------------------------------------------------------------------


@triton.jit
def _weight_grad_kernel(
    dy_ptr, x_ptr, mean_ptr, rstd_ptr, partial_ptr, sums_ptr,
    M, N, K, stride_dy, stride_x, span,
    DTYPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    dy = matrix(dy_ptr, M, N, stride_dy, BLOCK_K, BLOCK_M, TMA)
    x = matrix(x_ptr, M, K, stride_x, BLOCK_K, BLOCK_N, TMA)
    weight_grad_tile(
        (dy, None, M, 1), standardised, (x, mean_ptr, rstd_ptr, M), partial_ptr, sums_ptr, N, K, M, span,
        DTYPE, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
    )  # fmt: skip


@triton.jit
def _finish_kernel(
    partial_ptr, sums_ptr, norm_weight_ptr, norm_bias_ptr, weight_ptr, dweight_ptr, dbias_ptr, dnorm_ptr,
    N, K, stride_weight, splits,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Second stage: dW = P∘γ + db·βᵀ, db = Σ sums, and this program's rows' share of dγ and dβ, [2, tiles, K]."""
    row, col = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_N
    rows, cols = row + tl.arange(0, BLOCK_M), col + tl.arange(0, BLOCK_N)
    grad = sum_partials(partial_ptr, splits, N, K, row, col, BLOCK_M, BLOCK_N)
    dbias = tl.zeros([BLOCK_M], tl.float32)
    for split in range(splits):
        dbias += load_vector(sums_ptr + split * N, rows, N)
    source = matrix(weight_ptr, N, K, stride_weight, BLOCK_M, BLOCK_N, False)
    weight = load_tile(source, row, col, BLOCK_M, BLOCK_N).to(tl.float32)
    dnorm_row = dnorm_ptr + tl.program_id(0) * K + cols
    tl.store(dnorm_row, tl.sum(weight * grad, axis=0), mask=cols < K)
    tl.store(dnorm_row + tl.num_programs(0) * K, tl.sum(weight * dbias[:, None], axis=0), mask=cols < K)
    norm_weight, norm_bias = load_vector(norm_weight_ptr, cols, K), load_vector(norm_bias_ptr, cols, K)
    dweight = grad * norm_weight[None, :] + dbias[:, None] * norm_bias[None, :]
    store_tile(matrix(dweight_ptr, N, K, K, BLOCK_M, BLOCK_N, False), dweight, row, col, dweight_ptr.dtype.element_ty)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + rows, dbias, mask=(rows < N) & (col == 0))


def weight_grads(dy, x, mean, rstd, norm_weight, norm_bias, weight, bias, precision):
    """dW and db (None without b), and the shares [2, tiles, K] of dγ and dβ that `norm_grads` adds up."""
    (M, N), K = dy.shape, x.shape[1]
    partial, sums = launch_weight_grad(
        _weight_grad_kernel, "ln_linear_weight_grad", M, N, K, weight.dtype, (dy, x),
        with_sums=True, dy_ptr=dy, x_ptr=x, mean_ptr=mean, rstd_ptr=rstd, stride_dy=dy.stride(0), stride_x=x.stride(0),
        PRECISION=precision,
    )  # fmt: skip
    dweight = torch.empty((N, K), dtype=weight.dtype, device=x.device)
    dbias = None if bias is None else torch.empty((N,), dtype=bias.dtype, device=x.device)
    dnorm = torch.empty((2, -(-N // 32), K), dtype=torch.float32, device=x.device)
    _finish_kernel[(-(-N // 32), -(-K // 128))](
        partial_ptr=partial, sums_ptr=sums, norm_weight_ptr=norm_weight, norm_bias_ptr=norm_bias, weight_ptr=weight,
        dweight_ptr=dweight, dbias_ptr=dbias, dnorm_ptr=dnorm, N=N, K=K, stride_weight=weight.stride(0),
        splits=partial.shape[0], BLOCK_M=32, BLOCK_N=128, num_warps=8,
    )  # fmt: skip
    return dweight, dbias, dnorm


@triton.jit
def _sum_shares(shares, cols, K, BLOCK_M: tl.constexpr):
    """dγ (program 0 of axis 1) or dβ (1) of one LayerNorm."""
    dnorm_ptr, tiles, dweight_ptr, dbias_ptr = shares
    which = tl.program_id(1)
    sums = tl.zeros([cols.shape[0]], tl.float32)
    for first in range(0, tiles, BLOCK_M):
        rows = first + tl.arange(0, BLOCK_M)
        place = dnorm_ptr + (which * tiles + rows)[:, None] * K + cols[None, :]
        sums += tl.sum(tl.load(place, mask=(rows[:, None] < tiles) & (cols[None, :] < K), other=0.0), axis=0)
    if which == 0:
        tl.store(dweight_ptr + cols, sums, mask=cols < K)
    else:
        tl.store(dbias_ptr + cols, sums, mask=cols < K)


@triton.jit
def _norm_grads_kernel(first, second, K, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """dγ and dβ of one LayerNorm or two, each (shares [2, tiles, K], tiles, dγ, dβ)."""
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    if tl.program_id(2) == 0:
        _sum_shares(first, cols, K, BLOCK_M)
    else:
        if second is not None:
            _sum_shares(second, cols, K, BLOCK_M)


def norm_grads(*norms: tuple):
    """dγ, dβ of each LayerNorm, one after the other: one launch for one or two (shares of `weight_grads`, γ, β)."""
    K = norms[0][0].shape[2]
    found, groups = [], [None, None]
    for index, (dnorm, norm_weight, norm_bias) in enumerate(norms):
        dnorm_weight, dnorm_bias = (torch.empty((K,), dtype=t.dtype, device=t.device) for t in (norm_weight, norm_bias))
        found += [dnorm_weight, dnorm_bias]
        groups[index] = (dnorm, dnorm.shape[1], dnorm_weight, dnorm_bias)
    _norm_grads_kernel[(-(-K // 32), 2, len(norms))](
        first=groups[0], second=groups[1], K=K, BLOCK_M=32, BLOCK_N=32, num_warps=4
    )
    return found


def backward(dy, x, mean, rstd, norm_weight, norm_bias, weight, bias, precision):
    """dx, dγ, dβ, dW and db (None without b), each in the dtype of what it is the gradient of."""
    dx = input_grad(dy, x, mean, rstd, norm_weight, weight, precision)
    dweight, dbias, dnorm = weight_grads(dy, x, mean, rstd, norm_weight, norm_bias, weight, bias, precision)
    return dx, *norm_grads((dnorm, norm_weight, norm_bias)), dweight, dbias
