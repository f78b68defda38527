"""Each op in plain PyTorch calls, one after the other in the dtype under test: what a user has without this package."""

import torch
import torch.nn.functional as F

ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": F.silu,
}


def patch_embed(images, weight, bias, position, prefix, mean=None, std=None):
    if mean is not None:  # as torchvision's to_dtype and normalize: in fp32, whatever the model's dtype
        shift, scale = (torch.tensor(values, device=images.device).view(-1, 1, 1) for values in (mean, std))
        images = ((images.float() / 255 - shift) / scale).to(weight.dtype)
    tokens = F.conv2d(images, weight, bias, stride=weight.shape[-2:]).flatten(2).transpose(1, 2)
    count = 0 if prefix is None else len(prefix)
    if position is not None and len(position) == tokens.shape[1]:
        tokens = tokens + position
    if count:
        tokens = torch.cat([prefix.expand(len(tokens), -1, -1), tokens], dim=1)
    if position is not None and count and len(position) == tokens.shape[1]:
        tokens = tokens + position
    return tokens


def ln_linear(x, norm_weight, norm_bias, weight, bias, eps):
    return F.linear(F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, eps), weight, bias)


def attention(q, k, v, scale=None):
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return ((q @ k.transpose(-1, -2) * scale).softmax(-1) @ v).transpose(1, 2).flatten(2)


def rope_attention(qkv, cos, sin, interleaved=False, scale=None):
    """As timm writes it: the last tokens turned and put behind the others."""

    def turned(x):
        first = x.shape[1] - cos.shape[-2]
        before, x = x[:, :first].transpose(1, 2), x[:, first:].transpose(1, 2)
        if interleaved:
            partners = torch.stack([-x[..., 1::2], x[..., ::2]], -1).reshape(x.shape)
        else:
            a, b = x.chunk(2, -1)
            partners = torch.cat([-b, a], -1)
        return torch.cat([before, (x * cos + partners * sin).to(x.dtype)], 2).transpose(1, 2)

    q, k, v = qkv.unbind(2)
    return attention(turned(q), turned(k), v, scale)


def linear_residual(x, weight, bias, residual, layer_scale=None, drop=None):
    branch = F.linear(x, weight, bias)
    if layer_scale is not None:
        branch = branch * layer_scale
    if drop is not None:
        branch = branch * drop.view(-1, 1, 1)
    return residual + branch


def mlp(
    x,
    norm_weight,
    norm_bias,
    fc1_weight,
    fc1_bias,
    fc2_weight,
    fc2_bias,
    layer_scale=None,
    drop=None,
    activation="gelu",
    eps=1e-6,
):
    hidden = ACTIVATIONS[activation](ln_linear(x, norm_weight, norm_bias, fc1_weight, fc1_bias, eps))
    return linear_residual(hidden, fc2_weight, fc2_bias, x, layer_scale, drop)


def swiglu(
    x,
    norm_weight,
    norm_bias,
    fc1_weight,
    fc1_bias,
    fc2_weight,
    fc2_bias,
    layer_scale=None,
    drop=None,
    eps=1e-6,
):
    gate, value = ln_linear(x, norm_weight, norm_bias, fc1_weight, fc1_bias, eps).chunk(2, dim=-1)
    return linear_residual(F.silu(gate) * value, fc2_weight, fc2_bias, x, layer_scale, drop)


def window_attention(qkv, table, window, shift=(0, 0), scale=None):
    """As timm and the authors write it: rolled, cut into windows, masked, put together and rolled back."""
    (batch, rows, columns, _, _, width), (high, wide) = qkv.shape, window
    scale = width**-0.5 if scale is None else scale

    def cut(x):
        x = x.view(batch, rows // high, high, columns // wide, wide, *x.shape[3:]).transpose(2, 3)
        return x.reshape(-1, high * wide, *x.shape[5:])

    y, x = (t.flatten() for t in torch.meshgrid(torch.arange(high), torch.arange(wide), indexing="ij"))
    entries = ((y[:, None] - y + high - 1) * (2 * wide - 1) + x[:, None] - x + wide - 1).to(table.device)
    region = torch.zeros(batch, rows, columns, device=qkv.device)
    region[:, rows - shift[0] :] += 1
    region[:, :, columns - shift[1] :] += 2
    region = cut(region)
    mask = torch.where(region[:, None, :, None] == region[:, None, None, :], 0.0, -100.0).to(qkv.dtype)
    q, k, v = cut(qkv.roll((-shift[0], -shift[1]), (1, 2))).permute(2, 0, 3, 1, 4)
    scores = q * scale @ k.transpose(-1, -2) + table[entries].permute(2, 0, 1)
    o = ((scores + mask).softmax(-1) @ v).transpose(1, 2).flatten(2)
    o = o.view(batch, rows // high, columns // wide, high, wide, -1).transpose(2, 3).reshape(batch, rows, columns, -1)
    return o.roll(shift, (1, 2))
