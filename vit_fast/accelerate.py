"""Somebody else's model on the fused ops: `accelerate` changes it in place, proves it and reports; `restore` undoes it.

Each block, attention module and patch projection that fits becomes an instance of a subclass of its own class
(vit_fast/foreign), with another `forward`: its parameters, state-dict keys, hooks and children are the objects that
they were.
"""

import json
import logging
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import nn

from vit_fast.foreign import check, fused_class
from vit_fast.foreign.block import OTHER_FORWARD, Fused, FusedBlock
from vit_fast.layers import Block, evaluating
from vit_fast.ops.backend import DTYPES, dtype_name

log = logging.getLogger("vit_fast")


class Line(NamedTuple):
    """What became of one module."""

    name: str  # as in `model.named_modules()`
    kind: str  # its library and class
    replaced: bool
    op: str  # of vit_fast.ops, that runs it now; "" where it stays
    reason: str  # why it stays; of a replaced block, why one half of it does
    error: float | None = None  # the largest ‖ours − fp64‖/‖fp64‖ that `verify` saw, None where it saw none


class Report(tuple[Line, ...]):
    """The lines of `accelerate`; `print` shows them as a table, modules in a row that fared alike as one."""

    verification: str  # what was compared, or why nothing was

    def __new__(cls, lines, verification: str):
        report = super().__new__(cls, lines)
        report.verification = verification
        return report

    def __reduce__(self):
        return Report, (tuple(self), self.verification)

    def to_json(self) -> str:
        """{"verification": …, "modules": [a line each]}."""
        return json.dumps({"verification": self.verification, "modules": [line._asdict() for line in self]}, indent=2)

    def __str__(self) -> str:
        rows = [("module", "kind", "runs on", "error", "reason")]
        for first, count, line in _runs(self):
            name = first if count == 1 else f"{first} … {line.name}"
            error = "" if line.error is None else f"{line.error:.0e}"
            rows.append((name, line.kind, line.op or "its own", error, line.reason))
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        table = ["  ".join([*(cell.ljust(w) for cell, w in zip(row, widths)), row[4]]).rstrip() for row in rows]
        replaced = sum(line.replaced for line in self)
        return "\n".join([*table, f"{replaced} of {len(self)} modules replaced; {self.verification}"])


def _runs(lines) -> Iterator[tuple[str, int, Line]]:
    """(first name, how many, the last line with the largest error) of modules in a row that fared alike.

    A row is what has the same name but for numbers: the blocks, or the attention of each.
    """
    groups: list[list[Line]] = []
    latest: dict[str, list[Line]] = {}
    for line in lines:
        row = re.sub(r"\d+(?=\.|$)", "#", line.name)
        group = latest.get(row)
        if group is None or group[-1][1:5] != line[1:5]:
            group = latest[row] = []
            groups.append(group)
        group.append(line)
    for group in groups:
        known = [line.error for line in group if line.error is not None]
        yield group[0].name, len(group), group[-1]._replace(error=max(known, default=None))


