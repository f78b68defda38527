"""Whether an accelerated module computes what its own code does: both forms on one input, held against fp64."""

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from vit_fast.foreign import fused_class
from vit_fast.foreign.block import Fused, FusedBlock, RopeBlock
from vit_fast.verify import errors, in_a_line, limits

IMAGES = 2
TOKENS = 17


class Run(NamedTuple):
    """A call of a model, or of the part of it that sees."""

    module: nn.Module
    args: tuple
    kwargs: dict

    def __call__(self):
        torch.manual_seed(0)  # a masked autoencoder draws its mask: the same one in both forms
        with torch.no_grad():
            return self.module(*self.args, **self.kwargs)


class Result(NamedTuple):
    error: float | None  # the largest ‖ours − fp64‖/‖fp64‖
    reason: str  # why the module must stay as it was, or ""


def runs_of(model: nn.Module, example) -> list[Run]:
    """The calls that show what each module of the model reads: on the example, or on random images."""
    if example is not None:
        if isinstance(example, Mapping):
            return [Run(model, (), dict(example))]
        return [Run(model, tuple(example) if isinstance(example, (tuple, list)) else (example,), {})]
    runs, inside = [], set()
    model = getattr(model, "_orig_mod", model)  # of a compiled one: a run of it would compile
    for module in model.modules():
        shape = None if module in inside else _image_shape(module)
        if shape is not None:
            inside |= set(module.modules())
            runs.append(Run(module, (_random(module, (IMAGES, *shape)),), {}))
    return runs


def _image_shape(module: nn.Module) -> tuple[int, int, int] | None:
    """(channels, rows, columns) that a model takes, by its own account, or None."""
    config: Any = getattr(module, "config", None)
    if getattr(module, "main_input_name", "") == "pixel_values" and hasattr(config, "image_size"):
        size, channels = config.image_size, config.num_channels
    elif isinstance(said := getattr(module, "pretrained_cfg", None), dict) and "input_size" in said:
        channels, *size = said["input_size"]
        size = getattr(getattr(module, "patch_embed", None), "img_size", None) or size
        channels = next((one.in_channels for one in module.modules() if isinstance(one, nn.Conv2d)), channels)
    elif (type(module).__module__, type(module).__name__) == ("torchvision.models.swin_transformer", "SwinTransformer"):
        # It takes any size: this one is the least whose maps are all of whole windows, that of its weights.
        conv = next((one for one in module.modules() if isinstance(one, nn.Conv2d)), None)
        window: Any = next((one.window_size for one in module.modules() if hasattr(one, "window_size")), None)
        if conv is None or window is None:  # parts of somebody's own
            return None
        merges = sum(type(one).__name__.startswith("PatchMerging") for one in module.modules())
        return (conv.in_channels, *(patch * side * 2**merges for patch, side in zip(conv.kernel_size, window)))
    else:
        seen = next((one for one in (module, getattr(module, "patch_embed", None)) if _says_its_size(one)), None)
        if seen is None:
            return None
        size = getattr(seen, "img_size", None) or getattr(seen, "image_size", None)
        channels = next(one.in_channels for one in seen.modules() if isinstance(one, nn.Conv2d))
    return (channels, *(size if isinstance(size, (tuple, list)) else (size, size)))


def _says_its_size(module) -> bool:
    size = getattr(module, "img_size", None) or getattr(module, "image_size", None)
    return size is not None and any(isinstance(child, nn.Conv2d) for child in module.children())


def _random(module: nn.Module, shape: tuple[int, ...]) -> Tensor:
    parameter = next(module.parameters())
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator, device="cpu").to(parameter.device, parameter.dtype)


@contextlib.contextmanager
def as_fused(module: nn.Module, fused: type[Fused]) -> Iterator[Any]:
    """A block in which a module of the library's class is one of this."""
    kind: Any = type(module)
    module.__class__ = fused
    try:
        yield module
    finally:
        module.__class__ = kind


def random_input(module: nn.Module, fused: type[Fused]) -> tuple[tuple, dict]:
    """What a module may be called with: an image for a convolution, a map for a Swin's block, tokens for the rest."""
    if isinstance(module, nn.Conv2d):
        patches = (2 * side for side in module.kernel_size)
        return (_random(module, (IMAGES, module.in_channels, *patches)),), {}
    first = next(one for one in module.modules() if isinstance(one, (nn.LayerNorm, nn.Linear)))
    width = first.normalized_shape[-1] if isinstance(first, nn.LayerNorm) else first.in_features
    sides = _sides(module)
    x = _random(module, (IMAGES, *sides, width))
    takes = inspect.signature(type(module).forward).parameters
    if "input_dimensions" in takes:
        return (x.flatten(1, 2), sides), {}
    named = {"attention_mask": None} if "attention_mask" in takes else {}
    if issubclass(fused, RopeBlock):
        with as_fused(module, fused) as block:
            named |= block.example(x)
    return (x,), named


