"""The activations of a ViT's MLP on a tile in fp32, each with its derivative.

gelu        x·Φ(x)                                 Φ the normal distribution function
gelu_tanh   x·½(1 + tanh u) = x·σ(2u)              u = √(2/π)·(x + 0.044715 x³)
quick_gelu  x·σ(1.702 x)
silu        x·σ(x)                                 the gate of SwiGLU

Each is y = x·g(x) with a gate g that mirrors itself: g(x) = 1 − t(|x|) for x ≥ 0 and t(|x|) below, where the tail t
falls from ½ to 0. The derivative is y′ = g + x·g′.

exact       where the result is stored in fp32: erf, exp and a division.
fast        where it is stored in fp16 or bf16: y = ½x + |x|·(½ − t(|x|)). For both GELUs log2 t is nearly a polynomial,
            so that t is one exp2: degree 5, coefficients by minimax on the error of y over |x| + 0.1, the first −1 so
            that t(0) is ½ exactly. Of quick_gelu and silu t is 1/(1 + 2^z), the reciprocal as the square of rsqrt, one
            instruction where a division is ten. The leading coefficient makes t fall to 0 by itself: y is x far above
            and 0 far below, inf gives inf, −inf and NaN give NaN.

What is proved of the fast forms (tests/ops/test_activation.py): their largest errors against fp64 over every finite
fp16 and bf16 value, before rounding, with exp2 and rsqrt off by their documented 2^-22 and 2^-22.9 in the worst
direction; what the compiler makes of them for sm_90 and sm_80, per element and without the conversion of the result:

                 error of y    error of y′    instructions of y    special functions    of y and y′    special functions
gelu             1.3e-6        7e-7           9                    1                    15             2
gelu_tanh        9e-6          4e-5           9                    1                    19             1
quick_gelu       1e-6          5e-7           7                    2                    14             2
silu             1.3e-6        3.5e-7         7                    2                    13             2

Other forms, and why not: x·σ(2p(x)) with an odd polynomial p, by exp2 and a reciprocal, is two special functions, of
which a multiprocessor does a sixteenth a clock of what it adds, and comes no closer than 2.7e-4 with three coefficients
of which the last is positive, so that it saturates. tanh.approx in place of σ is one, but its documented relative error
of 2^-11 passes 1e-4 from |x| = 0.5 on.
"""

import triton
import triton.language as tl

# c₁ to c₅ of log2 t(a) = −1 + c₁·a + … + c₅·a⁵.
_GELU_TAIL = tl.constexpr((-1.15108478, -0.459280759, -0.0525282025, 0.00738114072, -0.000517720939))
_TANH_TAIL = tl.constexpr((-1.15102589, -0.459055841, -0.053437341, 0.0112356935, -0.0023495343))


@triton.jit
def _sigmoid(x):
    """σ(x) and its derivative σ(x)·σ(−x), neither of which overflows or cancels."""
    small = tl.exp(-tl.abs(x))
    larger = 1 / (1 + small)  # σ(|x|)
    return tl.where(x >= 0, larger, small * larger), small * larger * larger


@triton.jit
def _exact(x, ACTIVATION: tl.constexpr):
    """The activation and its derivative; the compiler drops the one that nobody reads."""
    if ACTIVATION == "gelu":
        gate = 0.5 * (1 + tl.erf(x * 0.7071067811865476))
        gate_slope = 0.3989422804014327 * tl.exp(-0.5 * x * x)
    elif ACTIVATION == "gelu_tanh":
        gate, slope = _sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
        gate_slope = slope * 1.5957691216057308 * (1 + 0.134145 * x * x)
    elif ACTIVATION == "quick_gelu":
        gate, slope = _sigmoid(1.702 * x)
        gate_slope = 1.702 * slope
    else:
        tl.static_assert(ACTIVATION == "silu")
        gate, gate_slope = _sigmoid(x)
    return x * gate, gate + x * gate_slope


@triton.jit
def _exp2_polynomial(a, C: tl.constexpr):
    """2^(−1 + C·(a, …, a⁵))."""
    return tl.exp2(a * (a * (a * (a * (a * C[4] + C[3]) + C[2]) + C[1]) + C[0]) - 1)


@triton.jit
def _fast_tail(a, ACTIVATION: tl.constexpr):
    """t(a) for a ≥ 0."""
    if ACTIVATION == "gelu":
        tail = _exp2_polynomial(a, _GELU_TAIL)
    elif ACTIVATION == "gelu_tanh":
        tail = _exp2_polynomial(a, _TANH_TAIL)
    elif ACTIVATION == "quick_gelu":
        root = tl.rsqrt(1 + tl.exp2(2.4554669595930157 * a))  # 1.702·log2(e)
        tail = root * root
    else:
        tl.static_assert(ACTIVATION == "silu")
        root = tl.rsqrt(1 + tl.exp2(1.4426950408889634 * a))  # log2(e)
        tail = root * root
    return tail


@triton.jit
def _fast_gate_slope(x, a, tail, ACTIVATION: tl.constexpr):
    """g′(x), where a = |x| and tail = t(a)."""
    if ACTIVATION == "gelu":
        slope = tl.exp2(-0.7213475204444817 * x * x - 1.3257480647361592)  # the normal density
    elif ACTIVATION == "gelu_tanh":
        near = tl.minimum(a, 1e3)  # the tail is 0 long before, and 0 times an infinite square would be no number
        slope = tail * (1 - tail) * 1.5957691216057308 * (1 + 0.134145 * near * near)  # σ′(2u)·2u′
    elif ACTIVATION == "quick_gelu":
        slope = 1.702 * tail * (1 - tail)
    else:
        slope = tail * (1 - tail)
    return slope


@triton.jit
def activate(x, ACTIVATION: tl.constexpr, DTYPE: tl.constexpr):
    """The activation of a tile in fp32, as exact as a result that will be stored in DTYPE needs it."""
    if DTYPE.primitive_bitwidth == 32:
        y, _ = _exact(x, ACTIVATION)
    else:
        a = tl.abs(x)
        y = 0.5 * x + a * (0.5 - _fast_tail(a, ACTIVATION))
    return y


@triton.jit
def activate_with_grad(x, ACTIVATION: tl.constexpr, DTYPE: tl.constexpr):
    """The activation of a tile in fp32 and its derivative, which share the gate."""
    if DTYPE.primitive_bitwidth == 32:
        y, slope = _exact(x, ACTIVATION)
    else:
        a = tl.abs(x)
        tail = _fast_tail(a, ACTIVATION)
        y = 0.5 * x + a * (0.5 - tail)
        slope = tl.where(x < 0, tail, 1 - tail) + x * _fast_gate_slope(x, a, tail, ACTIVATION)
    return y, slope
