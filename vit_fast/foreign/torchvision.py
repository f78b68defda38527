"""torchvision: the encoder block of its vit_* models."""

from torch import Tensor, nn
from torchvision.models import vision_transformer

from vit_fast.foreign.block import AttentionHalf, FusedBlock, MlpHalf, named_activation
from vit_fast.foreign.torch_nn import packed_half, why_own_attention
from vit_fast.layers import DROPOUT, LINEAR, NORM, readable, why_aside

_MLP = readable(vision_transformer.MLPBlock)
_GELU = (nn.GELU,)


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
        if why_aside(("mlp", mlp, _MLP)) or len(mlp) != 5:
            return why_aside(("mlp", mlp, _MLP)) or "mlp is no fc1, GELU, fc2"
        fc1, act, drop1, fc2, drop2 = mlp
        return why_aside(
            ("ln_2", self.ln_2, NORM),
            ("mlp.0", fc1, LINEAR),
            ("mlp.1", act, _GELU),
            ("mlp.2", drop1, DROPOUT),
            ("mlp.3", fc2, LINEAR),
            ("mlp.4", drop2, DROPOUT),
        )

    def mlp_half(self) -> MlpHalf:
        fc1, act, _, fc2, _ = self.mlp
        return MlpHalf(self.ln_2, (fc1.weight,), (fc1.bias,), named_activation({}, act), fc2)

    def own_mlp(self, x: Tensor) -> Tensor:
        return self.mlp(self.ln_2(x))
