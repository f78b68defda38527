"""What every op promises, whatever it computes; attention's own tests say it of attention."""

import pytest
import torch

from tests.ops import (
    test_block,
    test_linear_residual,
    test_ln_linear,
    test_mlp,
    test_patch_embed,
    test_rope_attention,
    test_swiglu,
    test_window_attention,
)
from tests.ops.harness import BACKENDS, assert_views_are_read, rounded
from vit_fast import ops

CASES = {
    "ln_linear": test_ln_linear.CASES[1],
    "linear_residual": test_linear_residual.CASES[1],
    "mlp": test_mlp.CASES[1],
    "swiglu": test_swiglu.case("small", test_swiglu.shaped(2, 3, 17, hidden=9)),
    "block": test_block.CASES[2],
    "patch_embed": test_patch_embed.CASES[5],  # two prefix tokens
    "patch_embed of bytes": test_patch_embed.BYTES[3],
    "rope_attention": test_rope_attention.case("small", 2, 5, 2, 16, 4),
    "window_attention": test_window_attention.case("small", 2, 2, 6, 2, 16, window=(2, 3), shift=(1, 1)),
}
every_op = pytest.mark.parametrize("op", CASES)


def _function(op: str):
    return getattr(ops, op.split()[0])


def _floats(op: str) -> dict:
    return {name: rounded(t, torch.float32) for name, t in CASES[op].draw().items()}


@every_op
@pytest.mark.parametrize("backend", BACKENDS)
def test_views_are_read_as_they_are(op, backend):
    assert_views_are_read(_function(op), CASES[op], backend)


@pytest.mark.parametrize("op", [op for op in CASES if op != "rope_attention"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_result_may_be_written_to(op, backend):
    """As that of any function that does not save it: dropout in place, a hook that scales it. Attention saves it, and
    autograd says so of one that was written to."""
    args, case = _floats(op), CASES[op]

    def gradients(change) -> tuple:
        given = {name: t.clone().requires_grad_(name not in case.constant) for name, t in args.items()}
        y = change(_function(op)(**given, **case.options))
        return torch.autograd.grad(y.square().sum(), [t for t in given.values() if t.requires_grad])

    with ops.use_backend(backend):
        expected = gradients(lambda y: y * 0.5)
        for found, one in zip(gradients(lambda y: y.mul_(0.5)), expected, strict=True):
            assert torch.equal(found, one)


@every_op
@pytest.mark.interpret
def test_a_gradient_does_not_depend_on_who_else_wants_one(op):
    args, case = _floats(op), CASES[op]
    wanted = [name for name in args if name not in case.constant]

    def gradients(names: list[str]) -> tuple:
        some = {name: t.clone().requires_grad_(name in names) for name, t in args.items()}
        y = _function(op)(**some, **case.options)
        return torch.autograd.grad(y, [some[name] for name in names], torch.ones_like(y))

    with ops.use_backend("triton"):
        for name, expected in list(zip(wanted, gradients(wanted)))[:: 3 if op == "block" else 1]:  # a block has 15
            assert torch.equal(gradients([name])[0], expected), name


@pytest.mark.parametrize("op", [op for op in CASES if "bytes" not in op])  # which have no tangent
@pytest.mark.interpret
def test_forward_mode_is_refused(op):
    """Without a rule for it a kernel's output would have no tangent: a gradient of zero, and no word said."""
    first, *others = _floats(op).values()
    with ops.use_backend("triton"), pytest.raises(RuntimeError, match="forward-mode differentiation"):
        torch.func.jvp(lambda x: _function(op)(x, *others, **CASES[op].options), (first,), (torch.ones_like(first),))


@every_op
@pytest.mark.interpret
def test_dtype_under_autocast_without_gradients(op):
    """Where a residual or positions in fp32 join, the result is fp32; elsewhere it has autocast's dtype."""
    with ops.use_backend("triton"), torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        dtype = _function(op)(**_floats(op), **CASES[op].options).dtype
    assert dtype == (torch.bfloat16 if op in ("ln_linear", "rope_attention", "window_attention") else torch.float32)
