"""An image cut into patches, their projection, the prefix tokens and the positions: tokens written once.

forward    token[b, t] = prefix[t] (+ position[t])                                              t < R
           token[b, R + n] = W·patch[b, n] + bias + position[n, or R + n]
backward   dW = Σ dtoken[b, R + n]·patch[b, n]ᵀ     S[t] = Σ_b dtoken[b, t]
           dposition = S or S[R:]     dprefix = S[:R]     dbias = Σₙ S[R + n]
shapes     image [B, C, rows, columns]   W [D, C·PH·PW]   prefix [R, D]   position [N or R + N, D]   token [B, R + N, D]
saved      the image alone
limit      2·B·N·D·C·PH·PW operations each way; the image read and the tokens written once

The prefix tokens are rows of the same product whose patch is empty, so one kernel writes every token of the result.
"""

import torch
import triton
import triton.language as tl

from .linear import linear_finish, split_tokens, weight_grad_tile
from .product import TRITON_DTYPE, load_vector, matrix, product, store, tile_offsets, tiles
from .tile_table import lookup


@triton.jit
def patches(operand, rows, cols):
    """Row b·T + t is patch t − R of image b, in the order of a convolution's weight: channel, row, column."""
    ptr, stride_b, stride_c, stride_h, stride_w, n_rows, n_cols, T, R, COLUMNS, PH, PW = operand
    token = rows % T - R
    row, column = token // COLUMNS * PH, token % COLUMNS * PW  # the patch's first pixel
    corner = (rows // T).to(tl.int64) * stride_b + row.to(tl.int64) * stride_h + column.to(tl.int64) * stride_w
    channel, pixel = cols // (PH * PW), cols % (PH * PW)
    inside = channel.to(tl.int64) * stride_c + (pixel // PW).to(tl.int64) * stride_h
    inside += (pixel % PW).to(tl.int64) * stride_w
    mask = ((rows < n_rows) & (token >= 0))[:, None] & (cols < n_cols)[None, :]
    return tl.load(ptr + corner[:, None] + inside[None, :], mask=mask, other=0.0)


@triton.jit
def _forward_kernel(
    image_ptr,
    weight_ptr,
    bias_ptr,
    position_ptr,
    prefix_ptr,
    token_ptr,
    B,
    D,
    K,
    T,
    R,
    COLUMNS,
    stride_b,
    stride_c,
    stride_h,
    stride_w,
    stride_weight,
    FIRST_POSITION: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """FIRST_POSITION is the token of the position table's first row: 0, or R where prefix tokens have no position."""
    M = B * T
    rows, cols = tile_offsets(M, D, BLOCK_M, BLOCK_N)
    image = (image_ptr, stride_b, stride_c, stride_h, stride_w, M, K, T, R, COLUMNS, PH, PW)
    w = (weight_ptr, 1, stride_weight, K, D, None, 1)
    y = product(patches, image, matrix, w, rows, cols, 0, K, weight_ptr.dtype.element_ty, BLOCK_K, PRECISION)
    token = rows % T
    if bias_ptr is not None:
        y += tl.where(token[:, None] >= R, load_vector(bias_ptr, cols, D)[None, :], 0.0)
    if prefix_ptr is not None:
        y += matrix((prefix_ptr, D, 1, R, D, None, 1), token, cols).to(tl.float32)
    if position_ptr is not None:
        place = tl.where(token >= FIRST_POSITION, token - FIRST_POSITION, T)
        y += matrix((position_ptr, D, 1, T - FIRST_POSITION, D, None, 1), place, cols).to(tl.float32)
    store(token_ptr, D, y, rows, cols, M, D)


@triton.jit
def _weight_grad_kernel(
    dtoken_ptr,
    image_ptr,
    partial_ptr,
    B,
    D,
    K,
    T,
    R,
    COLUMNS,
    stride_b,
    stride_c,
    stride_h,
    stride_w,
    span,
    PH: tl.constexpr,
    PW: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    M = B * T
    a = (dtoken_ptr, 1, D, D, M, None, 1)
    b = (image_ptr, stride_b, stride_c, stride_h, stride_w, M, K, T, R, COLUMNS, PH, PW)
    weight_grad_tile(
        matrix, a, patches, b, partial_ptr, None, D, K, M, span, DTYPE, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION
    )  # fmt: skip


def _geometry(images, weight, prefix) -> dict:
    """The sizes and strides that both kernels take."""
    batch, _, height, columns = images.shape
    patch_height, patch_width = weight.shape[-2:]
    count = 0 if prefix is None else prefix.shape[0]
    return {
        "B": batch,
        "D": weight.shape[0],
        "K": weight.shape[1] * patch_height * patch_width,
        "T": count + (height // patch_height) * (columns // patch_width),
        "R": count,
        "COLUMNS": columns // patch_width,
        "stride_b": images.stride(0),
        "stride_c": images.stride(1),
        "stride_h": images.stride(2),
        "stride_w": images.stride(3),
        "PH": patch_height,
        "PW": patch_width,
    }


def forward(images, weight, bias, position, prefix, dtype, precision):
    """Tokens [B, R + N, D] in `dtype`. Images of any strides; weight, position and prefix contiguous."""
    sizes = _geometry(images, weight, prefix)
    B, T, D = sizes["B"], sizes["T"], sizes["D"]
    tokens = torch.empty((B, T, D), dtype=dtype, device=images.device)
    tile = lookup("patch_embed_forward", images.device, weight.dtype)
    _forward_kernel[(tiles(B * T, D, tile),)](
        image_ptr=images,
        weight_ptr=weight,
        bias_ptr=bias,
        position_ptr=position,
        prefix_ptr=prefix,
        token_ptr=tokens,
        stride_weight=sizes["K"],
        FIRST_POSITION=0 if position is None else T - position.shape[0],
        PRECISION=precision,
        **sizes,
        **tile,
    )
    return tokens


def backward(dtokens, images, weight, bias, position, prefix, precision):
    """dW, dbias, dposition and dprefix (None where absent) from contiguous dtokens [B, T, D]."""
    sizes = _geometry(images, weight, prefix)
    B, T, D, K, R = (sizes[name] for name in ("B", "T", "D", "K", "R"))
    tile = lookup("patch_embed_weight_grad", images.device, weight.dtype)
    splits, span = split_tokens(D, K, B * T, tile)
    partial = torch.empty((splits, D, K), dtype=torch.float32, device=images.device)
    _weight_grad_kernel[(tiles(D, K, tile), splits)](
        dtoken_ptr=dtokens,
        image_ptr=images,
        partial_ptr=partial,
        span=span,
        DTYPE=TRITON_DTYPE[weight.dtype],
        PRECISION=precision,
        **sizes,
        **tile,
    )
    dweight, _, _ = linear_finish(partial, None, weight.view(D, K), None, None)
    sums = dtokens.sum(0, dtype=torch.float32)  # [T, D]
    dbias = None if bias is None else sums[R:].sum(0).to(bias.dtype)
    dposition = None if position is None else sums[T - position.shape[0] :].to(position.dtype, copy=True)
    dprefix = None if prefix is None else sums[:R].to(prefix.dtype, copy=True)
    return dweight.view(weight.shape), dbias, dposition, dprefix
