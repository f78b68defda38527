"""A linear map and what follows it in a residual branch, in one kernel.

forward    h = x·Wᵀ + b     y = residual + drop∘γ∘h
backward   dresidual = dy   dx, dW, db and dγ as in kernels/linear.py
shapes     x [M, K]   W [N, K]   b, γ [N]   residual, y [M, N]   drop [B], one draw for each M/B tokens
saved      x; h is not: the sum over k of W∘G gives LayerScale's gradient without it
limit      2·M·N·K operations forward, twice that backward; (M·K + N·K + 2·M·N) elements moved forward
"""

import torch
import triton
import triton.language as tl

from .linear import branch_gradient, finish, input_grad, weight_grad
from .product import (
    column_pieces,
    count_tiles,
    launch_tiles,
    load_drop,
    load_tile,
    load_vector,
    matrix,
    product,
    rows_outer,
    store_tile,
    tile_of,
    wait_for_launch_before,
)


@triton.jit(do_not_specialize=["M", "tokens_per_image"])
def _forward_kernel(
    x_ptr, weight_ptr, bias_ptr, scale_ptr, drop_ptr, residual_ptr, y_ptr,
    M, N, K, stride_x, stride_weight, stride_residual, tokens_per_image,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PIECES: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    wait_for_launch_before()
    DTYPE: tl.constexpr = weight_ptr.dtype.element_ty
    Y_DTYPE: tl.constexpr = y_ptr.dtype.element_ty
    # A residual stream in fp32 takes twice the shared memory.
    COUNT: tl.constexpr = PIECES * max(1, Y_DTYPE.primitive_bitwidth // DTYPE.primitive_bitwidth)
    WIDTH: tl.constexpr = BLOCK_N // COUNT
    x = matrix(x_ptr, M, K, stride_x, BLOCK_M, BLOCK_K, TMA)
    weight = matrix(weight_ptr, N, K, stride_weight, BLOCK_N, BLOCK_K, TMA)
    residual = matrix(residual_ptr, M, N, stride_residual, BLOCK_M, WIDTH, TMA == 1)
    y = matrix(y_ptr, M, N, N, BLOCK_M, WIDTH, TMA == 1)
    for tile in tl.range(tl.program_id(0), count_tiles(M, N, BLOCK_M, BLOCK_N), tl.num_programs(0), flatten=True):
        row, first_col = tile_of(tile, M, N, BLOCK_M, BLOCK_N)
        h = product(
            rows_outer, x, rows_outer, weight, row, first_col, 0, K, DTYPE, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION
        )  # fmt: skip
        pieces = column_pieces(h, COUNT)
        for piece in tl.static_range(COUNT):
            col = first_col + piece * WIDTH
            rows, cols = row + tl.arange(0, BLOCK_M), col + tl.arange(0, WIDTH)
            branch, factor = pieces[piece], 1.0
            if bias_ptr is not None:
                branch += load_vector(bias_ptr, cols, N)[None, :]
            if scale_ptr is not None:
                factor = load_vector(scale_ptr, cols, N)[None, :]
            if drop_ptr is not None:
                branch, factor = branch * factor, load_drop(drop_ptr, rows, tokens_per_image, M)
            # Left to itself the compiler joins this product and this sum for some tiles' loads and not for others.
            out = tl.fma(branch, factor, load_tile(residual, row, col, BLOCK_M, WIDTH).to(tl.float32))
            store_tile(y, out, row, col, Y_DTYPE)


def forward(x, weight, bias, residual, layer_scale, drop, tokens_per_image, precision):
    """y [M, N] in the dtype of the residual. The last axis of x, weight and residual has stride 1."""
    (M, K), N = x.shape, weight.shape[0]
    y = torch.empty((M, N), dtype=residual.dtype, device=x.device)
    launch_tiles(
        _forward_kernel, "linear_residual_forward", M, N, weight.dtype, (x, weight, residual, y),
        x_ptr=x, weight_ptr=weight, bias_ptr=bias, scale_ptr=layer_scale, drop_ptr=drop, residual_ptr=residual, y_ptr=y,
        K=K, stride_x=x.stride(0), stride_weight=weight.stride(0),
        stride_residual=residual.stride(0), tokens_per_image=tokens_per_image, PRECISION=precision,
    )  # fmt: skip
    return y


def first_stage(dropped, scaled, x, weight, bias, layer_scale, precision, trained):
    """dx, and the first stage of dW, db and dγ, of drop∘dy and drop∘dy∘γ; None where no parameter is trained."""
    dx = input_grad(scaled, weight, precision)
    return dx, weight_grad(dropped, x, weight, bias, layer_scale, precision) if trained else None


def backward(dy, x, weight, bias, layer_scale, drop, tokens_per_image, precision, trained):
    """dx, dW, db (None without b) and dγ (None without γ), all but dx None where no parameter is trained; the
    residual's gradient is dy itself."""
    gradients = branch_gradient(dy, layer_scale, drop, tokens_per_image, weight.dtype)
    dx, partials = first_stage(*gradients, x, weight, bias, layer_scale, precision, trained)
    (dlinear,) = finish(partials)
    return dx, *dlinear
