import pytest
import torch

from tests import unfused
from tests.ops.harness import BACKENDS, MODES, Case, assert_no_second_derivative, hold_to_the_rule, named
from vit_fast import reference
from vit_fast.ops import linear_residual, use_backend


def shaped(*shape: int, features: int, bias: bool = True, layer_scale: bool = True, drop: bool = True):
    width = shape[-1]

    def draw():
        # Of the images at least one is dropped and one is kept.
        kept = torch.tensor([0.0, 1.25] * shape[0], dtype=torch.float64)[: shape[0]]
        return {
            "x": torch.randn(shape, dtype=torch.float64),
            "weight": torch.randn(features, width, dtype=torch.float64) / width**0.5,
            "bias": torch.randn(features, dtype=torch.float64) if bias else None,
            "residual": torch.randn(*shape[:-1], features, dtype=torch.float64),
            "layer_scale": 0.5 + 0.3 * torch.randn(features, dtype=torch.float64) if layer_scale else None,
            "drop": kept[torch.randperm(shape[0])] if drop else None,
        }

    return draw


def case(why: str, draw) -> Case:
    return Case(why, draw, constant=("drop",))


CASES = [
    case("every tile divides", shaped(2, 32, 64, features=96)),
    case("no tile divides", shaped(3, 13, 70, features=45)),
    case("one token of each image", shaped(6, 1, 48, features=48)),
    case("width is no multiple of 16", shaped(2, 17, 37, features=31)),
    case("nothing but the product", shaped(2, 9, 48, features=33, bias=False, layer_scale=False, drop=False)),
    case("bias alone", shaped(2, 9, 48, features=33, layer_scale=False, drop=False)),
    case("layer scale without bias", shaped(2, 9, 48, features=33, bias=False, drop=False)),
    case("drop path alone", shaped(3, 9, 48, features=33, bias=False, layer_scale=False)),
    case("tokens summed in two spans", shaped(2, 130, 24, features=20)),
    case("and in tiles beside the first column", shaped(2, 130, 40, features=36)),
    case("columns of tiles without a share of the sums", shaped(2, 130, 104, features=20)),
    case("two spans without a bias", shaped(2, 130, 24, features=20, bias=False)),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", named(CASES))
def test_output_and_gradients(case, mode, backend, guarded_memory):
    hold_to_the_rule(linear_residual, reference.linear_residual, unfused.linear_residual, case, mode, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_dropped_image_is_its_residual(backend):
    inputs = {name: t.float() for name, t in CASES[1].draw().items()}
    inputs["drop"] = torch.tensor([2.0, 0.0, 2.0])
    with use_backend(backend):
        y = linear_residual(**inputs)
    assert torch.equal(y[1], inputs["residual"][1])
    assert not torch.equal(y[0], inputs["residual"][0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("products", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("residual", [torch.float32, torch.bfloat16])
def test_the_output_keeps_the_dtype_of_the_residual(residual, products, backend):
    drawn = {name: t for name, t in CASES[4].draw().items() if t is not None}
    inputs = {name: t.to(products) for name, t in drawn.items()} | {"residual": drawn["residual"].to(residual)}
    with use_backend(backend):
        assert linear_residual(bias=None, **inputs).dtype == residual
        inputs["weight"].zero_()
        assert torch.equal(linear_residual(bias=None, **inputs), inputs["residual"]), "to the last bit"


@pytest.mark.interpret
@pytest.mark.parametrize("full", [True, False])
def test_opcheck(full):
    drawn = shaped(2, 3, 16, features=16, bias=full, layer_scale=full, drop=full)()
    args = {name: None if t is None else t.float() for name, t in drawn.items()}
    args = {name: t if t is None or name == "drop" else t.requires_grad_() for name, t in args.items()}
    torch.library.opcheck(torch.ops.vit_fast.linear_residual.default, tuple(args.values()))
    assert_no_second_derivative(linear_residual, args)


@pytest.mark.interpret
def test_a_gradient_for_the_draw_is_never_lost():
    """The kernels make none."""
    inputs = {name: t.float() for name, t in shaped(2, 3, 16, features=16)().items()}
    inputs["drop"].requires_grad_()
    with use_backend("triton"), pytest.raises(ValueError, match="drop requires a gradient"):
        linear_residual(**inputs)
    linear_residual(**inputs).sum().backward()
    assert inputs["drop"].grad.isfinite().all()


REJECTED = {
    "residual of another width": (
        {"residual": torch.randn(2, 3, 9)},
        ValueError,
        r"residual: got shape \[2, 3, 9\], takes \[2, 3, 8\]",
    ),
    "a draw for three images": ({"drop": torch.ones(3)}, ValueError, r"drop: got shape \[3\], takes \[2\]"),
    "layer scale is long": ({"layer_scale": torch.ones(9)}, ValueError, r"layer_scale: got shape \[9\], takes \[8\]"),
    "layer scale elsewhere": ({"layer_scale": torch.ones(8, device="meta")}, ValueError, "layer_scale: on meta"),
    "a draw elsewhere": ({"drop": torch.ones(2, device="meta")}, ValueError, "drop: on meta"),
    "a residual of integers": (
        {"residual": torch.ones(2, 3, 8, dtype=torch.int64)},
        TypeError,
        "takes a floating dtype",
    ),
    "residual elsewhere": ({"residual": torch.randn(2, 3, 8, device="meta")}, ValueError, "residual: on meta"),
}


@pytest.mark.parametrize("wrong", REJECTED)
def test_rejected(wrong):
    change, error, message = REJECTED[wrong]
    args = {name: t.float() for name, t in shaped(2, 3, 16, features=8)().items()} | change
    with pytest.raises(error, match=message):
        linear_residual(**args)
