"""Which code runs each part of a model, and why."""

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor, nn

from vit_fast.foreign.block import Fused, FusedBlock
from vit_fast.layers import AttentionPoolLatent, Block, SwiGLUPacked
from vit_fast.model import VisionTransformer
from vit_fast.ops import backend
from vit_fast.ops.attention import HEAD_WIDTHS
from vit_fast.ops.evidence import Finding, findings
from vit_fast.ops.window_attention import refusal as window_refusal


class Line(NamedTuple):
    """One op of one module."""

    name: str  # the module, as in `model.named_modules()`
    op: str  # of vit_fast.ops
    backend: str  # "triton", "torch", or "none" where the call would raise
    reason: str  # why this backend, or the error


class Explanation(tuple[Line, ...]):
    """The lines of a model; `print` shows them as a table."""

    __slots__ = ()

    def __str__(self) -> str:
        rows = [Line("module", "op", "backend", "reason"), *self]
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        return "\n".join("  ".join([*(cell.ljust(w) for cell, w in zip(row, widths)), row.reason]) for row in rows)


def explain(model: nn.Module) -> Explanation:
    """Which code the next forward pass of `model` runs, part by part: Triton or PyTorch, and why.

    The answer is for the state that counts now: device and dtype of the parameters, autocast, `use_backend`, training
    mode and dropout, hooks. Where PyTorch was measured to be faster, at a batch and a picture that only a call can
    tell, the reason says so, and at which. A last block that leaves out what the head does not read is told of as such;
    on a GPU it is as the others are in a batch of at most `vit_fast.model.FEW_TOKENS` tokens.

    Args:
        model: a VisionTransformer, a module that holds one or some of its blocks, or what `accelerate` has changed.

    Returns:
        Lines with `.name`, `.op`, `.backend` and `.reason`, in the order of the data; str() gives a table.

    Raises:
        ValueError: where nothing of vit_fast is found in `model`.
    """
    lines, tokens, last, count = [], None, None, None
    for name, module in model.named_modules():
        if isinstance(module, VisionTransformer):
            grid = None if module.dynamic_img_size else getattr(module.patch_embed, "num_patches", None)
            tokens = grid and grid + module.num_prefix_tokens
            count = module.first_tokens_read()
            last = None if count is None or module.last_block_aside() else module.blocks[-1]
            if last in list(module.blocks)[:-1]:  # a module of two places has one line
                last = None
        parts = _parts(module, tokens, count if module is last else None)
        lines += [Line(f"{name}.{part.name}".strip("."), part.op, *_choice(part)) for part in parts]
    if not lines:
        raise ValueError(
            f"model: got {type(model).__name__} without any module of vit_fast, takes a VisionTransformer or what "
            "accelerate has changed"
        )
    return Explanation(lines)


class _Part(NamedTuple):
    """One op as a module's forward calls it."""

    name: str
    op: str
    tensor: Tensor  # one like those that it computes with
    aside: str  # why its module steps aside, or ""
    refusal: str = ""  # why no kernel takes its head width, or ""
    shape: tuple = ()  # as a finding has it, None where only a call tells; () where no finding counts
    in_block: bool = False  # part of the op `block`, which only inference takes apart

    def findings(self) -> list[Finding]:
        """Those that may speak of a call."""

        def fits(shape: tuple) -> bool:
            return len(shape) == len(self.shape) and all(a in (None, b) for a, b in zip(self.shape, shape))

        op = "attention" if self.op == "attention_qkv" else self.op
        dtype = backend.compute_dtype(self.tensor)
        return [
            one
            for one in findings(op, self.tensor.device)
            if one.dtype == dtype and fits(one.shape) and not (one.training and self.in_block)
        ]


