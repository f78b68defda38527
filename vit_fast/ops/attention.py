"""attention: flash-style softmax attention."""

import torch.nn.functional as F
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).flatten(2)


def attention_qkv(qkv: Tensor, scale: float | None = None) -> Tensor:
    return attention(*qkv.unbind(2), scale=scale)


def attention_maps(
    q: Tensor, k: Tensor, queries: Tensor | None = None, scale: float | None = None, lse: Tensor | None = None
) -> Tensor:
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q = q if queries is None else q[:, queries]
    return (q.transpose(1, 2).float() * scale @ k.permute(0, 2, 3, 1).float()).softmax(-1)
