"""What the accelerated blocks of every library share: the two halves, by the parts that the ops read.

    x = x + drop∘scale∘proj(attention(LN(x)·Wqkv))          x = x + drop∘scale∘fc2(act(fc1(LN(x))))

A library's file names the parts and says what else stands in a half. Where something there is no plain module (a hook,
a LoRA wrapper, a quantised weight, active dropout) that half runs by the library's own modules, as `vit_fast.layers`
does it, and one log line says why.

Of a Swin Transformer x is a map [B, Y, X, D], and its attention stays inside the windows of that. Of DINOv3 and EVA the
model hands every block the angles by which its queries and keys are turned.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vit_fast import ops
from vit_fast.layers import has_its_forward, is_genuine, readable
from vit_fast.ops.backend import cast, chosen_backend, compute_dtype, say_aside, use_triton
from vit_fast.ops.rope_attention import turn
from vit_fast.ops.window_attention import apart, distances, refusal

if TYPE_CHECKING:
    Module = nn.Module
else:
    Module = object  # the library's class, which comes behind it, is one

OTHER_FORWARD = "somebody has given it, or its class, another forward"
PADDED = "the map is padded to whole windows"
SYMBOL = "torch.fx traces it by symbols, which no op takes"


def as_written(kind: type, *names: str) -> dict[str, Callable | None]:
    """Methods of a library's class, None where somebody has set another already."""
    return {name: getattr(kind, name) if is_genuine(kind, name) else None for name in names}


def why_method(module: nn.Module, kind: type, name: str, written: dict[str, Callable | None]) -> str:
    """Why a module of this class has not the method that is noted in `as_written`, or ""."""
    getattr(module, name)  # as in `layers.why_aside`, for torch.compile
    other = name in module.__dict__ or getattr(kind, name) is not written[name]
    return f"somebody has given it, or its class, another {name}" if other else ""


# What a Swin's block makes of its sizes and keeps as a buffer is looked at when somebody accelerates it. No call asks:
# of a tensor on a GPU it would wait for the answer.


def why_other_distances(index: Tensor | None, window: tuple[int, int]) -> str:
    """Why a buffer of the distances in a window holds others than the op takes, or ""."""
    same = index is not None and (
        index.is_meta or torch.equal(index.flatten().long(), distances(window, index.device).flatten())
    )
    return "" if same else "its relative_position_index is not that of its windows"


