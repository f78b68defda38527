"""attention: softmax attention over heads side by side, and exact rows of its probabilities."""

import contextlib
import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake
from torch.nn.attention import SDPBackend, sdpa_kernel

from vit_fast.ops.backend import (
    check_device,
    check_operands,
    check_rank,
    check_shape,
    compute_dtype,
    differentiates_forward,
    float32_precision,
    measured_faster,
    needs_grad,
    on_device_of,
    use_triton,
    without_autocast,
)


class _Form(NamedTuple):
    """One of SDPA's ways to compute attention, and whether the user lets it."""

    backend: SDPBackend
    enabled: Callable[[], bool]


# PyTorch's own forms, as the files of results name them.
SDPA = {
    "sdpa cudnn": _Form(SDPBackend.CUDNN_ATTENTION, torch.backends.cuda.cudnn_sdp_enabled),
    "sdpa flash": _Form(SDPBackend.FLASH_ATTENTION, torch.backends.cuda.flash_sdp_enabled),
    "sdpa efficient": _Form(SDPBackend.EFFICIENT_ATTENTION, torch.backends.cuda.mem_efficient_sdp_enabled),
    "sdpa math": _Form(SDPBackend.MATH, torch.backends.cuda.math_sdp_enabled),
}
UNFUSED_SCORES = 32 * 12 * 197**2  # the most that were measured: 32 images of a ViT-B, 30 MB of probabilities a layer
LEAST_SCALE = 1e-30  # by which what the kernels divide stays in the range of fp32
HEAD_WIDTHS = (16, 32, 48, 64, 72, 80, 88, 96, 104, 128)  # those that the kernels take


def check(q: Tensor, k: Tensor) -> None:
    check_rank("q", q, "B Tq H d")
    batch, _, heads, width = q.shape
    if k.dim() != 4 or (k.shape[0], *k.shape[2:]) != (batch, heads, width):
        raise ValueError(f"k: got shape {list(k.shape)}, takes [{batch}, Tk, {heads}, {width}], q's but for the tokens")
    if k.shape[1] == 0:
        raise ValueError(f"k: got shape {list(k.shape)}, takes one token at least: a softmax over none has no value")


def check_qkv(qkv: Tensor) -> None:
    if qkv.dim() != 5 or qkv.shape[2] != 3:
        raise ValueError(f"qkv: got shape {list(qkv.shape)}, takes [B, T, 3, H, d]")
    check_operands(qkv)


def size(q: Tensor, k: Tensor) -> tuple[tuple[int, int, int], int]:
    """The shape and the rows of a call as `evidence.Finding` has them."""
    batch, tokens, heads, width = q.shape
    return (tokens, k.shape[1], width), batch * heads


def refusal(width: int, scale: float) -> str:
    """Why no kernel takes a head width or a scale, or ""."""
    if width not in HEAD_WIDTHS:
        return f"head width: got {width}, the kernels take {', '.join(map(str, HEAD_WIDTHS))}"
    if not LEAST_SCALE <= scale < float("inf"):
        return f"scale: got {scale}, the kernels take a number of {LEAST_SCALE} or more"
    return ""


def last_axis_dense(x: Tensor) -> Tensor:
    """`x` itself where its last stride is 1, as the kernels read it, and a copy elsewhere."""
    return x if x.stride(-1) == 1 else x.contiguous()


def forward(q: Tensor, k: Tensor, v: Tensor, scale: float, with_lse: bool):
    from vit_fast.kernels import attention as kernel

    q, k, v = map(last_axis_dense, (q, k, v))
    with on_device_of(q):
        return kernel.forward(q, k, v, scale, float32_precision(q.dtype), with_lse)


def gradients(do, q, k, v, o, lse, dq, dk, dv, scale) -> None:
    from vit_fast.kernels import attention as kernel

    do, q, k, v = map(last_axis_dense, (do, q, k, v))
    with on_device_of(q):
        kernel.backward(do, q, k, v, o, lse, dq, dk, dv, scale, float32_precision(q.dtype))


