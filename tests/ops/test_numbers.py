"""Numbers that a careless kernel spoils, for every op that can meet them, and bits that must not depend on anything.

CELLS says for each kind of them and each op where it is tested, here or in the op's own file, or why it cannot be met.
"""

import dataclasses
import importlib

import numpy as np
import pytest
import torch

from tests import unfused
from tests.ops import (
    test_attention,
    test_block,
    test_linear_residual,
    test_ln_linear,
    test_mlp,
    test_patch_embed,
    test_rope_attention,
    test_swiglu,
    test_window_attention,
)
from tests.ops.harness import MODES, Case, hold_to_the_rule, run
from vit_fast import ops, reference

triton, tl = (pytest.importorskip(name, reason="needs triton") for name in ("triton", "triton.language"))

pytestmark = [
    pytest.mark.interpret,
    # numpy, which the interpreter runs on, speaks of the NaN and the infinity that some cases are about.
    pytest.mark.filterwarnings("ignore:invalid value encountered in:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:overflow encountered in exp2:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning"),
]

CASES = {
    "patch_embed": test_patch_embed.case("small", test_patch_embed.shaped(3, 2, (3, 3), 4, 17)),
    "ln_linear": Case("small", test_ln_linear.shaped(3, 5, 33, features=17), {"eps": 1e-6}),
    "attention": Case("small", test_attention.shaped_qkv(3, 9, 2, 16)),
    "attention_maps": Case("small", lambda: {"q": torch.randn(3, 9, 2, 16), "k": torch.randn(3, 7, 2, 16)}),
    "rope_attention": test_rope_attention.case("small", 3, 9, 3, 16, 7),
    "window_attention": test_window_attention.case("small", 3, 2, 6, 3, 16, window=(2, 3), shift=(1, 1)),
    "linear_residual": test_linear_residual.case("small", test_linear_residual.shaped(3, 5, 33, features=17)),
    "mlp": test_mlp.case("small", test_mlp.shaped(3, 5, 33, hidden=20)),
    "swiglu": test_swiglu.case("small", test_swiglu.shaped(3, 5, 33, hidden=20)),
    "block": test_block.case("small", test_block.shaped(3, 5, 32, 20), 2),
}
CALLS = {name: getattr(ops, name) for name in CASES} | {"attention": ops.attention_qkv}
TRUTHS = {
    "attention": test_attention.unpacked(reference.attention),
    "attention_maps": reference.attention_probabilities,
    "block": test_block.composed(reference),
}
PEERS = {"attention": test_attention.unpacked(unfused.attention), "block": test_block.composed(test_block.PEER)}

