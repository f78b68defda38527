"""patch_embed: image → tokens, a pass that cuts and a product that does the rest."""

import math
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vit_fast.ops.backend import (
    cast,
    check_device,
    check_operands,
    check_rank,
    check_shape,
    compute_dtype,
    float32_precision,
    like,
    measured_faster,
    needs_grad,
    on_device_of,
    or_empty,
    or_none,
    packed,
    use_triton,
)


def wrong_channels(images: Tensor, channels: int, whose: str = "") -> ValueError:
    """The error for images [B, C, H, W] of another number of channels; bytes may have them last, as decoders do."""
    last = images.dtype == torch.uint8 and images.shape[3] == channels
    hint = "; .permute(0, 3, 1, 2) puts those of [B, H, W, C] in their place, without a copy" if last else ""
    return ValueError(f"images: got {images.shape[1]} channels, takes {channels}{whose}{hint}")


def channel_numbers(name: str, values, channels: int, above_zero: bool) -> tuple[float, ...]:
    """The mean or the std of bytes, a number for each channel."""
    numbers = tuple(map(float, values)) if isinstance(values, Iterable) else ()
    least = 0.0 if above_zero else -math.inf
    if len(numbers) != channels or not all(least < number < math.inf for number in numbers):
        takes = " above 0" if above_zero else ""
        raise ValueError(f"{name}: got {values}, takes {channels} finite numbers{takes}, one a channel of uint8 images")
    return numbers


