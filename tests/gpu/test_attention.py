"""Attention on a device: the cases of tests/ops, every head width at a ViT's length, and sizes that cross its tiles."""

import pytest
import torch

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
