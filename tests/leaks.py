"""What is still there after a thousand passes, and after a thousand times accelerate and restore.

python -m tests.leaks [--passes 1000]

After a warm-up, tensors and modules alive and the memory of the process are counted, and again at the end: the numbers
must be the same, and the memory must not have grown by more than what an allocator moves. In the interpreter a pass
takes a second: there are a tenth as many, of one layer.
"""

import argparse
import functools
import gc
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable

import torch

import vit_fast
from tests import counts

WARM_UP = 20
MAY_GROW = 4.0  # MiB: a leak of one float32 number a pass would stay below it, one of a token's width would not
SMALL = {"embed_dim": 32, "num_heads": 2, "depth": 2, "img_size": 32, "num_classes": 5}


def alive() -> int:
    """Tensors and modules that Python still holds."""
    gc.collect()
    # By the type, for isinstance asks lazy modules of other libraries who they are, which imports them.
    return sum(issubclass(type(thing), torch.Tensor | torch.nn.Module) for thing in gc.get_objects())


def resident() -> float:
    """MiB of the process in memory."""
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def grown(work: Callable[[], object], passes: int) -> tuple[int, float]:
    """By how many tensors and modules, and by how many MiB, the process grows over so many calls."""
    for _ in range(min(WARM_UP, passes)):
        work()
    things, memory = alive(), resident()
    for _ in range(passes):
        work()
    return alive() - things, resident() - memory


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


def accelerated(library: str) -> Callable[[], None]:
    """accelerate, a forward pass and restore, of a small model of that library."""
    if library == "timm":
        import timm

        model = timm.create_model("vit_tiny_patch16_224", **SMALL)
    else:
        import transformers

        sizes = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 64}
        model = transformers.ViTModel(transformers.ViTConfig(image_size=32, **sizes))
    model = model.eval()
    images = torch.randn(2, 3, 32, 32)

    @torch.no_grad()
    def work() -> None:
        vit_fast.accelerate(model)
        model(images)
        vit_fast.restore(model)

    return work


KINDS = {
    "forward": functools.partial(passes_of, "torch", False),
    "forward and backward": functools.partial(passes_of, "torch", True),
    "forward and backward in the interpreter": functools.partial(passes_of, "triton", True),
    "accelerate and restore, timm": functools.partial(accelerated, "timm"),
    "accelerate and restore, transformers": functools.partial(accelerated, "transformers"),
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
        torch.set_num_threads(1)
        print(*grown(KINDS[given.kind](), count_of(given.kind, given.passes)))
        return 0
    begin, rows = time.monotonic(), []
    for kind in KINDS:
        environment = {**os.environ, "TRITON_INTERPRET": "1" if "interpreter" in kind else "0"}
        command = [sys.executable, "-m", "tests.leaks", "--passes", str(given.passes), "--kind", kind]
        said = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
        things, memory = said.split()[-2:]
        rows.append(
            {
                "what": kind,
                "passes": count_of(kind, given.passes),
                "tensors and modules more": int(things),
                "MiB more": round(float(memory), 2),
            }
        )
        print(rows[-1], flush=True)
    leaking = [row for row in rows if row["tensors and modules more"] > 0 or row["MiB more"] > MAY_GROW]
    counts.keep(
        "leaks",
        f"After {WARM_UP} passes of warm-up: tensors and modules that are alive, and memory of the process, over more "
        f"passes of a small model. More than {MAY_GROW:g} MiB, or one thing more, is a leak.",
        f"python -m tests.leaks --passes {given.passes}",
        time.monotonic() - begin,
        {"kinds": len(rows), "that leak": len(leaking)},
        table=rows,
    )
    return 1 if leaking else 0


if __name__ == "__main__":
    sys.exit(main())
