"""The block on a device: its cases, a ViT's sizes, descriptors and pointers, other threads, CUDA graphs."""

import threading

import pytest
import torch
import triton
from vit_fast.kernels import product, replay, tile_table

from tests.gpu.conftest import captured_in_a_graph
from tests.ops.harness import MODES, hold_to_the_rule
from tests.ops.test_block import CASES, PEER, case, composed, shaped
from vit_fast import reference, verify
from vit_fast.ops import block

SIZED = [
    case("ViT-S at two images", shaped(2, 197, 384, 1536), 6),
    case("many rows", shaped(11, 197, 128, 512), 2),
    # Rows of 257 numbers are no multiple of 16 bytes.
    case("hidden width through pointers", shaped(2, 65, 64, 257), 1),
]


@pytest.fixture(autouse=True)
def _no_plans_of_another_test():
    replay._plans.clear()
    yield
    replay._plans.clear()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CASES + SIZED, ids=str)
def test_output_and_gradients(case, mode):
    hold_to_the_rule(block, composed(reference), composed(PEER), case, mode, "triton", "cuda")


@pytest.fixture(params=[0, 1], ids=["few rows", "many rows"])
def run(request):
    """A run of a sized case in bf16, always on the same operands: output and gradients."""
    return _run(SIZED[request.param])


def _run(case):
    drawn = case.draw()
    args = {name: None if t is None else t.to("cuda", torch.bfloat16) for name, t in drawn.items()}
    wanted = [t.requires_grad_() for name, t in args.items() if t is not None and not name.startswith("drop")]
    upstream = torch.randn_like(args["x"])

    def run():
        y = block(**args, **case.options)
        return [y.detach(), *torch.autograd.grad(y, wanted, upstream)]

    return run


def test_descriptors_and_pointers_agree(run, monkeypatch):
    """They differ in how a tile comes: the same products in the same order, so the same bits."""
    expected = run()
    monkeypatch.setattr(product, "aligned", lambda *_: False)
    tile_table.forget()  # and with the tiles the plan of the call before
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(run(), expected))


@pytest.mark.parametrize("case", [*CASES[:2], *SIZED], ids=str)
def test_a_call_made_again_gives_the_bits_of_triton(case, monkeypatch):
    """On operands of its own, with memory that is full of other numbers; and it is made from a plan."""
    replay._plans.clear()
    runs = [_run(case) for _ in range(3)]
    for run in runs:
        run()
    assert replay._plans
    assert None not in replay._plans.values()
    noise = [torch.full((1 << 22,), torch.nan, device="cuda") for _ in range(16)]
    del noise
    again = [run() for run in runs]
    monkeypatch.setattr(replay, "KNOWN", False)
    for run, ours in zip(runs, again):
        assert all(torch.equal(one, other) for one, other in zip(ours, run()))


@pytest.mark.parametrize("case", [CASES[2], *SIZED], ids=str)
def test_frozen_parameters_change_no_bit_of_the_input_gradient(case):
    """Fewer launches, and a plan of their own: the second call is made from it."""
    drawn = case.draw()
    args = {name: None if t is None else t.to("cuda", torch.bfloat16) for name, t in drawn.items()}
    upstream, found = torch.randn_like(args["x"]), []
    for trained in (True, False, True, False):
        for name, t in args.items():
            if t is not None:
                t.requires_grad_(name == "x" or (trained and not name.startswith("drop")))
        found.append(torch.autograd.grad(block(**args, **case.options), args["x"], upstream)[0])
    assert all(torch.equal(found[0], one) for one in found[1:])


def test_a_thread_that_never_set_an_allocator(run):
    """A new thread has none: Triton's own answer to a descriptor there is an error."""
    expected, found = run(), []
    thread = threading.Thread(target=lambda: found.append(run()))
    thread.start()
    thread.join()
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found[0], expected))


def test_the_users_allocator_is_left_in_place(run):
    calls = []

    def mine(size, alignment, stream):
        calls.append(size)
        return torch.empty(size, dtype=torch.int8, device="cuda")

    triton.set_allocator(mine)
    try:
        run()
        assert triton.runtime._allocation._allocator.get() is mine
        assert not calls
    finally:
        triton.set_allocator(triton.runtime._allocation._NULL_ALLOCATOR)


def test_captured_with_its_descriptors(run):
    """Their memory is the graph's own: a replay after the allocator's cache was emptied and filled gives the same."""
    graph, captured, expected = captured_in_a_graph(run)
    torch.cuda.empty_cache()
    fill = [torch.randint(255, (1 << 20,), dtype=torch.uint8, device="cuda") for _ in range(64)]
    graph.replay()
    torch.cuda.synchronize()
    del fill
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(captured, expected))


@pytest.mark.parametrize("dtype", verify.DTYPES)
@pytest.mark.parametrize("case", verify.EVERY_CLASS, ids=lambda case: f"{case.op}-{list(case.shapes[0])}")
def test_every_entry_of_the_table_in_force(case, dtype):
    """Not the winner alone: the miscompiles that are known are of single tiles. tests/test_verify.py says that these
    cases come to every entry."""
    wrong = [line for line in verify.verify_entries("cuda", [case], [dtype]) if line["agrees"] is False]
    assert not wrong, "\n".join(map(str, wrong))


def test_a_thousand_runs_give_the_same_bits(run):
    """No atomics, no race: forward and backward of a block."""
    expected = run()
    for _ in range(1000):
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(run(), expected))


def test_memory_between_the_launches_of_inference():
    """As tests/test_launches.py counts it: 6·D numbers a token, of a call that is too large for a plan."""
    drawn = case("ViT-B at 256 images", shaped(256, 197, 768, 3072), 12).draw()
    args = {name: None if t is None else t.to("cuda", torch.bfloat16) for name, t in drawn.items()}
    with torch.no_grad():
        block(**args, num_heads=12)  # whatever is made once
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        block(**args, num_heads=12)
    assert torch.cuda.max_memory_allocated() - before < 6.1 * args["x"].nbytes
