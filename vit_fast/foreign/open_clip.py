"""open_clip: the residual attention block of its own vision towers (those of timm have timm's block)."""

from open_clip import model, transformer
from torch import Tensor, nn

from vit_fast.foreign.block import AttentionHalf, FusedBlock, MlpHalf
from vit_fast.foreign.torch_nn import packed_half, why_own_attention
from vit_fast.layers import LINEAR, NORM, activation_of, readable, why_aside

_NORM = (*NORM, *readable(transformer.LayerNorm))
_MLP = readable(nn.Sequential)
_ACTIVATION = {transformer.QuickGELU: "quick_gelu"}
_ACTIVATIONS = (nn.GELU, *readable(*_ACTIVATION))
_SCALE = (nn.Identity, *readable(transformer.LayerScale))


_TEXT = (transformer.TextTransformer, transformer.MultimodalTransformer)


class ResidualAttentionBlock(FusedBlock, transformer.ResidualAttentionBlock):
    helpers = ("attention",)

    def never(self, inside: tuple[nn.Module, ...] = ()) -> str:
        if hasattr(self, "ln_1_kv"):
            return "it attends across"
        # Of the model with one class for both towers, `transformer` is that of the text.
        text = [parent.transformer for parent in inside if isinstance(parent, model.CLIP)]
        reads = any(isinstance(parent, _TEXT) or parent in text for parent in inside)
        return "it reads text: a mask is given in every call" if reads else ""

    def forward(
        self,
        q_x: Tensor,
        k_x: Tensor | None = None,
        v_x: Tensor | None = None,
        attn_mask: Tensor | None = None,
    ) -> Tensor:
        plain = k_x is None and v_x is None and attn_mask is None
        asides = self.asides_of(q_x) if plain else ("a mask or other keys are given",)
        if self.is_aside(asides):
            return super().forward(q_x, k_x, v_x, attn_mask)
        return self.fused(q_x, asides)

    def attention_aside(self) -> str:
        return (
            self.why_helper("attention")
            or why_own_attention("attn", self.attn)
            or why_aside(("ln_1", self.ln_1, _NORM), ("ls_1", self.ls_1, _SCALE))
        )

    def attention_half(self) -> AttentionHalf:
        return packed_half(self.ln_1, self.attn, getattr(self.ls_1, "gamma", None))

    def own_attention(self, x: Tensor) -> Tensor:
        return self.ls_1(self.attention(q_x=self.ln_1(x), k_x=None, v_x=None, attn_mask=None))

    def mlp_aside(self) -> str:
        mlp = self.mlp
        return why_aside(("mlp", mlp, _MLP)) or why_aside(
            ("ln_2", self.ln_2, _NORM),
            ("mlp.c_fc", mlp.c_fc, LINEAR),
            ("mlp.gelu", mlp.gelu, _ACTIVATIONS),
            ("mlp.c_proj", mlp.c_proj, LINEAR),
            ("ls_2", self.ls_2, _SCALE),
        )

    def mlp_half(self) -> MlpHalf:
        fc1, act, fc2 = self.mlp
        activation = _ACTIVATION.get(type(act)) or activation_of(act)
        return MlpHalf(self.ln_2, (fc1.weight,), (fc1.bias,), activation, fc2, getattr(self.ls_2, "gamma", None))

    def own_mlp(self, x: Tensor) -> Tensor:
        return self.ls_2(self.mlp(self.ln_2(x)))