HERE = "here"
HARD_ROWS = {op: f"test_{op}.test_hard_rows" for op in ("ln_linear", "mlp", "swiglu", "block")}
ATTENTIONS = ("attention", "attention_maps", "rope_attention", "window_attention")
NO_NORM = dict.fromkeys(("patch_embed", *ATTENTIONS, "linear_residual"), "has no LayerNorm")
NO_SOFTMAX = dict.fromkeys(("patch_embed", "ln_linear", "linear_residual", "mlp", "swiglu"), "has no softmax")
OF_ATTENTION = "its softmax is attention's kernel"
THE_SAME_SUM = "its gradients are summed over tokens by the kernels that sum linear_residual's and ln_linear's"
THE_SAME_LOOP = "its products have the loop of linear_residual's, its norm is ln_linear's"
CELLS = {
    "a mean of 1e4 and a variance of 1e-4, equal numbers, a giant in a row": HARD_ROWS | NO_NORM,
    "a giant score": NO_SOFTMAX
    | {"attention": "test_attention.test_no_slope", "attention_maps": HERE, "block": OF_ATTENTION}
    | {"rope_attention": OF_ATTENTION, "window_attention": "test_window_attention.test_one_key_takes_all"},
    "equal scores": NO_SOFTMAX
    | {"attention": "test_attention.test_equal_keys", "attention_maps": HERE, "block": OF_ATTENTION}
    | {"rope_attention": OF_ATTENTION, "window_attention": "test_window_attention.test_equal_scores"},
    "denormals": dict.fromkeys(CASES, HERE),
    "near the largest of fp16": dict.fromkeys(CASES, HERE) | {"attention_maps": "its results are at most 1"},
    "a LayerScale of 1e-5": dict.fromkeys(CASES, "has no LayerScale")
    | dict.fromkeys(("linear_residual", "mlp", "swiglu", "block"), HERE),
    "NaN, inf and -inf in one image": dict.fromkeys(CASES, HERE),
    "NaN, inf and -inf in any operand": dict.fromkeys(CASES, HERE),
    "8192 tokens": {
        "patch_embed": THE_SAME_SUM,
        "ln_linear": HERE,
        "attention": HERE,
        "attention_maps": HERE,
        "linear_residual": HERE,
        "mlp": THE_SAME_SUM,
        "swiglu": THE_SAME_SUM,
        "block": f"{THE_SAME_SUM}, and {OF_ATTENTION}",
        "rope_attention": f"{OF_ATTENTION}, and a turn is a sum of two",
        "window_attention": "a softmax is over 64 tokens at most; a table's sum over 10,240 windows is tests/gpu's",
    },
    "rows of 8192": dict.fromkeys(CASES, THE_SAME_LOOP)
    | dict.fromkeys(("ln_linear", "linear_residual"), HERE)
    | dict.fromkeys(ATTENTIONS, "a head is 128 wide at most"),
    "the same bits in every run": dict.fromkeys(CASES, HERE),
    "the same bits alone and in a batch": dict.fromkeys(CASES, HERE),
}


def ops_of(kind: str) -> list[str]:
    """The ops that meet a kind of numbers here."""
    return [op for op, where in CELLS[kind].items() if where == HERE]


def met(kind: str):
    """Those as a test's argument `op`."""
    return pytest.mark.parametrize("op", ops_of(kind))


@pytest.mark.parametrize("kind", CELLS)
def test_each_op_has_a_test_or_a_reason(kind):
    assert CELLS[kind].keys() == CASES.keys()
    for where in CELLS[kind].values():
        if where != HERE and " " not in where:
            file, test = where.split(".")
            assert callable(getattr(importlib.import_module(f"tests.ops.{file}"), test))


def truth_of(op: str):
    return TRUTHS.get(op) or getattr(reference, op)


def hold(op: str, case: Case, mode: str, then=lambda y: y) -> None:
    """The error rule, of an op and of what comes `then`."""

    def behind(f):
        return lambda **arguments: then(f(**arguments))

    peer = PEERS.get(op) or getattr(unfused, op)
    hold_to_the_rule(behind(CALLS[op]), behind(truth_of(op)), behind(peer), case, mode, "triton")


def changed(case: Case, **changes) -> Case:
    """The case with a function of a tensor in the place of that tensor."""

    def draw():
        return {name: changes.get(name, lambda t: t)(t) for name, t in case.draw().items()}

    return dataclasses.replace(case, draw=draw)


def first(op: str) -> str:
    """The name of the argument that has a batch of images."""
    names = {"patch_embed": "images", "attention_maps": "q"}
    return (names | dict.fromkeys(("attention", "rope_attention", "window_attention"), "qkv")).get(op, "x")


# ---- numbers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["fp32", "bf16"])
@met("a giant score")
def test_a_giant_score(op, mode):
    """One key takes all: its probability is 1 and that of any other is 0, to the bit."""
    q, k = (t.to(MODES[mode]) for t in CASES[op].draw().values())
    q[..., 0], k[..., 0], k[:, 3, :, 0] = 100.0, -100.0, 100.0
    with ops.use_backend("triton"):
        rows = ops.attention_maps(q, k)
    assert torch.equal(rows, torch.eye(7)[3].expand_as(rows))


@met("equal scores")
def test_equal_scores(op):
    q, k = CASES[op].draw().values()
    with ops.use_backend("triton"):
        rows = ops.attention_maps(q, k[:, :1].expand_as(k))
    torch.testing.assert_close(rows, torch.full_like(rows, 1 / 7), rtol=4 * torch.finfo(torch.float32).eps, atol=0)


