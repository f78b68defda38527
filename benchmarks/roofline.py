"""How long a launch should take: a roofline whose constants were frozen before the first device run (hardware.json),
and changed since where a measurement contradicts them.

    time = launch + max(waves·matrix, waves·special, waves·issue, memory)

matrix    operations of the products, with what the edges of tiles add and `tile_fill_k` steps of K for a tile's start
          and end, at the matrix rate of the dtype; at a share of it (`back_to_back`, `back_to_back_streaming`) where
          one product waits for another, as in attention, and at `mma_sync` of it where the compiler did not take the
          widest instruction
special   exponentials and their like, as many as the code holds for each element of a tile, at their rate; on AMD the
          copies of a loop that the compiler makes before and behind it are counted too
issue     every instruction of the code once for a tile, those of its innermost loop once a step, one a clock from each
          of a multiprocessor's schedulers; not for AMD, whose loops are not read
memory    every distinct tensor of the launch moved once, at the rate of a device copy; at a share of it
          (`rows_in_registers`) where a program holds so much of each row that few loads are under way
waves     tiles are dealt in rounds to the places of the multiprocessors, and the last round takes as long as a full
          one; a multiprocessor has as many places as blocks fit, but no more than busy it (`filling_warps`)

exposed   what an epilogue issues, its special functions too, which no product hides: all of it where a multiprocessor
          holds one block, half where it holds two; not in attention

Not in it: how well the other terms overlap within a block, bandwidth of shared memory and L2, latency at small sizes,
clocks that sink under load, and the host. A prediction is no measurement.
"""

import math
from dataclasses import dataclass

from vit_fast.kernels.attention import head_pieces

from benchmarks.launches import Launch, TorchOp, hardware, nbytes, tensors

# Products of an attention kernel over all pairs of a query and a key, by a part of its name; the first that fits.
ATTENTION_PRODUCTS = {"forward": 2, "query_grad": 3, "key_grad": 4, "maps": 1, "grad": 5}
# Rows and columns of a product's result and its inner index, by a part of the kernel's name; (M, N, K) elsewhere.
PRODUCT_AXES = {"weight_grad": ("N", "K", "M")}
# How many such products a kernel does that does more than one, by a part of its name.
PRODUCTS = {"gated": 2}


def device(arch: str) -> dict:
    return hardware()["architectures"][arch]


def constant(name: str) -> float:
    return hardware()["model"][name]["value"]


# ---- the work of a launch ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """What a launch has to do."""

    bytes: int  # of its distinct tensors
    tiles: int  # pieces of work dealt to the multiprocessors, also where a persistent program does several
    tile_elements: int  # of a tile of the result, or of a tile of scores in attention
    elements: int  # of all such tiles, edges included
    flops: float = 0  # operations of the products, two a multiply-add
    padded_flops: float = 0  # the same as whole tiles do them
    fill_flops: float = 0  # what the starts and ends of tiles cost, in operations
    steps: int = 1  # of the innermost loop of a tile
    matrix_share: float = 1.0  # of the matrix rate, below 1 where products wait for products
    memory_share: float = 1.0  # of the rate of a copy


def _up(size: int, block: int) -> int:
    """`size` to the next multiple of `block`."""
    return math.ceil(size / block) * block


def _by_name(table: dict, kernel: str, default):
    return next((value for part, value in table.items() if part in kernel), default)


def work(launch: Launch) -> Work:
    """From the sizes of a launch: M, N and K of a product; H, Tq, Tk and d of attention, or its windows; its grid."""
    sizes, name = launch.kwargs, launch.kernel.__name__
    moved = nbytes((launch.args, sizes))
    programs = math.prod(launch.grid)
    if name == "_rotate_kernel":
        return _turn_work(sizes, moved, programs)
    if "Tq" in sizes:
        return _attention_work(sizes, name, moved, programs)
    if "WINDOW" in sizes and "PRECISION" in sizes:
        return _window_work(sizes, name, moved)
    if "PRECISION" in sizes:
        return _product_work(sizes, name, moved)
    blocks = [value for key, value in sizes.items() if key.startswith("BLOCK_") and isinstance(value, int)]
    tile = math.prod(blocks) if blocks else 32 * sizes.get("num_warps", 4)
    # LayerNorm's: the only one of that name.
    share = constant("rows_in_registers") if name == "_backward_kernel" else 1.0
    return Work(moved, programs, tile, programs * tile, memory_share=share)


