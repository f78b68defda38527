"""The time of each kernel of one step beside its floor: where there is most to win.

python -m benchmarks.profile --model NAME --pass forward|training [--batch-size N] [--dtype bf16] [--trace FILE.json]

The times of all kernels, Triton's and PyTorch's own, are those of torch.profiler, in one step after three that are not
looked at: inference, or a training step without its optimiser. A floor is what a launch would take that moved each of
its tensors once at the rate of a copy, or did its products at the matrix rate, whichever is longer; both rates are
measured in the same run, the matrix rate in bf16. Kernels of PyTorch's own have none: the profiler does not say what
they had to do, and the last line's floor is of the others. Rows are sums over the launches of a kernel, those with most
above their floor first.

FILE.json is the step as a Chrome trace, for https://ui.perfetto.dev.

Without a GPU it is rehearsed: in PyTorch, ops in place of kernels, by the CPU's time, no floors. No figure of that
counts.
"""

import argparse
import collections
import json
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity
from vit_fast.kernels import tile_table

import vit_fast
from benchmarks.launches import DTYPES, Launch, kernel_name, model_launches
from benchmarks.roofline import work
from benchmarks.timing import DEVICE, ceilings

ON_THE_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")  # what takes a GPU's time, of a Chrome trace's categories
HEAD = f"{'':58} {'launches':>8} {'GFLOP':>9} {'µs':>11} {'floor':>11} {'to win':>11} {'share':>6}"


# ---- what ran, and what it had to do -------------------------------------------------------------------------------


class Row(NamedTuple):
    """Launches of a kernel: their number, microseconds and operations of products; None where no floor is known."""

    name: str
    launches: int
    us: float
    flops: float = 0
    floor: float | None = None
    to_win: float | None = None  # time above the floor


def summed(name: str, rows: Sequence[Row]) -> Row:
    """One row of several."""
    known = [row for row in rows if row.floor is not None]
    floors = (sum(row.floor for row in known), sum(row.to_win for row in known)) if known else ()
    launches, us, flops = (sum(getattr(row, column) for row in rows) for column in ("launches", "us", "flops"))
    return Row(name, launches, us, flops, *floors)


def device_events(trace: dict) -> list[tuple[str, float]]:
    """(kernel, microseconds) of all that took the device's time in a Chrome trace, in the order in which it ran."""
    events = [event for event in trace["traceEvents"] if event.get("cat") in ON_THE_DEVICE]
    return [(event["name"], event["dur"]) for event in sorted(events, key=lambda event: event["ts"])]


def device_rows(events: Sequence[tuple[str, float]], launches: Sequence[Launch], rates: dict[str, float]) -> list[Row]:
    """What ran on a device, by kernel, beside the floors of the launches at the rates of `ceilings`.

    A profiler knows a Triton kernel by its function's name alone, and several files have a `_forward_kernel`: the
    events of a name are its launches, in their order.

    Raises:
        RuntimeError: where the events of a name are more or fewer than its launches.
    """
    waiting = collections.defaultdict(collections.deque)
    for launch in launches:
        waiting[launch.kernel.__name__].append(launch)
    seen = collections.Counter(name for name, _ in events)
    for name, expected in waiting.items():
        if seen[name] != len(expected):
            raise RuntimeError(f"{name}: the profiler saw {seen[name]} launches, the model makes {len(expected)}")
    by_name = collections.defaultdict(list)
    for name, us in events:
        row = Row(name, 1, us)
        if name in waiting:
            launch = waiting[name].popleft()
            todo = work(launch)
            floor = max(todo.bytes / rates["copy_tbs"], todo.flops / rates["matrix_tflops"]) / 1e6
            row = Row(kernel_name(launch.kernel), 1, us, todo.flops, floor, us - floor)
        by_name[row.name].append(row)
    return [summed(name, rows) for name, rows in by_name.items()]


