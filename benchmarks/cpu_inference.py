"""Inference on a CPU in fp32: the time of vit_fast over that of timm, on the same weights and images.

python -m benchmarks.cpu_inference [--model vit_base_patch16_224] [--batch-size 4] [--pairs 15] [--threads N]

Both models run in turn, ours first in every second pair, and each pair gives one ratio: what else happens on the
machine meets both. The median of the ratios is the figure, its quartiles say how far to trust it. Nothing is timed
before both have given the same logits.
"""

import argparse
import importlib.metadata
import platform
import statistics
import time

import torch

from tests import mend_torchvision

mend_torchvision.mend()

import timm  # noqa: E402

import vit_fast  # noqa: E402


def seconds(model: torch.nn.Module, images: torch.Tensor) -> float:
    start = time.perf_counter()
    model(images)
    return time.perf_counter() - start


def check_same(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The distance of the logits over their norm; an error where it is more than rounding."""
    distance = ((ours - theirs).norm() / theirs.norm()).item()
    if not distance < 1e-5:
        raise SystemExit(f"the models disagree: relative distance of the logits {distance:.1e}")
    return distance


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="vit_base_patch16_224", help="a name that timm and vit_fast share")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--threads", type=int, help="PyTorch's threads (its own choice)")
    arguments = parser.parse_args()
    if arguments.pairs < 2:
        parser.error(f"--pairs: got {arguments.pairs}, takes 2 or more")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)

    torch.manual_seed(0)
    theirs = timm.create_model(arguments.model).eval()
    ours = vit_fast.create_model(arguments.model, num_classes=theirs.num_classes).eval()
    for parameter in theirs.parameters():  # a head of zeros, as timm starts it, would make any two models agree
        mean, std = (0.5, 0.3) if parameter.dim() == 1 else (0.0, 0.05)
        torch.nn.init.normal_(parameter, mean, std)
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(arguments.batch_size, *theirs.pretrained_cfg["input_size"])

    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "timm", "vit-fast"))
    print(f"{arguments.model}, batch {arguments.batch_size}, fp32, {torch.get_num_threads()} threads")
    print(f"{platform.machine()}, {versions}")
    with torch.inference_mode():
        print(f"logits agree: relative distance {check_same(ours(images), theirs(images)):.1e}")
        for model in (ours, theirs):  # warm
            model(images)
        pairs = []
        for index in range(arguments.pairs):
            first, second = (ours, theirs) if index % 2 else (theirs, ours)
            times = {model: seconds(model, images) for model in (first, second)}
            pairs.append((times[ours], times[theirs]))
    ratios = [a / b for a, b in pairs]
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
    for name, column in (("vit_fast", 0), ("timm", 1)):
        print(f"{name:9} {statistics.median(pair[column] for pair in pairs) * 1e3:8.1f} ms, median")
    print(f"ours over timm's, median of {arguments.pairs} pairs: {median:.3f} (quartiles {low:.3f} to {high:.3f})")


if __name__ == "__main__":
    main()
