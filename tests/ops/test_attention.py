import math
import mmap
import sys

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from tests import unfused
from tests.conftest import INTERPRETING
from tests.guard import guarded
from tests.ops.harness import BACKENDS, MODES, Case, hold_to_the_rule, named
from vit_fast import reference
from vit_fast.ops import attention, attention_maps, attention_qkv, use_backend
from vit_fast.ops.attention import HEAD_WIDTHS, LEAST_SCALE

module = sys.modules["vit_fast.ops.attention"]  # in whose place vit_fast.ops has the function

# numpy, which the interpreter runs on, speaks of the NaN and the overflow that some cases are about.
pytestmark = [
    pytest.mark.filterwarnings("ignore:overflow encountered in exp2:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered in:RuntimeWarning"),
]

DTYPES = ["fp32", "fp16", "bf16"]
MAP_NORESERVE = 0x4000  # Linux; Python has no name for it before 3.13

# The interpreter's tiles are 32 queries where a head is taken as a whole, and 32 keys in its backward; where it is
# streamed 32 x 16 (queries x keys), 16 x 32 for the gradients of keys. 33 tokens cross all of them. A head as a whole
# is cut in pieces of 16 to 128 rows, queries in backward and keys in forward.
FORMS = ["whole", "streaming"]


@pytest.fixture
def form(request, monkeypatch):
    """Takes heads as a whole, as the table does up to 272 tokens, or streams them whatever their length."""
    if request.param == "streaming":
        kernels = pytest.importorskip("vit_fast.kernels.attention")
        monkeypatch.setattr(kernels, "_whole", lambda *_: None)


in_both_forms = pytest.mark.parametrize("form", FORMS, indirect=True)
# PyTorch's backend has one form.
BACKENDS_AND_FORMS = [
    pytest.param("torch", "whole", id="torch"),
    *(pytest.param("triton", form, id=form, marks=pytest.mark.interpret) for form in FORMS),
]
on_backends_in_both_forms = pytest.mark.parametrize(("backend", "form"), BACKENDS_AND_FORMS, indirect=["form"])


def shaped(batch: int, queries: int, heads: int, width: int, keys: int | None = None, scores=1.0, offset=0.0):
    """Queries, keys and values; `scores` is the standard deviation of what softmax sees, or `offset` its mean."""

    def draw():
        shapes = {"q": queries, "k": keys or queries, "v": keys or queries}
        tensors = {n: torch.randn(batch, t, heads, width, dtype=torch.float64) for n, t in shapes.items()}
        tensors["q"] *= scores
        if offset:
            side = (abs(offset) * width**0.5) ** 0.5  # of a vector that all queries share, and all keys
            tensors["q"][..., 0], tensors["k"][..., 0] = math.copysign(side, offset), side
        return tensors

    return draw


def shaped_qkv(batch: int, tokens: int, heads: int, width: int):
    return lambda: {"qkv": torch.randn(batch, tokens, 3, heads, width, dtype=torch.float64)}


# Where one key takes all, softmax has no slope: see test_no_slope.
FLAT = {"constant": ("q", "k")}
SEPARATE = [
    Case("one token: o is v", shaped(5, 1, 2, 16), **FLAT),
    Case("last query of a tile", shaped(1, 32, 2, 32)),
    Case("first query of a second tile", shaped(1, 33, 1, 32)),
    Case("last key of a tile", shaped(9, 4, 3, 16, keys=16)),
    Case("first key of a second tile", shaped(8, 3, 2, 16, keys=17)),
    Case("many queries on one key", shaped(3, 40, 1, 16, keys=1), **FLAT),
    Case("a scale of its own", shaped(2, 7, 2, 48, keys=9), {"scale": 0.1}),
    Case("scores around ten thousand", shaped(2, 19, 2, 16, keys=21, offset=1e4)),
    Case("scores around minus ten thousand", shaped(2, 19, 2, 16, keys=21, offset=-1e4)),
]
# Queries of one and keys of the other: forward cuts keys in pieces, backward queries, and each streams the other axis.
PIECES = [
    Case("two pieces, 96 + 16", shaped(1, 96, 1, 16, keys=100)),
    Case("three pieces, as a ViT has: 128 + 64 + 16", shaped(1, 197, 1, 16, keys=193)),
    Case("three pieces of a head of two", shaped(1, 193, 1, 72, keys=197)),
    Case("four pieces: 128 + 64 + 32 + 16", shaped(1, 225, 1, 16, keys=240)),
    Case("the longest that is taken as a whole", shaped(1, 272, 1, 16, keys=272)),
    Case("three pieces, one key", shaped(1, 197, 1, 16, keys=1), **FLAT),
    Case("a pool of one query over three pieces", shaped(1, 17, 1, 16, keys=208)),
]
# Heads enough to fill the interpreter's multiprocessors: a program has all queries of a head, tile after tile.
HEADS = [Case("a program a head", shaped(2, 37, 6, 16))]
# Above the longest: what is streamed by the table itself.
LONG = [
    Case("one key past the longest", shaped(3, 9, 2, 16, keys=273)),
    # With few keys many a row is nearly one-hot, and what is left of its gradient is the rounding of o.
    Case("one query past the longest", shaped(1, 273, 1, 16, keys=40)),
]
WIDTHS = [Case(f"heads of {width}", shaped_qkv(2, 17, 2, width)) for width in HEAD_WIDTHS]
PACKED = [*WIDTHS, Case("packed past every tile", shaped_qkv(1, 49, 1, 16), {"scale": 0.5})]


