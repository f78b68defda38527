"""Calls made again from a plan: the same numbers to the same launchers, with addresses that are right."""

import contextlib
import ctypes
import itertools
import os
import random
import threading
import types
import weakref

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing to launch again", allow_module_level=True)

import triton
from triton.runtime.jit import JITFunction
from vit_fast.kernels import replay, tile_table

from benchmarks.host_cost import cases, launches_do_nothing


@triton.jit
def _add(x_ptr, pair, out_ptr, n):
    """out[:n] = x[:n] + pair[0][:n]·pair[2], or without pair[0] where it is None; run by `launcher`, never compiled."""


def read(place, count: int) -> torch.Tensor:
    """The numbers at a tensor's address, or at an address."""
    address = place.data_ptr() if isinstance(place, torch.Tensor) else place
    return torch.frombuffer((ctypes.c_float * count).from_address(address), dtype=torch.float32)


class Compiled:
    """What triton would return of a launch of `_add`; it does what that should."""

    function, packed_metadata = 5, (4, 1, 0)

    def __init__(self):
        self.launched = []

    def run(self, x, y, z, stream, *arguments):
        self.launched.append(((x, y, z), stream, arguments[:5], arguments[5:]))
        x_ptr, (y_ptr, _, scale), out_ptr, n = arguments[5:]
        total = read(x_ptr, n).clone()
        if y_ptr is not None:
            total += read(y_ptr, n) * scale
        read(out_ptr, n).copy_(total)


@pytest.fixture
def compiled(monkeypatch):
    """Launches are run by `Compiled`; each is what triton itself would hand to a launcher."""
    one = Compiled()

    def run(kernel, *, grid, warmup, **given):
        arguments = [given[name] for name in kernel.arg_names]
        one.run(*(*grid, 1, 1)[:3], 77, one.function, one.packed_metadata, None, None, None, *arguments)
        return one

    monkeypatch.setattr(JITFunction, "run", run)
    monkeypatch.setattr(replay, "_run", run)
    monkeypatch.setattr(replay, "KNOWN", True)
    monkeypatch.setattr(
        replay, "driver", types.SimpleNamespace(active=types.SimpleNamespace(get_current_stream=lambda index: 77))
    )
    monkeypatch.setattr(replay, "_plans", {})
    return one


@replay.replayed
def sums(x, others, scale):
    """x[2:] + scale·others[0], and that plus x[2:] once more, by way of memory between the two."""
    y, nothing = others
    n = len(x) - 2
    between, first, second = torch.empty(n + 7), torch.empty(n), torch.empty(n)
    _add[(n,)](x_ptr=x[2:], pair=(y, None, scale), out_ptr=between[3:], n=n)
    _add[(n, 2)](x_ptr=between[3:], pair=(None, nothing, 1.0), out_ptr=first, n=n)
    _add[(n,)](x_ptr=first, pair=(x[2:], None, 1.0), out_ptr=second, n=n)
    return first, (second, None)


def copy_of(x):
    """By one launch, in memory of its own."""
    out = torch.empty(len(x))
    _add[(1,)](x_ptr=x, pair=(None, None, 1.0), out_ptr=out, n=len(x))
    return out


def drawn(n: int = 9) -> tuple:
    return torch.randn(n), (torch.randn(n - 2), None), 0.5


def assert_right(found, x, others, scale):
    first, (second, nothing) = found
    torch.testing.assert_close(first, x[2:] + scale * others[0])
    torch.testing.assert_close(second, first + x[2:])
    assert nothing is None


def test_a_call_made_again_reads_and_writes_its_own_tensors(compiled):
    calls = [drawn() for _ in range(5)]
    results = [sums(*call) for call in calls]
    assert len(replay._plans) == 1
    assert None not in replay._plans.values()
    for call, found in zip(calls, results):  # after all of them: nobody wrote into another's results
        assert_right(found, *call)
    by_triton, again = compiled.launched[:3], compiled.launched[3:6]
    for (grid, stream, constants, given), (grid2, stream2, constants2, given2) in zip(by_triton, again):
        assert (grid, stream, constants) == (grid2, stream2, constants2)
        assert given[3] == given2[3]
        assert [type(one) for one in given2] == [int, tuple, int, int], "addresses, no tensors"


