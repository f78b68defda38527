"""Tiles side by side, in the block that launches them: what each costs where it is used.

python -m benchmarks.sweep OUT [--workers N] [--minutes 4]
python -m benchmarks.sweep OUT --split

Every candidate takes the place of its entry in turn, and a block runs forward and backward at the shapes that come to
it; each launch of that kernel is timed by the device. OUT/sweep.json has all of it, under "blocks" each launch of
those blocks as they are, and under "tiles" the winners: what gives other numbers than the entry in force does not win.
--split, on any machine, makes OUT/blocks.json of the ones and OUT/tiles.json, for VIT_FAST_TILES, of the others.
"""

import argparse
import functools
import json
import multiprocessing
import os
import pathlib
import statistics
import time

import torch
from vit_fast.kernels import tile_table

from benchmarks import timing
from benchmarks.gpu import REHEARSAL, launch_clock
from benchmarks.records import record
from benchmarks.timing import DEVICE, hold_the_device
from vit_fast import ops, verify
from vit_fast.checkpoint import replacing

# Batch, patches a side, heads, head width; the class of rows that its products are in.
SHAPES = {
    "B": (256, 14, 12, 64),
    "H": (128, 16, 16, 80),
    "B/14": (256, 16, 12, 64),
    "B at 384": (64, 24, 12, 64),
    "B, 8 images": (8, 14, 12, 64),
    "B, 1 image": (1, 14, 12, 64),
    "H, 1 image": (1, 16, 16, 80),
}
ROWS = {"B": "many", "H": "many", "B, 8 images": "some", "B, 1 image": "few", "H, 1 image": "few"}
PRODUCT = "BLOCK_M", "BLOCK_N", "BLOCK_K", "PIECES", "num_warps", "num_stages", "blocks_per_sm", "TMA"
TILES = {
    "many": [
        *((128, 256, 64, pieces, 8, 3, 1, 2) for pieces in (1, 2, 4)),
        (128, 256, 64, 1, 8, 4, 1, 2),
        *((128, 128, 64, pieces, warps, 3, 2, 2) for warps in (4, 8) for pieces in (1, 2)),
        (128, 128, 64, 4, 8, 3, 2, 2),
        (128, 128, 64, 1, 8, 4, 1, 2),
    ],
    "some": [
        *((128, 128, 64, 1, 8, stages, 1, 2) for stages in (4, 6)),
        (128, 128, 128, 1, 8, 3, 1, 2),
        (128, 128, 64, 1, 8, 5, 1, 1),
        (64, 128, 64, 1, 4, 4, 2, 2),
        (64, 256, 64, 1, 4, 4, 1, 2),
        (128, 256, 64, 1, 8, 4, 1, 2),
        (128, 256, 64, 2, 8, 3, 1, 1),
        *((128, 64, 64, 1, 4, 4, 2, tma) for tma in (1, 2)),
        (128, 128, 64, 2, 4, 4, 1, 2),
    ],
    "few": [
        *((64, 64, 128, 1, 4, stages, 1, 2) for stages in (4, 6)),
        *((64, 64, 256, 1, 4, stages, 1, 2) for stages in (2, 3)),
        *((64, 128, 64, 1, 4, stages, 1, 2) for stages in (4, 6, 8)),
        *((64, 128, 128, 1, 4, stages, 1, 2) for stages in (3, 4)),
        *((64, 32, 128, 1, 4, stages, 1, 2) for stages in (4, 8)),
        (64, 32, 256, 1, 4, 4, 1, 2),
        (128, 64, 128, 1, 4, 4, 1, 2),
        (128, 64, 128, 1, 8, 4, 1, 2),
        (64, 64, 128, 1, 4, 4, 1, 0),
    ],
}
KERNELS = {
    "ln_linear_forward": ("ln_linear.forward",),
    "linear_residual_forward": ("linear_residual.forward",),
    "mlp_fc1": ("mlp.fc1",),
    "mlp_hidden_grad": ("mlp.hidden_grad",),
    "linear_input_grad": ("linear.input_grad",),
}
STREAMING = {
    "attention_forward_streaming": ("attention.forward_streaming",),
    "attention_query_grad": ("attention.query_grad",),
    "attention_key_grad": ("attention.key_grad",),
}
# Rows, columns, tokens a step, warps, stages.
WEIGHT_GRAD = [
    (128, 256, 64, 8, 4),
    (256, 128, 64, 8, 3),
    (256, 128, 64, 8, 4),
    (128, 256, 128, 8, 2),
    (128, 128, 64, 8, 5),
]
# Queries, keys, warps, stages.
PAIRS = [(64, 64, 4, 1), (64, 64, 4, 3), (128, 64, 8, 2), (64, 128, 4, 2), (64, 128, 8, 2), (128, 128, 8, 2)]
GRADS = ("attention.grad", "attention.query_grad", "attention.key_grad")
GRAD = [(32, 4, 2), (64, 4, 2), (64, 8, 2), (128, 8, 2)]
MARGIN = 0.01  # how much faster an entry must be to take another's place
WRONG = 1e-2  # of a result, in norm: other tiles sum in another order


