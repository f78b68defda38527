"""The loop of a product, and what every kernel that multiplies shares.

    sums[m, n] = Σₖ A[m, k]·B[n, k]

An operand is a loader, a jit function, and the tuple of its arguments. `load(operand, outer, inner, OUTER, INNER)` is
the tile [OUTER, INNER] whose first row and column these are, zeros outside. k is the inner index of both operands. What
an op does to the result is the epilogue of its kernel; what it does to an operand is a pass before it, for on Hopper a
loader that computes in registers, or gathers, halves the rate of the product.

A kernel is persistent: as many programs as the multiprocessors hold take the tiles of the result in turn, so that
flattening lets the loads of the next tile run under the epilogue of this one. Tiles reach shared memory through
descriptors (TMA) where the architecture has them and the operands are aligned to 16 bytes, and through pointers
elsewhere: `load_tile` and `store_tile` are all that differs. TMA is 0 for pointers, 1 for descriptors, and 2 for
descriptors of the operands alone. An epilogue takes its tile in PIECES of columns, which halves the registers that it
needs. No kernel is specialised on the number of its rows: another batch of its class compiles nothing anew.
"""

import functools

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.language.target_info import cuda_capability_geq, is_cuda
from triton.runtime import _allocation

from .tile_table import FEW_ROWS, architecture, lookup, residents, rows_class

TRITON_DTYPE = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


# ---- one launch after the other ------------------------------------------------------------------------------------


@triton.jit
def wait_for_launch_before():
    """The first statement of a kernel that `early` may launch: from here on all is written that launches before this
    one write."""
    if cuda_capability_geq(9, 0):
        gdc_wait()
        gdc_launch_dependents()  # not before the wait: a launch may overlap its neighbour, and no other


@functools.cache
def _overlap(device: torch.device) -> bool:
    """Whether a device's launches can: programmatic dependent launch, NVIDIA's from Hopper on."""
    name = architecture(device)
    return name.startswith("sm_") and int(name.removeprefix("sm_")) >= 90


def early(device: torch.device, rows: int, width: int) -> dict:
    """The launch option by which a kernel that waits for the launch before may begin before that has ended, for so few
    and short rows of tokens that its start takes as long as its work: for wider ones it was measured to cost."""
    return {"launch_pdl": True} if rows <= FEW_ROWS and width <= 768 and _overlap(device) else {}


# ---- tiles in memory -----------------------------------------------------------------------------------------------


@triton.jit
def matrix(ptr, n_rows, n_cols, stride, ROWS: tl.constexpr, COLS: tl.constexpr, TMA: tl.constexpr):
    """A row-major matrix that is read or written in tiles [ROWS, COLS]."""
    if TMA:
        source = tl.make_tensor_descriptor(ptr, [n_rows, n_cols], [stride, 1], [ROWS, COLS])
    else:
        source = (ptr, n_rows, n_cols, stride)
    return source


@triton.jit
def _pointers(source, row, col, ROWS: tl.constexpr, COLS: tl.constexpr):
    ptr, n_rows, n_cols, stride = source
    rows, cols = row + tl.arange(0, ROWS), col + tl.arange(0, COLS)
    mask = (rows[:, None] < n_rows) & (cols[None, :] < n_cols)
    # A token's index times the width passes 2^31 at fc1's hidden width from 3,549 ViT-B images on.
    return ptr + rows[:, None].to(tl.int64) * stride + cols[None, :], mask


