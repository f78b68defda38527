"""LayerNorm and the linear map behind it: a pass over x for z, and a product.

forward    z = LN(x)     y = z·Wᵀ + b
backward   dz = dy·W     dW = dyᵀ·z     db = Σ dy, and of LN as in kernels/layer_norm.py
shapes     x, z [M, K]   γ, β [K]   W [N, K]   b [N]   y [M, N]   mean, rstd [M]
saved      x, mean, rstd in fp32; z is written again by the pass through LN's gradient: cheaper than 2·M·K bytes
limit      2·M·N·K operations forward, twice that backward; (3·M·K + N·K + M·N) elements moved forward

Forms that an H200 refuted (docs/performance.md): z made in registers by a loader of the product, at half its rate; and
γ folded into W with the statistics applied afterwards, which saves the pass, and costs the epilogue more than that.
"""

import torch
import triton
import triton.language as tl

from . import layer_norm
from .linear import finish, input_grad, weight_grad
from .product import (
    column_pieces,
    count_tiles,
    launch_tiles,
    load_vector,
    matrix,
    product,
    rows_outer,
    store_tile,
    tile_of,
    wait_for_launch_before,
)


@triton.jit(do_not_specialize=["M"])
def _forward_kernel(
    z_ptr, weight_ptr, bias_ptr, y_ptr,
    M, N, K, stride_weight,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PIECES: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    wait_for_launch_before()
    DTYPE: tl.constexpr = weight_ptr.dtype.element_ty
    WIDTH: tl.constexpr = BLOCK_N // PIECES
    z = matrix(z_ptr, M, K, K, BLOCK_M, BLOCK_K, TMA)
    weight = matrix(weight_ptr, N, K, stride_weight, BLOCK_N, BLOCK_K, TMA)
    y = matrix(y_ptr, M, N, N, BLOCK_M, WIDTH, TMA == 1)
    for tile in tl.range(tl.program_id(0), count_tiles(M, N, BLOCK_M, BLOCK_N), tl.num_programs(0), flatten=True):
        row, first_col = tile_of(tile, M, N, BLOCK_M, BLOCK_N)
        sums = product(
            rows_outer, z, rows_outer, weight, row, first_col, 0, K, DTYPE, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION
        )  # fmt: skip
        pieces = column_pieces(sums, PIECES)
        for piece in tl.static_range(PIECES):
            col = first_col + piece * WIDTH
            out = pieces[piece]
            if bias_ptr is not None:
                out += load_vector(bias_ptr, col + tl.arange(0, WIDTH), N)[None, :]
            store_tile(y, out, row, col, DTYPE)


def forward(x, norm_weight, norm_bias, weight, bias, eps, precision, training=True):
    """y [M, N] in the dtype of the weight, mean and rstd [M], None unless training.

    The last axis of x and weight has stride 1.
    """
    (M, K), N = x.shape, weight.shape[0]
    z, mean, rstd = layer_norm.forward(x, norm_weight, norm_bias, eps, weight.dtype, training)
    y = torch.empty((M, N), dtype=weight.dtype, device=x.device)
    launch_tiles(
        _forward_kernel, "ln_linear_forward", M, N, weight.dtype, (z, weight, y),
        z_ptr=z, weight_ptr=weight, bias_ptr=bias, y_ptr=y, K=K, stride_weight=weight.stride(0), PRECISION=precision,
    )  # fmt: skip
    return y, mean, rstd


def first_stage(
    dy, x, mean, rstd, norm_weight, norm_bias, weight, bias, precision, trained, residual_grad=None, branch=None
):
    """dx, to which the residual's gradient is added where it is given, and the first stages of the other gradients,
    None where no parameter is `trained`: of γ and β for `layer_norm.finish`, of W and b for `linear.finish`. `branch`
    as for `layer_norm.backward`."""
    dz = input_grad(dy, weight, precision)
    dx, z, shares = layer_norm.backward(dz, x, mean, rstd, norm_weight, norm_bias, residual_grad, branch)
    return (dx, shares, weight_grad(dy, z, weight, bias, None, precision)) if trained else (dx, None, None)


def backward(dy, x, mean, rstd, norm_weight, norm_bias, weight, bias, precision, trained):
    """dx, dγ, dβ, dW and db (None without b), each in the dtype of what it is the gradient of; dx alone and None where
    no parameter is trained."""
    dx, shares, partials = first_stage(dy, x, mean, rstd, norm_weight, norm_bias, weight, bias, precision, trained)
    (dnorm,), (dlinear,) = layer_norm.finish((shares, norm_weight, norm_bias)), finish(partials)
    return dx, *dnorm, *dlinear[:2]
