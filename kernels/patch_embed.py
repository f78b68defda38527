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

from .linear import Partials, finish, launch_weight_grad, weight_grad_tile
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
)


@triton.jit
def _patches(operand, row, col, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Row b·T + t is patch t − R of image b, in the order of a convolution's weight: channel, row, column."""
    rows, cols = row + tl.arange(0, ROWS), col + tl.arange(0, COLS)
    ptr, stride_b, stride_c, stride_h, stride_w, n_rows, n_cols, T, R, COLUMNS, PH, PW = operand
    token = rows % T - R
    top, left = token // COLUMNS * PH, token % COLUMNS * PW  # the patch's first pixel
    corner = (rows // T).to(tl.int64) * stride_b + top.to(tl.int64) * stride_h + left.to(tl.int64) * stride_w
    channel, pixel = cols // (PH * PW), cols % (PH * PW)
    inside = channel.to(tl.int64) * stride_c + (pixel // PW).to(tl.int64) * stride_h
    inside += (pixel % PW).to(tl.int64) * stride_w
    mask = ((rows < n_rows) & (token >= 0))[:, None] & (cols < n_cols)[None, :]
    return tl.load(ptr + corner[:, None] + inside[None, :], mask=mask, other=0.0)


@triton.jit
def patches_outer(operand, outer, inner, OUTER: tl.constexpr, INNER: tl.constexpr):
    return _patches(operand, outer, inner, OUTER, INNER)


@triton.jit
def patches_inner(operand, outer, inner, OUTER: tl.constexpr, INNER: tl.constexpr):
    return _patches(operand, inner, outer, INNER, OUTER).T


@triton.jit
def load_rows(table_ptr, rows, n_rows, cols, n_cols):
    """Rows of a table [n_rows, n_cols] in fp32, zeros for an index outside."""
    mask = ((rows >= 0) & (rows < n_rows))[:, None] & (cols < n_cols)[None, :]
    return tl.load(table_ptr + rows[:, None] * n_cols + cols[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _forward_kernel(
    image_ptr, weight_ptr, bias_ptr, position_ptr, prefix_ptr, token_ptr,
    M, N, K, T, R, COLUMNS, stride_b, stride_c, stride_h, stride_w,
    FIRST_POSITION: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, PIECES: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Tokens [M, N], M = B·T. FIRST_POSITION is the token of the position table's first row: 0, or R where prefix
    tokens have no position."""
    DTYPE: tl.constexpr = weight_ptr.dtype.element_ty
    WIDTH: tl.constexpr = BLOCK_N // PIECES
    image = (image_ptr, stride_b, stride_c, stride_h, stride_w, M, K, T, R, COLUMNS, PH, PW)
    weight = matrix(weight_ptr, N, K, K, BLOCK_N, BLOCK_K, TMA)
    tokens = matrix(token_ptr, M, N, N, BLOCK_M, WIDTH, TMA == 1)
    for tile in tl.range(tl.program_id(0), count_tiles(M, N, BLOCK_M, BLOCK_N), tl.num_programs(0), flatten=True):
        row, first_col = tile_of(tile, M, N, BLOCK_M, BLOCK_N)
        sums = product(
            patches_outer, image, rows_outer, weight, row, first_col, 0, K,
            DTYPE, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
        )  # fmt: skip
        token = (row + tl.arange(0, BLOCK_M)) % T
        pieces = column_pieces(sums, PIECES)
        for piece in tl.static_range(PIECES):
            col = first_col + piece * WIDTH
            cols = col + tl.arange(0, WIDTH)
            y = pieces[piece]
            if bias_ptr is not None:
                y += tl.where(token[:, None] >= R, load_vector(bias_ptr, cols, N)[None, :], 0.0)
            if prefix_ptr is not None:
                y += load_rows(prefix_ptr, token, R, cols, N)
            if position_ptr is not None:
                y += load_rows(position_ptr, token - FIRST_POSITION, T - FIRST_POSITION, cols, N)
            store_tile(tokens, y, row, col, token_ptr.dtype.element_ty)


@triton.jit
def _weight_grad_kernel(
    dtoken_ptr, image_ptr, partial_ptr, sums_ptr,
    M, N, K, T, R, COLUMNS, stride_b, stride_c, stride_h, stride_w, span,
    PH: tl.constexpr, PW: tl.constexpr, DTYPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    dtokens = matrix(dtoken_ptr, M, N, N, BLOCK_K, BLOCK_M, TMA)
    image = (image_ptr, stride_b, stride_c, stride_h, stride_w, M, K, T, R, COLUMNS, PH, PW)
    weight_grad_tile(
        dtokens, patches_inner, image, partial_ptr, sums_ptr, N, K, M, span,
        DTYPE, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
    )  # fmt: skip


def _geometry(images, weight, prefix) -> dict:
    """The sizes and strides that both kernels take, but for M and N."""
    height, columns = images.shape[-2:]
    patch_height, patch_width = weight.shape[-2:]
    count = 0 if prefix is None else prefix.shape[0]
    return {
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
    B, D, T = images.shape[0], weight.shape[0], sizes["T"]
    tokens = torch.empty((B, T, D), dtype=dtype, device=images.device)
    launch_tiles(
        _forward_kernel, "patch_embed_forward", B * T, D, weight.dtype, (weight.view(D, -1), tokens.view(-1, D)),
        image_ptr=images, weight_ptr=weight, bias_ptr=bias, position_ptr=position, prefix_ptr=prefix, token_ptr=tokens,
        FIRST_POSITION=0 if position is None else T - position.shape[0], PRECISION=precision, **sizes,
    )  # fmt: skip
    return tokens


def backward(dtokens, images, weight, bias, position, prefix, precision):
    """dW, dbias, dposition and dprefix (None where absent) from contiguous dtokens [B, T, D]."""
    sizes = _geometry(images, weight, prefix)
    (B, T, D), R = dtokens.shape, sizes["R"]
    operand = dtokens.to(weight.dtype)  # what is cast in the product would come from registers, at half its rate
    partial, _ = launch_weight_grad(
        _weight_grad_kernel, "patch_embed_weight_grad", B * T, D, sizes.pop("K"), weight.dtype, (operand.view(-1, D),),
        with_sums=False, dtoken_ptr=operand, image_ptr=images, PRECISION=precision, **sizes,
    )  # fmt: skip
    dweight, _, _ = finish(Partials(partial, None, weight.view(D, -1), None, None))
    sums = dtokens.sum(0, dtype=torch.float32)  # [T, D]
    dbias = None if bias is None else sums[R:].sum(0).to(bias.dtype)
    dposition = None if position is None else sums[T - position.shape[0] :].to(position.dtype, copy=True)
    dprefix = None if prefix is None else sums[:R].to(prefix.dtype, copy=True)
    return dweight.view(weight.shape), dbias, dposition, dprefix