def _product_work(sizes: dict, name: str, moved: int) -> Work:
    rows, cols, summed = (sizes[axis] for axis in _by_name(PRODUCT_AXES, name, ("M", "N", "K")))
    span = sizes.get("span", summed)  # of the sum, where several programs share it
    splits = math.ceil(summed / span)
    tile, products = sizes["BLOCK_M"] * sizes["BLOCK_N"], _by_name(PRODUCTS, name, 1)
    tiles = math.ceil(rows / sizes["BLOCK_M"]) * math.ceil(cols / sizes["BLOCK_N"]) * splits
    return Work(
        moved,
        tiles,
        tile,
        tiles * tile,
        flops=2 * products * rows * cols * summed,
        padded_flops=2 * products * tiles * tile * _up(span, sizes["BLOCK_K"]),
        fill_flops=2 * products * tiles * tile * constant("tile_fill_k"),
        steps=math.ceil(span / sizes["BLOCK_K"]),
    )


def _attention_work(sizes: dict, name: str, moved: int, programs: int) -> Work:
    """BLOCK_M cuts the queries and BLOCK_N the keys; an axis without a block of its own is in pieces of 16."""
    batch, _, heads, width = next(x.shape for x in tensors(sizes) if x.dim() == 4)
    heads *= batch
    products = _by_name(ATTENTION_PRODUCTS, name, 0)
    rows, keys = _up(sizes["Tq"], sizes.get("BLOCK_M", 16)), _up(sizes["Tk"], sizes.get("BLOCK_N", 16))
    if "span" in sizes:  # of queries that a program has, all keys at once
        steps = math.ceil(sizes["span"] / sizes["BLOCK_M"])
    else:
        steps = rows // sizes.get("BLOCK_M", rows) if "key_grad" in name else keys // sizes.get("BLOCK_N", keys)
    whole = not {"BLOCK_M", "BLOCK_N"} <= sizes.keys()  # an axis at once, not both block by block
    return Work(
        moved,
        programs,
        sizes.get("BLOCK_M", rows) * sizes.get("BLOCK_N", keys),
        heads * rows * keys,
        flops=2 * products * heads * sizes["Tq"] * sizes["Tk"] * width,
        padded_flops=2 * products * heads * rows * keys * sum(head_pieces(width)),
        steps=steps,
        matrix_share=constant("back_to_back" if whole else "back_to_back_streaming"),
    )


def _window_work(sizes: dict, name: str, moved: int) -> Work:
    """A tile is the scores of a window's head, with sides of the next power of two; a program does several."""
    tiles, scores, products = sizes["count"] * sizes["H"], sizes["BLOCK"] ** 2, _by_name(ATTENTION_PRODUCTS, name, 0)
    return Work(
        moved,
        tiles,
        scores,
        tiles * scores,
        flops=2 * products * tiles * math.prod(sizes["WINDOW"]) ** 2 * sizes["HEAD"],
        padded_flops=2 * products * tiles * scores * sizes["HEAD"],
        matrix_share=constant("back_to_back"),
    )


def _turn_work(sizes: dict, moved: int, programs: int) -> Work:
    """A tile is what a program turns, some heads of some tokens. In place the one matrix is read, and written."""
    if len(tensors((sizes["x"], sizes["y"]))) == 1:
        moved += nbytes(sizes["y"])
    tile = sizes["BLOCK_T"] * sizes["HEADS"] * 2 * sizes["WIDTH"]
    return Work(moved, programs, tile, programs * tile)


# ---- the time of a launch ------------------------------------------------------------------------------------------


