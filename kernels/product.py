"""The loop of a product, and what every kernel that multiplies shares.

An operand is a loader, a jit function, and the tuple of its arguments: `load(operand, rows, cols)` gives the tile
[len(rows), len(cols)] of the operand, zeros outside. What an op does to an operand on its way to the product (scaling,
LayerNorm, cutting an image into patches) is a loader; what it does to the result is the epilogue of its kernel.
"""

import torch
import triton
import triton.language as tl

TRITON_DTYPE = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@triton.jit
def matrix(operand, rows, cols):
    """A matrix, its columns multiplied by scale[column // PER] where a scale is given."""
    ptr, stride_row, stride_col, n_rows, n_cols, scale_ptr, PER = operand
    mask = (rows[:, None] < n_rows) & (cols[None, :] < n_cols)
    # A token's index times the width passes 2^31 at fc1's hidden width from 3,549 ViT-B images on.
    offsets = rows[:, None].to(tl.int64) * stride_row + cols[None, :].to(tl.int64) * stride_col
    tile = tl.load(ptr + offsets, mask=mask, other=0.0)
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + cols // PER, mask=cols < n_cols, other=0.0)
        tile = tile.to(tl.float32) * scale.to(tl.float32)[None, :]
    return tile


@triton.jit
def product(
    load_a: tl.constexpr,
    a,
    load_b: tl.constexpr,
    b,
    rows,
    cols,
    start,
    stop,
    DTYPE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A[rows, start:stop] · B[start:stop, cols], operands in DTYPE, sum in fp32."""
    sums = tl.zeros([rows.shape[0], cols.shape[0]], tl.float32)
    for k in range(start, stop, BLOCK_K):
        inner = k + tl.arange(0, BLOCK_K)
        left = load_a(a, rows, inner).to(DTYPE)  # [BLOCK_M, BLOCK_K]
        right = load_b(b, inner, cols).to(DTYPE)  # [BLOCK_K, BLOCK_N]
        sums = tl.dot(left, right, sums, input_precision=PRECISION)
    return sums


@triton.jit
def row_sums(load_a: tl.constexpr, a, rows, start, stop, BLOCK_K: tl.constexpr):
    """The sum of A[rows, start:stop] along its rows, in fp32."""
    sums = tl.zeros([rows.shape[0]], tl.float32)
    for k in range(start, stop, BLOCK_K):
        sums += tl.sum(load_a(a, rows, k + tl.arange(0, BLOCK_K)).to(tl.float32), axis=1)
    return sums


@triton.jit
def tile_of(program, tiles_m, tiles_n):
    """Tile (m, n) of a program: eight rows of tiles go side by side, so that their operands stay in L2."""
    group = program // (8 * tiles_n)
    height = min(tiles_m - group * 8, 8)
    inside = program % (8 * tiles_n)
    return group * 8 + inside % height, inside // height


@triton.jit
def tile_offsets(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Row and column indices of this program's tile of an [M, N] result."""
    m, n = tile_of(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N))
    return m * BLOCK_M + tl.arange(0, BLOCK_M), n * BLOCK_N + tl.arange(0, BLOCK_N)


@triton.jit
def load_vector(ptr, index, length):
    """vector[index] in fp32, zero past its length."""
    return tl.load(ptr + index, mask=index < length, other=0.0).to(tl.float32)


@triton.jit
def load_drop(drop_ptr, rows, tokens_per_image, M):
    """The drop path's factor of each row's image, as a column in fp32."""
    return tl.load(drop_ptr + rows // tokens_per_image, mask=rows < M, other=0.0).to(tl.float32)[:, None]


@triton.jit
def store(ptr, stride_row, tile, rows, cols, M, N):
    """Write a tile of a row-major matrix in the dtype of the matrix."""
    mask = (rows[:, None] < M) & (cols[None, :] < N)
    offsets = rows[:, None].to(tl.int64) * stride_row + cols[None, :]
    tl.store(ptr + offsets, tile.to(ptr.dtype.element_ty), mask=mask)


def tiles(M: int, N: int, tile: dict) -> int:
    """How many programs cover an [M, N] result."""
    return triton.cdiv(M, tile["BLOCK_M"]) * triton.cdiv(N, tile["BLOCK_N"])