def check(images, weight, bias, position, prefix) -> None:
    check_rank("images", images, "B C H W")
    check_rank("weight", weight, "D C P P")
    width, channels, patch_height, patch_width = weight.shape
    _, got, height, columns = images.shape
    if got != channels:
        raise wrong_channels(images, channels, ", those of weight")
    if height % patch_height or columns % patch_width or not height or not columns:
        raise ValueError(f"images: got {height} x {columns} pixels, takes multiples of {patch_height} x {patch_width}")
    check_shape("bias", bias, (width,))
    count = 0
    if prefix is not None:
        check_rank("prefix", prefix, "R D")
        count = prefix.shape[0]
        check_shape("prefix", prefix, (count, width))
    if position is not None:
        check_rank("position", position, "N D")
        patches = (height // patch_height) * (columns // patch_width)
        rows = position.shape[0]
        # Not `in` a tuple: torch.compile with dynamic shapes answers that wrongly.
        if (rows != patches and rows != patches + count) or position.shape[1] != width:
            takes = f"[{patches}, {width}]" + (f" or [{patches + count}, {width}]" if count else "")
            raise ValueError(f"position: got shape {list(position.shape)}, takes {takes}")
    if images.dtype == torch.uint8:
        check_device(images, weight=weight)
        check_operands(weight, bias=bias, position=position, prefix=prefix)
    else:
        check_operands(images, weight=weight, bias=bias, position=position, prefix=prefix)


def _token_dtype(dtype: torch.dtype, position: Tensor | None, prefix: Tensor | None) -> torch.dtype:
    """That of the product, raised as PyTorch raises it where it meets a table of another dtype."""
    for table in (position, prefix):
        dtype = dtype if table is None else torch.promote_types(dtype, table.dtype)
    return dtype


@torch.library.custom_op("vit_fast::patch_embed", mutates_args=())
def _patch_embed(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    position: Tensor | None,
    prefix: Tensor | None,
    mean: list[float] | None = None,
    std: list[float] | None = None,
) -> Tensor:
    from vit_fast.kernels import patch_embed as kernel

    with on_device_of(images):
        return kernel.forward(
            images,
            packed(weight),
            packed(bias),
            packed(position),
            packed(prefix),
            mean,
            std,
            _token_dtype(weight.dtype, position, prefix),
            float32_precision(weight.dtype),
        )


@_patch_embed.register_fake
def _(images, weight, bias, position, prefix, mean=None, std=None):
    count = 0 if prefix is None else prefix.shape[0]
    patches = (images.shape[2] // weight.shape[2]) * (images.shape[3] // weight.shape[3])
    dtype = _token_dtype(weight.dtype, position, prefix)
    return images.new_empty(images.shape[0], count + patches, weight.shape[0], dtype=dtype)


@torch.library.custom_op("vit_fast::patch_embed_backward", mutates_args=())
def _backward(
    dtokens: Tensor,
    images: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    position: Tensor | None,
    prefix: Tensor | None,
    mean: list[float] | None = None,
    std: list[float] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from vit_fast.kernels import patch_embed as kernel

    with on_device_of(dtokens):
        gradients = kernel.backward(
            dtokens.contiguous(),
            images,
            packed(weight),
            bias,
            position,
            prefix,
            mean,
            std,
            float32_precision(weight.dtype),
        )
    dweight, dbias, dposition, dprefix = (or_empty(gradient, dtokens) for gradient in gradients)
    return dweight, dbias, dposition, dprefix


@_backward.register_fake
def _(dtokens, images, weight, bias, position, prefix, mean=None, std=None):
    return tuple(like(operand, dtokens) for operand in (None if images is None else weight, bias, position, prefix))


def _setup_context(ctx, inputs, output):
    images, weight, *tables, ctx.mean, ctx.std = inputs
    ctx.set_materialize_grads(False)
    # A frozen projection reads no image again, which the caller may write to and the next batch takes the memory of.
    ctx.save_for_backward(images if ctx.needs_input_grad[1] else None, weight, *tables)


def _autograd(ctx, dtokens):
    if dtokens is None:
        return (None,) * 7
    return None, *map(or_none, _backward(dtokens, *ctx.saved_tensors, ctx.mean, ctx.std)), None, None


_patch_embed.register_autograd(_autograd, setup_context=_setup_context)


def patch_embed(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    position: Tensor | None = None,
    prefix: Tensor | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Tensor:
    """Cut images into patches, project them, put prefix tokens before them and add the positions.

    Dosovitskiy et al. 2021, equation 1.

    Args:
        images: [B, C, H, W], fp32, fp16, bf16, or fp64 (PyTorch only); or bytes, uint8, as a decoder gives them, each
            read as (byte / 255 − mean[c]) / std[c] in fp32. Any strides: bytes [B, H, W, C] come as they are by
            .permute(0, 3, 1, 2). H and W multiples of the patch.
        weight: [D, C, P, P], that of a convolution whose stride is its kernel.    bias: [D] or None.
        position: [N, D] for the N patches alone, [R + N, D] for the prefix tokens too, or None.
        prefix: [R, D], the class, distillation and register tokens, or None.
        mean, std: of bytes, C numbers for pixels from 0 to 1; std above 0. None for other images.

    Returns:
        Tokens [B, R + N, D] in the dtype of the product (autocast's where it is on, and with bytes that of the weight),
        or that of position and prefix where it is wider.

    Raises:
        ValueError: for a shape, a device, a mean or a std that does not fit. TypeError: for a dtype that does not.
    """
    check(images, weight, bias, position, prefix)
    if images.dtype == torch.uint8:
        return _of_bytes(images, weight, bias, position, prefix, mean, std)
    for name, values in (("mean", mean), ("std", std)):
        if values is not None:
            raise ValueError(f"{name}: got {values} with images in {images.dtype}, takes it with uint8 alone")
    # No kernel makes an image's gradient: it costs another product, and only attacks and visualisations ask for it.
    takes = not needs_grad(images) and use_triton("patch_embed", images)
    width, patch = weight.shape[0], weight.shape[1:].numel()
    work = (images, weight, bias, position, prefix), (width, patch), images.numel() // patch
    if not takes or measured_faster("patch_embed", *work):
        return _in_pytorch(images, weight, bias, position, prefix)
    dtype = compute_dtype(images)
    return _patch_embed(images.to(dtype), cast(weight, dtype), bias, position, prefix)


def _of_bytes(images, weight, bias, position, prefix, mean, std):
    channels, dtype = weight.shape[1], compute_dtype(weight)
    mean = channel_numbers("mean", mean, channels, above_zero=False)
    std = channel_numbers("std", std, channels, above_zero=True)
    # No evidence is asked for: it was measured on images that are numbers already.
    if images.numel() and use_triton("patch_embed", weight):
        return _patch_embed(images, cast(weight, dtype), bias, position, prefix, mean, std)
    return _in_pytorch(normalise(images, mean, std, dtype), weight, bias, position, prefix)


def normalise(pixels: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype) -> Tensor:
    """(pixel − mean[c]) / std[c] of pixels [B, C, H, W] from 0 to 1, or of bytes from 0 to 255, in `dtype`.

    Computed in fp32, or in fp64 for that, and rounded once. The numbers go as such into each channel's operations, and
    not in a tensor, which would be copied to the device.
    """
    wide, white = torch.promote_types(dtype, torch.float32), 255 if pixels.dtype == torch.uint8 else 1
    planes = [(x.to(wide) / white - m) / s for x, m, s in zip(pixels.unbind(1), mean, std, strict=True)]
    return torch.stack(planes, 1).to(dtype)


def _in_pytorch(images, weight, bias, position, prefix):
    tokens = F.conv2d(images, weight, bias, stride=weight.shape[-2:]).flatten(2).transpose(1, 2)
    count = 0 if prefix is None else prefix.shape[0]
    positioned_prefix = position is not None and count > 0 and position.shape[0] == tokens.shape[1] + count
    if position is not None and not positioned_prefix:
        tokens = tokens + position
    if count:
        tokens = torch.cat([prefix.expand(tokens.shape[0], -1, -1), tokens], dim=1)
    return tokens + position if positioned_prefix else tokens