def blocks_per_sm(arch: str, registers: int, shared_bytes: int, threads: int) -> int:
    """How many blocks a multiprocessor holds at once: by registers, shared memory, warps and blocks; 1 at least."""
    chip = device(arch)
    warps = math.ceil(threads / chip["warp_size"])
    of_a_warp = _up(max(registers, 1), chip["register_granule"]) * chip["warp_size"]
    resident = chip["registers"] // chip["partitions"] // of_a_warp * chip["partitions"]
    by_shared = chip["shared_bytes"] // max(1, shared_bytes + chip["shared_reserved"])
    return max(1, min(chip["blocks"], chip["warps"] // warps, resident // warps, by_shared))


@dataclass(frozen=True)
class Prediction:
    """A launch's time in microseconds, what binds it, and where its time goes (the parts sum to the time)."""

    us: float
    bound: str  # "matrix", "special", "issue" or "memory"
    fraction: float  # of the ceiling: useful products at the matrix rate, or bytes at the copy rate, over the time
    parts: dict[str, float]


def matrix_tflops(arch: str, dtype: str, precision: str = "ieee") -> float:
    """The ceiling of products of that dtype ("bf16", "fp16" or "fp32")."""
    rates = device(arch)["matrix_tflops"]
    return rates["16"] if dtype != "fp32" else rates["tf32"] if precision == "tf32" else rates["32"]


def predict(
    arch: str,
    dtype: str,
    work: Work,
    blocks: int,
    threads: int,
    special_per_element: float = 0,
    issued: int = 0,
    epilogue: int = 0,
    instruction: str = "",
    precision: str = "ieee",
) -> Prediction:
    """The time of a launch of which so many blocks of so many threads fit on a multiprocessor.

    Args:
        arch, dtype: "sm_90" and its like; "bf16", "fp16" or "fp32", that of the products.
        work: what there is to do.
        blocks, threads: that a multiprocessor holds at once, and of each.
        special_per_element: exponentials and their like for each element of a tile.
        issued, epilogue: instructions that a warp issues for a tile, and those of them that are no step of its loop.
        instruction: the matrix instruction that the compiler took, or "".
        precision: of fp32 products, "ieee" or "tf32".
    """
    chip = device(arch)
    ceiling = matrix_tflops(arch, dtype, precision) * 1e6  # operations a microsecond
    rate = work.matrix_share
    if instruction == "HMMA" and "widest_product" in chip:
        rate *= constant("mma_sync")
    filling = math.ceil(constant("filling_warps") * chip["warp_size"] / threads)
    places = chip["multiprocessors"] * min(blocks, filling)
    waves = math.ceil(work.tiles / places) * places / work.tiles
    products = work.flops / ceiling
    matrix = (work.padded_flops + work.fill_flops) / (ceiling * rate)
    special = work.elements * special_per_element / _special_rate(chip)
    rounds = work.tiles * threads / chip["warp_size"] / chip["issue_per_clock"] / chip["multiprocessors"]
    issue, of_epilogues = (rounds * count / (chip["clock_ghz"] * 1e3) for count in (issued, epilogue))
    memory = work.bytes / (chip["memory_tbs"] * work.memory_share * 1e6)
    times = {"matrix": waves * matrix, "special": waves * special, "issue": waves * issue, "memory": memory}
    bound = max(times, key=times.get)
    longest = times[bound]
    parts = {"products": products, "launch": constant("launch_us")}
    if bound == "matrix":
        parts["edges"] = (work.padded_flops - work.flops) / ceiling
        parts["fill"] = work.fill_flops / ceiling
        parts["rate"] = matrix * (1 - rate)
        parts["waves"] = (waves - 1) * matrix
        parts["exposed"] = 0.0 if work.matrix_share < 1 else (of_epilogues + special) / min(blocks, 2)
    elif bound == "memory":
        parts["memory"] = memory - products
    else:
        parts[bound] = times[bound] / waves - products
        parts["waves"] = times[bound] * (1 - 1 / waves)
    us = constant("launch_us") + longest + parts.get("exposed", 0.0)
    return Prediction(us, bound, max(products, memory) / us, parts)


def _special_rate(chip: dict) -> float:
    """Special functions a microsecond."""
    return chip["special_per_clock"] * chip["multiprocessors"] * chip["clock_ghz"] * 1e3


def predict_torch(arch: str, dtype: str, op: TorchOp) -> float:
    """Microseconds of a step of PyTorch's own."""
    chip = device(arch)
    longest = max(op.flops / (matrix_tflops(arch, dtype) * 1e6), op.bytes / (chip["memory_tbs"] * 1e6))
    return constant("launch_us") + longest
