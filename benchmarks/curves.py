"""Training on the kernels beside training in PyTorch from the same seeds: do the curves lie on top of each other?

python -m benchmarks.curves FILE.json [--epochs 30] [--steps 300]

digits     a ViT-Ti on four fifths of scikit-learn's scanned digits, three seeds; the other fifth is held out
stripes    a ViT-S on pictures that are drawn as they are needed, noise over stripes of one of ten directions, three
           seeds; the pictures of the last batches, which no step saw before, are held out

bf16 by autocast, parameters in fp32, AdamW, a warm-up of 30 steps and one cosine. A seed draws the parameters and the
order of the pictures, for both backends the same; what differs is how sums are rounded, which training carries on.
How far that alone takes two curves apart the third run of a seed says: PyTorch again, each parameter at the start off
by a millionth of itself at most. The backends are to differ by no more than these two, and accuracies by no more than
they do between seeds.
"""

import argparse
import json
import math
import pathlib
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

import vit_fast
from benchmarks.records import record
from benchmarks.timing import DEVICE
from vit_fast import data
from vit_fast.checkpoint import replacing
from vit_fast.training import evaluate

WARM_UP = 30  # steps
SEEDS = 3
OURS = "triton" if DEVICE == "cuda" else "auto"  # on a CPU a rehearsal, in PyTorch too
RUNS = ((OURS, 0.0), ("torch", 0.0), ("torch", 2.0**-20))  # backend, by how much of itself a parameter is off
BATCH = {"digits": 128, "stripes": 64 if DEVICE == "cuda" else 4}
CLASSES = 10


def digits_model() -> torch.nn.Module:
    return vit_fast.create_model("vit_tiny_patch16_224", img_size=8, patch_size=2, in_chans=1, num_classes=CLASSES)


def stripes_model() -> torch.nn.Module:
    depth = {} if DEVICE == "cuda" else {"depth": 2}
    return vit_fast.create_model("vit_small_patch16_224", num_classes=CLASSES, **depth)


def digits(seed: int, epochs: int) -> tuple[list[tuple[Tensor, Tensor]], list[tuple[Tensor, Tensor]]]:
    """Batches to train on, in their order, and those held out."""
    pixels, labels = (t.to(DEVICE) for t in data.load_digits())
    pixels = (pixels[:, None].float() / pixels.max() - 0.5) / 0.5
    held_out = torch.arange(len(pixels), device=DEVICE) % 5 == 0
    images, answers = pixels[~held_out], labels[~held_out]
    order = data.ShuffledBatches(len(images), BATCH["digits"], seed)
    batches = [i for epoch in range(epochs) for i in order.epoch(epoch) if len(i) == BATCH["digits"]]
    return [(images[i], answers[i]) for i in batches], [(pixels[held_out], labels[held_out])]


def stripes(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Pictures [count, 3, 224, 224] of stripes under noise, and which of ten directions they have."""
    labels = torch.randint(CLASSES, (count,), device=DEVICE, generator=generator)
    phase, width, level = torch.rand(3, count, 1, 1, device=DEVICE, generator=generator)
    angle = (labels * math.pi / CLASSES).view(-1, 1, 1)
    rows, cols = torch.meshgrid(*2 * [torch.arange(224, device=DEVICE)], indexing="ij")
    along = rows * angle.sin() + cols * angle.cos()
    wave = torch.sin(along * (0.15 + 0.3 * width) + 2 * math.pi * phase) * (0.2 + 0.3 * level)
    noise = torch.randn(count, 3, 224, 224, device=DEVICE, generator=generator)
    return wave[:, None] + noise, labels


def drawn(seed: int, steps: int) -> Iterable[tuple[Tensor, Tensor]]:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return (stripes(BATCH["stripes"], generator) for _ in range(steps))


def trained(
    make: Callable[[], torch.nn.Module],
    batches: Iterable,
    steps: int,
    held_out: Iterable,
    seed: int,
    backend: str,
    off: float,
) -> tuple[list[float], float]:
    """The loss of each step, and the accuracy on what is held out."""
    torch.manual_seed(seed)
    model = make()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + off * (2 * torch.rand_like(parameter) - 1))
    model.to(DEVICE).train()
    optimiser = torch.optim.AdamW(model.parameters(), 5e-4, weight_decay=0.05)
    rate = lambda step: min(1, (step + 1) / WARM_UP) * (1 + math.cos(math.pi * step / steps)) / 2  # noqa: E731
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, rate)
    losses = []
    with vit_fast.use_backend(backend):
        for images, labels in batches:
            with torch.autocast(DEVICE, torch.bfloat16):  # a step's own: it keeps what it cast until it ends
                loss = F.cross_entropy(model(images), labels)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            losses.append(loss.detach())
        _, accuracy = evaluate(model, held_out, torch.device(DEVICE), amp=True)
    return torch.stack(losses).tolist(), accuracy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=pathlib.Path)
    parser.add_argument("--epochs", type=int, default=30 if DEVICE == "cuda" else 1, help="over the digits")
    parser.add_argument("--steps", type=int, default=300 if DEVICE == "cuda" else 2, help="of stripes")
    given = parser.parse_args()
    lines = []
    for task in BATCH:
        for seed in range(SEEDS):
            for backend, off in RUNS:
                if task == "digits":
                    batches, held_out = digits(seed, given.epochs)
                    make, steps = digits_model, len(batches)
                else:
                    batches, held_out = drawn(seed, given.steps), drawn(1000 + seed, 8)
                    make, steps = stripes_model, given.steps
                losses, accuracy = trained(make, batches, steps, held_out, seed, backend, off)
                losses = [round(loss, 5) for loss in losses]
                run = {"task": task, "seed": seed, "backend": backend, "off": off}
                lines.append({**run, "accuracy": accuracy, "losses": losses})
                print(*run.values(), f"last loss {losses[-1]:.4f}, held out {100 * accuracy:.2f} %", flush=True)
                with replacing(given.file) as beside:
                    beside.write_text(json.dumps(record(lines, rehearsal=DEVICE == "cpu")))


if __name__ == "__main__":
    main()
