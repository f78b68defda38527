"""LayerNorm and the linear map behind it, one pass over x for its statistics and one for the product.

forward    x̂ = (x − mean)·rstd          z = x̂∘γ + β          y = z·Wᵀ + b
backward   dz = dy·W     g = dz∘γ     dx = rstd·(g − mean(g) − x̂·mean(g∘x̂))
           P = dyᵀ·x̂     db = Σ dy    dW = P∘γ + db·βᵀ    dγ = Σₙ W∘P    dβ = Wᵀ·db      (Σ over tokens)
shapes     x [M, K]   γ, β [K]   W [N, K]   b [N]   y [M, N]
saved      mean, rstd [M] in fp32; x̂ is computed again: cheaper than 2·M·K bytes
limit      2·M·N·K operations forward, twice that backward; (2·M·K + N·K + M·N) elements moved forward

dγ and dβ ride on the weight gradient, so that no pass over the tokens of their own is made for them.
"""

import torch
import triton
import triton.language as tl

from .linear import linear_input_grad, split_tokens, weight_grad_tile
from .product import TRITON_DTYPE, load_vector, matrix, product, store, tile_offsets, tiles
from .tile_table import lookup

# ---- loaders -------------------------------------------------------------------------------------------------------


@triton.jit
def standardised(operand, rows, cols):
    """x̂."""
    ptr, stride_row, n_rows, n_cols, mean_ptr, rstd_ptr = operand
    tile = matrix((ptr, stride_row, 1, n_rows, n_cols, None, 1), rows, cols).to(tl.float32)
    return (tile - load_vector(mean_ptr, rows, n_rows)[:, None]) * load_vector(rstd_ptr, rows, n_rows)[:, None]


@triton.jit
def normalised(operand, rows, cols):
    """z = x̂∘γ + β."""
    ptr, stride_row, n_rows, n_cols, mean_ptr, rstd_ptr, weight_ptr, bias_ptr = operand
    tile = standardised((ptr, stride_row, n_rows, n_cols, mean_ptr, rstd_ptr), rows, cols)
    weight = load_vector(weight_ptr, cols, n_cols)
    return tile * weight[None, :] + load_vector(bias_ptr, cols, n_cols)[None, :]


# ---- forward -------------------------------------------------------------------------------------------------------


