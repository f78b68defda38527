"""Which code runs each part of a model, and why."""

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor, nn

from vit_fast.layers import AttentionPoolLatent, Block
from vit_fast.model import VisionTransformer
from vit_fast.ops import backend
from vit_fast.ops.attention import HEAD_WIDTHS


class Line(NamedTuple):
    """One op of one module."""

    name: str  # the module, as in `model.named_modules()`
    op: str  # of vit_fast.ops
    backend: str  # "triton", "torch", or "none" where the call would raise
    reason: str  # why this backend, or the error


class Explanation(tuple):
    """The lines of a model; `print` shows them as a table."""

    __slots__ = ()

    def __str__(self) -> str:
        rows = [Line("module", "op", "backend", "reason"), *self]
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        return "\n".join("  ".join([*(cell.ljust(w) for cell, w in zip(row, widths)), row.reason]) for row in rows)


def explain(model: nn.Module) -> Explanation:
    """Which code the next forward pass of `model` runs, part by part: Triton or PyTorch, and why.

    The answer is for the state that counts now: device and dtype of the parameters, autocast, `use_backend`, training
    mode and dropout, hooks.

    Args:
        model: a VisionTransformer, or a module that holds one or some of its blocks.

    Returns:
        Lines with `.name`, `.op`, `.backend` and `.reason`, in the order of the data; str() gives a table.

    Raises:
        ValueError: where nothing of vit_fast is found in `model`.
    """
    lines = Explanation(
        Line(f"{name}.{part}".strip("."), op, *_choice(op, *state))
        for name, module in model.named_modules()
        for part, op, *state in _parts(module)
    )
    if not lines:
        raise ValueError(f"model: got {type(model).__name__} without any module of vit_fast, takes a VisionTransformer")
    return lines


def _parts(module: nn.Module) -> Iterator[tuple]:
    """(submodule, op, a tensor like those that it computes with, why it steps aside or ""); then, or "", why no kernel
    takes attention's head width."""
    if isinstance(module, VisionTransformer):
        yield "patch_embed", "patch_embed", module.patch_embed.proj.weight, module.embed_aside()
    elif isinstance(module, Block):
        tensor, aside = next(module.parameters()), module.attention_aside()
        plain = not aside and type(module.attn.q_norm) is nn.Identity and type(module.attn.k_norm) is nn.Identity
        yield "attn", "ln_linear", tensor, aside
        op, op_aside = "attention_qkv" if plain else "attention", module.attention_op_aside()
        yield "attn", op, tensor, op_aside, "" if op_aside else _head_width(module.attn.head_dim)
        yield "attn", "linear_residual", tensor, aside
        aside = module.mlp_aside()
        if aside or type(module.mlp.norm) is nn.Identity:
            yield "mlp", "mlp", tensor, aside
        else:
            yield "mlp", "ln_linear", tensor, ""
            yield "mlp", "linear_residual", tensor, ""
    elif isinstance(module, AttentionPoolLatent):
        yield "", "attention", module.latent, "", _head_width(module.head_dim)
        yield "mlp", "mlp", module.latent, module.mlp_aside()


def _head_width(width: int) -> str:
    return "" if width in HEAD_WIDTHS else f"head width {width}: the kernels take {', '.join(map(str, HEAD_WIDTHS))}"


def _choice(op: str, tensor: Tensor, aside: str, refusal: str = "") -> tuple[str, str]:
    """The backend of an op on a tensor of this device and dtype, and the reason for it."""
    if aside:
        return "torch", aside
    try:
        runs = backend.use_triton(op, tensor, refusal=refusal)
    except (TypeError, ValueError, RuntimeError) as error:
        return "none", f"raises {type(error).__name__}: {error}"
    if runs:
        where = "Triton's interpreter" if tensor.device.type == "cpu" else f"a tensor on {tensor.device.type}"
        return "triton", where
    if backend.chosen_backend() == "torch":
        return "torch", "use_backend('torch')"
    return "torch", refusal or backend.why_not_triton(tensor.device) or f"the kernels do not take {tensor.dtype}"
