"""What one call of an op makes the CPU do before its launches: at batch 1 a GPU waits for it. Counted, not timed."""

import dis
import os
import pathlib
import sys

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter's launch is another", allow_module_level=True)

from vit_fast.kernels import tile_table

import vit_fast
from benchmarks.host_cost import MODES, bare, cases, launches_do_nothing, python_calls
from vit_fast.ops.backend import check_shape

# Python functions of one call in inference and with a gradient to come, torch's own among them: a tenth more than there
# are. A bare op through torch.ops runs 9, and 22 to 41.
MOST_CALLS = {
    "block": (119, 160),
    "ln_linear": (58, 83),
    "attention_qkv": (67, 87),
    "linear_residual": (55, 78),
    "mlp": (83, 116),
    "patch_embed": (69, 91),
}
ONCE = {"architecture", "table", "lookup", "residents", "why_not_triton", "_find_and_load"}
NEVER = {"sorted", "list.sort", "str.format", "str.join", "str.split", "str.replace", "eval", "exec", "__import__"}
OURS = tuple(str(pathlib.Path(file).resolve().parent) for file in (vit_fast.__file__, tile_table.__file__))


def slow_work(call) -> list[str]:
    """What a call does that belongs to its first time, or to an error: look-ups in tables, sorting, making strings."""
    found = []

    def trace(frame, event, arg):
        # A frame is asked about its steps where the code is ours: other people's strings are not ours to save.
        ours = str(pathlib.Path(frame.f_code.co_filename).resolve()).startswith(OURS)
        frame.f_trace_opcodes = ours
        if event == "call" and frame.f_code.co_name in ONCE:
            found.append(frame.f_code.co_name)
        if event == "opcode":
            name = dis.opname[frame.f_code.co_code[frame.f_lasti]]
            if name.startswith(("FORMAT_", "BUILD_STRING")):
                found.append(f"a string in {frame.f_code.co_name}")
        return trace

    def profile(frame, event, arg):
        if event == "c_call" and arg.__qualname__ in NEVER:
            found.append(f"{arg.__qualname__} in {frame.f_code.co_name}")

    before = sys.gettrace()
    sys.settrace(trace)
    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(None)
        sys.settrace(before)
    return found


@pytest.fixture(params=MODES)
def mode(request):
    with launches_do_nothing(), MODES[request.param]():
        yield request.param


@pytest.mark.parametrize("op", MOST_CALLS)
def test_python_functions_a_call(op, mode):
    call = cases(mode)[op]
    call()
    seen = python_calls(call)
    most = MOST_CALLS[op][list(MODES).index(mode)]
    assert len(seen) <= most, "\n".join(seen)
    assert len(seen) > len(python_calls(bare(call, f"test_host_cost_{mode[:4]}"))), "the op was called"


@pytest.mark.parametrize("op", MOST_CALLS)
def test_a_second_call_looks_nothing_up_and_builds_no_string(op, mode):
    call = cases(mode)[op]
    call()
    assert not slow_work(call)


def test_slow_work_is_seen(mode):
    assert {"lookup", "residents"} <= set(slow_work(cases(mode)["mlp"]))

    def refused():
        with pytest.raises(ValueError, match="vector: got shape"):
            check_shape("vector", torch.ones(3), (2,))

    assert "a string in _misshapen" in slow_work(refused)
    assert slow_work(lambda: ",".join(sorted("ba"))) == ["sorted in <lambda>", "str.join in <lambda>"]


def test_every_public_op_of_a_block_is_counted():
    assert set(cases("inference")) == set(MOST_CALLS)
