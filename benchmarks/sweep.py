"""Tiles side by side, in the block that launches them: what each costs where it is used.

python -m benchmarks.sweep OUT.json [--workers N] [--minutes 4] [--only KERNEL …]

Every candidate takes the place of its entry in turn, and a block of a ViT-B, L and H runs forward and backward; each
launch of that kernel is timed by the device. A candidate whose block gives other numbers is marked wrong.
"""

import argparse
import json
import multiprocessing
import os
import pathlib
import statistics
import time

import torch
from vit_fast.kernels import layer_norm, tile_table

from benchmarks.gpu import DEVICE, REHEARSAL, SLEEP, hold_the_device, launch_clock, record
from vit_fast import ops, verify

SHAPES = {
    "B": (256, 14, 12, 64),
    "H": (128, 16, 16, 80),
    "B at 8": (8, 14, 12, 64),
    "B at 1": (1, 14, 12, 64),
    "B/14": (256, 16, 12, 64),
}
if REHEARSAL:
    SHAPES = {"B": (2, 2, 2, 32)}
ARCH = "interpreter" if REHEARSAL else tile_table.architecture(torch.device(DEVICE, 0))
PRODUCT = "BLOCK_M", "BLOCK_N", "BLOCK_K", "PIECES", "num_warps", "num_stages", "blocks_per_sm"
TILES = [
    *((128, 256, 64, pieces, 8, 3, 1) for pieces in (1, 2, 4)),
    (128, 256, 64, 4, 8, 4, 1),
    (128, 256, 128, 2, 8, 2, 1),
    *((128, 128, 64, pieces, warps, stages, 2) for warps in (4, 8) for stages in (3, 2) for pieces in (2, 4)),
    (128, 128, 64, 1, 8, 5, 1),
    *((256, 128, 64, pieces, 8, 3, 1) for pieces in (1, 2)),
    *((64, 256, 64, pieces, 4, 2, 2) for pieces in (2, 4)),
    (64, 128, 64, 1, 4, 3, 3),
]
FEW = [
    *((64, 64, 64, 1, 4, stages, 2) for stages in (3, 4, 6)),
    (64, 64, 128, 1, 4, 3, 1),
    (64, 64, 128, 1, 4, 4, 1),
    (64, 128, 64, 1, 4, 4, 1),
    (128, 64, 64, 1, 4, 4, 1),
    (64, 32, 64, 1, 4, 5, 2),
    (64, 32, 128, 1, 4, 4, 1),
    (128, 128, 64, 1, 8, 4, 1),
]
KERNELS = {
    "ln_linear_forward": ("ln_linear.forward",),
    "linear_residual_forward": ("linear_residual.forward",),
    "mlp_fc1": ("mlp.fc1",),
    "mlp_hidden_grad": ("mlp.hidden_grad",),
    "linear_input_grad": ("linear.input_grad",),
    "linear_weight_grad": ("linear.weight_grad",),
}
ATTENTION = [(rows, warps, stages) for rows, warps in ((64, 4), (128, 8), (128, 4)) for stages in (1, 2, 3)]
GRAD = [(keys, warps, stages) for keys in (16, 32, 64) for warps in (4, 8) for stages in (1, 2)]


def candidates() -> list[tuple]:
    """(table's kernel, shape class, entry, names of its launches)."""
    found = []
    table = tile_table.table(ARCH)
    for kernel, names in KERNELS.items():
        weight = kernel == "linear_weight_grad"
        for numbers in dict.fromkeys((*tile[:3], 1, *tile[4:]) for tile in TILES) if weight else TILES:
            entry = dict(zip(PRODUCT, numbers)) | {"TMA": 1, "origin": "predicted"}
            if weight:
                del entry["PIECES"]
            found.append((kernel, "any" if weight else "many", entry, names))
        for numbers in FEW if not weight else ():
            found.append((kernel, "few", dict(zip(PRODUCT, numbers)) | {"TMA": 1, "origin": "predicted"}, names))
    for shape, entry in table["attention_forward"]["16"].items():
        for rows, warps, stages in ATTENTION:
            new = entry | {"BLOCK_M": rows, "num_warps": warps, "num_stages": stages}
            found.append(("attention_forward", shape, new, ("attention.forward",)))
    for shape in ("64", "64 long", "80"):
        for keys, warps, stages in GRAD:
            entry = table["attention_grad"]["16"].get(shape, {}) | {"LONGEST": 272}
            new = entry | {"BLOCK_N": keys, "num_warps": warps, "num_stages": stages}
            found.append(("attention_grad", shape, new, ("attention.grad",)))
    for elements in (1024, 2048, 4096, 8192):
        for warps in (1, 2, 4, 8):
            if elements // warps in (512, 1024, 2048):
                found.append(("layer_norm", "", {"elements": elements, "warps": warps}, ("layer_norm.",)))
    return found


