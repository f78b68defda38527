"""Runs of the kernels against PyTorch, each held to fp64 on the machine at hand: what `vit-fast env` shows.

`verify` runs every op once, small; `python -m vit_fast.verify DEVICE` prints that as JSON. On a CPU the kernels run in
Triton's interpreter, which a process must ask for before it starts: `report` starts one. `verify_entries` checks every
entry of the tile table in force, at sizes that fill tiles and go past them.
"""

import collections
import contextlib
import functools
import itertools
import json
import math
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vit_fast import ops
from vit_fast.ops.backend import (
    dtype_name,
    float32_precision,
    interpreting,
    triton_is_missing,
    use_triton,
    why_not_triton,
)

LIMIT = 300  # seconds for the child process
FEWEST_ROWS = 8


class Case(NamedTuple):
    """A call of an op, and the shapes of the tensors that it takes."""

    op: str
    call: Callable[..., Tensor]
    shapes: list[tuple[int, ...]]
    weights: tuple[int, ...] = ()  # which of the tensors are the matrices of a product
    spared: int = 0  # how many of the first tensors get no gradient


def _block(num_heads: int, x: Tensor, *t: Tensor) -> Tensor:
    """`ops.block` of tensors alone: no drop path."""
    return ops.block(x, *t[:7], None, *t[7:], None, num_heads)  # type: ignore[arg-type, call-arg]  # t has fourteen


def _rope(cos: Tensor, sin: Tensor, qkv: Tensor) -> Tensor:
    """`ops.rope_attention`, what gets no gradient first."""
    return ops.rope_attention(qkv, cos, sin)


def rope(batch: int, tokens: int, turned: int, heads: int, head_width: int) -> Case:
    """`ops.rope_attention`, the last `turned` tokens by any numbers: no kernel asks whether they are of an angle."""
    table = (turned, head_width)
    return Case("rope_attention", _rope, [table, table, (batch, tokens, 3, heads, head_width)], spared=2)


