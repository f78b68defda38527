"""Attention on a CPU in PyTorch: SDPA beside two products and a softmax, what `vit_fast.ops.attention` chooses by.

python -m benchmarks.cpu_attention [--threads N] [--rounds 20] [--results FILE.json]
"""

import argparse
import json
import pathlib

import torch

from benchmarks import contenders, timing
from benchmarks.launches import DTYPES
from benchmarks.records import record
from vit_fast.ops.attention import unfused

# Images, tokens, heads of 64.
SHAPES = ((8, 50, 12), (2, 197, 3), (2, 197, 6), (2, 197, 12), (2, 257, 12), (1, 577, 12), (1, 1370, 6), (32, 197, 12))


FORMS = {"sdpa": contenders.sdpa, "unfused": lambda qkv: unfused(*qkv.unbind(2), qkv.shape[-1] ** -0.5)}


def measure(shape: tuple[int, int, int], dtype: str, training: bool, rounds: int) -> dict:
    batch, tokens, heads = shape
    qkv = torch.randn(batch, tokens, 3, heads, 64).to(DTYPES[dtype]).requires_grad_(training)
    upstream = torch.randn(batch, tokens, heads * 64).to(qkv.dtype)

    def run(attention):
        if training:
            return lambda: torch.autograd.grad(attention(qkv), qkv, upstream)
        return lambda: attention(qkv)

    with torch.set_grad_enabled(training):
        samples = timing.time_in_turn({name: run(attention) for name, attention in FORMS.items()}, rounds)
    place = {
        "batch": batch,
        "tokens": tokens,
        "heads": heads,
        "dtype": dtype,
        "pass": "both" if training else "forward",
    }
    return {
        **place,
        "us": {name: [round(x, 1) for x in timing.quantiles(us)] for name, us in samples.items()},
        "samples": {name: [round(x, 1) for x in us] for name, us in samples.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu_attention", description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, help="PyTorch's threads (its own choice)")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--results", type=pathlib.Path, metavar="FILE.json", help="keep the figures here too")
    given = parser.parse_args()
    if timing.DEVICE != "cpu":
        parser.error("a GPU is here: CUDA_VISIBLE_DEVICES= hides it")
    if given.threads:
        torch.set_num_threads(given.threads)
    rows = []
    for dtype in ("bf16", "fp16", "fp32"):
        for shape in SHAPES:
            for training in (False, True):
                rows.append(measure(shape, dtype, training, given.rounds))
                print({name: value for name, value in rows[-1].items() if name != "samples"}, flush=True)
    if given.results:
        given.results.write_text(json.dumps(record(rows), indent=1) + "\n")


if __name__ == "__main__":
    main()
