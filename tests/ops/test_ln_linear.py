import pytest
import torch

from tests import unfused
from tests.ops.harness import BACKENDS, MODES, Case, assert_no_second_derivative, hold_to_the_rule, named
from vit_fast import reference
from vit_fast.ops import ln_linear, use_backend


def shaped(*shape: int, features: int, bias: bool = True, mean: float = 0.0, std: float = 1.0):
    width = shape[-1]

    def draw():
        return {
            "x": mean + std * torch.randn(shape, dtype=torch.float64),
            "norm_weight": 0.5 + 0.3 * torch.randn(width, dtype=torch.float64),
            "norm_bias": 0.5 + 0.3 * torch.randn(width, dtype=torch.float64),
            "weight": torch.randn(features, width, dtype=torch.float64) / width**0.5,
            "bias": torch.randn(features, dtype=torch.float64) if bias else None,
        }

    return draw


EPS = {"eps": 1e-6}
CASES = [
    Case("every tile divides", shaped(2, 32, 64, features=96), EPS),
    Case("no tile divides", shaped(3, 13, 70, features=45), EPS),
    Case("one token of each image", shaped(5, 1, 48, features=144), EPS),
    Case("width is no multiple of 16", shaped(1, 33, 37, features=31), EPS),
    Case("without a bias", shaped(2, 5, 48, features=33, bias=False), EPS),
    Case("tokens summed in two spans", shaped(2, 130, 24, features=20), EPS),
    Case("more rows of tiles than a group has", shaped(1, 260, 24, features=70), EPS),
    Case("a mean of ten deviations", shaped(2, 9, 48, features=40, mean=10.0), EPS),
    Case("small numbers and a large eps", shaped(2, 9, 48, features=40, std=1e-3), {"eps": 1e-5}),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", named(CASES))
def test_output_and_gradients(case, mode, backend, guarded_memory):
    hold_to_the_rule(ln_linear, reference.ln_linear, unfused.ln_linear, case, mode, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_do_not_mix(backend):
    """A row's result does not depend on where it stands, and NaN in one row stays there."""
    inputs = {name: t.float() for name, t in CASES[1].draw().items()}
    order = torch.randperm(13)
    with use_backend(backend):
        y = ln_linear(**inputs)
        x = inputs.pop("x")
        # Not to the bit: numpy's product, which the interpreter runs, sums a tile's edge in another order.
        torch.testing.assert_close(ln_linear(x[:, order], **inputs), y[:, order], rtol=1e-5, atol=1e-6)
        x[1, 4, 3] = torch.nan
        poisoned = ln_linear(x, **inputs)
    assert poisoned[1, 4].isnan().all()
    poisoned[1, 4] = y[1, 4]
    assert torch.equal(poisoned, y)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_input(backend):
    """Views are read as they are: every other token, a transposed batch, a width cut out of a wider tensor."""
    inputs = {name: t.float() for name, t in CASES[1].draw().items()}
    del inputs["x"]
    wide = torch.randn(13, 6, 141)
    views = [
        wide[:, ::2, 1:71],
        wide.transpose(0, 1)[..., :70],
        wide[..., 0::2][..., :70],
        wide[:1, :, :70].expand(4, 6, 70),
    ]
    weight = inputs.pop("weight")
    with use_backend(backend):
        for x in views:
            expected = ln_linear(x.contiguous(), weight=weight, **inputs)
            assert torch.equal(ln_linear(x, weight=weight, **inputs), expected)
            assert torch.equal(ln_linear(x, weight=weight.T.contiguous().T, **inputs), expected)


@pytest.mark.interpret
@pytest.mark.parametrize("bias", [True, False])
def test_opcheck(bias):
    args = {name: None if t is None else t.float() for name, t in shaped(2, 3, 16, features=16, bias=bias)().items()}
    args = {name: None if t is None else t.requires_grad_() for name, t in args.items()}
    torch.library.opcheck(torch.ops.vit_fast.ln_linear.default, (*args.values(), 1e-6))
    assert_no_second_derivative(ln_linear, args)


REJECTED = {
    "x is too wide": ({"x": torch.randn(2, 3, 17)}, ValueError, r"x: got shape \[2, 3, 17\], takes \[..., 16\]"),
    "x is a vector": ({"x": torch.randn(16)}, ValueError, r"x: got shape \[16\]"),
    "weight is a vector": ({"weight": torch.randn(16)}, ValueError, r"weight: got shape \[16\], takes \[N, K\]"),
    "norm_weight is short": (
        {"norm_weight": torch.randn(15)},
        ValueError,
        r"norm_weight: got shape \[15\], takes \[16\]",
    ),
    "bias is long": ({"bias": torch.randn(9)}, ValueError, r"bias: got shape \[9\], takes \[8\]"),
    "half a weight": (
        {"weight": torch.randn(8, 16).half()},
        TypeError,
        "weight: torch.float16, the input is torch.float32",
    ),
    "integers": ({"x": torch.ones(2, 3, 16, dtype=torch.int64)}, TypeError, "takes a floating dtype"),
    "another device": ({"bias": torch.randn(8, device="meta")}, ValueError, "bias: on meta, the input is on cpu"),
}


@pytest.mark.parametrize("wrong", REJECTED)
def test_rejected(wrong):
    change, error, message = REJECTED[wrong]
    args = {name: t.float() for name, t in shaped(2, 3, 16, features=8)().items()} | change
    with pytest.raises(error, match=message):
        ln_linear(**args)
