"""Mean and variance of the rows of a matrix [M, K], from those of parts of the columns: for a folded LayerNorm.

Whoever holds a part of a row in registers writes its mean m and its sum of squares q about that mean; whoever reads
the row puts them together (Chan, Golub and LeVeque 1979, equation 2.1), n columns a part:

    mean = Σ n·m / K     variance = Σ (q + n·(m − mean)²) / K     rstd = 1/√(variance + eps)

never E[x²] − E[x]², which cancels. Each mean is taken twice, the second time of what the first left over: it is exact
where all elements are equal, and the row's variance is then zero as it must be.
shapes     statistics [2, parts, M] in fp32, m and then q
limit      the matrix is read once, by a kernel of its own or by none where an epilogue has its rows at hand
"""

import torch
import triton
import triton.language as tl

from .layer_norm import whole_rows
from .product import load_tile, matrix


@triton.jit
def store_statistics(statistics_ptr, x, rows, cols, M, K):
    """Write those of a tile x [ROWS, COLS] in fp32, zero in columns past K: a part is as wide as the tile."""
    WIDTH: tl.constexpr = x.shape[1]
    first = tl.min(cols, axis=0)
    count = tl.maximum(tl.minimum(K - first, WIDTH), 1)
    near = tl.sum(x, axis=1) / count
    rest = tl.where((cols < K)[None, :], x - near[:, None], 0.0)
    left_over = tl.sum(rest, axis=1)
    # Of what the first mean left over the square of a sum takes next to nothing away: this does not cancel.
    squares = tl.sum(rest * rest, axis=1) - left_over * left_over / count
    place = statistics_ptr + (first // WIDTH).to(tl.int64) * M + rows
    mask = (rows < M) & (first < K)  # no part lies outside
    tl.store(place, near + left_over / count, mask=mask)
    # The squares lie behind the means of all parts.
    tl.store(place + tl.cdiv(K, WIDTH).to(tl.int64) * M, tl.maximum(squares, 0.0), mask=mask)


@triton.jit
def load_statistics(statistics_ptr, rows, M, K, width, eps, PARTS: tl.constexpr):
    """mean and rstd of these rows, from PARTS parts of `width` columns, the last of what is left of K."""
    SLOTS: tl.constexpr = triton.next_power_of_2(PARTS)
    parts = tl.arange(0, SLOTS)
    counts = tl.maximum(tl.minimum(K - parts * width, width), 0).to(tl.float32)[None, :]
    mask = (rows[:, None] < M) & (parts[None, :] < PARTS)
    place = statistics_ptr + parts[None, :].to(tl.int64) * M + rows[:, None]
    means = tl.load(place, mask=mask, other=0.0)  # [rows, SLOTS]
    squares = tl.load(place + tl.cast(PARTS, tl.int64) * M, mask=mask, other=0.0)
    mean = tl.sum(means * counts, axis=1) / K
    mean += tl.sum((means - mean[:, None]) * counts, axis=1) / K
    shift = means - mean[:, None]
    variance = tl.sum(squares + counts * shift * shift, axis=1) / K
    return mean, tl.rsqrt(variance + eps)


@triton.jit
def _statistics_kernel(
    x_ptr, statistics_ptr, M, K, stride_x, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """Of rows that fit in registers: one part, as wide as the row."""
    row = tl.program_id(0) * BLOCK_M
    x = load_tile(matrix(x_ptr, M, K, stride_x, BLOCK_M, BLOCK_K, False), row, 0, BLOCK_M, BLOCK_K).to(tl.float32)
    store_statistics(statistics_ptr, x, row + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K), M, K)


def new_statistics(M: int, K: int, width: int, device: torch.device) -> torch.Tensor:
    """Memory for the statistics of M rows in parts of `width` columns."""
    return torch.empty((2, -(-K // width), M), dtype=torch.float32, device=device)


def part_width(statistics: torch.Tensor, K: int) -> int:
    """How many columns a part has: a power of two where there are several, the row itself where there is one."""
    parts = statistics.shape[1]
    return K if parts == 1 else 1 << (-(-K // parts) - 1).bit_length()


def statistics_of(x: torch.Tensor) -> torch.Tensor:
    """The statistics [2, 1, M] of the rows of x [M, K]."""
    M, K = x.shape
    statistics = new_statistics(M, K, K, x.device)
    tile = whole_rows(K)
    _statistics_kernel[(-(-M // tile["BLOCK_M"]),)](
        x_ptr=x, statistics_ptr=statistics, M=M, K=K, stride_x=x.stride(0), **tile
    )
    return statistics
