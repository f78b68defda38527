"""Softmax attention that never writes its scores, on strided views of queries, keys and values.

forward    S = c·q·kᵀ, c = scale·log₂e     P = 2^(S − lse),  lse = log₂ Σₙ 2^S     o = P·v
backward   Δ = Σ o∘do          dS = P∘(do·vᵀ − Δ)
           dq = scale·dS·k     dk = scale·dSᵀ·q     dv = Pᵀ·do
shapes     q [B, Tq, H, d]   k, v [B, Tk, H, d], any strides but 1 in d   o [B, Tq, H·d]   lse, Δ [B, H, Tq]
saved      q, k, v, o and lse: P [B, H, Tq, Tk] is computed again. What lse loses by rounding is an error of a whole row
           of P: it stays in base 2, in float32 for half precision and in float64 for float32

Each direction has two forms; neither needs atomics, and both give the same bits in every run.

whole      up to the LONGEST of the tile's entry, 272 tokens at most: a program has all of a head's keys at once, in
           pieces of a power of two, 197 as 128 + 64 + 16. The pieces are what is compiled; how many tokens there are is
           a mask of the last piece, so that a new size of image compiles nothing new until its pieces are others.
           forward: a program a head, or a query tile where heads are few; all scores of a tile at once, one softmax
           without rescaling. Where heads fill a Hopper hopper_attention.py has another form of it.
           backward: a program a head, five products. All queries stay, and dq is summed over key tiles in registers,
           half as many as dk and dv would take; dk and dv of a key tile are whole when the next begins
streaming  beyond. forward: one pass over key tiles; m is the largest score so far, l = Σ 2^(S − m), both mended when m
           grows. backward: seven products, P twice, because each gradient is the sum of one program over the other axis
limit      4·B·H·Tq·Tk·d operations and B·H·Tq·Tk exponentials forward; 10 times that product and as many exponentials
           backward, 14 and twice as many where it streams
           4·B·T·H·d elements moved forward; 8 backward, 12 where it streams, and what is read again comes from L2

d is cut in a main piece, a power of two, and a tail: 80 = 64 + 16 and not 128. A tile [rows, d] is a tuple of its
pieces, (main,) or (main, tail). HEAD is (d, main, tail, what divides every stride).
"""

import functools
import math

import torch
import triton
import triton.language as tl

from .product import add_dot, early, wait_for_launch_before
from .tile_table import architecture, lookup, multiprocessors

GLUON = triton.__version__.startswith("3.6.")  # whose it is that hopper_attention is written in: 3.9 has other names
if GLUON:
    from . import hopper_attention

LN2 = tl.constexpr(math.log(2))
LOWEST = tl.constexpr(torch.finfo(torch.float32).min)
HEADS_TO_FILL = 4  # a multiprocessor


@triton.jit
def head_view(x, b, h, HEAD: tl.constexpr):
    """One head of one image of a view [B, T, H, d], (pointer, strides of B, T and H): its pointer and token stride."""
    ptr, stride_b, stride_t, stride_h = x
    ALIGN: tl.constexpr = HEAD[3]
    offset = b.to(tl.int64) * stride_b + h.to(tl.int64) * stride_h
    return ptr + tl.multiple_of(offset, ALIGN), stride_t


@triton.jit
def columns(view, rows, n_rows, START: tl.constexpr, SIZE: tl.constexpr, HEAD: tl.constexpr):
    """Pointers and mask of columns START to START + SIZE of a head's rows; n_rows None: all of them are there."""
    ptr, stride_t = view
    ALIGN: tl.constexpr = HEAD[3]
    offsets = tl.multiple_of(rows.to(tl.int64) * stride_t, ALIGN)
    cols = START + tl.arange(0, SIZE)
    mask = tl.full([1, 1], True, tl.int1) if n_rows is None else rows[:, None] < n_rows
    if HEAD[0] < START + SIZE:
        mask = mask & (cols[None, :] < HEAD[0])
    return ptr + offsets[:, None] + cols[None, :], mask


