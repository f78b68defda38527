"""transformers: the layers of its Vision Transformers, and their attention modules, whose weights it records.

`transformers.models.*.modeling_*` are imported one by one as their layers are met: `ViTLayer` and its like are made at
the first look at this module's attribute of that name, which is also where a pickle finds them.
"""

import importlib
from typing import NamedTuple

import torch.nn as nn
from torch import Tensor
from transformers import activations
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vit_fast import ops
from vit_fast.foreign.block import AttentionHalf, Fused, FusedBlock, MlpHalf
from vit_fast.layers import DROPOUT, LINEAR, NORM, has_its_forward, package_of, readable, why_aside
from vit_fast.transformers_attention import attention_forward, records_attention

ACTIVATION = {
    activations.GELUActivation: "gelu",
    activations.GELUTanh: "gelu_tanh",
    activations.QuickGELUActivation: "quick_gelu",
}
ACTIVATIONS = readable(*ACTIVATION)
GATES = readable(activations.SiLUActivation, nn.SiLU)
# The attention functions that compute what the ops do; somebody may register others, by other names and by these.
_OWN = {attention_forward, *(one for one in ALL_ATTENTION_FUNCTIONS.values() if package_of(one) == "transformers")}

# What a model that has no use for it hands to every layer: what is the loss's, of which transformers' Trainer gives the
# first in each step, and the embeddings'.
_NOT_ATTENTIONS = {"num_items_in_batch", "labels", "return_loss", "interpolate_pos_encoding"}


class _Names(NamedTuple):
    """What a library's authors called one thing in different models."""

    layer: str
    norm1: str
    attention: str
    norm2: str
    proj: str
    scaling: str
    dropout: str
    by_place: int  # how many of attention's arguments the layer does not name


_VIT = _Names(
    "Layer",
    "layernorm_before",
    "attention",
    "layernorm_after",
    "o_proj",
    "scaling",
    "attention_dropout",
    2,
)
_DINO = _VIT._replace(norm1="norm1", norm2="norm2", by_place=1)
_CLIP = _Names("EncoderLayer", "layer_norm1", "self_attn", "layer_norm2", "out_proj", "scale", "dropout", 0)
# The prefix of a model's classes: the folder that it is in, its names.
_MODELS = {
    "CLIP": ("clip", _CLIP),
    "DeiT": ("deit", _VIT),
    "Dinov2": ("dinov2", _DINO),
    "Dinov2WithRegisters": ("dinov2_with_registers", _DINO),
    "IJepa": ("ijepa", _VIT),
    "Siglip": ("siglip", _CLIP),
    "Siglip2": ("siglip2", _CLIP),
    "ViT": ("vit", _VIT),
    "ViTMAE": ("vit_mae", _VIT),
}


def __getattr__(name: str) -> type:
    prefix = name.removesuffix("Attention").removesuffix("Layer").removesuffix("Encoder")
    folder, names = _MODELS.get(prefix, ("", _VIT))
    if name not in (f"{prefix}{names.layer}", f"{prefix}Attention") or not folder:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    library = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")

    def kinds(*suffixes: str) -> tuple[type, ...]:
        return readable(*(getattr(library, prefix + s) for s in suffixes if hasattr(library, prefix + s)))

    members = {"__module__": __name__, "names": names}
    if name.endswith("Attention"):
        made = type(name, (_Attention, getattr(library, name)), members)
    else:
        members["attention_kinds"] = (*kinds("Attention"), *readable(__getattr__(f"{prefix}Attention")))
        members |= {
            "mlp_kinds": kinds("MLP"),
            "gated_kinds": kinds("SwiGLUFFN"),
            "scale_kinds": kinds("LayerScale"),
            "path_kinds": (nn.Identity, *kinds("DropPath")),
        }
        made = type(name, (_Layer, getattr(library, name)), members)
    return globals().setdefault(name, made)


