"""The specification: every op and the whole model in plain PyTorch, written for a reader.

Nothing here is optimised and the package never calls it. The tests run it in float64 and hold both backends against it.

    [1] Dosovitskiy et al. 2021, An Image is Worth 16x16 Words, equations 1 to 4
    [2] Vaswani et al. 2017, Attention Is All You Need, equation 1 and section 3.5
    [3] Ba et al. 2016, Layer Normalization           [4] Hendrycks and Gimpel 2016, GELU
    [5] Touvron et al. 2021, CaiT (LayerScale)        [6] Huang et al. 2016, Stochastic Depth
    [7] Abnar and Zuidema 2020, Quantifying Attention Flow

Letters: B batch, C channels, P patch side, N patches, R prefix tokens, T = R + N tokens, D width, H heads, d = D/H head
width, F hidden width, L layers.
"""

import math

import torch
from torch import Tensor


def patch_embed(
    images: Tensor, weight: Tensor, bias: Tensor | None, position: Tensor | None, prefix: Tensor | None
) -> Tensor:
    """Equation 1 of [1]: z₀ = [x_class; x₁E; …; x_N E] + E_pos.

    images [B, C, rows, columns], weight [D, C, P, P], bias [D], prefix [R, D] → tokens [B, R + N, D]. The position
    table has R + N rows, or N, and then the prefix tokens have no position of their own.
    """
    batch, channels, rows, columns = images.shape
    width, _, high, wide = weight.shape
    patches = images.reshape(batch, channels, rows // high, high, columns // wide, wide)
    patches = patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * high * wide)  # [B, N, C·P·P]
    tokens = patches @ weight.reshape(width, -1).T
    if bias is not None:
        tokens = tokens + bias
    count = 0 if prefix is None else prefix.shape[0]
    if position is not None and len(position) == tokens.shape[1]:
        tokens = tokens + position
    if count:
        tokens = torch.cat([prefix.expand(batch, -1, -1), tokens], dim=1)
    if position is not None and count and len(position) == tokens.shape[1]:
        tokens = tokens + position
    return tokens


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Equations 3 and 4 of [3], over the last axis."""
    centred = x - x.mean(-1, keepdim=True)
    variance = (centred * centred).mean(-1, keepdim=True)
    return centred / torch.sqrt(variance + eps) * weight + bias


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x·Wᵀ + b."""
    y = x @ weight.T
    return y if bias is None else y + bias


def ln_linear(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> Tensor:
    """The LayerNorm of equation 2 of [1] and the product behind it."""
    return linear(layer_norm(x, norm_weight, norm_bias, eps), weight, bias)


def attention_probabilities(q: Tensor, k: Tensor, scale: float | None = None) -> Tensor:
    """softmax(q·kᵀ/√d) of equation 1 of [2]. q [B, Tq, H, d], k [B, Tk, H, d] → [B, H, Tq, Tk]."""
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    scores = q.transpose(1, 2) @ k.permute(0, 2, 3, 1) * scale
    exponentials = torch.exp(scores - scores.amax(-1, keepdim=True))
    return exponentials / exponentials.sum(-1, keepdim=True)


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """Equation 1 of [2]. q [B, Tq, H, d], k and v [B, Tk, H, d] → heads side by side [B, Tq, H·d]."""
    return (attention_probabilities(q, k, scale) @ v.transpose(1, 2)).transpose(1, 2).flatten(2)


def residual_branch(branch: Tensor, residual: Tensor, layer_scale: Tensor | None, drop: Tensor | None) -> Tensor:
    """residual + drop·γ·branch: LayerScale (equation 4 of [5]) and stochastic depth ([6]), whose draw is drop [B]."""
    if layer_scale is not None:
        branch = branch * layer_scale
    if drop is not None:
        branch = branch * drop.reshape(-1, 1, 1)
    return residual + branch


def linear_residual(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    layer_scale: Tensor | None = None,
    drop: Tensor | None = None,
) -> Tensor:
    """The end of equation 2 of [1]: the projection of the heads, and what it is added to."""
    return residual_branch(linear(x, weight, bias), residual, layer_scale, drop)


def activate(x: Tensor, activation: str) -> Tensor:
    """GELU ([4]): x·Φ(x) exactly, its approximation by tanh, or x·σ(1.702 x)."""
    if activation == "gelu":
        return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))
    if activation == "gelu_tanh":
        return x * 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    if activation == "quick_gelu":
        return x / (1 + torch.exp(-1.702 * x))
    raise ValueError(f"activation: got {activation!r}, takes 'gelu', 'gelu_tanh' or 'quick_gelu'")


