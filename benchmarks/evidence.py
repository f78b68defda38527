"""Where PyTorch was measured to be faster than an op: vit_fast/ops/evidence.json, made from the files of results alone.

python -m benchmarks.evidence

A line counts where the quickest fifth of ours is slower than the slowest fifth of a form that PyTorch itself offers
eagerly, there and at every larger batch that was measured: a finding is for all rows from its own up.
"""

import json

from benchmarks import contenders
from benchmarks.pages import RESULTS
from vit_fast.ops.attention import SDPA
from vit_fast.ops.evidence import FILE

# What an op's backend in PyTorch runs, where it is not the contender "eager". A whole block is judged by its parts.
FORMS = {"attention": tuple(SDPA)}
NEVER_ASK = ("block", "swiglu", "rope_attention", "window_attention", "patch_embed_bytes")  # ops that ask no evidence
OPS = {"projection": "linear_residual", "fc2": "linear_residual"}


def size(line: dict) -> tuple[list[int], int]:
    """The shape and the rows of a line's case, as `vit_fast.ops.evidence.Finding` has them."""
    D, heads, hidden = contenders.MODELS[line["model"].partition(" at ")[0]]
    batch, tokens = line["batch"], line["tokens"]
    if line["op"] == "patch_embed":
        pixels, patch = contenders.IMAGES[tokens]
        return [D, 3 * patch**2], batch * (pixels // patch) ** 2
    if line["op"] == "attention":
        return [tokens, tokens, D // heads], batch * heads
    weights = {"ln_linear": [3 * D, D], "projection": [D, D], "fc2": [D, hidden], "mlp": [D, hidden]}
    return weights[line["op"]], batch * tokens


def findings(file: dict) -> list[dict]:
    """Those of one file of results of ops."""
    found, won = [], set()
    for line in sorted(file["results"], key=lambda line: -line["batch"]):
        case = tuple(line[name] for name in ("op", "model", "tokens", "dtype", "direction"))
        forms = FORMS.get(line["op"], ("eager",))
        theirs = {form: line["us"][form] for form in forms if form in line["us"]}
        ours = line["us"].get("vit_fast")
        if line["op"] in NEVER_ASK or not ours or not theirs:
            continue
        form = min(theirs, key=lambda name: theirs[name][1])
        if case in won or ours[0] <= theirs[form][2]:
            won.add(case)
            continue
        shape, rows = size(line)
        found.append(
            {
                "op": OPS.get(line["op"], line["op"]),
                "pass": {"forward": "inference", "both": "training"}[line["direction"]],
                "dtype": {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}[line["dtype"]],
                "shape": shape,
                "rows": rows,
                "form": form,
                "us": [ours[1], theirs[form][1]],
                "device": file["device"],
                "date": file["date"],
                "commit": file["commit"],
            }
        )
    return found


def text() -> str:
    """The file as it shall be: of each architecture what every device of it that was measured says."""
    table = {}
    for path in sorted(RESULTS.parent.glob("*/ops.json")):
        file = json.loads(path.read_text())
        table.setdefault(file["architecture"], []).extend(findings(file))
    parts = [
        f'  "{name}": [\n' + ",\n".join(f"    {json.dumps(one)}" for one in lines) + "\n  ]"
        for name, lines in table.items()
    ]
    return "{\n" + ",\n".join(parts) + "\n}\n"


if __name__ == "__main__":
    FILE.write_text(text())
