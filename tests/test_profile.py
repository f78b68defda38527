"""The time of each kernel beside its floor: whose floor an event gets, and that the program runs to the end."""

import functools
import json
import os

import pytest
import torch

pytest.importorskip("triton", reason="floors are those of its launches")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the launches are caught where triton would compile them", allow_module_level=True)

import vit_fast
from benchmarks import profile
from benchmarks.launches import Launch, kernel_name, model_launches
from benchmarks.profile import Row
from benchmarks.roofline import work

RATES = {"matrix_tflops": 800.0, "copy_tbs": 4.0}
PYTORCHS = "void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>>"
COPY = "Memcpy DtoD (Device -> Device)"


@pytest.fixture(scope="module")
def launches() -> list[Launch]:
    """Of a training step; five files of kernels have a `_forward_kernel` among them."""
    seen = model_launches("vit_tiny_patch16_224", "sm_90", 2, training=True)
    return [step for step in seen if isinstance(step, Launch)]


def trace_of(names: list[str], us: list[float]) -> dict:
    """A Chrome trace of kernels one after the other, written in another order, among what is no kernel."""
    kernels = [
        {"ph": "X", "cat": "gpu_memcpy" if name == COPY else "kernel", "name": name, "ts": 1e6 + 10 * at, "dur": dur}
        for at, (name, dur) in enumerate(zip(names, us))
    ]
    others = [
        {"ph": "X", "cat": "cpu_op", "name": "aten::fill_", "ts": 1e6, "dur": 5.0},
        {"ph": "X", "cat": "gpu_user_annotation", "name": "Optimizer.step", "ts": 1e6, "dur": 500.0},
        {"ph": "X", "cat": "cuda_runtime", "name": "cudaLaunchKernel", "ts": 1e6, "dur": 3.0},
        {"ph": "M", "name": "process_name", "args": {"name": "python"}},
    ]
    return {"traceEvents": [*others, *reversed(kernels)]}


def test_an_event_gets_the_floor_of_its_own_launch(launches):
    names, us, expected = [PYTORCHS], [7.0], {PYTORCHS: [1, 7.0, None], COPY: [1, 2.0, None]}
    for number, launch in enumerate(launches):
        names.append(launch.kernel.__name__)
        us.append(100.0 + number)
        todo = work(launch)
        sums = expected.setdefault(kernel_name(launch.kernel), [0, 0.0, 0.0])
        sums[0] += 1
        sums[1] += us[-1]
        sums[2] += max(todo.bytes / 4e6, todo.flops / 800e6)
    names, us = [*names, COPY], [*us, 2.0]
    rows = profile.device_rows(profile.device_events(trace_of(names, us)), launches, RATES)
    assert {row.name: [row.launches, row.us, row.floor] for row in rows} == {
        name: [count, time, None if floor is None else pytest.approx(floor)]
        for name, (count, time, floor) in expected.items()
    }
    alike = [name for name in expected if name.endswith(".forward")]
    assert len(alike) == 5, "kernels of one name, told apart"
    for row in rows:
        assert row.to_win is None if row.floor is None else row.to_win == pytest.approx(row.us - row.floor)
    everything = profile.summed("all", rows)
    assert (everything.launches, everything.us) == (len(us), pytest.approx(sum(us)))
    assert everything.flops == sum(work(launch).flops for launch in launches)
    with_floors = [row for row in rows if row.floor is not None]
    assert everything.to_win == pytest.approx(sum(row.us - row.floor for row in with_floors)), "PyTorch's are not in it"


@pytest.mark.parametrize("change", [lambda names: names[1:], lambda names: names[:1] + names])
def test_a_launch_too_many_or_too_few_is_an_error(change, launches):
    events = [(name, 1.0) for name in change([launch.kernel.__name__ for launch in launches])]
    with pytest.raises(RuntimeError, match=r"_kernel: the profiler saw \d+ launches, the model makes \d+"):
        profile.device_rows(events, launches, RATES)


def test_most_to_win_comes_first():
    rows = [
        Row("PyTorch's, short", 1, 10.0),
        Row("at its floor", 1, 900.0, 1e9, 899.0, 1.0),
        Row("PyTorch's, long", 1, 5000.0),
        Row("far above it", 1, 300.0, 1e9, 100.0, 200.0),
        Row("below it: from a cache", 1, 3.0, 0, 4.0, -1.0),
    ]
    order = ["far above it", "at its floor", "below it: from a cache", "PyTorch's, long", "PyTorch's, short"]
    assert [row.name for row in profile.in_order(rows)] == order


def test_what_is_unknown_is_left_empty():
    assert profile.line(Row("fill", 2, 25.0), 100.0).split() == ["fill", "2", "25.0", "25.0%"]
    known = profile.line(Row("mlp.fc1", 12, 50.0, 3e9, 40.0, 10.0), 100.0)
    assert known.split() == ["mlp.fc1", "12", "3.00", "50.0", "40.0", "10.0", "50.0%"]
    assert len(known) == len(profile.HEAD)
    assert len(profile.line(Row(3 * PYTORCHS, 1, 1.0), 1.0)) == len(profile.HEAD), "a long name is cut"


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here: python -m benchmarks.profile")
@pytest.mark.parametrize(("which", "op"), [("forward", "aten::addmm"), ("training", "aten::mm")])
def test_the_program_rehearsed(which, op, monkeypatch, tmp_path, capsys):
    small = functools.partial(vit_fast.create_model, depth=1, embed_dim=32, num_heads=2, img_size=32)
    monkeypatch.setattr(vit_fast, "create_model", small)
    command = ["--model", "vit_tiny_patch16_224", "--pass", which, "--batch-size", "1"]
    profile.main([*command, "--trace", str(tmp_path / "trace.json")])
    title, head, *lines = capsys.readouterr().out.splitlines()
    assert "a rehearsal" in title
    assert head == profile.HEAD
    *cells, total = [line[58:].split() for line in lines]  # launches, GFLOP or none, µs, share
    assert op in [line[:58].strip() for line in lines]
    times = [float(row[-2]) for row in cells]
    assert times == sorted(times, reverse=True)
    assert sum(times) == pytest.approx(float(total[-2]), abs=0.05 * len(times) + 0.1), "each is rounded to a tenth"
    assert sum(int(row[0]) for row in cells) == int(total[0])
    assert total[-1] == "100.0%"
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
