"""Inference on a CPU in fp32: the time of vit_fast over that of timm, on the same weights and images.

python -m benchmarks.cpu_inference [--model NAME] [--batch-size 4] [--pairs 15] [--threads N] [--results FILE.json]

Both models run in turn, ours first in every second pair, and each pair gives one ratio: what else happens on the
machine meets both. The median of the ratios is the figure, its quartiles say how far to trust it. Nothing is timed
before both have given the same logits.
"""

import argparse
import json
import pathlib
import statistics
import time

import torch

from tests import mend_torchvision

mend_torchvision.mend()

import timm  # noqa: E402

import vit_fast  # noqa: E402
from benchmarks.header import header  # noqa: E402


def models_alike(name: str) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Ours and timm's, with the same weights."""
    torch.manual_seed(0)
    theirs = timm.create_model(name).eval()
    for parameter in theirs.parameters():  # a head of zeros, as timm starts it, would make any two models agree
        mean, std = (0.5, 0.3) if parameter.dim() == 1 else (0.0, 0.05)
        torch.nn.init.normal_(parameter, mean, std)
    ours = vit_fast.create_model(name, num_classes=theirs.num_classes).eval()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def check_same(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The distance of the logits over their norm; an end where it is more than rounding."""
    distance = ((ours - theirs).norm() / theirs.norm()).item()
    if not distance < 1e-5:
        raise SystemExit(f"the models disagree: relative distance of the logits {distance:.1e}")
    return distance


def seconds(model: torch.nn.Module, images: torch.Tensor) -> float:
    start = time.perf_counter()
    model(images)
    return time.perf_counter() - start


def time_pairs(ours, theirs, images, count: int) -> list[tuple[float, float]]:
    """Seconds of ours and of timm's, pair by pair."""
    pairs = []
    for index in range(count):
        order = (ours, theirs) if index % 2 else (theirs, ours)
        times = {model: seconds(model, images) for model in order}
        pairs.append((times[ours], times[theirs]))
    return pairs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="vit_base_patch16_224", help="a name that timm and vit_fast share")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--threads", type=int, help="PyTorch's threads (its own choice)")
    parser.add_argument("--results", type=pathlib.Path, metavar="FILE.json", help="keep the figures here too")
    arguments = parser.parse_args()
    if arguments.pairs < 2:
        parser.error(f"--pairs: got {arguments.pairs}, takes 2 or more")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)

    ours, theirs = models_alike(arguments.model)
    images = torch.randn(arguments.batch_size, *theirs.pretrained_cfg["input_size"])
    with torch.inference_mode():
        distance = check_same(ours(images), theirs(images))
        pairs = time_pairs(ours, theirs, images, arguments.pairs)
    low, median, high = statistics.quantiles([a / b for a, b in pairs], n=4, method="inclusive")
    milliseconds = [round(1e3 * statistics.median(column), 1) for column in zip(*pairs)]
    record = {
        "model": arguments.model,
        "batch_size": arguments.batch_size,
        "dtype": "float32",
        **header("torch", "timm", "vit-fast"),
        "distance_of_logits": distance,
        "pairs": arguments.pairs,
        "vit_fast_ms": milliseconds[0],
        "timm_ms": milliseconds[1],
        "ratio": round(median, 4),
        "ratio_quartiles": [round(low, 4), round(high, 4)],
    }
    for name, value in record.items():
        print(f"{name:18} {value}")
    print(f"ours over timm's, median of pairs: {median:.3f}")
    if arguments.results:
        arguments.results.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
