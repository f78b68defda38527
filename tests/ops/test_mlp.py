import pytest
import torch

from tests import unfused
from tests.ops.harness import BACKENDS, MODES, Case, assert_no_second_derivative, hold_to_the_rule, named
from tests.ops.test_ln_linear import hard_eps, hard_rows, hold_each_kind_to_the_rule
from vit_fast import reference
from vit_fast.ops import mlp, use_backend


def shaped(*shape: int, hidden: int, bias: bool = True, layer_scale: bool = True, drop: bool = True, std: float = 1.0):
    width = shape[-1]

    def normal(*size):
        return torch.randn(size, dtype=torch.float64)

    def draw():
        kept = torch.tensor([0.0, 1.25] * shape[0], dtype=torch.float64)[: shape[0]]
        return {
            "x": std * normal(*shape),
            "norm_weight": 0.5 + 0.3 * normal(width),
            "norm_bias": 0.5 + 0.3 * normal(width),
            "fc1_weight": 2 * normal(hidden, width) / width**0.5,
            "fc1_bias": normal(hidden) if bias else None,
            "fc2_weight": normal(width, hidden) / hidden**0.5,
            "fc2_bias": normal(width) if bias else None,
            "layer_scale": 0.5 + 0.3 * normal(width) if layer_scale else None,
            "drop": kept[torch.randperm(shape[0])] if drop else None,
        }

    return draw


def case(why: str, draw, activation: str = "gelu") -> Case:
    return Case(why, draw, {"activation": activation, "eps": 1e-6}, constant=("drop",))


CASES = [
    case("every tile divides", shaped(2, 32, 64, hidden=128)),
    case("no tile divides", shaped(3, 13, 45, hidden=70)),
    case("tanh", shaped(2, 11, 32, hidden=40), "gelu_tanh"),
    case("quick", shaped(2, 11, 32, hidden=40), "quick_gelu"),
    case("one token of each image", shaped(6, 1, 48, hidden=36)),
    case("nothing but the products", shaped(2, 9, 33, hidden=48, bias=False, layer_scale=False, drop=False)),
    case("biases alone", shaped(2, 9, 33, hidden=48, layer_scale=False, drop=False)),
    case("tokens summed in two spans", shaped(2, 130, 40, hidden=24), "quick_gelu"),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", named(CASES))
def test_output_and_gradients(case, mode, backend, guarded_memory):
    hold_to_the_rule(mlp, reference.mlp, unfused.mlp, case, mode, backend)


@pytest.mark.interpret
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("width", [48, 129])
def test_hard_rows(width, mode, guarded_memory):
    drawn = shaped(2, 20, width, hidden=40)
    settings = {"activation": "gelu", "eps": hard_eps(mode)}
    case = Case("hard rows", lambda: drawn() | {"x": hard_rows(width)}, settings, constant=("drop",))
    hold_each_kind_to_the_rule(mlp, reference.mlp, unfused.mlp, case, mode)


@pytest.mark.interpret
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "quick_gelu"])
def test_inference_equals_training(activation):
    """In fp32 the op that keeps nothing and the op that keeps the hidden layer give the same bits."""
    inputs = {name: t.float() for name, t in shaped(2, 5, 48, hidden=40)().items()}
    with use_backend("triton"):
        plain = mlp(**inputs, activation=activation)
        inputs["x"].requires_grad_()
        assert torch.equal(plain, mlp(**inputs, activation=activation))


@pytest.mark.interpret
def test_training_activates_the_number_that_it_keeps():
    """h as backward will read it, rounded, and not as it was summed. fc2 passes the activation on."""
    drawn = shaped(4, 16, 32, hidden=32, bias=False, layer_scale=False, drop=False)()
    args = {name: None if t is None else t.bfloat16() for name, t in drawn.items()}
    args |= {"x": args["x"] / 64, "fc2_weight": torch.eye(32).bfloat16()}
    with use_backend("triton"):
        y, hidden, *_ = torch.ops.vit_fast.mlp_train(*args.values(), "gelu", 1e-6)
    activated = torch.nn.functional.gelu(hidden.double()).bfloat16().view(y.shape)
    expected = (args["x"].double() + activated.double()).bfloat16()
    assert (y == expected).double().mean() > 0.98, "but where the two GELUs are rounded to neighbours"


@pytest.mark.interpret
def test_inference_keeps_nothing():
    inputs = {name: t.float() for name, t in shaped(2, 5, 48, hidden=40)().items()}
    inputs["x"].requires_grad_()
    with use_backend("triton"):
        with torch.no_grad():
            assert mlp(**inputs).grad_fn is None
        assert mlp(**inputs).grad_fn is not None


def hold_the_draw_to_its_gradient(op, inputs: dict) -> None:
    """The kernels have none for it, and say so; PyTorch has."""
    args = {name: t.float() for name, t in inputs.items()}
    args["drop"].requires_grad_()
    with use_backend("triton"), pytest.raises(ValueError, match="drop requires a gradient"):
        op(**args)
    op(**args).sum().backward()
    assert args["drop"].grad.any()


@pytest.mark.interpret
def test_a_gradient_of_the_draw_is_never_lost():
    hold_the_draw_to_its_gradient(mlp, shaped(2, 3, 16, hidden=32)())


@pytest.mark.interpret
@pytest.mark.parametrize("full", [True, False])
def test_opcheck(full):
    drawn = shaped(2, 3, 16, hidden=32, bias=full, layer_scale=full, drop=full)()
    args = {name: None if t is None else t.float() for name, t in drawn.items()}
    torch.library.opcheck(torch.ops.vit_fast.mlp.default, (*args.values(), "gelu", 1e-6))
    args = {name: t if t is None or name == "drop" else t.requires_grad_() for name, t in args.items()}
    torch.library.opcheck(torch.ops.vit_fast.mlp_train.default, (*args.values(), "gelu", 1e-6))
    assert_no_second_derivative(mlp, args)


REJECTED = {
    "an activation nobody has": ({"activation": "relu"}, ValueError, "activation: got 'relu', takes one of 'gelu'"),
    "fc2 of another width": (
        {"fc2_weight": torch.randn(16, 9)},
        ValueError,
        r"fc2_weight: got shape \[16, 9\], takes \[16, 32\]",
    ),
    "fc1_bias is short": ({"fc1_bias": torch.randn(31)}, ValueError, r"fc1_bias: got shape \[31\], takes \[32\]"),
    "x of another width": ({"x": torch.randn(2, 3, 15)}, ValueError, r"x: got shape \[2, 3, 15\]"),
    "a draw elsewhere": ({"drop": torch.ones(2, device="meta")}, ValueError, "drop: on meta"),
    "half a layer scale": ({"layer_scale": torch.ones(16).half()}, TypeError, "layer_scale: torch.float16"),
}


@pytest.mark.parametrize("wrong", REJECTED)
def test_rejected(wrong):
    change, error, message = REJECTED[wrong]
    args = {name: t.float() for name, t in shaped(2, 3, 16, hidden=32)().items()} | change
    with pytest.raises(error, match=message):
        mlp(**args)