def _parts(module: nn.Module, tokens: int | None, count: int | None = None) -> Iterator[_Part]:
    """The ops of one module; `tokens` where they are the same in every call, `count` of those that a block computes
    where it is not all of them."""
    if isinstance(module, VisionTransformer):
        if aside := module.embed_aside():
            yield _Part("patch_embed", "patch_embed", next(module.parameters()), aside)
        else:
            weight = module.patch_embed.proj.weight
            yield _Part("patch_embed", "patch_embed", weight, "", "", (len(weight), weight[0].numel()))
    elif isinstance(module, Block):
        yield from _parts_of_block(module, tokens, count)
    elif isinstance(module, AttentionPoolLatent):
        width = module.head_dim
        yield _Part("", "attention", module.latent, "", _head_width(width), (None, None, width))
        aside = module.mlp_aside()
        yield _Part("mlp", "mlp", module.latent, aside, "", () if aside else tuple(module.mlp.fc2.weight.shape))
    elif isinstance(module, FusedBlock):
        tensor, asides = next(module.parameters()), module.asides()
        half = None if asides[0] else module.attention_half()
        if all(asides):
            yield _Part("", "block", tensor, asides[0])
        elif half is not None and half.windows is not None:
            refusal = window_refusal(half.windows.size, half.proj.in_features // half.heads)
            for op in ("ln_linear", "window_attention", "linear_residual"):
                yield _Part("attention", op, tensor, "", refusal if op == "window_attention" else "")
            yield _Part("mlp", "mlp" if asides[1] else module.op().split(", ")[1], tensor, asides[1])
        else:
            refusal = "" if half is None else _head_width(half.proj.in_features // half.heads)
            yield _Part("", module.op(), tensor, "", refusal)
            yield from (_Part(name, name, tensor, aside) for name, aside in zip(("attention", "mlp"), asides) if aside)
    elif isinstance(module, Fused):
        yield _Part("", module.op(), next(module.parameters()), "")


def _parts_of_block(block: Block, tokens: int | None, count: int | None) -> Iterator[_Part]:
    attn, mlp = block.attn, block.mlp
    tensor, aside, mlp_aside = next(block.parameters()), block.attention_aside(), block.mlp_aside()
    every = count is None
    plain = every and not aside and type(attn.q_norm) is nn.Identity and type(attn.k_norm) is nn.Identity
    whole = every and not (aside or mlp_aside) and block.suits_block_op()

    def linear(name: str, op: str, reason: str, weights: nn.Module, weight: str) -> _Part:
        # In a whole block no finding counts but attention's, and where the half is aside its module may hold anything.
        # Where only the tokens that the head reads are computed the rows are too few for any that was measured.
        shape = () if whole or reason or not every else tuple(weights.get_parameter(weight).shape)
        return _Part(name, op, tensor, reason, "", shape)

    yield linear("attn", "ln_linear", aside, attn, "qkv.weight")
    op, op_aside = "attention_qkv" if plain else "attention", block.attention_op_aside()
    if op_aside:
        yield _Part("attn", op, tensor, op_aside)
    else:
        yield _Part("attn", op, tensor, "", _head_width(attn.head_dim), (count or tokens, tokens, attn.head_dim), whole)
    yield linear("attn", "linear_residual", aside, attn, "proj.weight")
    if mlp_aside or type(mlp.norm) is nn.Identity:
        yield linear("mlp", "swiglu" if type(mlp) is SwiGLUPacked else "mlp", mlp_aside, mlp, "fc2.weight")
    else:
        yield linear("mlp", "ln_linear", "", mlp, "fc1.weight")
        yield linear("mlp", "linear_residual", "", mlp, "fc2.weight")


def _head_width(width: int) -> str:
    return "" if width in HEAD_WIDTHS else f"head width {width}: the kernels take {', '.join(map(str, HEAD_WIDTHS))}"


def _choice(part: _Part) -> tuple[str, str]:
    """The backend of an op on a tensor of this device and dtype, and the reason for it."""
    if part.aside:
        return "torch", part.aside
    device = part.tensor.device
    try:
        runs = backend.use_triton(part.op, part.tensor, refusal=part.refusal)
    except (TypeError, ValueError, RuntimeError) as error:
        return "none", f"raises {type(error).__name__}: {error}"
    if runs:
        where = "Triton's interpreter" if device.type == "cpu" else f"a tensor on {device.type}"
        found = part.findings() if backend.chosen_backend() == "auto" else []
        return "triton", "; but ".join([where, *(finding.reason for finding in found)])
    if backend.chosen_backend() == "torch":
        return "torch", "use_backend('torch')"
    reasons = filter(None, (backend.why_not_triton(device), part.refusal))
    return "torch", "; ".join(reasons) or f"the kernels do not take {part.tensor.dtype}"
