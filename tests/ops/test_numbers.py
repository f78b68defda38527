"""Numbers that a careless kernel spoils, for every op that can meet them, and bits that must not depend on anything.

Elsewhere: rows of a large mean, of equal elements and with one giant (`hard_rows` of test_ln_linear, in the tests of
the four ops with a LayerNorm); scores of ±10,000, one giant score, equal keys, NaN and infinity in one image's queries
(test_attention); a pixel that is NaN (test_patch_embed). What is not here does not apply: LayerScale is an argument of
four ops, and what is near fp16's largest number in an op with a LayerNorm is its output alone.
"""

import dataclasses

import numpy as np
import pytest
import torch
import triton.language as tl

from tests import unfused
from tests.ops import (
    test_attention,
    test_block,
    test_linear_residual,
    test_ln_linear,
    test_mlp,
    test_patch_embed,
    test_swiglu,
)
from tests.ops.harness import MODES, Case, hold_to_the_rule
from vit_fast import ops, reference

pytestmark = [
    pytest.mark.interpret,
    # numpy, which the interpreter runs on, speaks of the NaN and the infinity that some cases are about.
    pytest.mark.filterwarnings("ignore:invalid value encountered in:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:overflow encountered in exp2:RuntimeWarning"),
]

CASES = {
    "ln_linear": Case("small", test_ln_linear.shaped(3, 5, 33, features=17), {"eps": 1e-6}),
    "linear_residual": test_linear_residual.case("small", test_linear_residual.shaped(3, 5, 33, features=17)),
    "mlp": test_mlp.case("small", test_mlp.shaped(3, 5, 33, hidden=20)),
    "swiglu": test_swiglu.case("small", test_swiglu.shaped(3, 5, 33, hidden=20)),
    "block": test_block.case("small", test_block.shaped(3, 5, 32, 20), 2),
    "patch_embed": test_patch_embed.case("small", test_patch_embed.shaped(3, 2, (3, 3), 4, 17)),
    "attention_qkv": Case("small", test_attention.shaped_qkv(3, 9, 2, 16)),
}
TRUTHS = {"attention_qkv": test_attention.unpacked(reference.attention), "block": test_block.composed(reference)}
PEERS = {"attention_qkv": test_attention.unpacked(unfused.attention), "block": test_block.composed(test_block.PEER)}
every_op = pytest.mark.parametrize("op", CASES)


def hold(op: str, case: Case, mode: str) -> None:
    truth = TRUTHS.get(op) or getattr(reference, op)
    hold_to_the_rule(getattr(ops, op), truth, PEERS.get(op) or getattr(unfused, op), case, mode, "triton")


def changed(case: Case, **changes) -> Case:
    """The case with a function of a tensor in the place of that tensor."""

    def draw():
        return {name: changes.get(name, lambda t: t)(t) for name, t in case.draw().items()}

    return dataclasses.replace(case, draw=draw)


def first(op: str) -> str:
    """The name of the argument that has a batch of images."""
    return {"patch_embed": "images", "attention_qkv": "qkv"}.get(op, "x")


@every_op
@pytest.mark.parametrize(("mode", "size"), [("fp32", 1e-40), ("fp16", 1e-6), ("bf16", 1e-39)])
def test_denormals(op, mode, size, guarded_memory):
    """Inputs below the smallest normal number. A norm's scale gets a gradient that is all rounding: it is not held."""
    case = changed(CASES[op], **{first(op): lambda t: size * t})
    case = dataclasses.replace(case, constant=(*case.constant, "norm_weight", "norm1_weight"))
    if op == "attention_qkv":  # the scores are zero, and the gradients of q and k next to it: see test_equal_keys
        q, k, v = (size * t.to(MODES[mode]).float() for t in case.draw()["qkv"].unbind(2))
        with ops.use_backend("triton"):
            o = ops.attention(*(t.to(MODES[mode]) for t in (q, k, v)))
        mean = v.to(MODES[mode]).double().mean(1).flatten(1)[:, None]
        assert (o.double() - mean).abs().max() <= 2 * torch.finfo(MODES[mode]).smallest_normal
        return
    hold(op, case, mode)


NEAR = 6e4  # of 65,504
NEAR_OVERFLOW = {
    # The branch alone is over it; its sum with the residual is not. Unfused PyTorch has infinity there.
    "linear_residual": {
        "x": lambda t: t.sign(),
        "weight": lambda t: 1.3 * NEAR / t.shape[1] * torch.ones_like(t),
        "bias": torch.zeros_like,
        "residual": lambda t: torch.full_like(t, -NEAR / 2),
        "layer_scale": torch.ones_like,
        "drop": torch.ones_like,
    },
    "ln_linear": {"weight": lambda t: 2e4 / t.shape[1] * t.sign(), "norm_weight": torch.ones_like},
    "attention_qkv": {"qkv": lambda t: torch.cat([t[:, :, :2], NEAR * t[:, :, 2:].sign()], dim=2)},
    "patch_embed": {"images": lambda t: t.sign(), "weight": lambda t: NEAR / t[0].numel() * t.sign()},
}


