"""Attention with rotary positions on a device: the cases of tests/ops, DINOv3's sizes, lengths that stream."""

import pytest
import torch

from tests import unfused
from tests.gpu.conftest import (
    assert_every_element_is_written,
    assert_the_same_bits_again,
    captured_in_a_graph,
)
from tests.ops.harness import MODES, assert_views_are_read, hold_to_the_rule, named
from tests.ops.test_attention import DTYPES
from tests.ops.test_rope_attention import CASES, case, shaped
from vit_fast import reference
from vit_fast.ops import attention_qkv, rope_attention, use_backend

WIDTHS = (64, 72, 88, 128)
FORMS = {
    "halves": {},
    "interleaved": {"interleaved": True},
    "tables of each head's own": {"a_table_a_head": True},
    "tables of each head's own, interleaved": {"a_table_a_head": True, "interleaved": True},
}
SIZED = [
    *(
        case(f"201 tokens, heads of {width}, {form}", 2, 201, 3, width, 196, **options)
        for width in WIDTHS
        for form, options in FORMS.items()
    ),
    *(case(f"1029 tokens, which stream, heads of {width}", 1, 1029, 2, width, 1024) for width in WIDTHS),
    case("as many heads as fill a device", 67, 201, 8, 64, 196),
    case("heads that no program's four divide, interleaved", 3, 201, 13, 80, 200, interleaved=True),
]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", named(CASES + SIZED))
def test_output_and_gradients(case, mode):
    hold_to_the_rule(rope_attention, reference.rope_attention, unfused.rope_attention, case, mode, "triton", "cuda")


def test_views():
    assert_views_are_read(rope_attention, SIZED[0], "triton", "cuda")


def drawn(*shape: int, dtype: torch.dtype, **options) -> list[torch.Tensor]:
    """On the device, the tables in fp32."""
    qkv, *tables = (t.to("cuda", torch.float32) for t in shaped(*shape, **options)().values())
    return [qkv.to(dtype), *tables]


def test_at_an_odd_element():
    """Pointers that no vector load fits, of the tables too."""
    operands = drawn(2, 201, 3, 64, 196, dtype=torch.bfloat16)
    odd = [torch.empty(t.numel() + 1, device="cuda", dtype=t.dtype)[1:].view(t.shape).copy_(t) for t in operands]
    with use_backend("triton"):
        assert torch.equal(rope_attention(*odd), rope_attention(*operands))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("mode", DTYPES)
def test_turned_by_nothing_it_is_attention(mode, interleaved):
    """To the bit, its gradient too."""
    qkv, cos, sin = drawn(4, 201, 6, 64, 196, dtype=MODES[mode])
    do = torch.randn(4, 201, 384, device="cuda").to(qkv.dtype)

    def run(op, *others):
        x = qkv.clone().requires_grad_()
        o = op(x, *others)
        return o, torch.autograd.grad(o, x, do)[0]

    with use_backend("triton"):
        found = run(rope_attention, torch.ones_like(cos), torch.zeros_like(sin), interleaved)
        expected = run(attention_qkv)
    assert all(map(torch.equal, found, expected))


@pytest.fixture(params=[(mode, tokens) for mode in DTYPES for tokens in (201, 1029)], ids=str)
def run(request):
    """A run of a ViT-B's heads, always on the same operands: output and gradient."""
    mode, tokens = request.param
    qkv, cos, sin = drawn(8, tokens, 12, 64, tokens - 5, dtype=MODES[mode])
    upstream = torch.randn(8, tokens, 768, device="cuda").to(qkv.dtype)

    def run(images=slice(None)):
        some = qkv[images].detach().requires_grad_()
        with use_backend("triton"):
            o = rope_attention(some, cos, sin)
        return [o.detach(), *torch.autograd.grad(o, some, upstream[images])]

    return run


def test_hundreds_of_runs_give_the_same_bits(run):
    """No atomics, and no race: neither of what is turned in place nor of a launch that begins early."""
    assert_the_same_bits_again(run, run(), 300)


def test_every_element_is_written(run):
    assert_every_element_is_written(run)


@pytest.mark.parametrize("mode", ["fp16", "bf16"])
def test_few_images_in_a_row(mode):
    """As few rows as a launch begins early for: what one writes the next reads, what is turned in place too."""
    qkv, cos, sin = drawn(1, 201, 12, 64, 196, dtype=MODES[mode])
    do = torch.randn(1, 201, 768, device="cuda").to(qkv.dtype)

    def run(wait):
        x, found = qkv, []
        with use_backend("triton"):
            for _ in range(20):
                x = x.detach().requires_grad_()
                o = rope_attention(x, cos, sin)
                wait()
                (gradient,) = torch.autograd.grad(o, x, do)
                wait()
                found += [o.detach(), gradient]
                x = torch.nn.functional.layer_norm(qkv + gradient, (64,))
        return found

    assert all(map(torch.equal, run(lambda: None), run(torch.cuda.synchronize)))


def test_captured_in_a_graph(run):
    graph, captured, expected = captured_in_a_graph(run)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(captured, expected))


def test_offsets_pass_two_to_the_31():
    """Queries, keys and values of 4.3 GB: the last image begins past 2^31 elements, in and out."""
    images = 2**31 // (201 * 3 * 768) + 2
    qkv = torch.zeros(images, 201, 3, 12, 64, device="cuda", dtype=torch.bfloat16)
    qkv[-1].normal_()
    _, cos, sin = drawn(1, 201, 12, 64, 196, dtype=torch.bfloat16)
    do = torch.zeros(images, 201, 768, device="cuda", dtype=torch.bfloat16)
    do[-1].normal_()

    def run(qkv, do):
        qkv = qkv.requires_grad_()
        with use_backend("triton"):
            o = rope_attention(qkv, cos, sin)
        return o.detach()[-1], torch.autograd.grad(o, qkv, do)[0][-1]

    assert (images - 1) * qkv[0].numel() > 2**31
    near = run(qkv[-1:].detach().clone(), do[-1:])
    for ours, alone in zip(run(qkv, do), near):
        torch.testing.assert_close(ours, alone, rtol=2**-6, atol=2**-6)
