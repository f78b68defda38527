import pytest
import torch

from tests import unfused
from tests.ops import test_mlp
from tests.ops.harness import BACKENDS, MODES, Case, assert_no_second_derivative, hold_to_the_rule, named
from tests.ops.test_ln_linear import hard_eps, hard_rows, hold_each_kind_to_the_rule
from vit_fast import reference
from vit_fast.ops import swiglu, use_backend


def shaped(*shape: int, hidden: int, bias: bool = True, **options):
    """As of mlp, and fc1 with the gates and the values."""
    drawn, width = test_mlp.shaped(*shape, hidden=hidden, bias=bias, **options), shape[-1]

    def draw():
        return drawn() | {
            "fc1_weight": 2 * torch.randn(2 * hidden, width, dtype=torch.float64) / width**0.5,
            "fc1_bias": torch.randn(2 * hidden, dtype=torch.float64) if bias else None,
        }

    return draw


def case(why: str, draw) -> Case:
    return Case(why, draw, {"eps": 1e-6}, constant=("drop",))


CASES = [
    case("every tile divides", shaped(2, 16, 32, hidden=32)),
    case("no tile divides", shaped(3, 13, 45, hidden=35)),  # nor do the rows of the halves begin at 16 bytes
    case(
        "nothing but the products, the gates aligned to 16 bytes and the values not",
        shaped(2, 9, 32, hidden=20, bias=False, layer_scale=False, drop=False),
    ),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", named(CASES))
def test_output_and_gradients(case, mode, backend, guarded_memory):
    hold_to_the_rule(swiglu, reference.swiglu, unfused.swiglu, case, mode, backend)


@pytest.mark.interpret
@pytest.mark.parametrize("mode", ["fp32", "fp16"])
def test_hard_rows(mode, guarded_memory):
    drawn = shaped(2, 20, 48, hidden=8)
    case = Case("hard rows", lambda: drawn() | {"x": hard_rows(48)}, {"eps": hard_eps(mode)}, constant=("drop",))
    hold_each_kind_to_the_rule(swiglu, reference.swiglu, unfused.swiglu, case, mode)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gate_of_zero_closes_and_a_large_one_is_open(backend):
    """silu(0) is 0 whatever the value; where the gate is large and negative nothing passes, and no number is lost."""
    args = {name: t.float() for name, t in shaped(2, 3, 16, hidden=8, layer_scale=False, drop=False)().items()
            if name not in ("layer_scale", "drop")}  # fmt: skip
    args["fc1_weight"][:8] = 0
    for gate in (0.0, -1e4):
        args["fc1_bias"][:8] = gate
        with use_backend(backend):
            y = swiglu(**args)
        assert torch.equal(y, args["x"] + args["fc2_bias"])
    args["fc1_bias"][:8] = 1e4
    with use_backend(backend):
        y = swiglu(**args)
    assert torch.allclose(y, unfused.swiglu(**args), rtol=1e-5, atol=1e-2)
    assert (y - args["x"]).abs().max() > 1e3


@pytest.mark.interpret
def test_inference_equals_training():
    """In fp32 the op that keeps nothing and the op that keeps the hidden layer give the same bits."""
    inputs = {name: t.float() for name, t in shaped(2, 5, 48, hidden=40)().items()}
    with use_backend("triton"):
        plain = swiglu(**inputs)
        assert plain.grad_fn is None
        inputs["x"].requires_grad_()
        trained = swiglu(**inputs)
    assert trained.grad_fn is not None
    assert torch.equal(plain, trained)


@pytest.mark.interpret
def test_a_gradient_of_the_draw_is_never_lost():
    test_mlp.hold_the_draw_to_its_gradient(swiglu, shaped(2, 3, 16, hidden=32)())


@pytest.mark.interpret
@pytest.mark.parametrize(("full", "trained"), [(True, True), (False, True), (True, False)])
def test_opcheck_of_backward(full, trained):
    drawn = shaped(2, 3, 16, hidden=8, bias=full, layer_scale=full, drop=full)()
    x, *parameters = (None if t is None else t.float() for t in drawn.values())
    kept = torch.randn(6, 16), torch.randn(6), torch.rand(6)
    dy = torch.randn(2, 3, 32)[..., ::2]
    torch.library.opcheck(torch.ops.vit_fast.swiglu_backward.default, (dy, x, *kept, *parameters, trained))


@pytest.mark.interpret
def test_opcheck():
    args = {name: t.float() for name, t in shaped(2, 3, 16, hidden=8)().items()}
    torch.library.opcheck(torch.ops.vit_fast.swiglu.default, (*args.values(), 1e-6))
    args = {name: t if t is None or name == "drop" else t.requires_grad_() for name, t in args.items()}
    torch.library.opcheck(torch.ops.vit_fast.swiglu_train.default, (*args.values(), 1e-6))
    assert_no_second_derivative(swiglu, args)


REJECTED = {
    "a gate without a value": (
        {"fc1_weight": torch.randn(31, 16), "fc1_bias": None},
        ValueError,
        "fc1_weight: got 31 rows, takes an even number",
    ),
    "fc2 of both halves": (
        {"fc2_weight": torch.randn(16, 32)},
        ValueError,
        r"fc2_weight: got shape \[16, 32\], takes \[16, 16\]",
    ),
    "fc1_bias of one half": ({"fc1_bias": torch.randn(16)}, ValueError, r"fc1_bias: got shape \[16\], takes \[32\]"),
    "x of another width": ({"x": torch.randn(2, 3, 15)}, ValueError, r"x: got shape \[2, 3, 15\]"),
    "a draw elsewhere": ({"drop": torch.ones(2, device="meta")}, ValueError, "drop: on meta"),
    "half a layer scale": ({"layer_scale": torch.ones(16).half()}, TypeError, "layer_scale: torch.float16"),
}


@pytest.mark.parametrize("wrong", REJECTED)
def test_rejected(wrong):
    change, error, message = REJECTED[wrong]
    args = {name: t.float() for name, t in shaped(2, 3, 16, hidden=16)().items()} | change
    with pytest.raises(error, match=message):
        swiglu(**args)