def _sides(module: nn.Module) -> tuple[int, ...]:
    """How many tokens a block may be called with, or how many rows and columns of them where it has windows: whole
    ones, since what is padded runs on no op."""
    window: Any = getattr(module, "window_size", None) or getattr(getattr(module, "attn", None), "window_size", None)
    if window is None:
        return (TOKENS + getattr(getattr(module, "attn", None), "num_prefix_tokens", 0),)
    window = window if isinstance(window, (tuple, list)) else (window, window)
    resolution: Any = getattr(module, "input_resolution", None) or (2 * side for side in window)
    return tuple(-(-length // side) * side for length, side in zip(resolution, window))


class _Reached(Exception):
    """The ops of a block, in a call."""


def seen_by(module: nn.Module, fused: type[FusedBlock], args: tuple, kwargs: dict) -> tuple[tuple[str, ...], str]:
    """In a call of a block with this input: why each of its halves is aside, and which op runs it; of a call that its
    library's forward computes ("",) and ""."""
    found: list[tuple[tuple[str, ...], str]] = []

    def note(block, x, asides, **named):
        found.append((asides, block.op_of(asides, **named)))
        raise _Reached

    noting = type("Noting", (fused,), {"fused": note})
    with torch.no_grad(), as_fused(module, noting) as block, contextlib.suppress(_Reached):
        block.forward(*args, **kwargs)
    return found[0] if found else (("",), "")


def run(runs: list[Run], modules: dict[str, nn.Module]) -> tuple[dict[str, tuple[tuple, dict]], list]:
    """What each module reads first in these runs, (args, kwargs) by its name, and what the runs return."""
    inputs: dict[str, tuple[tuple, dict]] = {}

    def note(name: str):
        def hook(module, args, kwargs):
            if not args:  # transformers names even the first
                name_of_first, *others = kwargs
                args, kwargs = (kwargs[name_of_first],), {other: kwargs[other] for other in others}
            if not isinstance(args[0], Tensor) or args[0].numel():  # of an example without images nothing is seen
                inputs.setdefault(name, pytree.tree_map_only(Tensor, Tensor.detach, (args, kwargs)))

        return hook

    handles = [module.register_forward_pre_hook(note(name), with_kwargs=True) for name, module in modules.items()]
    try:
        return inputs, [one() for one in runs]
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """A block in which blocks of the model are called that set attributes of theirs: each gets its own back."""
    fused = [(one, type(one) if isinstance(one, Fused) else fused_class(type(one))) for one in model.modules()]
    held = [(one, name, getattr(one, name)) for one, kind in fused if kind for name in kind.changed_by_calls]
    try:
        yield
    finally:
        for one, name, value in held:
            setattr(one, name, value)


def those_that_run(runs: list[Run]) -> list[Run]:
    """Of the runs that were made up those that the model takes."""
    taken = []
    for one in runs:
        try:
            one()
            taken.append(one)
        except Exception:  # whatever code of somebody else's raises: the guess was wrong
            continue
    return taken


def run_accelerated(runs: list[Run], new: dict[str, tuple[nn.Module, type[Fused]]], before: list) -> str:
    """Why the model as a whole cannot run in its new form, or ""; it is left in the old one."""
    for module, fused in new.values():
        module.__class__ = fused
    try:
        for one, old in zip(runs, before):
            for ours, theirs in zip(_tensors(one()), _tensors(old)):
                if ours.shape != theirs.shape or ours.isfinite().logical_xor(theirs.isfinite()).any():
                    return "the model as a whole gave something else with it"
    except Exception as error:  # whatever code of somebody else's raises
        return f"the model as a whole raised {in_a_line(error)}"
    finally:
        for module, fused in new.values():
            module.__class__ = fused.original()
    return ""


def _tensors(output) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def compare_as_seen(
    module: nn.Module, fused: type[Fused], seen: tuple[tuple, dict] | None, training: bool
) -> tuple[Result, str]:
    """`compare` on what the module read in a run, and which op runs it there, "" where none does.

    Where no run came by it, or one of a block's halves was aside in that call alone, it is compared on a random input.
    """
    op = ""
    try:
        every = [seen or random_input(module, fused)]
        if issubclass(fused, FusedBlock):
            with as_fused(module, fused) as block:
                always = block.asides()
            asides, op = seen_by(module, fused, *every[0])
            if seen and asides != always:
                every.append(random_input(module, fused))
    except Exception as error:  # whatever code of somebody else's raises
        return Result(None, f"its comparison raised {in_a_line(error)}"), ""
    results = [compare(module, fused, *one, training) for one in every]
    largest = max((one.error for one in results if one.error is not None), default=None)
    return Result(largest, next(filter(None, (one.reason for one in results)), "")), op


def compare(module: nn.Module, fused: type[Fused], args: tuple, kwargs: dict, training: bool) -> Result:
    """Both forms of a module on one input, by the error rule; backwards too, from a random gradient, if `training`.

    Where its own form does not run in fp64, as with a quantised Linear in one half, the half that is replaced alone.
    """
    kind: Any = type(module)
    own, new = kind.forward, fused.forward
    try:
        double = _in_double(module)
        as_double, named_as_double = pytree.tree_map_only(Tensor, _as_double, (args, kwargs))
        double.__class__ = module.__class__ = fused  # whose methods of other names are the library's
        try:
            true = _results(double, own, as_double, named_as_double, training)
        except Exception:
            if not isinstance(module, FusedBlock) or not any(asides := module.asides()):
                raise
            own, new = _halves(asides[0])
            args, as_double = (module.reads(*args),), (module.reads(*as_double),)
            # Of what a call names the ops read the positions alone.
            positions = "" if asides[0] else getattr(module, "positions", "")
            kwargs, named_as_double = (
                {name: value for name, value in named.items() if name == positions}
                for named in (kwargs, named_as_double)
            )
            true = _results(double, own, as_double, named_as_double, training)
        theirs = _results(module, own, args, kwargs, training)
        ours = _results(module, new, args, kwargs, training)
    except Exception as error:  # whatever code of somebody else's raises
        return Result(None, f"its comparison raised {in_a_line(error)}")
    finally:
        module.__class__ = kind
    largest = 0.0
    for name, result, peer, truth in zip(("output", "gradients"), ours, theirs, true):
        if not (truth.isfinite().all() and peer.isfinite().all()):
            return Result(None, f"its {name} is not finite in its own code either: there is nothing to compare")
        if not truth.any():
            if result.any():
                return Result(None, f"its {name} is not zero, as it should be")
            continue
        (whole, worst), (limit, worst_limit) = errors(result, truth), limits(peer, truth)
        largest = max(largest, whole)
        if not (whole <= limit and worst <= worst_limit):
            return Result(whole, f"its {name} is further from fp64 than twice the original's: {whole:.1e}, {limit:.1e}")
    return Result(largest, "")


def _halves(attention_aside: str) -> tuple[Callable, Callable]:
    """The half of a block that is not aside, by the library's modules and on the ops."""
    if attention_aside:
        return lambda block, x: block.second(x, None), lambda block, x: block.second(x, block.mlp_half())
    return (
        lambda block, x, **named: block.first(x, None, **named),
        lambda block, x, **named: block.first(x, block.half_of(**named), **named),
    )


def _in_double(module: nn.Module) -> nn.Module:
    """A copy in fp64."""
    held = [value for one in module.modules() for value in vars(one).values() if isinstance(value, Tensor)]
    # A weight that a hook computes in every call, pruned or of weight_norm, has a history, which deepcopy refuses.
    memo = {id(tensor): _as_double(tensor.detach()) for tensor in held if not tensor.is_leaf}
    return copy.deepcopy(module, memo).double()


def _as_double(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


def _results(module: nn.Module, forward: Callable, args: tuple, kwargs: dict, training: bool) -> list[Tensor]:
    """The output, and all gradients as one vector: some are zero but for rounding, a key's bias among them."""
    # Not the module itself: a hook of the user's on it, or gradient checkpointing, has no part in this.
    x, *others = args
    wanted = [parameter for parameter in module.parameters() if parameter.requires_grad] if training else []
    with torch.set_grad_enabled(training):
        x = x.detach().clone().requires_grad_(training)
        output = forward(module, x, *others, **kwargs)
        output = output[0] if isinstance(output, tuple) else output
        if not training:
            return [output.detach()]
        generator = torch.Generator().manual_seed(0)
        upstream = torch.randn(output.shape, generator=generator, device="cpu").to(output)
        gradients = torch.autograd.grad(output, [x, *wanted], upstream, allow_unused=True)
    every = [torch.zeros_like(of) if g is None else g for of, g in zip((x, *wanted), gradients)]
    return [output.detach(), torch.cat([gradient.flatten() for gradient in every])]
