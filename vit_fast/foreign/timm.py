"""timm: the pre-norm block of vision_transformer.py, which deit.py and the hybrids use too, and Swin's."""

import timm.layers
from timm.models import swin_transformer, vision_transformer
from torch import Tensor, nn

from vit_fast.foreign.block import (
    PADDED,
    AttentionHalf,
    FusedBlock,
    MlpHalf,
    WindowedBlock,
    Windows,
    as_written,
    why_method,
    why_other_distances,
    why_other_mask,
)
from vit_fast.layers import DROPOUT, GATE, LINEAR, NORM, activation_of, readable, why_aside

NORMS = (*NORM, *readable(timm.layers.LayerNorm))
NORMS_OR_NONE = (*NORMS, nn.Identity)
_ACTIVATION = {timm.layers.GELU: "gelu", timm.layers.GELUTanh: "gelu_tanh", timm.layers.QuickGELU: "quick_gelu"}
_ACTIVATIONS = (nn.GELU, *readable(*_ACTIVATION))
_ATTENTION = readable(timm.layers.Attention)
_WINDOWED = readable(swin_transformer.WindowAttention)
_WRITTEN = as_written(swin_transformer.WindowAttention, "_get_rel_pos_bias")
_SOFTMAX = readable(nn.Softmax)
_MLP = readable(timm.layers.Mlp)
_GATED = readable(timm.layers.GluMlp)
_SCALE = (nn.Identity, *readable(timm.layers.LayerScale))
PATHS = (nn.Identity, *readable(timm.layers.DropPath))


class Block(FusedBlock, vision_transformer.Block):
    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        masked = attn_mask is not None or is_causal
        asides = ("a mask is given",) if masked else self.asides_of(x)
        if self.is_aside(asides):
            return super().forward(x, attn_mask, is_causal)
        return self.fused(x, asides)

    # What runs in every call reads `_modules`: an attribute of a module costs several times as much.

    def attention_aside(self) -> str:
        own = self._modules
        attn, parts = own["attn"], own["attn"]._modules
        return why_own_attention(attn, _ATTENTION) or why_aside(
            ("norm1", own["norm1"], NORMS),
            ("attn.qkv", parts["qkv"], LINEAR),
            ("attn.q_norm", parts["q_norm"], NORMS_OR_NONE),
            ("attn.k_norm", parts["k_norm"], NORMS_OR_NONE),
            ("attn.attn_drop", parts["attn_drop"], DROPOUT),
            ("attn.norm", parts["norm"], NORMS_OR_NONE),
            ("attn.proj", parts["proj"], LINEAR),
            ("attn.proj_drop", parts["proj_drop"], DROPOUT),
            ("ls1", own["ls1"], _SCALE),
            ("drop_path1", own["drop_path1"], PATHS),
        )

    def attention_half(self) -> AttentionHalf:
        own = self._modules
        parts = own["attn"]._modules
        scale = getattr(own["ls1"], "gamma", None)  # wherever it is kept
        return _attention_half(own, scale=scale, q_norm=parts["q_norm"], k_norm=parts["k_norm"], out_norm=parts["norm"])

    def own_attention(self, x: Tensor) -> Tensor:
        return self.drop_path1(self.ls1(self.attn(self.norm1(x))))

    def mlp_aside(self) -> str:
        own = self._modules
        return why_own_mlp(own, ("ls2", own["ls2"], _SCALE), ("drop_path2", own["drop_path2"], PATHS))

    def mlp_half(self) -> MlpHalf:
        own = self._modules
        return plain_mlp_half(own, getattr(own["ls2"], "gamma", None))

    def own_mlp(self, x: Tensor) -> Tensor:
        return self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


def why_own_attention(attn: nn.Module, kinds: tuple[type, ...]) -> str:
    """Why an attention module is none of these kinds, or computes what no op does, or ""."""
    if type(attn) in kinds:
        if not attn.fused_attn:
            return "attn.fused_attn is False"
        if attn._modules.get("gate") is not None:
            return "attn has a gate"
    return why_aside(("attn", attn, kinds))


def _attention_half(own: dict[str, nn.Module], **others) -> AttentionHalf:
    attn, parts = own["attn"], own["attn"]._modules
    qkv = parts["qkv"]._parameters
    return AttentionHalf(
        own["norm1"],
        (qkv["weight"],),
        (qkv["bias"],),
        attn.num_heads,
        parts["proj"],
        path=own["drop_path1"],
        **others,
    )


