import pytest
import torch

from tests import unfused
from tests.error_rule import assert_close_to_truth
from tests.ops.harness import BACKENDS, MODES, Case, assert_no_second_derivative, hold_to_the_rule, named, three_ways
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


# Rows that a careless mean or variance spoils, each as a function of an ordinary row, and ordinary rows among them.
HARD = {
    "ordinary": lambda x: x,
    "mean 1e4, variance 1e-4": lambda x: 1e4 + 1e-2 * x,  # all equal where the dtype holds no more of it
    "mean 1e4, variance 4096": lambda x: 1e4 + 64 * x,  # two units in the last place of bf16
    "all equal": lambda x: x[:, :1].expand_as(x),
    "one giant": lambda x: torch.cat([x[:, :1] + 1e4, x[:, 1:]], dim=1),
}
EACH = 8  # rows of a kind: as many as the error rule asks of rows


def hard_rows(width: int, batch: int = 2) -> torch.Tensor:
    """[batch, 40 / batch, width] in fp64: eight rows of each kind of HARD in turn."""
    rows = torch.stack([make(torch.randn(EACH, width, dtype=torch.float64)) for make in HARD.values()], dim=1)
    return rows.view(batch, -1, width)


def hold_each_kind_to_the_rule(op, reference, unfused, case: Case, mode: str, device: str = "cpu") -> None:
    """The error rule as ever, and of what has a row for a row of x, for each kind of HARD by itself."""
    ours, peer, truth = three_ways(op, reference, unfused, case, mode, "triton", device)
    for name in truth:
        assert_close_to_truth(ours[name], peer[name], truth[name], name)
        if name in ("output", "dx"):
            ours_of, peer_of, truth_of = (
                found[name].reshape(EACH, len(HARD), -1).unbind(1) for found in (ours, peer, truth)
            )
            for kind, *three in zip(HARD, ours_of, peer_of, truth_of):
                assert_close_to_truth(*three, f"{name}, {kind}")


def hard_eps(mode: str) -> float:
    """1e-12; but in fp16, where 1e6 times a gradient is no number, 1e-6."""
    return 1e-6 if mode == "fp16" else 1e-12


@pytest.mark.interpret
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("width", [48, 129])
def test_hard_rows(width, mode, guarded_memory):
    drawn = shaped(2, 20, width, features=40)
    case = Case("hard rows", lambda: drawn() | {"x": hard_rows(width)}, {"eps": hard_eps(mode)})
    hold_each_kind_to_the_rule(ln_linear, reference.ln_linear, unfused.ln_linear, case, mode)


@pytest.mark.interpret
@pytest.mark.parametrize("value", [0.0, 3.7, -1e4])
def test_nothing_but_equal_rows(value):
    """x̂ is zero, not nearly so: y = W·β + b in each row, and dγ, which the error rule cannot be asked of, is zero."""
    args = {name: t.float() for name, t in shaped(2, 9, 70, features=45)().items()}
    args["x"] = torch.full((2, 9, 70), value)
    args = {name: t.requires_grad_() for name, t in args.items()}
    with use_backend("triton"):
        y = ln_linear(**args, eps=1e-12)
    dy = torch.randn_like(y)
    dnorm_weight, dweight = torch.autograd.grad(y, (args["norm_weight"], args["weight"]), dy)
    torch.testing.assert_close(
        y, (args["weight"] @ args["norm_bias"] + args["bias"]).expand_as(y), rtol=1e-5, atol=1e-5
    )
    assert torch.equal(dnorm_weight, torch.zeros(70))
    torch.testing.assert_close(dweight, dy.sum((0, 1))[:, None] * args["norm_bias"], rtol=1e-5, atol=1e-5)


@pytest.mark.interpret
def test_hard_rows_change_no_other():
    args = {name: t.float() for name, t in shaped(2, 20, 70, features=45)().items()}
    hard = hard_rows(70).float()
    tame = torch.where((torch.arange(40) % len(HARD) == 0).view(2, 20, 1), hard, torch.randn(2, 20, 70))
    with use_backend("triton"):
        among_hard, among_tame = (ln_linear(**args | {"x": x}, eps=1e-12) for x in (hard, tame))
    ordinary = [y.flatten(0, 1)[:: len(HARD)] for y in (among_hard, among_tame)]
    assert torch.equal(*ordinary)


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


@pytest.mark.interpret
@pytest.mark.parametrize(("rows", "width"), [(70, 2048), (40, 129)])
def test_rows_of_several_steps_of_a_program(rows, width, guarded_memory):
    """LayerNorm's backward pass takes them one after the other, and sums its share of the weight's gradient."""
    from vit_fast.kernels import layer_norm

    x, dz, past = (torch.randn(rows, width) for _ in range(3))
    weight, bias = torch.randn(width), torch.randn(width)
    z, mean, rstd = layer_norm.forward(x, weight, bias, 1e-6, torch.float32, True)
    dx, again, shares = layer_norm.backward(dz, x, mean, rstd, weight, bias, past)
    assert 1 < shares.shape[1] < rows
    ((dweight, dbias),) = layer_norm.finish((shares, weight, bias))
    exact = [t.double().requires_grad_() for t in (x, weight, bias)]
    truth = torch.nn.functional.layer_norm(exact[0], (width,), *exact[1:], 1e-6)
    expected = [truth, truth, *torch.autograd.grad(truth, exact, dz.double())]
    expected[2] = expected[2] + past.double()
    for ours, theirs in zip((z, again, dx, dweight, dbias), expected):
        torch.testing.assert_close(ours, theirs.float(), rtol=1e-5, atol=2e-5)


@pytest.mark.interpret
def test_second_stages_of_many_shares(guarded_memory):
    """More than one step of the loops that add up shares and partials, of one gradient to four in a launch."""
    from vit_fast.kernels import layer_norm, linear

    shares = torch.randn(2, 70, 40)
    ((dweight, dbias),) = layer_norm.finish((shares, torch.empty(40), torch.empty(40)))
    torch.testing.assert_close(dweight, shares[0].sum(0))
    torch.testing.assert_close(dbias, shares[1].sum(0))
    gradients = []
    for N, K, splits, with_bias in ((3, 1100, 5, True), (5, 20, 1, False), (2, 7, 16, True), (4, 33, 2, True)):
        bias = torch.randn(N) if with_bias else None
        sums = torch.randn(splits, N) if with_bias else None
        scale = torch.randn(N) if with_bias else None
        gradients.append(linear.Partials(torch.randn(splits, N, K), sums, torch.randn(N, K), bias, scale))
    for count in range(1, 5):
        found = linear.finish(*gradients[:count])
        for (partial, sums, weight, bias, scale), ours in zip(gradients, found):
            total = partial.sum(0)
            if bias is None:
                torch.testing.assert_close(ours[0], total)
                assert ours[1:] == (None, None)
                continue
            torch.testing.assert_close(ours[0], total * scale[:, None])
            torch.testing.assert_close(ours[1], sums.sum(0) * scale)
            torch.testing.assert_close(ours[2], (weight * total).sum(1) + bias * sums.sum(0), rtol=1e-4, atol=1e-4)