def op_rows(averages: Iterable) -> list[Row]:
    """The averages of a profile on a CPU, by op: time of its own, that of the ops which it calls apart."""
    return [Row(op.key, op.count, op.self_cpu_time_total, op.flops or 0) for op in averages]


def in_order(rows: Iterable[Row]) -> list[Row]:
    """Most to win first; then what has no floor, by its time."""
    return sorted(rows, key=lambda row: (row.floor is None, -(row.us if row.to_win is None else row.to_win)))


def line(row: Row, total: float) -> str:
    floor, to_win = ("" if us is None else f"{us:.1f}" for us in (row.floor, row.to_win))
    flops = f"{row.flops / 1e9:.2f}" if row.flops else ""
    return f"{row.name:58.58} {row.launches:8} {flops:>9} {row.us:11.1f} {floor:>11} {to_win:>11} {row.us / total:6.1%}"


# ---- the step ------------------------------------------------------------------------------------------------------


def step_of(model: vit_fast.VisionTransformer, batch: int, training: bool) -> Callable:
    """Inference of random images, or a training step without its optimiser."""
    dtype = next(model.parameters()).dtype
    images = torch.randn(batch, 3, *model.patch_embed.img_size, device=DEVICE, dtype=dtype)
    labels = torch.randint(1000, (batch,), device=DEVICE)

    def infer():
        with torch.inference_mode():
            model(images)

    def step():
        model.zero_grad(set_to_none=True)
        F.cross_entropy(model(images).float(), labels).backward()

    return step if training else infer


def profiled(run: Callable, trace: pathlib.Path) -> torch.profiler.profile:
    """The profile of a run after three others, and its Chrome trace in a file."""

    def to_its_end():
        run()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    for _ in range(3):
        to_its_end()
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (DEVICE == "cuda")
    with torch.profiler.profile(activities=activities, with_flops=True) as profile:
        to_its_end()
    profile.export_chrome_trace(str(trace))
    return profile


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.profile", description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, metavar="NAME", help="of vit_fast.list_models()")
    parser.add_argument("--pass", required=True, choices=("forward", "training"), dest="which")
    parser.add_argument("--batch-size", type=int, default=256 if DEVICE == "cuda" else 1)
    parser.add_argument("--dtype", default="bf16", choices=("bf16", "fp16"))
    parser.add_argument(
        "--trace",
        type=pathlib.Path,
        default=pathlib.Path("trace.json"),
        metavar="FILE.json",
        help="where the step's Chrome trace goes (default: trace.json)",
    )
    given = parser.parse_args(argv)
    training = given.which == "training"
    with torch.device(DEVICE):
        model = vit_fast.create_model(given.model, num_classes=1000).to(DTYPES[given.dtype]).train(training)
    run = step_of(model, given.batch_size, training)
    # The kernels, also where `auto` would leave an op to PyTorch: the floors below are of their launches.
    with vit_fast.use_backend("triton" if DEVICE == "cuda" else "auto"):
        profile = profiled(run, given.trace)
    events = device_events(json.loads(given.trace.read_text()))
    print(f"{given.model}, {given.which}, batch {given.batch_size}, {given.dtype}", end=", ")
    if DEVICE == "cuda":
        rates, arch = ceilings(), tile_table.architecture(torch.device(DEVICE))
        # In bf16: those of fp16 have the same bytes and operations.
        steps = model_launches(given.model, arch, given.batch_size, training)
        rows = device_rows(events, [step for step in steps if isinstance(step, Launch)], rates)
        reached = "products at {matrix_tflops} TFLOP/s, copies at {copy_tbs} TB/s".format(**rates)
        print(f"{torch.cuda.get_device_name()}: {reached}")
    else:
        rows = op_rows(profile.key_averages())
        print("a rehearsal: PyTorch's ops on a CPU, and no floors")
    everything = summed("all", rows)
    print(HEAD, *(line(row, everything.us) for row in (*in_order(rows), everything)), sep="\n")


if __name__ == "__main__":
    main()
