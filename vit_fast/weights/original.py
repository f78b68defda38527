"""DINOv2's own repository: timm's names but for registers, SwiGLU and blocks in chunks (blocks.0.3.norm1)."""

from vit_fast.weights.layout import TOKENS, Layout, Rule, fold_class_position, with_positions_of, zero_token
from vit_fast.weights.timm import NAMES

_NOT_THEIRS = (
    *("attn_pool", "dist_token", "fc_norm", "head_dist", "norm_pre", "pre_logits"),
    *(f"blocks.{{i}}.{name}" for name in ("attn.q_norm", "attn.k_norm", "attn.norm", "mlp.norm")),
)
_OTHERS = {
    "reg_token": "register_tokens",
    "blocks.{i}.mlp.fc1.{p}": "blocks.{i}.mlp.w12.{p}",
    "blocks.{i}.mlp.fc2.{p}": "blocks.{i}.mlp.w3.{p}",
}


def _first(state: dict) -> dict:
    return fold_class_position(state) if "register_tokens" in state else state


def _layout(name: str, gated: bool) -> Layout:
    others = _OTHERS if gated else {"reg_token": "register_tokens"}
    return Layout(
        name,
        tuple(Rule(ours, others.get(ours, ours)) for ours in NAMES if not ours.startswith(_NOT_THEIRS)),
        aliases=((r"^blocks\.\d+\.(\d+)\.", r"blocks.\1."),),
        dropped=("mask_token",),
        made={"mask_token": zero_token},
        first=_first,
        last=with_positions_of("cls_token"),
        needs=TOKENS,  # each of its biases is an argument
    )


DINOV2 = _layout("dinov2", False)
DINOV2_GATED = _layout("dinov2 with SwiGLU", True)
