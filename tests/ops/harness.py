"""Runs an op three ways on the same numbers, fused, unfused as the reference in fp64; holds it to the error rule."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

import vit_fast
from tests.error_rule import assert_close_to_truth
from tests.guard import guarded

BACKENDS = ["torch", pytest.param("triton", marks=pytest.mark.interpret)]

# "autocast" is mixed precision: fp32 tensors, products in bf16, as in torch.autocast.
MODES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "autocast": torch.float32}


@dataclass
class Case:
    """Inputs of one call: `tensors` in fp64 or None, drawn anew by `draw`; `options` are the op's other arguments."""

    why: str
    draw: Callable[[], dict[str, Tensor | None]]
    options: dict = field(default_factory=dict)
    constant: tuple[str, ...] = ()  # tensors that get no gradient

    def __str__(self) -> str:
        return self.why.replace(" ", "_")


def named(cases: list[Case]) -> list:
    return [pytest.param(case, id=str(case)) for case in cases]


def rounded(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A drawn tensor in a dtype; bytes stay bytes."""
    return t if t is None or not t.is_floating_point() else t.to(dtype)


def run(op: Callable, tensors: dict[str, Tensor | None], case: Case, upstream: Tensor) -> dict[str, Tensor]:
    """The output, and the gradient of every tensor that has one, for an upstream gradient."""
    wanted = [name for name, t in tensors.items() if t is not None and name not in case.constant]
    for name in wanted:
        tensors[name].requires_grad_()
    output = op(**tensors, **case.options)
    # Every other element of a wider tensor: what backward gets is often a view.
    upstream = upstream.to(output.dtype).repeat_interleave(2, -1)[..., ::2]
    gradients = torch.autograd.grad(output, [tensors[name] for name in wanted], upstream)
    return {"output": output.detach()} | {f"d{name}": g for name, g in zip(wanted, gradients)}


def three_ways(
    op: Callable, reference: Callable, unfused: Callable, case: Case, mode: str, backend: str, device: str = "cpu"
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Ours, the unfused and the true results of a case with a random upstream gradient: what `run` returns of each."""
    dtype = MODES[mode]
    drawn = case.draw()
    given = {name: rounded(t, dtype) for name, t in drawn.items()}  # what each of the three gets
    exact = {name: None if t is None else rounded(t, torch.float64).clone() for name, t in given.items()}
    shape = reference(**exact, **case.options).shape
    upstream = torch.randn(shape, dtype=torch.float64).to(dtype)
    truth = run(reference, exact, case, upstream)

    def copies(place: Callable[[Tensor], Tensor]) -> dict[str, Tensor | None]:
        return {name: None if t is None else place(t) for name, t in given.items()}

    amp = torch.autocast(device, torch.bfloat16) if mode == "autocast" else contextlib.nullcontext()
    with amp:
        peer = run(unfused, copies(lambda t: t.clone().to(device)), case, upstream.to(device))
        place = guarded if device == "cpu" else lambda t: t.to(device)
        with vit_fast.ops.use_backend(backend):
            ours = run(op, copies(place), case, upstream.to(device))
    assert ours.keys() == truth.keys()
    return ours, peer, truth


def hold_to_the_rule(
    op: Callable, reference: Callable, unfused: Callable, case: Case, mode: str, backend: str, device: str = "cpu"
) -> None:
    """Assert the error rule for the output and for every gradient, with a random upstream gradient."""
    ours, peer, truth = three_ways(op, reference, unfused, case, mode, backend, device)
    for name in truth:
        assert_close_to_truth(ours[name], peer[name], truth[name], name)


def assert_no_second_derivative(op: Callable, args: dict[str, Tensor | None]) -> None:
    """The kernels make none: asking for it is an error, never a wrong number."""
    with vit_fast.ops.use_backend("triton"):
        (gradient,) = torch.autograd.grad(op(**args).square().sum(), args["x"], create_graph=True)
        with pytest.raises(RuntimeError, match="no autograd formula was registered"):
            gradient.sum().backward()


def assert_views_are_read(op: Callable, case: Case, backend: str, device: str = "cpu") -> None:
    """Operands that are views give the output and the gradients that their contiguous copies give.

    Vectors are every other element, activations are cut out of wider ones; matrices too, or they are transposed in
    memory.
    """
    args = {name: None if t is None else rounded(t, torch.float32).to(device) for name, t in case.draw().items()}

    def cut(t: Tensor) -> Tensor:
        if t.dim() == 1:
            return t.repeat_interleave(2)[::2]
        return torch.cat([t, t], dim=-1).repeat_interleave(2, -2)[..., ::2, : t.shape[-1]]

    def transposed(t: Tensor) -> Tensor:
        return t.T.contiguous().T if t.dim() == 2 else cut(t)

    def results(view: Callable) -> list[Tensor]:
        given = {name: t if t is None else view(t) for name, t in args.items()}
        wanted = [t.requires_grad_() for name, t in given.items() if t is not None and name not in case.constant]
        y = op(**given, **case.options)
        return [y, *torch.autograd.grad(y, wanted, torch.ones_like(y))]

    assert not any(view(t).is_contiguous() for view in (cut, transposed) for t in args.values() if t is not None)
    with vit_fast.ops.use_backend(backend):
        expected = results(torch.clone)
        for view in (cut, transposed):
            for found, one in zip(results(view), expected, strict=True):
                torch.testing.assert_close(found, one, rtol=1e-6, atol=1e-6)