def shaped_qk(batch: int, queries: int, heads: int, width: int, keys: int):
    draw = shaped(batch, queries, heads, width, keys)
    return lambda: {name: t for name, t in draw().items() if name != "v"}


MAPS = [
    *(Case(f"heads of {width}", shaped_qk(2, 35, 2, width, 18)) for width in HEAD_WIDTHS),
    Case("one key", shaped_qk(2, 35, 1, 16, 1)),
    Case("last key of a tile", shaped_qk(1, 32, 1, 16, 32)),
    Case("first key of a second tile", shaped_qk(1, 33, 1, 16, 33)),
    Case("a scale of its own", shaped_qk(2, 35, 2, 16, 18), {"scale": 0.5}),
]


def unpacked(f):
    return lambda qkv, scale=None: f(*qkv.unbind(2), scale)


@on_backends_in_both_forms
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", named(SEPARATE))
def test_output_and_gradients(case, mode, backend, form, guarded_memory):
    hold_to_the_rule(attention, reference.attention, unfused.attention, case, mode, backend)


@pytest.mark.interpret
@pytest.mark.parametrize("mode", DTYPES)
@pytest.mark.parametrize("case", named(PIECES + HEADS + LONG))
def test_every_cut_in_pieces(case, mode, guarded_memory):
    hold_to_the_rule(attention, reference.attention, unfused.attention, case, mode, "triton")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", named(PACKED))
def test_packed_output_and_gradients(case, mode, backend, guarded_memory):
    hold_to_the_rule(attention_qkv, unpacked(reference.attention), unpacked(unfused.attention), case, mode, backend)


@pytest.mark.interpret
@pytest.mark.parametrize("form", ["streaming"], indirect=True)
@pytest.mark.parametrize("case", named(PACKED))
def test_packed_and_streamed(case, form, guarded_memory):
    hold_to_the_rule(attention_qkv, unpacked(reference.attention), unpacked(unfused.attention), case, "fp32", "triton")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", DTYPES)
def test_one_query(mode, backend):
    """An attention pool. Keys are one flat tensor here, so that the rule looks at their gradient as a whole.

    Each row of it is the query times one number, a difference that is near zero for some key in any backend. PyTorch
    gets few keys: its own kernel keeps a natural log-sum-exp in fp32, and misses the rule there when this is 4 or more.
    """
    keys, scores = (40, 1.0) if backend == "triton" else (7, 0.5)

    def flat(f):
        return lambda q, k, v: f(q, k.view(v.shape), v)

    def draw():
        q, k, v = shaped(32, 1, 2, 16, keys=keys, scores=scores)().values()
        return {"q": q, "k": k.flatten(), "v": v}

    ours, truth, peer = map(flat, (attention, reference.attention, unfused.attention))
    hold_to_the_rule(ours, truth, peer, Case("one query", draw), mode, backend)


@on_backends_in_both_forms
@pytest.mark.parametrize("mode", DTYPES)
@pytest.mark.parametrize("keys", [1, 19])
def test_no_slope(keys, mode, backend, form):
    """One key takes all: o is its value, and q and k have a gradient of zero but for the rounding of two equal sums.

    The error rule would ask for the zero itself; a difference of two sums of d numbers, in two orders, has none.
    """
    dtype = MODES[mode]
    q, k, v = (t.to(dtype).requires_grad_() for t in shaped(2, 7, 1, 16, keys=keys)().values())
    with torch.no_grad():
        q[..., 0], k[..., 0], k[:, 0, :, 0] = 100.0, -100.0, 100.0  # the first key's score is 5,000 above all others
    do = torch.randn(2, 7, 16).to(dtype)
    with use_backend(backend):
        o = attention(q, k, v)
        dq, dk = torch.autograd.grad(o, [q, k], do)
    assert torch.equal(o, v[:, :1, 0].expand(-1, 7, -1))
    rounding = torch.finfo(torch.float32).eps * do.norm() * v.norm()
    assert dq.abs().max() <= rounding * k.norm()
    assert dk.abs().max() <= rounding * q.norm()