@pytest.mark.parametrize("op", NEAR_OVERFLOW)
def test_near_the_largest_fp16(op, guarded_memory):
    """What fits is there, to half a unit in the last place and a little: sums are fp32 up to the last rounding."""
    case = changed(CASES[op], **NEAR_OVERFLOW[op])
    drawn = {name: t.half() for name, t in case.draw().items()}
    if op == "linear_residual":
        drawn["x"] = torch.ones_like(drawn["x"])
    truth = (TRUTHS.get(op) or getattr(reference, op))(**{n: t.double() for n, t in drawn.items()}, **case.options)
    with ops.use_backend("triton"):
        found = getattr(ops, op)(**drawn, **case.options)
    assert 1e4 < truth.abs().max() < 65_504
    assert torch.isfinite(found).all()
    # Of what the sum is made of: an attention's probabilities and a LayerNorm's result are rounded to fp16 before it.
    assert (found.double() - truth).abs().max() <= torch.finfo(torch.float16).eps * NEAR


@pytest.mark.parametrize("op", ["linear_residual", "mlp", "swiglu", "block"])
@pytest.mark.parametrize("mode", MODES)
def test_a_layer_scale_of_a_hundred_thousandth(op, mode, guarded_memory):
    tiny = {"layer_scale": lambda t: 1e-5 * t, "layer_scale1": lambda t: 1e-5 * t, "layer_scale2": lambda t: 1e-5 * t}
    hold(op, changed(CASES[op], **tiny), mode)


def outcome(op: str, drawn: dict) -> tuple[torch.Tensor, ...]:
    """The output, and the gradient of what has a batch where a kernel makes one."""
    case = CASES[op]
    drawn = {name: None if t is None else t.clone() for name, t in drawn.items()}
    wanted = [drawn[first(op)].requires_grad_()] if op != "patch_embed" else []
    with ops.use_backend("triton"):
        y = getattr(ops, op)(**drawn, **case.options)
        upstream = torch.linspace(-1, 1, y[0].numel()).view(y[0].shape).expand_as(y).to(y.dtype)
        return y.detach(), *(torch.autograd.grad(y, wanted, upstream) if wanted else ())


def drawn_in(op: str, dtype: torch.dtype) -> dict:
    return {name: t.to(dtype) for name, t in CASES[op].draw().items()}


@every_op
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_no_number_stays_in_its_image(op, bad):
    clean = drawn_in(op, torch.float32)
    poisoned = {name: t.clone() for name, t in clean.items()}
    poisoned[first(op)][1].view(-1)[7] = bad
    before, after = outcome(op, clean), outcome(op, poisoned)
    for one, other in zip(before, after):
        assert torch.equal(one[[0, 2]], other[[0, 2]])
    assert not torch.isfinite(after[0][1]).all()


def images_of(op: str, drawn: dict, chosen: list[int]) -> dict:
    """The operands with some of the images, and what each of these has of its own."""
    own = {first(op), "residual", "drop", "drop1", "drop2"}
    return {name: t[chosen] if name in own else t for name, t in drawn.items()}


@pytest.fixture
def _dots_of_no_order(monkeypatch):
    """Products summed in fp64: numpy's, in fp32, sums some rows of a tile in another order than others."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def create_dot(self, a, b, d, *_):
        left, right = (t.data if t.dtype.scalar != tl.bfloat16 else self.cast_impl(t, tl.float32).data for t in (a, b))
        product = left.astype(np.float64) @ right.astype(np.float64) + d.data
        return TensorHandle(product.astype(d.data.dtype), d.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)


@every_op
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("_dots_of_no_order")
def test_an_image_alone_has_the_bits_that_it_has_in_a_batch(op, dtype):
    """For one entry of the table: a batch of another class of rows may take another tile, and with it another order."""
    drawn = drawn_in(op, dtype)
    for chosen in ([1], [2, 0]):
        for alone, together in zip(outcome(op, images_of(op, drawn, chosen)), outcome(op, drawn)):
            assert torch.equal(alone, together[chosen])


@every_op
def test_the_same_bits_in_every_run(op):
    """Output and every gradient, of memory that is not the same."""
    case, drawn = CASES[op], drawn_in(op, torch.float16)
    runs = []
    for _ in range(3):
        copies = {name: t.clone().requires_grad_(name not in case.constant) for name, t in drawn.items()}
        with ops.use_backend("triton"):
            y = getattr(ops, op)(**copies, **case.options)
        wanted = [t for t in copies.values() if t.requires_grad]
        runs.append([y.detach(), *torch.autograd.grad(y, wanted, torch.ones_like(y))])
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other))


LONG = {
    "attention": (test_attention.shaped(1, 16, 1, 16, keys=8192), {}),  # the sum of a softmax, and of P·v
    "ln_linear": (test_ln_linear.shaped(1, 8192, 16, features=16), {"eps": 1e-6}),  # those of dW, db, dγ and dβ
}


@pytest.mark.parametrize(
    ("op", "mode"),
    [
        ("ln_linear", "fp32"),
        *(pytest.param(*which, marks=pytest.mark.slow) for which in [("ln_linear", "bf16"), ("attention", "fp32")]),
        pytest.param("attention", "bf16", marks=pytest.mark.slow),
    ],
)
def test_sums_of_8192(op, mode):
    draw, options = LONG[op]
    hold(op, Case("8192 tokens", draw, options), mode)
