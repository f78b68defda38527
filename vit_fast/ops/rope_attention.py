"""rope_attention: softmax attention of queries and keys that are turned by the angles of their positions first."""

import torch
from torch import Tensor

from vit_fast.ops.attention import (
    check_qkv,
    fake_lse,
    fake_output,
    forward,
    gradients,
    in_pytorch,
    last_axis_dense,
    refusal,
)
from vit_fast.ops.backend import check_device, compute_dtype, needs_grad, on_device_of, use_triton


def check(qkv: Tensor, cos: Tensor, sin: Tensor) -> None:
    check_qkv(qkv)
    _, tokens, _, heads, width = qkv.shape
    if width % 2:
        raise ValueError(f"qkv: got heads {width} wide, takes an even width: their numbers are turned in pairs")
    for name, table in (("cos", cos), ("sin", sin)):
        shape = tuple(table.shape)
        if shape[-1:] != (width,) or shape[:-2] not in ((), (heads,)) or len(shape) < 2 or shape[-2] > tokens:
            takes = f"[N, {width}] or [{heads}, N, {width}], N of the {tokens} tokens"
            raise ValueError(f"{name}: got shape {list(shape)}, takes {takes}")
        if not table.is_floating_point():
            raise TypeError(f"{name}: got {table.dtype}, takes a floating dtype")
    if cos.shape != sin.shape:
        raise ValueError(f"sin: got shape {list(sin.shape)}, takes {list(cos.shape)}, that of cos")
    check_device(qkv, cos=cos, sin=sin)


def _rotate(x: Tensor, y: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, back: bool) -> None:
    from vit_fast.kernels import rope as kernel

    with on_device_of(x):
        kernel.rotate(x, y, last_axis_dense(cos), last_axis_dense(sin), interleaved, back)


def _operands(qkv: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v as the attention reads them: the turned ones in memory of their own."""
    qkv = last_axis_dense(qkv)
    qk = torch.empty((*qkv.shape[:2], 2, *qkv.shape[3:]), dtype=qkv.dtype, device=qkv.device)
    _rotate(qkv[:, :, :2], qk, cos, sin, interleaved, back=False)
    return qk[:, :, 0], qk[:, :, 1], qkv[:, :, 2]


@torch.library.custom_op("vit_fast::rope_attention", mutates_args=())
def _rope_attention(qkv: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, scale: float) -> Tensor:
    return forward(*_operands(qkv, cos, sin, interleaved), scale, with_lse=False)[0]


@_rope_attention.register_fake
def _(qkv, cos, sin, interleaved, scale):
    return fake_output(qkv.select(2, 0))


@torch.library.custom_op("vit_fast::rope_attention_train", mutates_args=())
def _rope_attention_train(
    qkv: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, scale: float
) -> tuple[Tensor, Tensor]:
    return forward(*_operands(qkv, cos, sin, interleaved), scale, with_lse=True)


@_rope_attention_train.register_fake
def _(qkv, cos, sin, interleaved, scale):
    q = qkv.select(2, 0)
    return fake_output(q), fake_lse(q)


@torch.library.custom_op("vit_fast::rope_attention_backward", mutates_args=())
def _backward(
    do: Tensor, qkv: Tensor, cos: Tensor, sin: Tensor, o: Tensor, lse: Tensor, interleaved: bool, scale: float
) -> Tensor:
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    # Turned again: kept, queries and keys would be two thirds of what the product before keeps.
    (q, k, v), (dq, dk, dv), dqk = _operands(qkv, cos, sin, interleaved), dqkv.unbind(2), dqkv[:, :, :2]
    gradients(do, q, k, v, o, lse, dq, dk, dv, scale)
    _rotate(dqk, dqk, cos, sin, interleaved, back=True)
    return dqkv


@_backward.register_fake
def _(do, qkv, cos, sin, o, lse, interleaved, scale):
    return qkv.new_empty(qkv.shape)


def _setup_context(ctx, inputs, output):
    *operands, ctx.interleaved, ctx.scale = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*operands, *output)


def _autograd(ctx, do, _):
    if do is None:
        return (None,) * 5
    return _backward(do, *ctx.saved_tensors, ctx.interleaved, ctx.scale), None, None, None, None


_rope_attention_train.register_autograd(_autograd, setup_context=_setup_context)


def _in_pytorch(qkv: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, scale: float) -> Tensor:
    q, k, v = qkv.unbind(2)
    return in_pytorch(turn(q, cos, sin, interleaved), turn(k, cos, sin, interleaved), v, scale)


def turn(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x [B, T, H, d], its last tokens turned, in PyTorch and in its dtype, in whichever the tables are."""
    first, count = x.shape[1] - cos.shape[-2], cos.shape[-2]
    cos, sin = (t.transpose(0, 1) if t.dim() == 3 else t.unsqueeze(1) for t in (cos, sin))  # [N, H or 1, d]
    before, last = x.split((first, count), 1)  # no index: PyTorch takes none of fake tensors of a GPU that is not there
    if interleaved:
        a, b = last.unflatten(-1, (-1, 2)).unbind(-1)
        partners = torch.stack((-b, a), -1).flatten(-2)
    else:
        a, b = last.chunk(2, -1)
        partners = torch.cat((-b, a), -1)
    turned = (last * cos + partners * sin).to(x.dtype)
    return torch.cat((before, turned), 1) if first else turned


def rope_attention(
    qkv: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False, scale: float | None = None
) -> Tensor:
    """`attention_qkv` with rotary positions: queries and keys of the last tokens are turned first, in pairs of numbers.

    Su et al. 2021, RoFormer, equation 34; for pictures, with a token's row and column as positions, Heo et al. 2024.
    A pair (a, b) becomes (cos·a − sin·b, cos·b + sin·a).

    Args:
        qkv: [B, T, 3, H, d], the product of an attention block's QKV map, viewed. Dtypes and strides as `attention`.
        cos, sin: [N, d], or [H, N, d] for tables of each head's own, of the last N tokens; those before them, as the
            class token and registers, are not turned. Any floating dtype; the kernels take fp32, fp16 and bf16.
        interleaved: pairs are (2i, 2i + 1), as in RoFormer and EVA-02; else (i, i + d/2), as in DINOv3. A table has an
            entry for each number of the head, so that both of a pair have, as a rule, the same.
        scale: what multiplies the scores, 1/√d for None.

    The kernels give no gradient of the tables: where one is wanted, `auto` runs PyTorch and use_backend("triton")
    raises. For widths and scales see `attention`.

    Returns:
        [B, T, H·d] in the dtype of qkv, or autocast's where it is on.

    Raises:
        ValueError: for a shape or a device that does not fit, and under use_backend("triton") for a head width or scale
            that no kernel takes, and where a gradient of the tables is wanted. TypeError: for a dtype that is not
            floating, or that no kernel takes.
    """
    check(qkv, cos, sin)
    width = qkv.shape[-1]
    scale = width**-0.5 if scale is None else scale
    reason = refusal(width, scale)
    if needs_grad(cos, sin):
        reason = "a gradient of cos or sin: the kernels give none"
    if not use_triton("rope_attention", qkv, cos, sin, refusal=reason):
        return _in_pytorch(qkv, cos, sin, interleaved, scale)
    qkv = qkv.to(compute_dtype(qkv))
    if needs_grad(qkv):
        return _rope_attention_train(qkv, cos, sin, interleaved, scale)[0]
    return _rope_attention(qkv, cos, sin, interleaved, scale)