@triton.jit
def load_tile(source, row, col, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The tile [ROWS, COLS] of a matrix that begins at (row, col), zeros outside."""
    if isinstance(source, tl.tensor_descriptor):
        tile = source.load([row, col])
    else:
        pointers, mask = _pointers(source, row, col, ROWS, COLS)
        tile = tl.load(pointers, mask=mask, other=0.0)
    return tile


@triton.jit
def store_tile(target, tile, row, col, DTYPE: tl.constexpr):
    """Write a tile at (row, col) of a matrix of this dtype, what lies outside left out."""
    if isinstance(target, tl.tensor_descriptor):
        target.store([row, col], tile.to(DTYPE))
    else:
        pointers, mask = _pointers(target, row, col, tile.shape[0], tile.shape[1])
        tl.store(pointers, tile.to(DTYPE), mask=mask)


_ROUND_BF16 = tl.constexpr("""{
    .reg .b32 pair;
    cvt.rn.bf16x2.f32 pair, $3, $2;
    shl.b32 $0, pair, 16;
    and.b32 $1, pair, 0xffff0000;
}""")
_ROUND_FP16 = tl.constexpr("""{
    .reg .b32 pair;
    .reg .b16 low, high;
    cvt.rn.f16x2.f32 pair, $3, $2;
    mov.b32 {low, high}, pair;
    cvt.f32.f16 $0, low;
    cvt.f32.f16 $1, high;
}""")


@triton.jit
def rounded(x, DTYPE: tl.constexpr):
    """A tile in fp32 as it reads once it is stored in DTYPE."""
    # Two numbers a conversion: ptxas makes of a cast there and back one a number, at an eighth of the rate.
    if is_cuda() and DTYPE == tl.bfloat16:
        y = tl.inline_asm_elementwise(_ROUND_BF16, "=r,=r,r,r", [x], dtype=tl.float32, is_pure=True, pack=2)
    elif is_cuda() and DTYPE == tl.float16:
        y = tl.inline_asm_elementwise(_ROUND_FP16, "=r,=r,r,r", [x], dtype=tl.float32, is_pure=True, pack=2)
    else:
        y = x.to(DTYPE).to(tl.float32)
    return y


@triton.jit
def load_vector(ptr, index, length):
    """vector[index] in fp32, zero past its length."""
    return tl.load(ptr + index, mask=index < length, other=0.0).to(tl.float32)


@triton.jit
def load_drop(drop_ptr, rows, tokens_per_image, M):
    """The drop path's factor of each row's image, as a column in fp32."""
    return tl.load(drop_ptr + rows // tokens_per_image, mask=rows < M, other=0.0).to(tl.float32)[:, None]


# ---- loaders of operands -------------------------------------------------------------------------------------------


@triton.jit
def rows_outer(source, outer, inner, OUTER: tl.constexpr, INNER: tl.constexpr):
    """A matrix whose rows are the outer index."""
    return load_tile(source, outer, inner, OUTER, INNER)


@triton.jit
def rows_inner(source, outer, inner, OUTER: tl.constexpr, INNER: tl.constexpr):
    """A matrix whose rows are the inner index."""
    return load_tile(source, inner, outer, INNER, OUTER).T


# ---- the product ---------------------------------------------------------------------------------------------------


@triton.jit
def add_dot(sums, left, right, PRECISION: tl.constexpr):
    """sums + left·right. In fp32 each step is summed for itself first: a chain of thousands of additions, each rounded,
    would be further from the truth than PyTorch, which sums in pieces too."""
    if (left.dtype == tl.float32) & (PRECISION == "ieee"):
        # Not `+`, of which the compiler would make one product that begins with `sums`.
        sums = tl.fma(tl.dot(left, right, input_precision=PRECISION), 1.0, sums)
    else:
        sums = tl.dot(left, right, sums, input_precision=PRECISION)
    return sums


@triton.jit
def product(
    load_a: tl.constexpr,
    a,
    load_b: tl.constexpr,
    b, row, col, start, stop,
    DTYPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The tile of A·Bᵀ at (row, col), its inner index from start to stop; operands in DTYPE, sum in fp32."""
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(start, stop, BLOCK_K):
        left = load_a(a, row, k, BLOCK_M, BLOCK_K).to(DTYPE)
        right = load_b(b, col, k, BLOCK_N, BLOCK_K).to(DTYPE)
        sums = add_dot(sums, left, right.T, PRECISION)
    return sums


@triton.jit
def product_pair(
    load_a: tl.constexpr,
    a,
    load_b: tl.constexpr,
    b, c, row, col, start, stop,
    DTYPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The tiles of A·Bᵀ and A·Cᵀ at the same (row, col), as `product`: A is loaded once for both."""
    sums_b = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    sums_c = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(start, stop, BLOCK_K):
        left = load_a(a, row, k, BLOCK_M, BLOCK_K).to(DTYPE)
        sums_b = add_dot(sums_b, left, load_b(b, col, k, BLOCK_N, BLOCK_K).to(DTYPE).T, PRECISION)
        sums_c = add_dot(sums_c, left, load_b(c, col, k, BLOCK_N, BLOCK_K).to(DTYPE).T, PRECISION)
    return sums_b, sums_c


@triton.jit
def product_and_row_sums(
    load_a: tl.constexpr,
    a,
    load_b: tl.constexpr,
    b, row, col, start, stop, first, last,
    DTYPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """As `product`, and the sums of A's rows over the inner index from first to last, [BLOCK_M].

    From start to first and from first to last are whole steps, or the latter ends at stop.
    """
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for_ones = tl.zeros([BLOCK_M, 16], tl.float32)
    row_sums, lost = tl.zeros([BLOCK_M], tl.float32), tl.zeros([BLOCK_M], tl.float32)
    ones = tl.full([BLOCK_K, 16], 1.0, tl.float32).to(DTYPE)
    for k in range(first, last, BLOCK_K):
        left = load_a(a, row, k, BLOCK_M, BLOCK_K).to(DTYPE)
        right = load_b(b, col, k, BLOCK_N, BLOCK_K).to(DTYPE)
        sums = add_dot(sums, left, right.T, PRECISION)
        if DTYPE.primitive_bitwidth == 32:
            # With what each sum before it was rounded by (Kahan 1965): PyTorch sums a bias in a tree, of whose error
            # one step after the other has three times as much.
            rest = tl.sum(left, axis=1) - lost
            next_sums = row_sums + rest
            lost = tl.where(tl.abs(next_sums) < float("inf"), (next_sums - row_sums) - rest, 0.0)
            row_sums = next_sums
        else:
            # A product with ones: the tile is in shared memory for the other product, and to sum it in registers it
            # would have to be read from there.
            for_ones = tl.dot(left, ones, for_ones)
    if DTYPE.primitive_bitwidth < 32:
        row_sums = tl.max(for_ones, axis=1)  # of 16 equal columns
    for step in range(start, stop - (last - first), BLOCK_K):
        k = step + tl.where(step < first, 0, last - first)
        left = load_a(a, row, k, BLOCK_M, BLOCK_K).to(DTYPE)
        right = load_b(b, col, k, BLOCK_N, BLOCK_K).to(DTYPE)
        sums = add_dot(sums, left, right.T, PRECISION)
    return sums, row_sums


@triton.jit
def tile_of(index, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """First row and column of a tile: eight rows of tiles go side by side, so that their operands stay in L2."""
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    group = index // (8 * tiles_n)
    height = min(tiles_m - group * 8, 8)
    inside = index % (8 * tiles_n)
    return (group * 8 + inside % height) * BLOCK_M, inside // height * BLOCK_N


@triton.jit
def count_tiles(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    return tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)


@triton.jit
def column_pieces(tile, PIECES: tl.constexpr):
    """A tile [M, N] as a tuple of PIECES, a power of two, tiles [M, N / PIECES]."""
    pieces = (tile,)
    if PIECES > 1:
        left, right = tile.reshape(tile.shape[0], 2, tile.shape[1] // 2).permute(0, 2, 1).split()
        pieces = column_pieces(left, PIECES // 2) + column_pieces(right, PIECES // 2)
    return pieces


# ---- launches ------------------------------------------------------------------------------------------------------


def tiles(M: int, N: int, tile: dict) -> int:
    """How many tiles an [M, N] result has."""
    return -(-M // tile["BLOCK_M"]) * -(-N // tile["BLOCK_N"])


def aligned(*matrices: torch.Tensor) -> bool:
    """Whether descriptors can be made of these: their rows begin at multiples of 16 bytes, and are not one row."""
    for x in matrices:
        if x.data_ptr() % 16 or x.stride(0) * x.element_size() % 16 or x.stride(0) < x.shape[1]:
            return False
    return True


def _scratch(size: int, alignment: int, stream: int | None) -> torch.Tensor:
    return torch.empty(size, dtype=torch.int8, device="cuda")


class scratch_memory:
    """A block in which Triton takes the memory of descriptors from torch's allocator, on the current stream.

    Triton keeps its allocator in a ContextVar: it is set here, in the thread that launches, since autograd runs
    backward in a thread of its own; what the user had set there is put back.
    """

    def __enter__(self) -> None:
        self.token = _allocation._allocator.set(_scratch)

    def __exit__(self, *_) -> None:
        _allocation._allocator.reset(self.token)


def launch_tiles(kernel, entry: str, M: int, N: int, dtype: torch.dtype, matrices: tuple, **arguments) -> None:
    """Launch a persistent kernel over the tiles of an [M, N] result.

    Args:
        kernel: takes M, N, what `arguments` holds, and the tile of its entry in the table.
        entry: the kernel's name in the table.
        dtype: of the operands of the product.
        matrices: every matrix that the kernel reads or writes through a descriptor.
    """
    device, shape = matrices[0].device, rows_class(M)
    tile = lookup(entry, device, dtype, shape)
    programs = min(tiles(M, N, tile), residents(entry, device, dtype, shape))
    with scratch_memory():
        width = min(N, arguments["K"])
        kernel[(programs,)](M=M, N=N, **arguments, **described(tile, matrices), **early(device, M, width))


def described(tile: dict, matrices: tuple) -> dict:
    """The tile with its descriptors turned off where a matrix does not allow them."""
    return tile if not tile["TMA"] or aligned(*matrices) else {**tile, "TMA": 0}