@functools.cache
def arch() -> str:
    return tile_table.architecture(torch.device(DEVICE, 0))


def candidates() -> list[tuple]:
    """(table's kernel, shape class, numbers of the entry, names of its launches, models); those in force last."""
    found = []
    table = tile_table.table(arch())

    def place(kernel: str, shape: str, names: tuple, models: tuple, changes: list[dict]) -> None:
        now = tile_table.numbers(table[kernel]["16"][shape])
        found.extend((kernel, shape, now | change, names, models) for change in changes)

    for kernel, names in KERNELS.items():
        for rows, tiles in TILES.items():
            models = tuple(name for name, its in ROWS.items() if its == rows)
            place(kernel, rows, names, models, [dict(zip(PRODUCT, numbers)) for numbers in tiles])
    weights = [dict(zip(("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages"), tile)) for tile in WEIGHT_GRAD]
    place("linear_weight_grad", "any", ("linear.weight_grad", "linear.finish"), ("B", "H"), weights)
    pairs = [dict(zip(("BLOCK_M", "BLOCK_N", "num_warps", "num_stages"), numbers)) for numbers in PAIRS]
    for kernel, names in STREAMING.items():
        place(kernel, "64", names, ("B at 384",), pairs)
        if kernel != "attention_forward_streaming":  # no model here comes to it with wider heads
            place(kernel, "128", names, ("H",), pairs)
    grads = [dict(zip(("BLOCK_N", "num_warps", "num_stages"), numbers)) for numbers in GRAD]
    place("attention_grad", "64 long", GRADS, ("B/14",), [*grads, {"LONGEST": 208}])
    for kernel, shape, names, models in dict.fromkeys((k, s, n, m) for k, s, _, n, m in found):
        place(kernel, shape, names, models, [{}])
    return found


class Block:
    """A block's forward and backward in bf16 at one model's shape, a ViT's own, without LayerScale."""

    def __init__(self, name: str, most: int = 256):
        batch, grid, heads, width = SHAPES[name]
        case = next(
            c for c in verify.cases(min(batch, most), grid, 16, heads, width, 4 * heads * width) if c.op == "block"
        )
        generator = torch.Generator(DEVICE).manual_seed(0)
        drawn = []
        for index, shape in enumerate(case.shapes):
            t = torch.randn(shape, device=DEVICE, dtype=torch.float32, generator=generator)
            t = t / t[0].numel() ** 0.5 if index in case.weights else t
            drawn.append(t.bfloat16().requires_grad_())
        self.heads, self.tensors = heads, [*drawn[:7], *drawn[8:-1]]
        self.upstream = torch.randn(case.shapes[0], device=DEVICE, generator=generator).bfloat16()

    def call(self):
        first, second = self.tensors[:7], self.tensors[7:]
        return ops.block(*first, None, None, *second, None, None, self.heads)

    def forward(self):
        with torch.no_grad():
            return self.call()

    def run(self):
        y = self.call()
        return [y.detach(), *torch.autograd.grad(y, self.tensors, self.upstream)]


def timed(block: Block, names: tuple, rounds: int) -> list[tuple[str, list[float]]]:
    """Microseconds of the launches of these kernels, a sample a round, those of one name and place in a pass apart."""
    passes = []
    for _ in range(rounds):
        hold_the_device(5_000)
        with launch_clock() as found:
            block.forward()
            block.run()
        for _, _, stop in found:
            stop.synchronize()
        passes.append([(kernel, 1e3 * a.elapsed_time(b)) for kernel, a, b in found if kernel.startswith(names)])
    return [(one[0][0], [round(us, 1) for _, us in one]) for one in zip(*passes)]


def prepare(task: tuple) -> str:
    """Compile what a candidate launches, by running it small; what is wrong with it, or ""."""
    kernel, shape, entry, _, models = task
    try:
        with tile_table.using(arch(), kernel, "16", shape, entry), ops.use_backend("triton"):
            block = Block(models[0], most=16)
            block.forward()
            block.run()
        torch.cuda.synchronize()
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:150]}"
    return ""