def accelerate(model: nn.Module, *, verify: bool = True, example=None) -> Report:
    """Run somebody else's Vision Transformer on the fused ops, for inference and training; `restore` undoes it.

    Taken are the pre-norm blocks of timm's vision_transformer.py and deit.py, of transformers' ViT, ViT-MAE, DeiT,
    DINOv2 (with and without registers), DINOv3, CLIP, SigLIP, SigLIP 2 and I-JEPA, of torchvision's vit_*, of
    open_clip, `nn.TransformerEncoderLayer` with norm_first and batch_first, the original classes of DINO and DINOv2,
    timm's of eva.py (DINOv3, EVA, the Perception Encoder, RoPE-ViT), and Swin's of timm, torchvision and transformers;
    with them transformers' attention modules, but DINOv3's and Swin's, and the convolution that cuts the patches, but
    torchvision's Swin's.

    A module keeps its own code where something of it is no plain module or parameter (a hook on an inner Linear, a
    LoRA wrapper, a quantised or sharded tensor, a parametrization), and in a call that asks for what no op computes (a
    mask, attention dropout in training): the report, or one line of the log, says why. Accelerate before FSDP's
    `fully_shard`, and before or after anything else.

    Args:
        model: changed in place. Its modules get another class, a subclass of theirs, and nothing else changes.
        verify: run both forms of each module on what it reads in one batch, in evaluation mode, backwards too if the
            model is training, and hold ours against fp64 by the error rule of the tests: at most twice the error of the
            original. What fails goes back. Hooks of the model see that run.
        example: what the model takes: a tensor, a tuple or list of arguments, or a mapping of keyword arguments, as a
            processor of transformers returns. None makes random images as the model's config says. A module that
            neither comes by is compared on random tokens of its own.

    Returns:
        One line a module, with .name, .kind, .replaced, .op and .reason; see `Report`. A second call changes nothing.

    Raises:
        RuntimeError: inside a region that torch.compile or torch.export traces.
        TypeError: where `model` is no nn.Module, or `example` nothing of the above.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, takes an nn.Module")
    if example is not None and not isinstance(example, (torch.Tensor, tuple, list, Mapping)):
        raise TypeError(
            f"example: got {type(example).__name__}, takes a tensor, a tuple or list of arguments, "
            "or a mapping of keyword arguments"
        )
    if torch.compiler.is_compiling():
        raise RuntimeError("accelerate: called in a region that is being compiled; call it before, on the model itself")
    lines, candidates = {}, {}
    for name, module in model.named_modules():
        fused = type(module) if isinstance(module, Fused) else fused_class(type(module))
        if fused is None:
            parent = next((kind for kind in type(module).__mro__[1:] if _is_a_block(kind)), None)
            if parent is not None:
                lines[name] = _stays(name, parent, f"it is a {type(module).__name__}, a class of its own")
        elif type(module) is fused:
            lines[name] = Line(name, _kind(module), True, *_op_and_reason(module))
        elif fused.concerns(module, inside := _inside(model, name)):
            candidates[name] = module, fused
            lines[name] = _assess(name, module, fused, inside)
    if not any(line.replaced for line in lines.values() if line.op != "patch_embed"):
        lines = {name: line for name, line in lines.items() if line.op != "patch_embed"}  # no Vision Transformer
    new = {name: candidates[name] for name, line in lines.items() if name in candidates and line.replaced}
    verification = _verify(model, new, lines, example) if verify else "not verified"
    for name, (module, fused) in new.items():
        if lines[name].replaced:
            module.__class__ = fused
    report = Report((lines[name] for name, _ in model.named_modules() if name in lines), verification)
    if not any(line.replaced for line in report):
        ours = any(isinstance(module, Block) for module in model.modules())
        unknown = "it runs on the ops already" if ours else "no module of a library that it knows"
        reasons = "; ".join(sorted({line.reason for line in report})) or unknown
        log.warning(f"accelerate: nothing of the {type(model).__name__} was replaced: {reasons}")
    return report


def restore(model: nn.Module) -> int:
    """Give every module that `accelerate` changed its own class back.

    Returns:
        How many were changed back.

    Raises:
        RuntimeError: for a module whose class was changed once more since, as FSDP's `fully_shard` does; nothing is
            restored then.
    """
    changed = [(name, module) for name, module in model.named_modules() if isinstance(module, Fused)]
    for name, module in changed:
        if fused_class(module.original()) is not type(module):
            raise RuntimeError(f"restore: {name} became a {type(module).__name__} after accelerate; undo that first")
    for _, module in changed:
        module.__class__ = module.original()
    return len(changed)


def _is_a_block(kind: type) -> bool:
    fused = kind if issubclass(kind, Fused) else fused_class(kind)
    return fused is not None and issubclass(fused, FusedBlock)


def _kind(module: nn.Module) -> str:
    kind = module.original() if isinstance(module, Fused) else type(module)
    return f"{kind.__module__.split('.')[0]} {kind.__name__}"


def _stays(name: str, kind: type, reason: str) -> Line:
    return Line(name, f"{kind.__module__.split('.')[0]} {kind.__name__}", False, "", reason)


def _op_and_reason(module: Fused) -> tuple[str, str]:
    """Which op runs a module in evaluation mode, and why not more of it, or not in training if it is in that."""
    if not isinstance(module, FusedBlock):
        return module.op(), ""
    now = module.asides()
    with evaluating(module):
        op, reason = module.op(), next(filter(None, module.asides()), "")
    in_training = next((aside for aside in now if aside), "")
    return op, reason or (f"its own code in training: {in_training}" if in_training else "")


def _inside(model: nn.Module, name: str) -> tuple[nn.Module, ...]:
    """The modules that the one of this name stands in, the outermost first."""
    parts = name.split(".") if name else []
    return tuple(model.get_submodule(".".join(parts[:count])) for count in range(len(parts)))


def _assess(name: str, module: nn.Module, fused: type[Fused], inside: tuple[nn.Module, ...]) -> Line:
    """Whether a module can run as `fused`; it is left as it was."""
    kind = type(module)
    dtypes = {parameter.dtype for parameter in module.parameters() if parameter.is_floating_point()}
    if len(dtypes) != 1 or not dtypes <= set(DTYPES):
        names = ", ".join(sorted(map(dtype_name, dtypes)))
        return _stays(name, kind, f"its parameters are {names}: the kernels take one of float32, float16 and bfloat16")
    if "forward" in vars(module) or fused.why_rewritten():
        return _stays(name, kind, OTHER_FORWARD)
    with check.as_fused(module, fused) as changed:
        reason = changed.never(inside)
        op, half_reason = ("", "") if reason else _op_and_reason(changed)
    return Line(name, _kind(module), True, op, half_reason) if op else _stays(name, kind, reason or half_reason)


def _verify(model: nn.Module, new: dict, lines: dict, example) -> str:
    """Compare each module in both forms, correct its line, and say what was compared."""
    if not new:
        return "nothing to verify"
    if any(parameter.is_meta for parameter in model.parameters()):
        return "not verified: parameters on meta have no values"
    training = model.training
    devices = sorted({parameter.device.index for parameter in model.parameters() if parameter.is_cuda})
    with torch.inference_mode(False), torch.random.fork_rng(devices=devices), evaluating(model), check.unchanged(model):
        runs = check.runs_of(model, example)
        runs = check.those_that_run(runs) if example is None else runs
        inputs, before = check.run(runs, {name: module for name, (module, _) in new.items()})
        for name, (module, fused) in new.items():
            result, op = check.compare_as_seen(module, fused, inputs.get(name), training)
            line = lines[name]._replace(op=op or lines[name].op)
            line = _stays(name, type(module), result.reason) if result.reason else line
            lines[name] = line._replace(error=result.error)
        kept = {name: new[name] for name in new if lines[name].replaced}
        reason = check.run_accelerated(runs, kept, before)
        if reason:
            # Code behind a convolution may want the strides that its own gives: once more without those.
            blocks = {name: one for name, one in kept.items() if lines[name].op != "patch_embed"}
            stay = kept.keys() if check.run_accelerated(runs, blocks, before) else kept.keys() - blocks.keys()
            lines |= {name: _stays(name, type(kept[name][0]), reason) for name in stay}
    passed = [name for name in new if lines[name].replaced]
    told = f"{len(passed)} verified against fp64, {'forward and backward' if training else 'forward'}"
    if made_up := sum(name not in inputs for name in passed):
        told += f", {made_up} of them on random tokens: no run came by them"
    return told + (f"; {len(new) - len(passed)} failed" if len(passed) < len(new) else "")
