"""What a call of an op costs the CPU before a GPU has anything to do, beside a bare call through torch.ops.

python -m benchmarks.host_cost [--op mlp …] [--rounds 200] [--calls 20] [--results FILE.json]

Triton's launches do nothing here; all that comes before them happens as for a GPU: checks, the choice of the backend,
torch's dispatch, autograd, tile tables, the memory of the results; of `block`, whose launches are made again from a
plan, at the second call of a shape and all that follow. The bare op has the same arguments and returns
tensors made beforehand. Both are called in turn, ours first in every second round, and the time is that of this
thread on a CPU: what else happens on the machine meets both. At batch 1 a GPU waits for this.
"""

import argparse
import contextlib
import functools
import json
import pathlib
import statistics
import sys
import time
import types
from collections.abc import Callable
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.jit import JITFunction
from vit_fast.kernels import replay, tile_table

from benchmarks.records import record
from vit_fast import ops
from vit_fast.ops import backend

MODES = {"inference": torch.inference_mode, "with grad": torch.enable_grad}


def cases(mode: str) -> dict[str, Callable]:
    """A call of each public op as a block of a model in bf16 makes it, by the op's name. The shapes cost nothing."""
    B, T, D, F, H = 1, 4, 64, 128, 2

    def tensor(*shape):
        return torch.randn(shape, dtype=torch.bfloat16, requires_grad=mode == "with grad")

    x, norm = tensor(B, T, D), (tensor(D), tensor(D))
    return {
        "block": functools.partial(
            ops.block,
            x,
            *norm,
            *(tensor(3 * D, D), tensor(3 * D), tensor(D, D), tensor(D), tensor(D), None),
            *(tensor(D), tensor(D)),
            *(tensor(F, D), tensor(F), tensor(D, F), tensor(D), tensor(D), None),
            num_heads=H,
        ),
        "ln_linear": functools.partial(ops.ln_linear, x, *norm, tensor(3 * D, D), tensor(3 * D)),
        "attention_qkv": functools.partial(ops.attention_qkv, tensor(B, T, 3, H, D // H)),
        "linear_residual": functools.partial(ops.linear_residual, x, tensor(D, D), tensor(D), x, tensor(D)),
        "mlp": functools.partial(ops.mlp, x, *norm, tensor(F, D), tensor(F), tensor(D, F), tensor(D), tensor(D)),
        "patch_embed": functools.partial(
            ops.patch_embed,
            torch.randn(B, 3, 32, 32).bfloat16(),
            tensor(D, 3, 16, 16),
            tensor(D),
            tensor(5, D),
            tensor(1, D),
        ),
    }


class _Compiled:
    """A kernel whose launcher does nothing."""

    function, packed_metadata = 0, (4, 1, 0)

    @staticmethod
    def run(*numbers) -> None:
        pass


def _no_launch(kernel, *args, grid, warmup, **kwargs) -> type:
    return _Compiled


@contextlib.contextmanager
def launches_do_nothing():
    """A block in which the kernels are chosen for CPU tensors with a Hopper's tiles, and no launch does anything."""
    streams = types.SimpleNamespace(active=types.SimpleNamespace(get_current_stream=lambda index: 0))
    with (
        mock.patch.object(JITFunction, "run", _no_launch),
        mock.patch.object(replay, "_run", _no_launch),
        mock.patch.object(replay, "driver", streams),
        mock.patch.object(replay, "_plans", {}),
        mock.patch.object(tile_table, "architecture", functools.cache(lambda device: "sm_90")),
        mock.patch.object(backend, "why_not_triton", functools.cache(lambda device: "")),
    ):
        tile_table.forget()
        try:
            yield
        finally:
            tile_table.forget()


class _Calls(TorchDispatchMode):
    """Notes the call of every op of ours: the op, its arguments and what it returns."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        if func.namespace == "vit_fast":
            self.seen.append((func, args, result))
        return result


def bare(call: Callable, library: str) -> Callable:
    """A call, through torch.ops, of an op with the arguments of the op behind `call` and a body that does nothing."""
    with _Calls() as calls:
        call()
    ((func, args, result),) = calls.seen
    name, schema = func._schema.name.split("::")[1], str(func._schema)
    op = torch.library.custom_op(
        f"{library}::{name}", lambda *_: result, mutates_args=(), schema=schema[schema.index("(") :]
    )
    op.register_autograd(lambda ctx, *_: (None,) * len(args))
    return functools.partial(getattr(getattr(torch.ops, library), name), *args)


def python_calls(call: Callable) -> list[str]:
    """The Python functions that one call runs, each as "file:function"."""
    found = []

    def profile(frame, event, arg):
        if event == "call":
            found.append(f"{frame.f_code.co_filename}:{frame.f_code.co_name}")

    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(None)
    return found


def microseconds(call: Callable, calls: int) -> float:
    start = time.thread_time_ns()
    for _ in range(calls):
        call()
    return (time.thread_time_ns() - start) / calls / 1e3


def quantiles(values: list[float]) -> dict[str, float]:
    """Median, and what a fifth of the rounds stayed below and above."""
    low, *_, high = statistics.quantiles(values, n=5, method="inclusive")
    return {name: round(v, 2) for name, v in (("median", statistics.median(values)), ("q20", low), ("q80", high))}


def measure(name: str, mode: str, rounds: int, calls: int) -> dict:
    """A row: microseconds of a call of ours and of the bare one, and the ratio of the two, round by round."""
    with MODES[mode]():
        ours = cases(mode)[name]
        pair = {"op_us": ours, "bare_us": bare(ours, f"host_cost_{mode.replace(' ', '_')}")}
        times = {which: [] for which in pair}
        for call in pair.values():
            microseconds(call, 100)
        for index in range(rounds):
            for which in (*pair,) if index % 2 else reversed(pair):
                times[which].append(microseconds(pair[which], calls))
        times["ratio"] = [op / bare for op, bare in zip(*times.values())]
        found = {which: quantiles(values) for which, values in times.items()}
        return {"op": name, "mode": mode, **found, "python_calls": len(python_calls(ours))}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.host_cost", description=__doc__.partition("\n")[0])
    names = tuple(cases("inference"))
    parser.add_argument("--op", nargs="+", default=names, choices=names, metavar="OP")
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--calls", type=int, default=20, help="of one op in a row, a round")
    parser.add_argument("--results", type=pathlib.Path, metavar="FILE.json", help="keep the figures here too")
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    print("op               mode       µs of the op             of a bare op             ratio                  Python")
    print("                            median   q20     q80     median   q20     q80     median   q20     q80    calls")
    rows = []
    with launches_do_nothing():
        for name in arguments.op:
            for mode in MODES:
                r = measure(name, mode, arguments.rounds, arguments.calls)
                rows.append(r)
                columns = " ".join(
                    f"{value:7.1f}" for key in ("op_us", "bare_us", "ratio") for value in r[key].values()
                )
                print(f"{name:16} {mode:10} {columns} {r['python_calls']:8}", flush=True)
    if arguments.results:
        arguments.results.write_text(json.dumps(record(rows), indent=2) + "\n")


if __name__ == "__main__":
    main()
