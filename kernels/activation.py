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
def _sigmoid(x):
    """σ(x) and its derivative σ(x)·σ(−x), neither of which overflows or cancels."""
    small = tl.exp(-tl.abs(x))
    larger = 1 / (1 + small)  # σ(|x|)
    return tl.where(x >= 0, larger, small * larger), small * larger * larger


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """The activation of a tile in fp32."""
    if ACTIVATION == "gelu":
        y = 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        gate, _ = _sigmoid(_tanh_argument(x))
        y = x * gate
    else:
        tl.static_assert(ACTIVATION == "quick_gelu")
        gate, _ = _sigmoid(1.702 * x)
        y = x * gate
    return y


@triton.jit
def activate_grad(x, ACTIVATION: tl.constexpr):
    """The activation's derivative at a tile in fp32."""
    if ACTIVATION == "gelu":
        density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
        slope = 0.5 * (1 + tl.erf(x * 0.7071067811865476)) + x * density
    elif ACTIVATION == "gelu_tanh":
        gate, gate_slope = _sigmoid(_tanh_argument(x))
        slope = gate + x * gate_slope * 1.5957691216057308 * (1 + 0.134145 * x * x)
    else:
        tl.static_assert(ACTIVATION == "quick_gelu")
        gate, gate_slope = _sigmoid(1.702 * x)
        slope = gate + 1.702 * x * gate_slope
    return slope
