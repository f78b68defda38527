"""Attention on a device: the cases of tests/ops, every head width at a ViT's length, and sizes that cross its tiles."""

import pytest
import torch
from vit_fast.kernels import hopper_attention

from tests import unfused
from tests.ops.harness import Case, hold_to_the_rule, named
from tests.ops.test_attention import DTYPES, HEADS, LONG, PACKED, PIECES, SEPARATE, shaped, shaped_qkv, unpacked
from vit_fast import reference
from vit_fast.ops import attention, attention_maps, attention_qkv, use_backend
from vit_fast.ops.attention import HEAD_WIDTHS

SIZED = [
    Case("a pool of one query", shaped(4, 3, 12, 64, keys=196)),
    Case("one token past every tile", shaped(2, 129, 3, 64, keys=257)),
    Case("image of 512", shaped(1, 1025, 2, 64)),
]
# As many heads as fill a device: on Hopper those of hopper_attention.py, whose tiles and pieces of keys these
# lengths cross.
LENGTHS = (65, 128, 129, 192, 197, 208, 209, 240, 256, 257, 272)
MANY = [Case(f"{n} tokens, many heads of {d}", shaped_qkv(67, n, 8, d)) for n in LENGTHS for d in (64, 80)]
SIZED_PACKED = [Case(f"197 tokens, heads of {width}", shaped_qkv(2, 197, 3, width)) for width in HEAD_WIDTHS]


@pytest.mark.parametrize("mode", [*DTYPES, "autocast"])
@pytest.mark.parametrize("case", named(SEPARATE + PIECES + HEADS + LONG + SIZED))
def test_output_and_gradients(case, mode):
    hold_to_the_rule(attention, reference.attention, unfused.attention, case, mode, "triton", "cuda")


@pytest.mark.parametrize("mode", [*DTYPES, "autocast"])
@pytest.mark.parametrize("case", named(PACKED + SIZED_PACKED))
def test_packed_output_and_gradients(case, mode):
    ours, truth = attention_qkv, unpacked(reference.attention)
    hold_to_the_rule(ours, truth, unpacked(unfused.attention), case, mode, "triton", "cuda")


@pytest.fixture
def specialised(monkeypatch):
    """Notes the calls of the kernel for Hopper; skips where another GPU is at hand."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("a kernel for sm_90")
    calls, forward = [], hopper_attention.forward
    monkeypatch.setattr(hopper_attention, "forward", lambda *args: (calls.append(args), forward(*args)))
    return calls


@pytest.mark.parametrize("mode", ["fp16", "bf16"])
@pytest.mark.parametrize("case", named(MANY))
def test_specialised_output_and_gradients(case, mode, specialised):
    ours, truth = attention_qkv, unpacked(reference.attention)
    hold_to_the_rule(ours, truth, unpacked(unfused.attention), case, mode, "triton", "cuda")
    assert specialised


@pytest.mark.parametrize("tokens", [197, 577])
def test_scores_of_minus_infinity(tokens):
    """Keys that no query looks at, as many as the first tiles have."""
    q, k, v = torch.randn(3, 2, tokens, 3, 64, device="cuda", dtype=torch.bfloat16)
    q, k[:, : tokens // 2] = q.abs() + 0.1, -torch.inf
    with use_backend("triton"):
        o, others = attention(q, k, v), attention(q, k[:, tokens // 2 :], v[:, tokens // 2 :])
    torch.testing.assert_close(o, others, rtol=0, atol=4 * torch.finfo(o.dtype).eps)  # P is rounded another time


@pytest.mark.parametrize(("tokens", "width"), [(197, 64), (257, 80), (130, 64)])
def test_specialised_bits(tokens, width, specialised):
    """Every element is written, the same each time, with a log-sum-exp or without, whatever else is in the batch."""
    qkv = torch.randn(90, tokens, 3, 8, width, device="cuda", dtype=torch.bfloat16)
    with use_backend("triton"):
        first = attention_qkv(qkv)
        for _ in range(20):
            poison = torch.full_like(first, float("nan"))
            del poison  # whose memory the next result takes
            assert torch.equal(attention_qkv(qkv), first)
        assert torch.equal(attention_qkv(qkv.clone().requires_grad_()), first)
        qkv[7, 3] = float("nan")
        spoilt = attention_qkv(qkv)
    others = torch.arange(90, device="cuda") != 7
    assert torch.equal(spoilt[others], first[others])
    assert spoilt[7].isnan().all()
    assert len(specialised) == 23


def test_specialised_takes_no_descriptor_for_another(specialised):
    """Launches of one kernel in turn on tensors of other lengths, whose descriptors lie in the same memory."""
    packed = [torch.randn(90, tokens, 3, 8, 64, device="cuda", dtype=torch.bfloat16) for tokens in (193, 208, 200)]
    with use_backend("triton"):
        alone = [attention_qkv(qkv) for qkv in packed]
        torch.cuda.synchronize()
        in_turn = [attention_qkv(qkv) for _ in range(30) for qkv in packed]
    for index, o in enumerate(in_turn):
        assert torch.equal(o, alone[index % 3])
    assert len(specialised) == 93


@pytest.mark.parametrize("width", HEAD_WIDTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_same_bits_again(dtype, width):
    qkv = torch.randn(4, 197, 3, 4, width, device="cuda", dtype=dtype, requires_grad=True)
    with use_backend("triton"):
        o = attention_qkv(qkv)
        do = torch.randn_like(o)
        first, second = (torch.autograd.grad(o, qkv, do, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_maps(dtype):
    q, k = torch.randn(2, 2, 197, 3, 64, device="cuda", dtype=dtype)
    queries = torch.tensor([196, 0, 64])
    with use_backend("triton"):
        rows = attention_maps(q, k, queries)
    truth = reference.attention_probabilities(q.double(), k.double())[:, :, queries]
    torch.testing.assert_close(rows, truth, rtol=2e-5, atol=1e-7, check_dtype=False)
    torch.testing.assert_close(rows.sum(-1), torch.ones_like(rows[..., 0]), rtol=0, atol=5e-6)


def test_misaligned_views():
    """A pointer and strides that no vector load fits."""
    wide = torch.randn(2, 50, 3, 71, device="cuda", dtype=torch.bfloat16)
    q, k, v = (wide[..., i : i + 64] for i in (1, 3, 7))
    with use_backend("triton"):
        assert torch.equal(attention(q, k, v), attention(q.contiguous(), k.contiguous(), v.contiguous()))


def test_offsets_pass_two_to_the_31():
    """One packed tensor of 4.3 GB: the last image begins past 2^31 elements."""
    qkv = torch.empty(950, 197, 3, 60, 64, device="cuda", dtype=torch.bfloat16)
    qkv[-1].normal_()
    with use_backend("triton"):
        assert torch.equal(attention_qkv(qkv)[-1:], attention_qkv(qkv[-1:].clone()))