def why_called(name: str, attention: nn.Module, kinds: tuple[type, ...]) -> str:
    """Why the attention module must be called itself, or ""."""
    attention.forward  # noqa: B018  as in `layers.why_aside`
    kind = attention.original() if isinstance(attention, Fused) else type(attention)
    if type(attention) not in kinds or not has_its_forward(kind) or "forward" in attention.__dict__:
        return f"{name} is a {type(attention).__name__} or has a forward of its own"
    if attention._forward_pre_hooks or attention._backward_hooks or attention._backward_pre_hooks:
        return f"{name} has a hook"
    for hook in attention._forward_hooks.values():
        if hook.__module__ != "transformers.utils.output_capturing":
            return f"{name} has a hook"
    return "attentions are recorded" if records_attention(attention) else ""


def why_more(kwargs: dict) -> str:
    """Why a call asks attention for something else than softmax over all tokens, or ""."""
    for name, value in kwargs.items():
        # What is to be returned is looked at elsewhere.
        asks = value is not None and value is not False and not name.startswith("output_")
        if asks and name not in _NOT_ATTENTIONS:
            return f"{name} is given"
    return ""


def why_other(attention: nn.Module) -> str:
    """Why an attention module computes what no op does, or by a function that is not transformers' own, or ""."""
    if getattr(attention, "is_causal", False):
        return "attention is causal"
    name = attention.config._attn_implementation
    function = ALL_ATTENTION_FUNCTIONS.get(name)
    if function is None:  # "eager" is not in the table, unless somebody has put it there
        return "" if name in (None, "eager") else f"transformers knows no attention implementation {name!r}"
    return "" if function in _OWN else f"attention implementation {name!r} is none of transformers' own"


def why_set(name: str, attention: nn.Module, dropout: str, scaling: str = "scaling") -> str:
    """Why an attention module of this name drops or scales as no op does, or ""."""
    if attention.training and getattr(attention, dropout):
        return f"{name}.{dropout} is active"
    if getattr(attention, scaling) != attention.head_dim**-0.5:
        return f"{name}.{scaling} is changed"
    return ""


