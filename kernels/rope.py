"""Rotary position embedding: the queries and keys of an image's last tokens, turned by the angles of their positions.

forward    a′ = cos·a − sin·b         b′ = cos·b + sin·a      for each pair (a, b) of a head's numbers
backward   da = cos·da′ + sin·db′     db = cos·db′ − sin·da′
pairs      (i, i + d/2), or (2i, 2i + 1) where they are interleaved. Each number has a cos and a sin of its own: in the
           forward's two equations those of the number that is made, in the backward's those that the number met there
shapes     x, y [B, T, 2, H, d] of any strides but 1 in d; y may be x   cos, sin [N, d] or [H, N, d], N ≤ T.
           The T − N tokens before are copied
saved      nothing: the gradient of a turn is the turn back
limit      4·B·T·H·d elements moved, each once. The tables come from L2, once for HEADS heads where all share them.
           Where d/2 is no multiple of 8, as of heads 72 and 88 wide, half precision moves two bytes at a time

A pass of its own: turned on its way into the attention, a key would be turned once for each tile of queries. What is
turned lies apart from the values, so that on a Hopper attention.forward takes it and not hopper_attention.py.
"""

import torch
import triton
import triton.language as tl

from .product import early, wait_for_launch_before

HEADS = 4  # of a program
PAIRS = 1024  # of each of them: eight a thread, 16 bytes of half precision


@triton.jit
def _pairs(rows, wanted, HALF: tl.constexpr, WIDTH: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The first and the second numbers of the pairs of rows, given by pointers [BLOCK_T, 1]; HALF pairs of WIDTH."""
    if INTERLEAVED:
        cols = tl.arange(0, 2 * WIDTH)[None, :]
        x = tl.load(rows + cols, mask=wanted & (cols < 2 * HALF), other=0.0).to(tl.float32)
        a, b = tl.split(tl.reshape(x, [x.shape[0], WIDTH, 2]))
    else:
        cols = tl.arange(0, WIDTH)[None, :]
        mask = wanted & (cols < HALF)
        a = tl.load(rows + cols, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(rows + HALF + cols, mask=mask, other=0.0).to(tl.float32)
    return a, b


@triton.jit
def _store_pairs(rows, a, b, wanted, HALF: tl.constexpr, WIDTH: tl.constexpr, INTERLEAVED: tl.constexpr):
    DTYPE: tl.constexpr = rows.dtype.element_ty
    if INTERLEAVED:
        cols = tl.arange(0, 2 * WIDTH)[None, :]
        x = tl.reshape(tl.join(a.to(DTYPE), b.to(DTYPE)), [a.shape[0], 2 * WIDTH])
        tl.store(rows + cols, x, mask=wanted & (cols < 2 * HALF))
    else:
        cols = tl.arange(0, WIDTH)[None, :]
        mask = wanted & (cols < HALF)
        tl.store(rows + cols, a.to(DTYPE), mask=mask)
        tl.store(rows + HALF + cols, b.to(DTYPE), mask=mask)


@triton.jit
def _rows_of_head(x, image, tokens, part, h):
    """Pointers [BLOCK_T, 1] to the tokens' rows of a head of a view [B, T, 2, H, d], (pointer, its four strides)."""
    ptr, stride_b, stride_t, stride_part, stride_h = x
    head = image.to(tl.int64) * stride_b + part.to(tl.int64) * stride_part + h.to(tl.int64) * stride_h
    return ptr + head + tokens.to(tl.int64)[:, None] * stride_t


@triton.jit
def _turns_of_head(table, h, places, wanted, HALF: tl.constexpr, WIDTH: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Of a table, (pointer, strides of H and N), the entries for the pairs of tokens at these places; h is None for one
    that all heads share."""
    ptr, stride_h, stride_n = table
    rows = ptr + places.to(tl.int64)[:, None] * stride_n
    if h is not None:
        rows += h.to(tl.int64) * stride_h
    return _pairs(rows, wanted, HALF, WIDTH, INTERLEAVED)


@triton.jit(do_not_specialize=["T", "first", "H"])
def _rotate_kernel(
    x, y, cos, sin,
    T, first, H,
    BACK: tl.constexpr, A_TABLE_A_HEAD: tl.constexpr, INTERLEAVED: tl.constexpr,
    HALF: tl.constexpr, WIDTH: tl.constexpr, BLOCK_T: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """BLOCK_T tokens of HEADS of the 2·H heads of queries and keys; the tokens before `first` are not turned."""
    wait_for_launch_before()
    blocks = tl.cdiv(T, BLOCK_T)
    image, tokens = tl.program_id(0) // blocks, tl.program_id(0) % blocks * BLOCK_T + tl.arange(0, BLOCK_T)
    turned = ((tokens >= first) & (tokens < T))[:, None]
    if not A_TABLE_A_HEAD:
        cos_a, cos_b = _turns_of_head(cos, None, tokens - first, turned, HALF, WIDTH, INTERLEAVED)
        sin_a, sin_b = _turns_of_head(sin, None, tokens - first, turned, HALF, WIDTH, INTERLEAVED)
    for index in tl.static_range(HEADS):
        head = tl.program_id(1) * HEADS + index
        part, h = head // H, head % H
        wanted = (tokens < T)[:, None] & (part < 2)
        if A_TABLE_A_HEAD:
            cos_a, cos_b = _turns_of_head(cos, h, tokens - first, turned & wanted, HALF, WIDTH, INTERLEAVED)
            sin_a, sin_b = _turns_of_head(sin, h, tokens - first, turned & wanted, HALF, WIDTH, INTERLEAVED)
        a, b = _pairs(_rows_of_head(x, image, tokens, part, h), wanted, HALF, WIDTH, INTERLEAVED)
        if BACK:
            new_a, new_b = cos_a * a + sin_b * b, cos_b * b - sin_a * a
        else:
            new_a, new_b = cos_a * a - sin_a * b, cos_b * b + sin_b * a
        # In the place of the product and no sum with it: what is no number stays where it is.
        new_a, new_b = tl.where(turned, new_a, a), tl.where(turned, new_b, b)
        _store_pairs(_rows_of_head(y, image, tokens, part, h), new_a, new_b, wanted, HALF, WIDTH, INTERLEAVED)


def rotate(x: torch.Tensor, y: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool, back: bool):
    """Writes y, of the shape and dtype of x [B, T, 2, H, d], x itself if wanted. `back` turns a gradient back."""
    B, T, _, H, d = x.shape
    width = triton.next_power_of_2(d // 2)
    block = max(PAIRS // width, 1)

    def table(t: torch.Tensor) -> tuple:
        return t, t.stride(0), t.stride(-2)

    _rotate_kernel[(B * triton.cdiv(T, block), triton.cdiv(2 * H, HEADS))](
        x=(x, *x.stride()[:-1]), y=(y, *y.stride()[:-1]), cos=table(cos), sin=table(sin),
        T=T, first=T - cos.shape[-2], H=H, BACK=back, A_TABLE_A_HEAD=cos.dim() == 3, INTERLEAVED=interleaved,
        HALF=d // 2, WIDTH=width, BLOCK_T=block, HEADS=HEADS, num_warps=4, **early(x.device, B * T, H * d),
    )  # fmt: skip
