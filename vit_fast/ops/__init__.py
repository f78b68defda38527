"""The fused ops: one file each, named as in kernels/. Every one runs in PyTorch or in Triton (see `use_backend`).

A kernel gives the same bits in every run, and an image the same bits alone and in a batch, as long as both calls run
the same kernels with the same entries of the tile table. An image may have other last bits in another batch, or later:

- where the rows, batch times tokens, are of another class: up to 512, up to 2,048, or more (`tile_table.rows_class`);
  of a last block may count only the tokens that the head reads
- on a Hopper from the batch on whose heads fill it, four a multiprocessor, 44 images of a ViT-B: another kernel then
  takes attention
- from the batch on that `evidence.json` gives to PyTorch
- once the tiles were tuned anew
- in half precision where gradients are wanted: what backward will read is rounded before its activation is taken
- in PyTorch's backend, which promises nothing of the kind
"""

from vit_fast.ops import flops
from vit_fast.ops.attention import attention, attention_maps, attention_qkv
from vit_fast.ops.backend import use_backend
from vit_fast.ops.block import block
from vit_fast.ops.linear_residual import linear_residual
from vit_fast.ops.ln_linear import ln_linear
from vit_fast.ops.mlp import mlp
from vit_fast.ops.patch_embed import patch_embed
from vit_fast.ops.rope_attention import rope_attention
from vit_fast.ops.swiglu import swiglu
from vit_fast.ops.window_attention import window_attention

__all__ = [
    "attention",
    "attention_maps",
    "attention_qkv",
    "block",
    "linear_residual",
    "ln_linear",
    "mlp",
    "patch_embed",
    "rope_attention",
    "swiglu",
    "use_backend",
    "window_attention",
]

flops.register()
