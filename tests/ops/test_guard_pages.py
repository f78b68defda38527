"""Some of the cases of tests/exhaustive.py, and that what it looks for is seen."""

import contextlib
import random
from unittest import mock

import pytest
import torch
import triton
import triton.language as tl

from tests import exhaustive
from tests.guard import PAGE, counted_writes, guarded
from tests.ops import harness

pytestmark = pytest.mark.interpret

# Of an op: as many as its time allows, 392 in all.
HOW_MANY = {"block": 12, "swiglu": 26, "mlp": 40, "linear_residual": 44, "ln_linear": 44, "patch_embed": 44}
HOW_MANY |= {"attention": 35, "attention_qkv": 20, "attention_maps": 35, "rope_attention": 24, "window_attention": 24}
HOW_MANY["patch_embed of bytes"] = 44
LAYOUTS = (*exhaustive.LAYOUTS, *exhaustive.FAR)


def _some() -> list[exhaustive.Case]:
    """Of each op one case of every layout, and others by chance."""
    cases, some = exhaustive.systematic(), []
    for op, count in HOW_MANY.items():
        draw, of_op = random.Random(op), [case for case in cases if case.op == op]
        chosen = [draw.choice([case for case in of_op if case.layout == layout]) for layout in LAYOUTS]
        some += chosen + draw.sample([case for case in of_op if case not in chosen], count - len(chosen))
    return some


def _named(case: exhaustive.Case) -> str:
    place = "start" if case.at_start else "end"
    return "-".join(map(str, (case.op, *case.sizes, case.mode, case.layout.replace(" ", "_"), place, case.form)))


@pytest.mark.parametrize("case", [pytest.param(case, id=_named(case)) for case in _some()])
def test_nothing_outside_is_touched(case):
    exhaustive.run(case)


def test_some_cases_have_every_layout_place_form_and_dtype():
    cases = _some()
    assert len(cases) == 392
    for op in exhaustive.OPS:
        of_op = [case for case in cases if case.op == op]
        assert {case.mode for case in of_op} == set(harness.MODES), op
        assert {case.form for case in of_op} == {"table", "other"}, op
        assert {case.at_start for case in of_op} == {True, False}, op
        assert {case.layout for case in of_op} == set(LAYOUTS), op


@triton.jit
def _copy_kernel(x_ptr, y_ptr, n, shift, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    tl.store(y_ptr + index, tl.load(x_ptr + index + shift, mask=index < n), mask=index < n)


def _copy(read: int, times: int, shift: int = 0, behind: int = 0) -> None:
    x = guarded(torch.randn(8))
    with counted_writes():
        y = torch.empty(8)
        for _ in range(times):
            _copy_kernel[(1,)](x, y[behind:], read, shift, 16)


def test_a_copy_is_written_once():
    _copy(8, 1)


@pytest.mark.parametrize(
    ("copy", "stride"),
    [
        (lambda t: t.contiguous(), (6, 1)),
        (lambda t: t.reshape(24), (1,)),
        (lambda t: t.to(torch.bfloat16), (1, 4)),
        (lambda t: t.to(t.dtype, copy=True), (1, 4)),
        (lambda t: torch.nn.functional.pad(t, (0, 2)), (8, 1)),
    ],
)
@pytest.mark.parametrize("at_start", [False, True])
def test_what_pytorch_copies_for_a_kernel_is_guarded(copy, stride, at_start):
    """The same numbers, strides and gradient; its end, or its start, touches a protected page."""
    x = torch.randn(6, 4).T.requires_grad_()
    expected = copy(x.detach())
    with counted_writes(at_start):
        found = copy(x)
        assert torch.equal(x.contiguous().contiguous(), x)  # nothing to copy the second time
    assert found.stride() == expected.stride() == stride
    assert torch.equal(found, expected)
    edge = found.data_ptr() if at_start else found.data_ptr() + found.nbytes
    assert edge % PAGE == 0
    assert torch.equal(torch.autograd.grad(found.sum(), x)[0], torch.ones_like(x))


@pytest.mark.parametrize(
    ("read", "times", "wrong"), [(8, 2, "0 elements never written, 8 more"), (7, 1, "1 elements never written")]
)
def test_writes_are_counted(read, times, wrong):
    with pytest.raises(AssertionError, match=wrong):
        _copy(read, times)


def test_a_write_past_what_was_allocated_is_refused():
    with pytest.raises(Exception, match="memory that it did not allocate"):
        _copy(8, 1, behind=1)


@pytest.mark.parametrize(
    ("before", "by_it", "wrong"),
    [(1, 1, None), (0, 1, "not written once"), (2, 1, "not written once"), (1, 0, "128 elements never written")],
)
def test_what_is_turned_in_place_is_written_once_before_and_once_by_it(before, by_it, wrong):
    """As the gradients of queries and keys are."""
    from vit_fast.kernels import rope

    x, table = guarded(torch.randn(1, 4, 2, 1, 16)), guarded(torch.randn(3, 16))
    with pytest.raises(AssertionError, match=wrong) if wrong else contextlib.nullcontext(), counted_writes():
        y = torch.empty(x.shape)
        for _ in range(before):
            rope.rotate(x, y, table, table, False, True)
        with contextlib.nullcontext() if by_it else mock.patch.object(rope, "_rotate_kernel"):
            rope.rotate(y, y, table, table, False, True)


@pytest.mark.parametrize("shift", [1, -1])
def test_a_touched_page_ends_the_process_and_names_the_case(shift):
    def work(say):
        say("begins", f"shifted by {shift}")
        # A tensor of a whole page touches both guards.
        x = guarded(torch.randn(1024))
        with counted_writes():
            _copy_kernel[(1,)](x, torch.empty(1024), 1024, shift, 1024)

    found = exhaustive._in_a_process(work)
    assert found["fault"] == f"the process ended by SIGSEGV in shifted by {shift}"
    assert found["cases"] == [f"shifted by {shift}"]
