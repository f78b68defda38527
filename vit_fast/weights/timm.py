"""timm's names, which are ours; DeiT, DINO and MAE of their own repositories have them too."""

from vit_fast.weights.layout import Layout, Rule

_BLOCK = (
    *("norm1.{p}", "attn.qkv.{p}", "attn.q_norm.{p}", "attn.k_norm.{p}", "attn.norm.{p}", "attn.proj.{p}"),
    *("ls1.gamma", "norm2.{p}", "mlp.fc1.{p}", "mlp.norm.{p}", "mlp.fc2.{p}", "ls2.gamma"),
)
_POOL = ("latent", "q.{p}", "kv.{p}", "proj.{p}", "norm.{p}", "mlp.fc1.{p}", "mlp.fc2.{p}")
NAMES = (
    *("cls_token", "dist_token", "reg_token", "pos_embed", "patch_embed.proj.{p}", "patch_embed.norm.{p}"),
    *("norm_pre.{p}", *(f"blocks.{{i}}.{name}" for name in _BLOCK), "norm.{p}", "fc_norm.{p}"),
    *(f"attn_pool.{name}" for name in _POOL),
    *("pre_logits.fc.{p}", "head.{p}", "head_dist.{p}"),
)

TIMM = Layout(
    "timm",
    tuple(Rule(name, name) for name in NAMES),
    # DINO's checkpoints hold the backbone and a head; MAE's hold the decoder, and both a token for what is masked.
    aliases=((r"^backbone\.", ""), (r"^head\.(mlp|last_layer)\.", r"dino_head.\1.")),
    dropped=("mask_token", "decoder_*", "dino_head.*"),
    needs=(),
)
