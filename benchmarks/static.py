"""What the compiler makes of every kernel, for GPUs that are not here.

    python -m benchmarks.static [--arch sm_90 …] [--op mlp …] [--dtype bf16 …] [--check] [--json FILE]

The launch functions run on tensors without memory, their launches are caught where triton would compile them, and each
is compiled for the architecture asked for with that architecture's tiles and the hints of a real launch, in a child
process: some faults of the compiler end their process. Nothing is run, nothing here is a measurement.

--check fails on a compile error, on more shared memory than a block may have, on any spill in fp16 and bf16 on sm_80
and sm_90 or more than 64 bytes a thread elsewhere, and on a product of 64 rows and 4 warps or more without wgmma on
sm_90.
"""

import argparse
import json
import multiprocessing
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature
from vit_fast.kernels import attention, linear_residual, ln_linear, mlp, patch_embed, tile_table

# Bytes of shared memory that one block may have.
SHARED_LIMIT = {
    "sm_80": 166_912,
    "sm_86": 101_376,
    "sm_89": 101_376,
    "sm_90": 232_448,
    "sm_100": 232_448,
    "sm_120": 101_376,
    "gfx90a": 65_536,
    "gfx942": 65_536,
    "gfx950": 163_840,
    "gfx1100": 65_536,
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
OPS = ("patch_embed", "ln_linear", "attention", "linear_residual", "mlp")
HEAD_WIDTHS = (16, 32, 48, 64, 72, 80, 88, 96, 104, 128)
FREE_OF_SPILLS = ("sm_80", "sm_90")
SPILL_LIMIT = 64
MATRIX_INSTRUCTION = re.compile(r"\b(HGMMA|QGMMA|UTCHMMA|HMMA|v_mfma\w*|v_wmma\w*)")


@dataclass(frozen=True)
class Row:
    """One kernel as compiled."""

    op: str
    kernel: str
    variant: str
    arch: str
    dtype: str
    entry: str
    registers: int = 0
    spill_bytes: int = 0
    shared_bytes: int = 0
    shared_limit: int = 0
    matrix_instruction: str = ""
    instructions: int = 0
    error: str = ""


def calls(dtype: torch.dtype) -> Iterator[tuple[str, str, Callable]]:
    """(op, variant, a call that launches), ViT-B at 224 and batch 64: every operand there, then only what is needed."""
    B, T, D, F, H = 64, 197, 768, 3072, 12
    M = B * T

    def empty(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    x, y, hidden, norm = empty(M, D), empty(M, 3 * D), empty(M, F), (empty(D), empty(D))
    qkv, proj, fc1, fc2 = empty(3 * D, D), empty(D, D), empty(F, D), empty(D, F)
    images, patch = empty(B, 3, 224, 224), empty(D, 3, 16, 16)
    statistics = empty(M, dtype=torch.float32), empty(M, dtype=torch.float32)
    for there in (True, False):
        variant = "all operands" if there else "no optional operand"

        def optional(*shape, there=there):
            return empty(*shape) if there else None

        b, scale, drop = optional(D), optional(D), optional(B)
        yield "ln_linear", variant, partial(ln_linear.forward, x, *norm, qkv, optional(3 * D), 1e-6, "ieee")
        yield "ln_linear", variant, partial(ln_linear.backward, y, x, *statistics, *norm, qkv, optional(3 * D), "ieee")
        yield "linear_residual", variant, partial(linear_residual.forward, x, proj, b, x, scale, drop, T, "ieee")
        yield "linear_residual", variant, partial(linear_residual.backward, x, x, proj, b, scale, drop, T, "ieee")
        tables = optional(D), optional(T, D), optional(1, D)
        yield "patch_embed", variant, partial(patch_embed.forward, images, patch, *tables, dtype, "ieee")
        tokens = empty(B, T if there else T - 1, D)
        yield "patch_embed", variant, partial(patch_embed.backward, tokens, images, patch, *tables, "ieee")
        parameters = *norm, fc1, optional(F), fc2, b, scale, drop
        for activation in ("gelu", "gelu_tanh", "quick_gelu"):
            named = f"{activation}, {variant}"
            for training in (False, True):
                yield "mlp", named, partial(mlp.forward, x, *parameters, activation, 1e-6, T, "ieee", training)
            yield "mlp", named, partial(mlp.backward, x, x, hidden, *statistics, *parameters, activation, T, "ieee")
    for d in HEAD_WIDTHS:
        variant = f"head width {d}"
        q, k, v = empty(B, T, 3, H, d).unbind(2)
        o, lse = empty(B, T, H * d), empty(B, H, T, dtype=torch.float32)
        yield "attention", variant, partial(attention.forward, q, k, v, 0.125, "ieee", True)
        yield "attention", variant, partial(attention.backward, o, q, k, v, o, lse, q, k, v, 0.125, "ieee")
        yield "attention", variant, partial(attention.maps, q, k, lse, 0.125, "ieee")


def launches(ops: list[str], arch: str, dtype: str) -> list[tuple[str, str, JITFunction, tuple, dict]]:
    """(op, variant, kernel, arguments, keyword arguments) of every launch that the ops make."""
    found, caught = [], []

    def catch(self, *args, grid, warmup, **kwargs):
        caught.append((self, args, kwargs))

    original_run, original_architecture = JITFunction.run, tile_table.architecture
    JITFunction.run, tile_table.architecture = catch, lambda device: arch
    tile_table.lookup.cache_clear()
    try:
        for op, variant, call in calls(DTYPES[dtype]):
            if op in ops:
                call()
                found += [(op, variant, *launch) for launch in caught]
                caught.clear()
    finally:
        JITFunction.run, tile_table.architecture = original_run, original_architecture
        tile_table.lookup.cache_clear()
    return found


def compile_for(arch: str, kernel: JITFunction, args: tuple, kwargs: dict):
    """The kernel as triton compiles it for this launch on that architecture."""
    target = (
        GPUTarget("hip", arch, 32 if arch == "gfx1100" else 64)
        if arch.startswith("gfx")
        else GPUTarget("cuda", int(arch[3:]), 32)
    )
    backend = make_backend(target)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(*args, **kwargs)
    options, signature, constexprs, attrs = kernel._pack_args(backend, kwargs, bound, specialization, options)
    return triton.compile(ASTSource(kernel, signature, constexprs, attrs), target=target, options=options.__dict__)


def nvidia_tool(name: str, cubin: bytes, flag: str) -> str:
    tool = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin" / name
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, flag, file.name], capture_output=True, text=True, check=True).stdout


