"""timm: the pre-norm block of vision_transformer.py, which deit.py and the hybrids use too."""

import timm.layers
from timm.models import vision_transformer
from torch import Tensor, nn

from vit_fast.foreign.block import AttentionHalf, FusedBlock, MlpHalf
from vit_fast.layers import DROPOUT, GATE, LINEAR, NORM, activation_of, readable, why_aside

_NORM = (*NORM, *readable(timm.layers.LayerNorm))
_NORM_OR_NONE = (*_NORM, nn.Identity)
_ACTIVATION = {timm.layers.GELU: "gelu", timm.layers.GELUTanh: "gelu_tanh", timm.layers.QuickGELU: "quick_gelu"}
_ACTIVATIONS = (nn.GELU, *readable(*_ACTIVATION))
_ATTENTION = readable(timm.layers.Attention)
_MLP = readable(timm.layers.Mlp)
_GATED = readable(timm.layers.GluMlp)
_SCALE = (nn.Identity, *readable(timm.layers.LayerScale))
_PATH = (nn.Identity, *readable(timm.layers.DropPath))


class Block(FusedBlock, vision_transformer.Block):
    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        masked = attn_mask is not None or is_causal
        asides = ("a mask is given",) if masked else self.asides_of(x)
        if all(asides):
            return super().forward(x, attn_mask, is_causal)
        return self.fused(x, asides)

    # What runs in every call reads `_modules`: an attribute of a module costs several times as much.

    def attention_aside(self) -> str:
        own = self._modules
        attn, parts = own["attn"], own["attn"]._modules
        if type(attn) in _ATTENTION:
            if not attn.fused_attn:
                return "attn.fused_attn is False"
            if parts.get("gate") is not None:
                return "attn has a gate"
        return why_aside(("attn", attn, _ATTENTION)) or why_aside(
            ("norm1", own["norm1"], _NORM),
            ("attn.qkv", parts["qkv"], LINEAR),
            ("attn.q_norm", parts["q_norm"], _NORM_OR_NONE),
            ("attn.k_norm", parts["k_norm"], _NORM_OR_NONE),
            ("attn.attn_drop", parts["attn_drop"], DROPOUT),
            ("attn.norm", parts["norm"], _NORM_OR_NONE),
            ("attn.proj", parts["proj"], LINEAR),
            ("attn.proj_drop", parts["proj_drop"], DROPOUT),
            ("ls1", own["ls1"], _SCALE),
            ("drop_path1", own["drop_path1"], _PATH),
        )

    def attention_half(self) -> AttentionHalf:
        own = self._modules
        attn, parts = own["attn"], own["attn"]._modules
        qkv = parts["qkv"]._parameters
        return AttentionHalf(
            own["norm1"],
            (qkv["weight"],),
            (qkv["bias"],),
            attn.num_heads,
            parts["proj"],
            getattr(own["ls1"], "gamma", None),  # wherever it is kept
            own["drop_path1"],
            parts["q_norm"],
            parts["k_norm"],
            parts["norm"],
        )

    def own_attention(self, x: Tensor) -> Tensor:
        return self.drop_path1(self.ls1(self.attn(self.norm1(x))))

    def mlp_aside(self) -> str:
        own = self._modules
        mlp, parts = own["mlp"], own["mlp"]._modules
        gated = type(mlp) in _GATED
        if gated and (mlp.gate_last or type(parts["norm"]) is not nn.Identity):
            return "mlp has its gate behind its value, or a norm"
        return why_aside(("mlp", mlp, (*_MLP, *_GATED))) or why_aside(
            ("norm2", own["norm2"], _NORM),
            ("mlp.fc1", parts["fc1"], LINEAR),
            ("mlp.act", parts["act"], GATE if gated else _ACTIVATIONS),
            ("mlp.drop1", parts["drop1"], DROPOUT),
            ("mlp.norm", parts["norm"], _NORM_OR_NONE),
            ("mlp.fc2", parts["fc2"], LINEAR),
            ("mlp.drop2", parts["drop2"], DROPOUT),
            ("ls2", own["ls2"], _SCALE),
            ("drop_path2", own["drop_path2"], _PATH),
        )

    def mlp_half(self) -> MlpHalf:
        own = self._modules
        mlp, parts = own["mlp"], own["mlp"]._modules
        fc1, act = parts["fc1"]._parameters, parts["act"]
        return MlpHalf(
            own["norm2"],
            (fc1["weight"],),
            (fc1["bias"],),
            "swiglu" if type(mlp) in _GATED else _ACTIVATION.get(type(act)) or activation_of(act),
            parts["fc2"],
            getattr(own["ls2"], "gamma", None),
            own["drop_path2"],
            act,
            parts["norm"],
        )

    def own_mlp(self, x: Tensor) -> Tensor:
        return self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
