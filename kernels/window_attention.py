"""Attention inside the windows of a feature map, shifted or not, with a learned bias of relative positions.

forward    s = scale·q·kᵀ + B + M      p = exp(s − max s)/Σ      o = p·v
backward   dp = do·vᵀ     ds = p∘(dp − Σ p∘dp)     dq = scale·ds·k     dk = scale·dsᵀ·q     dv = pᵀ·do
           dtable[r] = Σ ds over all windows and over the pairs of tokens that are r apart
           B[i, j] is the table's entry of the distance from token j to token i; M is −100 where the shift brought two
           tokens together that are no neighbours in the map, 0 elsewhere
shapes     qkv, dqkv [B, Y, X, 3, H, d]   o, do [B, Y, X, H·d]   table [(2·Wy − 1)·(2·Wx − 1), H]
           windows of Wy x Wx tokens, T = Wy·Wx, 64 at most; Y and X are multiples of theirs
saved      qkv and the table: a window's scores lie in one tile, so that its softmax is computed again without
           statistics, and Σ p∘dp without o
limit      forward 4·B·Y·X·H·d elements moved, 4·T·B·Y·X·H·d operations, T·B·Y·X·H exponentials; backward 7, 10 and once
           more those. At T = 49 and d = 32 moving takes several times as long as the operations

The map is never cut into windows, rolled or put together again in memory: a program computes where a window's tokens
lie. It has one head and a span of windows, one after the other, and what is the same for all of them, the bias and the
sums of its gradient, stays in registers. No atomics: each program writes its sums, and a second stage adds those.
"""

import math

import torch
import triton
import triton.language as tl

from .attention import probabilities
from .tile_table import lookup, residents

LOG2E = tl.constexpr(math.log2(math.e))
APART = tl.constexpr(-100.0)  # what models were trained with, and no −∞
FINISH_CHUNKS = 8  # partial sums that a step of the second stage adds


@triton.jit
def relative_bias(table_ptr, h, H, WINDOW: tl.constexpr, BLOCK: tl.constexpr):
    """B of a head [BLOCK, BLOCK], −∞ for keys past the window and 0 for such queries, whose softmax of finite keys is
    finite so: their do is zero, and with it what they add to dk and dv."""
    WY: tl.constexpr = WINDOW[0]
    WX: tl.constexpr = WINDOW[1]
    query, key = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    down, right = query // WX - key // WX, query % WX - key % WX
    entry = (down + WY - 1) * (2 * WX - 1) + right + WX - 1
    mask = (query < WY * WX) & (key < WY * WX)
    bias = tl.load(table_ptr + entry * H + h, mask=mask, other=0.0).to(tl.float32)
    return tl.where(key < WY * WX, bias, -float("inf"))


