"""The gradients of a linear map y = drop∘γ∘(x·Wᵀ + b), shared by every op that has one; γ and drop may be absent.

dx = drop∘((dy∘γ)·W)     G = (drop∘dy)ᵀ·x     s = Σ drop∘dy     dW = γ∘G     db = γ∘s     dγ = Σₖ W∘G + b∘s

Weight gradients are summed over tokens in two deterministic stages: spans of tokens, each to a partial of its own in
fp32, then the partials. The second stage applies what depends on the whole sum.
"""

import torch
import triton
import triton.language as tl

from .product import TRITON_DTYPE, load_drop, load_vector, matrix, product, row_sums, store, tile_offsets, tiles
from .tile_table import lookup

# Weight gradients have few tiles and a long sum: the sum is split until this many programs share it, two waves of the
# 132 multiprocessors of an H100.
SPLIT_PROGRAMS = 264


# ---- input gradient ------------------------------------------------------------------------------------------------


@triton.jit
def input_grad_tile(
    dy_ptr,
    weight_ptr,
    scale_ptr,
    drop_ptr,
    M,
    N,
    K,
    stride_dy,
    stride_weight,
    tokens_per_image,
    rows,
    cols,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile of drop∘((dy∘γ)·W) in fp32."""
    dy = (dy_ptr, stride_dy, 1, M, N, scale_ptr, 1)
    w = (weight_ptr, stride_weight, 1, N, K, None, 1)
    dx = product(matrix, dy, matrix, w, rows, cols, 0, N, weight_ptr.dtype.element_ty, BLOCK_K, PRECISION)
    if drop_ptr is not None:
        dx *= load_drop(drop_ptr, rows, tokens_per_image, M)
    return dx


@triton.jit
def _input_grad_kernel(
    dy_ptr,
    weight_ptr,
    scale_ptr,
    drop_ptr,
    dx_ptr,
    M,
    N,
    K,
    stride_dy,
    stride_weight,
    tokens_per_image,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    rows, cols = tile_offsets(M, K, BLOCK_M, BLOCK_N)
    dx = input_grad_tile(
        dy_ptr, weight_ptr, scale_ptr, drop_ptr, M, N, K, stride_dy, stride_weight, tokens_per_image,
        rows, cols, BLOCK_K, PRECISION,
    )  # fmt: skip
    store(dx_ptr, K, dx, rows, cols, M, K)


def linear_input_grad(dy, weight, layer_scale, drop, tokens_per_image, precision):
    """dx [M, K] in the dtype of the weight [N, K] from dy [M, N] in any dtype."""
    (M, N), K = dy.shape, weight.shape[1]
    dx = torch.empty((M, K), dtype=weight.dtype, device=dy.device)
    tile = lookup("linear_input_grad", dy.device, weight.dtype)
    _input_grad_kernel[(tiles(M, K, tile),)](
        dy_ptr=dy,
        weight_ptr=weight,
        scale_ptr=layer_scale,
        drop_ptr=drop,
        dx_ptr=dx,
        M=M,
        N=N,
        K=K,
        stride_dy=dy.stride(0),
        stride_weight=weight.stride(0),
        tokens_per_image=tokens_per_image,
        PRECISION=precision,
        **tile,
    )
    return dx


# ---- weight gradient -----------------------------------------------------------------------------------------------


@triton.jit
def weight_grad_tile(
    load_a: tl.constexpr,
    a,
    load_b: tl.constexpr,
    b,
    partial_ptr,
    sums_ptr,
    N,
    K,
    tokens,
    span,
    DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """First stage: partial[split] = A·B over this program's span of tokens, and sums[split] = A·1.

    A [N, tokens], B [tokens, K], partial [splits, N, K], sums [splits, N]. The sums are done by the first column of
    tiles alone; sums_ptr is None where nobody needs them.
    """
    rows, cols = tile_offsets(N, K, BLOCK_M, BLOCK_N)
    split = tl.program_id(1)
    start = split * span
    stop = min(start + span, tokens)
    result = product(load_a, a, load_b, b, rows, cols, start, stop, DTYPE, BLOCK_K, PRECISION)
    store(partial_ptr + split.to(tl.int64) * N * K, K, result, rows, cols, N, K)
    if sums_ptr is not None:
        if tl.min(cols, axis=0) == 0:
            sums = row_sums(load_a, a, rows, start, stop, BLOCK_K)
            tl.store(sums_ptr + split * N + rows, sums, mask=rows < N)


@triton.jit
def _weight_grad_kernel(
    dy_ptr,
    drop_ptr,
    x_ptr,
    partial_ptr,
    sums_ptr,
    M,
    N,
    K,
    stride_dy,
    stride_x,
    tokens_per_image,
    span,
    DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    a = (dy_ptr, 1, stride_dy, N, M, drop_ptr, tokens_per_image)
    b = (x_ptr, stride_x, 1, M, K, None, 1)
    weight_grad_tile(
        matrix, a, matrix, b, partial_ptr, sums_ptr, N, K, M, span, DTYPE, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION
    )  # fmt: skip


@triton.jit
def _finish_kernel(
    partial_ptr,
    sums_ptr,
    weight_ptr,
    bias_ptr,
    scale_ptr,
    dweight_ptr,
    dbias_ptr,
    dscale_ptr,
    N,
    K,
    stride_weight,
    splits,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Second stage: with G = Σ partial and s = Σ sums, dW = γ∘G, db = γ∘s and dγ = Σₖ W∘G + b∘s; a program has rows."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    scale = tl.full([BLOCK_M], 1.0, tl.float32)
    dscale = tl.zeros([BLOCK_M], tl.float32)
    if scale_ptr is not None:
        scale = load_vector(scale_ptr, rows, N)
    for k in range(0, K, BLOCK_N):
        cols = k + tl.arange(0, BLOCK_N)
        grad = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for split in range(splits):
            grad += matrix((partial_ptr + tl.cast(split, tl.int64) * N * K, K, 1, N, K, None, 1), rows, cols)
        store(dweight_ptr, K, grad * scale[:, None], rows, cols, N, K)
        if scale_ptr is not None:
            weight = matrix((weight_ptr, stride_weight, 1, N, K, None, 1), rows, cols).to(tl.float32)
            dscale += tl.sum(weight * grad, axis=1)
    if sums_ptr is not None:
        sums = tl.zeros([BLOCK_M], tl.float32)
        for split in range(splits):
            sums += load_vector(sums_ptr + split * N, rows, N)
        tl.store(dbias_ptr + rows, sums * scale, mask=rows < N)
        if scale_ptr is not None:
            dscale += load_vector(bias_ptr, rows, N) * sums
    if scale_ptr is not None:
        tl.store(dscale_ptr + rows, dscale, mask=rows < N)


def split_tokens(N: int, K: int, tokens: int, tile: dict) -> tuple[int, int]:
    """How many programs share the sum over tokens of an [N, K] gradient, and how many tokens each has."""
    splits = max(1, min(SPLIT_PROGRAMS // tiles(N, K, tile), tokens // (4 * tile["BLOCK_K"])))
    span = triton.cdiv(triton.cdiv(tokens, splits), tile["BLOCK_K"]) * tile["BLOCK_K"]
    return triton.cdiv(tokens, span), span


def linear_weight_grad(dy, x, weight, bias, layer_scale, drop, tokens_per_image, precision):
    """dW, db and dγ of y = drop∘γ∘(x·Wᵀ + b): dy [M, N] in any dtype, x [M, K] in that of the weight."""
    (M, N), K = dy.shape, x.shape[1]
    tile = lookup("linear_weight_grad", x.device, weight.dtype)
    splits, span = split_tokens(N, K, M, tile)
    partial = torch.empty((splits, N, K), dtype=torch.float32, device=x.device)
    sums = None if bias is None else torch.empty((splits, N), dtype=torch.float32, device=x.device)
    _weight_grad_kernel[(tiles(N, K, tile), splits)](
        dy_ptr=dy,
        drop_ptr=drop,
        x_ptr=x,
        partial_ptr=partial,
        sums_ptr=sums,
        M=M,
        N=N,
        K=K,
        stride_dy=dy.stride(0),
        stride_x=x.stride(0),
        tokens_per_image=tokens_per_image,
        span=span,
        DTYPE=TRITON_DTYPE[weight.dtype],
        PRECISION=precision,
        **tile,
    )
    return linear_finish(partial, sums, weight, bias, layer_scale)


def linear_finish(partial, sums, weight, bias, layer_scale):
    """dW, db and dγ of y = γ∘(x·Wᵀ + b) from the first stage's partial [S, N, K] and sums [S, N], None without b."""
    splits, N, K = partial.shape
    device = partial.device
    dweight = torch.empty((N, K), dtype=weight.dtype, device=device)
    dbias = None if bias is None else torch.empty((N,), dtype=bias.dtype, device=device)
    dscale = None if layer_scale is None else torch.empty((N,), dtype=layer_scale.dtype, device=device)
    _finish_kernel[(triton.cdiv(N, 4),)](
        partial_ptr=partial,
        sums_ptr=sums,
        weight_ptr=weight,
        bias_ptr=bias,
        scale_ptr=layer_scale,
        dweight_ptr=dweight,
        dbias_ptr=dbias,
        dscale_ptr=dscale,
        N=N,
        K=K,
        stride_weight=weight.stride(0),
        splits=splits,
        BLOCK_M=4,
        BLOCK_N=256,
        num_warps=4,
    )
    return dweight, dbias, dscale
