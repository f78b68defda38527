"""Whole models on a CPU: the time of vit_fast over that of the best of timm, transformers and torchvision.

python -m benchmarks.cpu [--model Ti S B] [--dtype bf16 fp32] [--pass inference training] [--batch-size 4]
                         [--rounds 21] [--threads N] [--results FILE.json]

All four run in turn, in reverse order every second round, and each round gives one ratio: ours over the peer whose
median is the least. What else happens on the machine meets all. The median of the ratios is the figure, its quartiles
say how far to trust it. Nobody is timed whose logits are far from fp64.
"""

import argparse
import itertools
import json
import pathlib
import statistics

import torch

from benchmarks import timing, whole_models
from benchmarks.records import record


def compare(case: whole_models.ModelCase, rounds: int) -> dict:
    """A row: milliseconds of each, and quartiles of the ratio of ours to the best peer, round by round."""
    found = whole_models.measure(case, list(whole_models.PEERS), rounds)
    wrong = {name: one.wrong for name, one in found.items() if one.wrong}
    if wrong:
        raise SystemExit(f"{case}: {wrong}")
    us = {name: one.us for name, one in found.items() if one.us}
    medians = {name: statistics.median(samples) for name, samples in us.items()}
    best = min(medians.keys() - {"vit_fast"}, key=medians.get)
    low, median, high = statistics.quantiles([a / b for a, b in zip(us["vit_fast"], us[best])], n=4, method="inclusive")
    return {
        **case._asdict(),
        "ms": {name: round(value / 1e3, 2) for name, value in medians.items()},
        "best_peer": best,
        "ratio": round(median, 3),
        "quartiles": [round(low, 3), round(high, 3)],
        "rounds": rounds,
        "samples_us": {name: [round(x) for x in samples] for name, samples in us.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", nargs="+", default=["Ti", "S", "B"], choices=list(whole_models.NAMES), metavar="M")
    parser.add_argument("--dtype", nargs="+", default=["bf16", "fp32"], choices=("bf16", "fp32"))
    parser.add_argument("--pass", nargs="+", default=["inference", "training"], dest="ways", metavar="PASS")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--threads", type=int, help="PyTorch's threads (its own choice)")
    parser.add_argument("--results", type=pathlib.Path, metavar="FILE.json", help="keep the figures here too")
    given = parser.parse_args()
    if timing.DEVICE != "cpu":
        parser.error("a GPU is here: pytest benchmarks/bench_models.py compares on it; CUDA_VISIBLE_DEVICES= hides it")
    if given.rounds < 2:
        parser.error(f"--rounds: got {given.rounds}, takes 2 or more")
    if given.threads:
        torch.set_num_threads(given.threads)
    rows = []
    for name, dtype, way in itertools.product(given.model, given.dtype, given.ways):
        row = compare(whole_models.ModelCase(name, 224, given.batch_size, dtype, way), given.rounds)
        rows.append(row)
        low, high = row["quartiles"]
        print(
            f"{name:3} {dtype} {way:9} ours over {row['best_peer']:12} {row['ratio']:.3f} ({low:.3f} to {high:.3f})",
            row["ms"],
            flush=True,
        )
    if given.results:
        given.results.write_text(json.dumps(record(rows), indent=1) + "\n")


if __name__ == "__main__":
    main()
