import math
import mmap

import pytest
import torch

from tests import unfused
from tests.guard import guarded
from tests.ops.harness import BACKENDS, MODES, Case, hold_to_the_rule, named
from vit_fast import reference
from vit_fast.ops import attention, attention_maps, attention_qkv, use_backend
from vit_fast.ops.attention import HEAD_WIDTHS

# numpy, which the interpreter runs on, speaks of the NaN and the overflow that some cases are about.
pytestmark = [
    pytest.mark.filterwarnings("ignore:overflow encountered in exp2:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered in:RuntimeWarning"),
]

DTYPES = ["fp32", "fp16", "bf16"]
MAP_NORESERVE = 0x4000  # Linux; Python has no name for it before 3.13

# The interpreter's tiles are 32 x 16 (queries x keys), 16 x 32 for the gradients of keys: 33 tokens cross both.


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
    Case("last key of a tile", shaped(2, 3, 1, 16, keys=16)),
    Case("first key of a second tile", shaped(4, 3, 2, 16, keys=17)),
    Case("many queries on one key", shaped(3, 40, 1, 16, keys=1), **FLAT),
    Case("a scale of its own", shaped(2, 7, 2, 48, keys=9), {"scale": 0.3}),
    Case("scores around ten thousand", shaped(2, 19, 2, 16, keys=21, offset=1e4)),
    Case("scores around minus ten thousand", shaped(2, 19, 2, 16, keys=21, offset=-1e4)),
]
WIDTHS = [Case(f"heads of {width}", shaped_qkv(2, 17, 2, width)) for width in HEAD_WIDTHS]
PACKED = [*WIDTHS, Case("packed past every tile", shaped_qkv(1, 49, 1, 16), {"scale": 0.5})]


def unpacked(f):
    return lambda qkv, scale=None: f(*qkv.unbind(2), scale)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", DTYPES)