def fake_output(q: Tensor) -> Tensor:
    batch, tokens, heads, width = q.shape
    return q.new_empty(batch, tokens, heads * width)


def fake_lse(q: Tensor) -> Tensor:
    batch, tokens, heads, _ = q.shape
    return q.new_empty(batch, heads, tokens, dtype=torch.float64 if q.dtype == torch.float32 else torch.float32)


@torch.library.custom_op("vit_fast::attention", mutates_args=())
def _attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return forward(q, k, v, scale, with_lse=False)[0]


@_attention.register_fake
def _(q, k, v, scale):
    return fake_output(q)


@torch.library.custom_op("vit_fast::attention_train", mutates_args=())
def _attention_train(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return forward(q, k, v, scale, with_lse=True)


@_attention_train.register_fake
def _(q, k, v, scale):
    return fake_output(q), fake_lse(q)


@torch.library.custom_op("vit_fast::attention_backward", mutates_args=())
def _backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    gradients(do, q, k, v, o, lse, dq, dk, dv, scale)
    return dq, dk, dv


@_backward.register_fake
def _(do, q, k, v, o, lse, scale):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _setup_context(ctx, inputs, output):
    *operands, ctx.scale = inputs
    o, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*operands, o, lse)


def _autograd(ctx, do, _):
    if do is None:
        return (None,) * 4
    return *_backward(do, *ctx.saved_tensors, ctx.scale), None


_attention_train.register_autograd(_autograd, setup_context=_setup_context)


@torch.library.custom_op("vit_fast::attention_qkv_train", mutates_args=())
def _attention_qkv_train(qkv: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    q, k, v = qkv.unbind(2)
    return forward(q, k, v, scale, with_lse=True)


@_attention_qkv_train.register_fake
def _(qkv, scale):
    q = qkv.select(2, 0)
    return fake_output(q), fake_lse(q)


@torch.library.custom_op("vit_fast::attention_qkv_backward", mutates_args=())
def _qkv_backward(do: Tensor, qkv: Tensor, o: Tensor, lse: Tensor, scale: float) -> Tensor:
    # One tensor: three views of it could not be three outputs, and autograd would copy three gradients into one.
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    (q, k, v), (dq, dk, dv) = qkv.unbind(2), dqkv.unbind(2)
    gradients(do, q, k, v, o, lse, dq, dk, dv, scale)
    return dqkv


@_qkv_backward.register_fake
def _(do, qkv, o, lse, scale):
    return qkv.new_empty(qkv.shape)


def _qkv_autograd(ctx, do, _):
    if do is None:
        return None, None
    return _qkv_backward(do, *ctx.saved_tensors, ctx.scale), None


_attention_qkv_train.register_autograd(_qkv_autograd, setup_context=_setup_context)


@torch.library.custom_op("vit_fast::attention_maps", mutates_args=())
def _maps(q: Tensor, k: Tensor, lse: Tensor, scale: float) -> Tensor:
    from vit_fast.kernels import attention as kernel

    q, k = map(last_axis_dense, (q, k))
    with on_device_of(q):
        return kernel.maps(q, k, lse.contiguous(), scale, float32_precision(q.dtype))


@_maps.register_fake
def _(q, k, lse, scale):
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], k.shape[1], dtype=torch.float32)


