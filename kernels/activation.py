"""The activations of a ViT's MLP on a tile in fp32, each with its derivative.

gelu        x·Φ(x)                                 Φ the normal distribution function
gelu_tanh   x·½(1 + tanh u) = x·σ(2u)              u = √(2/π)·(x + 0.044715 x³)
quick_gelu  x·σ(1.702 x)
"""

import triton
import triton.language as tl


@triton.jit
def _tanh_argument(x):
    return 1.5957691216057308 * (x + 0.044715 * x * x * x)  # 2u


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """The activation of a tile in fp32."""
    if ACTIVATION == "gelu":
        return 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    if ACTIVATION == "gelu_tanh":
        return x * tl.sigmoid(_tanh_argument(x))
    tl.static_assert(ACTIVATION == "quick_gelu")
    return x * tl.sigmoid(1.702 * x)


@triton.jit
def activate_grad(x, ACTIVATION: tl.constexpr):
    """The activation's derivative at a tile in fp32."""
    if ACTIVATION == "gelu":
        density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
        return 0.5 * (1 + tl.erf(x * 0.7071067811865476)) + x * density
    if ACTIVATION == "gelu_tanh":
        gate = tl.sigmoid(_tanh_argument(x))
        return gate + x * gate * (1 - gate) * 1.5957691216057308 * (1 + 0.134145 * x * x)
    tl.static_assert(ACTIVATION == "quick_gelu")
    gate = tl.sigmoid(1.702 * x)
    return gate + 1.702 * x * gate * (1 - gate)