@pytest.mark.parametrize("case", named(SEPARATE))
def test_output_and_gradients(case, mode, backend, guarded_memory):
    hold_to_the_rule(attention, reference.attention, unfused.attention, case, mode, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", DTYPES)
@pytest.mark.parametrize("case", named(PACKED))
def test_packed_output_and_gradients(case, mode, backend, guarded_memory):
    hold_to_the_rule(attention_qkv, unpacked(reference.attention), unpacked(unfused.attention), case, mode, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast(backend):
    hold_to_the_rule(attention, reference.attention, unfused.attention, SEPARATE[4], "autocast", backend)
    hold_to_the_rule(
        attention_qkv, unpacked(reference.attention), unpacked(unfused.attention), WIDTHS[1], "autocast", backend
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", DTYPES)
def test_one_query(mode, backend):
    """An attention pool. Keys are one flat tensor here, so that the rule looks at their gradient as a whole.

    Each row of it is the query times one number, a difference that is near zero for some key in any backend. PyTorch
    gets few keys: its own kernel keeps a natural log-sum-exp in fp32, and misses the rule there when this is 4 or more.
    """
    keys = 40 if backend == "triton" else 7

    def flat(f):
        return lambda q, k, v: f(q, k.view(v.shape), v)

    def draw():
        q, k, v = shaped(5, 1, 3, 16, keys=keys)().values()
        return {"q": q, "k": k.flatten(), "v": v}

    ours, truth, peer = map(flat, (attention, reference.attention, unfused.attention))
    hold_to_the_rule(ours, truth, peer, Case("one query", draw), mode, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", DTYPES)
@pytest.mark.parametrize("keys", [1, 19])
def test_no_slope(keys, mode, backend):
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


VIEWS = {
    "heads before tokens": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "every other token": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "cut out of a wider head, at an odd element": lambda x: torch.nn.functional.pad(x, (3, 4))[..., 3:-4],
    "tokens before images": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "one image for all": lambda x: x[:1].expand_as(x),
    "last axis not dense": lambda x: x.transpose(1, 3).contiguous().transpose(1, 3),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("view", VIEWS)
def test_strided_views(view, backend):
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
@pytest.mark.parametrize("at_start", [False, True])
@pytest.mark.parametrize("width", [32, 72])
def test_between_guard_pages(width, at_start, guarded_memory):
    """Nothing is read or written outside: the end or the start of every tensor is at a page that no one may touch."""
    tensors = [guarded(t.float().requires_grad_(), at_start) for t in shaped(2, 17, 3, width, keys=33)().values()]
    with use_backend("triton"):
        o = attention(*tensors)
        gradients = torch.autograd.grad(o, tensors, guarded(torch.randn(o.shape), at_start))
        maps = attention_maps(*(t.detach() for t in tensors[:2]))
    assert all(torch.isfinite(t).all() for t in (o, *gradients, maps))


@pytest.mark.interpret
def test_offsets_pass_two_to_the_31():
    """Strides of a billion elements, in address space that is reserved and never filled."""
    region = mmap.mmap(-1, 2**33 + 2**20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
    memory = torch.frombuffer(region, dtype=torch.float16)
    near = torch.randn(3, 3, 3, 16).half()
    far_stride = 1_100_000_000  # its double passes 2^31
    for strides in [(far_stride, 48, 16, 1), (48, far_stride, 16, 1), (48, 16, far_stride, 1)]:
        far = memory.as_strided(near.shape, strides)
        far.copy_(near)
        with use_backend("triton"):
            assert torch.equal(attention(far, far, far), attention(near, near, near))


@pytest.mark.parametrize("backend", BACKENDS)
def test_images_do_not_mix(backend):
    """NaN or infinity in one image harms no other; images in another order give the same results in that order."""
    (qkv,) = shaped_qkv(4, 17, 2, 16)().values()
    qkv = qkv.float()
    order = torch.tensor([2, 0, 3, 1])

    def run(qkv):
        qkv = qkv.clone().requires_grad_()
        with use_backend(backend):
            o = attention_qkv(qkv)
            (gradient,) = torch.autograd.grad(o, qkv, torch.ones_like(o).cumsum(2))
            return o.detach(), gradient, attention_maps(*qkv.detach().unbind(2)[:2])

    expected = run(qkv)
    for ours, theirs in zip(run(qkv[order]), expected):
        assert torch.equal(ours, theirs[order])
    poisoned = qkv.clone()
    poisoned[1, 5, 1, 0, 3], poisoned[3, 2, 0, 1, 0] = torch.nan, torch.inf
    for ours, theirs in zip(run(poisoned), expected):
        assert torch.equal(ours[[0, 2]], theirs[[0, 2]])
        assert ours[1].isnan().any()
        assert ours[3].isnan().any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_bits_again(backend):
    """Two backward passes on the same numbers agree to the bit."""
    qkv = shaped_qkv(2, 33, 2, 16)()["qkv"].float().requires_grad_()
    with use_backend(backend):
        o = attention_qkv(qkv)
        do = torch.randn_like(o)
        first, second = (torch.autograd.grad(o, qkv, do, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", ["fp32", "bf16", "autocast"])
@pytest.mark.parametrize("width", [16, 72])
def test_maps(width, mode, backend):
    """Rows are those of the reference, in the order asked for, and sum to one."""
    q, k, _ = (t.to(MODES[mode]) for t in shaped(2, 35, 2, width, keys=18)().values())
    queries = torch.tensor([34, 0, -2, 0])
    with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"), use_backend(backend):
        rows = attention_maps(q, k, queries)
        everything = attention_maps(q, k)
        other = attention_maps(q, k, scale=0.5)
    if mode == "autocast":
        q, k = q.bfloat16(), k.bfloat16()
    truth = reference.attention_probabilities(q.double(), k.double())
    assert rows.dtype == everything.dtype == torch.float32
    # From the rounded operands on all is fp32, whatever their dtype: a few roundings of scores of about ten.
    close = {"rtol": 1e-5, "atol": 1e-7, "check_dtype": False}
    torch.testing.assert_close(everything, truth, **close)
    torch.testing.assert_close(rows, truth[:, :, queries], **close)
    torch.testing.assert_close(everything.sum(-1), torch.ones(2, 2, 35), rtol=0, atol=2e-6)
    torch.testing.assert_close(other, reference.attention_probabilities(q.double(), k.double(), 0.5), **close)
    assert attention_maps(q, k, queries[:0]).shape == (2, 2, 0, 18)


@pytest.mark.interpret
def test_maps_from_lse():
    """The log-sum-exp that training saves gives the rows without another pass over the keys."""
    q, k, v = (t.float() for t in shaped(2, 33, 2, 16, keys=17)().values())
    queries = torch.tensor([32, 1])
    with use_backend("triton"):
        _, lse = torch.ops.vit_fast.attention_train(q, k, v, 0.25)
        rows = attention_maps(q, k, queries, lse=lse)
        assert torch.equal(rows, attention_maps(q, k, queries))
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


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty(backend):
    with use_backend(backend):
        qkv = torch.randn(0, 3, 3, 2, 16, requires_grad=True)
        o = attention_qkv(qkv)
        assert o.shape == (0, 3, 32)
        o.sum().backward()
        assert qkv.grad.shape == qkv.shape
        assert attention(*torch.randn(3, 0, 3, 2, 16)).shape == (0, 3, 32)
        assert attention(torch.randn(2, 0, 2, 16), *torch.randn(2, 2, 3, 2, 16)).shape == (2, 0, 32)
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
}


@pytest.mark.parametrize("wrong", REJECTED)
def test_rejected(wrong):
    call, error, message = REJECTED[wrong]
    with pytest.raises(error, match=message):
        call()