def measure(task: tuple, name: str, block: Block, truth: list) -> dict:
    kernel, shape, entry, names, _ = task
    line = {"model": name, "kernel": kernel, "shape": shape, "entry": entry, "why": ""}
    try:
        with tile_table.using(arch(), kernel, "16", shape, entry):
            got = block.run()
            line["error"] = max(((a - b).norm() / b.norm()).item() for a, b in zip(got, truth))
            line["samples"] = [us for _, us in timed(block, names, 5)]
            line["us"] = [statistics.median(us) for us in line["samples"]]
    except Exception as error:
        line["why"] = f"{type(error).__name__}: {str(error)[:150]}"
    print(
        name,
        kernel,
        shape,
        list(entry.values()),
        line.get("us"),
        f"{line.get('error', 0):.0e}",
        line["why"][:60],
        flush=True,
    )
    return line


def winners(lines: list[dict]) -> dict:
    """Of each place of the table the entry that takes the least time over its models; the one in force by a hair."""
    origin = tile_table.measured_on(torch.device(DEVICE))
    places, found = {}, {}
    for line in lines:
        if line.get("error", WRONG) < WRONG and line.get("us"):
            place = places.setdefault((line["kernel"], line["shape"]), {})
            place.setdefault(frozenset(line["entry"].items()), {})[line["model"]] = sum(line["us"])
    for (kernel, shape), entries in places.items():
        old = tile_table.numbers(tile_table.table(arch())[kernel]["16"][shape])
        base = entries.get(frozenset(old.items()))
        if base is None:
            continue
        scores = {
            entry: sum(times[model] / base[model] for model in base) * (1 if times is base else 1 / (1 - MARGIN))
            for entry, times in entries.items()
            if times.keys() == base.keys()
        }
        best = min(scores, key=scores.get)
        entry = next(line["entry"] for line in lines if frozenset(line["entry"].items()) == best)
        found.setdefault(kernel, {}).setdefault("16", {})[shape] = {**entry, "origin": origin}
    return found


def split(out: pathlib.Path) -> None:
    """Of OUT/sweep.json the files that others read: blocks.json and tiles.json."""
    found = json.loads((out / "sweep.json").read_text())
    tiles, blocks = found.pop("tiles"), found.pop("blocks")
    (out / "tiles.json").write_text(tile_table.text(tiles))
    (out / "blocks.json").write_text(json.dumps(found | {"results": blocks}) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--minutes", type=float, default=4)
    parser.add_argument("--split", action="store_true", help="measure nothing: take OUT/sweep.json apart")
    given = parser.parse_args()
    if given.split:
        split(given.out)
        return
    if REHEARSAL:
        parser.error("tiles are chosen by timing them on a GPU, and torch sees none")
    start, ceilings, before = time.monotonic(), timing.ceilings(), timing.device_state()

    def left() -> float:
        return max(1, 60 * given.minutes - (time.monotonic() - start))

    tasks = candidates()
    with multiprocessing.get_context("spawn").Pool(given.workers) as pool:
        waiting = [pool.apply_async(prepare, (task,)) for task in tasks]
        reasons = []
        for one in waiting:
            try:
                reasons.append(one.get(left()))
            except multiprocessing.TimeoutError:
                reasons.append("not compiled in time")
    print(f"[{time.monotonic() - start:.0f} s] compiled {len(tasks)}", flush=True)
    blocks, lines = [], []

    def write() -> None:
        facts = {"ceilings": ceilings, "state": [before, timing.device_state()]}
        found = record(lines, blocks=blocks, tiles=winners(lines), **facts)
        with replacing(given.out / "sweep.json") as beside:
            beside.write_text(json.dumps(found))

    for name in SHAPES:
        with ops.use_backend("triton"):
            block = Block(name)
            truth = block.run()
            everything = timed(block, ("",), 5)
            medians = [(kernel, statistics.median(us)) for kernel, us in everything]
            print(name, "as it is", medians, flush=True)
            blocks.append({"model": name, "us": medians, "samples": [us for _, us in everything]})
            for task, reason in zip(tasks, reasons):
                if name in task[4] and not reason:
                    lines.append(measure(task, name, block, truth))
            write()  # a cut leaves the shapes before it
        del block, truth
    for task, reason in zip(tasks, reasons):
        if reason:
            print("refused:", *task[:3], reason[:120])
    print(f"[{time.monotonic() - start:.0f} s] done")


if __name__ == "__main__":
    main()
