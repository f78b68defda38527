"""Weights drawn as timm draws them: its own truncated normal, module by module, so that a seed gives timm's weights."""

import math

import torch
from torch import Tensor, nn


def trunc_normal_(tensor: Tensor, std: float = 1.0) -> Tensor:
    """A normal cut at ±2 (not ±2·std), by the inverse of its distribution function."""
    low, high = (0.5 * (1 + math.erf(edge / std / math.sqrt(2))) for edge in (-2.0, 2.0))
    with torch.no_grad():
        tensor.uniform_(2 * low - 1, 2 * high - 1).erfinv_()
        return tensor.mul_(std * math.sqrt(2.0)).clamp_(-2.0, 2.0)


def trunc_normal_tf_(tensor: Tensor, std: float) -> Tensor:
    """A normal cut at two standard deviations."""
    with torch.no_grad():
        return trunc_normal_(tensor).mul_(std)


def init_children(module: nn.Module, mode: str, head_bias: float, needs_reset: bool, prefix: str = "") -> None:
    for name, child in module.named_children():
        name = f"{prefix}.{name}" if prefix else name
        init_children(child, mode, head_bias, needs_reset, name)
        init_module(child, name, mode, head_bias, needs_reset)


def init_module(module: nn.Module, name: str, mode: str, head_bias: float, needs_reset: bool) -> None:
    if mode != "reset" and isinstance(module, nn.Linear):
        bias = 0.0
        if mode == "":
            trunc_normal_(module.weight, std=0.02)
        elif mode == "moco" and "qkv" in name:
            bound = math.sqrt(6.0 / float(module.weight.shape[0] // 3 + module.weight.shape[1]))
            nn.init.uniform_(module.weight, -bound, bound)
        elif mode != "moco" and name.startswith("head"):
            nn.init.zeros_(module.weight)
            bias = head_bias
        else:
            nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            if mode.startswith("jax") and "mlp" in name:
                nn.init.normal_(module.bias, std=1e-6)
            else:
                nn.init.constant_(module.bias, bias)
    elif mode.startswith("jax") and isinstance(module, nn.Conv2d):
        fan_in = module.weight[0].numel()
        trunc_normal_tf_(module.weight, std=math.sqrt(1 / fan_in) / 0.87962566103423978)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif mode != "reset" and callable(own := getattr(module, "init_weights", None)):
        own()
    elif needs_reset and callable(reset := getattr(module, "reset_parameters", None)):
        reset()
