"""Kernels compiled before they are needed."""

import contextlib
from collections.abc import Iterable, Iterator

import torch

from vit_fast.explain import explain
from vit_fast.layers import PatchEmbed
from vit_fast.model import VisionTransformer


def warm(model: VisionTransformer, sizes: Iterable[int | tuple[int, ...]]) -> list[str]:
    """Compile every kernel that `model` will need for batches of these sizes, so that no later call waits for it.

    A pass over images of zeros in the dtype of the parameters does it: forward of a model in evaluation mode, as under
    torch.no_grad(); forward and backward of one in training. The first batch of bytes compiles one kernel more, that
    which cuts them. What counts is the state of the call: device and dtype of the parameters, autocast,
    `use_backend`. Nothing stays but the compiled kernels: gradients, buffers, training mode and the random state of CPU
    and device are as before.

    Args:
        model: a VisionTransformer.
        sizes: batch sizes, each a number, (batch,), or (batch, rows, columns); images have the model's own size where
            none is given.

    Returns:
        The names of the kernels that were compiled or read from Triton's cache on disk, one for each variant. Empty
        where there was nothing to do: on a CPU, where PyTorch runs, no pass is made.

    Raises:
        ValueError: for another model, and sizes that it does not take, naming the argument.
    """
    if not isinstance(model, VisionTransformer):
        raise ValueError(f"model: got {type(model).__name__}, takes a VisionTransformer")
    if not isinstance(sizes, Iterable):
        raise ValueError(f"sizes: got {sizes!r}, takes an iterable of them")
    dtype = model._dd()["dtype"]
    # On the meta device: whether the model takes images of this size costs nothing to ask.
    shapes = [_shape(model, size) for size in sizes]
    for shape in shapes:
        if not isinstance(model.patch_embed, PatchEmbed):
            continue
        try:
            model.patch_embed.prepare(torch.empty(shape, dtype=dtype, device="meta"))
        except ValueError as error:
            raise ValueError(f"sizes: {error}") from None
    if all(line.backend != "triton" for line in explain(model)):
        return []
    with _compiled_names() as names:
        for shape in shapes:
            pass_over(model, shape)
    return names


def _shape(model: VisionTransformer, size: int | Iterable[int]) -> tuple[int, int, int, int]:
    sides = tuple(size) if isinstance(size, Iterable) else (size,)
    if len(sides) not in (1, 3) or not all(type(side) is int and side > 0 for side in sides):
        raise ValueError(f"sizes: got {size!r}, takes batch, (batch,) or (batch, rows, columns), each 1 or more")
    batch, *image = sides
    if not image and not hasattr(model.patch_embed, "img_size"):
        raise ValueError(f"sizes: got {size!r}, takes (batch, rows, columns): patch_embed does not say its img_size")
    return batch, model.in_chans, *(image or model.patch_embed.img_size)


def pass_over(model: VisionTransformer, shape: tuple[int, int, int, int]) -> None:
    """A pass over images of this shape that leaves no trace: forward, and in training backward."""
    dd = model._dd()
    devices = [dd["device"]] if dd["device"].type == "cuda" else []
    before = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    try:
        with torch.random.fork_rng(devices), torch.inference_mode(False), torch.set_grad_enabled(model.training):
            output = model(torch.zeros(shape, **dd))
            outputs = [one for one in (output if isinstance(output, tuple) else (output,)) if one.requires_grad]
            wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
            if outputs:  # backward() would add to .grad
                torch.autograd.grad(outputs, wanted, list(map(torch.zeros_like, outputs)), allow_unused=True)
    finally:
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)


@contextlib.contextmanager
def _compiled_names() -> Iterator[list[str]]:
    """A list that grows by the name of each kernel that is compiled in the block."""
    from triton import knobs

    hook, names = knobs.runtime.jit_post_compile_hook, []

    def noting(**compiled):
        names.append(compiled["fn"].name)
        return hook(**compiled) if hook else None

    knobs.runtime.jit_post_compile_hook = noting
    try:
        yield names
    finally:
        knobs.runtime.jit_post_compile_hook = hook