def resources(arch: str, compiled) -> dict:
    """Registers and spilled bytes of a thread, shared memory of a block, and the instruction that multiplies."""
    if arch.startswith("gfx"):
        code = compiled.asm["amdgcn"]
        registers = int(re.search(r"\.vgpr_count:\s*(\d+)", code)[1])
        spilled = 4 * int(re.search(r"\.vgpr_spill_count:\s*(\d+)", code)[1])
        instructions = len(re.findall(r"^\t[a-z]_?\w+", code, re.MULTILINE))
    else:
        usage = nvidia_tool("cuobjdump", compiled.asm["cubin"], "--dump-resource-usage")
        registers, spilled = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
        code = nvidia_tool("cuobjdump", compiled.asm["cubin"], "--dump-sass")
        instructions = len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", code, re.MULTILINE))
    multiply = MATRIX_INSTRUCTION.search(code)
    return {
        "registers": registers,
        "spill_bytes": spilled,
        "shared_bytes": compiled.metadata.shared,
        "matrix_instruction": multiply[1] if multiply else "",
        "instructions": instructions,
    }


def _child(pipe, arch, kernel, args, kwargs):
    try:
        pipe.send(resources(arch, compile_for(arch, kernel, args, kwargs)))
    except Exception as error:
        pipe.send({"error": str(error).strip().splitlines()[-1]})


def row(arch: str, dtype: str, launch: tuple) -> Row:
    """Compile one launch in a child process of its own."""
    op, variant, kernel, args, kwargs = launch
    sizes = [f"{name[6:].lower()}{kwargs[name]}" for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K") if name in kwargs]
    sizes += [f"{name[4]}{kwargs[name]}" for name in ("num_warps", "num_stages") if name in kwargs]
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=_child, args=(theirs, arch, kernel, args, kwargs))
    process.start()
    theirs.close()
    try:
        found = ours.recv()
    except EOFError:
        found = None
    process.join()
    found = found or {"error": f"the compiler's process ended with {process.exitcode}"}
    name = f"{kernel.fn.__module__.rsplit('.', 1)[-1]}.{kernel.__name__.strip('_').removesuffix('_kernel')}"
    return Row(op, name, variant, arch, dtype, " ".join(sizes), shared_limit=SHARED_LIMIT[arch], **found)


def faults(r: Row) -> list[str]:
    """What --check holds against a row."""
    if r.error:
        return [r.error]
    found = []
    allowed = 0 if r.arch in FREE_OF_SPILLS and r.dtype != "fp32" else SPILL_LIMIT
    if r.spill_bytes > allowed:
        found.append(f"{r.spill_bytes} bytes a thread spilled, {allowed} allowed")
    if r.shared_bytes > r.shared_limit:
        found.append(f"{r.shared_bytes} bytes of shared memory, {r.shared_limit} there are")
    sizes = dict(re.findall(r"([a-z]+)(\d+)", r.entry))
    wide = int(sizes.get("m", 0)) >= 64 and int(sizes.get("w", 0)) >= 4 and "k" in sizes
    if r.arch == "sm_90" and r.dtype != "fp32" and wide and r.matrix_instruction == "HMMA":
        found.append("a product without wgmma")
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.static", description=__doc__.splitlines()[0])
    parser.add_argument("--arch", nargs="+", default=["sm_90"], choices=SHARED_LIMIT, metavar="ARCH")
    parser.add_argument("--op", nargs="+", default=OPS, choices=OPS, metavar="OP")
    parser.add_argument("--dtype", nargs="+", default=["bf16"], choices=DTYPES, metavar="DTYPE")
    parser.add_argument("--check", action="store_true", help="fail where a kernel breaks a rule")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write the rows there")
    options = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 is set: the interpreter and the compiler cannot share a process")
    jobs = [
        (arch, dtype, launch)
        for arch in options.arch
        for dtype in options.dtype
        for launch in launches(options.op, arch, dtype)
    ]
    print(f"{'op':15} {'kernel':30} {'variant':31} {'arch':7} dtype {'tile':22} regs spill  shared matrix instructions")
    rows, failed = [], 0
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for r in pool.map(lambda job: row(*job), jobs):
            rows.append(r)
            print(
                f"{r.op:15} {r.kernel:30} {r.variant:31} {r.arch:7} {r.dtype:5} {r.entry:22} {r.registers:4} "
                f"{r.spill_bytes:5} {r.shared_bytes:7} {r.matrix_instruction:6} {r.instructions:6}",
                flush=True,
            )
            for fault in faults(r) if options.check else ():
                failed += 1
                print(f"    FAULT: {fault}", flush=True)
    if options.json:
        options.json.write_text(json.dumps([asdict(r) for r in rows], indent=1) + "\n")
    print(f"{len(rows)} kernels compiled, {failed} faults" if options.check else f"{len(rows)} kernels compiled")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
