"""Writes tests/README.md: what is covered, from pytest's own collection of the tests, and what the long runs counted.

python -m tests.readme [--check]
"""

import argparse
import collections
import contextlib
import io
import json
import pathlib
import sys

import pytest

from tests import counts
from tests.interpreting import started_interpreting
from tests.ops import harness

README = pathlib.Path(__file__).parent / "README.md"
LONG_RUNS = ("test", "exhaustive", "mutants", "faults", "hostile", "numbers", "leaks", "compatibility")
# Test → the op where its file is another's, the passes where it has no backward, the backend where it has no parameter.
HELD = {
    "test_output_and_gradients": {},
    "test_every_cut_in_pieces": {},
    "test_packed_output_and_gradients": {"op": "attention_qkv"},
    "test_maps": {"op": "attention_maps", "passes": "forward"},
    "test_in_pytorch_it_is_its_four_ops": {"backend": "torch"},
}

START = """# What is tested

Written by `python -m tests.readme`, from the tests as pytest collects them and from the counts in
[results](results); a test fails where this page is not what they give.

`make test` runs all of it but the marked slow, on two cores, without a GPU: kernels run in Triton's interpreter. `make
test-all` runs the slow tests too, `make exhaustive` and `make mutants` the long runs below, and `pytest tests/gpu` the
same cases on a GPU. To find a test: an op's are in `ops/test_OP.py`, everything else is named after what it tests.
"""

OPS = """## Ops

Each case is drawn anew, every parameter too, and held to the error rule ([error_rule.py](error_rule.py)): output and
the gradient of every operand that has one, against float64, at most twice the error of unfused PyTorch in the same
dtype, and an eighth of that dtype's epsilon; so are the rows, of which the worst may have twice as much again. Results
lie in poisoned memory that ends at a protected page, and so do the operands. Attention maps have no gradient in the
kernels; their rows are held to a few roundings of fp32. A block in PyTorch is held to its four ops, to the bit.

{table}

By head dim or activation, how many cases in each dtype, in Triton and in PyTorch:

{kinds}

### The cases

Sizes of each tensor as the case draws them.

{cases}
"""

GUARDED = """## Addresses

`tests/ops/test_guard_pages.py` has {count} of the cases of `make exhaustive`: nothing outside is touched, every element
that a kernel allocates is written once, what is turned in place once before that and once by it. How many by op and
layout. Of each op some are in each of {modes}, at the end and at the start of their memory, through descriptors and
heads as a whole ("table"), and through pointers and heads streamed ("other"); `make exhaustive` has all of these with
each other. Operands past 2^31 and 2^32 are of 16 bits, or bytes, and lie in memory that ends far from them, at no
protected page:

{table}
"""