@on_backends_in_both_forms
@pytest.mark.parametrize("mode", DTYPES)
def test_equal_keys(mode, backend, form):
    """Every query sees the mean of the values, and its own gradient is zero but for roundings.

    Not for the error rule: PyTorch's probabilities have no rounding but their own here, ours that of their logarithm.
    """
    dtype, tokens = MODES[mode], 19
    q, k, v = (t.to(dtype) for t in shaped(2, 9, 1, 16, keys=tokens)().values())
    q, k, v = (t.requires_grad_() for t in (q, k[:, :1].repeat(1, tokens, 1, 1), v))
    do = torch.randn(2, 9, 16).to(dtype)
    with use_backend(backend):
        o = attention(q, k, v)
        dq, dv = torch.autograd.grad(o, [q, v], do)
    relative = 2 * torch.finfo(dtype).eps + math.log2(tokens) * torch.finfo(torch.float32).eps
    for ours, truth in [
        (o, v.double().mean(1).flatten(1)[:, None].expand(-1, 9, -1)),
        (dv, do.double().sum(1)[:, None, None].expand(-1, tokens, -1, -1) / tokens),
    ]:
        assert (ours.double() - truth).norm() <= relative * truth.norm()
    assert dq.abs().max() <= torch.finfo(dtype).eps * do.norm() * v.norm() * k.norm() / tokens


VIEWS = {
    "heads before tokens": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "every other token": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "cut out of a wider head, at an odd element": lambda x: torch.nn.functional.pad(x, (3, 4))[..., 3:-4],
    "tokens before images": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "one image for all": lambda x: x[:1].expand_as(x),
    "last axis not dense": lambda x: x.transpose(1, 3).contiguous().transpose(1, 3),
}


STREAMED_VIEWS = ["cut out of a wider head, at an odd element", "tokens before images"]


@pytest.mark.parametrize(
    ("backend", "form", "view"),
    [
        pytest.param(*p.values, view, id=f"{p.id}-{view}", marks=p.marks)
        for p in BACKENDS_AND_FORMS
        for view in (STREAMED_VIEWS if p.id == "streaming" else VIEWS)
    ],
    indirect=["form"],
)
def test_strided_views(view, backend, form):
    """Views are read as they are, upstream gradients too: the results are those of dense copies, to the bit."""
    place = VIEWS[view]
    views = [place(t.float()) for t in shaped(2, 18, 2, 48, keys=17)().values()]
    upstream = torch.randn(2, 96, 18).transpose(1, 2)

    def run(tensors, do):
        tensors = [t.detach().requires_grad_() for t in tensors]
        with use_backend(backend):
            o = attention(*tensors)
            return o, *torch.autograd.grad(o, tensors, do)

    dense = run([t.contiguous() for t in views], upstream.contiguous())
    for ours, theirs in zip(run(views, upstream), dense):
        # PyTorch's own kernel may choose another order of sums for other strides.
        tolerance = 0 if backend == "triton" else 1e-5
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
        assert ours.is_contiguous() or backend == "torch"


@pytest.mark.interpret
@in_both_forms
@pytest.mark.parametrize("at_start", [False, True])
@pytest.mark.parametrize(("width", "tokens"), [(32, 17), (72, 81)])
def test_between_guard_pages(width, tokens, at_start, form, guarded_memory):
    """Nothing is read or written outside: the end or the start of every tensor is at a page that no one may touch."""
    tensors = [guarded(t.float().requires_grad_(), at_start) for t in shaped(2, tokens, 1, width, keys=33)().values()]
    with use_backend("triton"):
        o = attention(*tensors)
        gradients = torch.autograd.grad(o, tensors, guarded(torch.randn(o.shape), at_start))
        maps = attention_maps(*(t.detach() for t in tensors[:2]))
    assert all(torch.isfinite(t).all() for t in (o, *gradients, maps))


