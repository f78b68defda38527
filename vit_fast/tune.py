"""Tiles chosen by measuring on the device at hand: what `vit-fast tune` does.

For each entry of the tile table: candidates near it; those dropped that do not compile, do not fit, spill more than it
does, or give numbers that the error rule refuses; the rest timed side by side; the fastest raced against the entry in
force alone. What wins by a margin is written at once to the file that VIT_FAST_TILES names, or the user's cache, from
where every later process takes it.
"""

import contextlib
import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch

from vit_fast import ops, verify
from vit_fast.checkpoint import replacing
from vit_fast.ops.backend import dtype_name, use_triton

MARGIN = 0.02  # how much faster an entry must be to take another's place
ROUNDS = 20
FLUSH = 1 << 30  # bytes written between two runs
WAIT = 4_000_000  # clocks of a device, some 2 ms: what the slowest pass takes the host to launch
SPILLS = 16  # registers a thread, 64 bytes, as `benchmarks.static --check` allows without a reason
# What a table tells apart, at the sizes that count: ViT-B at 224 with many, some and few rows of tokens, at 384, and
# ViT-H's heads at 224 and at 384.
CASES = [
    case
    for batch, grid, heads, width in (
        (64, 14, 12, 64),
        (8, 14, 12, 64),
        (1, 14, 12, 64),
        (16, 24, 12, 64),
        (32, 14, 16, 80),
        (8, 24, 16, 80),
    )
    for case in verify.cases(batch, grid, 16, heads, width, hidden=4 * heads * width)
]
# The first stage of a Swin-T at 224.
CASES += [verify.windows(64, (7, 7), 3, 32, across=8)]
# Where a block holds a whole head, a table tells more widths apart.
CASES += [verify.Case("attention_qkv", ops.attention_qkv, [(64, 197, 3, 12, width)]) for width in (16, 32, 48, 96, 128)]
# A table's dtype class → the dtypes whose numbers count. The first is the one that is timed.
DTYPES = {"16": (torch.bfloat16, torch.float16), "32": (torch.float32,)}

Key = tuple[str, str, str]  # kernel, dtype class, shape class
Clock = Callable[[Callable[[], object]], float]  # a run → the seconds that it took


class Rejection(NamedTuple):
    """A candidate that did not count."""

    entry: dict
    why: str
    wrong: bool  # it ran, and its numbers are not those of fp64


class Outcome(NamedTuple):
    """What became of one entry. The seconds are those of the op's pass that the kernel belongs to."""

    key: Key
    before: dict
    after: dict  # `before` itself where nothing beats it
    seconds_before: float  # NaN where `before` does not run, or its numbers are wrong
    seconds_after: float  # NaN where nothing was measured: no candidate counts, or no case comes to the entry
    rejected: list[Rejection]


