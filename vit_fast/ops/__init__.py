"""The fused ops: one file each, named as in kernels/. Every one runs in PyTorch or in Triton (see `use_backend`).

A kernel gives the same bits in every run, and an image the same bits alone and in a batch, as long as both take the
same entries of the tile table. Where they may differ: in a batch of another class of rows (up to 512, up to 2,048, or
more: `rows_class`; they are batch times tokens, of which a last block may compute only those that the head reads), from
the batch on whose heads fill a Hopper, where another kernel takes attention (four a multiprocessor, 44 images of a
ViT-B), from the batch on that `evidence.json` gives to PyTorch, after the tiles were tuned anew, and in PyTorch's
backend, which promises nothing of the kind.
"""

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
