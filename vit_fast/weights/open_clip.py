"""open_clip's vision tower, which is OpenAI's, and its tower of timm's."""

from vit_fast.weights.layout import (
    BIASES,
    QKV_BIAS,
    TABLE,
    TOKEN,
    TOKENS,
    TRANSPOSED,
    Layout,
    Rule,
    with_positions_of,
)
from vit_fast.weights.timm import NAMES

_BLOCK = "transformer.resblocks.{i}."
# The text towers beside it. Its own names are the tower's too, so that they count outside the prefix alone.
_TEXT = (
    *("/logit_scale", "/logit_bias", "/text_projection", "/text.*", "/text_decoder.*", "/attn_mask"),
    *("/token_embedding.*", "/positional_embedding", "/transformer.resblocks.*", "/ln_final.*"),
)

OPEN_CLIP = Layout(
    "open_clip",
    (
        Rule("cls_token", "class_embedding", TOKEN),
        Rule("pos_embed", "positional_embedding", TABLE),
        Rule("patch_embed.proj.weight", "conv1.weight"),
        Rule("norm_pre.{p}", "ln_pre.{p}"),
        Rule("blocks.{i}.norm1.{p}", _BLOCK + "ln_1.{p}"),
        Rule("blocks.{i}.attn.qkv.{p}", _BLOCK + "attn.in_proj_{p}"),
        Rule("blocks.{i}.attn.proj.{p}", _BLOCK + "attn.out_proj.{p}"),
        Rule("blocks.{i}.ls1.gamma", _BLOCK + "ls_1.gamma"),
        Rule("blocks.{i}.norm2.{p}", _BLOCK + "ln_2.{p}"),
        Rule("blocks.{i}.mlp.fc1.{p}", _BLOCK + "mlp.c_fc.{p}"),
        Rule("blocks.{i}.mlp.fc2.{p}", _BLOCK + "mlp.c_proj.{p}"),
        Rule("blocks.{i}.ls2.gamma", _BLOCK + "ls_2.gamma"),
        Rule("norm.{p}", "ln_post.{p}"),
        Rule("head.weight", "proj", TRANSPOSED),
    ),
    last=with_positions_of("cls_token"),
    prefix="visual.",
    dropped=_TEXT,
    without_bias=("head", "patch_embed.proj"),
    needs=(*TOKENS, *BIASES, QKV_BIAS),
)

OPEN_CLIP_TIMM = Layout(
    "open_clip with a tower of timm's",
    (
        *(Rule(name, name) for name in NAMES),  # their head, too, where it is what projects
        Rule("head.{p}", "/visual.head.proj.{p}"),
    ),
    prefix="visual.trunk.",
    needs=(),
    dropped=_TEXT,
    without_bias=("head",),
)