def candidates(entry: dict) -> list[dict]:
    """The numbers of an entry first, then all that differ from them in two at most.

    A tile's side may be halved or doubled, 16 to 256; warps are 4 or 8; the stages of a pipeline one more or fewer; the
    blocks on a multiprocessor of a product that is persistent 1 or 2, of what else is one more or fewer; a product's
    descriptors for all matrices or for the operands alone. What else an entry holds stays.
    """
    from vit_fast.kernels import tile_table

    entry = tile_table.numbers(entry)
    if "PIECES" in entry:
        entry.setdefault("blocks_per_sm", 1)
    choices = []
    for name, value in entry.items():
        others: Iterable[int] = ()
        if name.startswith("BLOCK_"):
            others = (side for side in (value // 2, 2 * value) if 16 <= side <= 256)
        elif name == "num_warps":
            others = (4, 8)
        elif name == "num_stages" or (name == "blocks_per_sm" and "PIECES" not in entry):
            others = (count for count in (value - 1, value + 1) if count)
        elif name == "blocks_per_sm" or (name == "TMA" and value and "PIECES" in entry):
            others = (1, 2)
        choices.append([value, *(other for other in others if other != value)])
    every = (dict(zip(entry, numbers)) for numbers in itertools.product(*choices))
    return [new for new in every if sum(new[name] != entry[name] for name in entry) <= 2]


def device_clock(device: torch.device) -> Clock:
    """Times a run by the device's own clock, with nothing of it in the cache."""
    flush = torch.empty(FLUSH, dtype=torch.int8, device=device)

    def clock(run: Callable[[], object]) -> float:
        with torch.cuda.device(device):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            # While the device writes all this and waits, the launches queue up: their cost on the host is not measured.
            flush.zero_()
            torch.cuda._sleep(WAIT)
            start.record()
            run()
            stop.record()
            stop.synchronize()
        return start.elapsed_time(stop) / 1e3

    return clock


@contextlib.contextmanager
def _compiled() -> Iterator[list]:
    """A list that grows by the compiled kernel of each launch in the block; the interpreter compiles none."""
    from triton.runtime.jit import JITFunction

    from vit_fast.kernels import replay  # noqa: F401 - it must know Triton's own run before another takes its place

    run, found = JITFunction.run, []

    def noting(self, *args, **kwargs):
        found.append(run(self, *args, **kwargs))
        return found[-1]

    JITFunction.run = noting
    try:
        yield found
    finally:
        JITFunction.run = run


class Tuner:
    """Tunes the entries of the table in force for one device.

    Args:
        device: a CUDA or ROCm device.
        cases: what is run to reach the entries. An entry is timed in the pass, forward or backward, that reaches it and
            the fewest others.
        clock: how a run is timed; by the device where it is None.

    Raises:
        ValueError: for a device without its own clock, and a file of the user's that is no table.
        RuntimeError: where no kernel can run.
    """

    def __init__(self, device: torch.device, cases: Sequence[verify.Case] = CASES, clock: Clock | None = None):
        if clock is None and device.type != "cuda":
            raise ValueError(f"device: got {device}, takes a GPU: tiles are chosen by timing them on it")
        with ops.use_backend("triton"):
            use_triton("tune", torch.empty(1, device=device))
        from vit_fast.kernels import tile_table

        self.device, self.cases = device, cases
        self.architecture = tile_table.architecture(device)
        self.file = tile_table.user_file(self.architecture)
        if not self.file.is_file():  # whether it can be written shows before an hour of measuring, not after
            self._write({})
        self.table = tile_table.table(self.architecture)
        self.clock = clock or device_clock(device)
        self._passes: dict[Key, tuple[verify.Case, bool]] = {}

    def keys(self, kernels: Sequence[str] = (), precisions: Sequence[str] = tuple(DTYPES)) -> list[Key]:
        """The entries of these kernels, of all where none is named, in these dtype classes.

        Raises:
            ValueError: for a kernel or a dtype class that the table does not have.
        """
        for name, given, known in (("kernel", kernels, self.table), ("precision", precisions, DTYPES)):
            if unknown := [one for one in given if one not in known]:
                raise ValueError(f"{name}: got {unknown[0]!r}, takes one of {', '.join(known)}")
        chosen = [kernel for kernel in self.table if not kernels or kernel in kernels]
        places = ((kernel, dtype) for kernel in chosen for dtype in precisions)
        return [(kernel, dtype, shape) for kernel, dtype in places for shape in self.table[kernel][dtype]]

    def tune(self, key: Key, progress: Callable[[float], None] = lambda part: None) -> Outcome:
        """Measure the candidates for one entry, and write the one that beats it.

        Args:
            key: one of `keys`.
            progress: called with the part of the candidates that has been tried.

        Raises:
            ValueError: where the file cannot be written, or is no table any more. RuntimeError: where the device itself
                has failed.
        """
        kernel, dtype, shape = key
        before = self.table[kernel][dtype][shape]
        chosen = self._pass(key)
        if chosen is None:
            return Outcome(key, before, before, math.nan, math.nan, [])
        case, backward = chosen
        trials = [verify.Trial(case, self.device, one) for one in DTYPES[dtype]]
        entries = candidates(before)
        good, rejected, allowed = [], [], SPILLS
        for number, entry in enumerate(entries):
            # The entry in force may spill, with a reason; then another may as much.
            spilled, rejection = self._check(key, entry, trials, allowed if number else math.inf)
            if rejection:
                rejected.append(rejection)
            else:
                good.append(entry)
            if number == 0 and not rejection:
                allowed = spilled
            progress((number + 1) / len(entries))
        if not good:
            return Outcome(key, before, before, math.nan, math.nan, rejected)
        run = self._run(trials[0], backward)
        seconds = self._race(key, good, run)
        best = seconds.index(min(seconds))
        old = 0 if good[0] == entries[0] else None
        if best == old:
            return Outcome(key, before, before, seconds[best], seconds[best], rejected)
        if old is None:  # the entry in force does not count: anything that does takes its place
            return Outcome(key, before, self._keep(key, good[best]), math.nan, seconds[best], rejected)
        # The fastest of many is fast by luck too. This race decides.
        final = self._race(key, [good[old], good[best]], run)
        wins = final[1] < (1 - MARGIN) * final[0]
        after = self._keep(key, good[best]) if wins else before
        return Outcome(key, before, after, final[0], final[1 if wins else 0], rejected)

    def _pass(self, key: Key) -> tuple[verify.Case, bool] | None:
        """The case that comes to an entry, and whether it does so in its backward pass."""
        if key not in self._passes:  # again where an entry that does not launch had kept others from being reached
            self._passes |= self._all_passes(DTYPES[key[1]][0])
        return self._passes.get(key)

    def _all_passes(self, dtype: torch.dtype) -> dict[Key, tuple[verify.Case, bool]]:
        """Each entry's pass: of all that look it up, the one that looks up the fewest."""
        from vit_fast.kernels import tile_table

        found = []
        for case in self.cases:
            tensors = [torch.randn(shape, device=self.device, dtype=dtype) for shape in case.shapes]
            wanted = [tensor.requires_grad_() for tensor in tensors[case.spared :]]
            with ops.use_backend("triton"), contextlib.suppress(Exception):
                with tile_table.recording() as reached:
                    found.append((reached, case, False))
                    output = case.call(*tensors)
                with tile_table.recording() as reached:
                    found.append((reached, case, True))
                    torch.autograd.grad(output, wanted, torch.randn_like(output))
        found.sort(key=lambda one: len(one[0]))
        chosen: dict[Key, tuple] = {}
        for reached, case, backward in found:
            for key in reached:
                chosen.setdefault(key, (case, backward))
        return chosen

    def _check(self, key: Key, entry: dict, trials: list, allowed: float) -> tuple[int, Rejection | None]:
        """What an entry spills, and why it cannot count, or None."""
        from vit_fast.kernels import tile_table

        spilled = 0
        for trial in trials:
            try:
                with (
                    tile_table.using(self.architecture, *key, entry),
                    ops.use_backend("triton"),
                    _compiled() as kernels,
                ):
                    output = trial.forward()
                    error, agrees = trial.judge([output, *trial.backward(output)])
            except Exception as raised:  # it does not compile, or asks for more than the device has
                if self.device.type == "cuda":
                    torch.cuda.synchronize(self.device)  # raises where the device can do no more: nothing counts then
                return spilled, Rejection(entry, verify.in_a_line(raised), False)
            if not agrees:
                wrong = f"wrong numbers: error {error:.1e} in {dtype_name(trial.tensors[0].dtype)}"
                return spilled, Rejection(entry, wrong, True)
            spilled += sum(kernel.n_spills for kernel in kernels)
            if spilled > allowed:
                return spilled, Rejection(entry, f"spills {spilled} registers, {allowed} allowed", False)
        return spilled, None

    def _run(self, trial: verify.Trial, backward: bool) -> Callable[[], object]:
        if not backward:
            return trial.forward
        with ops.use_backend("triton"):
            output = trial.forward()
        return lambda: trial.backward(output)

    def _race(self, key: Key, entries: list[dict], run: Callable[[], object]) -> list[float]:
        """The median seconds of each entry. They take turns: what else changes on the device changes for all."""
        from vit_fast.kernels import tile_table

        times: list[list[float]] = [[] for _ in entries]
        for _ in range(ROUNDS):
            for entry, mine in zip(entries, times):
                with tile_table.using(self.architecture, *key, entry), ops.use_backend("triton"):
                    mine.append(self.clock(run))
        return [statistics.median(mine) for mine in times]

    def _keep(self, key: Key, numbers: dict) -> dict:
        """Put an entry in force: here, and in the user's file for every later process."""
        from vit_fast.kernels import tile_table

        kernel, dtype, shape = key
        entry = {**numbers, "origin": tile_table.measured_on(self.device)}
        own = tile_table.entries_in(self.file) if self.file.is_file() else {}
        own.setdefault(kernel, {}).setdefault(dtype, {})[shape] = entry
        self._write(own)
        self.table[kernel][dtype][shape] = entry
        tile_table.forget()
        return entry

    def _write(self, own: dict) -> None:
        from vit_fast.kernels import tile_table

        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self.file) as beside:
                beside.write_text(tile_table.text(own))
        except OSError as error:
            raise ValueError(f"{self.file}: cannot be written: {error.strerror}") from error
