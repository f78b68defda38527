"""A call of many launches, made again with new addresses: at small batches the device waits for the host.

At each launch Triton asks what every argument is, to find the compiled kernel, and before that the kernel's own file
asks for a tile, strides and memory. For tensors of the same shapes, strides, dtypes and alignment, and the same
settings, all the answers are the same. So the first call notes what each launch was given, and a later one hands the
same numbers to the same launchers, with the addresses of its own tensors in place of the first one's. Results are
memory of their own; what lay between is cut from one block, given back at the end, in which a tensor takes the place of
one that no later launch reads.
"""

import contextlib
import functools
import threading
from typing import NamedTuple

import torch
import triton
from triton import knobs
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from . import tile_table
from .product import scratch_memory

KNOWN = triton.__version__.startswith("3.6.")  # whose launchers' arguments these are
LARGEST = 256 << 20  # bytes between the launches; with more to do it is the host that waits
MOST = 512  # calls that are remembered
ALIGNMENT = 256  # of each tensor in the block

_run = JITFunction.run
_recording = threading.Lock()
_plans: dict[tuple, "Plan | None"] = {}
_UNKNOWN = object()


class Step(NamedTuple):
    """A launch: its launcher, what comes before and behind the stream, and the places of addresses behind it.

    An address is (base, offset): bytes behind one of the addresses of a call, inputs first, then results, then the
    block; in a tuple among the arguments what is no tensor has its value there instead.
    """

    launcher: object
    grid: tuple[int, int, int]
    arguments: list
    single: list[tuple[int, int, int]]  # (argument, base, offset)
    nested: list[tuple[int, list[tuple]]]  # (argument, (base, offset, value) of each of its parts), base -1 for a value


class Plan(NamedTuple):
    """All that a call does."""

    steps: list[Step]
    inputs: list[int]  # which of the call's tensors are read
    made: list[tuple]  # shape and dtype of each result
    results: object  # indices into `made`, in tuples as the function returns them, None where there is none
    scratch: int  # bytes of the block


class Span(NamedTuple):
    """A tensor between launches: its bytes, and the first and the last launch that has it."""

    size: int
    first: int
    last: int


class NoPlan(Exception):
    """Why a call cannot be made again."""


def _watched() -> bool:
    """Whether somebody wants to see every launch: a profiler by Triton's hooks, or a tool in the place of its `run`."""
    if JITFunction.run is not _run:
        return True
    hooks = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    # Chains, in whose place somebody may have put a function.
    return any(getattr(hook, "calls", hook) for hook in hooks)


def _flat(args: tuple) -> list:
    found = []
    for arg in args:
        if isinstance(arg, (tuple, list)):
            found.extend(arg)
        else:
            found.append(arg)
    return found


def _key(function, flat: list) -> tuple:
    """All that the numbers of a call's launches depend on."""
    key = [function, tile_table.changes]
    for arg in flat:
        if isinstance(arg, torch.Tensor):
            key += (arg.shape, arg.stride(), arg.dtype, arg.data_ptr() % 16, arg.device)
        else:
            key.append(arg)
    return tuple(key)


def _noted(function, args: tuple) -> tuple:
    """What a call returns, and (compiled kernel, kernel, grid, arguments by name) of each launch that it made.

    Of a call with so much memory that there will be no plan, no launches: it is not kept from the allocator for long.
    """
    thread, found, storages = threading.get_ident(), [], {}
    given = {_storage(arg) for arg in _flat(args) if isinstance(arg, torch.Tensor)}

    def noting(kernel, /, *unnamed, grid, warmup, **arguments):
        compiled = _run(kernel, *unnamed, grid=grid, warmup=warmup, **arguments)
        if threading.get_ident() == thread and sum(storages.values()) <= 2 * LARGEST:
            found.append((compiled, kernel, grid, arguments))
            for value in _flat(tuple(arguments.values())):
                if isinstance(value, torch.Tensor) and _storage(value) not in given:
                    storages[_storage(value)] = value.untyped_storage().nbytes()
            if sum(storages.values()) > 2 * LARGEST:
                found.clear()
        return compiled

    with _recording:
        JITFunction.run = noting
        try:
            return function(*args), found
        finally:
            thread = None  # whoever took `noting` for Triton's own keeps something that notes nothing
            if JITFunction.run is noting:
                JITFunction.run = _run