def why_own_mlp(own: dict[str, nn.Module], *ends: tuple[str, nn.Module, tuple[type, ...]]) -> str:
    mlp, parts = own["mlp"], own["mlp"]._modules
    gated = type(mlp) in _GATED
    if gated and (mlp.gate_last or type(parts["norm"]) is not nn.Identity):
        return "mlp has its gate behind its value, or a norm"
    return why_aside(("mlp", mlp, (*_MLP, *_GATED))) or why_aside(
        ("norm2", own["norm2"], NORMS),
        ("mlp.fc1", parts["fc1"], LINEAR),
        ("mlp.act", parts["act"], GATE if gated else _ACTIVATIONS),
        ("mlp.drop1", parts["drop1"], DROPOUT),
        ("mlp.norm", parts["norm"], NORMS_OR_NONE),
        ("mlp.fc2", parts["fc2"], LINEAR),
        ("mlp.drop2", parts["drop2"], DROPOUT),
        *ends,
    )


def plain_mlp_half(own: dict[str, nn.Module], scale: Tensor | None) -> MlpHalf:
    mlp, parts = own["mlp"], own["mlp"]._modules
    fc1, act = parts["fc1"]._parameters, parts["act"]
    return MlpHalf(
        own["norm2"],
        (fc1["weight"],),
        (fc1["bias"],),
        "swiglu" if type(mlp) in _GATED else _ACTIVATION.get(type(act)) or activation_of(act),
        parts["fc2"],
        scale,
        own["drop_path2"],
        act,
        parts["norm"],
    )


class SwinTransformerBlock(WindowedBlock, swin_transformer.SwinTransformerBlock):
    helpers = ("_attn", "get_attn_mask")

    def never(self, inside: tuple[nn.Module, ...] = ()) -> str:
        if type(self.attn) not in _WINDOWED:
            return ""
        window = self.window_size
        return why_other_distances(self.attn.relative_position_index, window) or why_other_mask(
            self.attn_mask, self.input_resolution, window, self.shift_size
        )

    def forward(self, x: Tensor) -> Tensor:
        asides = self.asides_of(x)
        return super().forward(x) if self.is_aside(asides) else self.fused(x, asides)

    def attention_aside(self) -> str:
        own = self._modules
        attn, parts = own["attn"], own["attn"]._modules
        reason = (
            self.why_helper("_attn")
            or self.why_helper("get_attn_mask")
            or why_aside(("attn", attn, _WINDOWED))
            or why_method(attn, type(attn), "_get_rel_pos_bias", _WRITTEN)
            or why_aside(
                ("norm1", own["norm1"], NORMS),
                ("attn.qkv", parts["qkv"], LINEAR),
                ("attn", attn, _WINDOWED),  # once more, for the dtype of its table
                ("attn.softmax", parts["softmax"], _SOFTMAX),
                ("attn.attn_drop", parts["attn_drop"], DROPOUT),
                ("attn.proj", parts["proj"], LINEAR),
                ("attn.proj_drop", parts["proj_drop"], DROPOUT),
                ("drop_path1", own["drop_path1"], PATHS),
            )
        )
        if reason:
            return reason
        if attn.scale != (parts["proj"].in_features // attn.num_heads) ** -0.5:
            return "attn.scale is changed"
        if self._takes_any_map():
            return ""
        if (self.attn_mask is None) == any(self.shift_size):
            return "attn_mask is not that of its shift"
        padded = any(length % side for length, side in zip(self.input_resolution, self.window_size))
        return PADDED if padded else ""

    def map_aside(self, x: Tensor) -> str:
        if reason := super().map_aside(x):
            return reason
        masked = any(self.shift_size) and not self._takes_any_map()
        return "attn_mask is of another map" if masked and x.shape[1:3] != tuple(self.input_resolution) else ""

    def _takes_any_map(self) -> bool:
        return getattr(self, "dynamic_mask", False)

    def windows(self) -> Windows:
        return Windows(self._modules["attn"].relative_position_bias_table, self.window_size, self.shift_size)

    def heads(self) -> tuple[int, int]:
        attn = self._modules["attn"]
        return attn.num_heads, attn.proj.in_features // attn.num_heads

    def attention_half(self) -> AttentionHalf:
        return _attention_half(self._modules, windows=self.windows())

    def own_attention(self, x: Tensor) -> Tensor:
        return self.drop_path1(self._attn(self.norm1(x)))

    def mlp_aside(self) -> str:
        own = self._modules
        return why_own_mlp(own, ("drop_path2", own["drop_path2"], PATHS))

    def mlp_half(self) -> MlpHalf:
        return plain_mlp_half(self._modules, None)

    def own_mlp(self, x: Tensor) -> Tensor:
        tokens = x.flatten(1, 2)  # as the library has it: a hook sees what its modules read
        return self.drop_path2(self.mlp(self.norm2(tokens))).unflatten(1, x.shape[1:3])
