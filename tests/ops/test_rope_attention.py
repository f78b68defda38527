import functools
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
from vit_fast.ops import attention_qkv, rope_attention, use_backend

module = sys.modules["vit_fast.ops.rope_attention"]  # in whose place vit_fast.ops has the function

TABLES = ("cos", "sin")


def shaped(batch: int, tokens: int, heads: int, width: int, turned: int, a_table_a_head=False):
    """Queries, keys and values, and the angles of the last `turned` tokens. Each number has one of its
    own, where a model has one for both of a pair: a kernel that read the wrong one of the two would be found out."""

    def draw():
        qkv = torch.randn(batch, tokens, 3, heads, width, dtype=torch.float64)
        shape = (heads, turned, width) if a_table_a_head else (turned, width)
        angles = math.pi * torch.randn(shape, dtype=torch.float64)
        return {"qkv": qkv, "cos": angles.cos(), "sin": angles.sin()}

    return draw


def case(why: str, *shape: int, a_table_a_head=False, constant=TABLES, **options) -> Case:
    """Of B, T, H, d and the number of turned tokens."""
    return Case(why, shaped(*shape, a_table_a_head), options, constant)


CASES = [
    case("five tokens before the patches, as DINOv3 has them", 2, 21, 3, 64, 16),
    case("interleaved, behind a class token", 2, 17, 3, 64, 16, interleaved=True),
    case("every token turned", 1, 16, 2, 32, 16),
    case("one turned token", 2, 21, 3, 16, 1),
    case("no turned token", 2, 21, 3, 16, 0),
    case("tables of each head's own", 2, 19, 3, 32, 18, a_table_a_head=True),
    case("tables of each head's own, interleaved", 1, 19, 5, 48, 14, a_table_a_head=True, interleaved=True),
    case("one head of four: a program has the queries' and the keys'", 3, 9, 1, 16, 7),
    case("heads that no program's four divide", 1, 9, 7, 16, 8),
    case("as many tokens as a program has", 2, 32, 1, 64, 27),
    case("more tokens than a program has", 2, 150, 1, 16, 147, interleaved=True),
    case("heads 72 wide, half of which is no power of two", 1, 20, 2, 72, 16),
    case("heads 88 wide, interleaved", 1, 20, 1, 88, 16, interleaved=True),
    case("heads 128 wide", 1, 18, 1, 128, 17),
    case("as many tokens as stream", 1, 290, 1, 32, 285),
    case("a scale of its own", 2, 9, 2, 16, 8, scale=0.1),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", named(CASES))
def test_output_and_gradients(case, mode, backend, guarded_memory):
    hold_to_the_rule(rope_attention, reference.rope_attention, unfused.rope_attention, case, mode, backend)


# ---- what must be so -----------------------------------------------------------------------------------------------


def floats(*shape, dtype=torch.float32, **options) -> tuple[torch.Tensor, ...]:
    return tuple(t.to(dtype) for t in shaped(*shape, **options)().values())


def test_the_reference_is_a_turn_of_complex_numbers():
    """Where both of a pair have one angle: its numbers are the parts of one, times e to the power of that."""
    x, angles = torch.randn(2, 7, 3, 16, dtype=torch.float64), torch.randn(5, 8, dtype=torch.float64)
    for interleaved in (False, True):
        twice = angles.repeat_interleave(2, 1) if interleaved else torch.cat((angles, angles), 1)
        found = reference.rotate(x, twice.cos(), twice.sin(), interleaved)
        before, after = (
            torch.complex(*(t.unflatten(-1, (8, 2)).unbind(-1) if interleaved else t.chunk(2, -1))) for t in (x, found)
        )
        turn = torch.polar(torch.ones_like(angles), angles).unsqueeze(1)
        torch.testing.assert_close(after[:, 2:], before[:, 2:] * turn)
        assert torch.equal(found[:, :2], x[:, :2])


@pytest.mark.parametrize("shape", [(5, 16), (3, 5, 16)])
@pytest.mark.parametrize("interleaved", [False, True])
def test_the_reference_is_timms_and_transformers(interleaved, shape):
    import timm.layers
    from transformers.models.dinov3_vit.modeling_dinov3_vit import apply_rotary_pos_emb

    x = torch.randn(2, 7, 3, 16, dtype=torch.float64)
    cos, sin = torch.randn(2, *shape, dtype=torch.float64)
    found = reference.rotate(x, cos, sin, interleaved).transpose(1, 2)
    x = x.transpose(1, 2)
    theirs = timm.layers.apply_rot_embed_cat(x[:, :, 2:], torch.cat((sin, cos), -1), half=not interleaved)
    torch.testing.assert_close(found[:, :, 2:], theirs)
    if not interleaved:
        torch.testing.assert_close(found, apply_rotary_pos_emb(x, x, cos, sin)[0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("interleaved", [False, True])
def test_turned_by_nothing_it_is_attention(interleaved, backend):
    """To the bit, its gradient too."""
    qkv, *_ = floats(2, 9, 3, 16, 0, dtype=torch.bfloat16)
    do, angles = torch.randn(2, 9, 48).bfloat16(), torch.zeros(7, 16)

    def run(op, *others):
        x = qkv.clone().requires_grad_()
        o = op(x, *others)
        return o, torch.autograd.grad(o, x, do)[0]

    with use_backend(backend):
        found, expected = run(rope_attention, angles.cos(), angles, interleaved), run(attention_qkv)
    assert all(map(torch.equal, found, expected))


def turned(qkv, cos, sin, backend, interleaved=False) -> torch.Tensor:
    """Queries and keys as the attention gets them, [B, T, 2, H, d]."""
    if backend == "torch":
        return torch.stack([module.turn(x, cos, sin, interleaved) for x in qkv.unbind(2)[:2]], 2)
    return torch.stack(module._operands(qkv, cos, sin, interleaved)[:2], 2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_what_is_no_number_spoils_its_pair_alone(bad, interleaved, backend):
    """Before the turned tokens itself alone."""
    for token, count in ((1, 1), (7, 2)):
        qkv, cos, sin = floats(2, 9, 2, 16, 7)
        qkv[1, token, 1, 1, 3] = bad
        spoilt = ~turned(qkv, cos, sin, backend, interleaved).isfinite()
        assert spoilt.sum() == count
        partner = 2 if interleaved else 11
        assert spoilt[1, token, 1, 1, [3, partner]].sum() == count


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("interleaved", [False, True])
def test_scores_depend_on_the_distance_of_two_tokens(interleaved, backend):
    """What rotary positions are for: all turned further by the same angles, every token sees what it saw."""
    qkv, *_ = floats(2, 7, 2, 16, 0)
    angles, further = torch.randn(7, 8), torch.randn(8)

    def run(angles):
        twice = angles.repeat_interleave(2, 1) if interleaved else torch.cat((angles, angles), 1)
        return rope_attention(qkv, twice.cos(), twice.sin(), interleaved)

    with use_backend(backend):
        first, second, other = run(angles), run(angles + further), run(-angles)
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)
    assert (first - other).abs().max() > 1e-2


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", ["fp16", "bf16"])
@pytest.mark.parametrize("interleaved", [False, True])
def test_tables_in_another_dtype(interleaved, mode, backend):
    """They are not rounded to that of the product, in either direction."""
    qkv, cos, sin = floats(2, 9, 2, 16, 7)
    qkv = qkv.to(MODES[mode])
    found = turned(qkv, cos, sin, backend, interleaved)
    wide = qkv.double(), cos.double(), sin.double()
    true = torch.stack([reference.rotate(x, *wide[1:], interleaved) for x in wide[0].unbind(2)[:2]], 2)
    rounding = torch.finfo(qkv.dtype).eps / 2
    # Of a sum of two, each itself rounded in PyTorch where a table's dtype is not wider.
    assert ((found.double() - true).abs() <= 1.01 * rounding * true.abs() + 1e-6).all()
    with use_backend(backend):
        assert rope_attention(qkv, cos, sin).dtype == qkv.dtype
        narrow = cos.to(qkv.dtype), sin.to(qkv.dtype)
        wide = rope_attention(qkv.float(), *narrow)
        assert wide.dtype == torch.float32
        torch.testing.assert_close(wide, rope_attention(qkv.float(), *(t.float() for t in narrow)))


@pytest.mark.interpret
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("mode", ["fp16", "bf16"])
def test_a_turn_is_rounded_once(mode, interleaved):
    """Of halves by tables of halves too, where PyTorch rounds each product."""
    qkv, cos, sin = floats(2, 9, 2, 16, 7, dtype=MODES[mode])
    found = turned(qkv, cos, sin, "triton", interleaved).double()
    true = [reference.rotate(x.double(), cos.double(), sin.double(), interleaved) for x in qkv.unbind(2)[:2]]
    rounding = torch.finfo(MODES[mode]).eps / 2
    assert ((found - torch.stack(true, 2)).abs() <= 1.01 * rounding * found.abs() + 1e-6).all()


def test_the_largest_dtype_in_pytorch():
    """In fp64 it is the reference."""
    for interleaved in (False, True):
        operands = shaped(2, 9, 2, 24, 7)().values()
        ours, truth = (f(*operands, interleaved) for f in (rope_attention, reference.rope_attention))
        torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("a_table_a_head", [False, True])
def test_derivatives_in_pytorch(a_table_a_head, interleaved):
    """Those of the tables too, backward and forward: the frequencies of some models are learned."""
    operands = [t.requires_grad_() for t in shaped(1, 3, 2, 4, 2, a_table_a_head)().values()]
    call = functools.partial(rope_attention, interleaved=interleaved)
    assert torch.autograd.gradcheck(call, operands, check_forward_ad=True)


# ---- what it is given ----------------------------------------------------------------------------------------------

VIEWS = {
    "tokens before images": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "every other token": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "cut out of a wider head, at an odd element": lambda x: torch.nn.functional.pad(x, (3, 4))[..., 3:-4],
    "heads before tokens": lambda x: x.transpose(1, 3).contiguous().transpose(1, 3),
    "one image for all": lambda x: x[:1].expand_as(x),
    "last axis not dense": lambda x: x.transpose(3, 4).contiguous().transpose(3, 4),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("view", VIEWS)
def test_strided_views(view, interleaved, backend):
    """Of queries, keys and values, of tables and the upstream gradient: the results are those of dense copies."""
    qkv, cos, sin = floats(2, 9, 2, 16, 7, a_table_a_head=True)
    qkv = VIEWS[view](qkv)
    cos, sin = torch.cat((sin, cos), -1).chunk(2, -1)  # as timm keeps them
    sin = sin.transpose(0, 2).contiguous().transpose(0, 2)
    upstream = torch.randn(2, 32, 9).transpose(1, 2)
    assert not any(t.is_contiguous() for t in (qkv, cos, sin, upstream))

    def run(qkv, cos, sin, upstream):
        qkv = qkv.detach().requires_grad_()
        with use_backend(backend):
            o = rope_attention(qkv, cos, sin, interleaved)
        return o, torch.autograd.grad(o, qkv, upstream)[0]

    dense = run(*(t.contiguous() for t in (qkv, cos, sin, upstream)))
    tolerance = 0 if backend == "triton" else 1e-5
    for ours, theirs in zip(run(qkv, cos, sin, upstream), dense):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.interpret
def test_an_image_alone_and_in_a_batch():
    qkv, cos, sin = floats(3, 9, 2, 16, 7)
    with use_backend("triton"):
        whole = rope_attention(qkv, cos, sin)
        assert all(torch.equal(rope_attention(one, cos, sin)[0], o) for one, o in zip(qkv.split(1), whole))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 9, 2, 16, 7), (2, 9, 0, 16, 7)])
def test_nothing(shape, backend):
    qkv, cos, sin = floats(*shape)
    with use_backend(backend):
        assert rope_attention(qkv, cos, sin).shape == (shape[0], 9, shape[2] * 16)


@pytest.mark.parametrize("fake", [False, True])
def test_without_numbers(fake):
    with FakeTensorMode() if fake else torch.device("meta"):
        qkv, table = torch.empty(2, 9, 3, 2, 16), torch.empty(7, 16)
        assert rope_attention(qkv, table, table).shape == (2, 9, 32)
    assert rope_attention(*floats(2, 9, 2, 16, 7)).isfinite().all(), "and nothing of it is kept"


@pytest.mark.interpret
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("width", [16, 72, 88])
def test_nothing_beside_its_own_is_written(width, interleaved):
    """In place, as backward does it: values, and what lies around a view, stay as they are."""
    qkv, cos, sin = (guarded(t) for t in floats(2, 9, 3, width, 7))
    outer = torch.full((2, 11, 3, 3, width + 6), 7.0)
    inner = outer[:, 1:-1, :, :, 3:-3]
    inner.copy_(qkv)
    module._rotate(inner[:, :, :2], inner[:, :, :2], cos, sin, interleaved, False)
    assert torch.equal(inner[:, :, :2], turned(qkv, cos, sin, "triton", interleaved))
    assert torch.equal(inner[:, :, 2], qkv[:, :, 2])
    inner.fill_(7.0)
    assert (outer == 7).all()


# ---- what is launched, kept and refused ----------------------------------------------------------------------------


@pytest.mark.interpret
def test_launches(monkeypatch):
    """A pass before the attention, and in backward one more behind it."""
    qkv, cos, sin = floats(2, 9, 2, 16, 7)
    qkv.requires_grad_()
    found = []
    names = launches(monkeypatch, lambda: found.append(rope_attention(qkv, cos, sin)))
    assert names == ["rope._rotate_kernel", "attention._forward_kernel"]
    upstream = torch.randn_like(found[0])
    names = launches(monkeypatch, lambda: torch.autograd.grad(found[0], qkv, upstream))
    assert names == ["rope._rotate_kernel", "attention._grad_kernel", "rope._rotate_kernel"]


@pytest.mark.interpret
def test_what_is_kept():
    """For backward the operands, o and lse, and no turned query or key; in inference nothing."""
    saved = []
    qkv, cos, sin = floats(2, 9, 2, 16, 7)
    with use_backend("triton"), torch.autograd.graph.saved_tensors_hooks(saved.append, lambda x: x):
        frozen = rope_attention(qkv, cos, sin)
        with torch.no_grad():
            rope_attention(qkv.clone().requires_grad_(), cos, sin)
        assert not saved
        trained = rope_attention(qkv.clone().requires_grad_(), cos, sin)
    assert [t.shape for t in saved] == [qkv.shape, cos.shape, sin.shape, (2, 9, 32), (2, 2, 9)]
    assert torch.equal(frozen, trained)


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_bits_again(backend):
    """Two backward passes on the same numbers agree to the bit, and write to none of them."""
    qkv, cos, sin = floats(2, 9, 2, 16, 7)
    qkv.requires_grad_()
    with use_backend(backend):
        o = rope_attention(qkv, cos, sin)
    do = torch.randn_like(o)
    held = [t.detach().clone() for t in (qkv, cos, sin, o, do)]
    first, second = (torch.autograd.grad(o, qkv, do, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    assert all(map(torch.equal, held, (qkv, cos, sin, o, do)))


@pytest.mark.interpret
def test_second_derivative_is_refused():
    qkv, cos, sin = floats(2, 9, 2, 16, 7)
    qkv.requires_grad_()
    with use_backend("triton"):
        o = rope_attention(qkv, cos, sin)
    (gradient,) = torch.autograd.grad(o.square().sum(), qkv, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        gradient.sum().backward()


@pytest.mark.interpret
@pytest.mark.parametrize("strided", [True, False])
def test_opcheck(strided):
    qkv, cos, sin = floats(2, 9, 2, 16, 7)
    do = torch.randn(2, 9, 64)[..., ::2] if strided else torch.randn(2, 9, 32)
    if strided:
        qkv, cos = VIEWS["heads before tokens"](qkv), cos.T.contiguous().T
    namespace, others = torch.ops.vit_fast, (True, 0.25)
    torch.library.opcheck(namespace.rope_attention.default, (qkv, cos, sin, *others))
    o, lse = namespace.rope_attention_train(qkv, cos, sin, *others)
    torch.library.opcheck(namespace.rope_attention_backward.default, (do, qkv, cos, sin, o, lse, *others))
    torch.library.opcheck(namespace.rope_attention_train.default, (qkv.requires_grad_(), cos, sin, *others))


def _learned(cos: torch.Tensor) -> torch.Tensor:
    return cos.clone().requires_grad_()


REFUSED = {
    "heads of another width": ({"width": 24}, {}, ValueError, "head width: got 24, the kernels take 16, 32"),
    "a negative scale": ({}, {"scale": -1.0}, ValueError, "scale: got -1.0, the kernels take a number of 1e-30"),
    "learned cosines": ({}, {"cos": _learned}, ValueError, "a gradient of cos or sin: the kernels give none"),
    "learned sines": ({}, {"sin": _learned}, ValueError, "a gradient of cos or sin: the kernels give none"),
    "cosines in fp64": ({}, {"cos": torch.Tensor.double}, TypeError, "the kernels take float32, .* got torch.float64"),
    "sines in fp64": ({}, {"sin": torch.Tensor.double}, TypeError, "the kernels take float32, .* got torch.float64"),
}


@pytest.mark.interpret
@pytest.mark.parametrize("what", REFUSED)
def test_kernels_refuse(what):
    """What no kernel does is refused under use_backend("triton"), and PyTorch's work under "auto"."""
    shape, change, error, message = REFUSED[what]
    operands = dict(zip(("qkv", "cos", "sin"), floats(2, 9, 2, shape.get("width", 16), 7)))
    operands |= {name: new(operands[name]) if callable(new) else new for name, new in change.items()}
    double = {name: t.double() if isinstance(t, torch.Tensor) else t for name, t in operands.items()}
    found, truth = rope_attention(**operands), reference.rope_attention(**double)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), truth, rtol=1e-4, atol=1e-5)
    with use_backend("triton"), pytest.raises(error, match=f"rope_attention: {message}"):
        rope_attention(**operands)


@pytest.mark.interpret
def test_without_gradients_learned_tables_are_taken(monkeypatch):
    qkv, cos, sin = floats(2, 9, 2, 16, 7)
    cos, sin = _learned(cos), _learned(sin)
    with torch.no_grad():
        names = launches(monkeypatch, lambda: rope_attention(qkv, cos, sin))
    assert names == ["rope._rotate_kernel", "attention._forward_kernel"]


QKV, TABLE = torch.randn(2, 9, 3, 2, 16), torch.randn(7, 16)
REJECTED = {
    "no 3": ({"qkv": QKV[:, :, :2]}, ValueError, r"qkv: got shape \[2, 9, 2, 2, 16\], takes \[B, T, 3, H, d\]"),
    "an odd width": ({"qkv": QKV[..., :15]}, ValueError, "qkv: got heads 15 wide, takes an even width"),
    "a table of half the width": (
        {"cos": TABLE[:, :8]},
        ValueError,
        r"cos: got shape \[7, 8\], takes \[N, 16\] or \[2, N, 16\], N of the 9 tokens",
    ),
    "a table of one angle": ({"sin": TABLE[0]}, ValueError, r"sin: got shape \[16\], takes \[N, 16\]"),
    "a table of other heads": ({"cos": TABLE.expand(3, 7, 16)}, ValueError, r"cos: got shape \[3, 7, 16\], takes"),
    "a table an image": ({"cos": TABLE.expand(2, 2, 7, 16)}, ValueError, r"cos: got shape \[2, 2, 7, 16\], takes"),
    "more angles than tokens": (
        {"sin": TABLE[0].expand(10, 16)},
        ValueError,
        r"sin: got shape \[10, 16\], takes \[N, 16\]",
    ),
    "two tables": ({"sin": TABLE[1:]}, ValueError, r"sin: got shape \[6, 16\], takes \[7, 16\], that of cos"),
    "tables of integers": ({"cos": TABLE.int()}, TypeError, "cos: got torch.int32, takes a floating dtype"),
    "a table elsewhere": ({"sin": TABLE.to("meta")}, ValueError, "sin: on meta, the input is on cpu"),
    "integers": ({"qkv": QKV.int()}, TypeError, "the input: got torch.int32, takes a floating dtype"),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wrong", REJECTED)
def test_rejected(wrong, backend):
    change, error, message = REJECTED[wrong]
    with use_backend(backend), pytest.raises(error, match=message):
        rope_attention(**{"qkv": QKV, "cos": TABLE, "sin": TABLE} | change)
