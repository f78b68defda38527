"""The activations on every finite value of a half precision, and what the compiler makes of them."""

import functools
import itertools
import os
import re

import numpy as np
import pytest
import torch

from tests import unfused

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

from triton.runtime.interpreter import InterpreterBuilder  # noqa: E402
from vit_fast.kernels.activation import activate, activate_with_grad  # noqa: E402

ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu", "silu")
HALVES = {"fp16": torch.float16, "bf16": torch.bfloat16}
TRITON_DTYPE = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
# The largest error of an activation and of its derivative over every finite half, before rounding; the rule is 1e-4.
LARGEST_ERROR = {
    "gelu": (1.3e-6, 7e-7),
    "gelu_tanh": (9e-6, 4e-5),
    "quick_gelu": (1e-6, 5e-7),
    "silu": (1.3e-6, 3.5e-7),
}
# The documented relative errors of ex2.approx and rsqrt.approx.
EXP2_ERROR, RSQRT_ERROR = 2.0**-22, 2.0**-22.9


@triton.jit
def _elementwise_kernel(x_ptr, y_ptr, slope_ptr, ACTIVATION: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + index).to(tl.float32)
    slope = x
    if ACTIVATION is None:
        y = x
    elif slope_ptr is None:
        y = activate(x, ACTIVATION, DTYPE)
    else:
        y, slope = activate_with_grad(x, ACTIVATION, DTYPE)
    tl.store(y_ptr + index, y.to(y_ptr.dtype.element_ty))
    if slope_ptr is not None:
        tl.store(slope_ptr + index, slope.to(slope_ptr.dtype.element_ty))


def run(x, activation, dtype, result=torch.float32):
    """y and y′ of the kernels as they are for a result in `dtype`, stored in `result`."""
    y, y_alone, slope = (torch.empty_like(x, dtype=result) for _ in range(3))
    for output, gradient in ((y, slope), (y_alone, None)):
        _elementwise_kernel[(1,)](x, output, gradient, activation, TRITON_DTYPE[dtype], x.numel())
    torch.testing.assert_close(y_alone, y, rtol=0, atol=0, equal_nan=True)
    return y, slope


def exact(x, activation):
    """y and y′ in fp64."""
    x = x.double().requires_grad_()
    y = unfused.ACTIVATIONS[activation](x)
    return y.detach(), torch.autograd.grad(y.sum(), x)[0]


def every_finite(dtype):
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    return torch.where(x.isfinite(), x, 0)


@pytest.fixture(params=itertools.product((-1, 0, 1), repeat=2), ids=lambda signs: "exp2{:+d},rsqrt{:+d}".format(*signs))
def special_functions(request, monkeypatch):
    """The interpreter's exp2 and rsqrt, off by the device's documented errors, subnormal results flushed to zero.

    An activation is monotonic in the result of each, so that its largest error is at an end. They are computed in fp64:
    NumPy's own in fp32 err by as much again, on each processor otherwise.
    """
    signs = request.param

    def patch(name, function, error):
        original = getattr(InterpreterBuilder, name)

        def off(self, arg):
            handle = original(self, arg)
            data = (function(arg.data.astype(np.float64)) * (1 + error)).astype(np.float32)
            handle.data = np.where(np.abs(data) < np.finfo(np.float32).tiny, np.float32(0), data)
            return handle

        monkeypatch.setattr(InterpreterBuilder, name, off)

    patch("create_exp2", np.exp2, signs[0] * EXP2_ERROR)
    patch("create_rsqrt", lambda x: 1 / np.sqrt(x), signs[1] * RSQRT_ERROR)


@pytest.mark.interpret
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", HALVES)
def test_every_finite_half(dtype, activation, special_functions):
    x = every_finite(HALVES[dtype])
    for name, value, truth, limit in zip(
        ("y", "slope"), run(x, activation, HALVES[dtype]), exact(x, activation), LARGEST_ERROR[activation]
    ):
        error = (value.double() - truth).abs()
        assert error.max() <= limit, f"{name}: {error.max():.2e} at {x[error.argmax()].item()}"


