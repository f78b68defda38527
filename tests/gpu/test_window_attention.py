"""Windowed attention on a device: the cases of tests/ops, the stages of a Swin, more windows than a device has room."""

import pytest
import torch

from tests.error_rule import relative_error
from tests.gpu.conftest import (
    assert_every_element_is_written,
    assert_the_same_bits_again,
    captured_in_a_graph,
)
from tests.ops.harness import MODES, assert_views_are_read, hold_to_the_rule, named, three_ways
from tests.ops.test_window_attention import CASES, DTYPES, THREE, case, shaped, with_a_flat_table
from vit_fast.ops import use_backend, window_attention
from vit_fast.ops.window_attention import HEAD_WIDTHS

SIZED = [
    case("Swin-T's first stage", 2, 56, 56, 3, 32, window=(7, 7), shift=(3, 3)),
    case("Swin-T's last stage, more heads than an SM has programs", 2, 7, 7, 24, 32, window=(7, 7)),
    case("Swin V2's windows", 2, 64, 64, 3, 32, window=(8, 8), shift=(4, 4)),
    case("more heads than a device has programs", 1, 4, 8, 1100, 16, window=(4, 4), shift=(2, 2)),
    case("a last span that is shorter", 7, 35, 21, 5, 64, window=(7, 7), shift=(3, 3)),
    *(case(f"heads of {width}", 3, 14, 21, 4, width, window=(7, 7), shift=(3, 3)) for width in HEAD_WIDTHS),
    *(
        case(f"windows of {high} x {wide}", 2, 2 * high, 3 * wide, 2, 32, window=(high, wide), shift=(high // 2, 1))
        for high, wide in ((2, 2), (3, 5), (4, 8), (1, 33), (6, 10), (9, 7))
    ),
]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", named(CASES + SIZED))
def test_output_and_gradients(case, mode):
    hold_to_the_rule(*THREE, with_a_flat_table(case), mode, "triton", "cuda")


def test_tf32_where_the_user_says_so():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        got, _, exact = three_ways(*THREE, with_a_flat_table(SIZED[0]), "fp32", "triton", "cuda")
    finally:
        torch.set_float32_matmul_precision(before)
    errors = {name: relative_error(got[name].cpu(), exact[name]) for name in exact}
    assert max(errors.values()) < 2**-8, errors
    assert errors["output"] > 2**-16, "tf32 was allowed and not taken"


def test_views():
    assert_views_are_read(window_attention, SIZED[-1], "triton", "cuda")


def test_a_map_at_an_odd_element():
    """A pointer that no vector load fits."""
    qkv, table = (t.to("cuda", torch.bfloat16) for t in shaped(2, 14, 14, 3, 32, (7, 7))().values())
    odd = torch.empty(qkv.numel() + 1, device="cuda", dtype=torch.bfloat16)[1:].view(qkv.shape).copy_(qkv)
    with use_backend("triton"):
        expected = window_attention(qkv, table, (7, 7), (3, 3))
        assert torch.equal(window_attention(odd, table, (7, 7), (3, 3)), expected)


@pytest.fixture(params=DTYPES)
def run(request):
    """A run of the first stage of a Swin-T, always on the same operands: output and gradients."""
    drawn = shaped(16, 56, 56, 3, 32, (7, 7))()
    qkv, table = (t.to("cuda", MODES[request.param]).requires_grad_() for t in drawn.values())
    upstream = torch.randn(16, 56, 56, 96, device="cuda", dtype=qkv.dtype)

    def run(images=slice(None), trained=True):
        some = qkv[images].detach().requires_grad_()
        with use_backend("triton"):
            o = window_attention(some, table if trained else table.detach(), (7, 7), (3, 3))
        return [o.detach(), *torch.autograd.grad(o, [some, table] if trained else [some], upstream[images])]

    return run


def test_a_thousand_runs_give_the_same_bits(run):
    """No atomics, no race, the table's sums of hundreds of programs among them."""
    assert_the_same_bits_again(run, run(), 1000)


def test_every_element_is_written(run):
    assert_every_element_is_written(run)


def test_an_image_alone_and_beside_a_frozen_table(run):
    """The bits that it has in a batch, output and gradient."""
    o, dqkv, _ = run()
    for images in (slice(3, 4), slice(5, 16)):
        alone = run(images, trained=False)
        assert torch.equal(alone[0], o[images])
        assert torch.equal(alone[1], dqkv[images])


@pytest.mark.parametrize("mode", DTYPES)
def test_a_table_of_ten_thousand_windows(mode):
    """The sum of its gradient over all of them, by the error rule."""
    many = case("10,240 windows", 160, 56, 56, 1, 16, window=(7, 7), shift=(3, 3))
    hold_to_the_rule(*THREE, with_a_flat_table(many), mode, "triton", "cuda")


def test_offsets_pass_two_to_the_31():
    """Maps of 4.3 GB: the last image begins past 2^31 elements, in and out."""
    images = 2**31 // (56 * 56 * 288) + 2
    qkv = torch.zeros(images, 56, 56, 3, 3, 32, device="cuda", dtype=torch.bfloat16)
    qkv[-1].normal_()
    table = torch.randn(169, 3, device="cuda", dtype=torch.bfloat16)
    do = torch.zeros(images, 56, 56, 96, device="cuda", dtype=torch.bfloat16)
    do[-1].normal_()

    def run(qkv, do):
        qkv = qkv.requires_grad_()
        with use_backend("triton"):
            o = window_attention(qkv, table, (7, 7), (3, 3))
        return o.detach()[-1], torch.autograd.grad(o, qkv, do)[0][-1]

    assert (images - 1) * qkv[0].numel() > 2**31
    assert all(map(torch.equal, run(qkv, do), run(qkv[-1:].detach().clone(), do[-1:])))


def test_captured_in_a_graph(run):
    graph, captured, expected = captured_in_a_graph(run)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(captured, expected))