LEFT_OUT = """## Not covered, and why

- **Bytes, windows and rotary positions in the long runs below**, which are of the commits that they name. What is here
  of them is what `make test` runs: every mode and layout between protected pages, some cases of each.
- **The compiler.** The interpreter runs what a kernel says, not what a GPU's compiler makes of it. What it makes is
  compiled without a GPU for ten architectures (`make static`: registers, spills, shared memory, instructions), and
  run by `tests/gpu` on the one GPU that was at hand, an H200. Not run on any other: sm_80, sm_86, sm_89, sm_100,
  sm_120 and AMD's gfx90a, gfx942, gfx950, gfx1100 are compiled, never measured, never checked.
- **Attention for Hopper** (`kernels/hopper_attention.py`) is written in Gluon, which has no interpreter: its numbers
  are tested on a device alone (`tests/gpu`), its memory there by compute-sanitizer's memcheck; here it is compiled and
  looked at.
- **Races.** The interpreter runs one program after the other. No kernel has atomics or two writers of one element: the
  writes are counted, see above. On an H200 compute-sanitizer's racecheck was run over a case of each: one hazard, in
  what the compiler makes round attention for Hopper's warps ([docs/performance.md](../docs/performance.md)).
- **bf16 on a CPU** is the interpreter's as `mend_interpreter.py` mends it: rounded to nearest even, products exact in
  fp32. A GPU's tensor cores sum in another order.
- **The order of a product's sums.** That an image has the same bits alone and in a batch is tested here with products
  summed in fp64, for numpy's product sums some rows of a tile in another order than others: it shows that nothing else
  depends on the batch. A tensor core's order is the device's, which `tests/gpu` asks for: the same bits there too.
- **Two GPUs, NCCL.** Two processes are tested on CPUs with gloo, in a loop of the test's own, for `vit-fast train` is
  of one process. The kernels know of no other process; what could differ is DDP's and FSDP2's overlap with a stream
  that the kernels run on, and what is said when a peer is gone, which is the transport's.
- **Every case everywhere.** Cases of attention in pieces, of long heads and of several heads a program are there for
  the kernels' ways through a head: they run in Triton alone, and without autocast, which casts before the op. Head dims
  are all run packed (`attention_qkv`), separate ones in part. Sums over 8,192 are slow in the interpreter: `make test`
  has one case of them, in fp32, `make test-all` the others.
- **A long run that was cut** goes on where it was for `tests.exhaustive` and `tests.mutants`; the others, of some
  minutes each, begin again.
- **Out of memory on a GPU**, a driver that is reset, a GPU that throttles.
- **Files from the hubs.** There is no network in the tests: the published names and shapes of DINO, DINOv2, MAE,
  OpenAI's and Google's files are tested, not the files.
- **Outputs past 2^31 elements.** Inputs reach past 2^31 and 2^32 in memory that is reserved and not filled; a result of
  that size would have to be filled. What every product writes with is tested alone (`ops/test_offsets.py`).
- **Windows and macOS.** Triton is Linux's; PyTorch's backend has nothing of its own there, and was not run there.
"""


def collected(*paths: str) -> list[pytest.Item]:
    """The tests as pytest collects them, nothing of it printed."""

    class Plugin:
        def pytest_collection_modifyitems(self, items):
            self.items = list(items)

    plugin = Plugin()
    with contextlib.redirect_stdout(io.StringIO()) as said:
        status = pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", *paths], plugins=[plugin])
    if status:
        raise RuntimeError(f"pytest's collection ended with {status}:\n{said.getvalue()}")
    return plugin.items


def table(rows: list[dict]) -> str:
    """A table in Markdown of rows with the same keys."""
    names = list(rows[0])
    lines = [names, ["---"] * len(names), *([str(row[name]) for name in names] for row in rows)]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _of(item: pytest.Item, what: str, otherwise: str) -> str:
    return HELD[item.originalname].get(what, otherwise)


def _backend(item: pytest.Item) -> str:
    return item.callspec.params.get("backend") or _of(item, "backend", "triton")


def _held(items: list) -> dict[str, list]:
    """Op → the tests of it that hold a case to the error rule."""
    found = collections.defaultdict(list)
    for item in items:
        if item.path.parent.name == "ops" and item.originalname in HELD and "mode" in item.callspec.params:
            found[_of(item, "op", item.path.stem.removeprefix("test_"))].append(item)
    return dict(sorted(found.items()))


def _ops_table(held: dict[str, list]) -> str:
    rows = []
    for op, items in held.items():
        parameters = [item.callspec.params for item in items]
        cases = {str(p["case"]): p["case"] for p in parameters}
        by_backend = collections.Counter(map(_backend, items))
        rows.append(
            {
                "op": f"`{op}`",
                "passes": _of(items[0], "passes", "forward, backward"),
                "dtypes": ", ".join(dict.fromkeys(p["mode"] for p in parameters)),
                "cases": len(cases),
                "Triton": by_backend["triton"],
                "PyTorch": by_backend["torch"],
            }
        )
    return table(rows)