@triton.jit
def load_head(view, rows, n_rows, HEAD: tl.constexpr):
    """Rows of a head, ([len(rows), main], [len(rows), tail]), zeros outside."""
    ptrs, mask = columns(view, rows, n_rows, 0, HEAD[1], HEAD)
    tile = (tl.load(ptrs, mask=mask, other=0.0),)
    if HEAD[2]:
        ptrs, mask = columns(view, rows, n_rows, HEAD[1], HEAD[2], HEAD)
        tile = (tile[0], tl.load(ptrs, mask=mask, other=0.0))
    return tile


@triton.jit
def store_head(view, tile, rows, n_rows, HEAD: tl.constexpr):
    """Write a tile of a head in the dtype of its tensor."""
    dtype: tl.constexpr = view[0].dtype.element_ty
    ptrs, mask = columns(view, rows, n_rows, 0, HEAD[1], HEAD)
    tl.store(ptrs, tile[0].to(dtype), mask=mask)
    if HEAD[2]:
        ptrs, mask = columns(view, rows, n_rows, HEAD[1], HEAD[2], HEAD)
        tl.store(ptrs, tile[1].to(dtype), mask=mask)


@triton.jit
def zero_head(ROWS: tl.constexpr, HEAD: tl.constexpr):
    """The sums of a tile before the first of them."""
    MAIN: tl.constexpr = HEAD[1]
    TAIL: tl.constexpr = HEAD[2]
    tile = (tl.zeros([ROWS, MAIN], tl.float32),)
    if TAIL:
        tile = (tile[0], tl.zeros([ROWS, TAIL], tl.float32))
    return tile


@triton.jit
def scale_head(tile, factor):
    """Each row of a tile times its factor."""
    scaled = (tile[0] * factor,)
    if len(tile) == 2:
        scaled = (scaled[0], tile[1] * factor)
    return scaled


@triton.jit
def transpose_head(tile):
    """([main, rows], [tail, rows]) of ([rows, main], [rows, tail]), and back."""
    turned = (tl.trans(tile[0]),)
    if len(tile) == 2:
        turned = (turned[0], tl.trans(tile[1]))
    return turned


@triton.jit
def row_sums(a, b):
    """Σ a∘b over d, in fp32, of two tiles."""
    sums = tl.sum(a[0].to(tl.float32) * b[0].to(tl.float32), 1)
    if len(a) == 2:
        sums += tl.sum(a[1].to(tl.float32) * b[1].to(tl.float32), 1)
    return sums


@triton.jit
def dot_rows(a, b, PRECISION: tl.constexpr):
    """a·bᵀ, each row of one tile with each row of the other, sum in fp32."""
    sums = tl.dot(a[0], tl.trans(b[0]), input_precision=PRECISION)
    if len(a) == 2:
        sums = tl.dot(a[1], tl.trans(b[1]), sums, input_precision=PRECISION)
    return sums


@triton.jit
def add_product(sums, weights, x, PRECISION: tl.constexpr):
    """sums + weights·x, the weights rounded to the dtype of x."""
    weights = weights.to(x[0].dtype)
    tile = (add_dot(sums[0], weights, x[0], PRECISION),)
    if len(x) == 2:
        tile = (tile[0], add_dot(sums[1], weights, x[1], PRECISION))
    return tile


@triton.jit
def add_turned_product(sums, x, weights, PRECISION: tl.constexpr):
    """sums + xᵀ·weights, that is (weightsᵀ·x)ᵀ, the weights rounded to the dtype of x."""
    weights = weights.to(x[0].dtype)
    tile = (add_dot(sums[0], tl.trans(x[0]), weights, PRECISION),)
    if len(x) == 2:
        tile = (tile[0], add_dot(sums[1], tl.trans(x[1]), weights, PRECISION))
    return tile


@triton.jit
def probabilities(s, lse, scale_log2):
    """2^(scale·s − lse) of scores and a log-sum-exp that broadcasts to them."""
    if lse.dtype == tl.float64:
        # In the units of the scores, so that large ones are near to lse and their difference is exact.
        reference = lse / scale_log2
        high = reference.to(tl.float32)
        difference = s - high
        # An exponent of -5 is rounded to 2⁻²², 2^ of it by as much: what the difference (Knuth's sum of two numbers)
        # and the product lost goes back into the result.
        shift = difference - s
        rest = (s - (difference - shift)) - (high + shift) - (reference - high).to(tl.float32)
        exponent = difference * scale_log2
        lost = tl.fma(difference, scale_log2, -exponent) + rest * scale_log2
        p = tl.exp2(exponent)
        p = tl.where(p > 0, p + p * (lost * LN2), p)  # of a masked key, at −∞, no difference is left
    else:
        p = tl.exp2(s * scale_log2 - lse)
    return p


