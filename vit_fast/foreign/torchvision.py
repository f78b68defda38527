"""torchvision: the encoder block of its vit_* models, and the block of swin_t, swin_s and swin_b."""

from torch import Tensor, nn
from torchvision.models import swin_transformer, vision_transformer
from torchvision.ops import MLP, StochasticDepth

from vit_fast.foreign.block import (
    AttentionHalf,
    FusedBlock,
    MlpHalf,
    WindowedBlock,
    Windows,
    as_written,
    why_method,
    why_other_distances,
)
from vit_fast.foreign.torch_nn import packed_half, why_own_attention
from vit_fast.layers import DROPOUT, GELU, LINEAR, NORM, activation_of, package_of, readable, why_aside
from vit_fast.ops.backend import say_aside

_MLP = readable(vision_transformer.MLPBlock)
_WINDOWED = readable(swin_transformer.ShiftedWindowAttention)
_WRITTEN = as_written(swin_transformer.ShiftedWindowAttention, "get_relative_position_bias")
_COMPUTES = swin_transformer.shifted_window_attention
_COMPUTES = _COMPUTES if package_of(_COMPUTES) == "torchvision" else None
_SWIN_MLP = readable(MLP)
_PATH = (nn.Identity, *readable(StochasticDepth))


class EncoderBlock(FusedBlock, vision_transformer.EncoderBlock):
    def forward(self, input: Tensor) -> Tensor:
        asides = self.asides_of(input)
        return super().forward(input) if self.is_aside(asides) else self.fused(input, asides)

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
        return _why_own_mlp(self.mlp, _MLP, ("ln_2", self.ln_2, NORM))

    def mlp_half(self) -> MlpHalf:
        return _mlp_half(self.ln_2, self.mlp)

    def own_mlp(self, x: Tensor) -> Tensor:
        return self.mlp(self.ln_2(x))


def _why_own_mlp(mlp: nn.Sequential, kinds: tuple[type, ...], *others) -> str:
    if reason := why_aside(("mlp", mlp, kinds)):
        return reason
    if len(mlp) != 5:
        return "mlp is no fc1, GELU, fc2"
    fc1, act, drop1, fc2, drop2 = mlp
    return why_aside(
        *others,
        ("mlp.0", fc1, LINEAR),
        ("mlp.1", act, GELU),
        ("mlp.2", drop1, DROPOUT),
        ("mlp.3", fc2, LINEAR),
        ("mlp.4", drop2, DROPOUT),
    )


def _mlp_half(norm: nn.LayerNorm, mlp: nn.Sequential, path: nn.Module | None = None) -> MlpHalf:
    fc1, act, _, fc2, _ = mlp
    return MlpHalf(norm, (fc1.weight,), (fc1.bias,), activation_of(act), fc2, path=path)


class SwinTransformerBlock(WindowedBlock, swin_transformer.SwinTransformerBlock):
    def never(self, inside: tuple[nn.Module, ...] = ()) -> str:
        if type(self.attn) not in _WINDOWED:
            return ""
        return why_other_distances(self.attn.relative_position_index, tuple(self.attn.window_size))

    def _load_from_state_dict(self, state_dict, prefix, *others) -> None:
        """Of these buffers a checkpoint brings one, and what it brings no call looks at."""
        super()._load_from_state_dict(state_dict, prefix, *others)
        index = state_dict.get(f"{prefix}attn.relative_position_index")
        if index is None or type(self.attn) not in _WINDOWED:
            return
        if reason := why_other_distances(index, tuple(self.attn.window_size)):
            if type(self) is not SwinTransformerBlock:  # `fully_shard` has made it one of its own
                others[-1].append(f"{prefix}attn: {reason}, as the op has it; restore the model first")
                return
            say_aside(f"a {type(self).__name__} that a checkpoint was loaded into", reason)
            self.__class__ = self.original()

    def forward(self, x: Tensor) -> Tensor:
        asides = self.asides_of(x)
        return super().forward(x) if self.is_aside(asides) else self.fused(x, asides)

    def attention_aside(self) -> str:
        attn = self.attn
        ours = ("attn", attn, _WINDOWED)
        if reason := why_aside(ours) or why_method(attn, type(attn), "get_relative_position_bias", _WRITTEN):
            return reason
        if swin_transformer.shifted_window_attention is not _COMPUTES:
            return "somebody has given torchvision another shifted_window_attention"
        if attn.training and (attn.attention_dropout or attn.dropout):
            return "attn.attention_dropout or attn.dropout is active"
        return self._why_path() or why_aside(
            ("norm1", self.norm1, NORM),
            ("attn.qkv", attn.qkv, LINEAR),
            ours,  # once more, for the dtype of its table
            ("attn.proj", attn.proj, LINEAR),
            ("stochastic_depth", self.stochastic_depth, _PATH),
        )

    def _why_path(self) -> str:
        path = self.stochastic_depth
        batch = type(path) is StochasticDepth and path.mode != "row" and path.p and path.training
        return "stochastic_depth drops a whole batch" if batch else ""

    def _path(self) -> nn.Module | None:
        """Where it drops anything: it returns what it reads elsewhere, and has no `drop_prob` to say so."""
        path = self.stochastic_depth
        return path if type(path) is StochasticDepth and path.p else None

    def windows(self) -> Windows:
        attn = self.attn
        size, shift = tuple(attn.window_size), tuple(attn.shift_size)
        return Windows(attn.relative_position_bias_table, size, shift, rests=True)

    def heads(self) -> tuple[int, int]:
        attn = self.attn
        return attn.num_heads, attn.proj.in_features // attn.num_heads

    def attention_half(self) -> AttentionHalf:
        attn = self.attn
        return AttentionHalf(
            self.norm1,
            (attn.qkv.weight,),
            (attn.qkv.bias,),
            attn.num_heads,
            attn.proj,
            path=self._path(),
            windows=self.windows(),
        )

    def own_attention(self, x: Tensor) -> Tensor:
        return self.stochastic_depth(self.attn(self.norm1(x)))

    def mlp_aside(self) -> str:
        path = ("stochastic_depth", self.stochastic_depth, _PATH)
        return self._why_path() or _why_own_mlp(self.mlp, _SWIN_MLP, ("norm2", self.norm2, NORM), path)

    def mlp_half(self) -> MlpHalf:
        return _mlp_half(self.norm2, self.mlp, self._path())

    def own_mlp(self, x: Tensor) -> Tensor:
        return self.stochastic_depth(self.mlp(self.norm2(x)))