@pytest.mark.parametrize(
    "other",
    [
        (torch.randn(8), (torch.randn(6), None), 0.5),
        (torch.randn(9), (torch.randn(7), None), 0.25),
        (torch.randn(18)[::2], (torch.randn(7), None), 0.5),
        (torch.randn(11)[2:], (torch.randn(7), None), 0.5),  # by 8 bytes, and triton asks by 16
        (torch.randn(9), (torch.randn(7).double(), None), 0.5),
    ],
    ids=["shape", "setting", "stride", "alignment", "dtype"],
)
def test_what_differs_has_a_plan_of_its_own(other, compiled):
    sums(*drawn())
    with contextlib.suppress(AssertionError):
        sums(*other)
    assert len(replay._plans) == 2


def test_another_tile_is_another_plan(compiled):
    sums(*drawn())
    tile_table.forget()
    assert_right(sums(*(call := drawn())), *call)
    assert len(replay._plans) == 2


def test_another_function_is_another_plan(compiled):
    @replay.replayed
    def first_only(x, others, scale):
        return copy_of(x)

    sums(*(call := drawn()))
    torch.testing.assert_close(first_only(*call), call[0])


def test_another_device_is_another_plan():
    one = torch.empty(3)
    other = one.to("meta")
    assert one.data_ptr() % 16 == other.data_ptr() % 16
    assert replay._key(sums, [one]) != replay._key(sums, [other])


def test_a_call_made_again_is_on_the_stream_of_its_device(compiled, monkeypatch):
    sums(*drawn())
    asked = []
    active = types.SimpleNamespace(get_current_stream=lambda index: asked.append(index) or 77)
    monkeypatch.setattr(replay, "driver", types.SimpleNamespace(active=active))
    sums(*(call := drawn()))
    assert asked == [call[0].device.index]


def test_a_call_made_again_has_memory_for_descriptors(compiled, monkeypatch):
    sums(*drawn())
    launched = []

    @contextlib.contextmanager
    def scratch():
        launched.append(len(compiled.launched))
        yield
        launched.append(len(compiled.launched))

    monkeypatch.setattr(replay, "scratch_memory", scratch)
    sums(*drawn())
    assert launched == [3, 6], "begun before the first launch, left behind the last"


def test_who_wants_to_see_every_launch_does(compiled, monkeypatch):
    sums(*drawn())
    seen = []
    run = JITFunction.run

    def noting(kernel, **given):
        seen.append(kernel)
        return run(kernel, **given)

    monkeypatch.setattr(JITFunction, "run", noting)
    assert_right(sums(*(call := drawn())), *call)
    assert seen == [_add] * 3


def test_a_tool_that_comes_during_the_first_call_stays(compiled):
    run = JITFunction.run

    def tool(kernel, **given):
        return run(kernel, **given)

    @replay.replayed
    def copied(x):
        out = copy_of(x)
        JITFunction.run = tool
        return out

    copied(torch.randn(4))
    assert JITFunction.run is tool


def test_who_keeps_what_notes_keeps_nothing_alive(compiled):
    kept = []

    @replay.replayed
    def copied(x):
        kept.append(JITFunction.run)
        return copy_of(x)

    copied(torch.randn(4))
    out = torch.empty(4)
    kept[0](_add, grid=(1,), warmup=False, x_ptr=out, pair=(None, None, 1.0), out_ptr=out, n=4)
    compiled.launched.clear()
    gone = weakref.ref(out)
    del out
    assert gone() is None


def test_what_another_thread_launches_is_not_noted(compiled):
    @replay.replayed
    def copied(x):
        thread = threading.Thread(target=copy_of, args=(torch.ones(4),))
        thread.start()
        thread.join()
        return copy_of(x)

    copied(torch.randn(4))
    (plan,) = replay._plans.values()
    assert len(plan.steps) == 1