@triton.jit
def tile_of_head(T, H, BLOCK: tl.constexpr):
    """This program's head, b·H + h, b and h, and its rows: one head's tiles run together, to share its keys in L2."""
    program = tl.program_id(0)
    tiles = tl.cdiv(T, BLOCK)
    head = program // tiles
    return head.to(tl.int64), head // H, head % H, program % tiles * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def rows_of(i: tl.constexpr, PIECES: tl.constexpr):
    """The rows of piece i."""
    first = 0
    for j in tl.static_range(i):
        first += PIECES[j]
    return first + tl.arange(0, PIECES[i])


@triton.jit
def load_pieces(view, n_rows, PIECES: tl.constexpr, HEAD: tl.constexpr):
    """All rows of a head, a tile a piece; the last alone has rows outside."""
    tiles = ()
    for i in tl.static_range(len(PIECES)):
        if i < len(PIECES) - 1:
            tiles += (load_head(view, rows_of(i, PIECES), None, HEAD),)
        else:
            tiles += (load_head(view, rows_of(i, PIECES), n_rows, HEAD),)
    return tiles


@triton.jit(do_not_specialize=["Tq", "Tk", "span"])
def _forward_kernel(
    q, k, v, o,
    lse_ptr,
    H, Tq, Tk, span, scale_log2,
    HEAD: tl.constexpr, PRECISION: tl.constexpr, PIECES: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """A span of a head's queries, a tile after the other: its keys and values are loaded once."""
    wait_for_launch_before()
    spans = tl.cdiv(Tq, span)
    program = tl.program_id(0) // spans
    head, b, h = program.to(tl.int64), program // H, program % H
    first = tl.program_id(0) % spans * span
    k_tiles = load_pieces(head_view(k, b, h, HEAD), Tk, PIECES, HEAD)
    v_tiles = load_pieces(head_view(v, b, h, HEAD), Tk, PIECES, HEAD)  # now, so that they arrive during the softmax
    q_view, o_view = head_view(q, b, h, HEAD), head_view(o, b, h, HEAD)
    # As in `_grad_kernel`, what LLVM would lift out of the loop takes more registers than there are.
    for row in tl.range(first, min(first + span, Tq), BLOCK_M, disable_licm=True):
        rows = row + tl.arange(0, BLOCK_M)
        q_tile = load_head(q_view, rows, Tq, HEAD)  # [BLOCK_M, d]
        LSE_DTYPE: tl.constexpr = tl.float64 if q_tile[0].dtype == tl.float32 else tl.float32
        scores = ()
        highest = tl.full([BLOCK_M], -float("inf"), tl.float32)
        for i in tl.static_range(len(PIECES)):
            s = dot_rows(q_tile, k_tiles[i], PRECISION)  # [BLOCK_M, PIECES[i]]
            if i == len(PIECES) - 1:
                s = tl.where(rows_of(i, PIECES)[None, :] < Tk, s, -float("inf"))
            scores += (s,)
            highest = tl.maximum(highest, tl.max(s, 1))
        reference = highest.to(LSE_DTYPE) * scale_log2
        total = tl.zeros([BLOCK_M], tl.float32)
        sums = zero_head(BLOCK_M, HEAD)
        for i in tl.static_range(len(PIECES)):
            p = probabilities(scores[i], reference[:, None], scale_log2)
            total += tl.sum(p, 1)
            sums = add_product(sums, p, v_tiles[i], PRECISION)
        store_head(o_view, scale_head(sums, (1.0 / total)[:, None]), rows, Tq, HEAD)
        if lse_ptr is not None:
            tl.store(lse_ptr + head * Tq + rows, reference + tl.log2(total.to(LSE_DTYPE)), mask=rows < Tq)


@triton.jit(do_not_specialize=["Tq", "Tk"])
def _forward_streaming_kernel(
    q, k, v, o,
    lse_ptr,
    H, Tq, Tk, scale_log2,
    HEAD: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    wait_for_launch_before()
    head, b, h, rows = tile_of_head(Tq, H, BLOCK_M)
    q_tile = load_head(head_view(q, b, h, HEAD), rows, Tq, HEAD)  # [BLOCK_M, d]
    k_view, v_view = head_view(k, b, h, HEAD), head_view(v, b, h, HEAD)
    LSE_DTYPE: tl.constexpr = tl.float64 if q_tile[0].dtype == tl.float32 else tl.float32
    # Not −∞, from which scores that are −∞ have no difference, and times the scale not −∞ either.
    highest = tl.full([BLOCK_M], 0.5 * LOWEST, tl.float32) / tl.maximum(scale_log2, 1.0)
    # In float64 for float32, as lse: of hundreds of tiles each sum is rounded, and P of the whole row with the last.
    total = tl.zeros([BLOCK_M], LSE_DTYPE)
    sums = zero_head(BLOCK_M, HEAD)
    for start in range(0, Tk, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        s = dot_rows(q_tile, load_head(k_view, keys, Tk, HEAD), PRECISION)  # [BLOCK_M, BLOCK_N]
        s = tl.where(keys[None, :] < Tk, s, -float("inf"))
        higher = tl.maximum(highest, tl.max(s, 1))
        reference = higher.to(LSE_DTYPE) * scale_log2
        p = probabilities(s, reference[:, None], scale_log2)
        shrink = tl.exp2((highest - higher) * scale_log2)
        total = total * shrink + tl.sum(p, 1)
        sums = scale_head(sums, shrink[:, None])
        sums = add_product(sums, p, load_head(v_view, keys, Tk, HEAD), PRECISION)
        highest = higher
    o_tile = scale_head(sums, (1.0 / total).to(tl.float32)[:, None])
    store_head(head_view(o, b, h, HEAD), o_tile, rows, Tq, HEAD)
    if lse_ptr is not None:
        lse = highest.to(LSE_DTYPE) * scale_log2 + tl.log2(total)
        tl.store(lse_ptr + head * Tq + rows, lse, mask=rows < Tq)


@triton.jit(do_not_specialize=["Tq", "Tk"])
def _grad_kernel(
    q, k, v, o, do, dq, dk, dv,
    lse_ptr,
    H, Tq, Tk, scale, scale_log2,
    HEAD: tl.constexpr, PRECISION: tl.constexpr, PIECES: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    head, b, h = program.to(tl.int64), program // H, program % H
    q_tiles = load_pieces(head_view(q, b, h, HEAD), Tq, PIECES, HEAD)
    do_tiles = load_pieces(head_view(do, b, h, HEAD), Tq, PIECES, HEAD)
    o_tiles = load_pieces(head_view(o, b, h, HEAD), Tq, PIECES, HEAD)
    lse, delta, dq_sums = (), (), ()
    for i in tl.static_range(len(PIECES)):
        # A query outside has a score, lse, do and delta of 0, so that its p is 1 and it adds 0 (to finite keys).
        rows = rows_of(i, PIECES)
        lse += (tl.load(lse_ptr + head * Tq + rows, mask=rows < Tq, other=0.0),)
        delta += (row_sums(o_tiles[i], do_tiles[i]),)
        dq_sums += (zero_head(PIECES[i], HEAD),)
    k_view, v_view = head_view(k, b, h, HEAD), head_view(v, b, h, HEAD)
    dk_view, dv_view = head_view(dk, b, h, HEAD), head_view(dv, b, h, HEAD)
    # What LLVM would lift out of the loop, addresses of operands in shared memory, takes more registers than there are.
    for start in tl.range(0, Tk, BLOCK_N, disable_licm=True):
        keys = start + tl.arange(0, BLOCK_N)
        k_tile = load_head(k_view, keys, Tk, HEAD)  # [BLOCK_N, d]
        v_tile = load_head(v_view, keys, Tk, HEAD)
        # dk and dv are summed as [d, BLOCK_N]: no accumulator is ever transposed to be an operand. Both operands of
        # these two products come from shared memory; dq's left one comes from registers, as that of P·v does forward.
        dk_sums, dv_sums = transpose_head(zero_head(BLOCK_N, HEAD)), transpose_head(zero_head(BLOCK_N, HEAD))
        added = ()
        for i in tl.static_range(len(PIECES)):
            s = dot_rows(q_tiles[i], k_tile, PRECISION)  # [PIECES[i], BLOCK_N]
            # The score of a key outside is 0, and 2^(0 − lse) may be infinite: no product with a zero mends that.
            p = tl.where(keys[None, :] < Tk, probabilities(s, lse[i][:, None], scale_log2), 0.0)
            dv_sums = add_turned_product(dv_sums, do_tiles[i], p, PRECISION)
            ds = p * (dot_rows(do_tiles[i], v_tile, PRECISION) - delta[i][:, None])
            added += (add_product(dq_sums[i], ds, k_tile, PRECISION),)
            dk_sums = add_turned_product(dk_sums, q_tiles[i], ds, PRECISION)
        dq_sums = added
        store_head(dk_view, scale_head(transpose_head(dk_sums), scale), keys, Tk, HEAD)
        store_head(dv_view, transpose_head(dv_sums), keys, Tk, HEAD)
    dq_view = head_view(dq, b, h, HEAD)
    for i in tl.static_range(len(PIECES)):
        store_head(dq_view, scale_head(dq_sums[i], scale), rows_of(i, PIECES), Tq, HEAD)


@triton.jit(do_not_specialize=["Tq", "Tk"])
def _query_grad_kernel(
    q, k, v, o, do, dq,
    lse_ptr, delta_ptr,
    H, Tq, Tk, scale, scale_log2,
    HEAD: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    head, b, h, rows = tile_of_head(Tq, H, BLOCK_M)
    q_tile = load_head(head_view(q, b, h, HEAD), rows, Tq, HEAD)  # [BLOCK_M, d]
    do_tile = load_head(head_view(do, b, h, HEAD), rows, Tq, HEAD)
    o_tile = load_head(head_view(o, b, h, HEAD), rows, Tq, HEAD)
    delta = row_sums(o_tile, do_tile)
    tl.store(delta_ptr + head * Tq + rows, delta, mask=rows < Tq)
    lse = tl.load(lse_ptr + head * Tq + rows, mask=rows < Tq, other=0.0)
    k_view, v_view = head_view(k, b, h, HEAD), head_view(v, b, h, HEAD)
    sums = zero_head(BLOCK_M, HEAD)
    for start in range(0, Tk, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        k_tile = load_head(k_view, keys, Tk, HEAD)  # [BLOCK_N, d]
        v_tile = load_head(v_view, keys, Tk, HEAD)
        s = dot_rows(q_tile, k_tile, PRECISION)  # [BLOCK_M, BLOCK_N]
        # The score of a key outside is 0, and 2^(0 − lse) may be infinite: no product with a zero mends that.
        p = tl.where(keys[None, :] < Tk, probabilities(s, lse[:, None], scale_log2), 0.0)
        ds = p * (dot_rows(do_tile, v_tile, PRECISION) - delta[:, None])
        sums = add_product(sums, ds, k_tile, PRECISION)
    store_head(head_view(dq, b, h, HEAD), scale_head(sums, scale), rows, Tq, HEAD)


@triton.jit(do_not_specialize=["Tq", "Tk"])
def _key_grad_kernel(
    q, k, v, do, dk, dv,
    lse_ptr, delta_ptr,
    H, Tq, Tk, scale, scale_log2,
    HEAD: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    head, b, h, keys = tile_of_head(Tk, H, BLOCK_N)
    k_tile = load_head(head_view(k, b, h, HEAD), keys, Tk, HEAD)  # [BLOCK_N, d]
    v_tile = load_head(head_view(v, b, h, HEAD), keys, Tk, HEAD)
    q_view, do_view = head_view(q, b, h, HEAD), head_view(do, b, h, HEAD)
    dk_sums, dv_sums = zero_head(BLOCK_N, HEAD), zero_head(BLOCK_N, HEAD)
    for start in range(0, Tq, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        q_tile = load_head(q_view, rows, Tq, HEAD)  # [BLOCK_M, d]
        do_tile = load_head(do_view, rows, Tq, HEAD)
        # A query outside has a score, lse, do and delta of 0, so that its p is 1 and it adds 0 (to finite keys).
        lse = tl.load(lse_ptr + head * Tq + rows, mask=rows < Tq, other=0.0)
        delta = tl.load(delta_ptr + head * Tq + rows, mask=rows < Tq, other=0.0)
        # Scores are made with the keys as rows: no accumulator is ever transposed to be an operand.
        s = dot_rows(k_tile, q_tile, PRECISION)  # [BLOCK_N, BLOCK_M]
        p = probabilities(s, lse[None, :], scale_log2)
        dv_sums = add_product(dv_sums, p, do_tile, PRECISION)
        ds = p * (dot_rows(v_tile, do_tile, PRECISION) - delta[None, :])
        dk_sums = add_product(dk_sums, ds, q_tile, PRECISION)
    store_head(head_view(dk, b, h, HEAD), scale_head(dk_sums, scale), keys, Tk, HEAD)
    store_head(head_view(dv, b, h, HEAD), dv_sums, keys, Tk, HEAD)


@triton.jit
def _maps_kernel(
    q, k,
    lse_ptr, maps_ptr,
    H, Tq, Tk, scale_log2,
    HEAD: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    head, b, h, rows = tile_of_head(Tq, H, BLOCK_M)
    q_tile = load_head(head_view(q, b, h, HEAD), rows, Tq, HEAD)  # [BLOCK_M, d]
    k_view = head_view(k, b, h, HEAD)
    lse = tl.load(lse_ptr + head * Tq + rows, mask=rows < Tq, other=0.0)
    maps_ptrs = maps_ptr + ((head * Tq + rows) * Tk)[:, None]
    for start in range(0, Tk, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        s = dot_rows(q_tile, load_head(k_view, keys, Tk, HEAD), PRECISION)  # [BLOCK_M, BLOCK_N]
        p = probabilities(s, lse[:, None], scale_log2)
        tl.store(maps_ptrs + keys[None, :], p, mask=(rows[:, None] < Tq) & (keys[None, :] < Tk))


@functools.cache
def head_pieces(width: int) -> tuple[int, int]:
    """A head's width as a power of two and a tail, each 16 at least: (64, 16) for 72 and 80, (128, 0) for 104."""
    main = max(16, 1 << (width.bit_length() - 1))
    tail = max(16, triton.next_power_of_2(width - main)) if width > main else 0
    return (2 * main, 0) if tail == main else (main, tail)


@functools.cache
def row_pieces(tokens: int) -> tuple[int, ...]:
    """The powers of two, 16 to 128, that cover a head's rows, large ones first: (128, 64, 16) for 193 to 208."""
    left, pieces = -(-max(tokens, 1) // 16) * 16, []
    while left:
        pieces.append(min(128, 1 << (left.bit_length() - 1)))
        left -= pieces[-1]
    return tuple(pieces)


@functools.cache
def _classes(width: int) -> tuple[str, str]:
    """The shape classes of a form that takes a head as a whole, short ones first."""
    width = sum(head_pieces(width))
    return f"{width}", f"{width} long"


def _whole(kernel: str, x: torch.Tensor, tokens: int) -> dict | None:
    """The tile of a form that takes a head as a whole, None where no entry lets it have so many tokens."""
    for shape_class in _classes(x.shape[-1]):
        tile = dict(lookup(kernel, x.device, x.dtype, shape_class))
        if tokens <= tile.pop("LONGEST"):
            return tile
    return None


def _streaming(kernel: str, x: torch.Tensor) -> dict:
    return lookup(kernel, x.device, x.dtype, "64" if sum(head_pieces(x.shape[-1])) <= 64 else "128")


def _arguments(precision: str, *views: torch.Tensor) -> dict:
    """What every launch on these [B, T, H, d] views takes: the number of heads, how d is cut and aligned."""
    H, width = views[0].shape[2:]
    # What divides each stride: triton sees a divisor of 16 by itself, but heads of 72 elements begin at multiples of 8.
    align = math.gcd(8, *(stride for view in views for stride in view.stride()[:-1]))
    return {"H": H, "HEAD": (width, *head_pieces(width), align), "PRECISION": precision}


def _view(x: torch.Tensor) -> tuple:
    return x, *x.stride()[:-1]


def _log2(scale: float) -> float:
    """What multiplies the scores, so that 2^ takes the place of exp."""
    return scale * math.log2(math.e)


def forward(q, k, v, scale: float, precision: str, with_lse: bool):
    """o [B, Tq, H·d], and lse [B, H, Tq], to base 2, or None."""
    (B, Tq, H, d), Tk = q.shape, k.shape[1]
    o = torch.empty((B, Tq, H, d), dtype=q.dtype, device=q.device)
    lse = None
    if with_lse:
        dtype = torch.float64 if q.dtype == torch.float32 else torch.float32
        lse = torch.empty((B, H, Tq), dtype=dtype, device=q.device)
    arguments = {
        **_arguments(precision, q, k, v, o),
        **{"q": _view(q), "k": _view(k), "v": _view(v), "o": _view(o), "lse_ptr": lse},
        **{"Tq": Tq, "Tk": Tk, "scale_log2": _log2(scale)},
        **early(q.device, B * Tq, H * d),
    }
    fills = B * H >= HEADS_TO_FILL * multiprocessors(q.device)
    if GLUON and fills and architecture(q.device) == "sm_90" and hopper_attention.takes(q, k, v):
        head = d, *head_pieces(d)
        hopper_attention.forward(q, o, lse, _log2(scale), multiprocessors(q.device), row_pieces(Tk), head)
    elif tile := _whole("attention_forward", q, Tk):
        # Where heads alone fill the device each has one program: its keys come once, not once for each tile of queries.
        span = Tq if fills else tile["BLOCK_M"]
        programs = B * H * triton.cdiv(Tq, span)
        _forward_kernel[(programs,)](**arguments, **tile, span=span, PIECES=row_pieces(Tk))
    else:
        tile = _streaming("attention_forward_streaming", q)
        _forward_streaming_kernel[(B * H * triton.cdiv(Tq, tile["BLOCK_M"]),)](**arguments, **tile)
    return o.view(B, Tq, H * d), lse


def backward(do, q, k, v, o, lse, dq, dk, dv, scale: float, precision: str) -> None:
    """Writes dq, dk and dv, views as q, k and v are. do and o are [B, Tq, H·d]."""
    (B, Tq, H, d), Tk = q.shape, k.shape[1]
    do, o = do.unflatten(-1, (H, d)), o.unflatten(-1, (H, d))
    arguments = {
        **_arguments(precision, q, k, v, o, do, dq, dk, dv),
        **{"q": _view(q), "k": _view(k), "v": _view(v), "do": _view(do), "lse_ptr": lse},
        **{"Tq": Tq, "Tk": Tk, "scale": scale, "scale_log2": _log2(scale)},
    }
    if tile := _whole("attention_grad", q, max(Tq, Tk)):
        views = {"o": _view(o), "dq": _view(dq), "dk": _view(dk), "dv": _view(dv)}
        _grad_kernel[(B * H,)](**arguments, **views, PIECES=row_pieces(Tq), **tile)
        return
    arguments["delta_ptr"] = torch.empty((B, H, Tq), dtype=torch.float32, device=q.device)
    tile = _streaming("attention_query_grad", q)
    programs = B * H * triton.cdiv(Tq, tile["BLOCK_M"])
    _query_grad_kernel[(programs,)](**arguments, o=_view(o), dq=_view(dq), **tile)
    tile = _streaming("attention_key_grad", q)
    programs = B * H * triton.cdiv(Tk, tile["BLOCK_N"])
    _key_grad_kernel[(programs,)](**arguments, dk=_view(dk), dv=_view(dv), **tile)


def maps(q, k, lse, scale: float, precision: str):
    """P [B, H, Tq, Tk] in fp32 from the log-sum-exp [B, H, Tq] of the same queries."""
    (B, Tq, H, _), Tk = q.shape, k.shape[1]
    rows = torch.empty((B, H, Tq, Tk), dtype=torch.float32, device=q.device)
    tile = _streaming("attention_maps", q)
    _maps_kernel[(B * H * triton.cdiv(Tq, tile["BLOCK_M"]),)](
        q=_view(q), k=_view(k), lse_ptr=lse, maps_ptr=rows, Tq=Tq, Tk=Tk, scale_log2=_log2(scale),
        **_arguments(precision, q, k), **tile,
    )  # fmt: skip
    return rows
