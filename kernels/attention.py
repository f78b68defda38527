"""Softmax attention that never writes its scores, on strided views of queries, keys and values.

forward    S = c·q·kᵀ, c = scale·log₂e     P = 2^(S − lse),  lse = log₂ Σₙ 2^S     o = P·v
           one pass over the keys: m is the largest score so far, l = Σ 2^(S − m), both mended when m grows
backward   Δ = Σ o∘do          dS = P∘(do·vᵀ − Δ)
           dq = scale·dS·k     dk = scale·dSᵀ·q     dv = Pᵀ·do
shapes     q [B, Tq, H, d]   k, v [B, Tk, H, d], any strides but 1 in d   o [B, Tq, H·d]   lse, Δ [B, H, Tq]
saved      q, k, v, o and lse. P [B, H, Tq, Tk] is computed again, twice, because each gradient is the sum of one
           program over the other axis: no atomics, and the same bits in every run. What lse loses by rounding is an
           error of a whole row of P: it stays in base 2, in float32 for half precision and in float64 for float32
limit      4·B·H·Tq·Tk·d operations and B·H·Tq·Tk exponentials forward, 14 and 2 times that product backward;
           4·B·T·H·d elements moved forward

d is cut in a main piece, a power of two, and a tail: 80 = 64 + 16 and not 128. A tile [rows, d] is a tuple of its
pieces, (main,) or (main, tail).
"""

import math

import torch
import triton
import triton.language as tl

from .tile_table import lookup


@triton.jit
def head_view(x, b, h, ALIGN: tl.constexpr):
    """One head of one image of a view [B, T, H, d], (pointer, strides of B, T and H): its pointer and token stride."""
    ptr, stride_b, stride_t, stride_h = x
    offset = b.to(tl.int64) * stride_b + h.to(tl.int64) * stride_h
    return ptr + tl.multiple_of(offset, ALIGN), stride_t


@triton.jit
def piece(view, rows, n_rows, START: tl.constexpr, SIZE: tl.constexpr, D: tl.constexpr, ALIGN: tl.constexpr):
    """Pointers and mask of columns START to START + SIZE of a head's rows."""
    ptr, stride_t = view
    offsets = tl.multiple_of(rows.to(tl.int64) * stride_t, ALIGN)
    cols = START + tl.arange(0, SIZE)
    mask = rows[:, None] < n_rows
    if START + SIZE > D:
        mask = mask & (cols[None, :] < D)
    return ptr + offsets[:, None] + cols[None, :], mask


@triton.jit
def load_head(view, rows, n_rows, D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, ALIGN: tl.constexpr):
    """Rows of a head, ([len(rows), MAIN], [len(rows), TAIL]), zeros outside."""
    ptrs, mask = piece(view, rows, n_rows, 0, MAIN, D, ALIGN)
    tile = (tl.load(ptrs, mask=mask, other=0.0),)
    if TAIL:
        ptrs, mask = piece(view, rows, n_rows, MAIN, TAIL, D, ALIGN)
        tile = (tile[0], tl.load(ptrs, mask=mask, other=0.0))
    return tile


@triton.jit
def store_head(view, tile, rows, n_rows, D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, ALIGN: tl.constexpr):
    """Write a tile of a head in the dtype of its tensor."""
    dtype: tl.constexpr = view[0].dtype.element_ty
    ptrs, mask = piece(view, rows, n_rows, 0, MAIN, D, ALIGN)
    tl.store(ptrs, tile[0].to(dtype), mask=mask)
    if TAIL:
        ptrs, mask = piece(view, rows, n_rows, MAIN, TAIL, D, ALIGN)
        tl.store(ptrs, tile[1].to(dtype), mask=mask)


@triton.jit
def zero_head(ROWS: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr):
    """The sums of a tile before the first of them."""
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
    tile = (tl.dot(weights, x[0], sums[0], input_precision=PRECISION),)
    if len(x) == 2:
        tile = (tile[0], tl.dot(weights, x[1], sums[1], input_precision=PRECISION))
    return tile