# Where a norm makes equal rows of them, every other token is ordinary: of equal rows a gradient is one number times a
# sum of gradients, which may be next to nothing, and its rounding anything.
NORMED = ("ln_linear", "mlp", "swiglu", "block")


@met("denormals")
@pytest.mark.parametrize(("mode", "size"), [("fp32", 1e-40), ("fp16", 1e-6), ("bf16", 1e-39)])
def test_denormals(op, mode, size, guarded_memory):
    """Inputs below the smallest normal number."""
    if op in ("rope_attention", "window_attention"):  # the scores are next to zero, or the table's
        operands = {n: t.to(MODES[mode]) for n, t in changed(CASES[op], qkv=lambda t: size * t).draw().items()}
        with ops.use_backend("triton"):
            found = CALLS[op](**operands, **CASES[op].options)
        truth = truth_of(op)(**{n: t.double() for n, t in operands.items()}, **CASES[op].options)
        # A sum of nine, or of a window's six, each off by half a step, once more in the end.
        info, steps = torch.finfo(MODES[mode]), 5 if op == "rope_attention" else 4
        assert (found.double() - truth).abs().max() <= steps * info.smallest_normal * info.eps
        return
    if op.startswith("attention"):  # the scores are zero, and the gradients of q and k next to it: see test_equal_keys
        q, k, v = (t.to(MODES[mode]) for t in (size * CASES["attention"].draw()["qkv"]).unbind(2))
        with ops.use_backend("triton"):
            found = ops.attention(q, k, v) if op == "attention" else ops.attention_maps(q, k)
        truth = v.double().mean(1).flatten(1)[:, None] if op == "attention" else torch.tensor(1 / 9).double()
        # Of nine products in fp32 each is rounded to a denormal, half a step off; a result in halves is rounded once.
        info, steps = torch.finfo(MODES[mode]), 5 if mode == "fp32" else 1
        near = steps * info.smallest_normal * info.eps if op == "attention" else 2 * torch.finfo(torch.float32).eps
        assert (found.double() - truth).abs().max() <= near
        return
    tiny = size * torch.ones(1, 5, 1, dtype=torch.float64)
    if op in NORMED:
        tiny[:, ::2] = 1
    hold(op, changed(CASES[op], **{first(op): lambda t: (size if op not in NORMED else tiny) * t}), mode)


NEAR = 6e4  # of 65,504
NEAR_OVERFLOW = {
    # The branch alone is over it; its sum with the residual is not. Unfused PyTorch has infinity there.
    "linear_residual": {
        "x": torch.ones_like,
        "weight": lambda t: 1.3 * NEAR / t.shape[1] * torch.ones_like(t),
        "bias": torch.zeros_like,
        "residual": lambda t: torch.full_like(t, -NEAR / 2),
        "layer_scale": torch.ones_like,
        "drop": torch.ones_like,
    },
    "ln_linear": {
        "norm_weight": lambda t: 0.1 * t,
        "norm_bias": torch.ones_like,
        "weight": lambda t: torch.full_like(t, NEAR / t.shape[1]),
    },
    "attention": {"qkv": lambda t: torch.cat([t[:, :, :2], NEAR * t[:, :, 2:].sign()], dim=2)},
    "rope_attention": {"qkv": lambda t: torch.cat([t[:, :, :2], NEAR * t[:, :, 2:].sign()], dim=2)},
    "window_attention": {"qkv": lambda t: torch.cat([t[:, :, :, :2], NEAR * t[:, :, :, 2:].sign()], dim=3)},
    "patch_embed": {"images": torch.ones_like, "weight": lambda t: torch.full_like(t, NEAR / t[0].numel())},
}
LARGE = {"x": lambda t: NEAR / 3 * t.clamp(-2, 2), "fc2_weight": lambda t: 1e-2 * t}
# The hidden layer is near it, the stream too, and what is between a gate and its product.
NEAR_OVERFLOW_INSIDE = {
    "mlp": LARGE | {"fc1_bias": lambda t: NEAR * t.sign()},
    "block": LARGE | {"fc1_bias": lambda t: NEAR * t.sign()},
    "swiglu": LARGE | {"fc1_bias": lambda t: NEAR**0.5 * t.sign()},
}


