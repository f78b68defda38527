"""The gradients of a linear map y = drop∘γ∘(x·Wᵀ + b), shared by every op that has one; γ and drop may be absent.

dx = drop∘((dy∘γ)·W)     G = (drop∘dy)ᵀ·x     s = Σ drop∘dy     dW = γ∘G     db = γ∘s     dγ = Σₖ W∘G + b∘s

Weight gradients are summed over tokens in two deterministic stages: spans of tokens, each to a partial of its own in
fp32, then the partials. The second stage applies what depends on the whole sum.
"""

import functools

import torch
import triton
import triton.language as tl

from .product import (
    TRITON_DTYPE,
    column_pieces,
    count_tiles,
    described,
    launch_tiles,
    load_drop,
    load_tile,
    load_vector,
    matrix,
    product,
    row_sums,
    rows_inner,
    scaled_rows_inner,
    scaled_rows_outer,
    scratch_memory,
    store_tile,
    tile_of,
    tiles,
)
from .tile_table import lookup, residents

# How many tokens a program multiplies in the time in which it writes its partial, and a later one reads it: 8 bytes an
# element at a multiprocessor's share of 4.3 TB/s against 2 operations an element and token at its share of 790 TFLOP/s.
PARTIAL_TOKENS = 750

# ---- input gradient ------------------------------------------------------------------------------------------------