class Block:
    """A block's forward and backward in bf16 at one model's shape."""

    def __init__(self, name: str):
        batch, grid, heads, width = SHAPES[name]
        case = next(c for c in verify.cases(batch, grid, 16, heads, width, 4 * heads * width) if c.op == "block")
        generator = torch.Generator(DEVICE).manual_seed(0)
        self.case, self.tensors = case, []
        for index, shape in enumerate(case.shapes):
            t = torch.randn(shape, device=DEVICE, dtype=torch.float32, generator=generator)
            t = t / t[0].numel() ** 0.5 if index in case.weights else t
            self.tensors.append(t.bfloat16().requires_grad_())
        self.tensors = self.tensors[:-1]  # a ViT's own block, without LayerScale
        self.upstream = torch.randn(case.shapes[0], device=DEVICE, generator=generator).bfloat16()

    def call(self, *tensors):
        x, *t = tensors
        heads = self.case.call.args[0]
        return ops.block(x, *t[:6], None, None, *t[7:], None, None, heads)

    def forward(self):
        with torch.no_grad():
            return self.call(*self.tensors)

    def run(self):
        y = self.call(*self.tensors)
        wanted = [t for i, t in enumerate(self.tensors) if i != 7]
        return [y.detach(), *torch.autograd.grad(y, wanted, self.upstream)]


def concerned(name: str, kernel: str, shape: str) -> bool:
    """Whether a model's shape comes to that entry."""
    if kernel.startswith("attention"):
        return True
    return (shape == "few") == name.startswith("B at") if shape else not name.startswith("B at")


def using(kernel: str, shape: str, entry: dict):
    if kernel != "layer_norm":
        return tile_table.using(ARCH, kernel, "16", shape, entry)
    from unittest import mock

    def whole_rows(K, _):
        block = 1 << (K - 1).bit_length()
        return {"BLOCK_M": max(1, entry["elements"] // block), "BLOCK_K": block, "num_warps": entry["warps"]}

    return mock.patch.object(layer_norm, "whole_rows", whole_rows)


def timed(block: Block, names: tuple, rounds: int) -> dict[str, float]:
    """Median microseconds of the launches of these kernels, those of one name and place in a pass apart."""
    passes = []
    for _ in range(rounds):
        hold_the_device(SLEEP // 4)
        with launch_clock() as found:
            block.forward()
            block.run()
        for _, _, stop in found:
            stop.synchronize()
        passes.append([(kernel, 1e3 * a.elapsed_time(b)) for kernel, a, b in found if kernel.startswith(names)])
    return [(one[0][0], round(statistics.median(us for _, us in one), 1)) for one in zip(*passes)]


def prepare(task: tuple) -> str:
    kernel, shape, entry, _ = task
    try:
        with using(kernel, shape, entry), ops.use_backend("triton"):
            for name, (batch, *rest) in SHAPES.items():
                if not concerned(name, kernel, shape):
                    continue
                SHAPES[name] = (min(batch, 16), *rest)
                block = Block(name)
                block.forward()
                block.run()
        if not REHEARSAL:
            torch.cuda.synchronize()
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:150]}"
    return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--minutes", type=float, default=4)
    parser.add_argument("--only", nargs="*", default=())
    given = parser.parse_args()
    given.only = set(given.only)
    start = time.monotonic()
    tasks = [task for task in candidates() if not given.only or given.only & {task[0], task[1]}]
    with multiprocessing.get_context("spawn").Pool(given.workers) as pool:
        waiting = [pool.apply_async(prepare, (task,)) for task in tasks]
        reasons = []
        for one in waiting:
            try:
                reasons.append(one.get(max(1, 60 * given.minutes - (time.monotonic() - start))))
            except multiprocessing.TimeoutError:
                reasons.append("not compiled in time")
    print(f"[{time.monotonic() - start:.0f} s] compiled {len(tasks)}", flush=True)
    while (given.out.parent / "busy").exists():
        time.sleep(0.5)
    print(f"[{time.monotonic() - start:.0f} s] alone", flush=True)
    lines = []
    for name in SHAPES:
        block = Block(name)
        with ops.use_backend("triton"):
            truth = block.run()
            everything = timed(block, ("",), 5)
            print(name, "as it is", everything, flush=True)
            lines.append({"model": name, "kernel": "all", "us": everything})
            for (kernel, shape, entry, names), reason in zip(tasks, reasons):
                if not concerned(name, kernel, shape):
                    continue
                line = {"model": name, "kernel": kernel, "shape": shape, "entry": entry, "why": reason}
                if not reason:
                    try:
                        with using(kernel, shape, entry):
                            got = block.run()
                            line["error"] = max(
                                ((a - b).norm() / b.norm()).item() for a, b in zip(got, truth) if b.norm() > 0
                            )
                            line["us"] = timed(block, names, 3)
                            if not line["us"]:
                                continue
                    except Exception as error:
                        line["why"] = f"{type(error).__name__}: {str(error)[:150]}"
                lines.append(line)
                numbers = [v for k, v in entry.items() if k not in ("origin", "TMA", "reason")]
                times = [us for _, us in line.get("us", [])]
                print(name, kernel, shape, numbers, times, f"{line.get('error', 0):.0e}", line["why"][:60], flush=True)
        del block, truth
        given.out.write_text(json.dumps(record(lines)))
    print(f"[{time.monotonic() - start:.0f} s] done")


if __name__ == "__main__":
    main()