@met("near the largest of fp16")
def test_near_the_largest_fp16(op, guarded_memory):
    """What fits is there, to half a unit in the last place and a little: sums are fp32 up to the last rounding."""
    if op in NEAR_OVERFLOW_INSIDE:  # a hundredth of the gradients: those of weights would be over it
        hold(op, changed(CASES[op], **NEAR_OVERFLOW_INSIDE[op]), "fp16", lambda y: y * 2**-7)
        return
    case = changed(CASES[op], **NEAR_OVERFLOW[op])
    drawn = {name: t.half() for name, t in case.draw().items()}
    truth = truth_of(op)(**{n: t.double() for n, t in drawn.items()}, **case.options)
    with ops.use_backend("triton"):
        found = CALLS[op](**drawn, **case.options)
    assert NEAR / 2 < truth.abs().max() < 65_504
    assert torch.isfinite(found).all()
    # Of what the sum is made of: an attention's probabilities and a LayerNorm's result are rounded to fp16 before it.
    assert (found.double() - truth).abs().max() <= torch.finfo(torch.float16).eps * NEAR


@met("a LayerScale of 1e-5")
@pytest.mark.parametrize("mode", MODES)
def test_a_layer_scale_of_a_hundred_thousandth(op, mode, guarded_memory):
    tiny = {"layer_scale": lambda t: 1e-5 * t, "layer_scale1": lambda t: 1e-5 * t, "layer_scale2": lambda t: 1e-5 * t}
    hold(op, changed(CASES[op], **tiny), mode)


LONG = {  # 96 features: of a few the norm of the errors is a matter of luck
    "attention": (test_attention.shaped(1, 16, 1, 16, keys=8192), {}),  # the sum of a softmax, and of P·v
    "ln_linear": (test_ln_linear.shaped(1, 8192, 16, features=96), {"eps": 1e-6}),  # those of dW, db, dγ and dβ
    "linear_residual": (test_linear_residual.shaped(2, 4096, 16, features=96), {}),  # those of dW, db and LayerScale's
}
LONG_ROWS = {  # the sums of a product and of dγ, of a LayerNorm's mean, variance and gradient
    "ln_linear": Case("rows of 8192", test_ln_linear.shaped(1, 5, 8192, features=9), {"eps": 1e-6}),
    "linear_residual": test_linear_residual.case("rows of 8192", test_linear_residual.shaped(2, 3, 8192, features=9)),
}


@pytest.mark.parametrize(
    ("op", "mode"),
    [
        pytest.param(op, mode, marks=[] if (op, mode) == ("ln_linear", "fp32") else pytest.mark.slow)
        for op in ops_of("8192 tokens")
        for mode in ("fp32", "fp16", "bf16")
    ],
)
def test_sums_of_8192(op, mode):
    if op == "attention_maps":
        q, k, _ = (t.to(MODES[mode]) for t in LONG["attention"][0]().values())
        with ops.use_backend("triton"):
            rows = ops.attention_maps(q, k)
        truth = reference.attention_probabilities(q.double(), k.double())
        assert (rows.double() - truth).norm() <= 8 * torch.finfo(torch.float32).eps * truth.norm()
        if mode == "fp32":  # of a small probability, too, as much is right as in PyTorch
            with ops.use_backend("torch"):
                unfused_rows = ops.attention_maps(q, k)
            ours, peer = ((one - truth).div(truth).norm() for one in (rows, unfused_rows))
            assert ours <= 2 * peer
        return
    draw, options = LONG[op]
    call = {"attention": (ops.attention, reference.attention, unfused.attention)}
    three = call.get(op) or (CALLS[op], truth_of(op), getattr(unfused, op))
    constant = ("drop",) if op == "linear_residual" else ()
    hold_to_the_rule(*three, Case("8192 tokens", draw, options, constant), mode, "triton")


@met("rows of 8192")
@pytest.mark.parametrize("mode", MODES)
def test_rows_of_8192(op, mode, guarded_memory):
    hold(op, LONG_ROWS[op], mode)


