"""The largest batch of a training step that fits into a GPU's memory: ours and timm's.

python -m benchmarks.largest OUT.json [--model B …]

bf16, 224 pixels, eager, AdamW's state included. The memory of small steps says where the end must be; from there the
search goes on until a batch fits and one a hundredth larger does not: "batch" and "too_large".
Nothing is known without a GPU: then the small steps of a tiny model are run, as a rehearsal.
"""

import argparse
import json
import pathlib
from collections.abc import Callable

import torch

from benchmarks import timing, whole_models
from benchmarks.records import record
from benchmarks.timing import DEVICE
from vit_fast.checkpoint import replacing

CONTENDERS = ("vit_fast", "timm")
NO_ROOM = ("out of memory", "ALLOC_FAILED", "unable to find an engine")
SMALL = (16, 32) if DEVICE == "cuda" else (1, 2)


class Steps:
    """Training steps of one model at any batch, and the memory that each took."""

    def __init__(self, name: str, contender: str):
        self.case = whole_models.ModelCase(name, 224, 1, "bf16", "training")
        self.model = whole_models.built(self.case, contender)
        self.optimiser = whole_models.fused_adamw(self.model)

    def peak(self, batch: int) -> int:
        """Bytes of a step."""
        timing.empty_memory()
        images, labels = whole_models.drawn(self.case._replace(batch=batch))
        whole_models.training_step(self.optimiser, lambda: self.model(images), labels)()
        return torch.cuda.max_memory_allocated() if DEVICE == "cuda" else 0

    def fits(self, batch: int) -> bool:
        try:
            self.peak(batch)
        except RuntimeError as error:  # cuBLAS, cuDNN and Triton say it in words of their own
            if not any(words in str(error) for words in NO_ROOM):
                raise
            self.optimiser.zero_grad(set_to_none=True)
            return False
        return True


def search(fits: Callable[[int], bool], guess: int) -> tuple[int, int]:
    """A batch that fits and one at most a hundredth larger that does not, by steps from a guess that double."""
    step, first = max(1, guess // 100), fits(guess)
    fitting, too_large = (guess, 0) if first else (0, guess)
    while not (fitting and too_large):
        batch = fitting + step if first else max(1, too_large - step)
        if fits(batch):
            fitting = batch
        elif batch == 1:
            return 0, 1
        else:
            too_large = batch
        step *= 2
    while too_large - fitting > max(1, fitting // 100):
        batch = (fitting + too_large) // 2
        fitting, too_large = (batch, too_large) if fits(batch) else (fitting, batch)
    return fitting, too_large


def find(name: str, contender: str) -> dict:
    """One line of results."""
    steps = Steps(name, contender)
    steps.peak(SMALL[0])  # the optimiser's state is made here
    first, second = map(steps.peak, SMALL)
    line = {"model": whole_models.NAMES[name], "contender": contender, "dtype": "bf16"}
    if DEVICE == "cpu":
        return line
    an_image = (second - first) / (SMALL[1] - SMALL[0])
    timing.empty_memory()
    room = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()
    batch = int((room - first) / an_image) + SMALL[0]
    fitting, too_large = search(steps.fits, batch)
    return {**line, "batch": fitting, "too_large": too_large, "mb_an_image": round(an_image / 1e6, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=pathlib.Path)
    models = ["tiny"] if DEVICE == "cpu" else ["B", "L", "H"]
    parser.add_argument("--model", action="append", choices=models, help="only this one; may be repeated")
    given = parser.parse_args()
    lines = []
    for name in given.model or models:
        for contender in CONTENDERS:
            lines.append(find(name, contender))
            timing.empty_memory()
            print(*lines[-1].values(), flush=True)
            with replacing(given.out) as beside:
                beside.write_text(json.dumps(record(lines, rehearsal=DEVICE == "cpu")))


if __name__ == "__main__":
    main()
