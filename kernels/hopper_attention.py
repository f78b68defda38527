"""Attention of whole heads by warps that do one thing each, in Gluon, for Hopper: the forward pass of attention.py.

One warp loads keys and values, STAGES heads ahead, another queries, SLOTS tiles of 64 ahead, all by TMA. Two
warpgroups take the tiles in turn, t = 0, 1, 2, … of all heads of the program: scores, softmax, product with the values;
the result leaves by TMA through the place that the queries had. They ask for q·kᵀ strictly one after the other, so that
the softmax of one runs under the products of the other. Each has tiles of every head, for there are two and more.

arithmetic that of attention._forward_kernel
limit      4·B·H·T²·d operations, B·H·T² exponentials, 4·B·T·H·d elements moved, at 197 tokens the longest of the three
takes      q, k and v as views of one packed tensor; heads of 64 and 80; 65 to 272 tokens; half precision
in force   up to LONGEST tokens, where heads fill the device. On an H200 it takes three quarters of the time of
           attention._forward_kernel (docs/performance.md, "What was tried"). Its descriptors are made on the device:
           on the host each would cost a launch some ten microseconds, and would be another tensor's the next time

Barriers: places are full or empty by the parity of their round, i // STAGES of a head and t // SLOTS of a tile. SLOTS
is even, so that each warpgroup has places of its own, and has seen the round before of all that it waits for. `order`
is arrived at by a warpgroup once its products with the keys are done, and waited for by the other.

The interpreter has no Gluon: what this computes is tested on a GPU alone, tests/gpu/test_attention.py.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .product import scratch_memory

ROWS = gl.constexpr(64)  # of a tile of queries: as many as a warpgroup multiplies
STAGES = 2
LONGEST = 272  # tokens
SHARED = 232_448 - 1_536  # bytes that a block may have but for its barriers


def slots(pieces: tuple[int, ...], width: int) -> int:
    """How many tiles of queries have a place beside STAGES heads of keys and values: an even number, eight at most."""
    return min(8, (SHARED - STAGES * 4 * sum(pieces) * width) // (2 * ROWS.value * width)) // 2 * 2


def takes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether these [B, T, H, d] views are what the kernel takes."""
    T, H, d = q.shape[1:]
    if not (ROWS.value < T <= LONGEST and d in (64, 80) and q.element_size() == 2 and q.shape == k.shape == v.shape):
        return False
    behind = [x.storage_offset() - q.storage_offset() for x in (k, v)]
    packed = behind == [H * d, 2 * H * d] and q.stride() == k.stride() == v.stride() and q.stride()[2:] == (d, 1)
    one = q.untyped_storage()._cdata == k.untyped_storage()._cdata == v.untyped_storage()._cdata
    aligned = q.data_ptr() % 16 == 0 and q.stride(0) % 8 == 0 and q.stride(1) % 8 == 0
    apart = min(q.stride()[:2]) >= 3 * H * d  # neither expanded nor overlapping
    return packed and one and aligned and apart


# ---- loads ---------------------------------------------------------------------------------------------------------


@gluon.constexpr_function
def first_row(piece, PIECES):
    return sum(PIECES[:piece])


@gluon.jit
def descriptors(
    ptr, stride_b, stride_t, B, T, columns, PIECES: gl.constexpr, WIDTH: gl.constexpr, SWIZZLE: gl.constexpr
):
    """Of [B, T, columns] one for each size of piece, of WIDTH columns; a tuple as long as PIECES."""
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=SWIZZLE, element_bitwidth=16, rank=3)
    made = ()
    for p in gl.static_range(len(PIECES)):
        if p > 0 and PIECES[p] == PIECES[p - 1]:
            made += (made[p - 1],)
        else:
            made += (
                tma.make_tensor_descriptor(
                    ptr, [B, T, columns], [stride_b, stride_t, 1], [1, PIECES[p], WIDTH], LAYOUT
                ),
            )
    return made


@gluon.jit
def load_rows(sources, bufs, bar, b, col, stage, PIECES: gl.constexpr, TAIL: gl.constexpr):
    """All keys, or values, of a head into their place."""
    for p in gl.static_range(len(PIECES)):
        row = first_row(p, PIECES)
        tma.async_copy_global_to_shared(sources[0][p], [b, row, col], bar, bufs[0][p].index(stage))
        if TAIL:
            tma.async_copy_global_to_shared(sources[1][p], [b, row, col + 64], bar, bufs[1][p].index(stage))