@triton.jit
def _input_grad_kernel(
    dy_ptr, weight_ptr, scale_ptr, drop_ptr, dx_ptr,
    M, N, K, stride_dy, stride_weight, tokens_per_image,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PIECES: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dx [M, N] = drop∘((dy∘γ)·W), dy [M, K], W [K, N]: K is what the map gives, and what this product sums over."""
    DTYPE: tl.constexpr = weight_ptr.dtype.element_ty
    WIDTH: tl.constexpr = BLOCK_N // PIECES
    dy = (matrix(dy_ptr, M, K, stride_dy, BLOCK_M, BLOCK_K, TMA), scale_ptr, K)
    weight = matrix(weight_ptr, K, N, stride_weight, BLOCK_K, BLOCK_N, TMA)
    dx = matrix(dx_ptr, M, N, N, BLOCK_M, WIDTH, TMA)
    for tile in tl.range(tl.program_id(0), count_tiles(M, N, BLOCK_M, BLOCK_N), tl.num_programs(0), flatten=True):
        row, col = tile_of(tile, M, N, BLOCK_M, BLOCK_N)
        sums = product(
            scaled_rows_outer, dy, rows_inner, weight, row, col, 0, K, DTYPE, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION
        )  # fmt: skip
        if drop_ptr is not None:
            sums *= load_drop(drop_ptr, row + tl.arange(0, BLOCK_M), tokens_per_image, M)
        pieces = column_pieces(sums, PIECES)
        for piece in tl.static_range(PIECES):
            store_tile(dx, pieces[piece], row, col + piece * WIDTH, DTYPE)


def linear_input_grad(dy, weight, layer_scale, drop, tokens_per_image, precision):
    """dx [M, K] in the dtype of the weight [N, K] from dy [M, N] in any dtype."""
    (M, N), K = dy.shape, weight.shape[1]
    dx = torch.empty((M, K), dtype=weight.dtype, device=dy.device)
    launch_tiles(
        _input_grad_kernel, "linear_input_grad", M, K, weight.dtype, (dy, weight, dx),
        dy_ptr=dy, weight_ptr=weight, scale_ptr=layer_scale, drop_ptr=drop, dx_ptr=dx, K=N, stride_dy=dy.stride(0),
        stride_weight=weight.stride(0), tokens_per_image=tokens_per_image, PRECISION=precision,
    )  # fmt: skip
    return dx


# ---- weight gradient -----------------------------------------------------------------------------------------------


@triton.jit
def weight_grad_tile(
    a,
    load_b: tl.constexpr,
    b,
    partial_ptr, sums_ptr,
    N, K, tokens, span,
    DTYPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """First stage: partial[split] = A·Bᵀ over this program's span of tokens, and sums[split] = A·1.

    A [N, tokens], scaled, B [K, tokens], partial [splits, N, K], sums [splits, N]. The sums are done by the first
    column of tiles alone; sums_ptr is None where nobody needs them. Not persistent: the spans make as many programs as
    the device holds, and each has a long sum to itself.
    """
    row, col = tile_of(tl.program_id(0), N, K, BLOCK_M, BLOCK_N)
    split = tl.program_id(1)
    start = split * span
    stop = min(start + span, tokens)
    result = product(
        scaled_rows_inner, a, load_b, b, row, col, start, stop, DTYPE, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION
    )  # fmt: skip
    partial = matrix(partial_ptr + split.to(tl.int64) * N * K, N, K, K, BLOCK_M, BLOCK_N, False)
    store_tile(partial, result, row, col, tl.float32)
    if sums_ptr is not None:
        if col == 0:
            rows = row + tl.arange(0, BLOCK_M)
            sums = row_sums(scaled_rows_inner, a, row, start, stop, BLOCK_M, BLOCK_K)
            tl.store(sums_ptr + split * N + rows, sums, mask=rows < N)


@triton.jit
def _weight_grad_kernel(
    dy_ptr, drop_ptr, x_ptr, partial_ptr, sums_ptr,
    M, N, K, stride_dy, stride_x, tokens_per_image, span,
    DTYPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    dy = matrix(dy_ptr, M, N, stride_dy, BLOCK_K, BLOCK_M, TMA)
    x = matrix(x_ptr, M, K, stride_x, BLOCK_K, BLOCK_N, TMA)
    weight_grad_tile(
        (dy, drop_ptr, M, tokens_per_image), rows_inner, x, partial_ptr, sums_ptr, N, K, M, span,
        DTYPE, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
    )  # fmt: skip


@triton.jit
def sum_partials(partial_ptr, splits, N, K, row, col, ROWS: tl.constexpr, COLS: tl.constexpr):
    """A tile of Σ partial, [splits, N, K]."""
    grad = tl.zeros([ROWS, COLS], tl.float32)
    for split in range(splits):
        partial = matrix(partial_ptr + tl.cast(split, tl.int64) * N * K, N, K, K, ROWS, COLS, False)
        grad += load_tile(partial, row, col, ROWS, COLS)
    return grad


@triton.jit
def _finish_kernel(
    partial_ptr, sums_ptr, weight_ptr, bias_ptr, scale_ptr, dweight_ptr, dbias_ptr, dscale_ptr,
    N, K, stride_weight, splits,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Second stage: with G = Σ partial and s = Σ sums, dW = γ∘G, db = γ∘s and dγ = Σₖ W∘G + b∘s; a program has rows."""
    row = tl.program_id(0) * BLOCK_M
    rows = row + tl.arange(0, BLOCK_M)
    dweight = matrix(dweight_ptr, N, K, K, BLOCK_M, BLOCK_N, False)
    weight = matrix(weight_ptr, N, K, stride_weight, BLOCK_M, BLOCK_N, False)
    scale = tl.full([BLOCK_M], 1.0, tl.float32)
    dscale = tl.zeros([BLOCK_M], tl.float32)
    if scale_ptr is not None:
        scale = load_vector(scale_ptr, rows, N)
    for col in range(0, K, BLOCK_N):
        grad = sum_partials(partial_ptr, splits, N, K, row, col, BLOCK_M, BLOCK_N)
        store_tile(dweight, grad * scale[:, None], row, col, dweight_ptr.dtype.element_ty)
        if scale_ptr is not None:
            dscale += tl.sum(load_tile(weight, row, col, BLOCK_M, BLOCK_N).to(tl.float32) * grad, axis=1)
    if sums_ptr is not None:
        sums = tl.zeros([BLOCK_M], tl.float32)
        for split in range(splits):
            sums += load_vector(sums_ptr + split * N, rows, N)
        tl.store(dbias_ptr + rows, sums * scale, mask=rows < N)
        if scale_ptr is not None:
            dscale += load_vector(bias_ptr, rows, N) * sums
    if scale_ptr is not None:
        tl.store(dscale_ptr + rows, dscale, mask=rows < N)


@functools.cache
def split_tokens(tiles: int, tokens: int, step: int, slots: int) -> tuple[int, int]:
    """How many programs share the sum over tokens of each tile of a gradient, and how many tokens each has.

    There are few tiles and a long sum, and programs come in rounds of `slots`: split so that the rounds are full, as
    far as the partials, written and read again, do not cost more than that gains. No span is under four steps.
    """
    splits = range(1, max(1, min(16, tokens // (4 * step))) + 1)
    best = min(splits, key=lambda s: -(-tiles * s // slots) / s + s * PARTIAL_TOKENS / tokens)
    span = -(-tokens // best)
    span += -span % step
    return -(-tokens // span), span


def launch_weight_grad(
    kernel, entry: str, M: int, N: int, K: int, dtype, matrices: tuple, with_sums: bool, **arguments
):
    """The first stage of an [N, K] gradient over M tokens: partial [S, N, K], and sums [S, N] or None.

    The arguments are as `launch_tiles`'s.
    """
    device = matrices[0].device
    tile = lookup(entry, device, dtype)
    splits, span = split_tokens(tiles(N, K, tile), M, tile["BLOCK_K"], residents(entry, device, dtype))
    partial = torch.empty((splits, N, K), dtype=torch.float32, device=device)
    sums = torch.empty((splits, N), dtype=torch.float32, device=device) if with_sums else None
    with scratch_memory():
        kernel[(tiles(N, K, tile), splits)](
            partial_ptr=partial, sums_ptr=sums, M=M, N=N, K=K, span=span, DTYPE=TRITON_DTYPE[dtype], **arguments,
            **described(tile, matrices),
        )  # fmt: skip
    return partial, sums


def linear_weight_grad(dy, x, weight, bias, layer_scale, drop, tokens_per_image, precision):
    """dW, db and dγ of y = drop∘γ∘(x·Wᵀ + b): dy [M, N] in any dtype, x [M, K] in that of the weight."""
    (M, N), K = dy.shape, x.shape[1]
    partial, sums = launch_weight_grad(
        _weight_grad_kernel, "linear_weight_grad", M, N, K, weight.dtype, (dy, x),
        with_sums=bias is not None, dy_ptr=dy, drop_ptr=drop, x_ptr=x, stride_dy=dy.stride(0), stride_x=x.stride(0),
        tokens_per_image=tokens_per_image, PRECISION=precision,
    )  # fmt: skip
    return linear_finish(partial, sums, weight, bias, layer_scale)


def linear_finish(partial, sums, weight, bias, layer_scale):
    """dW, db and dγ of y = γ∘(x·Wᵀ + b) from the first stage's partial [S, N, K] and sums [S, N], None without b."""
    splits, N, K = partial.shape
    device = partial.device
    dweight = torch.empty((N, K), dtype=weight.dtype, device=device)
    dbias = None if bias is None else torch.empty((N,), dtype=bias.dtype, device=device)
    dscale = None if layer_scale is None else torch.empty((N,), dtype=layer_scale.dtype, device=device)
    _finish_kernel[(-(-N // 4),)](
        partial_ptr=partial, sums_ptr=sums, weight_ptr=weight, bias_ptr=bias, scale_ptr=layer_scale,
        dweight_ptr=dweight, dbias_ptr=dbias, dscale_ptr=dscale, N=N, K=K, stride_weight=weight.stride(0),
        splits=splits, BLOCK_M=4, BLOCK_N=256, num_warps=4,
    )  # fmt: skip
    return dweight, dbias, dscale
