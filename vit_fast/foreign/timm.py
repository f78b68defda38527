"""timm: the pre-norm block of vision_transformer.py, which deit.py and the hybrids use too."""

import timm.layers
from timm.models import vision_transformer
from torch import Tensor, nn

from vit_fast.foreign.block import AttentionHalf, FusedBlock, MlpHalf, named_activation
from vit_fast.layers import DROPOUT, LINEAR, NORM, readable, why_aside

_NORM = (*NORM, *readable(timm.layers.LayerNorm))
_NORM_OR_NONE = (*_NORM, nn.Identity)
_ACTIVATION = {timm.layers.GELU: "gelu", timm.layers.GELUTanh: "gelu_tanh", timm.layers.QuickGELU: "quick_gelu"}
_ACTIVATIONS = (nn.GELU, *readable(*_ACTIVATION))
_ATTENTION = readable(timm.layers.Attention)
_MLP = readable(timm.layers.Mlp)
_GATED = readable(timm.layers.GluMlp)
_GATE = readable(nn.SiLU)
_SCALE = (nn.Identity, *readable(timm.layers.LayerScale))
_PATH = (nn.Identity, *readable(timm.layers.DropPath))


class Block(FusedBlock, vision_transformer.Block):
    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        masked = attn_mask is not None or is_causal
        asides = ("a mask is given",) if masked else self.asides()
        if all(asides):
            return super().forward(x, attn_mask, is_causal)
        return self.fused(x, asides)

    def attention_aside(self) -> str:
        attn = self.attn
        if type(attn) in _ATTENTION:
            if not attn.fused_attn:
                return "attn.fused_attn is False"
            if attn.gate is not None:
                return "attn has a gate"
        return why_aside(("attn", attn, _ATTENTION)) or why_aside(
            ("norm1", self.norm1, _NORM),
            ("attn.qkv", attn.qkv, LINEAR),
            ("attn.q_norm", attn.q_norm, _NORM_OR_NONE),
            ("attn.k_norm", attn.k_norm, _NORM_OR_NONE),
            ("attn.attn_drop", attn.attn_drop, DROPOUT),
            ("attn.norm", attn.norm, _NORM_OR_NONE),
            ("attn.proj", attn.proj, LINEAR),
            ("attn.proj_drop", attn.proj_drop, DROPOUT),
            ("ls1", self.ls1, _SCALE),
            ("drop_path1", self.drop_path1, _PATH),
        )

    def attention_half(self) -> AttentionHalf:
        attn = self.attn
        return AttentionHalf(
            self.norm1,
            (attn.qkv.weight,),
            (attn.qkv.bias,),
            attn.num_heads,
            attn.proj,
            getattr(self.ls1, "gamma", None),
            self.drop_path1,
            attn.q_norm,
            attn.k_norm,
            attn.norm,
        )

    def own_attention(self, x: Tensor) -> Tensor:
        return self.drop_path1(self.ls1(self.attn(self.norm1(x))))

    def mlp_aside(self) -> str:
        mlp = self.mlp
        gated = type(mlp) in _GATED
        if gated and (mlp.gate_last or type(mlp.norm) is not nn.Identity):
            return "mlp has its gate behind its value, or a norm"
        return why_aside(("mlp", mlp, (*_MLP, *_GATED))) or why_aside(
            ("norm2", self.norm2, _NORM),
            ("mlp.fc1", mlp.fc1, LINEAR),
            ("mlp.act", mlp.act, _GATE if gated else _ACTIVATIONS),
            ("mlp.drop1", mlp.drop1, DROPOUT),
            ("mlp.norm", mlp.norm, _NORM_OR_NONE),
            ("mlp.fc2", mlp.fc2, LINEAR),
            ("mlp.drop2", mlp.drop2, DROPOUT),
            ("ls2", self.ls2, _SCALE),
            ("drop_path2", self.drop_path2, _PATH),
        )

    def mlp_half(self) -> MlpHalf:
        mlp = self.mlp
        return MlpHalf(
            self.norm2,
            (mlp.fc1.weight,),
            (mlp.fc1.bias,),
            "swiglu" if type(mlp) in _GATED else named_activation(_ACTIVATION, mlp.act),
            mlp.fc2,
            getattr(self.ls2, "gamma", None),
            self.drop_path2,
            mlp.act,
            mlp.norm,
        )

    def own_mlp(self, x: Tensor) -> Tensor:
        return self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
