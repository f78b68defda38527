"""Which code runs a call, Triton or PyTorch, and the dtype rules that every op shares."""

import contextlib
import functools
import importlib.util
import logging
import os
import threading
from collections.abc import Collection

import torch
from torch import Tensor
from torch.autograd import forward_ad

from vit_fast.ops.evidence import Finding, findings

log = logging.getLogger("vit_fast")

BACKENDS = ("auto", "triton", "torch")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
PLAIN = (Tensor, torch.nn.Parameter)
MINIMUM_CAPABILITY = (8, 0)


def one_of(name: str, value, choices: Collection):
    """The value of the argument of this name, which takes one of these choices.

    Raises:
        ValueError: for another.
    """
    if value not in choices:
        raise ValueError(f"{name}: got {value!r}, takes one of {', '.join(map(repr, choices))}")
    return value


# A module global and not a ContextVar: torch.compile guards on a global, and breaks the graph at a ContextVar.
_backend = one_of("VIT_FAST_BACKEND", os.environ.get("VIT_FAST_BACKEND", "auto"), BACKENDS)
_open = [[_backend]]  # the choices that are open, the last in force; each a list, to be told from its like
_turn = threading.Lock()


def _change(mine: list[str], leaves: bool) -> None:
    """A choice comes to those in force, or leaves them."""
    global _backend
    with contextlib.nullcontext() if torch.compiler.is_compiling() else _turn:  # which torch.compile does not know
        _open[:] = [one for one in _open if one is not mine] if leaves else [*_open, mine]
        _backend = _open[-1][0]


@contextlib.contextmanager
def use_backend(name: str):
    """Choose the code that runs every vit_fast op inside the `with` block.

    Args:
        name: "auto", Triton on a CUDA or ROCm tensor and PyTorch elsewhere; "triton", Triton always: on a CPU tensor
            that is the interpreter, which needs TRITON_INTERPRET=1 in the environment before Python starts, and an
            error otherwise, but PyTorch for tensors without elements, in torch.export and for the gradient of an image;
            "torch", PyTorch always.

    The choice is one for the process, not one a thread, so that torch.compile can guard on it: of blocks that several
    threads are in, the one that began last counts, and when all have left, what was chosen before.

    Raises:
        ValueError: for another name.
    """
    mine = [one_of("use_backend(name)", name, BACKENDS)]
    _change(mine, leaves=False)
    try:
        yield
    finally:
        _change(mine, leaves=True)


def chosen_backend() -> str:
    """What `use_backend` or VIT_FAST_BACKEND chose: "auto", "triton" or "torch"."""
    return _backend