def half_of_attention(norm: nn.LayerNorm, attention: nn.Module, proj: nn.Linear, **others) -> AttentionHalf:
    """Of an attention module whose three maps are apart; how many heads there are its queries tell, for some may be
    pruned."""
    q, k, v = attention.q_proj, attention.k_proj, attention.v_proj
    weights, biases = (q.weight, k.weight, v.weight), (q.bias, k.bias, v.bias)
    return AttentionHalf(norm, weights, biases, len(q.weight) // attention.head_dim, proj, **others)


class _Attention(Fused):
    """softmax(q·kᵀ)·v as one op; the weights, exact, where they are recorded, whichever implementation is set."""

    def op(self) -> str:
        return "attention"

    names: _Names

    def never(self, inside: tuple[nn.Module, ...] = ()) -> str:
        return _why_never(self) or why_other(self)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs):
        names = self.names
        dropping = self.training and getattr(self, names.dropout)
        more = attention_mask is not None or dropping or why_more(kwargs)
        if more or self.config._attn_implementation == "eager" or self.why_rewritten() or why_other(self):
            return super().forward(hidden_states, attention_mask, **kwargs)
        scale = getattr(self, names.scaling)
        q, k, v = (
            projection(hidden_states).unflatten(-1, (-1, self.head_dim))
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        output = getattr(self, names.proj)(ops.attention(q, k, v, scale))
        weights = ops.attention_maps(q, k, scale=scale).to(q.dtype) if records_attention(self) else None
        return output, weights


def _why_never(attention: nn.Module) -> str:
    return "a causal tower" if getattr(attention.config, "model_type", "") == "clip_text_model" else ""


class _Layer(FusedBlock):
    names: _Names
    attention_kinds: tuple[type, ...]
    mlp_kinds: tuple[type, ...]
    gated_kinds: tuple[type, ...]
    scale_kinds: tuple[type, ...]
    path_kinds: tuple[type, ...]

    def never(self, inside: tuple[nn.Module, ...] = ()) -> str:
        attention = getattr(self, self.names.attention)
        return _why_never(attention) if hasattr(attention, "config") else ""

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs) -> Tensor:
        more = why_more({"attention_mask": attention_mask, **kwargs})
        asides = (more,) if more else self.asides_of(hidden_states)
        if self.is_aside(asides):
            return super().forward(hidden_states, attention_mask, **kwargs)
        return self.fused(hidden_states, asides, **kwargs)

    def _ends(self, number: int) -> tuple:
        """Checks of what stands between a half's product and the residual."""
        modules = self._modules
        ends = [("dropout", modules["dropout"], DROPOUT)] if "dropout" in modules else []
        if self.scale_kinds:
            ends += [(f"layer_scale{number}", modules[f"layer_scale{number}"], self.scale_kinds)]
            ends += [("drop_path", modules["drop_path"], self.path_kinds)]
        return tuple(ends)

    def _end(self, number: int) -> tuple[Tensor | None, nn.Module | None]:
        """LayerScale's vector and the drop path of a half."""
        if not self.scale_kinds:
            return None, None
        return self._modules[f"layer_scale{number}"].lambda1, self.drop_path

    def _own_end(self, number: int, x: Tensor) -> Tensor:
        for _, module, _ in self._ends(number):
            x = module(x)
        return x

    def attention_aside(self) -> str:
        names = self.names
        attention = self._modules[names.attention]
        reason = why_called(names.attention, attention, self.attention_kinds) or why_other(attention)
        if reason:
            return reason
        if reason := why_set(names.attention, attention, names.dropout, names.scaling):
            return reason
        linears = ("q_proj", "k_proj", "v_proj", names.proj)
        return why_aside(
            (names.norm1, self._modules[names.norm1], NORM),
            *((f"{names.attention}.{name}", attention._modules[name], LINEAR) for name in linears),
            *self._ends(1),
        )

    def attention_half(self) -> AttentionHalf:
        names = self.names
        attention, (scale, path) = self._modules[names.attention], self._end(1)
        proj = attention._modules[names.proj]
        return half_of_attention(self._modules[names.norm1], attention, proj, scale=scale, path=path)

    def own_attention(self, x: Tensor, **kwargs) -> Tensor:
        names = self.names
        named = {"hidden_states": self._modules[names.norm1](x), "attention_mask": None}
        # As the library calls it: a hook sees which arguments have names.
        placed = [named.pop(name) for name in list(named)[: names.by_place]]
        return self._own_end(1, self._modules[names.attention](*placed, **named, **kwargs)[0])

    def mlp_aside(self) -> str:
        mlp = self.mlp
        norm = (self.names.norm2, self._modules[self.names.norm2], NORM)
        if type(mlp) in self.gated_kinds:
            linears = ((f"mlp.{name}", mlp._modules[name], LINEAR) for name in ("gate_proj", "up_proj", "down_proj"))
            gate = ("mlp.act_fn", mlp.act_fn, GATES)
            return why_aside(("mlp", mlp, self.gated_kinds), norm, *linears, gate, *self._ends(2))
        return why_aside(("mlp", mlp, self.mlp_kinds)) or why_aside(
            norm,
            ("mlp.fc1", mlp.fc1, LINEAR),
            ("mlp.activation_fn", mlp.activation_fn, ACTIVATIONS),
            ("mlp.fc2", mlp.fc2, LINEAR),
            *self._ends(2),
        )

    def mlp_half(self) -> MlpHalf:
        mlp, norm = self.mlp, self._modules[self.names.norm2]
        if type(mlp) in self.gated_kinds:
            gate, value = mlp.gate_proj, mlp.up_proj
            weights, biases = (gate.weight, value.weight), (gate.bias, value.bias)
            return MlpHalf(norm, weights, biases, "swiglu", mlp.down_proj, *self._end(2))
        fc1 = mlp.fc1
        activation = ACTIVATION[type(mlp.activation_fn)]
        return MlpHalf(norm, (fc1.weight,), (fc1.bias,), activation, mlp.fc2, *self._end(2))

    def own_mlp(self, x: Tensor) -> Tensor:
        return self._own_end(2, self.mlp(self._modules[self.names.norm2](x)))