def _extent(tensor: torch.Tensor) -> range:
    """The addresses from a tensor's first byte to its last."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    return range(tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size())


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def cut_block(spans: list[Span]) -> tuple[list[int], int]:
    """Where in one block each span begins, none on one that a launch has too, and the size of the block.

    The spans are in the order of their first launch.
    """
    begins: list[int] = []
    end = 0
    for number, span in enumerate(spans):
        place = 0
        for begin, other in sorted(zip(begins, spans[:number])):
            if other.last >= span.first:
                if place + span.size <= begin:
                    break
                place = max(place, begin + other.size)
        begins.append(place)
        end = max(end, place + span.size)
    return begins, end


def plan_of(flat: list, results, launches: list[tuple]) -> Plan:
    """What has to be known to make a call again, of its arguments, what it returned, and its launches.

    Raises:
        NoPlan: where it cannot be told whose an address is, a result is no memory of its own, or the device has so much
            to do that the host does not matter.
    """
    extents = {index: _extent(arg) for index, arg in enumerate(flat) if isinstance(arg, torch.Tensor)}
    given = {_storage(flat[index]) for index in extents}
    made, between, used = {}, {}, []

    def result(value):
        if value is None:
            return None
        if isinstance(value, (tuple, list)):
            return tuple([result(one) for one in value])
        storage = _storage(value)
        whole = value.is_contiguous() and value.nbytes == value.untyped_storage().nbytes()
        if storage in given or storage in made or not whole:
            raise NoPlan("a result is no memory of its own")
        made[storage] = len(made), value.shape, value.dtype
        return made[storage][0]

    def place(tensor: torch.Tensor, launch: int) -> tuple[str, int, int]:
        """Whose memory it is, an input's, a result's or one between launches, which, and how far behind its begin."""
        storage = _storage(tensor)
        if storage in given:
            # By where it lies and not by its storage, which other inputs may share, elsewhere the next time.
            owners = [index for index, extent in extents.items() if tensor.data_ptr() in extent]
            if len(owners) != 1:
                raise NoPlan("two inputs overlap")
            if owners[0] not in used:
                used.append(owners[0])
            return "input", owners[0], tensor.data_ptr() - extents[owners[0]].start
        inside = tensor.data_ptr() - storage
        if storage in made:
            return "result", made[storage][0], inside
        size = -(-tensor.untyped_storage().nbytes() // ALIGNMENT) * ALIGNMENT
        between[storage] = Span(size, between[storage].first if storage in between else launch, launch)
        return "between", storage, inside

    structure = result(results)
    placed = []
    for launch, (compiled, kernel, grid, arguments) in enumerate(launches):
        if set(kernel.arg_names) - arguments.keys():
            raise NoPlan("an argument has no name")
        values = [arguments[name] for name in kernel.arg_names]
        if any(isinstance(one, (tuple, list)) for value in values if isinstance(value, tuple) for one in value):
            raise NoPlan("a tuple in a tuple")
        single = {n: place(value, launch) for n, value in enumerate(values) if isinstance(value, torch.Tensor)}
        nested = {
            n: [place(one, launch) if isinstance(one, torch.Tensor) else one for one in value]
            for n, value in enumerate(values)
            if isinstance(value, tuple) and any(isinstance(one, torch.Tensor) for one in value)
        }
        placed.append((compiled, grid, values, single, nested))
    begins, scratch = cut_block(list(between.values()))
    if scratch > LARGEST:
        raise NoPlan("the host does not matter")
    begin_of = dict(zip(between, begins))

    def address(where: tuple[str, int, int]) -> tuple[int, int]:
        whose, which, offset = where
        if whose == "input":
            return used.index(which), offset
        if whose == "result":
            return len(used) + which, offset
        return len(used) + len(made), begin_of[which] + offset

    def part(one) -> tuple:
        """Of a tuple among the arguments, where only `place` puts a tuple."""
        return (*address(one), None) if isinstance(one, tuple) else (-1, 0, one)

    steps = []
    for compiled, grid, values, single, nested in placed:
        arguments = [0 if n in single or n in nested else value for n, value in enumerate(values)]
        steps.append(
            Step(
                compiled.run,
                (*grid, 1, 1)[:3],
                [compiled.function, compiled.packed_metadata, None, None, None, *arguments],
                [(n + 5, *address(where)) for n, where in single.items()],
                [(n + 5, [part(one) for one in parts]) for n, parts in nested.items()],
            )
        )
    return Plan(steps, used, [(shape, dtype) for _, shape, dtype in made.values()], structure, scratch)


def _fill(structure, made: list):
    if isinstance(structure, tuple):
        return tuple([_fill(one, made) for one in structure])
    return None if structure is None else made[structure]


def run(plan: Plan, flat: list):
    """Make the launches of a plan on these arguments, on the current stream."""
    device = flat[plan.inputs[0]].device
    made = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in plan.made]
    block = torch.empty(plan.scratch, dtype=torch.int8, device=device)
    bases = [flat[index].data_ptr() for index in plan.inputs]
    bases += [tensor.data_ptr() for tensor in made]
    bases.append(block.data_ptr())
    stream = driver.active.get_current_stream(device.index)
    with scratch_memory():
        for launcher, grid, values, single, nested in plan.steps:
            arguments = values.copy()
            for n, base, offset in single:
                arguments[n] = bases[base] + offset
            for n, parts in nested:
                arguments[n] = tuple([value if base < 0 else bases[base] + offset for base, offset, value in parts])
            launcher(*grid, stream, *arguments)
    return _fill(plan.results, made)


def replayed(function):
    """A function of tensors and tuples of them that does nothing but launch kernels, on them and on memory of its own:
    called with the like of what it was called with before, it makes the same launches."""

    @functools.wraps(function)
    def call(*args):
        if not KNOWN or _watched():
            return function(*args)
        flat = _flat(args)
        key = _key(function, flat)
        plan = _plans.get(key, _UNKNOWN)  # looked up once: another thread may forget it meanwhile
        if plan is not _UNKNOWN:
            return function(*args) if plan is None else run(plan, flat)
        results, launches = _noted(function, args)
        if len(_plans) >= MOST:
            _plans.clear()
        _plans[key] = None  # as in the interpreter, which compiles nothing
        if launches and all(compiled is not None for compiled, *_ in launches):
            with contextlib.suppress(NoPlan):
                _plans[key] = plan_of(flat, results, launches)
        return results

    return call
