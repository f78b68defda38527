"""Launches through triton's compiler for a GPU that is not here, and what can be read from the code that it makes."""

import contextlib
import multiprocessing
import os
import pathlib
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime.jit import create_function_from_signature

from benchmarks.launches import Launch, hardware

LIMIT = 300  # seconds for one kernel
SKIPPED = 32  # instructions behind a branch that are an epilogue and not a masked load
MATRIX_INSTRUCTION = re.compile(r"\b(HGMMA|QGMMA|UTCHMMA|HMMA|v_mfma\w*|v_wmma\w*)")
SASS_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", re.MULTILINE)
SPECIAL_INSTRUCTION = re.compile(r"\b(MUFU\.|v_(?:exp|log|rcp|rcp_iflag|rsq|sqrt|sin|cos)_f(?:16|32)(?!\d))")


def source_for(arch: str, launch: Launch) -> tuple[ASTSource, GPUTarget, dict]:
    """What triton would compile for this launch on that architecture, for which target and with what options."""
    target = (
        GPUTarget("hip", arch, hardware()["architectures"][arch]["warp_size"])
        if arch.startswith("gfx")
        else GPUTarget("cuda", int(arch[3:]), 32)
    )
    backend = make_backend(target)
    kernel = launch.kernel
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(*launch.args, **launch.kwargs)
    options, signature, constexprs, attrs = kernel._pack_args(backend, launch.kwargs, bound, specialization, options)
    written_in = GluonASTSource if kernel.is_gluon() else ASTSource
    return written_in(kernel, signature, constexprs, attrs), target, options.__dict__


def cuobjdump(cubin: bytes, flag: str) -> str:
    tool = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, flag, file.name], capture_output=True, text=True, check=True).stdout


def read_loops(lines: list[tuple[str, str]]) -> dict:
    """What of the (address, text) of SASS runs how often.

    "step": instructions of the innermost loop that multiplies, run once a step. A persistent kernel has a loop over
    tiles too, which flattening makes one with the inner: its epilogue then is what a branch inside that loop can skip.
    "tile": instructions inside the loops that run once a tile. "special": special functions inside the loops.
    """
    texts = {int(address, 16): text for address, text in lines}
    products = [address for address, text in texts.items() if MATRIX_INSTRUCTION.search(text)]
    products = products or [address for address, text in texts.items() if "FFMA" in text]
    loops, skips = [], []
    for address, text in texts.items():
        # A branch without a condition comes back from code that is seldom run and was put aside: no loop.
        jump = re.search(r"^@.*\bBRA\b.*?(0x[0-9a-f]+)|\bBRA\S*\s+!?UP\d.*?(0x[0-9a-f]+)", text)
        if jump:
            target = int(jump[1] or jump[2], 16)
            span = range(min(address, target), max(address, target) + 1)
            has_product = any(product in span for product in products)
            if target < address and has_product:
                loops.append(span)
            elif target > address and not has_product and len(span) >= 16 * SKIPPED:
                skips.append(range(address + 1, target))
    if not loops:
        return {"step": 0, "tile": 0, "special": 0}
    inner, outer = min(loops, key=len), max(loops, key=len)
    inside = [address for address in texts if address in outer]
    step = [address for address in inside if address in inner and not any(address in skip for skip in skips)]
    special = sum(bool(SPECIAL_INSTRUCTION.search(texts[address])) for address in inside)
    return {"step": len(step), "tile": len(inside) - len(step), "special": special}


def is_early(ptx: str) -> bool:
    """Whether a kernel reads or writes the device's memory before it waits for the launch before, or never waits."""
    before, waits, _ = ptx.partition("\n{\n")[2].partition("griddepcontrol.wait")  # behind the parameters
    return not waits or ".global" in before


def resources(arch: str, compiled) -> dict:
    """Registers and spilled bytes of a thread, shared memory and threads of a block, instructions by kind.

    Raises:
        ValueError: where the kernel may begin before the launch before has ended, and does not wait for it.
    """
    if arch.startswith("gfx"):
        code = compiled.asm["amdgcn"]
        registers = int(re.search(r"\.vgpr_count:\s*(\d+)", code)[1])
        spilled = 4 * int(re.search(r"\.vgpr_spill_count:\s*(\d+)", code)[1])
        instructions = len(re.findall(r"^\t[a-z]_?\w+", code, re.MULTILINE))
        loops = None
        threads = int(re.search(r"\.max_flat_workgroup_size:\s*(\d+)", code)[1])
    else:
        if compiled.metadata.launch_pdl and is_early(compiled.asm["ptx"]):
            raise ValueError("touches memory before it has waited for the launch before")
        usage = cuobjdump(compiled.asm["cubin"], "--dump-resource-usage")
        registers, spilled = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
        code = cuobjdump(compiled.asm["cubin"], "--dump-sass")
        lines = SASS_INSTRUCTION.findall(code)
        instructions, loops = len(lines), read_loops(lines)
        threads = int(re.search(r"\.reqntid\s+(\d+)", compiled.asm["ptx"])[1])  # more than num_warps if specialised
    multiply = MATRIX_INSTRUCTION.findall(code)
    return {
        "registers": registers,
        "spill_bytes": spilled,
        "shared_bytes": compiled.metadata.shared,
        "matrix_instruction": multiply[0] if multiply else "",
        "slow_products": len(re.findall(r"HGMMA\S+ R\d+, R\d+, gdesc", code)) + multiply.count("HMMA"),
        "instructions": instructions,
        "loops": loops,
        "special": len(SPECIAL_INSTRUCTION.findall(code)),
        "threads": threads,
    }


class _Present:
    """Stands for the driver of a GPU that is not here: a kernel may ask which target it is compiled for."""

    def __init__(self, target: GPUTarget):
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target


def _child(pipe, arch, source, target, options):
    triton.runtime.driver.set_active(_Present(target))
    # What a kernel was told of its target is no part of triton's key to its cache, where earlier compiles of other
    # programs lie, done without a driver.
    triton.knobs.cache.dir = f"{triton.knobs.cache.dir}-static"
    try:
        pipe.send(resources(arch, triton.compile(source, target=target, options=options)))
    except Exception as error:
        pipe.send({"error": (str(error).strip() or repr(error)).splitlines()[-1]})


def compile_apart(arch: str, source: ASTSource, target: GPUTarget, options: dict) -> dict:
    """`resources` of a kernel compiled in a child process of its own, or {"error": why not}."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=_child, args=(theirs, arch, source, target, options))
    process.start()
    theirs.close()
    found = None
    if not ours.poll(LIMIT):
        found = {"error": f"not compiled in {LIMIT} s"}
        process.kill()
    else:
        with contextlib.suppress(EOFError):
            found = ours.recv()
    process.join()
    return found or {"error": f"the compiler's process ended with {process.exitcode}"}


def compile_launches(jobs: Iterable[tuple[str, Launch]]) -> Iterator[dict]:
    """`resources` of each (architecture, launch), in order; what is the same to the compiler is compiled once."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        begun, order = {}, []
        for arch, launch in jobs:
            source, target, options = source_for(arch, launch)
            key = f"{arch} {launch.kernel.fn.__module__} {source.hash()} {sorted(options.items(), key=str)}"
            if key not in begun:
                begun[key] = pool.submit(compile_apart, arch, source, target, options)
            order.append(begun[key])
        yield from (future.result() for future in order)
