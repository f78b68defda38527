"""`attn_implementation="vit_fast"` for every model of transformers that takes an attention implementation."""

import importlib.util
import weakref

import torch
from torch import Tensor, nn

from vit_fast import ops
from vit_fast.ops.backend import say_aside

NAME = "vit_fast"
_recorded: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # the attention modules whose last forward pass was collected


def register_transformers() -> None:
    """Let models of transformers choose attention by the name "vit_fast".

    With `Model.from_pretrained(..., attn_implementation="vit_fast")` or `model.set_attn_implementation("vit_fast")` its
    attention runs on `vit_fast.ops.attention`. What that does not compute (a mask, Swin's bias, a causal tower, dropout
    in training, fewer heads of keys) runs in PyTorch, as transformers' own "sdpa" does. Attentions that
    `output_attentions=True` asks for are returned, exact, in every case.

    May be called before or after transformers is imported, and again.

    Raises:
        ImportError: where transformers is not installed, or older than version 5.
    """
    found = "none"
    if importlib.util.find_spec("transformers") is not None:
        import transformers

        found = transformers.__version__
    if found == "none" or int(found.split(".")[0]) < 5:
        raise ImportError(f"transformers: got {found}, takes version 5 or later: pip install 'transformers>=5'")
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(NAME, attention_forward)
    # Without it a mask would arrive as None, and no error say so.
    AttentionMaskInterface.register(NAME, sdpa_mask)


def records_attention(module: nn.Module) -> bool:
    """Whether this forward pass collects the attentions that `module` returns beside its output.

    transformers collects by hooks that stay where they are once any output was asked for. Where its version cannot be
    asked, a hook counts as collecting. Gradient checkpointing runs a layer again where no model's forward pass is under
    way: that run is as the one before it, or it would save other tensors.
    """
    if not module._forward_hooks:
        return False
    try:
        from transformers.utils.output_capturing import _active_collector
    except ImportError:
        return True
    collected = _active_collector.get()
    if collected is None:
        return module in _recorded
    records = "attentions" in collected
    if not torch.compiler.is_compiling():
        (_recorded.add if records else _recorded.discard)(module)
    return records


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **kwargs,
) -> tuple[Tensor, Tensor | None]:
    """An attention function as transformers calls it.

    Args:
        module: the attention module.
        query, key, value: [B, H, T, d]. Keys and values may have fewer heads, a divisor of H.
        attention_mask: boolean, True where a key is seen, or what is added to the scores; None for neither.
        scaling: what multiplies the scores, 1/√d for None.
        dropout: of the weights.
        is_causal: whether a query sees no later key, where no mask says so; the module's own `is_causal` for None.
        kwargs: of these `position_bias`, which is added to the scores, and `softcap` c, which makes them c·tanh(s/c),
            are computed, and `output_attentions` asks for the weights.

    Returns:
        [B, T, H, d], and the weights [B, H, Tq, Tk] where they are asked for.

    Raises:
        ValueError: for attention sinks (`s_aux`, `sinks`), which would be left out in silence.
    """
    for name in ("s_aux", "sinks"):
        if kwargs.get(name) is not None:
            raise ValueError(f"{name}: got attention sinks, takes None: choose attn_implementation='eager'")
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    if is_causal and (attention_mask is not None or query.shape[2] == 1):
        is_causal = False  # by a statement: a traced `and` would hand SDPA a symbol, where it takes a bool
    bias, softcap = kwargs.get("position_bias"), kwargs.get("softcap")
    wanted = wants_weights(module, kwargs.get("output_attentions"))
    reason = _why_not(query, key, value, attention_mask, dropout, is_causal, bias, softcap)
    if not reason:
        q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        output = ops.attention(q, k, v, scaling).unflatten(-1, (q.shape[2], -1))
        return output, ops.attention_maps(q, k, scale=scaling).to(query.dtype) if wanted else None
    say_aside(f"attention of a {type(module).__name__}", reason)
    if wanted or softcap is not None:
        output, weights = _written_out(
            module, query, key, value, attention_mask, scaling, dropout, is_causal, bias, softcap
        )
        return output, weights if wanted else None
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
    )


def wants_weights(module: nn.Module, asked: bool | None) -> bool:
    """Whether the weights are asked for: by the call, by the model's config, or by what collects them."""
    if asked is None:
        asked = getattr(getattr(module, "config", None), "output_attentions", False)
    return bool(asked) or records_attention(module)


def _why_not(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    causal: bool,
    bias: Tensor | None,
    softcap: float | None,
) -> str:
    """Why `ops.attention` does not compute this call, or ""."""
    if mask is not None or bias is not None:
        return "a mask or a bias is given"
    if causal:
        return "it is causal"
    if dropout:
        return "dropout is active"
    if softcap is not None:
        return "its scores are capped"
    if key.shape[1] != query.shape[1]:
        return f"{key.shape[1]} heads of keys for {query.shape[1]} of queries"
    if value.shape != key.shape or query.shape[0] != key.shape[0]:
        return "queries, keys and values differ in batch or head width"
    return ""


def _written_out(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    dropout: float,
    causal: bool,
    bias: Tensor | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention with its weights, as transformers' "eager" has it, with masks of both kinds."""
    if (groups := query.shape[1] // key.shape[1]) > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if bias is not None:
        scores = scores + bias
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        lowest = torch.finfo(scores.dtype).min  # not -inf: a query that sees no key gets numbers
        scores = scores.masked_fill(~mask, lowest) if mask.dtype == torch.bool else scores + mask
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(query.dtype)
    weights = nn.functional.dropout(weights, dropout, training=module.training)
    return (weights @ value).transpose(1, 2), weights
