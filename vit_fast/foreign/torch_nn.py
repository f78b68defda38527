"""torch.nn: the pre-norm TransformerEncoderLayer, the convolution that cuts patches, and MultiheadAttention's parts."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from vit_fast import ops
from vit_fast.foreign import HOMES
from vit_fast.foreign.block import AttentionHalf, Fused, FusedBlock, MlpHalf
from vit_fast.layers import DROPOUT, GELU, LINEAR, NORM, activation_of, readable, why_aside
from vit_fast.ops.backend import traced_to_onnx

_ATTENTION = readable(nn.MultiheadAttention)
_PROJECTION = (*LINEAR, *readable(NonDynamicallyQuantizableLinear))


def why_own_attention(name: str, attention: nn.MultiheadAttention) -> str:
    """Why this attention computes what `ops.attention_qkv` does not, or is not what it was, or ""."""
    reason = why_aside((name, attention, _ATTENTION))
    if reason:
        return reason
    if not (attention.batch_first and attention._qkv_same_embed_dim):
        return f"{name} reads the batch second, or keys and values of another width"
    if attention.bias_k is not None or attention.add_zero_attn:
        return f"{name} has a bias_k or add_zero_attn"
    if attention.dropout and attention.training:
        return f"{name}.dropout is active"
    return why_aside((f"{name}.out_proj", attention.out_proj, _PROJECTION))


def packed_half(norm: nn.LayerNorm, attention: nn.MultiheadAttention, scale: Tensor | None = None) -> AttentionHalf:
    """The attention half whose queries, keys and values come from one packed weight."""
    weight, bias = attention.in_proj_weight, attention.in_proj_bias
    return AttentionHalf(norm, (weight,), (bias,), attention.num_heads, attention.out_proj, scale)


class TransformerEncoderLayer(FusedBlock, nn.TransformerEncoderLayer):
    helpers = ("_sa_block", "_ff_block")

    def never(self, inside: tuple[nn.Module, ...] = ()) -> str:
        if not self.norm_first:
            return "norm_first is False"
        return "" if self.self_attn.batch_first else "batch_first is False"

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        plain = src_mask is None and src_key_padding_mask is None and not is_causal
        plain = plain and isinstance(src, Tensor) and src.dim() == 3 and not src.is_nested
        asides = self.asides() if plain else ("a mask is given, or no batch",)
        if self.is_aside(asides):
            return super().forward(src, src_mask, src_key_padding_mask, is_causal)
        return self.fused(src, asides)

    def attention_aside(self) -> str:
        return (
            self.why_helper("_sa_block")
            or why_own_attention("self_attn", self.self_attn)
            or why_aside(("norm1", self.norm1, NORM), ("dropout1", self.dropout1, DROPOUT))
        )

    def attention_half(self) -> AttentionHalf:
        return packed_half(self.norm1, self.self_attn)

    def own_attention(self, x: Tensor) -> Tensor:
        return self._sa_block(self.norm1(x), None, None, is_causal=False)

    def mlp_aside(self) -> str:
        reason = self.why_helper("_ff_block") or why_aside(
            ("norm2", self.norm2, NORM),
            ("linear1", self.linear1, LINEAR),
            ("dropout", self.dropout, DROPOUT),
            ("linear2", self.linear2, LINEAR),
            ("dropout2", self.dropout2, DROPOUT),
        )
        if reason or self.activation is F.gelu:
            return reason
        if isinstance(self.activation, nn.Module):
            return why_aside(("activation", self.activation, GELU))
        return f"activation is {getattr(self.activation, '__name__', self.activation)}"

    def mlp_half(self) -> MlpHalf:
        activation = "gelu" if self.activation is F.gelu else activation_of(self.activation)
        fc1 = self.linear1
        return MlpHalf(self.norm2, (fc1.weight,), (fc1.bias,), activation, self.linear2)

    def own_mlp(self, x: Tensor) -> Tensor:
        return self._ff_block(self.norm2(x))


# Where the classes are defined in which such a convolution cuts patches: they take tokens of any strides from it, as
# not everything does that stands behind one elsewhere. DINO and DINOv2 have theirs wherever their user has put it.
_EMBEDDINGS = HOMES.keys() - {"timm.models.swin_transformer", "timm.models.vision_transformer"} | {
    "timm.layers.hybrid_embed",
    "timm.layers.patch_embed",
}


def _cuts_patches(conv: Any) -> bool:
    plain = conv.padding in ((0, 0), "valid") and (conv.dilation, conv.groups) == ((1, 1), 1)
    return plain and conv.kernel_size == conv.stride and min(conv.kernel_size) > 1


class Conv2d(Fused, nn.Conv2d):
    """The patch projection of every library: a convolution whose stride is its kernel is one product."""

    def op(self) -> str:
        return "patch_embed"

    @classmethod
    def concerns(cls, module: nn.Module, inside: tuple[nn.Module, ...]) -> bool:
        kinds = type(inside[-1]).__mro__ if inside else ()
        embeds = any(kind.__module__ in _EMBEDDINGS or kind.__name__ == "PatchEmbed" for kind in kinds)
        return embeds and _cuts_patches(module)

    def never(self, inside: tuple[nn.Module, ...] = ()) -> str:
        if type(self._parameters.get("weight")) not in (nn.Parameter, Tensor):
            return f"weight is a {type(self._parameters.get('weight')).__name__}"
        return ""

    def forward(self, input: Tensor) -> Tensor:
        plain = isinstance(input, Tensor) and input.dim() == 4 and not traced_to_onnx()  # torch.fx has symbols
        if not plain or not _cuts_patches(self) or self.never() or self.why_rewritten():
            return super().forward(input)
        rows, columns = input.shape[2] // self.stride[0], input.shape[3] // self.stride[1]
        images = input[:, :, : rows * self.stride[0], : columns * self.stride[1]]  # what fills no patch is left out
        tokens = ops.patch_embed(images, self.weight, self.bias)
        return tokens.transpose(1, 2).unflatten(2, (rows, columns))
