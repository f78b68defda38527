"""An image cut into patches, their projection, the prefix tokens and the positions: tokens written once.

pixel      as it is, or of a byte (byte/255 − mean[c])/std[c] = byte·(1/(255·std[c])) − mean[c]/std[c], in fp32
forward    token[b, t] = prefix[t] (+ position[t])                                              t < R
           token[b, R + n] = W·patch[b, n] + bias + position[n, or R + n]
backward   dW = Σ dtoken[b, R + n]·patch[b, n]ᵀ     S[t] = Σ_b dtoken[b, t]
           dposition = S or S[R:]     dprefix = S[:R]     dbias = Σₙ S[R + n]
shapes     image [B, C, rows, columns]   W [D, C·PH·PW]   prefix [R, D]   position [N or R + N, D]   token [B, R + N, D]
saved      the image alone: it is cut again for the weight's gradient
limit      2·B·N·D·C·PH·PW operations each way; the image read, the patches written and read, the tokens written once

The prefix tokens are rows of the same product whose patch is empty, so one kernel writes every token of the result.
Where a prefix token's gradient is no number, the weight's is none either, for that is zero times it.

The cut is a pass of its own, as LayerNorm is: pixels gathered on their way into the product reach shared memory two or
sixteen bytes at a time, each with an address of its own, and the product waited for that (docs/performance.md).
It reads an image where it lies, and a byte as a byte: no copy of it in another dtype or layout is ever in memory.
"""

import torch
import triton
import triton.language as tl

from .linear import finish, weight_grad
from .product import (
    column_pieces,
    count_tiles,
    early,
    launch_tiles,
    load_vector,
    matrix,
    product,
    rows_outer,
    store_tile,
    tile_of,
    wait_for_launch_before,
)


@triton.jit
def of_channel(FACTORS: tl.constexpr, channel):
    """The factor of each channel, of so many that stand in the code: nothing is read."""
    factor = tl.zeros(channel.shape, tl.float32)
    for c in tl.static_range(len(FACTORS)):
        factor = tl.where(channel == c, FACTORS[c], factor)
    return factor


