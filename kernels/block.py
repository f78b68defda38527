"""A whole block: the kernels of its two halves in their order, so that what one half knows reaches the other.

forward    m = x + drop∘γ₁∘(attention(LN(x)·Wqkvᵀ)·Wprojᵀ)     y = m + drop∘γ₂∘MLP(LN(m))
           7 launches
backward   of the second half, then of the first, each with the gradient past its branch added by the last kernel of
           the branch, which also writes what the first branch makes of that: drop∘γ₁ of it; one launch for the second
           stages of all four weights, one for both LayerNorms' dγ and dβ
           13 launches, 14 where attention takes two kernels, one more for the second half's LayerScale, drop path or
           autocast; 6 fewer where no parameter is trained, as between adapters
saved      x, qkv, o, m, h, lse and the mean and rstd of both LayerNorms: per token and layer 10·D elements (F = 4·D),
           16 bytes, and one number a head
held       between launches of inference 6·D elements a token at most: the residual stream, the hidden layer, and what
           is normalised before it or written behind it
"""

import torch

from . import attention, layer_norm, linear, linear_residual, ln_linear, mlp
from .replay import replayed


def _heads(qkv, tokens_per_image: int, heads: int):
    """Queries, keys and values [B, T, H, d] of a packed [M, 3·D], views all three."""
    return qkv.view(-1, tokens_per_image, 3, heads, qkv.shape[1] // (3 * heads)).unbind(2)


@replayed
def forward(
    x, norm1, qkv, proj, end1, norm2, fc1, fc2, end2, heads, activation, eps1, eps2, tokens_per_image, precision,
    training,
):  # fmt: skip
    """y [M, D], and (qkv, o, lse, m, h, mean₁, rstd₁, mean₂, rstd₂), or None unless training.

    norm, qkv, proj, fc are (weight, bias), end is (LayerScale, drop).
    """
    packed, mean1, rstd1 = ln_linear.forward(x, *norm1, *qkv, eps1, precision, training)
    q, k, v = _heads(packed, tokens_per_image, heads)
    o, lse = attention.forward(q, k, v, q.shape[-1] ** -0.5, precision, training)
    o = o.flatten(0, 1)
    middle = linear_residual.forward(o, *proj, x, *end1, tokens_per_image, precision)
    kept = (packed, o, lse, middle) if training else ()
    del packed, q, k, v, o  # the second half takes their memory where nobody keeps them
    y, hidden, mean2, rstd2 = mlp.forward(
        middle, *norm2, *fc1, *fc2, *end2, activation, eps2, tokens_per_image, precision, training
    )  # fmt: skip
    return y, (*kept, hidden, mean1, rstd1, mean2, rstd2) if training else None


@replayed
def backward(
    dy, x, kept, norm1, qkv, proj, end1, norm2, fc1, fc2, end2, heads, activation, tokens_per_image, precision, trained
):  # fmt: skip
    """dx, then the gradients of norm₁, qkv, proj, LayerScale₁, norm₂, fc1, fc2 and LayerScale₂; None where absent, and
    all but dx where no parameter is trained."""
    packed, o, lse, middle, hidden, mean1, rstd1, mean2, rstd2 = kept
    branch1 = linear.branch_of(middle, *end1, tokens_per_image, proj[0].dtype)
    dmiddle, shares2, of_fc1, of_fc2 = mlp.first_stage(
        dy, middle, hidden, mean2, rstd2, *norm2, *fc1, *fc2, *end2, activation, tokens_per_image,
        precision, trained, branch1,
    )  # fmt: skip
    branches = linear.gradients_of(branch1, dmiddle)
    do, of_proj = linear_residual.first_stage(*branches, o, *proj, end1[0], precision, trained)
    dpacked = torch.empty(packed.shape, dtype=packed.dtype, device=packed.device)
    shape = (-1, tokens_per_image, o.shape[1])
    q, k, v = _heads(packed, tokens_per_image, heads)
    attention.backward(
        do.view(shape), q, k, v, o.view(shape), lse, *_heads(dpacked, tokens_per_image, heads),
        q.shape[-1] ** -0.5, precision,
    )  # fmt: skip
    dx, shares1, of_qkv = ln_linear.first_stage(dpacked, x, mean1, rstd1, *norm1, *qkv, precision, trained, dmiddle)
    dqkv, dproj, dfc1, dfc2 = linear.finish(of_qkv, of_proj, of_fc1, of_fc2)
    dnorm1, dnorm2 = layer_norm.finish((shares1, *norm1), (shares2, *norm2))
    return dx, *dnorm1, *dqkv[:2], *dproj, *dnorm2, *dfc1[:2], *dfc2
