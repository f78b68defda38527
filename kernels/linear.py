"""The gradients of a linear map y = drop∘γ∘(x·Wᵀ + b), shared by every op that has one; γ and drop may be absent.

dx = (drop∘dy∘γ)·W     G = (drop∘dy)ᵀ·x     s = Σ drop∘dy     dW = γ∘G     db = γ∘s     dγ = Σₖ W∘G + b∘s

drop∘dy and drop∘dy∘γ are written, where they are not dy itself, by the kernel that makes dy or by a light pass: what is
computed in registers on its way to wgmma costs the product more than that (kernels/layer_norm.py).

Weight gradients are summed over tokens in two deterministic stages: spans of tokens, each to a partial of its own in
fp32, then the partials of up to four gradients in one launch. The second stage applies what depends on the whole sum.
The tiles of a row of tiles share the tokens of s: where the first had them all, a launch of one round of programs took
8 to 25 % longer than one without s (H200, kernels-24badfa.json). Shared, the four of a block of ViT-L take 1,630 µs
where they took 1,929 (kernels.json).
"""

import functools
from typing import NamedTuple

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
    product_and_row_sums,
    rows_inner,
    rows_outer,
    scratch_memory,
    store_tile,
    tile_of,
    tiles,
    wait_for_launch_before,
)
from .tile_table import lookup, residents

# How many tokens a program multiplies in the time in which it writes its partial, and a later one reads it: 8 bytes an
# element at a multiprocessor's share of 4.3 TB/s against 2 operations an element and token at its share of 790 TFLOP/s.
PARTIAL_TOKENS = 750
# How many sums of dy over tokens a second stage adds at most, a power of two.
MOST_SUMS = tl.constexpr(16)
# The rows of a program of the second stage, and how many columns it has at once.
FINISH_TILE = {"BLOCK_M": 2, "BLOCK_N": 1024}

# ---- the gradient of a branch --------------------------------------------------------------------------------------


NO_BRANCH = (None, None, None, None, 0.0)  # for a kernel that could take a branch and has none


@triton.jit
def store_branch(dy, branch, row, col, M, N):
    """Of a tile of dy [M, N] in fp32 drop∘dy and drop∘dy∘γ, each where it is wanted; `branch` is from `branch_of`."""
    scale_ptr, drop_ptr, dropped_ptr, scaled_ptr, tokens_per_image = branch
    BLOCK_M: tl.constexpr = dy.shape[0]
    BLOCK_N: tl.constexpr = dy.shape[1]
    dtype: tl.constexpr = scaled_ptr.dtype.element_ty
    if drop_ptr is not None:
        dy *= load_drop(drop_ptr, row + tl.arange(0, BLOCK_M), tl.cast(tokens_per_image, tl.int32), M)
    if dropped_ptr is not None:
        store_tile(matrix(dropped_ptr, M, N, N, BLOCK_M, BLOCK_N, False), dy, row, col, dtype)
    if scale_ptr is not None:
        dy *= load_vector(scale_ptr, col + tl.arange(0, BLOCK_N), N)[None, :]
    store_tile(matrix(scaled_ptr, M, N, N, BLOCK_M, BLOCK_N, False), dy, row, col, dtype)