def _kinds(held: dict[str, list]) -> str:
    rows, modes = [], list(harness.MODES)
    for op, items in held.items():
        found = collections.defaultdict(collections.Counter)
        for item in items:
            p = item.callspec.params
            activation = p["case"].options.get("activation")
            drawn = p["case"].draw()
            heads = drawn.get("qkv", drawn.get("q"))
            kind = activation or (f"head dim {heads.shape[-1]}" if heads is not None else None)
            if kind:
                found[kind][p["mode"], _backend(item)] += 1
        for kind in sorted(found, key=lambda kind: (len(kind), kind)):
            cells = {mode: f"{found[kind][mode, 'triton']} + {found[kind][mode, 'torch']}" for mode in modes}
            rows.append({"op": f"`{op}`", "head dim or activation": kind} | cells)
    return table(rows)


def _cases(held: dict[str, list]) -> str:
    parts = []
    for op, items in held.items():
        cases = {str(item.callspec.params["case"]): item.callspec.params["case"] for item in items}
        rows = []
        for case in cases.values():
            drawn = {name: list(t.shape) for name, t in case.draw().items() if t is not None}
            options = ", ".join(f"{name} {value}" for name, value in case.options.items())
            rows.append({"case": case.why, "sizes": _sizes(drawn), "with": options or "-"})
        parts.append(f"`{op}`\n\n{table(rows)}")
    return "\n\n".join(parts)


def _sizes(drawn: dict[str, list[int]]) -> str:
    """Tensors by their shape, those of one shape together."""
    by_shape = collections.defaultdict(list)
    for name, shape in drawn.items():
        by_shape[tuple(shape)].append(name)
    return ", ".join(f"{' '.join(names)} {list(shape)}" for shape, names in by_shape.items())


def _guarded(items: list) -> str:
    cases = [
        item.callspec.params["case"]
        for item in items
        if item.path.stem == "test_guard_pages" and hasattr(item, "callspec") and "case" in item.callspec.params
    ]
    layouts = dict.fromkeys(case.layout for case in cases)
    rows = [
        {"op": f"`{op}`"}
        | {layout: sum(case.op == op and case.layout == layout for case in cases) for layout in layouts}
        for op in dict.fromkeys(case.op for case in cases)
    ]
    modes = ", ".join(dict.fromkeys(case.mode for case in cases))
    return GUARDED.format(count=len(cases), modes=modes, table=table(rows))


def _long_runs() -> str:
    parts = ["## Long runs\n\nWhat each counted when it last ran to its end; the figures are those of its file.\n"]
    for path in sorted(counts.RESULTS.glob("*.json")):
        kept = json.loads(path.read_text())
        versions = ", ".join(f"{name} {version}" for name, version in kept["versions"].items())
        parts.append(
            f"### [{path.stem}](results/{path.name})\n\n{kept['what']}\n\n"
            f"`{kept['command']}`, {kept['date']}, {kept['duration_s']} s on {kept['machine']}; {versions}; commit "
            f"{kept['commit']}\n"
        )
        parts.append(table([{"count": name, "": f"{number:,}"} for name, number in kept["counts"].items()]) + "\n")
        if missed := kept.get("missed"):
            parts.append(table([{"missed": name, "why": why} for name, why in missed.items()]) + "\n")
        if rows := kept.get("table"):
            parts.append(table(rows) + "\n")
    never = [name for name in LONG_RUNS if not (counts.RESULTS / f"{name}.json").is_file()]
    if never:
        parts.append(f"Not yet run to the end: {', '.join(f'`tests.{name}`' for name in never)}.\n")
    return "\n".join(parts)


def text() -> str:
    """The page."""
    items = collected("tests/ops")
    held = _held(items)
    ops = OPS.format(table=_ops_table(held), kinds=_kinds(held), cases=_cases(held))
    return "\n".join([START, ops, _guarded(items), _long_runs(), LEFT_OUT])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.readme", description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing, fail where the page is another")
    given = parser.parse_args()
    started_interpreting("tests.readme")  # without it, tests of the interpreter would be marked as skipped
    page = text()
    if given.check:
        same = README.is_file() and README.read_text() == page
        if not same:
            print("tests/README.md is not what the tests give: run python -m tests.readme")
        return not same
    README.write_text(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
