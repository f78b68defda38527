"""LayerNorm folded into the weight behind it, once, for inference in half precision."""

import torch
from torch import Tensor, nn

from vit_fast.layers import Block
from vit_fast.ops.attention import refusal
from vit_fast.ops.block import Folded, count_writes

DTYPES = (torch.float16, torch.bfloat16)


def freeze(model: nn.Module) -> nn.Module:
    """Fold the LayerNorms of each block into qkv and fc1, for as long as the parameters stay as they are.

    A folded LayerNorm leaves the kernel a product over the tokens as they lie in memory, in place of one over tokens
    that it must normalise first; it still normalises a tile of tokens where the mean of one of them is more than 64
    standard deviations. The result differs from the unfolded one by rounding, and keeps the tests' error rule.

    Folded weights serve the kernels, where no gradient is wanted and tokens and parameters are all fp16 or all bf16.
    Everything else (PyTorch's backend, fp32, a gradient, torch.export) runs as before, from the parameters. The weights
    of qkv and fc1 take their memory twice, 7·D² elements more a block of the usual hidden width. What is folded is
    neither parameter nor buffer: it is in no state dict, no copy and no pickle.

    A block is left as it is where its parameters are neither fp16 nor bf16, or were made in inference mode; where a
    part of it does not run on fused kernels (`explain` says why); and where a folded weight would not fit its dtype,
    that is overflow, or lose more than rounding takes.

    Undone, block by block, by `train()`, `load_state_dict()`, `to()` and its kind, a forward pass that wants a gradient
    for a parameter that was folded, every write to one that PyTorch counts, and another parameter or submodule in the
    place of one; the block then runs as before until it is frozen again. What cannot be noticed is a write to a
    parameter's `.data`, and `to()` of a part of a block alone is one: it is not to be done to a frozen model.

    Args:
        model: a VisionTransformer, or a module that holds one or some of its blocks, in evaluation mode.

    Returns:
        The model.

    Raises:
        ValueError: for a model in training mode, or one without any block of vit_fast.
    """
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    if not blocks:
        raise ValueError(f"model: got {type(model).__name__} without any block of vit_fast, takes a VisionTransformer")
    if model.training or any(block.training for block in blocks):
        raise ValueError("model: got one in training mode, takes one in evaluation mode; call model.eval() first")
    # Tensors made in inference mode would be refused outside it.
    with torch.inference_mode(False), torch.no_grad():
        for block in blocks:
            block.folded = _folded(block)
    return model


def _folded(block: Block) -> Folded | None:
    """Both LayerNorms of a block in the weights behind them, or None where the block is to stay as it is."""
    if block.attention_aside() or block.mlp_aside() or not block.lacks_inner_norms():
        return None
    sources = block.normed_parameters()
    dtype = sources[0].dtype
    if dtype not in DTYPES or refusal(block.attn.head_dim, block.attn.scale):
        return None
    if any(t is not None and (t.dtype != dtype or t.is_inference() or t.is_meta) for t in sources):
        return None
    halves = sources[:4], sources[4:]
    operands = [fold(*half) for half in halves]
    if not all(_fits(folded, *half[::2]) for (folded, *_), half in zip(operands, halves)):
        return None
    return Folded([*operands[0], *operands[1]], sources, count_writes(sources))


def fold(norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """V = W∘γ [N, K] in the dtype of W, c = W·β + b and u = Σₖ V [N] in fp32."""
    wide = weight.float()
    folded = (wide * norm_weight.float()).to(weight.dtype)
    # Not a product: that may round its operands to tf32.
    shift = (wide * norm_bias.float()).sum(1)
    return folded, shift if bias is None else shift + bias.float(), folded.float().sum(1)


def _fits(folded: Tensor, norm_weight: Tensor, weight: Tensor) -> bool:
    """Whether V has lost no more in any row than rounding takes."""
    exact = weight.float() * norm_weight.float()  # so it is: fp32 holds the product of two numbers in half precision
    lost, most = (folded.float() - exact).norm(dim=1), torch.finfo(weight.dtype).eps / 2 * exact.norm(dim=1)
    return bool((lost <= most).all())  # nor where either is NaN