@pytest.mark.interpret
@in_both_forms
def test_offsets_pass_two_to_the_31(form):
    """Strides of a billion elements, in address space that is reserved and never filled."""
    region = mmap.mmap(-1, 2**33 + 2**20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
    memory = torch.frombuffer(region, dtype=torch.float16)
    near = torch.randn(3, 3, 3, 16).half()

    def run(x):
        x = x.detach().requires_grad_()
        with use_backend("triton"):
            o = attention(x, x, x)
        return o, torch.autograd.grad(o, x, torch.ones_like(o).cumsum(2))[0]

    expected = run(near)
    far_stride = 1_100_000_000  # its double passes 2^31
    for strides in [(far_stride, 48, 16, 1), (48, far_stride, 16, 1), (48, 16, far_stride, 1)]:
        far = memory.as_strided(near.shape, strides)
        far.copy_(near)
        assert all(torch.equal(*pair) for pair in zip(run(far), expected))


@on_backends_in_both_forms
def test_images_do_not_mix(backend, form):
    """NaN or infinity in one image harms no other; images alone or in another order give the same results, to the bit.

    PyTorch's backend may choose another order of sums for one image alone.
    """
    (qkv,) = shaped_qkv(4, 17, 1, 16)().values()
    qkv = qkv.float()
    order = torch.tensor([2, 0, 3, 1])

    def run(qkv):
        qkv = qkv.clone().requires_grad_()
        with use_backend(backend):
            o = attention_qkv(qkv)
            (gradient,) = torch.autograd.grad(o, qkv, torch.ones_like(o).cumsum(2))
            return o.detach(), gradient, attention_maps(*qkv.detach().unbind(2)[:2])

    expected = run(qkv)
    for chosen in (order, order[:1]) if backend == "triton" else (order,):
        for ours, theirs in zip(run(qkv[chosen]), expected):
            assert torch.equal(ours, theirs[chosen])
    poisoned = qkv.clone()
    poisoned[1, 5, 1, 0, 3], poisoned[3, 2, 0, 0, 0] = torch.nan, torch.inf
    for ours, theirs in zip(run(poisoned), expected):
        assert torch.equal(ours[[0, 2]], theirs[[0, 2]])
        assert ours[1].isnan().any()
        assert ours[3].isnan().any()


@on_backends_in_both_forms
@pytest.mark.parametrize("scale", [0.25, 2.0])
@pytest.mark.parametrize("mode", DTYPES)
def test_scores_of_minus_infinity(mode, scale, backend, form):
    """Keys that no query looks at, as many as the first tiles have; where there is no other key, no number."""
    q, k, v = (t.to(MODES[mode]) for t in shaped(1, 7, 1, 16, keys=65)().values())
    q, k[:, :50] = q.abs() + 0.1, -torch.inf
    with use_backend(backend):
        o, others = attention(q, k, v, scale), attention(q, k[:, 50:], v[:, 50:], scale)
        # P is rounded another time; unfused on a CPU the scores too, the mean of whose keys is taken off one alone.
        steps = 4 if backend == "triton" or mode != "bf16" else 16
        torch.testing.assert_close(o, others, rtol=0, atol=steps * torch.finfo(o.dtype).eps)
        if backend == "triton":  # SDPA gives zeros on a CPU
            assert attention(q, k[:, :50], v[:, :50]).isnan().all()


@pytest.mark.interpret
@in_both_forms
@pytest.mark.parametrize("mode", DTYPES)
def test_the_least_scale(mode, form):
    """Every score is nearly 0: the mean of the values, and a number for each gradient."""
    q, k, v = (t.to(MODES[mode]).requires_grad_() for t in shaped(1, 7, 1, 16, keys=33)().values())
    with use_backend("triton"):
        o = attention(q, k, v, LEAST_SCALE)
        torch.testing.assert_close(o.float(), v.float().mean(1).expand(1, 7, 16), rtol=1e-2, atol=1e-2)
        for gradient in torch.autograd.grad(o, (q, k, v), torch.ones_like(o)):
            assert gradient.isfinite().all()


@on_backends_in_both_forms
def test_same_bits_again(backend, form):
    """Two backward passes on the same numbers agree to the bit."""
    qkv = shaped_qkv(2, 33, 2, 16)()["qkv"].float().requires_grad_()
    with use_backend(backend):
        o = attention_qkv(qkv)
        do = torch.randn_like(o)
        first, second = (torch.autograd.grad(o, qkv, do, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", named(MAPS))
def test_maps(case, mode, backend, guarded_memory):
    """Rows are those of the reference, in the order asked for, and sum to one."""
    q, k = (guarded(t.to(MODES[mode])) for t in case.draw().values())
    queries = torch.tensor([q.shape[1] - 1, 0, -2, 0])
    with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"), use_backend(backend):
        rows = attention_maps(q, k, queries, **case.options)
        everything = attention_maps(q, k, **case.options)
    if mode == "autocast":
        q, k = q.bfloat16(), k.bfloat16()
    truth = reference.attention_probabilities(q.double(), k.double(), **case.options)
    assert rows.dtype == everything.dtype == torch.float32
    # From the rounded operands on all is fp32, whatever their dtype: a few roundings of scores of about ten.
    close = {"rtol": 1e-5, "atol": 1e-7, "check_dtype": False}
    torch.testing.assert_close(everything, truth, **close)
    torch.testing.assert_close(rows, truth[:, :, queries], **close)
    torch.testing.assert_close(everything.sum(-1), torch.ones(truth.shape[:-1]), rtol=0, atol=2e-6)
    assert attention_maps(q, k, queries[:0]).shape == (*truth.shape[:2], 0, truth.shape[-1])


@pytest.mark.interpret
@in_both_forms
def test_maps_from_lse(form):
    """The log-sum-exp that training saves gives the rows without another pass over the keys."""
    q, k, v = (t.float() for t in shaped(2, 33, 2, 16, keys=17)().values())
    queries = torch.tensor([32, 1])
    with use_backend("triton"):
        _, lse = torch.ops.vit_fast.attention_train(q, k, v, 0.25)
        rows = attention_maps(q, k, queries, lse=lse)
        assert torch.equal(rows, attention_maps(q, k, queries))
        strided = lse.transpose(1, 2).contiguous().transpose(1, 2)
        assert torch.equal(attention_maps(q, k, lse=strided), attention_maps(q, k))
        torch.testing.assert_close(attention_maps(q, k, queries, lse=lse + 1), rows / 2)
    scores = q.double().transpose(1, 2) @ k.double().permute(0, 2, 3, 1) * 0.25
    torch.testing.assert_close(lse, scores.logsumexp(-1) * math.log2(math.e), rtol=0, atol=1e-6)


def test_gradient_through_maps():
    q, k, _ = (t.requires_grad_() for t in shaped(1, 3, 1, 16)().values())
    assert torch.autograd.gradcheck(lambda q, k: attention_maps(q, k, torch.tensor([2, 0])), (q, k))


@pytest.mark.interpret
def test_kernels_refuse():
    """What no kernel does is refused under use_backend("triton"), and PyTorch's work under "auto"."""
    refused = [
        ("head width: got 24, the kernels take 16, 32", lambda: attention_qkv(torch.randn(1, 3, 3, 2, 24))),
        ("scale: got -1.0", lambda: attention_qkv(torch.randn(1, 3, 3, 2, 16), scale=-1.0)),
        ("scale: got 1e-31", lambda: attention_qkv(torch.randn(1, 3, 3, 2, 16), scale=1e-31)),
        ("scale: got nan", lambda: attention_maps(*torch.randn(2, 1, 3, 2, 16), scale=math.nan)),
        ("a gradient through", lambda: attention_maps(*torch.randn(2, 1, 3, 2, 16, requires_grad=True))),
    ]
    for message, call in refused:
        assert call().numel()
        with use_backend("triton"), pytest.raises(ValueError, match=message):
            call()
    with use_backend("triton"), pytest.raises(TypeError, match="float64"):
        attention_qkv(torch.randn(1, 3, 3, 2, 16).double())


@pytest.mark.interpret
@pytest.mark.parametrize("packed", [True, False])
def test_second_derivative_is_refused(packed):
    qkv = torch.randn(1, 3, 3, 1, 16, requires_grad=True)
    with use_backend("triton"):
        o = attention_qkv(qkv) if packed else attention(*qkv.unbind(2))
        (gradient,) = torch.autograd.grad(o.square().sum(), qkv, create_graph=True)
        with pytest.raises(RuntimeError, match="vit_fast"):
            gradient.sum().backward()


@pytest.mark.interpret
def test_nothing_saved_in_inference(monkeypatch):
    """Without a gradient no log-sum-exp is written and no operand is kept."""
    saved = []
    qkv = torch.randn(1, 3, 3, 1, 16)
    with use_backend("triton"), torch.autograd.graph.saved_tensors_hooks(saved.append, lambda x: x):
        frozen = attention_qkv(qkv)
        with torch.no_grad():
            attention_qkv(qkv.clone().requires_grad_())
        assert not saved
        trained = attention_qkv(qkv.clone().requires_grad_())
        assert [tuple(t.shape) for t in saved] == [(1, 3, 3, 1, 16), (1, 3, 16), (1, 1, 3)]
    assert torch.equal(frozen, trained)


class Recorder:
    """In a kernel's place: keeps what it is launched with."""

    def __init__(self, name, launches):
        self.name, self.launches = name, launches

    def __getitem__(self, grid):
        return lambda **arguments: self.launches.append((self.name, arguments))


@pytest.fixture
def launches(monkeypatch):
    """The (kernel, arguments) of a forward and a backward of so many tokens, which do not run."""
    kernels = pytest.importorskip("vit_fast.kernels.attention")
    jitted = {name: value for name, value in vars(kernels).items() if name.startswith("_") and name.endswith("_kernel")}

    def launch(tokens):
        found = []
        for name in jitted:
            monkeypatch.setattr(kernels, name, Recorder(name, found))
        q, k, v = torch.randn(2, tokens, 3, 2, 16).half().unbind(2)
        o, lse = kernels.forward(q, k, v, 0.25, "ieee", True)
        kernels.backward(o, q, k, v, o, lse, q, k, v, 0.25, "ieee")
        return [(name, jitted[name], arguments) for name, arguments in found]

    return launch


@pytest.mark.parametrize("tokens", [1, 272, 273])
def test_the_form_goes_by_the_longest_of_the_entry(tokens, launches):
    names = [name for name, *_ in launches(tokens)]
    whole, streaming = ["_forward_kernel", "_grad_kernel"], ["_forward_streaming_kernel"]
    assert names == (whole if tokens <= 272 else [*streaming, "_query_grad_kernel", "_key_grad_kernel"])


def test_row_pieces():
    """17 cuts, each of as few rows as hold the tokens, large pieces first, all of them tiles that a product takes."""
    row_pieces = pytest.importorskip("vit_fast.kernels.attention").row_pieces
    assert row_pieces(197) == (128, 64, 16)
    for tokens in range(1, 273):
        pieces = row_pieces(tokens)
        assert tokens <= sum(pieces) < tokens + 16
        assert set(pieces) <= {16, 32, 64, 128}
        assert list(pieces) == sorted(pieces, reverse=True)
    assert len({row_pieces(tokens) for tokens in range(1, 273)}) == 17


@pytest.mark.skipif(INTERPRETING, reason="the interpreter compiles nothing")
def test_a_new_length_within_a_cut_is_no_new_compile(launches):
    """What triton keys a compiled kernel by is the same for all lengths whose last piece is the same."""
    jit = pytest.importorskip("triton.runtime.jit")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend

    backend = make_backend(GPUTarget("cuda", 90, 32))

    def keys(tokens):
        return [
            jit.create_function_from_signature(kernel.signature, kernel.params, backend)(**arguments)[1]
            for _, kernel, arguments in launches(tokens)
        ]

    assert keys(193) == keys(197) == keys(208)
    assert keys(192) != keys(193)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty(backend):
    with use_backend(backend):
        qkv = torch.randn(0, 3, 3, 2, 16, requires_grad=True)
        o = attention_qkv(qkv)
        assert o.shape == (0, 3, 32)
        o.sum().backward()
        assert qkv.grad.shape == qkv.shape
        assert attention(*torch.randn(3, 0, 3, 2, 16)).shape == (0, 3, 32)
        q, k, v = torch.randn(2, 0, 2, 16), *torch.randn(2, 2, 3, 2, 16, requires_grad=True)
        o = attention(q, k, v)
        assert o.shape == (2, 0, 32)
        assert not any(gradient.any() for gradient in torch.autograd.grad(o.sum(), [k, v]))
        assert attention_maps(*torch.randn(2, 0, 3, 2, 16)).shape == (0, 2, 3, 3)


@pytest.mark.interpret
def test_opcheck():
    q, k, v = (t.float().requires_grad_() for t in shaped(2, 3, 2, 16, keys=4)().values())
    qkv = shaped_qkv(1, 3, 2, 16)()["qkv"].float().requires_grad_()
    ops = torch.ops.vit_fast
    torch.library.opcheck(ops.attention_train.default, (q, k, v, 0.25))
    torch.library.opcheck(ops.attention_qkv_train.default, (qkv, 0.25))
    q, k, v, qkv = (t.detach() for t in (q, k, v, qkv))
    torch.library.opcheck(ops.attention.default, (q, k, v, 0.25))
    torch.library.opcheck(ops.attention.default, (*qkv.unbind(2), 0.25))
    o, lse = ops.attention_train(q, k, v, 0.25)
    torch.library.opcheck(ops.attention_backward.default, (torch.randn_like(o), q, k, v, o, lse, 0.25))
    torch.library.opcheck(ops.attention_maps.default, (q, k, lse, 0.25))
    o, lse = ops.attention_qkv_train(qkv, 0.25)
    torch.library.opcheck(ops.attention_qkv_backward.default, (torch.randn_like(o), qkv, o, lse, 0.25))


class _Everything(torch.nn.Module):
    def forward(self, qkv):
        q, k, v = qkv.unbind(2)
        return attention_qkv(qkv), attention(q, k[:, :2], v[:, :2], 0.3), attention_maps(q, k, torch.tensor([1, 0]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compile(backend):
    qkv = torch.randn(2, 3, 3, 2, 16)
    with use_backend(backend):
        compiled = torch.compile(_Everything(), fullgraph=True, backend="aot_eager")
        for ours, theirs in zip(compiled(qkv), _Everything()(qkv)):
            torch.testing.assert_close(ours, theirs)
        trained = torch.compile(attention_qkv, fullgraph=True, backend="aot_eager")
        gradients = []
        for op in (trained, attention_qkv):
            leaf = qkv.clone().requires_grad_()
            op(leaf).square().sum().backward()
            gradients.append(leaf.grad)
        torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("backend", BACKENDS)
def test_export(backend):
    """The exported graph holds PyTorch's ops alone, whatever backend was chosen."""
    qkv = torch.randn(2, 3, 3, 2, 16)
    with use_backend(backend):
        program = torch.export.export(_Everything(), (qkv,), strict=False)
    assert "vit_fast" not in str(program.graph)
    for ours, theirs in zip(program.module()(qkv), _Everything()(qkv)):
        torch.testing.assert_close(ours, theirs)


Q = torch.randn(2, 5, 3, 16)
REJECTED = {
    "q has no heads": (lambda: attention(Q[0], Q, Q), ValueError, r"q: got shape \[5, 3, 16\], takes \[B, Tq, H, d\]"),
    "k has fewer heads": (lambda: attention(Q, Q[:, :, :2], Q), ValueError, r"k: got shape \[2, 5, 2, 16\], takes"),
    "k has another width": (lambda: attention(Q, Q[..., :8], Q), ValueError, r"k: got .*, takes \[2, Tk, 3, 16\]"),
    "k has no token": (lambda: attention(Q, Q[:, :0], Q[:, :0]), ValueError, r"k: got .*, takes one token at least"),
    "k has another batch": (lambda: attention_maps(Q, Q[:1]), ValueError, r"k: got shape \[1, 5, 3, 16\]"),
    "v is shorter than k": (lambda: attention(Q, Q, Q[:, 1:]), ValueError, r"v: got .*, takes \[2, 5, 3, 16\]"),
    "packed without a 3": (lambda: attention_qkv(Q[:, :, None]), ValueError, r"qkv: got .*, takes \[B, T, 3, H, d\]"),
    "half a value": (lambda: attention(Q, Q, Q.half()), TypeError, "v: torch.float16, the input is torch.float32"),
    "integers": (lambda: attention_qkv(torch.ones(1, 2, 3, 1, 16).int()), TypeError, "takes a floating dtype"),
    "another device": (lambda: attention(Q, Q.to("meta"), Q), ValueError, "k: on meta, the input is on cpu"),
    "a mask for queries": (lambda: attention_maps(Q, Q, torch.ones(5).bool()), ValueError, "queries: got torch.bool"),
    "a query outside": (lambda: attention_maps(Q, Q, torch.tensor([0, 5])), ValueError, "takes indices below 5"),
    "lse of other queries": (lambda: attention_maps(Q, Q, lse=torch.ones(2, 3, 4)), ValueError, r"lse: got"),
    "lse in half": (lambda: attention_maps(Q, Q, lse=torch.ones(2, 3, 5).half()), TypeError, r"lse: got torch.float16"),
    "lse elsewhere": (
        lambda: attention_maps(Q, Q, lse=torch.ones(2, 3, 5, device="meta")),
        ValueError,
        "lse: on meta, the input is on cpu",
    ),
}


@pytest.mark.parametrize("wrong", REJECTED)
def test_rejected(wrong):
    call, error, message = REJECTED[wrong]
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("keys", [1, 197, 198])
def test_on_a_cpu_in_bf16_it_is_unfused_up_to_so_many_scores(keys, autocast, monkeypatch):
    """SDPA is not called then, but is in another dtype and while a graph is traced; numbers and gradients are right."""
    monkeypatch.setattr(module, "UNFUSED_SCORES", 2 * 3 * 5 * 197)
    monkeypatch.setattr(module, "_multiplies_bf16", lambda: True)
    calls, sdpa = [], F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: calls.append(a[0].dtype) or sdpa(*a, **k))
    q, k, v = (torch.randn(2, tokens, 3, 16, dtype=torch.bfloat16, requires_grad=True) for tokens in (5, keys, keys))
    upstream = torch.randn(2, 5, 48, dtype=torch.bfloat16)
    with use_backend("torch"), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = attention(q, k, v)
        assert calls == ([] if keys <= 197 else [torch.bfloat16])
        attention(q.half(), k.half(), v.half())
        attention(q.float(), k.float(), v.float())
        assert calls[-2:] == [torch.float16, torch.float32]
    assert y.dtype == torch.bfloat16
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    truth = reference.attention(*exact)
    gradients = zip(torch.autograd.grad(y, (q, k, v), upstream), torch.autograd.grad(truth, exact, upstream.double()))
    for got, right in ((y, truth), *gradients):
        assert (got - right).norm() <= 0.02 * right.norm() + 0.02 * (keys == 1)  # one key's probability is constant
    with use_backend("torch"):
        traced = torch.export.export(Attention(), (q.detach(), k.detach(), v.detach()))
    assert any("scaled_dot_product" in str(node.target) for node in traced.graph.nodes)


@pytest.mark.parametrize("offset", [3.0, 10.0])
def test_what_all_keys_share_is_no_error_of_the_unfused_form(offset, monkeypatch):
    """As biases of queries and keys make it; a score of 100 has steps of a half in bf16."""
    monkeypatch.setattr(module, "_multiplies_bf16", lambda: True)
    q, k, v = torch.randn(3, 2, 33, 3, 16)
    exact = [(x + shift).bfloat16().double().requires_grad_() for x, shift in ((q, 0), (k, 4 * offset), (v, 0))]
    ours = [x.detach().bfloat16().requires_grad_() for x in exact]
    upstream = torch.randn(2, 33, 48, dtype=torch.bfloat16)
    with use_backend("torch"):
        y, truth = attention(*ours), reference.attention(*exact)
    gradients = zip(torch.autograd.grad(y, ours, upstream), torch.autograd.grad(truth, exact, upstream.double()))
    for got, right in ((y, truth), *gradients):
        assert (got - right).norm() <= 0.02 * right.norm()


def test_without_products_in_bf16_a_cpu_keeps_sdpa(monkeypatch):
    calls, sdpa = [], F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: calls.append(a[0].dtype) or sdpa(*a, **k))
    monkeypatch.setattr(module, "_multiplies_bf16", lambda: False)
    with use_backend("torch"):
        attention_qkv(torch.randn(2, 5, 3, 2, 16, dtype=torch.bfloat16))
    assert calls == [torch.bfloat16]


def test_on_a_cpu_in_bf16_under_autocast_of_fp16():
    """It is autocast's dtype that counts, however many scores there are."""
    q = torch.randn(2, 5, 2, 16, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.float16), use_backend("torch"):
        assert attention(q, q, q).dtype == torch.float16


def test_a_trace_of_bf16_asks_the_cpu_nothing():
    """What the CPU has is an op of PyTorch's, which no trace takes."""
    module._multiplies_bf16.cache_clear()
    q, k, v = torch.randn(3, 2, 5, 2, 16, dtype=torch.bfloat16)
    with use_backend("torch"):
        traced = torch.jit.trace(Attention(), (q, k, v), check_trace=False)
        assert torch.equal(
            traced(q, k, v),
            F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2).flatten(2),
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_forward_mode_in_pytorch(dtype):
    q, tangent = torch.randn(2, 2, 5, 2, 16, dtype=dtype)
    with use_backend("torch"):
        _, found = torch.func.jvp(lambda q: attention(q, q, q), (q,), (tangent,))
        _, expected = torch.func.jvp(lambda q: reference.attention(q, q, q), (q.double(),), (tangent.double(),))
    assert torch.allclose(found.double(), expected, atol=1e-5)


@pytest.mark.parametrize("fake", [False, True])
def test_maps_of_chosen_queries_without_values(fake):
    with FakeTensorMode() if fake else torch.device("meta"):
        q, queries = torch.empty(2, 5, 3, 16), torch.empty(4, dtype=torch.int64)
        assert attention_maps(q, q, queries).shape == (2, 3, 4, 5)


class Attention(torch.nn.Module):
    def forward(self, q, k, v):
        return attention(q, k, v)