@triton.jit
def _sum_columns_kernel(x_ptr, sums_ptr, ROWS: tl.constexpr, COLS: tl.constexpr):
    rows, cols = tl.arange(0, ROWS), tl.arange(0, COLS)
    tl.store(sums_ptr + cols, tl.sum(tl.load(x_ptr + rows[:, None] * COLS + cols[None, :]), axis=0))


def test_sums_down_a_tile_are_as_near_as_those_along_it():
    """In the interpreter, as mended: one number after the other was twice as far from the truth, and one in a hundred
    gradients of a bias past the limit. Of 4,096 sums the norm of the errors is no matter of luck."""
    x, sums = torch.randn(64, 4096), torch.empty(4096)
    _sum_columns_kernel[(1,)](x, sums, 64, 4096)
    truth = x.double().sum(0)
    along = torch.from_numpy(np.sum(np.ascontiguousarray(x.T.numpy()), axis=1))
    assert (sums - truth).norm() <= 1.1 * (along - truth).norm()


# ---- bits ----------------------------------------------------------------------------------------------------------


def outcome(op: str, drawn: dict) -> tuple[torch.Tensor, ...]:
    """The output, and the gradient of what has a batch where a kernel makes one."""
    case = CASES[op]
    drawn = {name: None if t is None else t.clone() for name, t in drawn.items()}
    wanted = [drawn[first(op)].requires_grad_()] if op not in ("patch_embed", "attention_maps") else []
    with ops.use_backend("triton"):
        y = CALLS[op](**drawn, **case.options)
        upstream = torch.linspace(-1, 1, y[0].numel()).view(y[0].shape).expand_as(y).to(y.dtype)
        return y.detach(), *(torch.autograd.grad(y, wanted, upstream) if wanted else ())


def drawn_in(case: Case, dtype: torch.dtype) -> dict:
    return {name: None if t is None else t.to(dtype) for name, t in case.draw().items()}


@met("NaN, inf and -inf in one image")
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_no_number_stays_in_its_image(op, bad):
    clean = drawn_in(CASES[op], torch.float32)
    poisoned = {name: t.clone() for name, t in clean.items()}
    poisoned[first(op)][1].view(-1)[7] = bad
    before, after = outcome(op, clean), outcome(op, poisoned)
    for one, other in zip(before, after):
        assert torch.equal(one[[0, 2]], other[[0, 2]])
    assert not torch.isfinite(after[0][1]).all()


def poisoned(drawn: dict, bad: float):
    """The operands with the last number of one of them `bad`, each in turn; of packed ones queries, keys and values."""
    for name in drawn:
        for place in range(3 if name == "qkv" else 1):
            changed = {name: t.clone() for name, t in drawn.items()}
            operand = changed[name].select(-3, place) if name == "qkv" else changed[name]
            operand[(-1,) * operand.dim()] = bad
            yield f"{name} {place}", changed


@met("NaN, inf and -inf in any operand")
@pytest.mark.parametrize("mode", ["fp32", *(pytest.param(mode, marks=pytest.mark.slow) for mode in ("fp16", "bf16"))])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_no_number_reaches_what_it_must_and_no_more(op, mode, bad):
    """Output and gradients are finite where the reference's are and nowhere else: no mask, maximum or sum hides it. The
    gradient that comes in is one of the operands."""
    case, clean = CASES[op], drawn_in(CASES[op], MODES[mode])
    case = dataclasses.replace(case, constant=("images",) if op == "patch_embed" else case.constant)
    if op != "attention_maps":
        clean["upstream"] = torch.randn(truth_of(op)(**clean, **case.options).shape).to(MODES[mode])

    def results(f, operands: dict) -> dict:
        operands = dict(operands)
        upstream = operands.pop("upstream", None)
        return {"output": f(**operands)} if upstream is None else run(f, operands, case, upstream)

    for where, operands in poisoned(clean, bad):
        truth = results(truth_of(op), {name: t.double() for name, t in operands.items()})
        masks = where == "table 0" and bad == -torch.inf  # a pair that does not meet
        assert masks == all(t.isfinite().all() for t in truth.values())
        with ops.use_backend("triton"):
            found = results(CALLS[op], operands)
        for name in truth:
            assert torch.equal(found[name].isfinite(), truth[name].isfinite()), f"{name}, of {bad} in {where}"


