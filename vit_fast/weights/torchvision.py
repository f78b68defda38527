"""torchvision's vit_*, as they are named now and as they were before 0.14."""

from vit_fast.weights.layout import BIASES, QKV_BIAS, TOKENS, Layout, Rule, with_positions_of

_BLOCK = "encoder.layers.encoder_layer_{i}."

TORCHVISION = Layout(
    "torchvision",
    (
        Rule("cls_token", "class_token"),
        Rule("pos_embed", "encoder.pos_embedding"),
        Rule("patch_embed.proj.{p}", "conv_proj.{p}"),
        Rule("blocks.{i}.norm1.{p}", _BLOCK + "ln_1.{p}"),
        Rule("blocks.{i}.attn.qkv.{p}", _BLOCK + "self_attention.in_proj_{p}"),
        Rule("blocks.{i}.attn.proj.{p}", _BLOCK + "self_attention.out_proj.{p}"),
        Rule("blocks.{i}.norm2.{p}", _BLOCK + "ln_2.{p}"),
        Rule("blocks.{i}.mlp.fc1.{p}", _BLOCK + "mlp.0.{p}"),
        Rule("blocks.{i}.mlp.fc2.{p}", _BLOCK + "mlp.3.{p}"),
        Rule("norm.{p}", "encoder.ln.{p}"),
        Rule("pre_logits.fc.{p}", "heads.pre_logits.{p}"),
        Rule("head.{p}", "heads.head.{p}"),
    ),
    last=with_positions_of("cls_token"),
    needs=(*TOKENS, *BIASES, QKV_BIAS),
    aliases=((r"mlp\.linear_1\.", "mlp.0."), (r"mlp\.linear_2\.", "mlp.3.")),
)