def test_first_calls_of_two_threads_take_turns(compiled, monkeypatch):
    """One that began to note while another did would take the other's later launches from its plan."""
    noting, begun, key = threading.Event(), threading.Event(), replay._key
    other = threading.Thread(target=replay.replayed(copy_of), args=(torch.randn(5),))

    def late(function, flat):  # past the question who is noting
        if threading.current_thread() is other:
            begun.set()
            noting.wait(5)
        return key(function, flat)

    @replay.replayed
    def copied_twice(x):
        between = copy_of(x)
        noting.set()
        other.join(0.3)
        return copy_of(between)

    monkeypatch.setattr(replay, "_key", late)
    other.start()
    begun.wait(5)
    copied_twice(torch.randn(4))
    other.join()
    torch.testing.assert_close(copied_twice(x := torch.randn(4)), x)


@pytest.mark.parametrize("hook", [types.SimpleNamespace(calls=[print]), print], ids=["in a chain", "alone"])
@pytest.mark.parametrize("name", ["launch_enter_hook", "launch_exit_hook"])
def test_a_profilers_hooks_are_called(name, hook, compiled, monkeypatch):
    sums(*drawn())
    before = len(compiled.launched)
    monkeypatch.setattr(replay.knobs.runtime, name, hook)
    sums(*drawn())
    assert all(isinstance(given[0], torch.Tensor) for *_, given in compiled.launched[before:]), "by triton itself"


def test_another_triton_is_left_alone(compiled, monkeypatch):
    monkeypatch.setattr(replay, "KNOWN", False)
    assert_right(sums(*(call := drawn())), *call)
    assert not replay._plans


def test_parts_of_one_tensor_are_told_apart_by_where_they_lie(compiled):
    """As the parameters of a sharded model: the next block's lie elsewhere in theirs."""
    for gap in (0, 5, 11):
        whole = torch.randn(64)
        call = whole[:9], (whole[12 + 4 * gap : 19 + 4 * gap], None), 0.5
        assert_right(sums(*call), *call)
    assert len(replay._plans) == 1


def test_the_same_tensor_twice_is_never_a_plan(compiled):
    """Whose address it was could not be told."""

    @replay.replayed
    def doubled(x, y):
        out = torch.empty(len(x))
        _add[(1,)](x_ptr=x, pair=(y, None, 1.0), out_ptr=out, n=len(x))
        return out

    x = torch.randn(5)
    for _ in range(2):
        torch.testing.assert_close(doubled(x, x), 2 * x)
    assert list(replay._plans.values()) == [None]
    y = torch.randn(5)
    torch.testing.assert_close(doubled(x, y), x + y)


def test_a_call_without_a_launch_is_never_a_plan(compiled):
    @replay.replayed
    def zeros(x):
        return torch.zeros(len(x))

    for _ in range(2):
        assert torch.equal(zeros(torch.randn(4)), torch.zeros(4))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"n": 0}, "an argument has no name"),
        ({"x_ptr": 0, "pair": ((None,), None, 1.0), "out_ptr": 0, "n": 0}, "a tuple in a tuple"),
    ],
)
def test_arguments_of_no_plan(given, says, compiled):
    with pytest.raises(replay.NoPlan, match=says):
        replay.plan_of([], None, [(compiled, _add, (1,), given)])


@pytest.mark.parametrize("what", ["an input", "part of memory", "the same twice"])
def test_results_that_are_not_memory_of_their_own(what, compiled):
    @replay.replayed
    def gives(x):
        out = torch.empty(2 * len(x))
        _add[(1,)](x_ptr=x, pair=(None, None, 1.0), out_ptr=out, n=len(x))
        return {"an input": x, "part of memory": out[: len(x)], "the same twice": (out, out)}[what]

    for _ in range(2):
        gives(torch.randn(4))
    assert list(replay._plans.values()) == [None]


def test_large_calls_leave_memory_to_the_allocator(compiled, monkeypatch):
    monkeypatch.setattr(replay, "LARGEST", 63)
    sums(*drawn())
    assert_right(sums(*(call := drawn())), *call)
    assert list(replay._plans.values()) == [None]


def test_the_first_call_holds_no_memory_for_long(compiled, monkeypatch):
    """Where there is much, launches are forgotten as soon as that shows."""
    monkeypatch.setattr(replay, "LARGEST", 40)  # `between` alone has 56 bytes, twice that with the others
    call = drawn()
    results, launches = replay._noted(sums.__wrapped__, call)
    assert_right(results, *call)
    assert launches == []


