"""What the accelerated blocks of every library share: the two halves, by the parts that the ops read.

    x = x + drop∘scale∘proj(attention(LN(x)·Wqkv))          x = x + drop∘scale∘fc2(act(fc1(LN(x))))

A library's file names the parts and says what else stands in a half. Where something there is no plain module (a hook,
a LoRA wrapper, a quantised weight, active dropout) that half runs by the library's own modules, as `vit_fast.layers`
does it, and one log line says why.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vit_fast import ops
from vit_fast.ops.backend import compute_dtype, say_aside, use_triton


class Fused:
    """Mixed in before the class of a library whose forward the subclass replaces."""

    OP = ""  # what of vit_fast.ops runs

    @classmethod
    def original(cls) -> type:
        """The library's class."""
        return next(kind for kind in cls.__mro__ if not issubclass(kind, Fused) and issubclass(kind, nn.Module))

    def never(self, inside: tuple[nn.Module, ...] = ()) -> str:
        """Why this module, inside these others, is none that the op computes, however it is called, or ""."""
        return ""


class AttentionHalf(NamedTuple):
    """The parts of a block's first half. Of queries, keys and values there is one weight [3·D, D], or three [D, D]."""

    norm: nn.LayerNorm
    weights: tuple[Tensor, ...]
    biases: tuple[Tensor | None, ...]
    heads: int
    proj: nn.Linear
    scale: Tensor | None = None
    path: nn.Module | None = None
    q_norm: nn.Module | None = None
    k_norm: nn.Module | None = None
    out_norm: nn.Module | None = None

    def normalises(self) -> bool:
        """Whether a norm stands inside the half, which the op of the whole block does not have."""
        return any(norm is not None and type(norm) is not nn.Identity for norm in self[7:])


class MlpHalf(NamedTuple):
    """The parts of a block's second half."""

    norm: nn.LayerNorm
    fc1: nn.Linear
    activation: str
    fc2: nn.Linear
    scale: Tensor | None = None
    path: nn.Module | None = None
    act: nn.Module | None = None  # with `inner`, a norm before fc2: called as modules
    inner: nn.Module | None = None

    def normalises(self) -> bool:
        return self.inner is not None and type(self.inner) is not nn.Identity


