"""What is still there after a thousand passes, and after a thousand times accelerate and restore.

python -m tests.leaks [--passes 1000]

After a warm-up is counted what is alive, and again at the end: tensors and modules, whatever else Python tracks, its
blocks of memory, the bytes that C and C++ have of malloc, and the process in memory. In the interpreter a pass takes a
second: there are a tenth as many, of one layer.
"""

import argparse
import ctypes
import functools
import gc
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

import vit_fast
from tests import counts, mend_torchvision

WARM_UP = 20
# What may grow: Python's blocks and malloc's bytes by what counters and dictionaries take now and then; a pass that
# leaves a number leaves a block, one that leaves a tensor several hundred bytes. Blocks grow early and no further: by
# 278 of new models after 200 passes, 428 after 1,000, 350 after 2,000. A page that is touched first, MiB.
BLOCKS, BYTES, MIB = 500, 48 << 10, 4.0
SMALL = {"embed_dim": 32, "num_heads": 2, "depth": 2, "img_size": 32, "num_classes": 5}


class _Malloc(ctypes.Structure):
    """glibc's struct mallinfo2."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


def allocated() -> int:
    """Bytes of malloc that are in use, of all threads: every tensor's memory, too. 0 where it is not glibc's."""
    counter = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if counter is None:
        return 0
    counter.restype = _Malloc
    info = counter()
    return info.uordblks + info.hblkhd


class Held(NamedTuple):
    """What the process holds."""

    things: int  # tensors and modules
    objects: int  # all that Python's collector knows
    blocks: int  # of Python's memory: numbers and texts too
    bytes: int  # of malloc
    resident: float  # MiB


def now() -> tuple:
    """The fields of `Held`; not one itself, which would be an object more."""
    gc.collect()
    objects = gc.get_objects()
    # By the type, for isinstance asks lazy modules of other libraries who they are, which imports them.
    things = sum(issubclass(type(thing), torch.Tensor | torch.nn.Module) for thing in objects)
    count, objects = len(objects), None
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return things, count, sys.getallocatedblocks(), allocated(), pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def held(work: Callable[[], object], passes: int) -> tuple[Held, Held]:
    """What the process holds before so many calls, warmed up, and after them."""
    for _ in range(min(WARM_UP, passes)):
        work()
    before = now()
    for _ in range(passes):
        work()
    after = now()
    return Held(*before), Held(*after)


def leaks(before: Held, after: Held) -> list[str]:
    """What has grown, and by how much, that should not."""
    more = {name: now - then for name, then, now in zip(Held._fields, before, after)}
    may = {"things": 0, "objects": 0, "blocks": BLOCKS, "bytes": BYTES, "resident": MIB}
    return [f"{more[name]:g} {name}" for name in may if more[name] > may[name]]


def passes_of(backend: str, train: bool) -> Callable[[], None]:
    """A forward pass, and a backward pass where it trains."""
    sizes = SMALL | ({"depth": 1} if backend == "triton" else {})
    model = vit_fast.create_model("vit_tiny_patch16_224", drop_path_rate=0.1 * train, **sizes).train(train)
    images = torch.randn(2, 3, 32, 32)

    def work() -> None:
        with vit_fast.use_backend(backend), torch.set_grad_enabled(train):
            logits = model(images)
            if train:
                logits.square().sum().backward()
                model.zero_grad()

    return work


def create(library: str) -> torch.nn.Module:
    """A small model of that library."""
    if library == "timm":
        import timm

        model = timm.create_model("vit_tiny_patch16_224", **SMALL)
    else:
        import transformers

        sizes = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 64}
        model = transformers.ViTModel(transformers.ViTConfig(image_size=32, **sizes))
    return model.eval()


def accelerated(library: str, anew: bool = False) -> Callable[[], None]:
    """accelerate, a forward pass and restore, of one small model of that library or of a new one each time."""
    model = create(library)
    images = torch.randn(2, 3, 32, 32)

    @torch.no_grad()
    def work() -> None:
        one = create(library) if anew else model
        vit_fast.accelerate(one)
        one(images)
        if not anew:
            vit_fast.restore(one)

    return work


KINDS = {
    "forward": functools.partial(passes_of, "torch", False),
    "forward and backward": functools.partial(passes_of, "torch", True),
    "forward and backward in the interpreter": functools.partial(passes_of, "triton", True),
    "accelerate and restore, timm": functools.partial(accelerated, "timm"),
    "accelerate and restore, transformers": functools.partial(accelerated, "transformers"),
    "accelerate a new model, timm": functools.partial(accelerated, "timm", anew=True),
}


def count_of(kind: str, passes: int) -> int:
    return max(1, passes // 10) if "interpreter" in kind else passes


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.leaks", description=__doc__.partition("\n")[0])
    parser.add_argument("--passes", type=int, default=1000, help="of each kind (1000)")
    parser.add_argument("--kind", choices=list(KINDS), help="one kind in this process, as the others are in their own")
    given = parser.parse_args()
    if given.kind:
        if "interpreter" in given.kind:
            from tests.mend_interpreter import mend

            mend()
        mend_torchvision.mend()
        torch.set_num_threads(1)
        for found in held(KINDS[given.kind](), count_of(given.kind, given.passes)):
            print(*found)
        return 0
    begin, rows, leaking = time.monotonic(), [], 0
    for kind in KINDS:
        environment = {**os.environ, "TRITON_INTERPRET": "1" if "interpreter" in kind else "0"}
        command = [sys.executable, "-m", "tests.leaks", "--passes", str(given.passes), "--kind", kind]
        said = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
        before, after = (Held(*map(float, line.split())) for line in said.splitlines()[-2:])
        found = leaks(before, after)
        leaking += bool(found)
        rows.append(
            {
                "what": kind,
                "passes": count_of(kind, given.passes),
                "tensors and modules": f"{before.things:.0f} → {after.things:.0f}",
                "objects of Python": f"{before.objects:.0f} → {after.objects:.0f}",
                "blocks of Python": f"{before.blocks:.0f} → {after.blocks:.0f}",
                "MiB of malloc": f"{before.bytes / 2**20:.3f} → {after.bytes / 2**20:.3f}",
                "MiB resident": f"{before.resident:.2f} → {after.resident:.2f}",
            }
        )
        print(rows[-1], *found, flush=True)
    counts.keep(
        "leaks",
        f"What a process holds after {WARM_UP} passes of warm-up, and after more passes of a small model. One thing or "
        f"object more is a leak, and so are {BLOCKS} blocks, {BYTES >> 10} KiB of malloc or {MIB:g} MiB.",
        f"python -m tests.leaks --passes {given.passes}",
        time.monotonic() - begin,
        {"kinds": len(rows), "that leak": leaking},
        table=rows,
    )
    return 1 if leaking else 0


if __name__ == "__main__":
    sys.exit(main())
