"""Every kernel on memory that ends, or begins, at a page no one may touch: `make exhaustive`.

python -m tests.exhaustive [--seed 0] [--random 3400] [--workers N]

One case is one op, for inference, then forward and backward, in the interpreter. Its tensors end at the second or begin
at the first of two protected pages, in a layout; what the kernels allocate does so too and is full of NaN, and every
element of it must be written exactly once, and nothing else (what is turned in place, once before and once by it).
What comes out is compared with fp64, coarsely: what this run looks for is a wrong address; every op is held to the
error rule (tests/error_rule.py) elsewhere.

Cases are every op, dtype, layout, place and form at the sizes around its tiles, then what Hypothesis draws. They run in
batches, each in a process of its own: a touched page ends that process, and the case is known. A batch that passed is
noted in build/, and a run that was cut goes on there. `make test` runs some of each: tests/ops/test_guard_pages.py.
"""

import argparse
import contextlib
import functools
import itertools
import multiprocessing
import os
import pathlib
import random
import re
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor

from tests import counts
from tests.guard import counted_writes, guarded, vast
from tests.interpreting import mended_on_one_thread, started_interpreting
from tests.ops import (
    harness,
    test_attention,
    test_block,
    test_linear_residual,
    test_ln_linear,
    test_mlp,
    test_patch_embed,
    test_rope_attention,
    test_swiglu,
    test_window_attention,
)
from vit_fast import ops, reference
from vit_fast.ops.attention import HEAD_WIDTHS
from vit_fast.ops.window_attention import HEAD_WIDTHS as WINDOW_HEAD_WIDTHS

# Of the largest true element, or of 1 where that is smaller.
# In fp16 one gradient of 7,000 cases, a sum that all but cancels, was 0.022 off where PyTorch's own was 0.016.
TOLERANCE = {"fp32": 1e-4, "fp16": 0.05, "bf16": 0.1, "autocast": 0.1}
EPS = 1e-2  # of a LayerNorm: two numbers may be all of a row, and next to each other, where less magnifies any rounding
FAR = {"past 2^31": 1_100_000_000, "past 2^32": 2_200_000_000}  # strides, in elements, of which the second lies there
BATCH = 50


# ---- what is called ------------------------------------------------------------------------------------------------


def _attention_case(batch: int, queries: int, keys: int, heads: int, width: int, full: bool) -> harness.Case:
    draw = test_attention.shaped(batch, queries, heads, width, keys)
    return harness.Case("attention", draw, {"scale": None if full else 0.3})


def _packed_case(batch: int, tokens: int, heads: int, width: int, full: bool) -> harness.Case:
    draw = test_attention.shaped_qkv(batch, tokens, heads, width)
    return harness.Case("packed attention", draw, {"scale": None if full else 0.3})


def _maps_case(batch: int, queries: int, keys: int, heads: int, width: int, full: bool) -> harness.Case:
    draw = test_attention.shaped_qk(batch, queries, heads, width, keys)
    return harness.Case("maps", draw, {"scale": None if full else 0.3})


def _rope_case(batch: int, tokens: int, before: int, heads: int, width: int, full: bool) -> harness.Case:
    draw = test_rope_attention.shaped(batch, tokens, heads, width, max(1, tokens - before), full)
    options = {"interleaved": full, "scale": None if full else 0.3}
    return harness.Case("turned", draw, options, test_rope_attention.TABLES)


