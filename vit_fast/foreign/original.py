"""The original code of DINO and DINOv2: a block known by its shape, since its file is wherever its user has put it.

    facebookresearch/dino         norm1, attn, drop_path, norm2, mlp
    facebookresearch/dinov2       norm1, attn, ls1, drop_path1, norm2, mlp, ls2, drop_path2

A subclass is made for each such class that is met. A pickle names the class that it was made of.
"""

import functools

from torch import Tensor, nn

from vit_fast.foreign.block import AttentionHalf, FusedBlock, MlpHalf
from vit_fast.layers import DROPOUT, GELU, LINEAR, NORM, activation_of, readable, why_aside

_DINO = ("norm1", "attn", "drop_path", "norm2", "mlp")
_DINOV2 = ("norm1", "attn", "ls1", "drop_path1", "norm2", "mlp", "ls2", "drop_path2")
_ATTENTION = {"qkv", "attn_drop", "proj", "proj_drop"}
_MLP = {"fc1", "act", "fc2", "drop"}
_SWIGLU = {"w12", "w3"}


@functools.cache
def fused_class(kind: type) -> type | None:
    """The accelerated subclass of a class with the name of DINO's or DINOv2's block, or None."""
    return type(kind.__name__, (Block, kind), {}) if kind.__name__ in ("Block", "NestedTensorBlock") else None


def _again(kind: type) -> nn.Module:
    """An accelerated block of a library's class without anything in it, as unpickling begins."""
    made = fused_class(kind)
    return made.__new__(made)


class Block(FusedBlock):
    def __reduce_ex__(self, protocol):
        return _again, (self.original(),), self.__dict__.copy()

    def never(self, inside: tuple[nn.Module, ...] = ()) -> str:
        parts, attn = self._modules, self._modules.get("attn")
        if tuple(parts) not in (_DINO, _DINOV2):
            return "its parts are not those of DINO's or DINOv2's block"
        if set(attn._modules) != _ATTENTION or not hasattr(attn, "num_heads"):
            return "its attention is not that of DINO or DINOv2"
        if any(part._parameters or part._buffers for part in (self, attn, parts["mlp"])):
            return "it holds tensors that the block of DINO and DINOv2 does not"
        if getattr(attn, "scale", None) != (attn.qkv.in_features // attn.num_heads) ** -0.5:
            return "its attention has another scale"
        return ""

    def forward(self, x, *args, **kwargs):
        depth = self.training and getattr(self, "sample_drop_ratio", 0)
        plain = isinstance(x, Tensor) and not args and not kwargs and not depth
        asides = self.asides() if plain else ("a list, stochastic depth or an attention map is asked for",)
        if self.is_aside(asides):
            return super().forward(x, *args, **kwargs)
        return self.fused(x, asides)

    def _end(self, number: int) -> tuple[tuple[str, nn.Module, tuple[type, ...]], ...]:
        """Name, module and kinds of what stands between a half's product and the residual."""
        names = (f"ls{number}", f"drop_path{number}") if f"ls{number}" in self._modules else ("drop_path",)
        modules = [(name, self._modules[name]) for name in names]
        return tuple(
            (name, module, _kinds(type(module), "LayerScale", "DropPath", "Identity")) for name, module in modules
        )

    def _scale_and_path(self, number: int) -> tuple[Tensor | None, nn.Module]:
        *scale, path = (module for _, module, _ in self._end(number))
        return getattr(scale[0], "gamma", None) if scale else None, path

    def attention_aside(self) -> str:
        attn = self.attn
        return why_aside(("attn", attn, _kinds(type(attn), "Attention", "MemEffAttention"))) or why_aside(
            ("norm1", self.norm1, NORM),
            ("attn.qkv", attn.qkv, LINEAR),
            ("attn.attn_drop", attn.attn_drop, DROPOUT),
            ("attn.proj", attn.proj, LINEAR),
            ("attn.proj_drop", attn.proj_drop, DROPOUT),
            *self._end(1),
        )

    def attention_half(self) -> AttentionHalf:
        attn = self.attn
        ends = self._scale_and_path(1)
        return AttentionHalf(self.norm1, (attn.qkv.weight,), (attn.qkv.bias,), attn.num_heads, attn.proj, *ends)

    def own_attention(self, x: Tensor) -> Tensor:
        x = self.attn(self.norm1(x))
        return self._own_end(1, x[0] if isinstance(x, tuple) else x)

    def _own_end(self, number: int, x: Tensor) -> Tensor:
        for _, module, _ in self._end(number):
            x = module(x)
        return x

    def mlp_aside(self) -> str:
        mlp = self.mlp
        norm = ("norm2", self.norm2, NORM)
        if set(mlp._modules) == _SWIGLU:
            return why_aside(("mlp", mlp, _kinds(type(mlp), "SwiGLUFFN", "SwiGLUFFNFused"))) or why_aside(
                norm, ("mlp.w12", mlp.w12, LINEAR), ("mlp.w3", mlp.w3, LINEAR), *self._end(2)
            )
        if set(mlp._modules) != _MLP:
            return f"mlp is a {type(mlp).__name__} of other parts"
        return why_aside(("mlp", mlp, _kinds(type(mlp), "Mlp"))) or why_aside(
            norm,
            ("mlp.fc1", mlp.fc1, LINEAR),
            ("mlp.act", mlp.act, GELU),
            ("mlp.fc2", mlp.fc2, LINEAR),
            ("mlp.drop", mlp.drop, DROPOUT),
            *self._end(2),
        )

    def mlp_half(self) -> MlpHalf:
        mlp = self.mlp
        if set(mlp._modules) == _SWIGLU:
            fc1, activation, fc2 = mlp.w12, "swiglu", mlp.w3
        else:
            fc1, activation, fc2 = mlp.fc1, activation_of(mlp.act), mlp.fc2
        return MlpHalf(self.norm2, (fc1.weight,), (fc1.bias,), activation, fc2, *self._scale_and_path(2))

    def own_mlp(self, x: Tensor) -> Tensor:
        return self._own_end(2, self.mlp(self.norm2(x)))


@functools.cache
def _kinds(kind: type, *names: str) -> tuple[type, ...]:
    """(kind,) where it has one of the names that DINO and DINOv2 use, and a class that nothing is elsewhere."""
    return readable(kind) if kind.__name__ in names else ()
