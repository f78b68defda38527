"""Weights of other libraries in and out: `convert` between names, `read` and `write` files.

Which names a state dict has is found out from the names: the layout that leaves fewest of them over.
"""

import logging
from collections.abc import Collection, Mapping, Sequence

from torch import Tensor

from vit_fast.checkpoint import matches_any, shortened
from vit_fast.ops.backend import one_of
from vit_fast.weights import jax, open_clip, original, timm, torchvision, transformers
from vit_fast.weights.files import read, write
from vit_fast.weights.layout import Coverage, Layout, is_gated

__all__ = ["LAYOUTS", "TARGETS", "convert", "read", "recognise", "to_ours", "write"]

log = logging.getLogger("vit_fast")

LAYOUTS = (
    timm.TIMM,
    original.DINOV2,
    original.DINOV2_GATED,
    transformers.VIT,
    transformers.IJEPA,
    transformers.DEIT,
    transformers.DEIT_ONE_HEAD,
    *transformers.DINOV2.values(),
    transformers.CLIP,
    transformers.SIGLIP,
    torchvision.TORCHVISION,
    open_clip.OPEN_CLIP,
    open_clip.OPEN_CLIP_TIMM,
    jax.JAX,
)
MOST_TENSORS = 10_000  # ten times what the largest model has
TARGETS = ("timm", "hf", "torchvision", "open_clip", "dinov2", "jax")


def recognise(names: Collection[str]) -> Layout:
    """The layout that these names are of.

    Raises:
        ValueError: where no layout knows the patch projection among them, or they are of two.
    """
    names = list(names)
    covers = [(layout, layout.cover(names)[1]) for layout in LAYOUTS]
    covers = [(layout, cover) for layout, cover in covers if "patch_embed.proj.weight" not in cover.missing]
    if not covers:
        known = ", ".join(layout.name for layout in LAYOUTS)
        raise ValueError(f"the weights: {shortened(names)} are names of no layout that is known: {known}")
    best, cover = min(covers, key=lambda pair: len(pair[1].left_over) + len(pair[1].missing))
    for other, _ in covers:
        matches, there = other.cover(cover.left_over)
        if matches and "patch_embed.proj.weight" not in there.missing:
            raise ValueError(f"the weights: names of two layouts, {best.name} and {other.name}; give one at a time")
    return best


def to_ours(state_dict: Mapping[str, Tensor], partial: Sequence[str] = ()) -> tuple[dict[str, Tensor], Coverage]:
    """The weights under the names of our models, and what became of each name.

    Args:
        state_dict: of any layout of `LAYOUTS`; arrays of numpy are not taken, `read` makes tensors of them.
        partial: shell patterns of names that may be missing or left over.

    Raises:
        ValueError: for names that are left over or missing and not in `partial`, for names of no layout or of two, for
            shapes that the layout does not have.
    """
    if len(state_dict) > MOST_TENSORS:
        raise ValueError(f"the weights: {len(state_dict)} tensors, takes {MOST_TENSORS} at most")
    empty = [name for name, tensor in state_dict.items() if not tensor.numel()]
    if empty:  # its other sides may be of any length
        raise ValueError(f"the weights: no number in {shortened(empty)}")
    layout = recognise(state_dict)
    try:
        found, coverage = layout.to_ours(state_dict)
    except (IndexError, RuntimeError, TypeError) as error:
        raise ValueError(f"the weights: a tensor is of another shape than in {layout.name} ({error})") from error
    _refuse(coverage, partial)
    return found, coverage


def _refuse(coverage: Coverage, partial: Sequence[str]) -> None:
    names = [*coverage.left_over, *coverage.missing]
    if not all(matches_any(name, partial) for name in names):
        raise ValueError(f"the weights: {coverage}; `partial` may name what is not wanted")


def convert(
    state_dict: Mapping[str, Tensor], to: str, *, num_heads: int | None = None, partial: Sequence[str] = ()
) -> dict[str, Tensor]:
    """The same weights under another library's names.

    Args:
        state_dict: of timm, transformers (names in memory or on disk), torchvision (old and new), open_clip, OpenAI's
            CLIP, the repositories of DINO, DINOv2, DeiT and MAE, or google-research's .npz.
        to: "timm" (our own models' too), "hf" (the names that transformers reads and writes on disk: of ViT, DeiT,
            I-JEPA, DINOv2, CLIP or SigLIP, as the weights ask for), "torchvision", "open_clip", "dinov2", "jax".
        num_heads: only "jax" shows it; None is one for each 64 of the width.
        partial: shell patterns of names that may be missing or left over.

    Returns:
        Tensors of the same dtype. What the other library holds and no inference reads, a token for masked patches, is
        zero. A folded class position (DINOv2 with registers) comes back as a part of the class token.

    Raises:
        ValueError: as `to_ours`, for weights that have no place in the layout `to`, and for weights without what every
            model of it has.
    """
    one_of("to", to, TARGETS)
    ours, coverage = to_ours(state_dict, partial)
    log.info(str(coverage))
    if to == "timm":
        return ours
    width = ours["patch_embed.proj.weight"].shape[0]
    found, coverage = _target(to, ours).to_theirs(ours, num_heads or max(1, width // 64))
    _refuse(coverage, partial)
    return found


def _target(to: str, ours: Mapping[str, Tensor]) -> Layout:
    """The layout in which a library holds a model with these weights."""
    gated = is_gated(ours)
    registers = ours["reg_token"].shape[1] if "reg_token" in ours else 0
    if to == "dinov2":
        return original.DINOV2_GATED if gated else original.DINOV2
    # DeiT has one token that can be a register.
    if to == "hf" and (gated or "blocks.0.ls1.gamma" in ours or registers > 1):
        return transformers.DINOV2[registers > 0, gated]
    if gated:
        raise ValueError(f"the weights: their MLP has gates (SwiGLU), for which {to!r} has no names")
    if to != "hf":
        return {"torchvision": torchvision.TORCHVISION, "open_clip": open_clip.OPEN_CLIP, "jax": jax.JAX}[to]
    if "attn_pool.latent" in ours:
        return transformers.SIGLIP
    if "norm_pre.weight" in ours:
        return transformers.CLIP
    if "dist_token" in ours:
        return transformers.DEIT
    if registers:
        return transformers.DEIT_ONE_HEAD
    return transformers.VIT if "cls_token" in ours else transformers.IJEPA
