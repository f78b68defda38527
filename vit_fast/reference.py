"""The specification: every op and the whole model in plain PyTorch, written for a reader.

Nothing here is optimised and the package never calls it. The tests run it in float64 and hold both backends against it.

    [1] Dosovitskiy et al. 2021, An Image is Worth 16x16 Words, equations 1 to 4
    [2] Vaswani et al. 2017, Attention Is All You Need, equation 1 and section 3.5
    [3] Ba et al. 2016, Layer Normalization           [4] Hendrycks and Gimpel 2016, GELU
    [5] Touvron et al. 2021, CaiT (LayerScale)        [6] Huang et al. 2016, Stochastic Depth
    [7] Abnar and Zuidema 2020, Quantifying Attention Flow
    [8] Shazeer 2020, GLU Variants Improve Transformer
    [9] Liu et al. 2021, Swin Transformer             [10] Su et al. 2021, RoFormer

Letters: B batch, C channels, P patch side, N patches, R prefix tokens, T = R + N tokens, D width, H heads, d = D/H head
width, F hidden width, L layers.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def patch_embed(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    position: Tensor | None,
    prefix: Tensor | None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Tensor:
    """Equation 1 of [1]: z₀ = [x_class; x₁E; …; x_N E] + E_pos.

    images [B, C, rows, columns], weight [D, C, P, P], bias [D], prefix [R, D] → tokens [B, R + N, D]. The position
    table has R + N rows, or N, and then the prefix tokens have no position of their own. With a mean and a std for each
    channel the images are bytes, and normalised first.
    """
    if mean is not None and std is not None:
        shift, scale = (weight.new_tensor(values).reshape(-1, 1, 1) for values in (mean, std))
        images = (images.to(weight.dtype) / 255 - shift) / scale
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
    if prefix is not None and count:
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


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Equation 34 of [10] on the last N tokens of x [B, T, H, d]: a number times its cos, its partner times its sin.

    The partner of a pair's first number counts negatively. cos and sin are [N, d] or [H, N, d].
    """
    width, count = x.shape[-1], cos.shape[-2]
    partner = torch.arange(width) ^ 1 if interleaved else (torch.arange(width) + width // 2) % width
    is_first = partner > torch.arange(width)
    sign = torch.where(is_first, -1.0, 1.0).to(x)
    cos, sin = (t.expand(x.shape[2], count, width).transpose(0, 1) for t in (cos, sin))  # [N, H, d]
    last = x[:, x.shape[1] - count :]
    return torch.cat([x[:, : x.shape[1] - count], cos * last + sin * sign * last[..., partner]], 1)


def rope_attention(
    qkv: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False, scale: float | None = None
) -> Tensor:
    """Equation 1 of [2] with queries and keys turned as in [10]. qkv [B, T, 3, H, d] → [B, T, H·d]."""
    q, k, v = qkv.unbind(2)
    return attention(rotate(q, cos, sin, interleaved), rotate(k, cos, sin, interleaved), v, scale)


def window_attention(
    qkv: Tensor, table: Tensor, window: tuple[int, int], shift: tuple[int, int] = (0, 0), scale: float | None = None
) -> Tensor:
    """Equation 4 of [9] in the windows of a map that is shifted cyclically (section 3.2), one window after the other.

    qkv [B, Y, X, 3, H, d], table [(2·Wy − 1)·(2·Wx − 1), H] → [B, Y, X, H·d]. What the shift brings in from the other
    side of the map is no neighbour of what it meets there: −100 on such a score.
    """
    batch, rows, columns, _, heads, width = qkv.shape
    high, wide = window
    scale = 1 / math.sqrt(width) if scale is None else scale
    sides = (torch.arange(side, device=qkv.device) for side in window)
    y, x = (t.flatten() for t in torch.meshgrid(*sides, indexing="ij"))
    entries = (y[:, None] - y + high - 1) * (2 * wide - 1) + x[:, None] - x + wide - 1
    bias = table[entries].permute(2, 0, 1)  # [H, T, T], of query and key
    output = qkv.new_zeros(batch, rows, columns, heads, width)
    for top in range(shift[0], rows + shift[0], high):
        for left in range(shift[1], columns + shift[1], wide):
            beyond = (top + y >= rows).long() + 2 * (left + x >= columns).long()
            mask = (beyond[:, None] != beyond).to(qkv.dtype) * -100.0
            tokens = slice(None), (top + y) % rows, (left + x) % columns
            q, k, v = qkv[tokens].permute(2, 0, 3, 1, 4)  # each [B, H, T, d]
            probabilities = torch.softmax(q @ k.transpose(-1, -2) * scale + bias + mask, -1)
            output[tokens] = (probabilities @ v).transpose(1, 2)
    return output.flatten(3)


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
    """GELU ([4]): x·Φ(x) exactly, its approximation by tanh, or x·σ(1.702 x); or SwiGLU ([8]), half as wide as x."""
    if activation == "gelu":
        return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))
    if activation == "gelu_tanh":
        return x * 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    if activation == "quick_gelu":
        return x * torch.sigmoid(1.702 * x)
    if activation == "swiglu":
        gate, value = x.chunk(2, dim=-1)
        return gate * torch.sigmoid(gate) * value
    raise ValueError(f"activation: got {activation!r}, takes 'gelu', 'gelu_tanh', 'quick_gelu' or 'swiglu'")


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