@triton.jit
def probabilities(s, lse, scale_log2):
    """2^(scale·s − lse) of scores and a log-sum-exp that broadcasts to them."""
    if lse.dtype == tl.float64:
        # In the units of the scores lse is near to them, so that their difference is exact, however large they are.
        reference = lse / scale_log2
        high = reference.to(tl.float32)
        exponent = (s - high - (reference - high).to(tl.float32)) * scale_log2
    else:
        exponent = s * scale_log2 - lse
    return tl.exp2(exponent)


@triton.jit
def tile_of_head(T, H, BLOCK: tl.constexpr):
    """This program's head, b·H + h, b and h, and its rows: one head's tiles run together, to share its keys in L2."""
    program = tl.program_id(0)
    tiles = tl.cdiv(T, BLOCK)
    head = program // tiles
    return head.to(tl.int64), head // H, head % H, program % tiles * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def _forward_kernel(
    q,
    k,
    v,
    o,
    lse_ptr,
    H,
    Tq,
    Tk,
    scale_log2,
    D: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    head, b, h, rows = tile_of_head(Tq, H, BLOCK_M)
    q_tile = load_head(head_view(q, b, h, ALIGN), rows, Tq, D, MAIN, TAIL, ALIGN)  # [BLOCK_M, d]
    k_view, v_view = head_view(k, b, h, ALIGN), head_view(v, b, h, ALIGN)
    LSE_DTYPE: tl.constexpr = tl.float64 if q_tile[0].dtype == tl.float32 else tl.float32
    highest = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    sums = zero_head(BLOCK_M, MAIN, TAIL)
    for start in range(0, Tk, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        s = dot_rows(q_tile, load_head(k_view, keys, Tk, D, MAIN, TAIL, ALIGN), PRECISION)  # [BLOCK_M, BLOCK_N]
        s = tl.where(keys[None, :] < Tk, s, -float("inf"))
        higher = tl.maximum(highest, tl.max(s, 1))
        p = probabilities(s, (higher.to(LSE_DTYPE) * scale_log2)[:, None], scale_log2)
        shrink = tl.exp2((highest - higher) * scale_log2)
        total = total * shrink + tl.sum(p, 1)
        sums = scale_head(sums, shrink[:, None])
        sums = add_product(sums, p, load_head(v_view, keys, Tk, D, MAIN, TAIL, ALIGN), PRECISION)
        highest = higher
    o_tile = scale_head(sums, (1.0 / total)[:, None])
    store_head(head_view(o, b, h, ALIGN), o_tile, rows, Tq, D, MAIN, TAIL, ALIGN)
    if lse_ptr is not None:
        lse = highest.to(LSE_DTYPE) * scale_log2 + tl.log2(total)
        tl.store(lse_ptr + head * Tq + rows, lse, mask=rows < Tq)


@triton.jit
def _query_grad_kernel(
    q,
    k,
    v,
    o,
    do,
    dq,
    lse_ptr,
    delta_ptr,
    H,
    Tq,
    Tk,
    scale,
    scale_log2,
    D: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    head, b, h, rows = tile_of_head(Tq, H, BLOCK_M)
    q_tile = load_head(head_view(q, b, h, ALIGN), rows, Tq, D, MAIN, TAIL, ALIGN)  # [BLOCK_M, d]
    do_tile = load_head(head_view(do, b, h, ALIGN), rows, Tq, D, MAIN, TAIL, ALIGN)
    o_tile = load_head(head_view(o, b, h, ALIGN), rows, Tq, D, MAIN, TAIL, ALIGN)
    delta = tl.sum(o_tile[0].to(tl.float32) * do_tile[0].to(tl.float32), 1)
    if TAIL:
        delta += tl.sum(o_tile[1].to(tl.float32) * do_tile[1].to(tl.float32), 1)
    tl.store(delta_ptr + head * Tq + rows, delta, mask=rows < Tq)
    lse = tl.load(lse_ptr + head * Tq + rows, mask=rows < Tq, other=0.0)
    k_view, v_view = head_view(k, b, h, ALIGN), head_view(v, b, h, ALIGN)
    sums = zero_head(BLOCK_M, MAIN, TAIL)
    for start in range(0, Tk, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        k_tile = load_head(k_view, keys, Tk, D, MAIN, TAIL, ALIGN)  # [BLOCK_N, d]
        v_tile = load_head(v_view, keys, Tk, D, MAIN, TAIL, ALIGN)
        s = dot_rows(q_tile, k_tile, PRECISION)  # [BLOCK_M, BLOCK_N]
        # The score of a key outside is 0, and 2^(0 − lse) may be infinite: no product with a zero mends that.
        p = tl.where(keys[None, :] < Tk, probabilities(s, lse[:, None], scale_log2), 0.0)
        ds = p * (dot_rows(do_tile, v_tile, PRECISION) - delta[:, None])
        sums = add_product(sums, ds, k_tile, PRECISION)
    store_head(head_view(dq, b, h, ALIGN), scale_head(sums, scale), rows, Tq, D, MAIN, TAIL, ALIGN)


@triton.jit
def _key_grad_kernel(
    q,
    k,
    v,
    do,
    dk,
    dv,
    lse_ptr,
    delta_ptr,
    H,
    Tq,
    Tk,
    scale,
    scale_log2,
    D: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    head, b, h, keys = tile_of_head(Tk, H, BLOCK_N)
    k_tile = load_head(head_view(k, b, h, ALIGN), keys, Tk, D, MAIN, TAIL, ALIGN)  # [BLOCK_N, d]
    v_tile = load_head(head_view(v, b, h, ALIGN), keys, Tk, D, MAIN, TAIL, ALIGN)
    q_view, do_view = head_view(q, b, h, ALIGN), head_view(do, b, h, ALIGN)
    dk_sums, dv_sums = zero_head(BLOCK_N, MAIN, TAIL), zero_head(BLOCK_N, MAIN, TAIL)
    for start in range(0, Tq, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        q_tile = load_head(q_view, rows, Tq, D, MAIN, TAIL, ALIGN)  # [BLOCK_M, d]
        do_tile = load_head(do_view, rows, Tq, D, MAIN, TAIL, ALIGN)
        # A query outside has a score, lse, do and delta of 0, so that its p is 1 and what it adds is 0.
        lse = tl.load(lse_ptr + head * Tq + rows, mask=rows < Tq, other=0.0)
        delta = tl.load(delta_ptr + head * Tq + rows, mask=rows < Tq, other=0.0)
        # Scores are made with the keys as rows: no accumulator is ever transposed to be an operand.
        s = dot_rows(k_tile, q_tile, PRECISION)  # [BLOCK_N, BLOCK_M]
        p = probabilities(s, lse[None, :], scale_log2)
        dv_sums = add_product(dv_sums, p, do_tile, PRECISION)
        ds = p * (dot_rows(v_tile, do_tile, PRECISION) - delta[None, :])
        dk_sums = add_product(dk_sums, ds, q_tile, PRECISION)
    store_head(head_view(dk, b, h, ALIGN), scale_head(dk_sums, scale), keys, Tk, D, MAIN, TAIL, ALIGN)
    store_head(head_view(dv, b, h, ALIGN), dv_sums, keys, Tk, D, MAIN, TAIL, ALIGN)


@triton.jit
def _maps_kernel(
    q,
    k,
    lse_ptr,
    maps_ptr,
    H,
    Tq,
    Tk,
    scale_log2,
    D: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    head, b, h, rows = tile_of_head(Tq, H, BLOCK_M)
    q_tile = load_head(head_view(q, b, h, ALIGN), rows, Tq, D, MAIN, TAIL, ALIGN)  # [BLOCK_M, d]
    k_view = head_view(k, b, h, ALIGN)
    lse = tl.load(lse_ptr + head * Tq + rows, mask=rows < Tq, other=0.0)
    maps_ptrs = maps_ptr + ((head * Tq + rows) * Tk)[:, None]
    for start in range(0, Tk, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        s = dot_rows(q_tile, load_head(k_view, keys, Tk, D, MAIN, TAIL, ALIGN), PRECISION)  # [BLOCK_M, BLOCK_N]
        p = probabilities(s, lse[:, None], scale_log2)
        tl.store(maps_ptrs + keys[None, :], p, mask=(rows[:, None] < Tq) & (keys[None, :] < Tk))


def head_pieces(width: int) -> tuple[int, int]:
    """A head's width as a power of two and a tail, each 16 at least: (64, 16) for 72 and 80, (128, 0) for 104."""
    main = max(16, 1 << (width.bit_length() - 1))
    tail = max(16, triton.next_power_of_2(width - main)) if width > main else 0
    return (2 * main, 0) if tail == main else (main, tail)


def _arguments(kernel: str, precision: str, *views: torch.Tensor) -> dict:
    """What every launch takes: the kernel's tile for these [B, T, H, d] views, and how d is cut and aligned."""
    x, width = views[0], views[0].shape[-1]
    main, tail = head_pieces(width)
    # What divides each stride: triton sees a divisor of 16 by itself, but heads of 72 elements begin at multiples of 8.
    align = math.gcd(8, *(stride for view in views for stride in view.stride()[:-1]))
    tile = lookup(kernel, x.device, x.dtype, "64" if main + tail <= 64 else "128")
    return {"H": x.shape[2], "D": width, "MAIN": main, "TAIL": tail, "ALIGN": align, "PRECISION": precision, **tile}


def _view(x: torch.Tensor) -> tuple:
    return x, *x.stride()[:-1]


def _log2(scale: float) -> float:
    """What multiplies the scores, so that 2^ takes the place of exp."""
    return scale * math.log2(math.e)


def forward(q, k, v, scale: float, precision: str, with_lse: bool):
    """o [B, Tq, H·d], and lse [B, H, Tq], to base 2, or None."""
    B, Tq, H, d = q.shape
    o = torch.empty((B, Tq, H, d), dtype=q.dtype, device=q.device)
    lse = None
    if with_lse:
        dtype = torch.float64 if q.dtype == torch.float32 else torch.float32
        lse = torch.empty((B, H, Tq), dtype=dtype, device=q.device)
    arguments = _arguments("attention_forward", precision, q, k, v, o)
    _forward_kernel[(B * H * triton.cdiv(Tq, arguments["BLOCK_M"]),)](
        q=_view(q),
        k=_view(k),
        v=_view(v),
        o=_view(o),
        lse_ptr=lse,
        Tq=Tq,
        Tk=k.shape[1],
        scale_log2=_log2(scale),
        **arguments,
    )
    return o.view(B, Tq, H * d), lse


def backward(do, q, k, v, o, lse, dq, dk, dv, scale: float, precision: str) -> None:
    """Writes dq, dk and dv, views as q, k and v are. do and o are [B, Tq, H·d]."""
    (B, Tq, H, d), Tk = q.shape, k.shape[1]
    do, o = do.unflatten(-1, (H, d)), o.unflatten(-1, (H, d))
    delta = torch.empty((B, H, Tq), dtype=torch.float32, device=q.device)
    arguments = _arguments("attention_query_grad", precision, q, k, v, o, do, dq)
    _query_grad_kernel[(B * H * triton.cdiv(Tq, arguments["BLOCK_M"]),)](
        q=_view(q),
        k=_view(k),
        v=_view(v),
        o=_view(o),
        do=_view(do),
        dq=_view(dq),
        lse_ptr=lse,
        delta_ptr=delta,
        Tq=Tq,
        Tk=Tk,
        scale=scale,
        scale_log2=_log2(scale),
        **arguments,
    )
    arguments = _arguments("attention_key_grad", precision, q, k, v, do, dk, dv)
    _key_grad_kernel[(B * H * triton.cdiv(Tk, arguments["BLOCK_N"]),)](
        q=_view(q),
        k=_view(k),
        v=_view(v),
        do=_view(do),
        dk=_view(dk),
        dv=_view(dv),
        lse_ptr=lse,
        delta_ptr=delta,
        Tq=Tq,
        Tk=Tk,
        scale=scale,
        scale_log2=_log2(scale),
        **arguments,
    )


def maps(q, k, lse, scale: float, precision: str):
    """P [B, H, Tq, Tk] in fp32 from the log-sum-exp [B, H, Tq] of the same queries."""
    (B, Tq, H, _), Tk = q.shape, k.shape[1]
    rows = torch.empty((B, H, Tq, Tk), dtype=torch.float32, device=q.device)
    arguments = _arguments("attention_maps", precision, q, k)
    _maps_kernel[(B * H * triton.cdiv(Tq, arguments["BLOCK_M"]),)](
        q=_view(q), k=_view(k), lse_ptr=lse, maps_ptr=rows, Tq=Tq, Tk=Tk, scale_log2=_log2(scale), **arguments
    )
    return rows
