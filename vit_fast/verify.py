"""A small run of every kernel against PyTorch, on the machine at hand: what `vit-fast env` shows.

`python -m vit_fast.verify DEVICE` prints the report as JSON. On a CPU the kernels run in Triton's interpreter, which a
process must ask for before it starts: `report` starts one.
"""

import importlib.util
import json
import os
import subprocess
import sys

import torch
from torch import Tensor

from vit_fast import ops
from vit_fast.ops.backend import interpreting, why_not_triton

LIMIT = 300  # seconds for the child process

BATCH, TOKENS, HEADS, HEAD_WIDTH, HIDDEN, PATCH, SIDE = 2, 5, 2, 16, 48, 2, 4
WIDTH = HEADS * HEAD_WIDTH
PATCHES = (SIDE // PATCH) ** 2

# op → (the call, the shapes of the tensors that it takes)
CASES = {
    "patch_embed": (
        ops.patch_embed,
        [(BATCH, 3, SIDE, SIDE), (WIDTH, 3, PATCH, PATCH), (WIDTH,), (1 + PATCHES, WIDTH), (1, WIDTH)],
    ),
    "ln_linear": (
        lambda *tensors: ops.ln_linear(*tensors, eps=1e-6),
        [(BATCH, TOKENS, WIDTH), (WIDTH,), (WIDTH,), (HIDDEN, WIDTH), (HIDDEN,)],
    ),
    "attention": (ops.attention, [(BATCH, TOKENS, HEADS, HEAD_WIDTH)] * 3),
    "attention_qkv": (ops.attention_qkv, [(BATCH, TOKENS, 3, HEADS, HEAD_WIDTH)]),
    "attention_maps": (ops.attention_maps, [(BATCH, TOKENS, HEADS, HEAD_WIDTH)] * 2),
    "linear_residual": (
        ops.linear_residual,
        [(BATCH, TOKENS, HIDDEN), (WIDTH, HIDDEN), (WIDTH,), (BATCH, TOKENS, WIDTH), (WIDTH,)],
    ),
    "mlp": (
        lambda *tensors: ops.mlp(*tensors, eps=1e-6),
        [(BATCH, TOKENS, WIDTH), (WIDTH,), (WIDTH,), (HIDDEN, WIDTH), (HIDDEN,), (WIDTH, HIDDEN), (WIDTH,), (WIDTH,)],
    ),
}
WITHOUT_GRADIENT = {"attention_maps": 2, "patch_embed": 1}  # op → how many of its first tensors get no gradient


def _results(name: str, tensors: list[Tensor], upstream: Tensor) -> list[Tensor]:
    """The output of an op, and the gradient of each tensor that has one."""
    spared = WITHOUT_GRADIENT.get(name, 0)
    tensors = [tensor.detach().requires_grad_(index >= spared) for index, tensor in enumerate(tensors)]
    output = CASES[name][0](*tensors)
    gradients = torch.autograd.grad(output, tensors[spared:], upstream.to(output.dtype)) if tensors[spared:] else []
    return [output.detach(), *gradients]


def verify(device: str | torch.device) -> list[dict]:
    """Run every op forward and backward on small random tensors, in Triton and in PyTorch, each against fp64.

    Returns:
        One dict an op and dtype: op, dtype, error (the largest of the output and the gradients, ‖ours − fp64‖/‖fp64‖),
        agrees: each is within twice PyTorch's own error in that dtype and an eighth of its epsilon.

    Raises:
        RuntimeError: where no kernel can run.
    """
    device = torch.device(device)
    # Triton's interpreter computes bfloat16 wrongly: there it would prove nothing.
    dtypes = (torch.float32,) if device.type == "cpu" else (torch.float32, torch.bfloat16, torch.float16)
    lines = []
    for dtype in dtypes:
        for name, (_, shapes) in CASES.items():
            generator = torch.Generator().manual_seed(0)
            tensors = [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]
            exact = [tensor.double() for tensor in tensors]
            with ops.use_backend("torch"):
                upstream = torch.randn(CASES[name][0](*exact).shape, generator=generator).to(device, dtype)
                truth = _results(name, exact, upstream)
                peers = _results(name, tensors, upstream)
            with ops.use_backend("triton"):
                ours = _results(name, tensors, upstream)
            sizes = torch.stack([true.norm() for true in truth])
            errors, allowed = (
                torch.stack([(got.double() - true).norm() for got, true in zip(results, truth)]) / sizes
                for results in (ours, peers)
            )
            lines.append(
                {
                    "op": name,
                    "dtype": str(dtype).removeprefix("torch."),
                    "error": errors.max().item(),
                    "agrees": bool((errors <= 2 * allowed + torch.finfo(dtype).eps / 8).all()),
                }
            )
    return lines


def report(device: str | torch.device) -> tuple[list[dict], str]:
    """`verify` on this device, on a CPU in a process of its own, and how it ran.

    Returns:
        (lines, "in Triton's interpreter" or the like), or where no kernel can run ([], the reason).
    """
    device = torch.device(device)
    if importlib.util.find_spec("triton") is None:
        return [], "triton is not installed, everything runs in PyTorch"
    if device.type != "cpu":
        reason = why_not_triton(device)
        return ([], reason) if reason else (verify(device), "compiled for the device")
    if interpreting():
        return verify(device), "in Triton's interpreter"
    command = [sys.executable, "-m", "vit_fast.verify", "cpu"]
    child = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=LIMIT
    )
    if child.returncode:
        last = (child.stderr.strip().splitlines() or ["no message"])[-1]
        return [], f"the kernels did not run in Triton's interpreter: {last}"
    return json.loads(child.stdout), "in Triton's interpreter"


if __name__ == "__main__":
    print(json.dumps(verify(sys.argv[1])))