def windows(batch: int, window: tuple[int, int], heads: int, head_width: int, across: int = 2) -> Case:
    """`ops.window_attention` in shifted windows, so many across and down a map."""
    high, wide = window
    call = functools.partial(ops.window_attention, window=window, shift=(high // 2, wide // 2))
    qkv = (batch, across * high, across * wide, 3, heads, head_width)
    return Case("window_attention", call, [qkv, ((2 * high - 1) * (2 * wide - 1), heads)])


def cases(batch: int, grid: int, patch: int, heads: int, head_width: int, hidden: int) -> list[Case]:
    """Every op of a ViT once, as it calls it on square images of grid x grid patches, with one class token."""
    tokens, width = 1 + grid * grid, heads * head_width
    x, head = (batch, tokens, width), (batch, tokens, heads, head_width)
    vector, images = (width,), (batch, 3, grid * patch, grid * patch)
    tables = [(width, 3, patch, patch), vector, (tokens, width), (1, width)]
    fc1, fc2 = [(hidden, width), (hidden,)], [(width, hidden), vector]
    halves = [vector, vector, (3 * width, width), (3 * width,), (width, width), vector, vector], [vector, vector, *fc1]
    return [
        Case("patch_embed", ops.patch_embed, [images, *tables], weights=(1,), spared=1),
        Case("ln_linear", ops.ln_linear, [x, vector, vector, *fc1], weights=(3,)),
        Case("attention", ops.attention, [head, head, head]),
        Case("attention_qkv", ops.attention_qkv, [(batch, tokens, 3, heads, head_width)]),
        Case("attention_maps", ops.attention_maps, [head, head], spared=2),
        Case("linear_residual", ops.linear_residual, [(batch, tokens, hidden), *fc2, x, vector], weights=(1,)),
        Case("mlp", ops.mlp, [x, vector, vector, *fc1, *fc2, vector], weights=(3, 5)),
        Case(
            "swiglu",
            ops.swiglu,
            [x, vector, vector, (2 * hidden, width), (2 * hidden,), *fc2, vector],
            weights=(3, 5),
        ),
        Case(
            "block", functools.partial(_block, heads), [x, *halves[0], *halves[1], *fc2, vector], weights=(3, 5, 10, 12)
        ),
    ]


SMALL = [*cases(batch=2, grid=2, patch=2, heads=2, head_width=16, hidden=48), rope(2, 9, 4, 2, 16)]
SMALL += [windows(2, (2, 3), 2, 16)]
# What a table tells apart: few rows of tokens and many, sequences that fit a block and longer ones, widths of a head.
# Five steps of 64 through K fill a pipeline. Every count that a kernel takes as an argument is a multiple of 16 in all
# of these or in none: a kernel is compiled again for the other kind.
EVERY_CLASS = [
    case
    for batch, grid, heads, head_width in (
        (2, 14, 5, 64),
        (5, 14, 5, 64),
        (11, 14, 5, 64),
        (2, 24, 5, 64),
        (2, 14, 4, 80),
        (2, 24, 4, 80),
        (2, 14, 3, 128),
        (2, 24, 3, 128),
    )
    for case in cases(batch, grid, 16, heads, head_width, hidden=640)
]
# A table may tell other widths apart where a block holds a whole head, and there the longer half.
EVERY_CLASS += [
    Case("attention_qkv", ops.attention_qkv, [(2, tokens, 3, 4, head_width)])
    for tokens, head_width in ((197, 16), (197, 32), (197, 48), (197, 96), (257, 64))
]
# As DINOv3 has it, and heads of which half is no power of two.
EVERY_CLASS += [rope(2, 201, 196, 3, width) for width in (64, 72)]
# More windows than programs that a GPU holds at once; each width of a head is a kernel of its own.
EVERY_CLASS += [windows(67, (side, side), 3, width) for width, side in ((32, 7), (16, 7), (64, 8))]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@contextlib.contextmanager
def convolution_like_ours() -> Iterator[None]:
    """PyTorch's own convolution takes tf32 unless told: as the kernel multiplies, so does what it is compared with."""
    convolution = torch.backends.cudnn.conv  # type: ignore[attr-defined]  # set at import
    before = convolution.fp32_precision
    convolution.fp32_precision = float32_precision()
    try:
        yield
    finally:
        convolution.fp32_precision = before


class Trial:
    """One case on random tensors in one dtype: the results in fp64, and how far from them a kernel's may be.

    PyTorch's own error in that dtype is the measure, doubled, and an eighth of the dtype's epsilon: in norm over the
    whole of the output and of each gradient, and twice that for the worst of its rows in max norm.
    """

    def __init__(self, case: Case, device: torch.device, dtype: torch.dtype):
        self.case = case
        generator = torch.Generator().manual_seed(0)
        self.tensors = []
        for index, shape in enumerate(case.shapes):
            tensor = torch.randn(shape, generator=generator)
            if index in case.weights:  # as in a model: products neither overflow nor saturate a GELU
                tensor /= math.sqrt(tensor[0].numel())
            self.tensors.append(tensor.to(device, dtype).requires_grad_(index >= case.spared))
        with ops.use_backend("torch"), convolution_like_ours():
            output = self.forward()
            self.upstream = torch.randn(output.shape, generator=generator).to(device, output.dtype)
            peers = [output.detach(), *self.backward(output)]
            self.truth = self._in_double()
        # Tensor cores add products of halves in fewer bits than fp32 has; PyTorch casts first, and does not.
        self.limits = [
            limits(peer, true, 32 if peer.dtype.itemsize > dtype.itemsize else 1)
            for peer, true in zip(peers, self.truth)
        ]
        assert all(map(math.isfinite, sum(self.limits, ()))), f"{case.op}: PyTorch itself overflows in {dtype}"

    def _in_double(self) -> list[Tensor]:
        tensors = [t.detach().double().requires_grad_(t.requires_grad) for t in self.tensors]
        output = self.case.call(*tensors)
        wanted = tensors[self.case.spared :]
        return [output.detach(), *(torch.autograd.grad(output, wanted, self.upstream.double()) if wanted else ())]

    def forward(self) -> Tensor:
        """The output, by the backend in force, and what its gradients need."""
        return self.case.call(*self.tensors)

    def backward(self, output: Tensor) -> tuple[Tensor, ...]:
        """The gradient of each tensor that has one; may be called again."""
        wanted = self.tensors[self.case.spared :]
        return torch.autograd.grad(output, wanted, self.upstream, retain_graph=True) if wanted else ()

    def judge(self, results: Iterable[Tensor], first: int = 0) -> tuple[float, bool]:
        """The largest ‖ours − fp64‖/‖fp64‖ of results `first` and on (0 is the output), and whether each may be."""
        largest, agrees = 0.0, True
        for ours, true, (limit, row_limit) in zip(results, self.truth[first:], self.limits[first:]):
            whole, worst = errors(ours, true)
            largest = whole if not whole <= largest else largest  # NaN is larger than all
            agrees &= whole <= limit and worst <= row_limit
        return largest, agrees


def errors(ours: Tensor, true: Tensor) -> tuple[float, float]:
    """‖ours − true‖/‖true‖, and the worst row's in max norm; of a few rows the latter is luck, and is left out."""
    difference = ours.detach().double() - true
    whole = (difference.norm() / true.norm()).item()
    if true.dim() < 2 or true.shape[:-1].numel() < FEWEST_ROWS:
        return whole, 0.0
    rows, worst = true.flatten(0, -2).abs().amax(1), difference.flatten(0, -2).abs().amax(1)
    return whole, (worst / rows).max().item()


def limits(peer: Tensor, true: Tensor, factor: float = 1) -> tuple[float, float]:
    """How large the `errors` of ours may be beside those of PyTorch in the same dtype; `factor` of a rounding more."""
    (whole, worst), rounding = errors(peer, true), factor * torch.finfo(peer.dtype).eps / 8
    return 2 * whole + rounding, 4 * worst + rounding


def verify(device: str | torch.device, cases: list[Case] = SMALL) -> list[dict]:
    """Run every op forward and backward on small random tensors, in Triton and in PyTorch, each against fp64.

    Returns:
        One dict an op and dtype: op, dtype, error (the largest of the output and the gradients, ‖ours − fp64‖/‖fp64‖),
        agrees: each is within the limits of `Trial`.

    Raises:
        RuntimeError: where no kernel can run.
    """
    device = torch.device(device)
    # Triton's interpreter computes bfloat16 wrongly: there it would prove nothing.
    dtypes = (torch.float32,) if device.type == "cpu" else DTYPES
    lines = []
    for dtype in dtypes:
        for case in cases:
            trial = Trial(case, device, dtype)
            with ops.use_backend("triton"):
                output = trial.forward()
                error, agrees = trial.judge([output, *trial.backward(output)])
            lines.append({"op": case.op, "dtype": dtype_name(dtype), "error": error, "agrees": agrees})
    return lines


def verify_entries(
    device: str | torch.device,
    cases: list[Case] = EVERY_CLASS,
    dtypes: Iterable[torch.dtype] = DTYPES,
    workers: int = 1,
) -> list[dict]:
    """Check every entry of the tile table in force on a device: the miscompiles that are known are of single tiles.

    An entry is judged by the results that it had a part in: of the forward pass, or of the backward pass. A kernel that
    is wrong in a forward pass may make the gradients wrong too, and with them what is blameless.

    Args:
        device: a GPU; a CPU where Triton's interpreter runs, which takes its time.
        cases: what is run to reach the entries.    dtypes: of the tensors.
        workers: processes that share the cases: nearly all of the time is the compiler's, which runs on one core.

    Returns:
        One dict an entry and dtype: kernel, shape, dtype, origin ("predicted", or by what it was measured), error (as
        in `verify`; NaN where there is none), agrees (None where no case came to this entry) and why ("", or what was
        raised).

    Raises:
        RuntimeError: where no kernel can run.
    """
    device = torch.device(device)
    with ops.use_backend("triton"):
        use_triton("verify", torch.empty(1, device=device))
    from vit_fast.kernels import tile_table

    found = collections.defaultdict(list)
    work = [(case, device, dtype) for dtype in dtypes for case in cases]
    with contextlib.ExitStack() as stack:
        each: Callable = itertools.starmap
        if workers > 1:  # spawned: a process that has used a GPU cannot fork
            pool = stack.enter_context(multiprocessing.get_context("spawn").Pool(min(workers, len(work))))
            each = functools.partial(pool.starmap, chunksize=1)
        for (_, _, dtype), judged in zip(work, each(_check, work)):
            for key, judgement in judged.items():
                found[(*key, dtype)].append(judgement)
    missed = {"error": math.nan, "agrees": None, "why": "no case came to it"}
    lines = []
    for kernel, classes_of in tile_table.table(tile_table.architecture(device)).items():
        for dtype in dtypes:
            dtype_class = tile_table.dtype_class(dtype)
            for shape, entry in classes_of[dtype_class].items():
                origin = entry["origin"]
                if isinstance(origin, dict):
                    origin = "measured on {device}, {date}, triton {triton}, torch {torch}".format(**origin)
                worst = max(found[kernel, dtype_class, shape, dtype], key=_badness, default=missed)
                lines.append({"kernel": kernel, "shape": shape, "dtype": dtype_name(dtype), "origin": origin, **worst})
    return lines


def _badness(judgement: dict) -> tuple:
    error = judgement["error"]
    return not judgement["agrees"], math.inf if math.isnan(error) else error


def _check(case: Case, device: torch.device, dtype: torch.dtype) -> dict[tuple[str, str, str], dict]:
    """entry → error, agrees, why: of the results of the pass in which it was looked up."""
    from vit_fast.kernels import tile_table

    trial, output = Trial(case, device, dtype), torch.empty(0)
    judged: dict[tuple[str, str, str], dict] = {}
    results: Sequence[Tensor]
    for backward in (False, True):
        with tile_table.recording() as reached, ops.use_backend("triton"):
            try:
                if backward:
                    results = trial.backward(output)
                else:
                    output = trial.forward()
                    results = [output]
                error, agrees = trial.judge(results, first=int(backward))
            except Exception as raised:  # a tile that does not compile, or asks for more memory than there is
                if not reached:
                    raise
                return judged | {reached[-1]: {"error": math.nan, "agrees": False, "why": in_a_line(raised)}}
        judged |= {key: {"error": error, "agrees": agrees, "why": ""} for key in reached}
    return judged


def in_a_line(error: Exception) -> str:
    """Class and first line of an error that need not be one of ours."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def report(device: str | torch.device) -> tuple[list[dict], str]:
    """`verify` on this device, on a CPU in a process of its own, and how it ran.

    Returns:
        (lines, "in Triton's interpreter" or the like), or where no kernel can run ([], the reason).

    Raises:
        RuntimeError: where the kernels should run in the interpreter and do not, with the last line of why.
    """
    device = torch.device(device)
    if triton_is_missing():
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
        raise RuntimeError(f"the kernels did not run in Triton's interpreter: {last}")
    return json.loads(child.stdout), "in Triton's interpreter"


if __name__ == "__main__":
    print(json.dumps(verify(sys.argv[1])))