def _window_case(
    batch: int, down: int, across: int, high: int, wide: int, heads: int, width: int, full: bool
) -> harness.Case:
    window, shift = (high, wide), (high // 2, (wide + 1) // 2 % wide) if full else (0, 0)
    draw = test_window_attention.shaped(batch, down * high, across * wide, heads, width, window)
    return harness.Case("windows", draw, {"window": window, "shift": shift, "scale": None if full else 0.3})


def _products_case(module, *shape: int, full: bool, **named) -> harness.Case:
    """A case of an op whose test has `shaped(*shape, bias=…, …)`."""
    alone = module is test_ln_linear
    draw = module.shaped(
        *shape, **named, **dict.fromkeys(("bias",) if alone else ("bias", "layer_scale", "drop"), full)
    )
    return harness.Case("a product", draw, {} if module is test_linear_residual else {"eps": EPS}, constant=("drop",))


def _block_case(batch: int, tokens: int, heads: int, head_width: int, hidden: int, full: bool) -> harness.Case:
    return test_block.case("block", test_block.shaped(batch, tokens, heads * head_width, hidden, full), heads)


def _patch_case(
    batch: int, channels: int, rows: int, columns: int, high: int, wide: int, width: int, full: bool, of_bytes: bool
) -> harness.Case:
    sizes = batch, channels, (rows, columns), (high, wide), width, 2 if full else 0, "all" if full else None, full
    if of_bytes:
        return test_patch_embed.bytes_case("patches", *sizes)
    return test_patch_embed.case("patches", test_patch_embed.shaped(*sizes))


@dataclass(frozen=True)
class Op:
    """An op, its reference in fp64, its case of sizes, and the sizes around its tiles of 32 x 32 x 32."""

    call: Callable
    truth: Callable
    case: Callable
    boundaries: list[tuple[int, ...]]
    ranges: tuple[tuple[int, int], ...]  # of each size, for random ones


_PRODUCT = [
    *((1, 1, 1, 1), (1, 31, 33, 32), (2, 16, 32, 64), (1, 33, 31, 33)),
    *((3, 11, 17, 65), (1, 65, 48, 20), (5, 1, 40, 8), (2, 24, 16, 129)),
    (2, 130, 104, 20),  # weight gradients of two spans of tokens; columns of tiles without a share of their sums
]
_ANY_PRODUCT = ((1, 4), (1, 50), (1, 90), (1, 90))
_ATTENTION = [
    *((1, 1, 1, 2, 16), (2, 16, 17, 1, 32), (1, 33, 31, 1, 72), (1, 32, 32, 3, 48)),
    *((1, 17, 65, 1, 80), (1, 113, 100, 1, 16), (2, 5, 49, 1, 104), (1, 12, 7, 2, 128)),
]


def _product_op(name: str, module, last: str) -> Op:
    def case(batch: int, tokens: int, width: int, other: int, full: bool) -> harness.Case:
        return _products_case(module, batch, tokens, width, full=full, **{last: other})

    return Op(getattr(ops, name), getattr(reference, name), case, _PRODUCT, _ANY_PRODUCT)


def _patch_op(of_bytes: bool) -> Op:
    return Op(
        *(ops.patch_embed, reference.patch_embed, functools.partial(_patch_case, of_bytes=of_bytes)),
        [
            *((1, 1, 1, 1, 1, 1, 1), (2, 3, 4, 4, 4, 4, 32), (1, 3, 3, 11, 2, 3, 33), (1, 4, 5, 6, 4, 4, 65)),
            *((3, 2, 1, 7, 7, 3, 31), (2, 1, 8, 4, 1, 16, 16), (1, 3, 2, 2, 14, 14, 24), (1, 1, 9, 15, 1, 1, 8)),
        ],
        ((1, 3), (1, 4), (1, 6), (1, 6), (1, 9), (1, 9), (1, 70)),
    )


OPS = {
    "ln_linear": _product_op("ln_linear", test_ln_linear, "features"),
    "linear_residual": _product_op("linear_residual", test_linear_residual, "features"),
    "mlp": _product_op("mlp", test_mlp, "hidden"),
    "swiglu": _product_op("swiglu", test_swiglu, "hidden"),
    "patch_embed": _patch_op(of_bytes=False),
    "attention": Op(
        *(ops.attention, reference.attention, _attention_case, _ATTENTION),
        ((1, 2), (1, 120), (1, 120), (1, 2), (0, 9)),
    ),
    "attention_qkv": Op(
        *(ops.attention_qkv, test_attention.unpacked(reference.attention), _packed_case),
        [
            *((1, 1, 2, 16), (2, 17, 1, 32), (1, 33, 1, 72), (1, 32, 3, 48)),
            *((1, 65, 1, 80), (1, 113, 1, 16), (2, 49, 1, 104), (1, 12, 2, 128)),
        ],
        ((1, 2), (1, 120), (1, 2), (0, 9)),
    ),
    "attention_maps": Op(
        *(ops.attention_maps, reference.attention_probabilities, _maps_case, _ATTENTION),
        ((1, 2), (1, 80), (1, 80), (1, 2), (0, 9)),
    ),
    "rope_attention": Op(
        *(ops.rope_attention, reference.rope_attention, _rope_case),
        [
            *((1, 1, 0, 1, 16), (2, 16, 5, 2, 32), (1, 33, 1, 3, 72), (1, 32, 0, 4, 48)),
            *((3, 17, 16, 1, 80), (1, 35, 2, 1, 88), (2, 5, 4, 5, 104), (1, 12, 3, 2, 128)),
        ],
        ((1, 2), (1, 80), (0, 6), (1, 5), (0, 9)),
    ),
    "window_attention": Op(
        *(ops.window_attention, reference.window_attention, _window_case),
        [
            *((1, 1, 1, 1, 1, 1, 16), (2, 1, 3, 1, 2, 2, 32), (1, 2, 2, 7, 7, 1, 32), (3, 2, 1, 4, 4, 2, 16)),
            *((1, 1, 2, 8, 8, 1, 64), (5, 1, 1, 3, 5, 1, 16), (1, 3, 1, 1, 17, 2, 16), (1, 1, 2, 2, 2, 7, 64)),
        ],
        ((1, 3), (1, 3), (1, 3), (1, 5), (1, 5), (1, 3), (0, 2)),
    ),
    "block": Op(
        *(ops.block, test_block.composed(reference), _block_case),
        [
            *((1, 1, 1, 16, 1), (2, 16, 2, 16, 64), (1, 33, 1, 48, 33), (1, 31, 2, 32, 31)),
            *((3, 11, 1, 16, 65), (1, 65, 1, 32, 20), (2, 5, 3, 16, 40), (4, 8, 1, 32, 96)),
        ],
        ((1, 3), (1, 40), (1, 2), (0, 3), (1, 70)),
    ),
    "patch_embed of bytes": _patch_op(of_bytes=True),
}


# ---- where its tensors lie -----------------------------------------------------------------------------------------


def _poisoned(t: Tensor) -> Tensor:
    """Full of NaN, or of the largest byte."""
    return t.fill_(torch.nan if t.is_floating_point() else 255)


def _wider(t: Tensor, at_start: bool) -> tuple[Tensor, Callable]:
    """Columns cut out of rows that have three more, at the end of the memory or at its start; NaN between."""
    base = _poisoned(t.new_empty(*t.shape[:-1], t.shape[-1] + 3))
    cut = (..., slice(0, -3) if at_start else slice(3, None))
    base[cut] = t
    return base, lambda x: x[cut]


def _every_other(axis: int) -> Callable:
    def place(t: Tensor, at_start: bool) -> tuple[Tensor, Callable]:
        if t.dim() < -axis:
            return _wider(t, at_start)
        base = _poisoned(t.repeat_interleave(2, axis))
        cut = (..., slice(0 if at_start else 1, None, 2), *[slice(None)] * (-axis - 1))
        base[cut] = t
        return base, lambda x: x[cut]

    return place


def _turned(t: Tensor, at_start: bool) -> tuple[Tensor, Callable]:
    """Axes in another order in memory: a transposed matrix, tokens before images, heads before tokens."""
    if t.dim() < 2:
        return t, lambda x: x
    a, b = (1, 2) if t.dim() == 4 else (0, 1)
    return t.transpose(a, b).contiguous(), lambda x: x.transpose(a, b)


LAYOUTS = {
    "dense": lambda t, at_start: (t, lambda x: x),
    "cut out of wider rows": _wider,
    "every other row": _every_other(-2),
    "every other element": _every_other(-1),
    "axes turned": _turned,
}


@dataclass(frozen=True)
class Case:
    """One call of an op, forward and backward."""

    op: str
    sizes: tuple[int, ...]
    full: bool  # with every operand that may be absent
    mode: str
    layout: str
    at_start: bool  # memory begins at a guard page, and does not end at one
    form: str  # "table": descriptors where they can be, heads as a whole; "other": pointers, and heads streamed
    seed: int = 0

    def place(self, t: Tensor) -> Tensor:
        """A copy of a tensor, guarded and in this layout, or with its first axis far apart."""
        if self.layout in FAR:
            return vast(t, FAR[self.layout]) if len(t) > 1 else t
        base, view = LAYOUTS[self.layout](t, self.at_start)
        return view(guarded(base, self.at_start))

    def place_operand(self, name: str, t: Tensor) -> Tensor:
        """Far apart are images, rows and the rows of weights; a vector, or a table that is packed first, is dense."""
        packed = name in ("position", "prefix", "table") or (name == "weight" and t.dim() > 2)
        if self.layout in FAR and (t.dim() < 2 or packed):
            return guarded(t, self.at_start)
        return self.place(t)


@contextlib.contextmanager
def _in_form(form: str) -> Iterator[None]:
    """Where it is the form: pointers, heads streamed, four sums of a bias, two of a table at a time, few tokens that a
    program turns. In both few tokens make two spans."""
    import triton.language as tl
    from vit_fast.kernels import attention, linear, product, rope, window_attention

    with contextlib.ExitStack() as replaced:
        replaced.enter_context(mock.patch.object(linear, "PARTIAL_TOKENS", 10))
        linear.split_tokens.cache_clear()
        replaced.callback(linear.split_tokens.cache_clear)
        if form == "table":
            yield
            return
        replaced.enter_context(mock.patch.object(attention, "_whole", return_value=None))
        # Fewer than two spans of four columns of tiles would share.
        replaced.enter_context(mock.patch.object(linear, "MOST_SUMS", tl.constexpr(4)))
        replaced.enter_context(mock.patch.object(window_attention, "FINISH_CHUNKS", 2))
        replaced.enter_context(mock.patch.object(rope, "PAIRS", 256))
        for module in (product, linear):
            pointers = mock.patch.object(module, "described", lambda tile, _: {**tile, "TMA": 0})
            replaced.enter_context(pointers)
        yield


def run(case: Case) -> None:
    """Run one case.

    Raises:
        AssertionError: where memory was written that was not given, not once, or with a wrong number; a page that no
            one may touch ends the process.
    """
    torch.manual_seed(case.seed)
    op, dtype = OPS[case.op], harness.MODES[case.mode]
    amp = torch.autocast("cpu", torch.bfloat16, enabled=case.mode == "autocast")
    made = op.case(*case.sizes, full=case.full)
    drawn = {name: harness.rounded(t, dtype) for name, t in made.draw().items()}
    wanted = [name for name, t in drawn.items() if t is not None and name not in made.constant]
    if case.op == "attention_maps":
        wanted = []
    exact = {name: harness.rounded(t, torch.float64) for name, t in drawn.items()}
    for name in wanted:
        exact[name].requires_grad_()
    truth = op.truth(**exact, **made.options)
    upstream = torch.randn(truth.shape, dtype=torch.float64).to(dtype)
    placed = {name: None if t is None else case.place_operand(name, t).detach() for name, t in drawn.items()}
    for name in wanted:
        placed[name].requires_grad_()
    upstream_placed = case.place(upstream)
    with _in_form(case.form), ops.use_backend("triton"):
        with counted_writes(case.at_start), torch.no_grad(), amp:
            inferred = op.call(**placed, **made.options)
        with counted_writes(case.at_start), amp:
            result = op.call(**placed, **made.options)
            found = torch.autograd.grad(result, [placed[name] for name in wanted], upstream_placed) if wanted else ()
    right = torch.autograd.grad(truth, [exact[name] for name in wanted], upstream.double()) if wanted else ()
    outputs = {"inference": (inferred, truth), "output": (result, truth)}
    for name, (ours, exactly) in (outputs | {name: pair for name, *pair in zip(wanted, found, right)}).items():
        error = (ours.detach().double() - exactly.detach()).abs().amax()
        limit = TOLERANCE[case.mode] * max(1.0, exactly.detach().abs().amax().item())
        assert error <= limit, f"{name}: an error of {error:.3e}, over {limit:.3e}"  # NaN is over any limit


# ---- which cases ---------------------------------------------------------------------------------------------------


def systematic() -> list[Case]:
    """Every op at its boundary sizes, dtype, layout, place and form; then rows far apart."""
    found = []
    for name, op in OPS.items():
        settings = itertools.product(harness.MODES, LAYOUTS, (False, True), ("table", "other"))
        for index, (mode, layout, at_start, form) in enumerate(settings):
            chance = random.Random(f"{name} {index}")
            # The three that multiply halves have the same addresses: of each half the sizes.
            count = len(op.boundaries) if mode == "fp32" else len(op.boundaries) // 2
            for sizes in chance.sample(op.boundaries, count):
                full = chance.random() < 0.5
                found.append(Case(name, sizes, full, mode, layout, at_start, form, len(found)))
        found += [
            Case(name, sizes, full, mode, layout, False, form, index)
            for index, (sizes, full, mode, layout, form) in enumerate(
                itertools.product(far_sizes(name), (True, False), ("fp16", "bf16"), FAR, ("table", "other"))
            )
        ]
    return found


def far_sizes(op: str) -> list[tuple[int, ...]]:
    """Few images, of one token each where an op takes rows: a view of two axes cannot be one of rows."""
    if op.startswith("patch_embed"):
        return [(3, 2, 2, 2, 4, 4, 3)]
    if op == "attention_qkv":
        return [(3, 5, 2, 16)]
    if op == "rope_attention":
        return [(3, 5, 2, 2, 16)]
    if op == "window_attention":
        return [(3, 1, 1, 2, 3, 1, 16)]
    if op.startswith("attention"):
        return [(3, 5, 7, 2, 16)]
    return [(3, 1, 1, 16, 3)] if op == "block" else [(3, 1, 16, 3)]


def random_case():
    """A strategy of Hypothesis: any op at any size that a test can afford."""
    from hypothesis import strategies as st

    def sized(name: str):
        sizes = st.tuples(*(st.integers(low, high) for low, high in OPS[name].ranges))
        if name.startswith("attention") or name == "rope_attention":
            sizes = sizes.map(lambda s: (*s[:-1], HEAD_WIDTHS[s[-1]]))
        if name == "window_attention":
            sizes = sizes.map(lambda s: (*s[:-1], WINDOW_HEAD_WIDTHS[s[-1]]))
        if name == "block":
            sizes = sizes.map(lambda s: (*s[:3], HEAD_WIDTHS[s[3]], s[4]))
        return st.builds(
            Case,
            st.just(name),
            sizes,
            st.booleans(),
            st.sampled_from(list(harness.MODES)),
            st.sampled_from(list(LAYOUTS)),
            st.booleans(),
            st.sampled_from(["table", "other"]),
            st.integers(0, 2**31),
        )

    return st.sampled_from(list(OPS)).flatmap(sized)


# ---- the run -------------------------------------------------------------------------------------------------------


def _run_chosen(say: Callable, cases: list[Case]) -> None:
    for case in cases:
        say("begins", repr(case))
        run(case)


def _run_random(say: Callable, count: int, seed: int) -> None:
    import hypothesis

    settings = hypothesis.settings(
        max_examples=count, database=None, deadline=None, suppress_health_check=list(hypothesis.HealthCheck)
    )

    @hypothesis.seed(seed)
    @settings
    @hypothesis.given(random_case())
    def each(case: Case) -> None:
        say("begins", repr(case))
        run(case)

    each()


def _in_a_process(work: Callable, *arguments) -> dict:
    """{"cases": those that began, "fault": "" or what went wrong, "MiB": the most that the process held}."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)

    def child() -> None:
        here.close()
        fault = ""
        try:
            work(lambda *what: there.send(what), *arguments)
        except BaseException as error:
            fault = f"{type(error).__name__}: {error}"
        there.send(("ends", fault, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024))
        there.close()
        os._exit(0)  # not by the handlers of a pool of threads that this process does not have

    process = context.Process(target=child)
    process.start()
    there.close()
    found = {"cases": [], "fault": "no word", "MiB": 0}
    with contextlib.suppress(EOFError):
        while True:
            what, *rest = here.recv()
            if what == "begins":
                found["cases"].append(rest[0])
            else:
                found["fault"], found["MiB"] = rest
    process.join()
    if process.exitcode:
        found["fault"] = f"the process ended by {signal.Signals(-process.exitcode).name}"
    if found["fault"]:
        found["fault"] += f" in {found['cases'][-1] if found['cases'] else 'no case'}"
    return found


def batches(seed: int, drawn: int) -> dict[str, tuple]:
    """Name → (function, arguments) of each batch."""
    chosen = systematic()
    named = {f"chosen {at}": (_run_chosen, chosen[at : at + BATCH]) for at in range(0, len(chosen), BATCH)}
    for at in range(0, drawn, BATCH):
        named[f"random {seed}.{at}"] = (_run_random, min(BATCH, drawn - at), seed * 1_000_003 + at)
    return named


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.exhaustive", description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, default=0, help="of the random cases (0)")
    parser.add_argument("--random", type=int, default=3400, help="random cases, some of them drawn twice (3400)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes at a time (one a core)")
    given = parser.parse_args()
    started_interpreting("tests.exhaustive")
    mended_on_one_thread()
    from vit_fast.kernels import product

    imported = pathlib.Path(product.__file__).resolve().parent
    if imported != counts.ROOT / "kernels":
        parser.error(
            f"the kernels that are imported are those of {imported}, not of this tree: it wants a .venv of its own"
        )
    # What is noted is of the code that ran: another's does not count.
    code = counts.digest("kernels", "vit_fast", "tests")
    notes = counts.Notes(f"exhaustive-{given.seed}-{given.random}-{code}")
    done = {line["batch"]: line for line in notes.lines}
    left = {name: work for name, work in batches(given.seed, given.random).items() if name not in done}
    print(f"{len(done)} batches are done, {len(left)} to go, {given.workers} at a time", flush=True)

    def one(name: str) -> dict:
        start = time.monotonic()
        return {"batch": name, **_in_a_process(*left[name]), "seconds": round(time.monotonic() - start, 1)}

    faults = []
    with ThreadPoolExecutor(given.workers) as pool:
        for number, line in enumerate(pool.map(one, left), 1):
            print(f"{number}/{len(left)}  {line['batch']}: {len(line['cases'])} cases, {line['seconds']} s", flush=True)
            if line["fault"]:
                faults.append(line["fault"])
                print(f"  FAULT  {line['fault']}", flush=True)
                continue
            done[line["batch"]] = line
            notes.add(line)
    if faults:
        return 1
    of = {kind: [case for name, line in done.items() if name.startswith(kind) for case in line["cases"]]
          for kind in ("chosen", "random")}  # fmt: skip
    # Where the numbers alone differ it is the same case.
    distinct = {kind: len({re.sub(r", seed=\d+", "", case) for case in cases}) for kind, cases in of.items()}
    path = counts.keep(
        "exhaustive",
        "Kernels on tensors between protected pages, forward and backward: no page is touched, every element that is "
        "allocated is written exactly once, or once more where it is turned in place, and no other, no result has a "
        "number of poison.",
        f"python -m tests.exhaustive --seed {given.seed} --random {given.random}",
        sum(line["seconds"] for line in done.values()) / given.workers,
        {
            "cases": sum(distinct.values()),
            "of random sizes, by Hypothesis": distinct["random"],
            "with rows past 2^31 or 2^32 elements": sum("past 2^" in case for case in set(of["chosen"])),
            "faults": 0,
            "MiB that a process held at most": max(line["MiB"] for line in done.values()),
        },
    )
    print(f"no fault in {sum(distinct.values())} cases: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