def interpreting() -> bool:
    """Whether Triton's interpreter was asked for, by TRITON_INTERPRET=1."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _say_once(message: str) -> None:
    log.warning(message)


def triton_is_missing() -> bool:
    return importlib.util.find_spec("triton") is None


@functools.cache
def why_not_triton(device: torch.device) -> str:
    """The reason why `auto` runs PyTorch on this device, or "" where the kernels run."""
    if device.type != "cuda":
        return f"a tensor on {device.type}: the kernels run on CUDA and ROCm"
    if triton_is_missing():
        return "triton is not installed"
    if torch.version.hip is None:
        try:
            capability = torch.cuda.get_device_capability(device)
        except (AssertionError, RuntimeError):  # as PyTorch without CUDA and PyTorch without a driver have it
            return "no GPU in this process, as for fake tensors"
        if capability < MINIMUM_CAPABILITY:
            return "compute capability {}.{}, the kernels need {}.{}".format(*capability, *MINIMUM_CAPABILITY)
    return ""


def _auto(device: torch.device) -> bool:
    """Whether `auto` runs the kernels on this device; where it does not on a GPU, the log says why, once."""
    reason = why_not_triton(device)
    if reason and device.type == "cuda":
        _say_once(f"vit_fast runs in PyTorch: {reason}")
    return not reason


def _why_not_forced(device: torch.device) -> str:
    """The reason why `triton` cannot run on this device, or ""."""
    if device.type != "cpu":
        return why_not_triton(device)
    if triton_is_missing():
        return "triton is not installed"
    hint = "; TRITON_INTERPRET=1, set before Python starts, runs the interpreter"
    return "" if interpreting() else why_not_triton(device) + hint


def exporting() -> bool:
    """Whether torch.export traces."""
    return torch.compiler.is_exporting()


def traced_to_onnx() -> bool:
    """Whether torch.onnx.export traces with dynamo=False: it makes constants of the shapes that Python reads."""
    return torch.jit.is_tracing() and torch.onnx.is_in_onnx_export()


def differentiates_forward() -> bool:
    """Whether forward-mode differentiation runs."""
    return forward_ad._current_level >= 0


def transformed() -> bool:
    """Whether a transform of torch.func or forward-mode differentiation runs: an op of ours has no rule for either."""
    # Not by a call of the function above: this one is asked in every call of an op, whose Python calls are counted.
    return forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None


# torch.compile takes what these return as constants and does not trace them. It would trace past functools.cache, with
# a warning, into calls that ask the driver, and in torch 2.11 it finds is_exporting() true whatever it traces. The
# attribute is what torch.compiler.assume_constant_result sets; that function imports torch._dynamo, which would double
# the time of `import vit_fast`.
for _constant in (_auto, _why_not_forced, differentiates_forward, exporting, transformed):
    vars(_constant)["_dynamo_marked_constant"] = True


def say_aside(what: str, reason: str) -> None:
    """One log line a reason for the process: something that a user set sends `what` to PyTorch."""
    if not torch.compiler.is_compiling():
        _say_once(f"{what} runs in PyTorch: {reason}")


def use_triton(op: str, x: Tensor, *others: Tensor, refusal: str = "") -> bool:
    """Whether a call of `op` on `x` runs a kernel.

    Never while torch.export traces (the exported graph holds PyTorch's own ops, and runs anywhere), nor where a tensor
    is empty (there is nothing to launch). Where the kernels do not take the dtype of a tensor, or there is another
    `refusal`, `auto` runs PyTorch and says so, and `triton` raises.

    Args:
        op: the op's name, for messages.
        x, others: the tensors whose dtype counts; the device is that of `x`.
        refusal: why no kernel takes this call, or "".

    Raises:
        RuntimeError: under use_backend("triton") where no kernel can run.
        TypeError, ValueError: under use_backend("triton") for a dtype, or another thing, that no kernel takes.
    """
    if _backend == "torch" or exporting() or (_backend == "auto" and not _auto(x.device)):
        return False
    error: type[Exception] = ValueError
    for tensor in (x, *others):
        if tensor.numel() == 0:
            return False
        if type(tensor) not in PLAIN and type(tensor).__name__ == "DTensor":
            refusal, error = "the kernels have no rule for a sharded tensor", TypeError
        if tensor.dtype not in DTYPES:
            refusal, error = f"the kernels take float32, float16 and bfloat16, got {tensor.dtype}", TypeError
    if transformed():
        refusal, error = "the kernels have no rule for torch.func and forward-mode differentiation", RuntimeError
    if _backend == "auto":
        if refusal:
            say_aside(op, refusal)
        return not refusal
    if reason := _why_not_forced(x.device):
        raise RuntimeError(f"use_backend('triton') got {reason}")
    if refusal:
        raise error(f"{op}: {refusal}; use_backend('auto') or 'torch' runs it in PyTorch")
    return True


def measured_faster(op: str, operands: tuple[Tensor | None, ...], shape: tuple, rows: int) -> Finding | None:
    """What of PyTorch was measured to be faster than the kernels for a call that `use_triton` lets them run, or None.

    Only `auto` asks. `operands` are those that may want a gradient, the input first; shape and rows as `Finding` has
    them.
    """
    if _backend != "auto":
        return None
    x = operands[0]
    assert x is not None  # the input is never left out
    for finding in findings(op, x.device):
        fits = finding.shape == tuple(shape) and finding.rows <= rows
        if fits and finding.dtype == compute_dtype(x) and finding.training == needs_grad(*operands):
            return finding
    return None


def autocasting(x: Tensor) -> bool:
    """Whether autocast is on for the device of `x`."""
    # PyTorch refuses the question for a meta tensor.
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)


def without_autocast(x: Tensor) -> contextlib.AbstractContextManager:
    """A block in which products on tensors like `x` keep their dtype."""
    return torch.autocast(x.device.type, enabled=False) if autocasting(x) else contextlib.nullcontext()


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of a product on `x`: autocast's where it is on, and that of `x` elsewhere."""
    if autocasting(x) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def dtype_name(dtype: torch.dtype) -> str:
    """As "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def cast(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """`weight` in `dtype`, through autocast's own cache where there is one.

    Under autocast on a GPU an einsum of one operand that changes nothing is a view of that operand, cast and cached as
    any autocast weight is: PyTorch offers no other way to the cache from Python. Elsewhere, and for the patch
    projection (autocast caches no view), it is a plain cast. Differentiable both ways.
    """
    if weight.dtype == dtype:
        return weight
    if weight.is_cuda and weight.dim() == 2 and autocasting(weight) and not torch.compiler.is_compiling():
        return torch.einsum("nk->nk", weight)
    return weight.to(dtype)


def float32_precision(dtype: torch.dtype = torch.float32) -> str:
    """How the kernels multiply fp32: "ieee", or "tf32" where torch.set_float32_matmul_precision allows it.

    Operands in another `dtype` have nothing to choose: one answer, so that one kernel is compiled. Read where that call
    and PyTorch's newer settings both write: torch.get_float32_matmul_precision raises once the newer ones were used. Of
    AMD's chips only one has tf32, and triton refuses it for the others: there it is ieee.
    """
    if dtype != torch.float32 or torch.version.hip:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


_HERE = contextlib.nullcontext()


def on_device_of(x: Tensor) -> contextlib.AbstractContextManager:
    """A block in which the current GPU is that of `x`: Triton launches on the current one."""
    if not x.is_cuda or x.get_device() == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device_of(x)


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd will ask for a gradient through a call on these tensors."""
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def _elsewhere(name: str, operand: Tensor, x: Tensor) -> ValueError:
    return ValueError(f"{name}: on {operand.device}, the input is on {x.device}; move one of them")


def check_device(x: Tensor, **operands: Tensor | None) -> None:
    """Refuse an operand on another device than `x`.

    Raises:
        ValueError: naming the operand, where it is and where it must be.
    """
    device = x.device
    for name, operand in operands.items():
        if operand is not None and operand.device != device:
            raise _elsewhere(name, operand, x)


def check_operands(x: Tensor, **operands: Tensor | None) -> None:
    """Refuse an operand on another device than `x`, or of a dtype that can meet `x` in no product.

    Outside autocast every operand has the dtype of `x`; under autocast float32, float16 and bfloat16 may meet.

    Raises:
        ValueError: for another device. TypeError: for another dtype. Both name the operand, what it is and must be.
    """
    if not x.is_floating_point():
        raise TypeError(f"the input: got {x.dtype}, takes a floating dtype")
    device, dtype = x.device, x.dtype
    for name, operand in operands.items():
        if operand is None:
            continue
        if operand.device != device:
            raise _elsewhere(name, operand, x)
        if operand.dtype != dtype and not (operand.dtype in DTYPES and dtype in DTYPES and autocasting(x)):
            raise TypeError(f"{name}: {operand.dtype}, the input is {dtype}; cast one of them or use torch.autocast")


def as_rows(x: Tensor) -> Tensor:
    """`x` [..., K] as a matrix [M, K] whose rows are contiguous: a view, or a copy where no view can be."""
    if x.dim() != 2:
        # `view` says at once what `reshape` first has to find out.
        x = x.view(-1, x.shape[-1]) if x.is_contiguous() else x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def packed(x: Tensor | None) -> Tensor | None:
    """A contiguous tensor, or None for None."""
    return None if x is None else x.contiguous()


def ready(parameter: Tensor | None) -> Tensor | None:
    """A parameter as the kernels take it: of a matrix the rows are contiguous, of anything else all."""
    if parameter is None or (parameter.dim() == 2 and parameter.stride(1) == 1):
        return parameter
    return parameter.contiguous()


def shaped(result: Tensor, shape: tuple[int, ...]) -> Tensor:
    """An op's new result in another shape: itself and no view of it, which autograd would let nobody write to."""
    return result.resize_(shape)


def or_empty(gradient: Tensor | None, like: Tensor) -> Tensor:
    """A gradient as an op's output: a schema has no optional output, so what is absent is an empty tensor."""
    return like.new_empty(0) if gradient is None else gradient


def or_none(gradient: Tensor) -> Tensor | None:
    """The gradient back from an op's output, None for an empty one."""
    return gradient if gradient.numel() else None


def like(operand: Tensor | None, other: Tensor) -> Tensor:
    """What a fake op returns for the gradient of `operand`: its shape and dtype, an empty tensor for None."""
    return other.new_empty(0) if operand is None else operand.new_empty(operand.shape)


def likes(dy: Tensor, x: Tensor, parameters: tuple | list, trained: bool) -> tuple[Tensor, ...]:
    """What a fake op returns for the gradients of `x` and of parameters, of which a frozen op makes none."""
    return like(x, dy), *(like(parameter if trained else None, dy) for parameter in parameters)


def _misshapen(name: str, tensor: Tensor, takes: str) -> ValueError:
    return ValueError(f"{name}: got shape {list(tensor.shape)}, takes {takes}")


def check_shape(name: str, tensor: Tensor | None, shape: tuple[int, ...]) -> None:
    """Refuse a tensor of another shape.

    Raises:
        ValueError: naming the argument, what it got and what it takes.
    """
    if tensor is not None and tensor.shape != shape:
        raise _misshapen(name, tensor, f"{list(shape)}")


def check_rank(name: str, tensor: Tensor, names: str) -> None:
    """Refuse a tensor whose rank is not that of `names`, the letters of its axes such as "B T D".

    Raises:
        ValueError: naming the argument, what it got and what it takes.
    """
    if tensor.dim() != names.count(" ") + 1:
        raise _misshapen(name, tensor, f"[{', '.join(names.split())}]")


def check_linear(x: Tensor, weight: Tensor, bias: Tensor | None, prefix: str = "") -> tuple[int, int]:
    """(N, K) of a linear map whose arguments' names begin with `prefix`; refuse an input that does not fit it.

    Raises:
        ValueError: naming the argument, what it got and what it takes.
    """
    if weight.dim() != 2:
        raise _misshapen(f"{prefix}weight", weight, "[N, K]")
    features, width = weight.shape
    if x.dim() < 2 or x.shape[-1] != width:
        raise _misshapen("x", x, f"[..., {width}], the width of {prefix}weight {list(weight.shape)}")
    if bias is not None and bias.shape != (features,):
        raise _misshapen(f"{prefix}bias", bias, f"[{features}]")
    return features, width