class FusedBlock(Fused):
    """A pre-norm block. A library's subclass gives `forward` with the library's signature, and the six below."""

    OP = "block"

    def attention_aside(self) -> str:
        """Why the attention half runs by the library's modules, or ""."""
        raise NotImplementedError

    def attention_half(self) -> AttentionHalf:
        raise NotImplementedError

    def own_attention(self, x: Tensor, **kwargs) -> Tensor:
        """The branch of the attention half by the library's modules, the residual not added."""
        raise NotImplementedError

    def mlp_aside(self) -> str:
        raise NotImplementedError

    def mlp_half(self) -> MlpHalf:
        raise NotImplementedError

    def own_mlp(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def asides(self) -> tuple[str, str]:
        return self.attention_aside(), self.mlp_aside()

    def fused(self, x: Tensor, asides: tuple[str, str], **kwargs) -> Tensor:
        """The block, of which one half at most is aside; `kwargs` are what the library's attention takes besides."""
        attention_reason, mlp_reason = asides
        for reason in filter(None, asides):
            say_aside(f"a {type(self).__name__}, module by module,", reason)
        if not (attention_reason or mlp_reason):
            attention, mlp = self.attention_half(), self.mlp_half()
            if not (attention.normalises() or mlp.normalises()) and _joins(attention, x):
                return _block(x, attention, mlp)
        x = x + self.own_attention(x, **kwargs) if attention_reason else _attention(x, self.attention_half())
        return x + self.own_mlp(x) if mlp_reason else _mlp(x, self.mlp_half())


def _joins(half: AttentionHalf, x: Tensor) -> bool:
    """Whether queries, keys and values come from one product.

    On a GPU the copy that joins three weights, 6·D² bytes read and written, is little beside reading x and normalising
    it three times; PyTorch normalises once, and there three products cost what one does.
    """
    return len(half.weights) == 1 or use_triton("ln_linear", x, half.weights[0])


def _joined(half: AttentionHalf) -> tuple[Tensor, Tensor | None]:
    """The one weight of queries, keys and values and its bias, from which each gets its own gradient."""
    if len(half.weights) == 1:
        return half.weights[0], half.biases[0]
    biases = half.biases
    if any(bias is None for bias in biases):
        zero = half.weights[0].new_zeros(len(half.weights[0]))
        biases = () if biases == (None,) * 3 else tuple(zero if bias is None else bias for bias in biases)
    return torch.cat(half.weights), torch.cat(biases) if biases else None


def _factors(path: nn.Module | None, scale: Tensor | None, x: Tensor) -> Tensor | None:
    """What the library's own drop path multiplies each image's branch by, [B]; None where nothing drops."""
    if path is None or type(path) is nn.Identity or not path.training or not path.drop_prob:
        return None
    # The draw depends on the dtype of the branch.
    dtype = compute_dtype(x) if scale is None else torch.promote_types(compute_dtype(x), scale.dtype)
    return path(x.new_ones(x.shape[0], 1, 1, dtype=dtype)).view(-1)


def _block(x: Tensor, attention: AttentionHalf, mlp: MlpHalf) -> Tensor:
    return ops.block(
        x,
        attention.norm.weight,
        attention.norm.bias,
        *_joined(attention),
        attention.proj.weight,
        attention.proj.bias,
        attention.scale,
        _factors(attention.path, attention.scale, x),
        mlp.norm.weight,
        mlp.norm.bias,
        mlp.fc1.weight,
        mlp.fc1.bias,
        mlp.fc2.weight,
        mlp.fc2.bias,
        mlp.scale,
        _factors(mlp.path, mlp.scale, x),
        attention.heads,
        mlp.activation,
        attention.norm.eps,
        mlp.norm.eps,
    )


def _attention(x: Tensor, half: AttentionHalf) -> Tensor:
    norm = half.norm
    if _joins(half, x):
        qkv = ops.ln_linear(x, norm.weight, norm.bias, *_joined(half), norm.eps).unflatten(-1, (3, half.heads, -1))
        if half.q_norm is None or type(half.q_norm) is type(half.k_norm) is nn.Identity:
            heads = ops.attention_qkv(qkv)
        else:
            q, k, v = qkv.unbind(2)
            heads = ops.attention(half.q_norm(q), half.k_norm(k), v)
    else:
        y = F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)
        heads = ops.attention(
            *(F.linear(y, *pair).unflatten(-1, (half.heads, -1)) for pair in zip(half.weights, half.biases))
        )
    if half.out_norm is not None:
        heads = half.out_norm(heads)
    drop = _factors(half.path, half.scale, x)
    return ops.linear_residual(heads, half.proj.weight, half.proj.bias, x, half.scale, drop)


def _mlp(x: Tensor, half: MlpHalf) -> Tensor:
    norm, fc1, fc2 = half.norm, half.fc1, half.fc2
    drop = _factors(half.path, half.scale, x)
    if half.normalises():
        hidden = half.act(ops.ln_linear(x, norm.weight, norm.bias, fc1.weight, fc1.bias, norm.eps))
        return ops.linear_residual(half.inner(hidden), fc2.weight, fc2.bias, x, half.scale, drop)
    return ops.mlp(
        x,
        norm.weight,
        norm.bias,
        fc1.weight,
        fc1.bias,
        fc2.weight,
        fc2.bias,
        half.scale,
        drop,
        half.activation,
        norm.eps,
    )


def named_activation(names: dict[type, str], act) -> str:
    """The name by which the ops know an activation module; `names` has those whose class says it all."""
    return names.get(type(act)) or ("gelu_tanh" if act.approximate == "tanh" else "gelu")
