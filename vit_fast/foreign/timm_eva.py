"""timm: the pre-norm block of eva.py, that of EVA, DINOv3, the Perception Encoder and RoPE-ViT."""

import timm.layers
import torch
from timm.models import eva
from torch import Tensor, nn

from vit_fast.foreign.block import AttentionHalf, MlpHalf, Rope, RopeBlock
from vit_fast.foreign.timm import NORMS, NORMS_OR_NONE, PATHS, plain_mlp_half, why_own_attention, why_own_mlp
from vit_fast.layers import DROPOUT, GATE, LINEAR, NONE, package_of, readable, why_aside
from vit_fast.ops.backend import PLAIN, autocasting

_ATTENTION = readable(eva.EvaAttention, timm.layers.AttentionRope)
_TURN = timm.layers.apply_rot_embed_cat
_TURN = _TURN if package_of(_TURN) == "timm" else None
_GATED = readable(timm.layers.SwiGLU)


class EvaBlock(RopeBlock, eva.EvaBlock):
    """LayerScale is a parameter of the block, where there is one; without `rope` it is a block as any other."""

    positions = "rope"
    may_not_turn = True

    def forward(
        self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        asides = ("a mask is given",) if attn_mask is not None or is_causal else self.asides_of(x, rope=rope)
        if self.is_aside(asides):
            causal = {"is_causal": True} if is_causal else {}  # which older versions of timm do not know
            return super().forward(x, rope, attn_mask, **causal)
        return self.fused(x, asides, rope=rope)

    def rope_of(self, rope: Tensor | None = None) -> Rope | None:
        if rope is None:
            return None
        sin, cos = rope.chunk(2, -1)
        return Rope(cos, sin, not getattr(self.attn, "rotate_half", False))

    def heads(self) -> tuple[int, int]:
        return self.attn.num_heads, self.attn.head_dim

    def turned(self, x: Tensor) -> int:
        return x.shape[1] - self.attn.num_prefix_tokens

    def example(self, x: Tensor) -> dict:
        attn = self.attn
        if type(attn) not in _ATTENTION:
            return {}
        angles = torch.linspace(0, 6, self.turned(x) * attn.head_dim).unflatten(0, (-1, attn.head_dim))
        return {"rope": torch.cat((angles.sin(), angles.cos()), -1).to(x)}

    def attention_aside(self) -> str:
        own = self._modules
        attn, parts = own["attn"], own["attn"]._modules
        if reason := why_own_attention(attn, _ATTENTION):
            return reason
        if getattr(attn, "num_kv_groups", 1) != 1:
            return "attn has fewer heads of keys than of queries"
        if getattr(attn, "qkv_bias_separate", False) and getattr(attn.qkv, "bias", None) is not None:
            return "attn.qkv has a bias beside those of attn"
        if not eva.apply_rot_embed_cat is timm.layers.attention.apply_rot_embed_cat is _TURN:
            return "somebody has given timm another apply_rot_embed_cat"
        names = ("qkv",) if "qkv" in parts else ("q_proj", "k_proj", "v_proj")
        reason = why_aside(
            ("norm1", own["norm1"], NORMS),
            *((f"attn.{name}", parts[name], LINEAR) for name in names),
            ("attn", attn, _ATTENTION),  # once more, for the dtype of its biases
            ("attn.q_norm", parts["q_norm"], NONE),  # what is turned is normalised first, by no op
            ("attn.k_norm", parts["k_norm"], NONE),
            ("attn.attn_drop", parts["attn_drop"], DROPOUT),
            ("attn.norm", parts["norm"], NORMS_OR_NONE),
            ("attn.proj", parts["proj"], LINEAR),
            ("attn.proj_drop", parts["proj_drop"], DROPOUT),
            ("drop_path1", own["drop_path1"], PATHS),
        )
        return reason or self._why_scale("gamma_1", own["norm1"])

    def _why_scale(self, name: str, norm: nn.Module) -> str:
        """Why no op multiplies by a parameter of the block's own, as `why_aside` has it, or ""."""
        scale = getattr(self, name)
        if scale is None:
            return ""
        if type(scale) not in PLAIN:
            return f"{name} is a {type(scale).__name__}"
        other = scale.dtype != norm.weight.dtype and not autocasting(scale)
        return f"{name} is {scale.dtype}, what stands before it {norm.weight.dtype}" if other else ""

    def attention_half(self) -> AttentionHalf:
        own = self._modules
        attn, parts = own["attn"], own["attn"]._modules
        linears = [parts[name] for name in ("qkv", "q_proj", "k_proj", "v_proj") if name in parts]
        biases = tuple(linear.bias for linear in linears)
        if getattr(attn, "q_bias", None) is not None:
            biases = (torch.cat((attn.q_bias, attn.k_bias, attn.v_bias)),)
        return AttentionHalf(
            own["norm1"],
            tuple(linear.weight for linear in linears),
            biases,
            attn.num_heads,
            parts["proj"],
            self.gamma_1,
            own["drop_path1"],
            out_norm=parts["norm"],
        )

    def own_attention(self, x: Tensor, rope: Tensor | None = None) -> Tensor:
        x = self.attn(self.norm1(x), rope=rope, attn_mask=None)
        return self.drop_path1(x if self.gamma_1 is None else self.gamma_1 * x)

    def mlp_aside(self) -> str:
        own = self._modules
        mlp, parts, end = own["mlp"], own["mlp"]._modules, ("drop_path2", own["drop_path2"], PATHS)
        if type(mlp) not in _GATED:
            reason = why_own_mlp(own, end)
        elif type(parts["norm"]) is not nn.Identity:
            reason = "mlp has a norm behind its gate"
        else:
            reason = why_aside(
                ("mlp", mlp, _GATED),
                ("norm2", own["norm2"], NORMS),
                ("mlp.fc1_g", parts["fc1_g"], LINEAR),
                ("mlp.fc1_x", parts["fc1_x"], LINEAR),
                ("mlp.act", parts["act"], GATE),
                ("mlp.drop1", parts["drop1"], DROPOUT),
                ("mlp.fc2", parts["fc2"], LINEAR),
                ("mlp.drop2", parts["drop2"], DROPOUT),
                end,
            )
        return reason or self._why_scale("gamma_2", own["norm2"])

    def mlp_half(self) -> MlpHalf:
        own = self._modules
        if type(own["mlp"]) not in _GATED:
            return plain_mlp_half(own, self.gamma_2)
        parts = own["mlp"]._modules
        gate, value = parts["fc1_g"], parts["fc1_x"]
        weights, biases = (gate.weight, value.weight), (gate.bias, value.bias)
        return MlpHalf(own["norm2"], weights, biases, "swiglu", parts["fc2"], self.gamma_2, own["drop_path2"])

    def own_mlp(self, x: Tensor) -> Tensor:
        x = self.mlp(self.norm2(x))
        return self.drop_path2(x if self.gamma_2 is None else self.gamma_2 * x)