def swiglu(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    layer_scale: Tensor | None = None,
    drop: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """Equation 6 of [8] in the place of the MLP, its W and V the first and the second half of fc1's rows."""
    hidden = activate(ln_linear(x, norm_weight, norm_bias, fc1_weight, fc1_bias, eps), "swiglu")
    return linear_residual(hidden, fc2_weight, fc2_bias, x, layer_scale, drop)


def sincos_position(rows: int, columns: int, width: int, temperature: float = 10_000.0) -> Tensor:
    """The fixed table of section 3.5 of [2], a quarter of the width each for sin and cos of column and of row.

    → [rows·columns, D] in float64, patch (r, c) at row r·columns + c, its channels sin(c·ω), cos(c·ω), sin(r·ω),
    cos(r·ω) with ωᵢ = temperature^(−i/(D/4)).
    """
    quarter = width // 4
    table = torch.zeros(rows * columns, width, dtype=torch.float64)
    for r in range(rows):
        for c in range(columns):
            for i in range(quarter):
                omega = temperature ** (-i / quarter)
                channels = math.sin(c * omega), math.cos(c * omega), math.sin(r * omega), math.cos(r * omega)
                table[r * columns + c, i::quarter] = torch.tensor(channels, dtype=torch.float64)
    return table


def rollout(maps: Tensor) -> Tensor:
    """Equation 1 of [7]: the product of ½·(mean over heads + identity) from the first layer to the last.

    maps [L, B, H, T, T] → [B, T, T], rows the tokens of the last layer, columns those of the first.
    """
    flow = torch.eye(maps.shape[-1], dtype=maps.dtype)
    for layer in maps.mean(2):
        flow = 0.5 * (layer + torch.eye(maps.shape[-1], dtype=maps.dtype)) @ flow
    return flow


def block(x: Tensor, p: dict[str, Tensor], heads: int, activation: str, eps: float) -> Tensor:
    """Equations 2 and 3 of [1] with timm's parameter names. x [B, T, D] → [B, T, D]. It takes from p what it reads."""

    def norm(y: Tensor, name: str) -> Tensor:  # for the norms that not every model has
        return layer_norm(y, p.pop(f"{name}.weight"), p.pop(f"{name}.bias"), eps) if f"{name}.weight" in p else y

    first, second = ((p.pop(f"{name}.weight"), p.pop(f"{name}.bias")) for name in ("norm1", "norm2"))
    qkv = ln_linear(x, *first, p.pop("attn.qkv.weight"), p.pop("attn.qkv.bias", None), eps)
    q, k, v = qkv.reshape(*x.shape[:2], 3, heads, -1).unbind(2)  # three of [B, T, H, d]
    y = norm(attention(norm(q, "attn.q_norm"), norm(k, "attn.k_norm"), v), "attn.norm")
    x = linear_residual(y, p.pop("attn.proj.weight"), p.pop("attn.proj.bias", None), x, p.pop("ls1.gamma", None))
    hidden = activate(ln_linear(x, *second, p.pop("mlp.fc1.weight"), p.pop("mlp.fc1.bias", None), eps), activation)
    hidden = norm(hidden, "mlp.norm")
    return linear_residual(hidden, p.pop("mlp.fc2.weight"), p.pop("mlp.fc2.bias", None), x, p.pop("ls2.gamma", None))


def pool_tokens(x: Tensor, pool: str, prefix: int) -> Tensor:
    """[B, T, D] → [B, D]: the class token (equation 4 of [1]), or a summary of the patch tokens; "" leaves x alone.

    "token_avg" is both, [B, 2·D], as DINOv2's classifier reads them (Oquab et al. 2023).
    """
    patches = x[:, prefix:]
    if pool == "token":
        return x[:, 0]
    if pool == "avg":
        return patches.mean(1)
    if pool == "token_avg":
        return torch.cat([x[:, 0], patches.mean(1)], dim=1)
    if pool == "max":
        return patches.amax(1)
    if pool == "avgmax":
        return (patches.mean(1) + patches.amax(1)) / 2
    if pool == "":
        return x
    raise ValueError(f"pool: got {pool!r}, takes 'token', 'avg', 'max', 'avgmax', 'token_avg', 'map' or ''")


def attention_pool(x: Tensor, p: dict[str, Tensor], heads: int, activation: str, eps: float) -> Tensor:
    """Section 3.5 of Zhai et al. 2022: one learned query reads the tokens, then a residual MLP. [B, T, D] → [B, D]."""
    batch, tokens, width = x.shape
    latent = p.pop("latent").expand(batch, 1, width)
    q = linear(latent, p.pop("q.weight"), p.pop("q.bias")).reshape(batch, 1, heads, -1)
    k, v = linear(x, p.pop("kv.weight"), p.pop("kv.bias")).reshape(batch, tokens, 2, heads, -1).unbind(2)
    y = linear(attention(q, k, v), p.pop("proj.weight"), p.pop("proj.bias"))
    names = ("norm.weight", "norm.bias", "mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight", "mlp.fc2.bias")
    norm1, norm2, fc1, fc1_bias, fc2, fc2_bias = (p.pop(name) for name in names)
    return mlp(y, norm1, norm2, fc1, fc1_bias, fc2, fc2_bias, activation=activation, eps=eps)[:, 0]


def vision_transformer(
    images: Tensor,
    parameters: dict[str, Tensor],
    *,
    heads: int,
    pool: str = "token",
    activation: str = "gelu",
    eps: float = 1e-6,
) -> Tensor:
    """The whole model on a state dict with timm's names: equations 1 to 4 of [1], then the classification head.

    images [B, C, rows, columns] → logits [B, classes]; their softmax is the class probabilities. `pool` is "token" (the
    class token, equation 4), "avg", "max" or "avgmax" (of the patch tokens), "token_avg" (both), "map" (attention
    pooling) or "". With a distillation token the logits of both heads are averaged (Touvron et al. 2021). Positions are
    not interpolated: the table is for this image size. Every parameter is read, or a ValueError names what is left
    over.
    """
    p = dict(parameters)

    def part(start: str) -> dict[str, Tensor]:
        return {name[len(start) :]: p.pop(name) for name in list(p) if name.startswith(start)}

    def norm(x: Tensor, name: str) -> Tensor:
        return layer_norm(x, p.pop(f"{name}.weight"), p.pop(f"{name}.bias"), eps) if f"{name}.weight" in p else x

    tokens = [p.pop(name)[0] for name in ("cls_token", "dist_token", "reg_token") if name in p]
    prefix = torch.cat(tokens) if tokens else None
    count = 0 if prefix is None else len(prefix)
    position = p.pop("pos_embed")[0] if "pos_embed" in p else None
    x = patch_embed(images, p.pop("patch_embed.proj.weight"), p.pop("patch_embed.proj.bias", None), position, prefix)
    x = norm(x, "norm_pre")
    depth = 1 + max((int(name.split(".")[1]) for name in p if name.startswith("blocks.")), default=-1)
    left_over = []
    for index in range(depth):
        layer = part(f"blocks.{index}.")
        x = block(x, layer, heads, activation, eps)
        left_over += [f"blocks.{index}.{name}" for name in layer]
    x = norm(x, "norm")
    if pool == "map":
        pooling = part("attn_pool.")
        pooled = attention_pool(x[:, count:], pooling, heads, activation, eps)
        left_over += [f"attn_pool.{name}" for name in pooling]
    else:
        pooled = pool_tokens(x, pool, count)
    pooled = norm(pooled, "fc_norm")
    if "pre_logits.fc.weight" in p:
        pooled = torch.tanh(linear(pooled, p.pop("pre_logits.fc.weight"), p.pop("pre_logits.fc.bias")))
    if "head.weight" in p:
        pooled = linear(pooled, p.pop("head.weight"), p.pop("head.bias", None))
    if "head_dist.weight" in p:
        pooled = (pooled + linear(x[:, 1], p.pop("head_dist.weight"), p.pop("head_dist.bias"))) / 2
    if left_over or p:
        raise ValueError(f"parameters: {', '.join([*left_over, *p])} are of another architecture")
    return pooled
