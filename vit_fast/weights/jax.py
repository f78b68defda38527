"""google-research's vision_transformer (.npz): names with slashes, kernels [in, out], heads on an axis of their own."""

from collections.abc import Mapping

from torch import Tensor

from vit_fast.weights.layout import BIASES, QKV_BIAS, SAME, TRANSPOSED, Layout, Rule, Way, with_positions_of

_BLOCK = "Transformer/encoderblock_{i}/"
_ATTENTION = _BLOCK + "MultiHeadDotProductAttention_1/"
_INTO_HEADS = Way(  # [D, H, d] ↔ [H·d, D]
    lambda t, heads: t.flatten(1).T.contiguous(), lambda t, heads: t.T.reshape(t.shape[1], heads, -1)
)
_OUT_OF_HEADS = Way(  # [H, d, D] ↔ [D, H·d]
    lambda t, heads: t.flatten(0, 1).T.contiguous(), lambda t, heads: t.T.reshape(heads, -1, t.shape[0])
)
_BY_HEADS = Way(lambda t, heads: t.flatten(), lambda t, heads: t.view(heads, -1))  # [H, d] ↔ [H·d]
_PATCHES = Way(  # [P, P, C, D] ↔ [D, C, P, P]
    lambda t, heads: t.permute(3, 2, 0, 1).contiguous(), lambda t, heads: t.permute(2, 3, 1, 0)
)


def _linear(ours: str, theirs: str) -> tuple[Rule, Rule]:
    return Rule(f"{ours}.weight", f"{theirs}/kernel", TRANSPOSED), Rule(f"{ours}.bias", f"{theirs}/bias")


def _norm(ours: str, theirs: str) -> tuple[Rule, Rule]:
    return Rule(f"{ours}.weight", f"{theirs}/scale"), Rule(f"{ours}.bias", f"{theirs}/bias")


def _three(part: str) -> tuple[str, ...]:
    return tuple(f"{_ATTENTION}{name}/{part}" for name in ("query", "key", "value"))


JAX = Layout(
    "google-research",
    (
        Rule("cls_token", "cls", SAME),
        Rule("pos_embed", "Transformer/posembed_input/pos_embedding"),
        Rule("patch_embed.proj.weight", "embedding/kernel", _PATCHES),
        Rule("patch_embed.proj.bias", "embedding/bias"),
        *_norm("blocks.{i}.norm1", _BLOCK + "LayerNorm_0"),
        Rule("blocks.{i}.attn.qkv.weight", _three("kernel"), _INTO_HEADS),
        Rule("blocks.{i}.attn.qkv.bias", _three("bias"), _BY_HEADS),
        Rule("blocks.{i}.attn.proj.weight", _ATTENTION + "out/kernel", _OUT_OF_HEADS),
        Rule("blocks.{i}.attn.proj.bias", _ATTENTION + "out/bias"),
        *_norm("blocks.{i}.norm2", _BLOCK + "LayerNorm_2"),
        *_linear("blocks.{i}.mlp.fc1", _BLOCK + "MlpBlock_3/Dense_0"),
        *_linear("blocks.{i}.mlp.fc2", _BLOCK + "MlpBlock_3/Dense_1"),
        *_norm("norm", "Transformer/encoder_norm"),
        *_linear("pre_logits.fc", "pre_logits"),
        *_linear("head", "head"),
    ),
    last=with_positions_of("cls_token"),
    needs=("pos_embed", *BIASES, QKV_BIAS),
    aliases=((r"^(params|opt/target)/", ""),),
)


def heads(tensors: Mapping[str, Tensor]) -> int | None:
    """The number of heads, which kernels [D, H, d] show; None for other layouts."""
    return next((t.shape[1] for name, t in tensors.items() if name.endswith("query/kernel") and t.dim() == 3), None)
