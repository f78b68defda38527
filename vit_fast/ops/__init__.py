"""The fused ops: one file each, named as in kernels/. Every one runs in PyTorch or in Triton (see `use_backend`)."""

from vit_fast.ops import flops
from vit_fast.ops.attention import attention, attention_maps, attention_qkv
from vit_fast.ops.backend import use_backend
from vit_fast.ops.block import block
from vit_fast.ops.linear_residual import linear_residual
from vit_fast.ops.ln_linear import ln_linear
from vit_fast.ops.mlp import mlp
from vit_fast.ops.patch_embed import patch_embed
from vit_fast.ops.swiglu import swiglu

__all__ = [
    "attention",
    "attention_maps",
    "attention_qkv",
    "block",
    "linear_residual",
    "ln_linear",
    "mlp",
    "patch_embed",
    "swiglu",
    "use_backend",
]

flops.register()
