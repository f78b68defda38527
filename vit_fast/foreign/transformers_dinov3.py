"""transformers: the layer of DINOv3, to which the model hands the cosines and sines of its patches."""

import torch
from torch import Tensor, nn
from transformers.models.dinov3_vit import modeling_dinov3_vit

from vit_fast.foreign.block import AttentionHalf, MlpHalf, Rope, RopeBlock
from vit_fast.foreign.transformers import (
    ACTIVATION,
    ACTIVATIONS,
    GATES,
    half_of_attention,
    why_called,
    why_more,
    why_other,
    why_set,
)
from vit_fast.layers import LINEAR, NORM, package_of, readable, why_aside

_ATTENTION = readable(modeling_dinov3_vit.DINOv3ViTAttention)
_MLP = readable(modeling_dinov3_vit.DINOv3ViTMLP)
_GATED = readable(modeling_dinov3_vit.DINOv3ViTGatedMLP)
_SCALE = readable(modeling_dinov3_vit.DINOv3ViTLayerScale)
_PATHS = (getattr(modeling_dinov3_vit, name, None) for name in ("Dinov3ViTDropPath", "DINOv3ViTDropPath"))  # older
_PATH = (nn.Identity, *readable(*filter(None, _PATHS)))
_TURNS = modeling_dinov3_vit.apply_rotary_pos_emb
_TURNS = _TURNS if package_of(_TURNS) == "transformers" else None


class DINOv3ViTLayer(RopeBlock, modeling_dinov3_vit.DINOv3ViTLayer):
    positions = "position_embeddings"

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs,
    ) -> Tensor:
        more = why_more({"attention_mask": attention_mask, **kwargs})
        if position_embeddings is None:  # which the library's own code refuses
            more = "no positions are given"
        asides = (more,) if more else self.asides_of(hidden_states, position_embeddings=position_embeddings)
        if self.is_aside(asides):
            return super().forward(hidden_states, attention_mask, position_embeddings, **kwargs)
        return self.fused(hidden_states, asides, position_embeddings=position_embeddings, **kwargs)

    def rope_of(self, position_embeddings: tuple[Tensor, Tensor] | None = None, **kwargs) -> Rope | None:
        return None if position_embeddings is None else Rope(*position_embeddings, False)

    def heads(self) -> tuple[int, int]:
        return self.attention.num_heads, self.attention.head_dim

    def turned(self, x: Tensor) -> int | None:
        return None

    def example(self, x: Tensor) -> dict:
        width = self.attention.config.hidden_size // self.attention.config.num_attention_heads
        angles = torch.linspace(0, 6, (x.shape[1] - 1) * width).unflatten(0, (-1, width)).to(x)
        return {"position_embeddings": (angles.cos(), angles.sin())}

    def attention_aside(self) -> str:
        attention = self.attention
        if reason := why_called("attention", attention, _ATTENTION) or why_other(attention):
            return reason
        if modeling_dinov3_vit.apply_rotary_pos_emb is not _TURNS:
            return "somebody has given transformers another apply_rotary_pos_emb"
        if reason := why_set("attention", attention, "dropout"):
            return reason
        linears = ("q_proj", "k_proj", "v_proj", "o_proj")
        return why_aside(
            ("norm1", self.norm1, NORM),
            *((f"attention.{name}", attention._modules[name], LINEAR) for name in linears),
            ("layer_scale1", self.layer_scale1, _SCALE),
            ("drop_path", self.drop_path, _PATH),
        )

    def attention_half(self) -> AttentionHalf:
        proj, scale = self.attention.o_proj, self.layer_scale1.lambda1
        return half_of_attention(self.norm1, self.attention, proj, scale=scale, path=self.drop_path)

    def own_attention(self, x: Tensor, **kwargs) -> Tensor:
        x, _ = self.attention(self.norm1(x), attention_mask=None, **kwargs)
        return self.drop_path(self.layer_scale1(x))

    def mlp_aside(self) -> str:
        mlp = self.mlp
        gated = type(mlp) in _GATED
        names = ("gate_proj", "up_proj", "down_proj") if gated else ("up_proj", "down_proj")
        return why_aside(("mlp", mlp, (*_MLP, *_GATED))) or why_aside(
            ("norm2", self.norm2, NORM),
            *((f"mlp.{name}", mlp._modules[name], LINEAR) for name in names),
            ("mlp.act_fn", mlp.act_fn, GATES if gated else ACTIVATIONS),
            ("layer_scale2", self.layer_scale2, _SCALE),
            ("drop_path", self.drop_path, _PATH),
        )

    def mlp_half(self) -> MlpHalf:
        mlp = self.mlp
        end = mlp.down_proj, self.layer_scale2.lambda1, self.drop_path
        if type(mlp) in _GATED:
            gate, value = mlp.gate_proj, mlp.up_proj
            return MlpHalf(self.norm2, (gate.weight, value.weight), (gate.bias, value.bias), "swiglu", *end)
        return MlpHalf(self.norm2, (mlp.up_proj.weight,), (mlp.up_proj.bias,), ACTIVATION[type(mlp.act_fn)], *end)

    def own_mlp(self, x: Tensor) -> Tensor:
        return self.drop_path(self.layer_scale2(self.mlp(self.norm2(x))))
