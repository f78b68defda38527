"""torchvision: the encoder block of its vit_* models."""

from torch import Tensor
from torchvision.models import vision_transformer

from vit_fast.foreign.block import AttentionHalf, FusedBlock, MlpHalf
from vit_fast.foreign.torch_nn import packed_half, why_own_attention
from vit_fast.layers import DROPOUT, GELU, LINEAR, NORM, activation_of, readable, why_aside

_MLP = readable(vision_transformer.MLPBlock)


class EncoderBlock(FusedBlock, vision_transformer.EncoderBlock):
    def forward(self, input: Tensor) -> Tensor:
        asides = self.asides_of(input)
        return super().forward(input) if all(asides) else self.fused(input, asides)

    def attention_aside(self) -> str:
        return why_own_attention("self_attention", self.self_attention) or why_aside(
            ("ln_1", self.ln_1, NORM), ("dropout", self.dropout, DROPOUT)
        )

    def attention_half(self) -> AttentionHalf:
        return packed_half(self.ln_1, self.self_attention)

    def own_attention(self, x: Tensor) -> Tensor:
        x = self.ln_1(x)
        return self.dropout(self.self_attention(x, x, x, need_weights=False)[0])

    def mlp_aside(self) -> str:
        mlp = self.mlp
        if reason := why_aside(("mlp", mlp, _MLP)):
            return reason
        if len(mlp) != 5:
            return "mlp is no fc1, GELU, fc2"
        fc1, act, drop1, fc2, drop2 = mlp
        return why_aside(
            ("ln_2", self.ln_2, NORM),
            ("mlp.0", fc1, LINEAR),
            ("mlp.1", act, GELU),
            ("mlp.2", drop1, DROPOUT),
            ("mlp.3", fc2, LINEAR),
            ("mlp.4", drop2, DROPOUT),
        )

    def mlp_half(self) -> MlpHalf:
        fc1, act, _, fc2, _ = self.mlp
        return MlpHalf(self.ln_2, (fc1.weight,), (fc1.bias,), activation_of(act), fc2)

    def own_mlp(self, x: Tensor) -> Tensor:
        return self.mlp(self.ln_2(x))
