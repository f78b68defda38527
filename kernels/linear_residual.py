"""A linear map and what follows it in a residual branch, in one kernel.

forward    h = x·Wᵀ + b     y = residual + drop∘γ∘h
backward   dresidual = dy   dx = drop∘((dy∘γ)·W)
           G = (drop∘dy)ᵀ·x   s = Σ drop∘dy   dW = γ∘G   db = γ∘s   dγ = Σₖ W∘G + b∘s      (Σ over tokens)
shapes     x [M, K]   W [N, K]   b, γ [N]   residual, y [M, N]   drop [B], one draw for each M/B tokens
saved      x; h is not: the sum over k of W∘G gives LayerScale's gradient without it
limit      2·M·N·K operations forward, twice that backward; (M·K + N·K + 2·M·N) elements moved forward
"""

import torch
import triton
import triton.language as tl

from .linear import linear_input_grad, linear_weight_grad
from .product import load_drop, load_vector, matrix, product, store, tile_offsets, tiles
from .tile_table import lookup


@triton.jit
def _forward_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    scale_ptr,
    drop_ptr,
    residual_ptr,
    y_ptr,
    M,
    N,
    K,
    stride_x,
    stride_weight,
    stride_residual,
    tokens_per_image,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    rows, cols = tile_offsets(M, N, BLOCK_M, BLOCK_N)
    x = (x_ptr, stride_x, 1, M, K, None, 1)
    w = (weight_ptr, 1, stride_weight, K, N, None, 1)
    y = product(matrix, x, matrix, w, rows, cols, 0, K, weight_ptr.dtype.element_ty, BLOCK_K, PRECISION)
    if bias_ptr is not None:
        y += load_vector(bias_ptr, cols, N)[None, :]
    if scale_ptr is not None:
        y *= load_vector(scale_ptr, cols, N)[None, :]
    if drop_ptr is not None:
        y *= load_drop(drop_ptr, rows, tokens_per_image, M)
    y += matrix((residual_ptr, stride_residual, 1, M, N, None, 1), rows, cols).to(tl.float32)
    store(y_ptr, N, y, rows, cols, M, N)


def forward(x, weight, bias, residual, layer_scale, drop, tokens_per_image, precision):
    """y [M, N] in the dtype of the residual. The last axis of x, weight and residual has stride 1."""
    (M, K), N = x.shape, weight.shape[0]
    y = torch.empty((M, N), dtype=residual.dtype, device=x.device)
    tile = lookup("linear_residual_forward", x.device, weight.dtype)
    _forward_kernel[(tiles(M, N, tile),)](
        x_ptr=x,
        weight_ptr=weight,
        bias_ptr=bias,
        scale_ptr=layer_scale,
        drop_ptr=drop,
        residual_ptr=residual,
        y_ptr=y,
        M=M,
        N=N,
        K=K,
        stride_x=x.stride(0),
        stride_weight=weight.stride(0),
        stride_residual=residual.stride(0),
        tokens_per_image=tokens_per_image,
        PRECISION=precision,
        **tile,
    )
    return y


def backward(dy, x, weight, bias, layer_scale, drop, tokens_per_image, precision):
    """dx, dW, db (None without b) and dγ (None without γ); the residual's gradient is dy itself."""
    dx = linear_input_grad(dy, weight, layer_scale, drop, tokens_per_image, precision)
    return dx, *linear_weight_grad(dy, x, weight, bias, layer_scale, drop, tokens_per_image, precision)
