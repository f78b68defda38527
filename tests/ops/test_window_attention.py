import dataclasses
import math
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tests import unfused
from tests.guard import guarded
from tests.ops.harness import BACKENDS, MODES, Case, hold_to_the_rule, named
from tests.test_launches import launches
from vit_fast import reference
from vit_fast.ops import attention, use_backend, window_attention

module = sys.modules["vit_fast.ops.window_attention"]  # in whose place vit_fast.ops has the function

# numpy, which the interpreter runs on, speaks of the differences of infinities that keys past the window make.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered in:RuntimeWarning")

DTYPES = ["fp32", "fp16", "bf16"]

# The interpreter has three multiprocessors, of six programs in fp32 and in every backward, of twelve in fp16's and
# bf16's forward. Those that share a head's windows take a span of them each.


def shaped(batch: int, rows: int, columns: int, heads: int, width: int, window: tuple[int, int], scores=0.5):
    """A map's queries, keys and values, `scores` the standard deviation of their scores, and a table of biases whose
    own is a half."""

    def draw():
        qkv = torch.randn(batch, rows, columns, 3, heads, width, dtype=torch.float64)
        qkv[:, :, :, 0] *= scores
        entries = (2 * window[0] - 1) * (2 * window[1] - 1)
        return {"qkv": qkv, "table": torch.randn(entries, heads, dtype=torch.float64) / 2}

    return draw


def across_the_seam(*shape: int, window: tuple[int, int], shift: tuple[int, int]):
    """Keys of what the shift brings in from the other side have scores of about a hundred."""
    drawn = shaped(*shape, window)

    def draw():
        tensors = drawn()
        side = 10 * shape[-1] ** 0.25
        tensors["qkv"][..., 0, :, 0] = side
        tensors["qkv"][..., 1, :, 0] = 0
        tensors["qkv"][:, : shift[0], :, 1, :, 0] = side
        tensors["qkv"][:, :, : shift[1], 1, :, 0] = side
        return tensors

    return draw


def case(why: str, *shape: int, window: tuple[int, int], shift=(0, 0), scores=0.5, **others) -> Case:
    """Of [B, Y, X, H, d]; `others` are a scale, and what is constant."""
    constant = others.pop("constant", ())
    return Case(why, shaped(*shape, window, scores), {"window": window, "shift": shift} | others, constant)


CASES = [
    case("windows of 7 x 7, as Swin's, the table frozen", 2, 7, 14, 1, 32, window=(7, 7), constant=("table",)),
    case("windows of 7 x 7, shifted by 3", 1, 14, 14, 1, 32, window=(7, 7), shift=(3, 3)),
    case("windows of 64 tokens, shifted by 4", 1, 8, 16, 1, 16, window=(8, 8), shift=(4, 4)),
    case("windows of 16 tokens, shifted", 1, 4, 8, 2, 64, window=(4, 4), shift=(2, 1)),
    case("one token: o is v", 2, 1, 3, 2, 16, window=(1, 1)),
    case("shifted down alone, windows wider than high", 1, 4, 10, 2, 16, window=(2, 5), shift=(1, 0)),
    case("shifted right alone, windows higher than wide", 1, 10, 4, 2, 16, window=(5, 2), shift=(0, 1)),
    case("the map is one window", 3, 3, 4, 1, 16, window=(3, 4)),
    case("the map is one window, shifted", 3, 3, 4, 2, 16, window=(3, 4), shift=(1, 2)),
    case("one row of windows, shifted", 1, 2, 12, 3, 16, window=(2, 4), shift=(1, 2)),
    case("one column of windows, shifted", 1, 12, 2, 3, 32, window=(4, 2), shift=(2, 1)),
    case("more heads than programs: each has all windows of its head", 1, 2, 4, 7, 16, window=(2, 2), shift=(1, 0)),
    case("a last span of one window", 1, 2, 14, 2, 16, window=(2, 2), shift=(0, 1)),
    case("spans that begin inside an image", 4, 2, 6, 2, 16, window=(2, 2), shift=(1, 0)),
    case("a scale of its own", 2, 4, 6, 2, 16, window=(2, 3), shift=(0, 1), scale=0.1),
    case("a negative scale", 2, 4, 6, 2, 16, window=(2, 3), scale=-0.3),
    case("scores with a standard deviation of 5", 2, 6, 4, 2, 16, window=(3, 4), shift=(1, 2), scores=5.0),
    Case(
        "scores of a hundred across the seam",
        across_the_seam(1, 4, 8, 1, 16, window=(4, 4), shift=(2, 2)),
        {"window": (4, 4), "shift": (2, 2)},
    ),
    # Its scores with all others are −100: the gradients of its query and key are e⁻¹⁰⁰, and the rule takes any number
    # for those two rows.
    case("a token that no neighbour is in a window with", 1, 4, 6, 2, 16, window=(2, 3), shift=(1, 1)),
    case("a frozen map", 1, 6, 6, 2, 32, window=(3, 3), shift=(1, 2), constant=("qkv",)),
]


