"""What the compiler makes of every kernel, for GPUs that are not here, and what a roofline makes of that.

    python -m benchmarks.static [--arch sm_90 … | all] [--op mlp …] [--dtype bf16 … | all] [--check]
                                [--json FILE] [--plot FILE] [--models] [--page FILE]

The ops run on tensors without memory, their launches are caught where triton would compile them (launches.py), and each
is compiled for the architecture asked for with that architecture's tiles and the hints of a real launch, in a child
process, since some faults of the compiler end their process (compiled.py). Nothing is run, nothing here is a
measurement: the times are predictions (roofline.py, hardware.json).

--check fails on a compile error; on more shared memory than a block may have; on any spill in fp16 and bf16 on sm_80,
sm_90 and sm_100, but for an entry measured there that names a reason and as many bytes, and elsewhere on more than 64
bytes a thread, or than the entry names; on attention, also of windows, or a product of 64 rows and 4 warps or more,
without wgmma on sm_90 in fp16 and bf16; and on an entry of a tile table that no launch reached. A width of 37, which no
vector load fits, has to compile and to fit, not to be free of spills; windows of 32 tokens or fewer need no wgmma.
--models prints ViT-B, L and H as the sum of their launches; --page writes the sm_90 table, the models and the MLP of
small models into the marked parts of a page.
"""

import argparse
import json
import os
import pathlib
import re
import sys
from dataclasses import asdict, dataclass

from vit_fast.kernels import tile_table

from benchmarks import roofline
from benchmarks.compiled import compile_launches
from benchmarks.launches import DTYPES, ODD, OPS, SMALL, Launch, hardware, kernel_name, launches, table_in_force

ARCHITECTURES = tuple(hardware()["architectures"])
FREE_OF_SPILLS = ("sm_80", "sm_90", "sm_100")
SPILL_LIMIT = 64


@dataclass(frozen=True)
class Row:
    """One launch as compiled and predicted; `direction` is "pass" in the JSON.

    special_per_element: instructions for exponentials, reciprocals, roots and their like that stand in the code, each
    counted once wherever it stands, times the threads of a program, over the elements of its tile: of the result in a
    product, of the scores in attention, of the rows in hand elsewhere.
    step_instructions, tile_instructions: how many a warp issues a step of the innermost loop, and a tile besides; 0 on
    AMD, whose loops are not read.
    """

    op: str
    kernel: str
    direction: str
    variant: str
    arch: str
    dtype: str
    entry: str  # of the tile table: kernel, dtype class and shape class; "fixed" where the launch asks no table
    tile: str
    registers: int = 0
    spill_bytes: int = 0
    shared_bytes: int = 0
    shared_limit: int = 0
    matrix_instruction: str = ""
    slow_products: int = 0  # mma.sync, and on Hopper those whose left operand is not in shared memory
    instructions: int = 0
    step_instructions: int = 0
    tile_instructions: int = 0
    blocks_per_sm: int = 0
    special_per_element: float = 0
    bytes: int = 0
    flops: float = 0
    predicted_us: float = 0
    predicted_fraction: float = 0
    bound: str = ""
    origin: str | dict = ""  # of the entry: "predicted", or device, date and versions
    excused_spill_bytes: int = 0  # as many as the entry has a reason for
    reason: str = ""
    error: str = ""


# ---- rows ------------------------------------------------------------------------------------------------------------


def a_tile(launch: Launch, found: dict) -> dict:
    """Instructions a step of a tile and a tile besides, and special functions an element.

    Of a kernel whose programs do several tiles what stands outside its loops is left out: it runs once a program, or,
    being a copy for an empty sum, never.
    """
    loops, special = found["loops"], found["special"]
    step = besides = 0
    if loops:
        step, besides = loops["step"], found["instructions"] - loops["step"]
        if step and ("num_programs" in launch.kernel.src or "WINDOW" in launch.kwargs):
            besides, special = loops["tile"], loops["special"]
    return {
        "step_instructions": step,
        "tile_instructions": besides,
        "special_per_element": round(special * found["threads"] / roofline.work(launch).tile_elements, 3),
    }