@gluon.jit
def _load_keys(
    sources, bufs, bars, sizes, PIECES: gl.constexpr, HEAD: gl.constexpr, STAGES: gl.constexpr
):  # fmt: skip
    keys, values = bufs
    k_full, v_full, k_empty, v_empty = bars
    heads, H = sizes
    BYTES: gl.constexpr = first_row(len(PIECES), PIECES) * HEAD[0] * 2
    for i in range(gl.cdiv(heads - gl.program_id(0), gl.num_programs(0))):
        head = gl.program_id(0) + i * gl.num_programs(0)
        col = H * HEAD[0] + head % H * HEAD[0]
        stage, parity = i % STAGES, (i // STAGES) & 1
        mbarrier.wait(k_empty.index(stage), parity ^ 1)
        mbarrier.expect(k_full.index(stage), BYTES)
        load_rows(sources, keys, k_full.index(stage), head // H, col, stage, PIECES, HEAD[2])
        mbarrier.wait(v_empty.index(stage), parity ^ 1)
        mbarrier.expect(v_full.index(stage), BYTES)
        load_rows(sources, values, v_full.index(stage), head // H, col + H * HEAD[0], stage, PIECES, HEAD[2])


@gluon.jit
def _load_queries(sources, bufs, bars, sizes, HEAD: gl.constexpr, SLOTS: gl.constexpr):
    q_full, q_empty = bars
    heads, H, tiles = sizes
    for t in range(gl.cdiv(heads - gl.program_id(0), gl.num_programs(0)) * tiles):
        i = t // tiles
        row = (t - i * tiles) * ROWS
        head = gl.program_id(0) + i * gl.num_programs(0)
        col = head % H * HEAD[0]
        slot = t % SLOTS
        mbarrier.wait(q_empty.index(slot), ((t // SLOTS) & 1) ^ 1)
        bar = q_full.index(slot)
        mbarrier.expect(bar, ROWS * HEAD[0] * 2)
        tma.async_copy_global_to_shared(sources[0], [head // H, row, col], bar, bufs[0].index(slot))
        if HEAD[2]:
            tma.async_copy_global_to_shared(sources[1], [head // H, row, col + 64], bar, bufs[1].index(slot))


# ---- products ------------------------------------------------------------------------------------------------------


@gluon.constexpr_function
def sums_of(cols):
    """How a warpgroup holds the sums of a product [64, cols]."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, cols, 16])


@gluon.jit
def zeros(COLS: gl.constexpr):
    LAYOUT: gl.constexpr = sums_of(COLS)
    return gl.zeros((ROWS, COLS), gl.float32, LAYOUT)


@gluon.jit
def without_keys_from(s, count, COLS: gl.constexpr):
    """Scores of which the first `count` columns are keys that are there."""
    LAYOUT: gl.constexpr = gl.SliceLayout(0, sums_of(COLS))
    return gl.where(gl.arange(0, COLS, LAYOUT)[None, :] < count, s, -float("inf"))


@gluon.jit
def powers(s, reference, scale_log2, COLS: gl.constexpr):
    """2^(scale·s − reference), the reference one a row."""
    LAYOUT: gl.constexpr = gl.SliceLayout(1, sums_of(COLS))
    return gl.exp2(s * scale_log2 - gl.convert_layout(reference, LAYOUT, assert_trivial=True)[:, None])


@gluon.jit
def as_operand(e, DTYPE: gl.constexpr, COLS: gl.constexpr):
    """Probabilities as the left operand of a product with COLS columns."""
    LAYOUT: gl.constexpr = gl.DotOperandLayout(0, sums_of(COLS), 2)
    return gl.convert_layout(e.to(DTYPE), LAYOUT, assert_trivial=True)


@gluon.jit
def _attend(
    targets, bufs, bars, sizes, lse_ptr, Tq, Tk, scale_log2, WHICH: gl.constexpr,
    PIECES: gl.constexpr, HEAD: gl.constexpr, STAGES: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    keys, values, queries = bufs
    k_full, v_full, k_empty, v_empty, q_full, q_empty, order = bars
    heads, H, tiles = sizes
    TAIL: gl.constexpr = HEAD[2]
    COUNT: gl.constexpr = len(PIECES)
    DTYPE: gl.constexpr = targets[0].dtype
    LINE: gl.constexpr = gl.SliceLayout(1, sums_of(64))
    for t in range(WHICH, gl.cdiv(heads - gl.program_id(0), gl.num_programs(0)) * tiles, 2):
        i = t // tiles
        j = t - i * tiles
        head = gl.program_id(0) + i * gl.num_programs(0)
        stage, parity, slot = i % STAGES, (i // STAGES) & 1, t % SLOTS
        last = j + 2 >= tiles  # of this warpgroup's tiles of this head
        mbarrier.wait(q_full.index(slot), (t // SLOTS) & 1)
        mbarrier.wait(k_full.index(stage), parity)
        mbarrier.wait(order.index(WHICH), ((t // 2) & 1) ^ (1 - WHICH))

        scores = ()
        for p in gl.static_range(COUNT):
            s = zeros(PIECES[p])
            s = warpgroup_mma(
                queries[0].index(slot), keys[0][p].index(stage).permute((1, 0)), s, use_acc=False, is_async=True
            )
            if TAIL:
                s = warpgroup_mma(queries[1].index(slot), keys[1][p].index(stage).permute((1, 0)), s, is_async=True)
            scores += (s,)
        if COUNT > 1:
            scores = warpgroup_mma_wait(0, deps=scores)
        else:
            scores = (warpgroup_mma_wait(0, deps=scores),)
        highest = gl.full((ROWS,), -float("inf"), gl.float32, LINE)
        masked = ()
        for p in gl.static_range(COUNT):
            s = scores[p]
            if p == COUNT - 1:
                s = without_keys_from(s, Tk - first_row(p, PIECES), PIECES[p])
            masked += (s,)
            highest = gl.maximum(highest, gl.convert_layout(gl.max(s, 1), LINE, assert_trivial=True))
        gl.thread_barrier()  # all four warps have done with the keys
        mbarrier.arrive(k_empty.index(stage), count=1, pred=last)
        mbarrier.arrive(order.index(1 - WHICH), count=1)

        reference = highest * scale_log2
        total = gl.zeros((ROWS,), gl.float32, LINE)
        sums = zeros(64)
        if TAIL:
            tail_sums = zeros(TAIL)
        for p in gl.static_range(COUNT):
            e = powers(masked[p], reference, scale_log2, PIECES[p])
            total += gl.convert_layout(gl.sum(e, 1), LINE, assert_trivial=True)
            if p == 0:
                mbarrier.wait(v_full.index(stage), parity)
            weights = as_operand(e, DTYPE, 64)
            sums = warpgroup_mma(weights, values[0][p].index(stage), sums, use_acc=p > 0, is_async=True)
            if TAIL:
                weights = as_operand(e, DTYPE, TAIL)
                tail_sums = warpgroup_mma(weights, values[1][p].index(stage), tail_sums, use_acc=p > 0, is_async=True)
        factor = 1.0 / total
        if lse_ptr is not None:
            rows = j * ROWS + gl.arange(0, ROWS, LINE)
            gl.store(lse_ptr + head.to(gl.int64) * Tq + rows, reference + gl.log2(total), mask=rows < Tq)
        tma.store_wait(0)  # what left two tiles ago, so that its place may be filled again
        if TAIL:
            sums, tail_sums = warpgroup_mma_wait(0, deps=(sums, tail_sums))
        else:
            sums = warpgroup_mma_wait(0, deps=(sums,))
        gl.thread_barrier()  # all four warps have done with the values
        mbarrier.arrive(v_empty.index(stage), count=1, pred=last)
        mbarrier.arrive(q_empty.index((t + SLOTS - 2) % SLOTS), count=1, pred=t >= 2)

        col = head % H * HEAD[0]
        queries[0].index(slot).store((sums * factor[:, None]).to(DTYPE))
        if TAIL:
            LINE_OF_TAIL: gl.constexpr = gl.SliceLayout(1, sums_of(TAIL))
            line = gl.convert_layout(factor, LINE_OF_TAIL, assert_trivial=True)
            queries[1].index(slot).store((tail_sums * line[:, None]).to(DTYPE))
        fence_async_shared()
        gl.thread_barrier()
        tma.async_copy_shared_to_global(targets[0], [head // H, j * ROWS, col], queries[0].index(slot))
        if TAIL:
            tma.async_copy_shared_to_global(targets[1], [head // H, j * ROWS, col + 64], queries[1].index(slot))
    tma.store_wait(0)


# ---- the kernel ----------------------------------------------------------------------------------------------------


@gluon.jit
def ring(DTYPE: gl.constexpr, PIECES: gl.constexpr, STAGES: gl.constexpr, WIDTH: gl.constexpr, SWIZZLE: gl.constexpr):
    """Places for STAGES heads of rows, a tuple as long as PIECES."""
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=SWIZZLE, element_bitwidth=16, rank=2)
    bufs = ()
    for p in gl.static_range(len(PIECES)):
        bufs += (gl.allocate_shared_memory(DTYPE, [STAGES, PIECES[p], WIDTH], LAYOUT),)
    return bufs


@gluon.jit
def barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    bars = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(bars.index(i), count=ARRIVALS)
    return bars


@gluon.jit(do_not_specialize=["B", "Tq", "Tk"])
def _forward_kernel(
    o, qkv, lse_ptr, B, H, Tq, Tk, scale_log2,
    PIECES: gl.constexpr, HEAD: gl.constexpr, STAGES: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    """o [B, Tq, H·d] of the packed [B, Tk, 3·H·d], each (pointer, strides of B, T and H). HEAD is (d, main, tail)."""
    TAIL: gl.constexpr = HEAD[2]
    TILE: gl.constexpr = (64,)
    DTYPE: gl.constexpr = o[0].dtype.element_ty
    columns = 3 * H * HEAD[0]
    rows = descriptors(qkv[0], qkv[1], qkv[2], B, Tk, columns, PIECES, 64, 128)
    tile = descriptors(qkv[0], qkv[1], qkv[2], B, Tq, columns, TILE, 64, 128)
    target = descriptors(o[0], o[1], o[2], B, Tq, H * HEAD[0], TILE, 64, 128)
    keys, values = ring(DTYPE, PIECES, STAGES, 64, 128), ring(DTYPE, PIECES, STAGES, 64, 128)
    queries = ring(DTYPE, TILE, SLOTS, 64, 128)
    if TAIL:
        sources = (
            (rows, descriptors(qkv[0], qkv[1], qkv[2], B, Tk, columns, PIECES, TAIL, 32)),
            (tile[0], descriptors(qkv[0], qkv[1], qkv[2], B, Tq, columns, TILE, TAIL, 32)[0]),
        )
        targets = (target[0], descriptors(o[0], o[1], o[2], B, Tq, H * HEAD[0], TILE, TAIL, 32)[0])
        bufs = (
            (keys, ring(DTYPE, PIECES, STAGES, TAIL, 32)),
            (values, ring(DTYPE, PIECES, STAGES, TAIL, 32)),
            (queries[0], ring(DTYPE, TILE, SLOTS, TAIL, 32)[0]),
        )
    else:
        sources, targets, bufs = ((rows,), (tile[0],)), (target[0],), ((keys,), (values,), (queries[0],))
    k_full, v_full = barriers(STAGES, 1), barriers(STAGES, 1)
    k_empty, v_empty = barriers(STAGES, 2), barriers(STAGES, 2)
    q_full, q_empty, order = barriers(SLOTS, 1), barriers(SLOTS, 1), barriers(2, 1)
    fence_async_shared()
    bars = (k_full, v_full, k_empty, v_empty, q_full, q_empty, order)
    heads = B * H
    sizes = (heads, H, gl.cdiv(Tq, ROWS))
    first: gl.constexpr = 0
    second: gl.constexpr = 1
    gl.warp_specialize(
        [
            (_attend, (targets, bufs, bars, sizes, lse_ptr, Tq, Tk, scale_log2, first, PIECES, HEAD, STAGES, SLOTS)),
            (_attend, (targets, bufs, bars, sizes, lse_ptr, Tq, Tk, scale_log2, second, PIECES, HEAD, STAGES, SLOTS)),
            (
                _load_keys,
                (sources[0], bufs[:2], (k_full, v_full, k_empty, v_empty), (heads, H), PIECES, HEAD, STAGES),
            ),
            (_load_queries, (sources[1], bufs[2], (q_full, q_empty), sizes, HEAD, SLOTS)),
        ],
        [4, 1, 1],
        [240, 24, 24],
    )


def forward(q, o, lse, scale_log2: float, programs: int, pieces: tuple[int, ...], head: tuple[int, int, int]) -> None:
    """Writes o [B, T, H, d] and, where it is given, lse [B, H, T], of the packed tensor that q is the first third of.

    Args:
        programs: how many there shall be at most, one a multiprocessor.
        pieces: of a head's keys, as `attention.row_pieces` has them.
        head: d, and its pieces as `attention.head_pieces` has them.
    """
    B, T, H, d = q.shape
    packed = q.as_strided((B, T, 3 * H, d), q.stride())
    with scratch_memory():
        _forward_kernel[(min(B * H, programs),)](
            o=(o, *o.stride()[:-1]), qkv=(packed, *packed.stride()[:-1]), lse_ptr=lse, B=B, H=H, Tq=T, Tk=T,
            scale_log2=scale_log2, PIECES=pieces, HEAD=head, STAGES=STAGES, SLOTS=slots(pieces, d), num_warps=4,
        )  # fmt: skip
