"""Blocks of other libraries on the fused ops: one file a library, each class a subclass of the library's own.

A subclass changes `forward` (one of them also how a checkpoint is loaded) and reads the parameters of the submodules
that are there, so a module becomes accelerated, and itself again, by a change of its `__class__`. A file here imports
the library that it is named after, and is itself imported only for a module whose class that library has defined: none
of them is a dependency.
"""

import importlib

from vit_fast.foreign.block import Fused

# Where a class is defined, and the file here that has a subclass of the same name.
HOMES = {
    "open_clip.transformer": "open_clip",
    "timm.models.eva": "timm_eva",
    "timm.models.swin_transformer": "timm",
    "timm.models.vision_transformer": "timm",
    "torch.nn.modules.conv": "torch_nn",
    "torch.nn.modules.transformer": "torch_nn",
    "torchvision.models.swin_transformer": "torchvision",
    "torchvision.models.vision_transformer": "torchvision",
    "transformers.models.dinov3_vit.modeling_dinov3_vit": "transformers_dinov3",
    "transformers.models.swin.modeling_swin": "transformers_swin",
}
HOMES |= {
    f"transformers.models.{name}.modeling_{name}": "transformers"
    for name in (
        *("clip", "deit", "dinov2", "dinov2_with_registers", "ijepa"),
        *("siglip", "siglip2", "vit", "vit_mae"),
    )
}


def fused_class(kind: type) -> type[Fused] | None:
    """The accelerated subclass of exactly this class, or None."""
    home = HOMES.get(kind.__module__)
    if home is not None:
        fused = getattr(importlib.import_module(f"vit_fast.foreign.{home}"), kind.__name__, None)
        return fused if isinstance(fused, type) and issubclass(fused, Fused) and fused.original() is kind else None
    if issubclass(kind, Fused) or kind.__module__.split(".")[0] in ("timm", "torch", "transformers", "vit_fast"):
        return None
    from vit_fast.foreign import original

    return original.fused_class(kind)  # type: ignore[arg-type]  # a class is hashable, whatever its instances are