def mlp(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    layer_scale: Tensor | None = None,
    drop: Tensor | None = None,
    activation: str = "gelu",
    eps: float = 1e-6,
) -> Tensor:
    """Equation 3 of [1]: x + MLP(LN(x))."""
    hidden = activate(ln_linear(x, norm_weight, norm_bias, fc1_weight, fc1_bias, eps), activation)
    return linear_residual(hidden, fc2_weight, fc2_bias, x, layer_scale, drop)


def sincos_position(rows: int, columns: int, width: int, temperature: float = 10_000.0) -> Tensor:
    """The fixed table of section 3.5 of [2], a quarter of the width each for sin and cos of column and of row.

    → [rows·columns, D] in float64, patch (r, c) at row r·columns + c, its channels sin(c·ω), cos(c·ω), sin(r·ω),
    cos(r·ω) with ωᵢ = temperature^(−i/(D/4)).
    """
    omega = temperature ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    row = torch.arange(rows, dtype=torch.float64).repeat_interleave(columns)[:, None] * omega
    column = torch.arange(columns, dtype=torch.float64).repeat(rows)[:, None] * omega
    return torch.cat([column.sin(), column.cos(), row.sin(), row.cos()], dim=1)


def rollout(maps: Tensor) -> Tensor:
    """Equation 1 of [7]: the product of ½·(mean over heads + identity) from the first layer to the last.

    maps [L, B, H, T, T] → [B, T, T], rows the tokens of the last layer, columns those of the first.
    """
    flow = torch.eye(maps.shape[-1], dtype=maps.dtype)
    for layer in maps.mean(2):
        flow = 0.5 * (layer + torch.eye(maps.shape[-1], dtype=maps.dtype)) @ flow
    return flow


def block(x: Tensor, p: dict[str, Tensor], heads: int, activation: str, eps: float) -> Tensor:
    """Equations 2 and 3 of [1] with timm's parameter names. x [B, T, D] → [B, T, D]."""
    qkv = ln_linear(x, p["norm1.weight"], p["norm1.bias"], p["attn.qkv.weight"], p.get("attn.qkv.bias"), eps)
    q, k, v = qkv.reshape(*x.shape[:2], 3, heads, -1).unbind(2)  # three of [B, T, H, d]
    if "attn.q_norm.weight" in p:
        q = layer_norm(q, p["attn.q_norm.weight"], p["attn.q_norm.bias"], eps)
        k = layer_norm(k, p["attn.k_norm.weight"], p["attn.k_norm.bias"], eps)
    x = linear_residual(attention(q, k, v), p["attn.proj.weight"], p.get("attn.proj.bias"), x, p.get("ls1.gamma"))
    names = ("norm2.weight", "norm2.bias", "mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight", "mlp.fc2.bias")
    return mlp(x, *(p.get(name) for name in names), p.get("ls2.gamma"), None, activation, eps)


def vision_transformer(
    images: Tensor,
    p: dict[str, Tensor],
    *,
    heads: int,
    pool: str = "token",
    activation: str = "gelu",
    eps: float = 1e-6,
) -> Tensor:
    """The whole model on a state dict with timm's names: equations 1 to 4 of [1], then the classification head.

    images [B, C, rows, columns] → logits [B, classes]; their softmax is the class probabilities. `pool` is "token" (the
    class token, equation 4) or "avg" (the mean of the patch tokens).
    """
    prefix = [p[name][0] for name in ("cls_token", "dist_token", "reg_token") if name in p]
    position = p["pos_embed"][0] if "pos_embed" in p else None
    prefix = torch.cat(prefix) if prefix else None
    x = patch_embed(images, p["patch_embed.proj.weight"], p.get("patch_embed.proj.bias"), position, prefix)
    if "norm_pre.weight" in p:
        x = layer_norm(x, p["norm_pre.weight"], p["norm_pre.bias"], eps)
    depth = 1 + max(int(name.split(".")[1]) for name in p if name.startswith("blocks."))
    for index in range(depth):
        start = f"blocks.{index}."
        x = block(x, {n[len(start) :]: t for n, t in p.items() if n.startswith(start)}, heads, activation, eps)
    if "norm.weight" in p:
        x = layer_norm(x, p["norm.weight"], p["norm.bias"], eps)
    x = x[:, 0] if pool == "token" else x[:, 0 if prefix is None else len(prefix) :].mean(1)
    if "fc_norm.weight" in p:
        x = layer_norm(x, p["fc_norm.weight"], p["fc_norm.bias"], eps)
    if "pre_logits.fc.weight" in p:
        x = torch.tanh(linear(x, p["pre_logits.fc.weight"], p["pre_logits.fc.bias"]))
    return linear(x, p["head.weight"], p.get("head.bias")) if "head.weight" in p else x