def flat(f):
    return lambda qkv, table, **options: f(qkv, table.view(-1, qkv.shape[4]), **options)


def with_a_flat_table(case: Case) -> Case:
    """The rule looks at the table's gradient as a whole: a row of it is a number a head, each a sum over all windows,
    and where one is next to nothing by luck, its error is any multiple of it."""

    def draw():
        return {name: t.flatten() if name == "table" else t for name, t in case.draw().items()}

    return dataclasses.replace(case, draw=draw)


THREE = tuple(map(flat, (window_attention, reference.window_attention, unfused.window_attention)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", named(CASES))
def test_output_and_gradients(case, mode, backend, guarded_memory):
    hold_to_the_rule(*THREE, with_a_flat_table(case), mode, backend)


@pytest.fixture(scope="module")
def kernels():
    return pytest.importorskip("vit_fast.kernels.window_attention")


@pytest.mark.interpret
@pytest.mark.parametrize("mode", DTYPES)
def test_more_sums_of_a_table_than_a_step_adds(mode, kernels, monkeypatch, guarded_memory):
    """Of three spans: a device has hundreds, the interpreter no more than six."""
    monkeypatch.setattr(kernels, "FINISH_CHUNKS", 2)
    (chosen,) = (case for case in CASES if case.why == "a last span of one window")
    hold_to_the_rule(*THREE, with_a_flat_table(chosen), mode, "triton")


@pytest.mark.interpret
def test_spans_cover_the_windows(kernels):
    """Each is begun, none is empty, and no more programs than the device holds, but for one a head."""
    seen = set()
    for images in range(1, 23):
        for heads in range(1, 15):
            qkv = torch.empty(1).expand(images, 2, 6, 3, heads, 16)
            spans, arguments = kernels._work("window_attention_grad", qkv, (2, 3), (0, 0), 1.0, "ieee")
            span, count = arguments["span"], arguments["count"]
            assert count == 2 * images
            assert (spans - 1) * span < count <= spans * span
            assert spans * heads <= max(6, heads)
            seen.add(count == spans * span)
    assert seen == {False, True}


# ---- what must be so -----------------------------------------------------------------------------------------------


def floats(*shape: int, window: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    qkv, table = shaped(*shape, window)().values()
    return qkv.float(), table.float()


def equal(backend: str, one: torch.Tensor, other: torch.Tensor) -> None:
    """To the bit in Triton; PyTorch may choose another order of sums for another shape."""
    tolerance = 0 if backend == "triton" else 1e-5
    torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_a_bias_it_is_attention_in_each_window(backend):
    qkv, table = floats(2, 4, 6, 2, 16, window=(2, 3))
    with use_backend(backend):
        found = window_attention(qkv, torch.zeros_like(table), (2, 3))
        for top in range(0, 4, 2):
            for left in range(0, 6, 3):
                place = slice(None), slice(top, top + 2), slice(left, left + 3)
                q, k, v = qkv[place].flatten(1, 2).unbind(2)
                torch.testing.assert_close(found[place].flatten(1, 2), attention(q, k, v), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_windows_that_no_seam_crosses_are_those_of_the_map_between(backend):
    """And those at the seam are no windows of the rolled map."""
    qkv, table = floats(2, 6, 9, 1, 16, window=(2, 3))
    with use_backend(backend):
        shifted = window_attention(qkv, table, (2, 3), (1, 2))
        between = window_attention(qkv[:, 1:5, 2:8], table, (2, 3))
        rolled = window_attention(qkv.roll((-1, -2), (1, 2)), table, (2, 3)).roll((1, 2), (1, 2))
    equal(backend, shifted[:, 1:5, 2:8], between)
    apart = (shifted - rolled).abs().amax((0, 3)) > 1e-3
    assert torch.equal(apart[1:5, 2:8], torch.zeros(4, 6, dtype=torch.bool))
    assert apart.sum() == 6 * 9 - 4 * 6


@pytest.mark.parametrize("backend", BACKENDS)
def test_permuted_images_and_heads(backend):
    qkv, table = floats(3, 2, 6, 3, 16, window=(2, 3))
    images, heads = torch.tensor([2, 0, 1]), torch.tensor([1, 2, 0])
    with use_backend(backend):
        o = window_attention(qkv, table, (2, 3), (1, 1))
        equal(backend, window_attention(qkv[images], table, (2, 3), (1, 1)), o[images])
        permuted = window_attention(qkv[..., heads, :], table[:, heads], (2, 3), (1, 1))
    equal(backend, permuted, o.unflatten(-1, (3, 16))[..., heads, :].flatten(-2))


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_for_columns(backend):
    """Map, window, shift and table turned, the result is turned; so is the table's gradient."""
    qkv, table = floats(1, 4, 9, 2, 16, window=(2, 3))
    upstream = torch.randn(1, 4, 9, 32)

    def turn(table: torch.Tensor) -> torch.Tensor:
        return table.view(3, 5, 2).transpose(0, 1).reshape(15, 2)

    def run(qkv, table, upstream, *others):
        table.requires_grad_()
        o = window_attention(qkv, table, *others)
        return o.detach(), torch.autograd.grad(o, table, upstream)[0]

    with use_backend(backend):
        o, gradient = run(qkv, table, upstream, (2, 3), (1, 2))
        turned = turn(table).detach()
        other, other_gradient = run(qkv.transpose(1, 2), turned, upstream.transpose(1, 2), (3, 2), (2, 1))
    torch.testing.assert_close(other.transpose(1, 2), o, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(other_gradient, turn(gradient), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_all_entries_of_a_head_share_changes_nothing(backend):
    """Softmax takes it off: so a head's gradients sum to nothing but roundings."""
    qkv, table = floats(2, 4, 6, 2, 16, window=(2, 3))
    table.requires_grad_()
    with use_backend(backend):
        o = window_attention(qkv, table, (2, 3), (1, 1))
        (gradient,) = torch.autograd.grad(o, table, torch.randn_like(o), retain_graph=True)
        more = window_attention(qkv, table + torch.tensor([3.0, -5.0]), (2, 3), (1, 1))
    torch.testing.assert_close(more, o, rtol=1e-5, atol=1e-5)
    assert gradient.abs().amax() > 0.1
    assert (gradient.sum(0).abs() <= 1e-5 * gradient.abs().sum(0)).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", DTYPES)
def test_one_key_takes_all(mode, backend):
    """o is its value, to the bit, and no query, key or bias has a slope but for the rounding of two equal sums."""
    qkv, table = (t.to(MODES[mode]) for t in floats(1, 3, 3, 2, 16, window=(3, 3)))
    qkv[..., 0, :, 0], qkv[..., 1, :, 0], qkv[:, 1, 2, 1, :, 0] = 100.0, -100.0, 100.0
    qkv.requires_grad_(), table.requires_grad_()
    with use_backend(backend):
        o = window_attention(qkv, table, (3, 3))
    assert torch.equal(o, qkv[:, 1:2, 2:3, 2].flatten(-2).expand_as(o))
    do = torch.randn_like(o)
    dqkv, dtable = torch.autograd.grad(o, (qkv, table), do)
    rounding = torch.finfo(torch.float32).eps * do.norm() * qkv[..., 2, :, :].norm()
    assert dqkv[..., :2, :, :].abs().max() <= rounding * qkv[..., :2, :, :].norm()
    assert dtable.abs().max() <= rounding


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", DTYPES)
def test_equal_scores(mode, backend):
    """Every query sees the mean of its window's values."""
    qkv, table = (t.to(MODES[mode]) for t in floats(2, 3, 10, 1, 16, window=(3, 5)))
    qkv[..., 1, :, :], table[:] = qkv[:1, :1, :1, 1], 3.0
    with use_backend(backend):
        o = window_attention(qkv, table, (3, 5))
    mean = qkv[..., 2, 0, :].double().unflatten(2, (2, 5)).mean((1, 3), keepdim=True)
    expected = mean.expand(2, 3, 2, 5, 16).flatten(2, 3)
    assert (o.double() - expected).norm() <= 4 * torch.finfo(o.dtype).eps * expected.norm()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", DTYPES)
def test_biases_of_minus_infinity(mode, backend):
    """Keys to the right that no query may look at: each sees itself and what is left of it."""
    qkv, table = (t.to(MODES[mode]) for t in floats(1, 1, 6, 2, 16, window=(1, 3)))
    table[:2] = -torch.inf
    qkv.requires_grad_(), table.requires_grad_()
    with use_backend(backend):
        o = window_attention(qkv, table, (1, 3))
    first = o.detach()[:, :, ::3]
    assert torch.equal(first, qkv.detach()[:, :, ::3, 2].flatten(-2))
    gradients = torch.autograd.grad(o, (qkv, table), torch.randn_like(o))
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert not gradients[1][:2].any()


def test_the_largest_dtype_in_pytorch():
    """In fp64 it is the reference."""
    qkv, table = shaped(2, 4, 6, 2, 24, (2, 3))().values()
    ours, truth = (f(qkv, table, (2, 3), (1, 2)) for f in (window_attention, reference.window_attention))
    torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-12)


def test_derivatives_in_pytorch():
    """Backward, forward and the second."""
    operands = [t.requires_grad_() for t in shaped(1, 2, 3, 1, 4, (2, 3))().values()]

    def call(qkv, table):
        return window_attention(qkv, table, (2, 3), (1, 2))

    assert torch.autograd.gradcheck(call, operands, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(call, operands)


# ---- what it is given ----------------------------------------------------------------------------------------------

VIEWS = {
    "columns before rows": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "every other row": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "cut out of a wider head, at an odd element": lambda x: torch.nn.functional.pad(x, (3, 4))[..., 3:-4],
    "heads before tokens": lambda x: x.transpose(1, 4).contiguous().transpose(1, 4),
    "one image for all": lambda x: x[:1].expand_as(x),
    "last axis not dense": lambda x: x.transpose(4, 5).contiguous().transpose(4, 5),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("view", VIEWS)
def test_strided_views(view, backend):
    """Of a map, the table and the upstream gradient: the results are those of dense copies, to the bit."""
    qkv, table = floats(2, 2, 6, 2, 16, window=(2, 3))
    qkv, table = VIEWS[view](qkv), table.repeat_interleave(2, 0)[::2]
    upstream = torch.randn(2, 32, 6, 2).permute(0, 3, 2, 1)
    assert not any(t.is_contiguous() for t in (qkv, table, upstream))

    def run(qkv, table, upstream):
        operands = [t.detach().requires_grad_() for t in (qkv, table)]
        with use_backend(backend):
            o = window_attention(*operands, (2, 3), (1, 1))
        return o, *torch.autograd.grad(o, operands, upstream)

    dense = run(*(t.contiguous() for t in (qkv, table, upstream)))
    for ours, theirs in zip(run(qkv, table, upstream), dense):
        equal(backend, ours, theirs)
        assert ours.is_contiguous() or backend == "torch"


@pytest.mark.interpret
@pytest.mark.parametrize("at_start", [False, True])
@pytest.mark.parametrize(("window", "shift"), [((3, 3), (1, 2)), ((4, 4), (3, 0))])
def test_between_guard_pages(window, shift, at_start, guarded_memory):
    """Nothing is read or written outside, whether a window fills its tile or not."""
    qkv, table = floats(2, window[0], 2 * window[1], 2, 16, window=window)
    operands = [guarded(t.requires_grad_(), at_start) for t in (qkv, table)]
    with use_backend("triton"):
        o = window_attention(*operands, window, shift)
    gradients = torch.autograd.grad(o, operands, guarded(torch.randn(o.shape), at_start))
    assert all(torch.isfinite(t).all() for t in (o, *gradients))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shift", [(0, 0), (1, 1)])
def test_empty(shift, backend):
    qkv, table = (t.requires_grad_() for t in floats(0, 4, 6, 2, 16, window=(2, 3)))
    with use_backend(backend):
        o = window_attention(qkv, table, (2, 3), shift)
        gradients = torch.autograd.grad(o.sum(), (qkv, table))
        assert window_attention(torch.randn(2, 0, 6, 3, 2, 16), table, (2, 3), shift).shape == (2, 0, 6, 32)
    assert o.shape == (0, 4, 6, 32)
    assert gradients[0].shape == qkv.shape
    assert torch.equal(gradients[1], torch.zeros_like(table))


@pytest.mark.parametrize("backend", BACKENDS)
def test_lists_for_pairs(backend):
    qkv, table = floats(1, 2, 6, 1, 16, window=(2, 3))
    with use_backend(backend):
        given = window_attention(qkv, table, [2, 3], [1, 1])
        assert torch.equal(given, window_attention(qkv, table, (2, 3), (1, 1)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_table_in_fp32_under_autocast(backend):
    """It is rounded nowhere, nor is its gradient."""
    qkv, table = (t.requires_grad_() for t in floats(1, 2, 6, 2, 16, window=(2, 3)))
    with use_backend(backend), torch.autocast("cpu", torch.bfloat16):
        o = window_attention(qkv, table, (2, 3), (1, 1))
    dqkv, dtable = torch.autograd.grad(o, (qkv, table), torch.randn_like(o))
    assert (o.dtype, dqkv.dtype, dtable.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    assert torch.equal(dqkv, dqkv.bfloat16().float())
    assert not torch.equal(dtable, dtable.bfloat16().float())
    with use_backend(backend), torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        near = window_attention(qkv, 1000 + table, (2, 3), (1, 1))
    # A bias of a thousand has steps of eight in bf16, and in fp32 of a ten-thousandth.
    torch.testing.assert_close(near, o.detach(), rtol=0, atol=0.05)


@pytest.mark.parametrize("fake", [False, True])
def test_without_numbers(fake):
    with FakeTensorMode() if fake else torch.device("meta"):
        qkv, table = torch.empty(2, 4, 6, 3, 2, 16), torch.empty(15, 2)
        assert window_attention(qkv, table, (2, 3), (1, 1)).shape == (2, 4, 6, 32)
    qkv, table = floats(2, 4, 6, 2, 16, window=(2, 3))
    assert window_attention(qkv, table, (2, 3), (1, 1)).isfinite().all(), "and nothing of it is kept"


# ---- what is launched, kept and refused ----------------------------------------------------------------------------


@pytest.mark.interpret
def test_launches(monkeypatch):
    """A dense map is not copied. Frozen, the table has no partial sums and no second stage; the map's gradient is the
    same, to the bit."""
    qkv, table = (t.requires_grad_() for t in floats(2, 2, 6, 2, 16, window=(2, 3)))
    found, gradients = [], []
    names = launches(monkeypatch, lambda: found.append(window_attention(qkv, table, (2, 3), (1, 1))))
    assert names == ["window_attention._forward_kernel"]
    with use_backend("triton"):
        found.append(window_attention(qkv, table.detach(), (2, 3), (1, 1)))
    upstream = torch.randn_like(found[0])
    for o, behind in zip(found, (["window_attention._table_grad_kernel"], [])):
        wanted = [qkv, table] if behind else [qkv]
        names = launches(
            monkeypatch, lambda o=o, wanted=wanted: gradients.append(torch.autograd.grad(o, wanted, upstream)[0])
        )
        assert names == ["window_attention._grad_kernel", *behind]
    assert torch.equal(*found)
    assert torch.equal(*gradients)


@pytest.mark.interpret
def test_a_frozen_table_takes_no_memory(kernels, monkeypatch):
    """Not even an empty gradient: what backward allocates is the map's."""
    qkv, table = floats(2, 2, 6, 2, 16, window=(2, 3))
    do, given, empty = torch.randn(2, 2, 6, 32), [], torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: given.append(a) or empty(*a, **k))
    arguments = (do, qkv, table, (2, 3), (1, 1), 0.25, "ieee")
    dqkv, dtable = kernels.backward(*arguments, trained=False)
    assert dtable is None
    assert not given
    assert torch.equal(kernels.backward(*arguments, trained=True)[0], dqkv)
    assert given == [((2, 2, 6, 6),)], "the sums of two spans"


@pytest.mark.interpret
def test_nothing_saved_in_inference():
    saved = []
    qkv, table = floats(1, 2, 3, 1, 16, window=(2, 3))
    with use_backend("triton"), torch.autograd.graph.saved_tensors_hooks(saved.append, lambda x: x):
        frozen = window_attention(qkv, table, (2, 3))
        with torch.no_grad():
            window_attention(qkv.clone().requires_grad_(), table, (2, 3))
        assert not saved
        trained = window_attention(qkv.clone().requires_grad_(), table, (2, 3))
    assert [t.shape for t in saved] == [qkv.shape, table.shape]
    assert torch.equal(frozen, trained)


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_bits_again(backend):
    """Two backward passes on the same numbers agree to the bit."""
    qkv, table = (t.requires_grad_() for t in floats(3, 2, 6, 2, 16, window=(2, 3)))
    with use_backend(backend):
        o = window_attention(qkv, table, (2, 3), (1, 1))
    do = torch.randn_like(o)
    first, second = (torch.autograd.grad(o, (qkv, table), do, retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second))


@pytest.mark.interpret
def test_second_derivative_is_refused():
    qkv, table = (t.requires_grad_() for t in floats(1, 2, 3, 1, 16, window=(2, 3)))
    with use_backend("triton"):
        o = window_attention(qkv, table, (2, 3))
    for gradient in torch.autograd.grad(o.square().sum(), (qkv, table), create_graph=True):
        with pytest.raises(RuntimeError, match="no autograd formula was registered"):
            gradient.sum().backward(retain_graph=True)


@pytest.mark.interpret
def test_opcheck():
    qkv, table = floats(1, 2, 6, 2, 16, window=(2, 3))
    op, others = torch.ops.vit_fast.window_attention.default, ([2, 3], [1, 1], 0.25)
    torch.library.opcheck(op, (qkv, table, *others))
    torch.library.opcheck(op, (VIEWS["columns before rows"](qkv), table.T.contiguous().T, *others))
    torch.library.opcheck(op, (qkv.requires_grad_(), table.requires_grad_(), *others))
    torch.library.opcheck(op, (qkv, table.detach(), *others))


@pytest.mark.interpret
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("strided", [True, False])
def test_opcheck_of_backward(trained, strided):
    qkv, table = floats(1, 2, 6, 2, 16, window=(2, 3))
    do = torch.randn(1, 2, 6, 64)[..., ::2] if strided else torch.randn(1, 2, 6, 32)
    if strided:
        qkv, table = VIEWS["columns before rows"](qkv), table.T.contiguous().T
    arguments = do, qkv, table, [2, 3], [1, 1], 0.25, trained
    torch.library.opcheck(torch.ops.vit_fast.window_attention_backward.default, arguments)


REFUSED = {
    "a head that is too wide": ((1, 2, 3, 3, 1, 128), (2, 3), "head width: got 128, the kernels take 16, 32, 64"),
    "a head of another width": ((1, 2, 3, 3, 1, 24), (2, 3), "head width: got 24, the kernels take 16, 32, 64"),
    "a large window": ((1, 5, 13, 3, 1, 16), (5, 13), "window: got 5 x 13, 65 tokens, the kernels take up to 64"),
}


@pytest.mark.interpret
@pytest.mark.parametrize("what", REFUSED)
def test_kernels_refuse(what):
    """What no kernel does is refused under use_backend("triton"), and PyTorch's work under "auto"."""
    shape, window, message = REFUSED[what]
    qkv, table = torch.randn(shape), torch.randn((2 * window[0] - 1) * (2 * window[1] - 1), 1)
    truth = reference.window_attention(qkv.double(), table.double(), window)
    torch.testing.assert_close(window_attention(qkv, table, window).double(), truth, rtol=1e-4, atol=1e-5)
    with use_backend("triton"), pytest.raises(ValueError, match=f"window_attention: {message}"):
        window_attention(qkv, table, window)


@pytest.mark.interpret
def test_an_image_past_32_bits_is_refused(monkeypatch):
    """Of which there is one number here, seen again and again."""
    monkeypatch.setattr(module, "_window_attention", None)  # which would make gigabytes of it
    sides = 7 * 1024, 7 * 446  # of 96 numbers each
    numbers = math.prod(sides) * 96
    assert 2**31 < numbers < 2**31 + 2**20
    qkv, table = torch.zeros(1).expand(1, *sides, 3, 1, 32), torch.zeros(169, 1)
    with use_backend("triton"), pytest.raises(ValueError, match=f"qkv: got {numbers} numbers an image, .*{2**31 - 1}"):
        window_attention(qkv, table, (7, 7))
    assert module.refusal((7, 7), 32, 2**31)
    assert not module.refusal((7, 7), 32, 2**31 - 1)


QKV, TABLE = torch.randn(2, 4, 6, 3, 2, 16), torch.randn(15, 2)
REJECTED = {
    "a map without a 3": ({"qkv": QKV[:, :, :, :2]}, ValueError, r"qkv: got shape \[2, 4, 6, 2, 2, 16\], takes \[B, Y"),
    "tokens without a map": ({"qkv": QKV[:, 0]}, ValueError, r"qkv: got shape \[2, 6, 3, 2, 16\], takes \[B, Y, X, 3"),
    "one side of a window": ({"window": (2,)}, ValueError, r"window: got \(2,\), takes two numbers"),
    "a window without rows": ({"window": (0, 3)}, ValueError, r"window: got \(0, 3\), .* each 1 or more"),
    "a shift of three": ({"shift": (1, 1, 1)}, ValueError, r"shift: got \(1, 1, 1\), takes two numbers"),
    "a shift down": ({"shift": (-1, 0)}, ValueError, r"shift: got \(-1, 0\), .* each 0 or more"),
    "a shift of a window's rows": (
        {"shift": (2, 0)},
        ValueError,
        r"shift: got \(2, 0\), takes less than the window, 2",
    ),
    "a shift of a window's columns": (
        {"shift": (0, 3)},
        ValueError,
        r"shift: got \(0, 3\), takes less than the window",
    ),
    "rows that are left over": ({"window": (3, 3)}, ValueError, "qkv: got a map of 4 x 6, takes multiples of .* 3 x 3"),
    "columns that are left over": (
        {"window": (2, 4)},
        ValueError,
        "qkv: got a map of 4 x 6, takes multiples of .* 2 x 4",
    ),
    "a table of another window": (
        {"table": torch.randn(25, 2)},
        ValueError,
        r"table: got shape \[25, 2\], takes \[15, 2\]",
    ),
    "a table of one head": ({"table": TABLE[:, :1]}, ValueError, r"table: got shape \[15, 1\], takes \[15, 2\]"),
    "a table in half": ({"table": TABLE.half()}, TypeError, "table: torch.float16, the input is torch.float32"),
    "a table elsewhere": ({"table": TABLE.to("meta")}, ValueError, "table: on meta, the input is on cpu"),
    "integers": (
        {"qkv": QKV.int(), "table": TABLE.int()},
        TypeError,
        "the input: got torch.int32, takes a floating dtype",
    ),
}


@pytest.mark.parametrize("wrong", REJECTED)
def test_rejected(wrong):
    change, error, message = REJECTED[wrong]
    with pytest.raises(error, match=message):
        window_attention(**{"qkv": QKV, "table": TABLE, "window": (2, 3), "shift": (1, 1)} | change)