@triton.jit(do_not_specialize=["M", "T", "COLUMNS"])
def _cut_kernel(
    image_ptr, patch_ptr,
    M, K, LINES, T, R, COLUMNS, stride_b, stride_c, stride_h, stride_w,
    SCALE: tl.constexpr, SHIFT: tl.constexpr,
    PH: tl.constexpr, PW: tl.constexpr, PITCH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Row b·T + t of [M, K] is patch t − R of image b, in the order of a convolution's weight, LINES of PW pixels, PH a
    channel, then zeros; it is all zeros for a prefix token. A program takes whole lines, PITCH, a power of two, apart.

    The pixels of bytes are byte·SCALE[c] + SHIFT[c], rounded once; of other dtypes, where both are None, they are what
    is read: 16 bytes at a time where an image's lines lie so, and one pixel at a time where its channels lie together.
    """
    wait_for_launch_before()
    rows, cols = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    line, pixel = tl.program_id(1) * (BLOCK_N // PITCH) + cols // PITCH, cols % PITCH
    token = rows % T - R
    top, left = token // COLUMNS * PH, token % COLUMNS * PW  # the patch's first pixel
    corner = (rows // T).to(tl.int64) * stride_b + top.to(tl.int64) * stride_h + left.to(tl.int64) * stride_w
    inside = (line // PH).to(tl.int64) * stride_c + (line % PH).to(tl.int64) * stride_h
    inside += pixel.to(tl.int64) * stride_w
    wanted = ((rows < M) & (token >= 0))[:, None] & ((line < LINES) & (pixel < PW))[None, :]
    pixels = tl.load(image_ptr + corner[:, None] + inside[None, :], mask=wanted, other=0.0)
    if SCALE is not None:
        scale, shift = of_channel(SCALE, line // PH), of_channel(SHIFT, line // PH)
        pixels = tl.fma(pixels.to(tl.float32), scale[None, :], shift[None, :])
        pixels = tl.where(wanted, pixels, 0.0)  # and not the shift, where there is no pixel
    col = line * PW + pixel
    place = patch_ptr + rows[:, None].to(tl.int64) * K + col[None, :]
    mask = (rows < M)[:, None] & ((col < K) & (pixel < PW))[None, :]
    tl.store(place, pixels.to(patch_ptr.dtype.element_ty), mask=mask)


@triton.jit
def load_rows(table_ptr, rows, n_rows, cols, n_cols):
    """Rows of a table [n_rows, n_cols] in fp32, zeros for an index outside."""
    mask = ((rows >= 0) & (rows < n_rows))[:, None] & (cols < n_cols)[None, :]
    return tl.load(table_ptr + rows[:, None].to(tl.int64) * n_cols + cols[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["M", "T"])
def _forward_kernel(
    patch_ptr, weight_ptr, bias_ptr, position_ptr, prefix_ptr, token_ptr,
    M, N, K, T, R,
    FIRST_POSITION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PIECES: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Tokens [M, N], M = B·T. FIRST_POSITION is the token of the position table's first row: 0, or R where prefix
    tokens have no position."""
    wait_for_launch_before()
    DTYPE: tl.constexpr = weight_ptr.dtype.element_ty
    TOKEN_DTYPE: tl.constexpr = token_ptr.dtype.element_ty
    # Tokens in fp32 take twice the shared memory.
    COUNT: tl.constexpr = PIECES * max(1, TOKEN_DTYPE.primitive_bitwidth // DTYPE.primitive_bitwidth)
    WIDTH: tl.constexpr = BLOCK_N // COUNT
    patches = matrix(patch_ptr, M, K, K, BLOCK_M, BLOCK_K, TMA)
    weight = matrix(weight_ptr, N, K, K, BLOCK_N, BLOCK_K, TMA)
    tokens = matrix(token_ptr, M, N, N, BLOCK_M, WIDTH, TMA == 1)
    for tile in tl.range(tl.program_id(0), count_tiles(M, N, BLOCK_M, BLOCK_N), tl.num_programs(0), flatten=True):
        row, first_col = tile_of(tile, M, N, BLOCK_M, BLOCK_N)
        sums = product(
            rows_outer, patches, rows_outer, weight, row, first_col, 0, K,
            DTYPE, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
        )  # fmt: skip
        token = (row + tl.arange(0, BLOCK_M)) % T
        pieces = column_pieces(sums, COUNT)
        for piece in tl.static_range(COUNT):
            col = first_col + piece * WIDTH
            cols = col + tl.arange(0, WIDTH)
            y = pieces[piece]
            if bias_ptr is not None:
                y += load_vector(bias_ptr, cols, N)[None, :]
            if prefix_ptr is not None:
                # In the place of the product, and no sum with it: zeros times a weight that overflowed are no number.
                y = tl.where(token[:, None] < R, load_rows(prefix_ptr, token, R, cols, N), y)
            if position_ptr is not None:
                y += load_rows(position_ptr, token - FIRST_POSITION, T - FIRST_POSITION, cols, N)
            store_tile(tokens, y, row, col, TOKEN_DTYPE)


def cut(images, weight, prefix, mean, std):
    """Patches [B·(R + N), K] in the dtype of the weight, a row of zeros for each of the R prefix tokens.

    K is C·PH·PW, or with columns of zeros the next multiple of 16: what a load of 16 bytes and a descriptor want. Mean
    and std are constants of the kernel: there are few of them, and no copy of theirs goes to the device in a call.
    """
    B, C, height, width = images.shape
    PH, PW = weight.shape[-2:]
    R, N, K = 0 if prefix is None else prefix.shape[0], (height // PH) * (width // PW), -(-C * PH * PW // 16) * 16
    patches = torch.empty((B * (R + N), K), dtype=weight.dtype, device=images.device)
    pitch = triton.next_power_of_2(PW)
    block = max(256, pitch)
    scale = shift = None
    if mean is not None:
        scale, shift = tuple(1 / (255 * s) for s in std), tuple(-m / s for m, s in zip(mean, std))
    _cut_kernel[(-(-len(patches) // 16), -(-K // (block // pitch * PW)))](
        image_ptr=images, patch_ptr=patches, M=len(patches), K=K, LINES=C * PH, T=R + N, R=R, COLUMNS=width // PW,
        stride_b=images.stride(0), stride_c=images.stride(1), stride_h=images.stride(2), stride_w=images.stride(3),
        SCALE=scale, SHIFT=shift, PH=PH, PW=PW, PITCH=pitch, BLOCK_M=16, BLOCK_N=block, num_warps=4,
        **early(images.device, len(patches), len(weight)),
    )  # fmt: skip
    return patches


def forward(images, weight, bias, position, prefix, mean, std, dtype, precision):
    """Tokens [B, R + N, D] in `dtype`. Images of any strides, with mean and std where they are bytes, None elsewhere;
    weight, position and prefix contiguous."""
    patches = cut(images, weight, prefix, mean, std)
    (M, K), T, D = patches.shape, len(patches) // len(images), len(weight)
    weight = weight.view(D, -1)
    if K > weight.shape[1]:
        weight = torch.nn.functional.pad(weight, (0, K - weight.shape[1]))
    tokens = torch.empty((M // T, T, D), dtype=dtype, device=images.device)
    launch_tiles(
        _forward_kernel, "patch_embed_forward", M, D, weight.dtype, (patches, weight, tokens.view(M, D)),
        patch_ptr=patches, weight_ptr=weight, bias_ptr=bias, position_ptr=position, prefix_ptr=prefix,
        token_ptr=tokens, K=K, T=T, R=0 if prefix is None else prefix.shape[0], PRECISION=precision,
        FIRST_POSITION=0 if position is None else T - position.shape[0],
    )  # fmt: skip
    return tokens


def backward(dtokens, images, weight, bias, position, prefix, mean, std, precision):
    """dW, dbias, dposition and dprefix from contiguous dtokens [B, T, D]; None where absent, dW without images."""
    T, D = dtokens.shape[1:]
    R = 0 if prefix is None else prefix.shape[0]
    dweight = None
    if images is not None:
        # What is cast in the product would come from registers, at half its rate.
        operand = dtokens.to(weight.dtype).view(-1, D)
        patches = cut(images, weight, prefix, mean, std)
        partials = weight_grad(operand, patches, weight.view(D, -1), None, None, precision)
        ((dweight, _, _),) = finish(partials)  # [D, K], K with the columns that the patches have
        dweight = dweight[:, : weight[0].numel()].reshape(weight.shape).contiguous()
    sums = dtokens.sum(0, dtype=torch.float32)  # [T, D]
    dbias = None if bias is None else sums[R:].sum(0).to(bias.dtype)
    dposition = None if position is None else sums[T - position.shape[0] :].to(position.dtype, copy=True)
    dprefix = None if prefix is None else sums[:R].to(prefix.dtype, copy=True)
    return dweight, dbias, dposition, dprefix