def test_plans_do_not_grow_without_end(compiled, monkeypatch):
    monkeypatch.setattr(replay, "MOST", 4)
    for n in range(4, 16):
        assert_right(sums(*(call := drawn(n))), *call)
        assert len(replay._plans) <= 4


@pytest.mark.parametrize("mode", ["inference", "with grad"])
def test_a_block_hands_the_same_numbers_to_its_launchers(mode, monkeypatch):
    """All but the addresses of what it makes; what is read of the inputs is at their addresses."""
    seen, recorded = [], {}

    def launched(kernel, *, grid, warmup, **given):
        one = recorded.setdefault(
            (kernel, grid), types.SimpleNamespace(function=len(recorded), packed_metadata=(4, 1, 0))
        )
        one.run = lambda *numbers: seen.append(numbers)
        arguments = [given[name] for name in kernel.arg_names]
        one.run(*(*grid, 1, 1)[:3], 0, one.function, one.packed_metadata, None, None, None, *arguments)
        return one

    grad = torch.enable_grad() if mode == "with grad" else torch.inference_mode()
    with launches_do_nothing(), grad, monkeypatch.context() as patch:
        patch.setattr(JITFunction, "run", launched)
        patch.setattr(replay, "_run", launched)
        call = cases(mode)["block"]
        operands = [t for t in call.args if isinstance(t, torch.Tensor)]

        def passes():
            y = call()
            return torch.autograd.grad(y, operands, torch.ones_like(y)) if mode == "with grad" else y

        passes()
        count = len(seen)
        passes()
        assert None not in replay._plans.values()
    assert count == {"inference": 7, "with grad": 21}[mode]
    first, second = seen[:count], seen[count:]
    inputs, moved = {t.data_ptr() for t in operands}, {}
    for index, (numbers, again) in enumerate(zip(first, second, strict=True)):
        if index == 7:  # backward is a call of its own, which may take the memory that forward's gave back
            assert_apart(moved)
            moved = {}
        for value, other in zip(flat(numbers), flat(again), strict=True):
            if isinstance(value, torch.Tensor):
                assert isinstance(other, int)
                if value.data_ptr() in inputs:
                    assert other == value.data_ptr()
                    continue
                storage = value.untyped_storage()
                begin = other - (value.data_ptr() - storage.data_ptr())
                place = moved.setdefault(storage.data_ptr(), (begin, begin + storage.nbytes(), [index, index]))
                assert begin == place[0]
                place[2][1] = index
            else:
                assert value == other
    assert_apart(moved)


def assert_apart(moved: dict) -> None:
    """No two tensors share memory while a launch of both is still to come."""
    for one, other in itertools.combinations(moved.values(), 2):
        (begin, end, (first, last)), (begin2, end2, (first2, last2)) = one, other
        assert end <= begin2 or end2 <= begin or last < first2 or last2 < first


def test_between_launches_memory_is_taken_again():
    spans = [replay.Span(30, 0, 1), replay.Span(20, 1, 2), replay.Span(10, 2, 3), replay.Span(25, 2, 3)]
    begins, size = replay.cut_block(spans)
    assert begins == [0, 30, 0, 50], "the third in the place of the first, the fourth nowhere in it"
    assert size == 75


def test_no_two_tensors_between_launches_share_a_place():
    draw = random.Random(5)
    for _ in range(200):
        spans = sorted(
            (
                replay.Span(draw.randrange(1, 9), first, first + draw.randrange(4))
                for first in draw.choices(range(8), k=9)
            ),
            key=lambda span: span.first,
        )
        begins, size = replay.cut_block(spans)
        assert_apart(
            {
                number: (begin, begin + span.size, (span.first, span.last))
                for number, (begin, span) in enumerate(zip(begins, spans))
            }
        )
        assert size == max(begin + span.size for begin, span in zip(begins, spans))


def flat(numbers) -> list:
    found = []
    for one in numbers:
        found.extend(flat(one) if isinstance(one, tuple) else [one])
    return found
