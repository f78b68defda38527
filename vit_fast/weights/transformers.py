"""transformers: ViT, ViT-MAE, DeiT, I-JEPA, DINOv2 with and without registers, CLIP's and SigLIP's vision towers.

The tables have the names that its files have. Those that version 5 has in memory are other spellings of them.
"""

from typing import Any

from vit_fast.weights.layout import (
    BIASES,
    QKV_BIAS,
    TABLE,
    TOKEN,
    TOKENS,
    Layout,
    Rule,
    fold_class_position,
    with_positions_of,
    zero_token,
)

_PARTS = ("query", "key", "value")
_TO_DISK = (
    (r"^layers\.", "encoder.layer."),
    (r"^(encoder\.layer\.\d+)\.attention\.q_proj\.", r"\1.attention.attention.query."),
    (r"^(encoder\.layer\.\d+)\.attention\.k_proj\.", r"\1.attention.attention.key."),
    (r"^(encoder\.layer\.\d+)\.attention\.v_proj\.", r"\1.attention.attention.value."),
    (r"^(encoder\.layer\.\d+)\.attention\.o_proj\.", r"\1.attention.output.dense."),
)
_MLP_TO_DISK = (
    (r"^(encoder\.layer\.\d+)\.mlp\.fc1\.", r"\1.intermediate.dense."),
    (r"^(encoder\.layer\.\d+)\.mlp\.fc2\.", r"\1.output.dense."),
)
_BLOCK = "encoder.layer.{i}."
_COMMON = (
    Rule("cls_token", "embeddings.cls_token"),
    Rule("pos_embed", "embeddings.position_embeddings"),
    Rule("patch_embed.proj.{p}", "embeddings.patch_embeddings.projection.{p}"),
    Rule("blocks.{i}.attn.qkv.{p}", tuple(f"{_BLOCK}attention.attention.{part}.{{p}}" for part in _PARTS)),
    Rule("blocks.{i}.attn.proj.{p}", _BLOCK + "attention.output.dense.{p}"),
    Rule("norm.{p}", "layernorm.{p}"),
)
_VIT = (
    *_COMMON,
    Rule("blocks.{i}.norm1.{p}", _BLOCK + "layernorm_before.{p}"),
    Rule("blocks.{i}.norm2.{p}", _BLOCK + "layernorm_after.{p}"),
    Rule("blocks.{i}.mlp.fc1.{p}", _BLOCK + "intermediate.dense.{p}"),
    Rule("blocks.{i}.mlp.fc2.{p}", _BLOCK + "output.dense.{p}"),
)
_POSITIONED = with_positions_of("cls_token")
_HEAD = Rule("head.{p}", "/classifier.{p}")
_ALL_TO_DISK = (*_TO_DISK, *_MLP_TO_DISK)

VIT = Layout(
    "transformers ViT",
    (*_VIT, _HEAD),
    prefix="vit.",
    aliases=_ALL_TO_DISK,
    dropped=("pooler.dense.*", "embeddings.mask_token", "/decoder.*"),
    last=_POSITIONED,
)
IJEPA = Layout(
    "transformers I-JEPA",
    (*_VIT, _HEAD),
    prefix="ijepa.",
    aliases=_ALL_TO_DISK,
    dropped=("pooler.dense.*", "embeddings.mask_token"),
    needs=("pos_embed", *BIASES),
)
_DEIT: dict[str, Any] = {
    **{"prefix": "deit.", "aliases": _ALL_TO_DISK},
    "dropped": ("pooler.dense.*", "embeddings.mask_token"),
}
DEIT = Layout(
    "transformers DeiT",
    (
        *_VIT,
        Rule("dist_token", "embeddings.distillation_token"),
        Rule("head.{p}", "/cls_classifier.{p}"),
        Rule("head_dist.{p}", "/distillation_classifier.{p}"),
    ),
    last=with_positions_of("cls_token", "dist_token"),
    **_DEIT,
)
# With one head nothing reads the distillation token out: it is a register.
DEIT_ONE_HEAD = Layout(
    "transformers DeiT with one head",
    (*_VIT, Rule("reg_token", "embeddings.distillation_token"), _HEAD),
    last=with_positions_of("cls_token", "reg_token"),
    **_DEIT,
)
_LAYER_SCALE = ("blocks.{i}.ls1.gamma", "blocks.{i}.ls2.gamma")
_DINOV2 = (
    *_COMMON,
    *(Rule(f"blocks.{{i}}.{name}.{{p}}", f"{_BLOCK}{name}.{{p}}") for name in ("norm1", "norm2")),
    *(Rule(name, f"{_BLOCK}layer_scale{number}.lambda1") for number, name in enumerate(_LAYER_SCALE, 1)),
    _HEAD,
)
_PLAIN_MLP = tuple(Rule(f"blocks.{{i}}.mlp.{name}.{{p}}", f"{_BLOCK}mlp.{name}.{{p}}") for name in ("fc1", "fc2"))
_GATED_MLP = (
    Rule("blocks.{i}.mlp.fc1.{p}", _BLOCK + "mlp.weights_in.{p}"),
    Rule("blocks.{i}.mlp.fc2.{p}", _BLOCK + "mlp.weights_out.{p}"),
    Rule(
        "blocks.{i}.mlp.fc1.{p}",
        (_BLOCK + "mlp.gate_proj.{p}", _BLOCK + "mlp.up_proj.{p}"),
        only_read=True,
    ),
    Rule("blocks.{i}.mlp.fc2.{p}", _BLOCK + "mlp.down_proj.{p}", only_read=True),
)