def _unfused_is_faster(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether two products and a softmax beat SDPA: eagerly on a CPU in bf16.

    Measured: benchmarks/results/AMD_EPYC/attention.json. Not while a graph is traced, which may run elsewhere, and not
    where the probabilities would take much memory.
    """
    return (
        not (torch.compiler.is_compiling() or torch.jit.is_tracing())
        and k.device.type == "cpu"
        and q.dtype == k.dtype == v.dtype == compute_dtype(q) == torch.bfloat16
        and q.shape[0] * q.shape[2] * q.shape[1] * k.shape[1] <= UNFUSED_SCORES
        and _multiplies_bf16()
    )


@functools.cache
def _multiplies_bf16() -> bool:
    """Whether oneDNN has products in bf16 for this CPU: where it has none, as of fp16, they are many times slower."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def unfused(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Attention by two products and a softmax, of bf16 on a CPU."""
    batch, _, heads, _ = q.shape
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
    with without_autocast(q):  # in which a softmax would be fp32
        # Scores are rounded to bf16. What all keys share adds the same to each score of a row, which softmax takes off
        # again and the rounding would not; no gradient passes through the mean, for which any number near it would do.
        k = k - k.detach().mean(1, keepdim=True).nan_to_num(0.0, 0.0, 0.0)  # of keys that have none, nothing
        # beta=0: what is to be added to is not read.
        scores = torch.baddbmm(q.new_empty(1, 1, 1), q, k.transpose(1, 2), beta=0, alpha=scale)
        return torch.bmm(scores.softmax(-1), v).unflatten(0, (batch, heads)).transpose(1, 2).flatten(2)


def in_pytorch(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    if _unfused_is_faster(q, k, v):
        return unfused(q, k, v, scale)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    # Of its forms one alone has a rule for forward-mode differentiation.
    with sdpa_kernel(SDPBackend.MATH) if differentiates_forward() else contextlib.nullcontext():
        return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).flatten(2)


def _switched_on() -> tuple[str, ...]:
    """The forms of SDPA that the user lets PyTorch use."""
    return tuple(name for name, form in SDPA.items() if form.enabled())


vars(_switched_on)["_dynamo_marked_constant"] = True  # as those of backend.py


def measured_form(operands: tuple[Tensor, ...], shape: tuple[int, int, int], rows: int) -> str:
    """The form of SDPA that was measured faster for a call, or "": also where the user has switched that form off."""
    finding = measured_faster("attention", operands, shape, rows)
    return finding.form if finding and finding.form in _switched_on() else ""


def _as_measured(q: Tensor, k: Tensor, v: Tensor, scale: float, form: str) -> Tensor:
    """`in_pytorch` by a form of SDPA; where it does not take the call, by another that is not switched off."""
    others = [SDPA[name].backend for name in _switched_on() if name != form]
    with sdpa_kernel([SDPA[form].backend, *others], set_priority=True):
        return in_pytorch(q, k, v, scale)


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """softmax(scale·q·kᵀ)·v for each head, the heads side by side in the result.

    Vaswani et al. 2017, equation 1; the kernels compute it without its scores in memory, as Dao et al. 2022,
    FlashAttention, does.

    Args:
        q: [B, Tq, H, d], fp32, fp16, bf16, or fp64 (PyTorch only). Any strides: slices of a packed QKV are not copied.
        k, v: [B, Tk, H, d], of lengths of their own, Tk ≥ 1.
        scale: what multiplies the scores, 1/√d for None.

    The kernels take d = 16, 32, 48, 64, 72, 80, 88, 96, 104 and 128, and a scale of 1e-30 or more; any other
    runs in PyTorch.
    Their gradients are deterministic and have no second derivative.

    Returns:
        [B, Tq, H·d] in the dtype of q, or autocast's where it is on.

    Raises:
        ValueError: for a shape or a device that does not fit, and under use_backend("triton") for a head width or scale
            that no kernel takes. TypeError: for a dtype that does not fit.
    """
    check(q, k)
    check_shape("v", v, tuple(k.shape))
    check_operands(q, k=k, v=v)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if not use_triton("attention", q, refusal=refusal(q.shape[-1], scale)):
        return in_pytorch(q, k, v, scale)
    form = measured_form((q, k, v), *size(q, k))
    dtype = compute_dtype(q)
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    if form:
        return _as_measured(q, k, v, scale, form)
    if needs_grad(q, k, v):
        return _attention_train(q, k, v, scale)[0]
    return _attention(q, k, v, scale)


def attention_qkv(qkv: Tensor, scale: float | None = None) -> Tensor:
    """`attention` of packed queries, keys and values, whose gradient is one packed tensor too.

    Vaswani et al. 2017, equation 1; Dao et al. 2022, FlashAttention.

    Args:
        qkv: [B, T, 3, H, d], the product of an attention block's QKV map, viewed. Dtypes and strides as `attention`.
        scale: what multiplies the scores, 1/√d for None.

    Returns:
        [B, T, H·d] in the dtype of qkv, or autocast's where it is on.

    Raises:
        ValueError: for a shape that does not fit, and under use_backend("triton") for a head width or scale that no
            kernel takes. TypeError: for a dtype that is not floating.
    """
    check_qkv(qkv)
    scale = qkv.shape[-1] ** -0.5 if scale is None else scale
    if not use_triton("attention_qkv", qkv, refusal=refusal(qkv.shape[-1], scale)):
        q, k, v = qkv.unbind(2)
        return in_pytorch(q, k, v, scale)
    q, k, _ = qkv.unbind(2)
    form = measured_form((qkv,), *size(q, k))
    qkv = qkv.to(compute_dtype(qkv))
    if form:
        q, k, v = qkv.unbind(2)
        return _as_measured(q, k, v, scale, form)
    if needs_grad(qkv):
        return _attention_qkv_train(qkv, scale)[0]
    return _attention(*qkv.unbind(2), scale)


def attention_maps(
    q: Tensor, k: Tensor, queries: Tensor | None = None, scale: float | None = None, lse: Tensor | None = None
) -> Tensor:
    """Rows of softmax(scale·q·kᵀ): how much each chosen query looks at each key, in each head.

    Vaswani et al. 2017, equation 1. Exact, and no other row is computed.

    Args:
        q: [B, Tq, H, d].    k: [B, Tk, H, d]. Dtypes and strides as `attention`.
        queries: [Nq] integers, the tokens of q whose rows are wanted, or None for all of them.
        scale: what multiplies the scores, 1/√d for None.
        lse: [B, H, Tq], fp32 or fp64, the logarithm to base 2 of the sum of each query's exponentiated scores, where it
            is at hand: `torch.ops.vit_fast.attention_train` returns it. The kernels then skip a pass over the keys.

    The kernels give no gradient: where one is wanted, `auto` runs PyTorch and use_backend("triton") raises.

    Returns:
        [B, H, Nq, Tk] in fp32 (fp64 where q is), each row's sum 1.

    Raises:
        ValueError: for a shape, a device or a query that does not fit, and under use_backend("triton") for a head width
            or scale that no kernel takes, or where a gradient is wanted. TypeError: for a dtype that does not fit.
    """
    check(q, k)
    check_operands(q, k=k)
    if lse is not None:
        check_shape("lse", lse, (q.shape[0], q.shape[2], q.shape[1]))
        check_device(q, lse=lse)
        if lse.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"lse: got {lse.dtype}, takes float32 or float64")
    if queries is not None:
        _check_queries(queries, q.shape[1])
        q, lse = q[:, queries], None if lse is None else lse[:, :, queries]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    dtype = compute_dtype(q)
    q, k = q.to(dtype), k.to(dtype)
    reason = refusal(q.shape[-1], scale)
    if needs_grad(q, k):
        reason = "a gradient through attention_maps: the kernels give none"
    if use_triton("attention_maps", q, refusal=reason):
        if lse is None:
            lse = _attention_train(q, k, k, scale)[1]  # its values cost a product that nobody reads, and no memory
        return _maps(q, k, lse, scale)
    with without_autocast(q):
        wide = torch.promote_types(dtype, torch.float32)
        return (q.transpose(1, 2).to(wide) * scale @ k.permute(0, 2, 3, 1).to(wide)).softmax(-1)


def _check_queries(queries: Tensor, tokens: int) -> None:
    if queries.dim() != 1 or queries.dtype not in (torch.int64, torch.int32):
        got = f"{queries.dtype} {list(queries.shape)}"
        raise ValueError(f"queries: got {got}, takes an int64 or int32 tensor [Nq], the index of a token each")
    if torch.compiler.is_compiling() or not queries.numel() or queries.is_meta or is_fake(queries):
        return  # a value cannot be read while a graph is traced: the indexing itself then refuses a wrong one
    low, high = queries.min().item(), queries.max().item()
    if low < -tokens or high >= tokens:
        raise ValueError(f"queries: got {low} to {high}, takes indices below {tokens}, the tokens of q")