def why_other_mask(mask: Tensor | None, resolution, window: tuple[int, int], shift: tuple[int, int]) -> str:
    """The same of a mask for the windows of a map of this resolution, padded to whole ones."""
    if mask is None or mask.is_meta:
        return ""
    rows, columns = (-(-length // side) * side for length, side in zip(resolution, window))
    return "" if torch.equal(mask, apart(rows, columns, window, shift, mask)) else "its attn_mask is not of its windows"


class Fused(Module):
    """Mixed in before the class of a library whose forward the subclass replaces."""

    _original: type[nn.Module]
    helpers: tuple[str, ...] = ()  # the library's methods, beside forward, that an op stands for
    _written: dict[str, Callable | None]  # those as their library wrote them
    changed_by_calls: tuple[str, ...] = ()  # attributes that the library's own forward sets

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        for kind in cls.__mro__:
            if not issubclass(kind, Fused) and issubclass(kind, nn.Module):
                (cls._original,) = readable(kind)
                cls._written = as_written(kind, *cls.helpers)
                break

    @classmethod
    def original(cls) -> type:
        """The library's class."""
        return cls._original

    @classmethod
    def why_rewritten(cls) -> str:
        """Why the forward of the library's class is to run, which somebody has replaced, or ""; asked in every call."""
        return "" if has_its_forward(cls._original) else OTHER_FORWARD

    def why_helper(self, name: str) -> str:
        """The same of one of `helpers`, the module's own or its class's."""
        return why_method(self, self._original, name, self._written)

    def op(self) -> str:
        """What of vit_fast.ops runs, in evaluation mode."""
        raise NotImplementedError

    @classmethod
    def concerns(cls, module: nn.Module, inside: tuple[nn.Module, ...]) -> bool:
        """Whether a module of the library's class, inside these others, is of the sort at all, and worth a line of the
        report."""
        return True

    def never(self, inside: tuple[nn.Module, ...] = ()) -> str:
        """Why this module, inside these others, is none that the op computes, however it is called, or ""."""
        return ""


class Windows(NamedTuple):
    """What `ops.window_attention` takes beside queries, keys and values."""

    table: Tensor
    size: tuple[int, int]
    shift: tuple[int, int]
    rests: bool = False  # whether the shift leaves out an axis that one window covers

    def shift_on(self, x: Tensor) -> tuple[int, int]:
        """The shift of a map [B, Y, X, D]."""
        if not self.rests:
            return self.shift
        rows, columns = (0 if size >= length else by for by, size, length in zip(self.shift, self.size, x.shape[1:]))
        return rows, columns

    def why_aside(self, x: Tensor, heads: int) -> str:
        """Why the op does not take such windows of `x`, or ""."""
        if x.dim() != 4:
            return "it reads no map [B, Y, X, D]"
        (high, wide), (down, right) = self.size, self.shift
        if x.shape[1] % high or x.shape[2] % wide:
            return PADDED
        if not (0 <= down < high and 0 <= right < wide):
            return "its shift is none inside a window"
        if self.table.shape != ((2 * high - 1) * (2 * wide - 1), heads):
            return "its table of biases is of other windows"
        return ""


class Rope(NamedTuple):
    """What `ops.rope_attention` takes beside queries, keys and values."""

    cos: Tensor
    sin: Tensor
    interleaved: bool

    def why_aside(self, x: Tensor, tokens: int | None, heads: int, width: int) -> str:
        """Why the op does not turn the last of x [B, T, D] by these, or ""; so many of them, if it is said."""
        shape = self.cos.shape
        fits = len(shape) in (2, 3) and shape == self.sin.shape and shape[-1] == width and shape[:-2] in ((), (heads,))
        fits = fits and shape[-2] <= x.shape[1] and tokens in (None, shape[-2])
        return "" if fits else "its positions are of other tokens or heads"


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
    windows: Windows | None = None  # without norms inside
    rope: Rope | None = None  # without norms of queries and keys

    def normalises(self) -> bool:
        """Whether a norm stands inside the half, which the op of the whole block does not have."""
        norms = self.q_norm, self.k_norm, self.out_norm
        return any(norm is not None and type(norm) is not nn.Identity for norm in norms)


class MlpHalf(NamedTuple):
    """The parts of a block's second half. A gated one has its gates and values in one weight [2F, D], or in two."""

    norm: nn.LayerNorm
    weights: tuple[Tensor, ...]
    biases: tuple[Tensor | None, ...]
    activation: str  # of `ops.mlp`, or "swiglu"
    fc2: nn.Linear
    scale: Tensor | None = None
    path: nn.Module | None = None
    act: nn.Module | None = None  # called as a module where `inner`, a norm before fc2, stands behind it
    inner: nn.Module | None = None

    def normalises(self) -> bool:
        return self.inner is not None and type(self.inner) is not nn.Identity


class FusedBlock(Fused):
    """A pre-norm block. A library's subclass gives `forward` with the library's signature, and the six below."""

    attention_op = "attention"  # which op has the softmax, where not one op has the whole block
    may_not_turn = False  # whether a `RopeBlock` is called without positions too

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
        reason = self.why_rewritten()
        return (reason, reason) if reason else (self.attention_aside(), self.mlp_aside())

    def asides_of(self, x: Tensor) -> tuple[str, str]:
        """`asides` of a call; both halves are where torch.fx traces."""
        return self.asides() if isinstance(x, Tensor) else (SYMBOL, SYMBOL)

    def is_aside(self, asides: tuple[str, ...]) -> bool:
        """Whether a call runs the library's own forward, for these reasons; the log tells the first of them."""
        if all(asides):
            say_aside(f"a {type(self).__name__}", asides[0])
            return True
        return False

    def op(self) -> str:
        """The op of the block, or of the half that is not aside; "" where both are."""
        asides = self.asides()
        whole = not any(asides) and _is_whole(self.attention_half(), self.mlp_half())
        if whole and self.attention_op == FusedBlock.attention_op:
            return "block"
        return ("block, or " if whole and self.may_not_turn else "") + self._op_of_halves(asides)

    def _op_of_halves(self, asides: tuple[str, str]) -> str:
        halves = []
        if not asides[0]:
            halves.append(self.attention_op)
        if not asides[1]:
            halves.append("swiglu" if self.mlp_half().activation == "swiglu" else "mlp")
        return ", ".join(halves)

    def op_of(self, asides: tuple[str, str], **kwargs) -> str:
        """`op` of a call with these arguments, whose halves are aside for these reasons."""
        if not any(asides) and _is_whole(self.half_of(**kwargs), self.mlp_half()):
            return "block"
        return self._op_of_halves(self.asides())

    def fused(self, x: Tensor, asides: tuple[str, str], **kwargs) -> Tensor:
        """The block, of which one half at most is aside; `kwargs` are what the library's attention takes besides."""
        attention_reason, mlp_reason = asides
        for reason in filter(None, asides):
            say_aside(f"a {type(self).__name__}, module by module,", reason)
        attention = None if attention_reason else self.half_of(**kwargs)
        mlp = None if mlp_reason else self.mlp_half()
        if attention and mlp and _is_whole(attention, mlp) and _joins(attention.weights, x):
            return _block(x, attention, mlp)
        return self.second(self.first(x, attention, **kwargs), mlp)

    def first(self, x: Tensor, half: AttentionHalf | None, **kwargs) -> Tensor:
        """The attention half: on the ops by its parts, or, for None, by the library's modules."""
        return x + self.own_attention(x, **kwargs) if half is None else _attention(x, half)

    def second(self, x: Tensor, half: MlpHalf | None) -> Tensor:
        """The other half, so too."""
        if half is not None and _joins(half.weights, x):
            return _mlp(x, half)
        return x + self.own_mlp(x)

    def half_of(self, **kwargs) -> AttentionHalf:
        """`attention_half` in a call with these arguments."""
        return self.attention_half()

    def reads(self, x: Tensor, *others) -> Tensor:
        """What both halves read of the arguments of a call."""
        return x


class RopeBlock(FusedBlock):
    """A block whose queries and keys are turned in a call that says by how much."""

    attention_op = "rope_attention"
    positions: str  # the argument of a call that says it

    def rope_of(self, **kwargs) -> Rope | None:
        """What the arguments of a call say."""
        raise NotImplementedError

    def heads(self) -> tuple[int, int]:
        """How many there are, and how wide."""
        raise NotImplementedError

    def turned(self, x: Tensor) -> int | None:
        """How many of the tokens must be turned; None: as many as the positions are of."""
        raise NotImplementedError

    def example(self, x: Tensor) -> dict:
        """That argument for tokens x, with any angles."""
        raise NotImplementedError

    def half_of(self, **kwargs) -> AttentionHalf:
        return self.attention_half()._replace(rope=self.rope_of(**kwargs))

    def asides_of(self, x: Tensor, **kwargs) -> tuple[str, str]:
        attention, mlp = super().asides_of(x)
        return attention or self._rope_aside(x, **kwargs), mlp

    def _rope_aside(self, x: Tensor, **kwargs) -> str:
        """Why queries and keys of this call are turned by the library's code, or ""."""
        rope = self.rope_of(**kwargs)
        return "" if rope is None else rope.why_aside(x, self.turned(x), *self.heads())


class WindowedBlock(FusedBlock):
    """A block that reads a map [B, Y, X, D], whose half of the attention has `windows`."""

    attention_op = "window_attention"

    def windows(self) -> Windows:
        """What the half of the attention has of this name."""
        raise NotImplementedError

    def heads(self) -> tuple[int, int]:
        """How many there are, and how wide."""
        raise NotImplementedError

    def asides(self) -> tuple[str, str]:
        attention, mlp = super().asides()
        # Where its kernels do not run the op is as fast as the library; under "triton" it is the op that refuses.
        if not attention and chosen_backend() == "auto":
            windows = self.windows()
            if use_triton("window_attention", windows.table):
                attention = refusal(windows.size, self.heads()[1])
        return attention, mlp

    def asides_of(self, x: Tensor) -> tuple[str, str]:
        attention, mlp = super().asides_of(x)
        return attention or self.map_aside(x), mlp

    def map_aside(self, x: Tensor) -> str:
        """Why the attention of this map runs by the library's modules, or ""."""
        return self.windows().why_aside(x, self.heads()[0])


def _is_whole(attention: AttentionHalf, mlp: MlpHalf) -> bool:
    """Whether both halves make `ops.block`: no norm inside one, no windows, no turn, no gate, no head pruned."""
    if attention.windows is not None or attention.rope is not None or attention.normalises():
        return False
    if mlp.normalises() or mlp.activation == "swiglu":
        return False
    width = attention.proj.out_features
    return attention.proj.in_features == width and sum(map(len, attention.weights)) == 3 * width


def _joins(weights: tuple[Tensor, ...], x: Tensor) -> bool:
    """Whether weights that read the same input make one product.

    On a GPU the copy that joins them, of three 6·D² bytes read and written, is little beside reading x and normalising
    it for each; PyTorch normalises once, and there several products cost what one does. Windows take one in any case.
    """
    return len(weights) == 1 or use_triton("ln_linear", x, weights[0])


def _joined(weights: tuple[Tensor, ...], biases: tuple[Tensor | None, ...], x: Tensor) -> tuple[Tensor, Tensor | None]:
    """One weight and its bias, from which each of those that it is made of gets its own gradient."""
    if len(weights) == 1:
        return weights[0], biases[0]
    weight = torch.cat([cast(one, compute_dtype(x)) for one in weights])  # under autocast half the bytes to join
    if all(bias is None for bias in biases):
        return weight, None
    return weight, torch.cat([w.new_zeros(len(w)) if bias is None else bias for w, bias in zip(weights, biases)])


def _factors(path: nn.Module | None, scale: Tensor | None, x: Tensor) -> Tensor | None:
    """What the library's own drop path multiplies each image's branch by, [B]; None where nothing drops."""
    if path is None or type(path) is nn.Identity or not path.training or not getattr(path, "drop_prob", True):
        return None  # torchvision's has no `drop_prob`
    # The draw depends on the dtype of the branch.
    dtype = compute_dtype(x) if scale is None else torch.promote_types(compute_dtype(x), scale.dtype)
    return path(x.new_ones(x.shape[0], 1, 1, dtype=dtype)).view(-1)


def _block(x: Tensor, attention: AttentionHalf, mlp: MlpHalf) -> Tensor:
    return ops.block(
        x,
        attention.norm.weight,
        attention.norm.bias,
        *_joined(attention.weights, attention.biases, x),
        attention.proj.weight,
        attention.proj.bias,
        attention.scale,
        _factors(attention.path, attention.scale, x),
        mlp.norm.weight,
        mlp.norm.bias,
        mlp.weights[0],
        mlp.biases[0],
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
    if half.windows is not None or _joins(half.weights, x):
        qkv = ops.ln_linear(x, norm.weight, norm.bias, *_joined(half.weights, half.biases, x), norm.eps)
        qkv = qkv.unflatten(-1, (3, half.heads, -1))
        if half.windows is not None:
            heads = _in_windows(x, qkv, half.windows)
        elif half.rope is not None:
            heads = ops.rope_attention(qkv, *half.rope)
        elif half.q_norm is None or half.k_norm is None or type(half.q_norm) is type(half.k_norm) is nn.Identity:
            heads = ops.attention_qkv(qkv)
        else:
            q, k, v = qkv.unbind(2)
            heads = ops.attention(half.q_norm(q), half.k_norm(k), v)
    else:
        y = F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)
        q, k, v = (F.linear(y, *pair).unflatten(-1, (half.heads, -1)) for pair in zip(half.weights, half.biases))
        if half.rope is not None:
            q, k = turn(q, *half.rope), turn(k, *half.rope)
        heads = ops.attention(q, k, v)
    if half.out_norm is not None:
        heads = half.out_norm(heads)
    drop = _factors(half.path, half.scale, x)
    return ops.linear_residual(heads, half.proj.weight, half.proj.bias, x, half.scale, drop)


def _in_windows(x: Tensor, qkv: Tensor, windows: Windows) -> Tensor:
    return ops.window_attention(qkv, windows.table, windows.size, windows.shift_on(x))


def _mlp(x: Tensor, half: MlpHalf) -> Tensor:
    norm, fc2 = half.norm, half.fc2
    weight, bias = _joined(half.weights, half.biases, x)
    first = (x, norm.weight, norm.bias, weight, bias)
    last = (fc2.weight, fc2.bias)
    end = (half.scale, _factors(half.path, half.scale, x))
    if half.activation == "swiglu":
        return ops.swiglu(*first, *last, *end, norm.eps)
    if half.normalises():
        assert half.inner is not None
        assert half.act is not None
        hidden = half.inner(half.act(ops.ln_linear(*first, norm.eps)))
        return ops.linear_residual(hidden, *last, x, *end)
    return ops.mlp(*first, *last, *end, half.activation, norm.eps)
