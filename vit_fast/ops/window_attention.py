"""window_attention: softmax attention inside the windows of a feature map, with a bias of relative positions."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from vit_fast.ops.backend import (
    check_operands,
    check_shape,
    compute_dtype,
    float32_precision,
    needs_grad,
    on_device_of,
    or_empty,
    or_none,
    use_triton,
)

APART = -100.0  # added to a score of two tokens that the shift brought together, as Swin's authors have it
HEAD_WIDTHS = (16, 32, 64)  # those that the kernels take
MOST_TOKENS = 64  # of a window, of those that they take
MOST_NUMBERS = 2**31 - 1  # of one image's qkv, within which they count in 32 bits; from image to image in 64


def check(qkv: Tensor, table: Tensor, window: tuple[int, int], shift: tuple[int, int]) -> None:
    if qkv.dim() != 6 or qkv.shape[3] != 3:
        raise ValueError(f"qkv: got shape {list(qkv.shape)}, takes [B, Y, X, 3, H, d]")
    for name, sides, least in (("window", window, 1), ("shift", shift, 0)):
        if len(sides) != 2 or min(sides) < least:
            raise ValueError(f"{name}: got {sides}, takes two numbers, of rows and of columns, each {least} or more")
    _, rows, columns, _, heads, _ = qkv.shape
    if rows % window[0] or columns % window[1]:
        high, wide = window
        raise ValueError(f"qkv: got a map of {rows} x {columns}, takes multiples of the window, {high} x {wide}")
    if shift[0] >= window[0] or shift[1] >= window[1]:
        raise ValueError(f"shift: got {shift}, takes less than the window, {window[0]} x {window[1]}")
    check_shape("table", table, ((2 * window[0] - 1) * (2 * window[1] - 1), heads))
    check_operands(qkv, table=table)


def refusal(window: tuple[int, int], head_width: int, numbers: int = 0) -> str:
    """Why no kernel takes such windows, or so many numbers in the qkv of one image, or ""."""
    if head_width not in HEAD_WIDTHS:
        return f"head width: got {head_width}, the kernels take {', '.join(map(str, HEAD_WIDTHS))}"
    if (tokens := window[0] * window[1]) > MOST_TOKENS:
        return f"window: got {window[0]} x {window[1]}, {tokens} tokens, the kernels take up to {MOST_TOKENS}"
    if numbers > MOST_NUMBERS:
        return f"qkv: got {numbers} numbers an image, the kernels take up to {MOST_NUMBERS}"
    return ""


@torch.library.custom_op("vit_fast::window_attention", mutates_args=())
def _window_attention(qkv: Tensor, table: Tensor, window: list[int], shift: list[int], scale: float) -> Tensor:
    from vit_fast.kernels import window_attention as kernel

    with on_device_of(qkv):
        return kernel.forward(qkv.contiguous(), table.contiguous(), window, shift, scale, float32_precision(qkv.dtype))


@_window_attention.register_fake
def _(qkv, table, window, shift, scale):
    return qkv.new_empty(*qkv.shape[:3], qkv.shape[4] * qkv.shape[5])


@torch.library.custom_op("vit_fast::window_attention_backward", mutates_args=())
def _backward(
    do: Tensor, qkv: Tensor, table: Tensor, window: list[int], shift: list[int], scale: float, trained: bool
) -> tuple[Tensor, Tensor]:
    from vit_fast.kernels import window_attention as kernel

    operands = (one.contiguous() for one in (do, qkv, table))
    with on_device_of(qkv):
        dqkv, dtable = kernel.backward(*operands, window, shift, scale, float32_precision(qkv.dtype), trained)
    return dqkv, or_empty(dtable, do)


@_backward.register_fake
def _(do, qkv, table, window, shift, scale, trained):
    return qkv.new_empty(qkv.shape), table.new_empty(table.shape) if trained else do.new_empty(0)


def _setup_context(ctx, inputs, output):
    qkv, table, *ctx.others = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(qkv, table)


def _autograd(ctx, do):
    if do is None:
        return (None,) * 5
    dqkv, dtable = _backward(do, *ctx.saved_tensors, *ctx.others, ctx.needs_input_grad[1])
    return dqkv, or_none(dtable), None, None, None


_window_attention.register_autograd(_autograd, setup_context=_setup_context)


# [] and contiguous() ask for the device, which fake tensors of a GPU may not have; unsqueeze, embedding, clone do not.


def distances(window: tuple[int, int], device: torch.device) -> Tensor:
    """[T, T] the entry of the table for each query and key of a window."""
    high, wide = window
    row = 2 * wide - 1  # of the table: an entry is the difference of two tokens' numbers in rows of this length
    y, x = (torch.arange(size, device=device) for size in window)
    number = (y.unsqueeze(1) * row + x).flatten()
    return (number + (high - 1) * row + wide - 1).unsqueeze(1) - number


def _relative_bias(table: Tensor, window: tuple[int, int]) -> Tensor:
    """The bias [H, T, T] of each query and key of a window."""
    bias = F.embedding(distances(window, table.device), table).permute(2, 0, 1)
    return bias.clone(memory_format=torch.contiguous_format)  # adding it reads rows


def _cut(x: Tensor, window: tuple[int, int]) -> Tensor:
    """A map [B, Y, X, ...] as its windows [B, number, T, ...]."""
    batch, rows, columns = x.shape[:3]
    high, wide = window
    down, across = rows // high, columns // wide
    x = x.view(batch, down, high, across, wide, *x.shape[3:]).transpose(2, 3)
    return x.reshape(batch, down * across, high * wide, *x.shape[5:])


def apart(rows: int, columns: int, window: tuple[int, int], shift: tuple[int, int], like: Tensor) -> Tensor:
    """[number, T, T], APART where the shift brought two tokens of a window together, 0 elsewhere."""
    y, x = (torch.arange(size, device=like.device) >= size - by for size, by in zip((rows, columns), shift))
    region = _cut((2 * y.unsqueeze(1) + x).unsqueeze(0), window).squeeze(0)
    return (region.unsqueeze(2) != region.unsqueeze(1)).to(like.dtype) * APART


def _in_pytorch(qkv: Tensor, table: Tensor, window: tuple[int, int], shift: tuple[int, int], scale: float) -> Tensor:
    batch, rows, columns, _, heads, width = qkv.shape
    if not any(shift):
        places, cut = None, _cut(qkv, window)
    else:
        # The roll and the cut in one copy of all that a token holds: both of its number alone come first.
        number = torch.arange(rows * columns, device=qkv.device).view(1, rows, columns)
        places = _cut(number.roll((-shift[0], -shift[1]), (1, 2)), window)  # [1, number, T]
        cut = qkv.flatten(1, 2).index_select(1, places.flatten()).view(batch, *places.shape[1:], 3, heads, width)
    q, k, v = cut.permute(3, 0, 1, 4, 2, 5)  # each [B, number, H, T, d]
    bias = _relative_bias(table, window)
    # Two products and a softmax: SDPA, which would take the bias as a mask, was slower on a CPU in every dtype.
    scores = q * scale @ k.transpose(-1, -2)
    if places is not None:
        mask = apart(rows, columns, window, shift, bias).unsqueeze(1)
        # One pass less where the bias takes it, whose gradient would then be summed over images and windows one by one.
        if needs_grad(table):
            scores = scores + mask
        else:
            bias = bias + mask
    o = ((scores + bias).softmax(-1) @ v).transpose(2, 3)
    if places is not None:
        o = o.reshape(batch, rows * columns, heads * width).index_select(1, places.flatten().argsort())
    else:
        high, wide = window
        o = o.reshape(batch, rows // high, columns // wide, high, wide, heads * width).transpose(2, 3)
    return o.reshape(batch, rows, columns, heads * width)


def window_attention(
    qkv: Tensor,
    table: Tensor,
    window: tuple[int, int],
    shift: tuple[int, int] = (0, 0),
    scale: float | None = None,
) -> Tensor:
    """softmax(scale·q·kᵀ + B)·v for each head of each window of a feature map, the windows shifted or not.

    Liu et al. 2021, Swin Transformer, equation 4 and the cyclic shift of section 3.2: the map is rolled up and left by
    the shift, cut into windows and rolled back, and tokens that only the roll brought together get −100 on their score.
    The kernels never move the map: they read and write each token where it lies.

    Args:
        qkv: [B, Y, X, 3, H, d], the product of a block's QKV map over a map of Y x X tokens, viewed; fp32, fp16, bf16,
            or fp64 (PyTorch only).
        table: [(2·Wy − 1)·(2·Wx − 1), H], B's entry for each distance of two tokens in a window, as Swin's
            `relative_position_bias_table`.
        window: (Wy, Wx), tokens; Y and X are multiples of them.
        shift: rows and columns, less than the window's.
        scale: what multiplies the scores, 1/√d for None.

    The kernels take d = 16, 32 and 64, windows of up to 64 tokens and images of less than 2^31 numbers in qkv; others
    run in PyTorch. Their gradients, the table's too, are deterministic and have no second derivative.

    Returns:
        [B, Y, X, H·d] in the dtype of qkv, or autocast's where it is on.

    Raises:
        ValueError: for a shape, a window, a shift or a device that does not fit, and under use_backend("triton") for a
            window, a head width or a map that no kernel takes. TypeError: for a dtype that does not fit.
    """
    check(qkv, table, window, shift)
    scale = qkv.shape[-1] ** -0.5 if scale is None else scale
    refused = refusal(window, qkv.shape[-1], math.prod(qkv.shape[1:]))
    if not use_triton("window_attention", qkv, table, refusal=refused):
        return _in_pytorch(qkv, table, window, shift, scale)
    return _window_attention(qkv.to(compute_dtype(qkv)), table, list(window), list(shift), scale)