@triton.jit
def _statistics_kernel(x_ptr, mean_ptr, rstd_ptr, M, K, stride_x, eps, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """Mean and 1/√(variance + eps) of rows that fit in registers: the variance is that of the centred row."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_K)
    x = matrix((x_ptr, stride_x, 1, M, K, None, 1), rows, cols).to(tl.float32)
    mean = tl.sum(x, axis=1) / K
    centred = tl.where(cols[None, :] < K, x - mean[:, None], 0.0)
    variance = tl.sum(centred * centred, axis=1) / K
    tl.store(mean_ptr + rows, mean, mask=rows < M)
    tl.store(rstd_ptr + rows, tl.rsqrt(variance + eps), mask=rows < M)


@triton.jit
def normalised_product_tile(
    x_ptr,
    mean_ptr,
    rstd_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    weight_ptr,
    bias_ptr,
    M,
    N,
    K,
    stride_x,
    stride_weight,
    rows,
    cols,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile of z·Wᵀ + b in fp32."""
    z = (x_ptr, stride_x, M, K, mean_ptr, rstd_ptr, norm_weight_ptr, norm_bias_ptr)
    w = (weight_ptr, 1, stride_weight, K, N, None, 1)
    y = product(normalised, z, matrix, w, rows, cols, 0, K, weight_ptr.dtype.element_ty, BLOCK_K, PRECISION)
    if bias_ptr is not None:
        y += load_vector(bias_ptr, cols, N)[None, :]
    return y


@triton.jit
def _forward_kernel(
    x_ptr,
    mean_ptr,
    rstd_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    M,
    N,
    K,
    stride_x,
    stride_weight,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    rows, cols = tile_offsets(M, N, BLOCK_M, BLOCK_N)
    y = normalised_product_tile(
        x_ptr, mean_ptr, rstd_ptr, norm_weight_ptr, norm_bias_ptr, weight_ptr, bias_ptr, M, N, K,
        stride_x, stride_weight, rows, cols, BLOCK_K, PRECISION,
    )  # fmt: skip
    store(y_ptr, N, y, rows, cols, M, N)


def whole_rows(K: int) -> dict:
    """The launch of a kernel that holds rows whole: 4,096 elements a program of four warps, 32 a thread."""
    block = triton.next_power_of_2(K)
    return {"BLOCK_M": max(1, 4096 // block), "BLOCK_K": block, "num_warps": 4}


def statistics(x, eps):
    """mean and rstd [M] in fp32 of the rows of x [M, K]."""
    M, K = x.shape
    mean = torch.empty((M,), dtype=torch.float32, device=x.device)
    rstd = torch.empty((M,), dtype=torch.float32, device=x.device)
    tile = whole_rows(K)
    _statistics_kernel[(triton.cdiv(M, tile["BLOCK_M"]),)](
        x_ptr=x,
        mean_ptr=mean,
        rstd_ptr=rstd,
        M=M,
        K=K,
        stride_x=x.stride(0),
        eps=eps,
        **tile,
    )
    return mean, rstd


def forward(x, norm_weight, norm_bias, weight, bias, eps, precision):
    """y [M, N] in the dtype of the weight, mean and rstd [M]. The last axis of x and weight has stride 1."""
    (M, K), N = x.shape, weight.shape[0]
    mean, rstd = statistics(x, eps)
    y = torch.empty((M, N), dtype=weight.dtype, device=x.device)
    tile = lookup("ln_linear_forward", x.device, weight.dtype)
    _forward_kernel[(tiles(M, N, tile),)](
        x_ptr=x,
        mean_ptr=mean,
        rstd_ptr=rstd,
        norm_weight_ptr=norm_weight,
        norm_bias_ptr=norm_bias,
        weight_ptr=weight,
        bias_ptr=bias,
        y_ptr=y,
        M=M,
        N=N,
        K=K,
        stride_x=x.stride(0),
        stride_weight=weight.stride(0),
        PRECISION=precision,
        **tile,
    )
    return y, mean, rstd


# ---- backward ------------------------------------------------------------------------------------------------------


@triton.jit
def _norm_grad_kernel(
    dz_ptr,
    x_ptr,
    mean_ptr,
    rstd_ptr,
    norm_weight_ptr,
    residual_grad_ptr,
    dx_ptr,
    M,
    K,
    stride_x,
    stride_residual_grad,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """dx = rstd·(g − mean(g) − x̂·mean(g∘x̂)), and what reached x past the branch where that is given."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_K)
    x = standardised((x_ptr, stride_x, M, K, mean_ptr, rstd_ptr), rows, cols)
    # γ is zero past the row's end, and so is g; x̂ is not, but every sum has g as a factor.
    g = matrix((dz_ptr, K, 1, M, K, norm_weight_ptr, 1), rows, cols)
    centred = g - (tl.sum(g, axis=1) / K)[:, None] - x * (tl.sum(g * x, axis=1) / K)[:, None]
    dx = centred * load_vector(rstd_ptr, rows, M)[:, None]
    if residual_grad_ptr is not None:
        dx += matrix((residual_grad_ptr, stride_residual_grad, 1, M, K, None, 1), rows, cols).to(tl.float32)
    store(dx_ptr, K, dx, rows, cols, M, K)


@triton.jit
def _weight_grad_kernel(
    dy_ptr,
    x_ptr,
    mean_ptr,
    rstd_ptr,
    partial_ptr,
    sums_ptr,
    M,
    N,
    K,
    stride_dy,
    stride_x,
    span,
    DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    a = (dy_ptr, 1, stride_dy, N, M, None, 1)
    b = (x_ptr, stride_x, M, K, mean_ptr, rstd_ptr)
    weight_grad_tile(
        matrix, a, standardised, b, partial_ptr, sums_ptr, N, K, M, span, DTYPE, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION
    )  # fmt: skip


@triton.jit
def _finish_kernel(
    partial_ptr,
    sums_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    weight_ptr,
    dweight_ptr,
    dbias_ptr,
    dnorm_ptr,
    N,
    K,
    stride_weight,
    splits,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Second stage: dW = P∘γ + db·βᵀ, db = Σ sums, and this program's rows' share of dγ and dβ, [tiles, 2, K]."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    grad = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    dbias = tl.zeros([BLOCK_M], tl.float32)
    for split in range(splits):
        grad += matrix((partial_ptr + tl.cast(split, tl.int64) * N * K, K, 1, N, K, None, 1), rows, cols)
        dbias += load_vector(sums_ptr + split * N, rows, N)
    weight = matrix((weight_ptr, stride_weight, 1, N, K, None, 1), rows, cols).to(tl.float32)
    dnorm_row = dnorm_ptr + tl.program_id(0) * 2 * K + cols
    tl.store(dnorm_row, tl.sum(weight * grad, axis=0), mask=cols < K)
    tl.store(dnorm_row + K, tl.sum(weight * dbias[:, None], axis=0), mask=cols < K)
    norm_weight, norm_bias = load_vector(norm_weight_ptr, cols, K), load_vector(norm_bias_ptr, cols, K)
    dweight = grad * norm_weight[None, :] + dbias[:, None] * norm_bias[None, :]
    store(dweight_ptr, K, dweight, rows, cols, N, K)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + rows, dbias, mask=(rows < N) & (tl.program_id(1) == 0))


def norm_grad(dz, x, mean, rstd, norm_weight, residual_grad=None):
    """dx [M, K] in the dtype of x, the gradient past the branch added where it is given."""
    M, K = x.shape
    dx = torch.empty((M, K), dtype=x.dtype, device=x.device)
    tile = whole_rows(K)
    _norm_grad_kernel[(triton.cdiv(M, tile["BLOCK_M"]),)](
        dz_ptr=dz,
        x_ptr=x,
        mean_ptr=mean,
        rstd_ptr=rstd,
        norm_weight_ptr=norm_weight,
        residual_grad_ptr=residual_grad,
        dx_ptr=dx,
        M=M,
        K=K,
        stride_x=x.stride(0),
        stride_residual_grad=0 if residual_grad is None else residual_grad.stride(0),
        **tile,
    )
    return dx


def backward(dy, x, mean, rstd, norm_weight, norm_bias, weight, bias, precision, residual_grad=None):
    """dx, dγ, dβ, dW and db (None without b), each in the dtype of what it is the gradient of."""
    (M, N), K = dy.shape, x.shape[1]
    dz = linear_input_grad(dy, weight, None, None, M, precision)
    dx = norm_grad(dz, x, mean, rstd, norm_weight, residual_grad)

    tile = lookup("ln_linear_weight_grad", x.device, weight.dtype)
    splits, span = split_tokens(N, K, M, tile)
    partial = torch.empty((splits, N, K), dtype=torch.float32, device=x.device)
    sums = torch.empty((splits, N), dtype=torch.float32, device=x.device)
    _weight_grad_kernel[(tiles(N, K, tile), splits)](
        dy_ptr=dy,
        x_ptr=x,
        mean_ptr=mean,
        rstd_ptr=rstd,
        partial_ptr=partial,
        sums_ptr=sums,
        M=M,
        N=N,
        K=K,
        stride_dy=dy.stride(0),
        stride_x=x.stride(0),
        span=span,
        DTYPE=TRITON_DTYPE[weight.dtype],
        PRECISION=precision,
        **tile,
    )
    dweight = torch.empty((N, K), dtype=weight.dtype, device=x.device)
    dbias = None if bias is None else torch.empty((N,), dtype=bias.dtype, device=x.device)
    dnorm = torch.empty((triton.cdiv(N, 32), 2, K), dtype=torch.float32, device=x.device)
    _finish_kernel[(triton.cdiv(N, 32), triton.cdiv(K, 128))](
        partial_ptr=partial,
        sums_ptr=sums,
        norm_weight_ptr=norm_weight,
        norm_bias_ptr=norm_bias,
        weight_ptr=weight,
        dweight_ptr=dweight,
        dbias_ptr=dbias,
        dnorm_ptr=dnorm,
        N=N,
        K=K,
        stride_weight=weight.stride(0),
        splits=splits,
        BLOCK_M=32,
        BLOCK_N=128,
        num_warps=4,
    )
    dnorm_weight, dnorm_bias = dnorm[:, 0].sum(0), dnorm[:, 1].sum(0)
    return dx, dnorm_weight.to(norm_weight.dtype), dnorm_bias.to(norm_bias.dtype), dweight, dbias