@pytest.mark.parametrize("mode", ["fp32", "bf16"])
def test_an_infinite_gradient_of_a_bias_is_no_nan(mode):
    """In the third of four steps of a sum, whose last three begin with it."""
    case = test_linear_residual.case("four steps", test_linear_residual.shaped(1, 128, 16, features=9, drop=False))
    operands = drawn_in(case, MODES[mode])
    upstream = torch.randn(1, 128, 9)
    upstream[0, 70, 3] = torch.inf
    exact = {name: None if t is None else t.double() for name, t in operands.items()}
    truth = run(reference.linear_residual, exact, case, upstream)["dbias"]
    with ops.use_backend("triton"):
        found = run(ops.linear_residual, operands, case, upstream)["dbias"]
    assert truth.isinf().sum() == 1
    assert torch.equal(found.isinf(), truth.isinf())
    assert not found.isnan().any()


def images_of(op: str, drawn: dict, chosen: list[int]) -> dict:
    """The operands with some of the images, and what each of these has of its own."""
    own = {first(op), "k", "residual", "drop", "drop1", "drop2"}
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


@met("the same bits alone and in a batch")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("_dots_of_no_order")
def test_an_image_alone_has_the_bits_that_it_has_in_a_batch(op, dtype):
    """For one entry of the table: a batch of another class of rows may take another tile, and with it another order."""
    drawn = drawn_in(CASES[op], dtype)
    for chosen in ([1], [2, 0]):
        for alone, together in zip(outcome(op, images_of(op, drawn, chosen)), outcome(op, drawn)):
            assert torch.equal(alone, together[chosen])


@pytest.fixture
def backwards(monkeypatch):
    """A switch: whether the programs of a launch run from the last to the first. A GPU runs them in any order."""
    from triton.runtime.interpreter import InterpreterBuilder

    in_order = InterpreterBuilder.set_grid_idx

    def set_grid_idx(self, *place):
        if switch:
            place = [size - 1 - at for size, at in zip(self.grid_dim, place)]
        in_order(self, *place)

    switch = []
    monkeypatch.setattr(InterpreterBuilder, "set_grid_idx", set_grid_idx)
    return switch


# Sums of three spans at least: of two there is but one order.
RUNS = CASES | {
    "ln_linear": Case("three spans", test_ln_linear.shaped(1, 390, 16, features=9), {"eps": 1e-6}),
    "attention": Case("three tiles of keys", test_attention.shaped_qkv(1, 65, 2, 16)),
    "window_attention": test_window_attention.case("three spans", 3, 2, 6, 2, 16, window=(2, 3), shift=(1, 1)),
}


def hold_to_the_same_bits(op: str, backwards: list) -> None:
    case, drawn = RUNS[op], drawn_in(RUNS[op], torch.float32)  # in halves another order is rounded away
    runs = []
    for turned in ([], [True], []):
        backwards[:] = turned
        copies = {name: t.clone() for name, t in drawn.items()}
        wanted = [] if op == "attention_maps" else [t for name, t in copies.items() if name not in case.constant]
        for t in wanted:
            t.requires_grad_()
        with ops.use_backend("triton"):
            y = CALLS[op](**copies, **case.options)
        upstream = torch.linspace(-1, 1, y.numel()).view(y.shape).to(y.dtype)
        runs.append([y.detach(), *(torch.autograd.grad(y, wanted, upstream) if wanted else ())])
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other))


@met("the same bits in every run")
def test_the_same_bits_in_every_run(op, backwards, guarded_memory):
    """Output and every gradient, in whatever order the programs run; memory that is not written to is NaN."""
    hold_to_the_same_bits(op, backwards)


def test_the_same_bits_in_every_run_of_what_streams(monkeypatch, backwards, guarded_memory):
    from vit_fast.kernels import attention

    monkeypatch.setattr(attention, "_whole", lambda *_: None)
    hold_to_the_same_bits("attention", backwards)