def predict(arch: str, dtype: str, launch: Launch, found: dict) -> roofline.Prediction:
    """The time of a launch of which the compiler made what is `found`.

    Raises:
        ValueError: for a kernel that multiplies, of whose products the roofline knows nothing.
    """
    work = roofline.work(launch)
    if found["matrix_instruction"] and not work.flops:
        raise ValueError(f"roofline.py knows no products of a kernel named {launch.kernel.__name__}, which multiplies")
    tile = a_tile(launch, found)
    return roofline.predict(
        arch,
        dtype,
        work,
        roofline.blocks_per_sm(arch, found["registers"], found["shared_bytes"], found["threads"]),
        found["threads"],
        tile["special_per_element"],
        tile["step_instructions"] * work.steps + tile["tile_instructions"],
        tile["tile_instructions"],
        found["matrix_instruction"],
        launch.kwargs.get("PRECISION", "ieee"),
    )


def row(arch: str, dtype: str, launch: Launch, found: dict) -> Row:
    """A launch and what the compiler made of it, with the time that it should take."""
    kwargs = launch.kwargs
    tile = [f"{name[6:].lower()}{kwargs[name]}" for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K") if name in kwargs]
    tile += [f"{name[4]}{kwargs[name]}" for name in ("num_warps", "num_stages") if name in kwargs]
    row = {
        "op": launch.op,
        "kernel": kernel_name(launch.kernel),
        "direction": launch.direction,
        "variant": launch.variant,
        "arch": arch,
        "dtype": dtype,
        "entry": launch.entry_name or "fixed",
        "tile": " ".join(tile),
        "origin": launch.entry.get("origin", ""),
        "excused_spill_bytes": launch.entry.get("spills", 0),
        "reason": launch.entry.get("reason", ""),
        "shared_limit": roofline.device(arch)["shared_limit"],
    }
    if "error" in found:
        return Row(**row, error=found["error"])
    try:
        work, prediction = roofline.work(launch), predict(arch, dtype, launch, found)
    except ValueError as error:
        return Row(**row, error=str(error))
    compiled = {name: value for name, value in found.items() if name not in ("special", "threads", "loops")}
    return Row(
        **row,
        **compiled,
        blocks_per_sm=roofline.blocks_per_sm(arch, found["registers"], found["shared_bytes"], found["threads"]),
        **a_tile(launch, found),
        bytes=work.bytes,
        flops=work.flops,
        predicted_us=round(prediction.us, 2),
        predicted_fraction=round(prediction.fraction, 3),
        bound=prediction.bound,
    )


# ---- checking ------------------------------------------------------------------------------------------------------


def faults(r: Row) -> list[str]:
    """What --check holds against a row."""
    if r.error:
        return [r.error]
    found = []
    limit = 0 if r.arch in FREE_OF_SPILLS and r.dtype != "fp32" else SPILL_LIMIT
    # Where the limit is zero, a device of this architecture must have said that the entry is the fastest all the same.
    measured = isinstance(r.origin, dict) and tile_table.nearest(r.arch) == r.arch
    if r.reason and (limit or measured):
        limit = max(limit, r.excused_spill_bytes)
    if r.spill_bytes > limit and not r.variant.startswith(ODD):
        found.append(f"{r.spill_bytes} bytes a thread spilled, {limit} allowed")
    if r.shared_bytes > r.shared_limit:
        found.append(f"{r.shared_bytes} bytes of shared memory, {r.shared_limit} there are")
    sizes = dict(re.findall(r"([a-z])(\d+)", r.tile))
    wide = r.flops and "k" in sizes and int(sizes["m"]) >= 64 and int(sizes["w"]) >= 4
    attention = r.flops and r.op.endswith("attention") and SMALL not in r.variant
    hopper = r.arch == "sm_90" and r.dtype != "fp32"
    if hopper and (wide or attention) and r.matrix_instruction != "HGMMA":
        found.append("a product without wgmma")
    elif hopper and wide and r.slow_products and not r.variant.startswith(ODD):
        found.append(f"{r.slow_products} products by mma.sync or from registers, at half the rate of the others")
    return found


def not_reached(arch: str, dtypes: list[str], found: list[Launch]) -> list[str]:
    """Entries of the table that an architecture takes for these dtypes that none of the launches took."""
    classes = {"32" if dtype == "fp32" else "16" for dtype in dtypes}
    taken = {launch.entry_name for launch in found}
    return [
        name
        for name, entry in table_in_force(arch).items()
        # An entry of attention for no length at all says that another kernel does it.
        if name.split()[1] in classes and name not in taken and entry.get("LONGEST") != 0
    ]


# ---- the program ---------------------------------------------------------------------------------------------------

COLUMNS = {
    "op": 16,
    "kernel": 27,
    "variant": 34,
    "arch": 7,
    "dtype": 5,
    "tile": 22,
    "registers": 4,
    "spill_bytes": 5,
    "shared_bytes": 7,
    "matrix_instruction": 8,
    "blocks_per_sm": 3,
    "special_per_element": 6,
    "predicted_us": 9,
    "predicted_fraction": 6,
    "bound": 7,
    "origin": 9,
}
HEADINGS = {
    "registers": "regs",
    "spill_bytes": "spill",
    "shared_bytes": "shared",
    "matrix_instruction": "matrix",
    "blocks_per_sm": "b/m",
    "special_per_element": "sp/el",
    "predicted_us": "pred. µs",
    "predicted_fraction": "pred.%",
}


def as_json(r: Row) -> dict:
    return {"pass" if name == "direction" else name: value for name, value in asdict(r).items()}


def line(r: Row) -> str:
    cells = asdict(r) | {"predicted_fraction": f"{100 * r.predicted_fraction:.0f}"}
    cells["special_per_element"] = f"{r.special_per_element:.2f}"
    cells["matrix_instruction"] = r.matrix_instruction[:8]
    cells["origin"] = r.origin if isinstance(r.origin, str) else "measured"
    return " ".join(
        f"{cells[name]:>{width}}" if name in HEADINGS else f"{cells[name]:{width}}" for name, width in COLUMNS.items()
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.static", description=__doc__.splitlines()[0])
    parser.add_argument("--arch", nargs="+", default=["sm_90"], choices=(*ARCHITECTURES, "all"), metavar="ARCH")
    parser.add_argument("--op", nargs="+", default=OPS, choices=OPS, metavar="OP")
    parser.add_argument("--dtype", nargs="+", default=["bf16"], choices=(*DTYPES, "all"), metavar="DTYPE")
    parser.add_argument("--check", action="store_true", help="fail where a kernel breaks a rule")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write the rows there")
    parser.add_argument("--plot", type=pathlib.Path, metavar="FILE", help="draw the roofline there")
    parser.add_argument("--models", action="store_true", help="only predict ViT-B, L and H whole")
    parser.add_argument("--page", type=pathlib.Path, metavar="FILE", help="only rewrite the marked parts of that page")
    options = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 is set: the interpreter and the compiler cannot share a process")
    from benchmarks import predictions  # it imports this module

    if options.page:
        predictions.write_page(options.page)
        return 0
    archs = ARCHITECTURES if "all" in options.arch else options.arch
    if options.models:
        for arch in archs:
            print(predictions.models_table(arch))
        return 0
    dtypes = list(DTYPES) if "all" in options.dtype else options.dtype
    rows, failed = [], 0
    print(" ".join(f"{HEADINGS.get(name, name):{width}}" for name, width in COLUMNS.items()))
    for arch in archs:
        jobs = [(dtype, launch) for dtype in dtypes for launch in launches(options.op, arch, dtype)]
        compiled = compile_launches((arch, launch) for _, launch in jobs)
        for (dtype, launch), found in zip(jobs, compiled):
            r = row(arch, dtype, launch, found)
            rows.append(r)
            print(line(r), flush=True)
            for fault in faults(r) if options.check else ():
                failed += 1
                print(f"    FAULT: {fault}", flush=True)
        if set(options.op) == set(OPS):
            for name in not_reached(arch, dtypes, [launch for _, launch in jobs]):
                failed += 1
                print(f"    FAULT: {arch}: no launch took the entry {name}", flush=True)
    if options.json:
        options.json.write_text(json.dumps([as_json(r) for r in rows], indent=1) + "\n")
    if options.plot:
        predictions.plot(rows, options.plot)
    print(f"{len(rows)} launches compiled" + (f", {failed} faults" if options.check else ""))
    return 1 if failed and options.check else 0


if __name__ == "__main__":
    sys.exit(main())