def _fold(state: dict) -> dict:
    names = {"embeddings.cls_token": "cls_token", "embeddings.position_embeddings": "pos_embed"}
    folded = fold_class_position({ours: state[theirs] for theirs, ours in names.items()})
    return {**state, **{theirs: folded[ours] for theirs, ours in names.items()}}


def _dinov2(gated: bool, registers: bool) -> Layout:
    return Layout(
        "transformers DINOv2" + " with registers" * registers + " with SwiGLU" * gated,
        (
            *_DINOV2,
            *(_GATED_MLP if gated else _PLAIN_MLP),
            *((Rule("reg_token", "embeddings.register_tokens"),) if registers else ()),
        ),
        prefix="dinov2_with_registers." if registers else "dinov2.",
        aliases=_TO_DISK,
        dropped=("embeddings.mask_token",),
        made={"embeddings.mask_token": zero_token},
        first=_fold if registers else None,
        last=_POSITIONED,
        needs=(*TOKENS, *BIASES, *_LAYER_SCALE),
    )


# By whether it has registers, and whether its MLP is gated.
DINOV2 = {(registers, gated): _dinov2(gated, registers) for registers in (False, True) for gated in (False, True)}
_TOWER = "encoder.layers.{i}."
_TOWERS = (
    Rule("patch_embed.proj.{p}", "embeddings.patch_embedding.{p}"),
    Rule("pos_embed", "embeddings.position_embedding.weight", TABLE),
    Rule("blocks.{i}.norm1.{p}", _TOWER + "layer_norm1.{p}"),
    Rule("blocks.{i}.attn.qkv.{p}", tuple(f"{_TOWER}self_attn.{part}_proj.{{p}}" for part in "qkv")),
    Rule("blocks.{i}.attn.proj.{p}", _TOWER + "self_attn.out_proj.{p}"),
    Rule("blocks.{i}.norm2.{p}", _TOWER + "layer_norm2.{p}"),
    *(Rule(f"blocks.{{i}}.mlp.{name}.{{p}}", f"{_TOWER}mlp.{name}.{{p}}") for name in ("fc1", "fc2")),
    Rule("norm.{p}", "post_layernorm.{p}"),
)
_DROPPED = ("/text_model.*", "/text_projection.weight", "/logit_scale", "/logit_bias", "embeddings.position_ids")
CLIP = Layout(
    "transformers CLIP",
    (
        *_TOWERS,
        Rule("cls_token", "embeddings.class_embedding", TOKEN),
        Rule("norm_pre.{p}", "pre_layrnorm.{p}"),
        Rule("head.weight", "/visual_projection.weight"),
    ),
    prefix="vision_model.",
    dropped=_DROPPED,
    without_bias=("head",),
    last=_POSITIONED,
    needs=(*TOKENS, *BIASES, QKV_BIAS),
)
SIGLIP = Layout(
    "transformers SigLIP",
    (
        *_TOWERS,
        Rule("attn_pool.latent", "head.probe"),
        Rule(("attn_pool.q.{p}", "attn_pool.kv.{p}"), "head.attention.in_proj_{p}", shares=(1, 2)),
        Rule("attn_pool.proj.{p}", "head.attention.out_proj.{p}"),
        Rule("attn_pool.norm.{p}", "head.layernorm.{p}"),
        *(Rule(f"attn_pool.mlp.{name}.{{p}}", f"head.mlp.{name}.{{p}}") for name in ("fc1", "fc2")),
    ),
    prefix="vision_model.",
    dropped=_DROPPED,
    needs=("pos_embed", *BIASES, QKV_BIAS),
)