@triton.jit
def tokens_of(window, Y, X, shift_y, shift_x, WINDOW: tl.constexpr, BLOCK: tl.constexpr):
    """The image of a window, where its tokens lie in the map, y·X + x, which of them there are, and the region that
    each comes from: the map is shifted up and left, and what leaves it comes in again on the other side."""
    WY: tl.constexpr = WINDOW[0]
    WX: tl.constexpr = WINDOW[1]
    token = tl.arange(0, BLOCK)
    across = X // WX
    row = window // across  # of windows, over all images
    down = Y // WY
    top, left = row % down * WY + shift_y, window % across * WX + shift_x
    y, x = top + token // WX, left + token % WX
    region = 2 * (token // WX >= Y - top).to(tl.int32) + (token % WX >= X - left).to(tl.int32)
    y, x = tl.where(y >= Y, y - Y, y), tl.where(x >= X, x - X, x)
    return (row // down).to(tl.int64), (y * X + x)[:, None], (token < WY * WX)[:, None], region


@triton.jit
def exponentials(q, k, bias, region, scale, PRECISION: tl.constexpr):
    """exp(s − max s) [BLOCK, BLOCK] in fp32, and the sum of each row."""
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale + bias
    s = tl.where(region[:, None] == region[None, :], s, s + APART)
    STATISTIC: tl.constexpr = tl.float64 if q.dtype == tl.float32 else tl.float32
    reference = tl.max(s, 1).to(STATISTIC) * LOG2E
    p = probabilities(s, reference[:, None], LOG2E)
    return p, tl.sum(p, 1)


@triton.jit(do_not_specialize=["count", "span", "H", "Y", "X", "shift_y", "shift_x"])
def _forward_kernel(
    qkv_ptr, table_ptr, o_ptr,
    count, span, H, Y, X, shift_y, shift_x, scale,
    HEAD: tl.constexpr, WINDOW: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    h, first = tl.program_id(0) % H, tl.program_id(0) // H * span  # a window's heads run together: they share its lines
    bias = relative_bias(table_ptr, h, H, WINDOW, BLOCK)
    cols = h * HEAD + tl.arange(0, HEAD)[None, :]
    for window in range(first, min(first + span, count)):
        image, pixel, mask, region = tokens_of(window, Y, X, shift_y, shift_x, WINDOW, BLOCK)
        ptrs = qkv_ptr + image * Y * X * (3 * H * HEAD) + (pixel * (3 * H * HEAD) + cols)
        q = tl.load(ptrs, mask=mask, other=0.0)  # [BLOCK, HEAD]
        k = tl.load(ptrs + H * HEAD, mask=mask, other=0.0)
        v = tl.load(ptrs + 2 * H * HEAD, mask=mask, other=0.0)
        p, total = exponentials(q, k, bias, region, scale, PRECISION)
        o = tl.dot(p.to(v.dtype), v, input_precision=PRECISION) * (1.0 / total)[:, None]
        o_ptrs = o_ptr + image * Y * X * (H * HEAD) + (pixel * (H * HEAD) + cols)
        tl.store(o_ptrs, o.to(o_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["count", "span", "H", "Y", "X", "shift_y", "shift_x"])
def _grad_kernel(
    qkv_ptr, table_ptr, do_ptr, dqkv_ptr, partial_ptr,
    count, span, H, Y, X, shift_y, shift_x, scale,
    HEAD: tl.constexpr, WINDOW: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dqkv, and in partial [programs/H, H, T, T] the sums of ds over this program's windows, None where nobody asks."""
    h, first = tl.program_id(0) % H, tl.program_id(0) // H * span
    bias = relative_bias(table_ptr, h, H, WINDOW, BLOCK)
    dbias = tl.zeros([BLOCK, BLOCK], tl.float32)
    cols = h * HEAD + tl.arange(0, HEAD)[None, :]
    DTYPE: tl.constexpr = dqkv_ptr.dtype.element_ty
    # As in attention.py, what LLVM would lift out of the loop takes more registers than there are.
    for window in tl.range(first, min(first + span, count), disable_licm=True):
        image, pixel, mask, region = tokens_of(window, Y, X, shift_y, shift_x, WINDOW, BLOCK)
        ptrs = qkv_ptr + image * Y * X * (3 * H * HEAD) + (pixel * (3 * H * HEAD) + cols)
        q = tl.load(ptrs, mask=mask, other=0.0)  # [BLOCK, HEAD]
        k = tl.load(ptrs + H * HEAD, mask=mask, other=0.0)
        p, total = exponentials(q, k, bias, region, scale, PRECISION)
        p *= (1.0 / total)[:, None]
        # Loads and products stand where their results are used: elsewhere they spill on sm_80 and sm_100.
        do = tl.load(do_ptr + image * Y * X * (H * HEAD) + (pixel * (H * HEAD) + cols), mask=mask, other=0.0)
        v = tl.load(ptrs + 2 * H * HEAD, mask=mask, other=0.0)
        ptrs = dqkv_ptr + image * Y * X * (3 * H * HEAD) + (pixel * (3 * H * HEAD) + cols)
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)  # [BLOCK, BLOCK]
        # dv and dk as [HEAD, BLOCK], so that no accumulator is transposed to be an operand.
        dv = tl.dot(tl.trans(do), p.to(DTYPE), input_precision=PRECISION)
        tl.store(ptrs + 2 * H * HEAD, tl.trans(dv).to(DTYPE), mask=mask)
        ds = p * dp
        ds -= p * tl.sum(ds, 1)[:, None]
        dbias += ds
        dq = tl.dot(ds.to(DTYPE), k, input_precision=PRECISION) * scale
        tl.store(ptrs, dq.to(DTYPE), mask=mask)
        dk = tl.dot(tl.trans(q), ds.to(DTYPE), input_precision=PRECISION) * scale
        tl.store(ptrs + H * HEAD, tl.trans(dk).to(DTYPE), mask=mask)
    if partial_ptr is not None:
        T: tl.constexpr = WINDOW[0] * WINDOW[1]
        query, key = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
        sums = partial_ptr + tl.program_id(0).to(tl.int64) * (T * T)
        tl.store(sums + query * T + key, dbias, mask=(query < T) & (key < T))


@triton.jit(do_not_specialize=["chunks", "H"])
def _table_grad_kernel(
    partial_ptr, dtable_ptr,
    chunks, H,
    WINDOW: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """dtable[entry, h] = Σ of the partials [chunks, H, T, T] over the pairs of tokens that are this entry apart."""
    WY: tl.constexpr = WINDOW[0]
    WX: tl.constexpr = WINDOW[1]
    T: tl.constexpr = WY * WX
    entry, h = tl.program_id(0) // H, tl.program_id(0) % H
    down, right = entry // (2 * WX - 1) - (WY - 1), entry % (2 * WX - 1) - (WX - 1)
    query = tl.arange(0, BLOCK)
    y, x = query // WX - down, query % WX - right  # the key's place in its window
    there = (query < T) & (y >= 0) & (y < WY) & (x >= 0) & (x < WX)
    sums = tl.zeros([CHUNKS, BLOCK], tl.float32)
    for start in range(0, chunks, CHUNKS):
        chunk = start + tl.arange(0, CHUNKS)[:, None]
        place = (chunk.to(tl.int64) * H + h) * (T * T) + (query * T + y * WX + x)[None, :]
        sums += tl.load(partial_ptr + place, mask=(chunk < chunks) & there[None, :], other=0.0)
    tl.store(dtable_ptr + tl.program_id(0), tl.sum(sums).to(dtable_ptr.dtype.element_ty))


def _work(kernel: str, qkv, window, shift, scale: float, precision: str) -> tuple[int, dict]:
    """How many programs share a head's windows, and what a launch of either direction takes."""
    B, Y, X, _, H, d = qkv.shape
    count = B * (Y // window[0]) * (X // window[1])
    span = -(-count // max(1, residents(kernel, qkv.device, qkv.dtype) // H))
    arguments = {
        **{"count": count, "span": span, "Y": Y, "X": X, "shift_y": shift[0], "shift_x": shift[1], "scale": scale},
        **{"H": H, "HEAD": d, "WINDOW": tuple(window), "BLOCK": _block(window), "PRECISION": precision},
        **lookup(kernel, qkv.device, qkv.dtype),
    }
    return -(-count // span), arguments


def _block(window) -> int:
    return max(16, triton.next_power_of_2(window[0] * window[1]))


def forward(qkv, table, window, shift, scale: float, precision: str):
    """o [B, Y, X, H·d] of a contiguous qkv [B, Y, X, 3, H, d]."""
    B, Y, X, _, H, d = qkv.shape
    o = torch.empty((B, Y, X, H * d), dtype=qkv.dtype, device=qkv.device)
    chunks, arguments = _work("window_attention_forward", qkv, window, shift, scale, precision)
    _forward_kernel[(chunks * H,)](qkv_ptr=qkv, table_ptr=table, o_ptr=o, **arguments)
    return o


def backward(do, qkv, table, window, shift, scale: float, precision: str, trained: bool):
    """dqkv and the gradient of the table, None where that is not `trained`, of contiguous do and qkv."""
    H, T = qkv.shape[4], window[0] * window[1]
    dqkv = torch.empty_like(qkv)
    chunks, arguments = _work("window_attention_grad", qkv, window, shift, scale, precision)
    partial = torch.empty((chunks, H, T, T), dtype=torch.float32, device=qkv.device) if trained else None
    _grad_kernel[(chunks * H,)](
        qkv_ptr=qkv, table_ptr=table, do_ptr=do, dqkv_ptr=dqkv, partial_ptr=partial, **arguments
    )
    if partial is None:
        return dqkv, None
    dtable = torch.empty_like(table)
    _table_grad_kernel[(table.numel(),)](
        partial_ptr=partial, dtable_ptr=dtable, chunks=chunks, H=H, WINDOW=tuple(window), BLOCK=_block(window),
        CHUNKS=FINISH_CHUNKS, num_warps=4,
    )  # fmt: skip
    return dqkv, dtable