@pytest.mark.interpret
@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", HALVES)
def test_infinities_and_nan(dtype, activation):
    """As PyTorch in fp16: in bf16 its vectorised GELU gives NaN at +inf too, which is a fault of the CPU's alone."""
    x = torch.tensor([torch.inf, -torch.inf, torch.nan], dtype=torch.float16, requires_grad=True)
    expected = unfused.ACTIVATIONS[activation](x)
    expected_slope = torch.autograd.grad(expected.sum(), x)[0]
    ours = run(torch.cat([x.detach(), torch.zeros(1)]).to(HALVES[dtype]), activation, HALVES[dtype])
    for value, truth in zip(ours, (expected, expected_slope)):
        torch.testing.assert_close(value[:3], truth.detach().float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.interpret
@pytest.mark.parametrize("scale", [0.01, 0.1, 1.0, 5.0])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", HALVES)
def test_error_in_norm_is_that_of_the_rounding(dtype, activation, scale):
    """No worse than PyTorch's own op, which computes in fp32 and rounds as this does, but for a thousandth.

    The derivative has a hundredth.
    """
    x = (scale * torch.randn(2**16)).to(HALVES[dtype])
    ours = run(x, activation, x.dtype, result=x.dtype)
    truth = exact(x, activation)
    x.requires_grad_()
    theirs = unfused.ACTIVATIONS[activation](x)
    theirs = theirs.detach(), torch.autograd.grad(theirs.sum(), x)[0]
    for name, value, peer, t, factor in zip(("y", "slope"), ours, theirs, truth, (1.001, 1.01)):
        error, allowed = (value.double() - t).norm(), (peer.double() - t).norm()
        assert error <= factor * allowed, f"{name}: {error:.3e}, PyTorch {allowed:.3e}"


@pytest.mark.interpret
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_fp32_is_exact(activation):
    """A result in fp32 takes erf and exp: an approximation good for halves would be off by 20 roundings."""
    x = torch.linspace(-12, 12, 4096)
    for value, truth in zip(run(x, activation, torch.float32), exact(x, activation)):
        error = (value.double() - truth).abs() / truth.abs().clamp(min=1)
        assert error.max() <= 2 * torch.finfo(torch.float32).eps


# What the compiler makes of y, and of y and its derivative together with another value to round and pack: instructions
# an element, and how many of them are on the special-function unit.
MOST_INSTRUCTIONS = {"gelu": (9, 16), "gelu_tanh": (9, 20), "quick_gelu": (7, 15), "silu": (7, 15)}
BLOCK, ELEMENTS = 2048, 16  # of a program, of a thread
SPECIAL = {"gelu": (1, 2), "gelu_tanh": (1, 1), "quick_gelu": (2, 2), "silu": (2, 2)}


@functools.cache
def counted(arch, dtype, activation, with_grad):
    """(instructions, those on the special-function unit) of a kernel that applies an activation, or copies for None."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from benchmarks.compiled import cuobjdump

    pointers = {"x_ptr": "*fp32", "y_ptr": f"*{dtype}"} | ({"slope_ptr": f"*{dtype}"} if with_grad else {})
    constants = {"ACTIVATION": activation, "DTYPE": tl.dtype(dtype), "BLOCK": BLOCK}
    constants |= {} if with_grad else {"slope_ptr": None}
    source = ASTSource(
        _elementwise_kernel,
        pointers | dict.fromkeys(constants, "constexpr"),
        constants,
        {(index,): [["tt.divisibility", 16]] for index in range(len(pointers))},
    )
    options = {"num_warps": BLOCK // (32 * ELEMENTS)}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    sass = cuobjdump(compiled.asm["cubin"], "--dump-sass")
    names = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+\s+)?([A-Z][A-Z0-9_.]+)", sass, re.MULTILINE)
    return sum(name != "NOP" for name in names), sum(name.startswith("MUFU") for name in names)


def per_element(arch, dtype, activation, with_grad):
    """What the activation adds to the copy, an element of a thread's."""
    ours, copy = counted(arch, dtype, activation, with_grad), counted(arch, dtype, None, with_grad)
    return [(a - b) / ELEMENTS for a, b in zip(ours, copy)]


compiles = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")


@compiles
@pytest.mark.parametrize("with_grad", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("arch", "dtype"), [(90, "bf16"), (90, "fp16"), (80, "bf16")])
def test_instructions_an_element(arch, dtype, activation, with_grad):
    instructions, special = per_element(arch, dtype, activation, with_grad)
    # A quarter for what is done once a thread, such as loading a constant.
    assert instructions <= MOST_INSTRUCTIONS[activation][with_grad] + 0.25
    assert special == SPECIAL[activation][with_grad]


@compiles
def test_the_count_sees_an_error_function():
    """The exact form is not taken for the short one."""
    instructions, _ = per_element(90, "fp32", "gelu", False)
    assert instructions > 20