@triton.jit(do_not_specialize=["M"])
def _branch_kernel(dy_ptr, branch, M, N, stride_dy, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    row, col = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_N
    dy = load_tile(matrix(dy_ptr, M, N, stride_dy, BLOCK_M, BLOCK_N, False), row, col, BLOCK_M, BLOCK_N)
    store_branch(dy.to(tl.float32), branch, row, col, M, N)


def branch_of(y, layer_scale, drop, tokens_per_image, dtype) -> tuple | None:
    """What `store_branch` takes for a gradient that has the shape and dtype of y [M, N], with memory for its results
    in `dtype`; None where both are that gradient itself."""
    if layer_scale is None and drop is None and y.dtype == dtype:
        return None
    scaled = torch.empty(y.shape, dtype=dtype, device=y.device)
    apart = layer_scale is not None and (drop is not None or y.dtype != dtype)  # neither dy nor what is scaled
    dropped = torch.empty_like(scaled) if apart else None
    return layer_scale, drop, dropped, scaled, float(tokens_per_image)  # a float as in `finish`


def gradients_of(branch: tuple | None, dy):
    """drop∘dy and drop∘dy∘γ, both [M, N], once `store_branch` was through: one tensor twice where they are the same."""
    if branch is None:
        return dy, dy
    layer_scale, _, dropped, scaled, _ = branch
    if dropped is None:
        dropped = scaled if layer_scale is None else dy
    return dropped, scaled


def branch_gradient(dy, layer_scale, drop, tokens_per_image, dtype):
    """drop∘dy and drop∘dy∘γ, both [M, N] in `dtype`, by a pass over dy where they are not dy itself."""
    branch = branch_of(dy, layer_scale, drop, tokens_per_image, dtype)
    if branch is not None:
        M, N = dy.shape
        _branch_kernel[(-(-M // 16), -(-N // 256))](
            dy_ptr=dy, branch=branch, M=M, N=N, stride_dy=dy.stride(0), BLOCK_M=16, BLOCK_N=256, num_warps=4
        )
    return gradients_of(branch, dy)


# ---- input gradient ------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["M"])
def _input_grad_kernel(
    dy_ptr, weight_ptr, dx_ptr,
    M, N, K, stride_dy, stride_weight,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PIECES: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dx [M, N] = dy·W, dy [M, K], W [K, N]: K is what the map gives, and what this product sums over."""
    wait_for_launch_before()
    DTYPE: tl.constexpr = weight_ptr.dtype.element_ty
    WIDTH: tl.constexpr = BLOCK_N // PIECES
    dy = matrix(dy_ptr, M, K, stride_dy, BLOCK_M, BLOCK_K, TMA)
    weight = matrix(weight_ptr, K, N, stride_weight, BLOCK_K, BLOCK_N, TMA)
    dx = matrix(dx_ptr, M, N, N, BLOCK_M, WIDTH, TMA == 1)
    for tile in tl.range(tl.program_id(0), count_tiles(M, N, BLOCK_M, BLOCK_N), tl.num_programs(0), flatten=True):
        row, col = tile_of(tile, M, N, BLOCK_M, BLOCK_N)
        sums = product(
            rows_outer, dy, rows_inner, weight, row, col, 0, K, DTYPE, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION
        )  # fmt: skip
        pieces = column_pieces(sums, PIECES)
        for piece in tl.static_range(PIECES):
            store_tile(dx, pieces[piece], row, col + piece * WIDTH, DTYPE)


def input_grad(dy, weight, precision):
    """dx [M, K] = dy·W, of dy [M, N] and the weight [N, K], all of one dtype."""
    (M, N), K = dy.shape, weight.shape[1]
    dx = torch.empty((M, K), dtype=weight.dtype, device=dy.device)
    launch_tiles(
        _input_grad_kernel, "linear_input_grad", M, K, weight.dtype, (dy, weight, dx),
        dy_ptr=dy, weight_ptr=weight, dx_ptr=dx, K=N, stride_dy=dy.stride(0), stride_weight=weight.stride(0),
        PRECISION=precision,
    )  # fmt: skip
    return dx


# ---- weight gradient -----------------------------------------------------------------------------------------------


class Partials(NamedTuple):
    """The first stage of a weight's gradient, and what the second needs."""

    partial: torch.Tensor  # [splits, N, K] in fp32
    sums: torch.Tensor | None  # [splits·sharers, N] in fp32, where there is a bias
    weight: torch.Tensor
    bias: torch.Tensor | None
    layer_scale: torch.Tensor | None


@triton.jit(do_not_specialize=["M"])
def _weight_grad_kernel(
    dy_ptr, x_ptr, partial_ptr, sums_ptr,
    M, N, K, stride_dy, stride_x, span, share,
    DTYPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """First stage: partial[split] = dyᵀ·x over this program's span of tokens, and sums[split, sharer] = Σ dy.

    dy [M, N], x [M, K], partial [splits, N, K], sums [splits, sharers, N]. A sharer is a column of tiles, each of whose
    programs sums `share` tokens of its span; sums_ptr is None where nobody needs them. Not persistent: the spans make
    as many programs as the device holds, and each has a long sum to itself.
    """
    row, col = tile_of(tl.program_id(0), N, K, BLOCK_M, BLOCK_N)
    split = tl.program_id(1)
    start = split * span
    stop = min(start + span, M)
    dy = matrix(dy_ptr, M, N, stride_dy, BLOCK_K, BLOCK_M, TMA)
    x = matrix(x_ptr, M, K, stride_x, BLOCK_K, BLOCK_N, TMA)
    partial = matrix(partial_ptr + split.to(tl.int64) * N * K, N, K, K, BLOCK_M, BLOCK_N, False)
    if sums_ptr is None:
        grad = product(
            rows_inner, dy, rows_inner, x, row, col, start, stop, DTYPE, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION
        )  # fmt: skip
    else:
        sharer, sharers = col // BLOCK_N, tl.cdiv(span, share)
        first = min(start + sharer * share, stop)
        grad, sums = product_and_row_sums(
            rows_inner, dy, rows_inner, x, row, col, start, stop, first, min(first + share, stop),
            DTYPE, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
        )  # fmt: skip
        rows = row + tl.arange(0, BLOCK_M)
        mine = (rows < N) & (tl.broadcast_to(sharer, rows.shape) < sharers)
        tl.store(sums_ptr + (split * sharers + sharer) * N + rows, sums, mask=mine)
    store_tile(partial, grad, row, col, tl.float32)


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


def weight_grad(dy, x, weight, bias, layer_scale, precision) -> Partials:
    """The first stage of dW, db and dγ: drop∘dy [M, N] and x [M, K], both in the dtype of the weight [N, K]."""
    (M, N), K, dtype, device = dy.shape, x.shape[1], weight.dtype, dy.device
    tile = lookup("linear_weight_grad", device, dtype)
    slots = residents("linear_weight_grad", device, dtype)
    splits, span = split_tokens(tiles(N, K, tile), M, tile["BLOCK_K"], slots)
    partial = torch.empty((splits, N, K), dtype=torch.float32, device=device)
    share = -(-span // min(-(-K // tile["BLOCK_N"]), MOST_SUMS.value // splits))
    share += -share % tile["BLOCK_K"]
    sums = None if bias is None else torch.empty((splits * -(-span // share), N), dtype=torch.float32, device=device)
    with scratch_memory():
        _weight_grad_kernel[(tiles(N, K, tile), splits)](
            dy_ptr=dy, x_ptr=x, partial_ptr=partial, sums_ptr=sums, M=M, N=N, K=K, stride_dy=dy.stride(0),
            stride_x=x.stride(0), span=span, share=share, DTYPE=TRITON_DTYPE[dtype], PRECISION=precision,
            **described(tile, (dy, x)),
        )  # fmt: skip
    return Partials(partial, sums, weight, bias, layer_scale)


@triton.jit
def _finish_rows(gradient, mine, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """These rows of dW = γ∘G, db = γ∘s and dγ = Σₖ W∘G + b∘s, where they are `mine`."""
    (
        partial_ptr, sums_ptr, weight_ptr, bias_ptr, scale_ptr, dweight_ptr, dbias_ptr, dscale_ptr,
        N, K, stride_weight, splits, count,
    ) = gradient  # fmt: skip
    splits = tl.cast(splits, tl.int32)
    row = tl.program_id(0) * BLOCK_M
    rows = row + tl.arange(0, BLOCK_M)
    # Masks and no branch, of which there would be four in a row.
    inside = rows < tl.where(mine, N, 0)
    stop = tl.where(mine, K, 0)
    dweight = matrix(dweight_ptr, N, K, K, BLOCK_M, BLOCK_N, False)
    weight = matrix(weight_ptr, N, K, stride_weight, BLOCK_M, BLOCK_N, False)
    scale = tl.full([BLOCK_M], 1.0, tl.float32)
    dscale = tl.zeros([BLOCK_M], tl.float32)
    if scale_ptr is not None:
        scale = load_vector(scale_ptr, rows, N)
    for col in range(0, stop, BLOCK_N):
        grad = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for split in range(splits):
            partial = matrix(partial_ptr + tl.cast(split, tl.int64) * N * K, N, K, K, BLOCK_M, BLOCK_N, False)
            grad += load_tile(partial, row, col, BLOCK_M, BLOCK_N)
        store_tile(dweight, grad * scale[:, None], row, col, dweight_ptr.dtype.element_ty)
        if scale_ptr is not None:
            dscale += tl.sum(load_tile(weight, row, col, BLOCK_M, BLOCK_N).to(tl.float32) * grad, axis=1)
    if sums_ptr is not None:
        shares = tl.arange(0, MOST_SUMS)[:, None]
        there = (shares < tl.cast(count, tl.int32)) & (rows[None, :] < N)
        sums = tl.sum(tl.load(sums_ptr + shares * N + rows[None, :], mask=there, other=0.0), axis=0)
        tl.store(dbias_ptr + rows, sums * scale, mask=inside)
        if scale_ptr is not None:
            dscale += load_vector(bias_ptr, rows, N) * sums
    if scale_ptr is not None:
        tl.store(dscale_ptr + rows, dscale, mask=inside)


@triton.jit
def _finish_kernel(first, second, third, fourth, COUNT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The second stage of COUNT gradients, the second axis of the grid."""
    which = tl.program_id(1)
    _finish_rows(first, which == 0, BLOCK_M, BLOCK_N)
    if COUNT > 1:
        _finish_rows(second, which == 1, BLOCK_M, BLOCK_N)
    if COUNT > 2:
        _finish_rows(third, which == 2, BLOCK_M, BLOCK_N)
    if COUNT > 3:
        _finish_rows(fourth, which == 3, BLOCK_M, BLOCK_N)


def finish(*gradients: Partials | None) -> list:
    """(dW, db, dγ), None where absent, of each of one to four gradients, in one launch; or all are None."""
    if gradients[0] is None:
        return [(None, None, None)] * len(gradients)
    # How many spans and sums there are is a float: Triton would compile another kernel for an integer of 1 or of 16.
    found, groups = [], [None] * 4
    for index, (partial, sums, weight, bias, layer_scale) in enumerate(gradients):
        splits, N, K = partial.shape
        dweight = torch.empty((N, K), dtype=weight.dtype, device=partial.device)
        dbias, dscale = (
            None if t is None else torch.empty((N,), dtype=t.dtype, device=partial.device) for t in (bias, layer_scale)
        )
        found.append((dweight, dbias, dscale))
        groups[index] = (
            partial, sums, weight, bias, layer_scale, dweight, dbias, dscale, N, K, weight.stride(0), float(splits),
            0.0 if sums is None else float(len(sums)),
        )  # fmt: skip
    rows = max(len(gradient.weight) for gradient in gradients)
    _finish_kernel[(-(-rows // FINISH_TILE["BLOCK_M"]), len(gradients))](
        first=groups[0], second=groups[1], third=groups[2], fourth=groups[3], COUNT=len(gradients), **FINISH_TILE,
        num_warps=4,
    )  # fmt: skip
    return found
