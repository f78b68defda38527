"""Weights of other libraries: their models against ours from the converted weights, both ways, and what is refused.

Where a library cannot be installed its published names are written down here, apart from the tables under test.
"""

import copy
import functools
import json
import os
import shlex
from pathlib import Path

import numpy as np
import open_clip
import pytest
import safetensors.torch
import timm
import torch
import torchvision
import transformers as hf
from torch import Tensor, nn
from typer.testing import CliRunner

import vit_fast
from tests.error_rule import relative_error
from tests.small_runs import drawn, equal_states
from vit_fast import cli, pretrained, weights
from vit_fast.positions import resample_positions
from vit_fast.weights import settings

SIZES = {
    **{"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128},
    **{"image_size": 32, "patch_size": 8},
}
LABELS = {"num_labels": 5}
TEXT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 50}
TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 1}
CLOSE = 2e-5


def images() -> Tensor:
    return torch.randn(2, 3, 32, 32)


# ---- transformers

TRANSFORMERS = {
    "ViT": lambda: hf.ViTForImageClassification(hf.ViTConfig(**SIZES, **LABELS)),
    "ViT without a head": lambda: hf.ViTModel(hf.ViTConfig(**SIZES)),
    "ViT-MAE": lambda: hf.ViTMAEModel(hf.ViTMAEConfig(**SIZES, mask_ratio=0.0)),
    "DeiT, two heads": lambda: hf.DeiTForImageClassificationWithTeacher(hf.DeiTConfig(**SIZES, **LABELS)),
    "DeiT, one head": lambda: hf.DeiTForImageClassification(hf.DeiTConfig(**SIZES, **LABELS)),
    "I-JEPA": lambda: hf.IJepaForImageClassification(hf.IJepaConfig(**SIZES, **LABELS)),
    "DINOv2": lambda: hf.Dinov2ForImageClassification(hf.Dinov2Config(**SIZES, **LABELS)),
    "DINOv2, SwiGLU": lambda: hf.Dinov2ForImageClassification(
        hf.Dinov2Config(**SIZES, **LABELS, use_swiglu_ffn=True, hidden_act="silu")
    ),
    "DINOv2, registers": lambda: hf.Dinov2WithRegistersForImageClassification(
        hf.Dinov2WithRegistersConfig(**SIZES, **LABELS)
    ),
    "CLIP": lambda: hf.CLIPVisionModelWithProjection(hf.CLIPVisionConfig(**SIZES, projection_dim=24)),
    "SigLIP": lambda: hf.SiglipVisionModel(hf.SiglipVisionConfig(**SIZES)),
}


def _answer(model: nn.Module, x: Tensor) -> tuple[Tensor, bool]:
    """What a model of transformers says of images, and whether those are logits or tokens."""
    if isinstance(model, hf.ViTMAEModel):
        return model(x, noise=torch.arange(16.0).expand(len(x), -1)).last_hidden_state, False
    output = model(pixel_values=x)
    for name in ("logits", "image_embeds"):
        if hasattr(output, name):
            return output[name], True
    return (output.pooler_output, True) if isinstance(model, hf.SiglipVisionModel) else (output[0], False)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers_there_and_back(name, tmp_path):
    theirs, x = drawn(TRANSFORMERS[name]()), images()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = vit_fast.load(tmp_path / "theirs")
    expected, logits = _answer(theirs, x)
    assert relative_error(ours(x) if logits else ours.forward_features(x), expected) < CLOSE

    in_memory, _ = weights.to_ours(theirs.state_dict())
    on_disk = safetensors.torch.load_file(tmp_path / "theirs" / "model.safetensors")
    assert equal_states(in_memory, weights.to_ours(on_disk)[0])

    # Fresh numbers of ours, back into their class.
    drawn(ours)
    if name == "CLIP":  # whose projection has no bias
        nn.init.zeros_(ours.head.bias)
    written = weights.convert(ours.state_dict(), "hf")
    assert equal_states(weights.to_ours(written)[0], ours.state_dict())
    safetensors.torch.save_file(written, tmp_path / "theirs" / "model.safetensors", {"format": "pt"})
    again, report = type(theirs).from_pretrained(tmp_path / "theirs", output_loading_info=True)
    assert not report["unexpected_keys"]
    assert {key.split(".")[0] for key in report["missing_keys"]} <= {"pooler"}
    expected, logits = _answer(again.eval(), x)
    assert relative_error(ours(x) if logits else ours.forward_features(x), expected) < CLOSE


def test_the_vision_tower_of_a_whole_clip(tmp_path):
    theirs = drawn(hf.CLIPModel(hf.CLIPConfig(vision_config=SIZES, text_config=TEXT, projection_dim=24)))
    theirs.save_pretrained(tmp_path)
    x = images()
    ours, expected = vit_fast.load(tmp_path), theirs.get_image_features(pixel_values=x)
    expected = expected if isinstance(expected, Tensor) else expected.pooler_output
    assert relative_error(ours(x), expected) < CLOSE
    assert any("text_model" in name for name in weights.to_ours(theirs.state_dict())[1].dropped)


def test_a_siglip_without_its_pool(tmp_path):
    theirs, x = drawn(hf.SiglipVisionModel(hf.SiglipVisionConfig(**SIZES, vision_use_head=False))), images()
    theirs.save_pretrained(tmp_path)
    ours = vit_fast.load(tmp_path)
    assert relative_error(ours(x), theirs(x).last_hidden_state) < CLOSE
    ours.save_pretrained(tmp_path)
    assert torch.equal(vit_fast.load(tmp_path)(x), ours(x))


def test_an_index_of_positions_is_dropped(tmp_path):
    theirs = drawn(TRANSFORMERS["CLIP"]())
    theirs.save_pretrained(tmp_path)
    state = safetensors.torch.load_file(tmp_path / "model.safetensors")
    state["vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    safetensors.torch.save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    x = images()
    assert relative_error(vit_fast.load(tmp_path)(x), theirs(x).image_embeds) < CLOSE


def test_settings_come_with_the_weights(tmp_path):
    config = hf.Dinov2Config(**SIZES, layer_norm_eps=3e-5, num_labels=2, id2label={0: "cat", 1: "dog"})
    drawn(hf.Dinov2ForImageClassification(config)).save_pretrained(tmp_path)
    processor = hf.BitImageProcessor(size={"shortest_edge": 40}, crop_size=32, resample=2, image_mean=[0.1, 0.2, 0.3])
    processor.save_pretrained(tmp_path)
    ours = vit_fast.load(tmp_path)
    assert ours.blocks[0].norm1.eps == ours.norm.eps == 3e-5
    assert ours.label_names == ("cat", "dog")
    assert ours.pretrained_cfg["mean"] == (0.1, 0.2, 0.3)
    assert ours.pretrained_cfg["interpolation"] == "bilinear"
    assert (ours.pretrained_cfg["crop_pct"], ours.pretrained_cfg["crop_mode"]) == (0.8, "center")
    hf.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    assert vit_fast.load(tmp_path).pretrained_cfg["crop_mode"] == "squash"


@pytest.mark.parametrize("name", ["ViT", "DINOv2", "DINOv2, registers"])
def test_positions_are_resampled_as_the_library_does_it(name, tmp_path):
    theirs = drawn(TRANSFORMERS[name]())
    theirs.save_pretrained(tmp_path)
    ours, x = vit_fast.load(tmp_path), torch.randn(2, 3, 48, 40)
    ours.set_input_size(img_size=(48, 40))
    more = {"interpolate_pos_encoding": True} if name == "ViT" else {}
    assert relative_error(ours(x), theirs(x, **more).logits) < CLOSE


def test_positions_as_dinov2s_own_repository_resamples_them():
    table = torch.randn(1, 1 + 16, 8)
    resampled = resample_positions(table, (6, 5), (4, 4), 1, "offset")
    image = table[:, 1:].reshape(1, 4, 4, 8).permute(0, 3, 1, 2)
    image = nn.functional.interpolate(image, scale_factor=(6.1 / 4, 5.1 / 4), mode="bicubic")
    assert torch.equal(resampled[:, 1:], image.permute(0, 2, 3, 1).reshape(1, 30, 8))
    assert torch.equal(resampled[:, :1], table[:, :1])


# ---- torchvision, open_clip, timm


def test_torchvision_there_and_back(tmp_path):
    theirs, x = drawn(torchvision.models.VisionTransformer(32, 8, 2, 1, 64, 128, num_classes=5)), images()
    safetensors.torch.save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    ours = vit_fast.load(tmp_path / "model.safetensors")
    assert relative_error(ours(x), theirs(x)) < CLOSE
    old = {name.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2."): t for name, t in _of(theirs)}
    assert equal_states(weights.to_ours(old)[0], weights.to_ours(theirs.state_dict())[0])
    theirs.load_state_dict(weights.convert(drawn(ours).state_dict(), "torchvision"))
    assert relative_error(ours(x), theirs(x)) < CLOSE


def _of(model: nn.Module):
    return model.state_dict().items()


@pytest.mark.parametrize("layer_scale", [None, 0.5])
def test_open_clip_there_and_back(layer_scale, tmp_path):
    vision = open_clip.model.CLIPVisionCfg(
        layers=2, width=64, head_width=64, patch_size=8, image_size=32, ls_init_value=layer_scale
    )
    text = open_clip.model.CLIPTextCfg(context_length=8, vocab_size=50, width=32, heads=2, layers=1)
    theirs, x = drawn(open_clip.model.CLIP(24, vision, text, quick_gelu=True)), images()
    ours = vit_fast.create_model(
        "vit_base_patch16_clip_quickgelu_224", num_classes=24, **TINY, init_values=layer_scale, class_token=True
    ).eval()
    for state in (theirs.state_dict(), theirs.visual.state_dict()):  # the tower beside that of text, and alone
        ours.load_state_dict(weights.convert(state, "timm"))
        assert relative_error(ours(x), theirs.encode_image(x)) < CLOSE
    with torch.no_grad():
        drawn(ours).head.bias.zero_()
    theirs.load_state_dict(weights.convert(ours.state_dict(), "open_clip"), strict=False)
    assert relative_error(ours(x), theirs.encode_image(x)) < CLOSE


OPEN_CLIP = {"layers": 2, "width": 64, "head_width": 16, "patch_size": 8, "image_size": 32}
OPEN_CLIP_TEXT = {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 2, "layers": 1}


def _open_clip(vision: dict, **more) -> nn.Module:
    return drawn(open_clip.model.CLIP(24, dict(vision), dict(OPEN_CLIP_TEXT), **more))


@pytest.mark.parametrize("part", ["qk_norm", "scale_heads", "scale_attn", "scale_attn_inner", "scale_fc"])
def test_a_part_of_open_clips_tower_is_never_taken_for_text(part):
    """Whose names, without the prefix, are those of the text tower."""
    theirs = _open_clip({**OPEN_CLIP, part: True})
    with pytest.raises(ValueError, match=r"left over: visual\.transformer\.resblocks\.0\."):
        weights.to_ours(theirs.state_dict())
    with pytest.raises(ValueError, match=r"left over: transformer\.resblocks\.0\."):
        weights.to_ours(theirs.visual.state_dict())


def test_a_stray_weight_in_open_clips_tower():
    state = _open_clip(OPEN_CLIP).state_dict()
    dropped = weights.to_ours(state)[1].dropped
    assert all(not name.startswith("visual.") for name in dropped)
    assert "transformer.resblocks.0.attn.in_proj_weight" in dropped
    stray = "visual.transformer.resblocks.0.attn.out_proj.lora_A"
    with pytest.raises(ValueError, match=f"1 left over: {stray}"):
        weights.to_ours({**state, stray: torch.ones(1)})


def test_a_head_with_a_bias_has_no_place_in_open_clip():
    ours = drawn(vit_fast.create_model("vit_base_patch16_clip_quickgelu_224", num_classes=24, **TINY))
    with pytest.raises(ValueError, match=r"1 left over: head\.bias"):
        weights.convert(ours.state_dict(), "open_clip")


def test_open_clips_tower_of_timms():
    trunk = drawn(timm.create_model("vit_tiny_patch16_224", num_classes=0, **TINY))
    state = {f"visual.trunk.{name}": tensor for name, tensor in _of(trunk)}
    projection = torch.randn(24, 64)
    state |= {"visual.head.proj.weight": projection, "logit_scale": torch.ones(()), "text.x": torch.ones(1)}
    found, coverage = weights.to_ours(state)
    assert equal_states(found, {**trunk.state_dict(), "head.weight": projection, "head.bias": torch.zeros(24)})
    assert coverage.dropped == ["logit_scale", "text.x"]


TIMM = {
    "plain": ("vit_tiny_patch16_224", {}),
    "LayerScale": ("deit3_small_patch16_224", {"no_embed_class": False}),
    "two heads": ("deit_tiny_distilled_patch16_224", {}),
    "registers": ("vit_small_patch14_reg4_dinov2", {}),
    "SwiGLU": ("vit_giant_patch14_dinov2", {"embed_dim": 48}),
    "CLIP": ("vit_base_patch16_clip_quickgelu_224", {}),
    "attention pool": ("vit_base_patch16_siglip_224", {}),
    "norm behind the pool": ("vit_base_patch16_224", {"global_pool": "avg"}),
    "norms inside": ("beit3_base_patch16_224", {}),
    "norm of patches": ("vit_tiny_patch16_224", {"embed_norm_layer": "layernorm"}),
    "norm of patches, CLIP": ("vit_base_patch16_clip_quickgelu_224", {"embed_norm_layer": "layernorm"}),
    "qk norm, no bias": ("vit_tiny_patch16_224", {"qk_norm": True, "qkv_bias": False, "num_heads": 2}),
}


@pytest.mark.parametrize("name", TIMM)
def test_save_pretrained_and_load(name, tmp_path):
    """Through the folder to the same model of ours; timm, too, builds it from there."""
    architecture, more = TIMM[name]
    model = drawn(vit_fast.create_model(architecture, num_classes=5, **{**TINY, **more}))
    model.label_names = tuple("abcde")
    model.save_pretrained(tmp_path)
    again, x = vit_fast.VisionTransformer.from_pretrained(tmp_path), images()
    assert torch.equal(again(x), model(x))
    assert again.label_names == model.label_names
    pictures = {name: value for name, value in model.pretrained_cfg.items() if name != "input_size"}
    assert again.pretrained_cfg == {**pictures, "input_size": (3, 32, 32)}
    theirs = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert relative_error(theirs(x), model(x)) < CLOSE
    # Our config names the layers that other classes, and pictures of another kind, change.
    theirs = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=3, in_chans=1).eval()
    assert theirs(x[:, :1]).shape == (len(x), 3)
    assert torch.equal(theirs.state_dict()["blocks.0.mlp.fc1.bias"], model.blocks[0].mlp.fc1.bias)


@pytest.mark.parametrize("change", ["pool", "pool of a map", "no fc_norm", "no norm", "pruned"])
def test_a_model_that_was_changed_is_saved_as_it_is(change, tmp_path):
    """Where the final norm stands goes by the pool that a model was built with, not by the one that it has."""
    more = {
        "pool of a map": {"global_pool": "map", "class_token": False},
        "no fc_norm": {"global_pool": "avg", "fc_norm": False},
        "no norm": {"final_norm": False},
    }
    model = drawn(vit_fast.create_model("vit_tiny_patch16_224", num_classes=3, **TINY, **more.get(change, {})))
    if change.startswith("pool"):
        model.reset_classifier(5, "avg")
    if change == "pruned":
        model.prune_intermediate_layers([0], prune_norm=True)
    drawn(model).save_pretrained(tmp_path)
    x = images()
    assert torch.equal(vit_fast.load(tmp_path)(x), model(x))
    theirs = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert relative_error(theirs(x), model(x)) < CLOSE


def _scaled(model):
    model.blocks[1].attn.fused_attn = False
    model.blocks[1].attn.scale *= 3


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda model: setattr(model.norm, "eps", 1e-3), "norm.eps is not what its settings say"),
        (lambda model: setattr(model.patch_embed, "norm", nn.LayerNorm(64)), "patch_embed.norm.eps is not what its"),
        (lambda model: setattr(model.blocks[0].mlp, "act", nn.ReLU()), "'ReLU' object has no attribute 'approximate'"),
        (lambda model: setattr(model.blocks[1].mlp, "act", nn.ReLU()), "'ReLU' object has no attribute 'approximate'"),
        (lambda model: setattr(model.blocks[1].mlp, "act", nn.GELU("tanh")), "blocks.1 is not set as blocks.0 is"),
        (_scaled, "attn.scale is not that of the head width"),
        (lambda model: setattr(model, "head", nn.Linear(64, 7, bias=False)), "head.bias is not what its settings say"),
        (lambda model: setattr(model, "norm", nn.RMSNorm(64)), "norm.weight is not what its settings say"),
    ],
)
def test_what_no_config_tells_of_is_not_saved(tmp_path, change, says):
    model = vit_fast.create_model("vit_tiny_patch16_224", num_classes=3, **TINY)
    change(model)
    with pytest.raises(ValueError, match=f"a part is somebody's own, for which config.json has no word .{says}"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_model_without_a_block_is_not_saved(tmp_path):
    model = vit_fast.create_model("vit_tiny_patch16_224", num_classes=3, **{**TINY, "depth": 0})
    with pytest.raises(ValueError, match="depth: got 0, a checkpoint takes a model of one block or more"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


# Which of them which layout has no names for: anything else converts, and a refusal there is a fault.
NO_PLACE = {
    *((name, "open_clip") for name in TIMM),  # all have a bias in the patch projection or in the head
    *((name, to) for name in ("LayerScale", "two heads", "registers", "SwiGLU") for to in ("torchvision", "jax")),
    *((name, "dinov2") for name in ("two heads", "CLIP", "attention pool", "norm behind the pool")),
    *((name, to) for name in ("CLIP", "attention pool", "norm behind the pool") for to in ("hf", "torchvision", "jax")),
    *((name, to) for name in ("norms inside", "qk norm, no bias") for to in ("hf", "torchvision", "dinov2", "jax")),
    *((name, to) for name in TIMM if name.startswith("norm of patches") for to in ("hf", "torchvision", "jax")),
    ("norm of patches, CLIP", "dinov2"),
}


@pytest.mark.parametrize("to", weights.TARGETS)
@pytest.mark.parametrize("name", TIMM)
def test_a_round_trip_is_exact_or_refused(name, to):
    architecture, more = TIMM[name]
    state = drawn(vit_fast.create_model(architecture, num_classes=5, **{**TINY, **more})).state_dict()
    state = {key: tensor.bfloat16() for key, tensor in state.items()}
    heads = more.get("num_heads", 1)
    if (name, to) in NO_PLACE:
        with pytest.raises(ValueError, match=r"left over|MLP has gates"):
            weights.convert(state, to, num_heads=heads)
        return
    there = weights.convert(state, to, num_heads=heads)
    assert {tensor.dtype for tensor in there.values()} == {torch.bfloat16}
    assert equal_states(weights.convert(there, "timm"), state)


_GAP = {"class_token": False, "global_pool": "avg", "fc_norm": False}


@pytest.mark.parametrize(
    ("more", "to", "says"),
    [
        ({"mlp_layer": "swiglu", "act_layer": "silu"}, "hf", r"SwiGLU: .* missing: blocks\.0\.ls1\.gamma"),
        (
            {"mlp_layer": "swiglu", "act_layer": "silu"},
            "torchvision",
            r"MLP has gates \(SwiGLU\), for which 'torchvision' has no names",
        ),
        ({"mlp_layer": "swiglu", "act_layer": "silu"}, "jax", "MLP has gates"),
        ({"mlp_layer": "swiglu", "act_layer": "silu", "pre_norm": True}, "open_clip", "MLP has gates"),
        ({"qkv_bias": False}, "torchvision", r"missing: blocks\.0\.attn\.qkv\.bias"),
        ({"qkv_bias": False}, "jax", r"missing: blocks\.0\.attn\.qkv\.bias"),
        ({"qkv_bias": False, "pre_norm": True}, "hf", r"CLIP: .* missing: blocks\.0\.attn\.qkv\.bias"),
        *(({"proj_bias": False}, to, r"missing: blocks\.0\.attn\.proj\.bias") for to in ("hf", "torchvision", "jax")),
        ({"proj_bias": False, "pre_norm": True}, "open_clip", r"missing: blocks\.0\.attn\.proj\.bias"),
        *(({"pos_embed": "none"}, to, "1 missing: pos_embed") for to in ("hf", "torchvision", "dinov2", "jax")),
        (_GAP, "torchvision", "1 missing: cls_token"),
        (_GAP, "dinov2", "1 missing: cls_token"),
        ({"reg_tokens": 2}, "hf", r"got 19 positions beside registers, takes a square number"),
        ({"reg_tokens": 2, "no_embed_class": True}, "hf", r"registers: .* missing: blocks\.0\.ls1\.gamma"),
        ({"reg_tokens": 4, "init_values": 1.0}, "hf", "got 21 positions beside registers"),
        ({"reg_tokens": 4}, "dinov2", "got 21 positions beside registers"),
        ({"qk_norm": True}, "dinov2", r"left over: blocks\.0\.attn\.q_norm\.weight"),
    ],
)
def test_what_the_other_library_has_not_is_not_written(more, to, says):
    model = vit_fast.create_model("vit_tiny_patch16_224", num_classes=0, **{**TINY, **more})
    with pytest.raises(ValueError, match=says):
        weights.convert(model.state_dict(), to)


def test_two_tensors_for_one_place():
    """By two spellings of a library's own: of which one would be lost."""
    state = drawn(vit_fast.create_model("vit_giant_patch14_dinov2", **{**TINY, "embed_dim": 48})).state_dict()
    there = weights.convert(state, "hf")
    block = "dinov2.encoder.layer.0.mlp."
    there[block + "down_proj.weight"] = there[block + "weights_out.weight"]
    with pytest.raises(ValueError, match=r"blocks\.0\.mlp\.fc2\.weight is there twice"):
        weights.convert(there, "timm")


@pytest.mark.parametrize("to", ["hf", "torchvision", "dinov2", "jax"])
def test_a_class_token_without_a_position_gets_one_of_zero(to):
    """Other libraries have a row for it in the table of positions; ours may not."""
    model = drawn(vit_fast.create_model("vit_tiny_patch16_224", num_classes=5, **TINY, no_embed_class=True))
    same = vit_fast.create_model("vit_tiny_patch16_224", num_classes=5, **TINY).eval()
    same.load_state_dict(weights.convert(weights.convert(model.state_dict(), to), "timm"))
    x = images()
    assert torch.equal(same(x), model(x))


# ---- layouts without a library: their published names


def _published_dinov2(state: dict, gated: bool, chunks: bool) -> dict:
    """facebookresearch/dinov2: register_tokens, a class position in pos_embed, w12 and w3, blocks in chunks."""
    found = {}
    for name, tensor in state.items():
        if gated:
            name = name.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3")
        if chunks and name.startswith("blocks."):
            name = name.replace("blocks.", "blocks.0.", 1)
        found[name.replace("reg_token", "register_tokens")] = tensor
    return found | {"mask_token": torch.randn(1, 64)}


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("chunks", [False, True])
def test_dinov2s_own_names(gated, chunks):
    name = "vit_giant_patch14_dinov2" if gated else "vit_small_patch14_dinov2"
    sizes = {**TINY, "embed_dim": 64, "mlp_ratio": 4.0}
    model = drawn(timm.create_model(name, **sizes))
    published = _published_dinov2(model.state_dict(), gated, chunks)
    assert equal_states(weights.convert(published, "timm"), model.state_dict())
    written = weights.convert(model.state_dict(), "dinov2")
    expected = _published_dinov2(model.state_dict(), gated, False)
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[key], expected[key]) for key in written if key != "mask_token")


def test_dinov2s_registers_bring_the_position_of_the_class_token():
    """In the original the class token has a position and the registers have none; timm has it in the token."""
    model, x = drawn(timm.create_model("vit_small_patch14_reg4_dinov2", **TINY)), images()
    expected = model(x)
    published = _published_dinov2(model.state_dict(), False, False)
    shift = torch.randn(1, 1, 64)
    published["pos_embed"] = torch.cat([shift, published["pos_embed"]], dim=1)
    published["cls_token"] = published["cls_token"] - shift
    model.load_state_dict(weights.convert(published, "timm"))
    assert relative_error(model(x), expected) < CLOSE


def test_dinos_checkpoint_of_a_wrapped_teacher():
    model = drawn(timm.create_model("vit_tiny_patch16_224", num_classes=0, **TINY))
    published = {f"module.backbone.{name}": tensor for name, tensor in _of(model)}
    published |= {"module.head.mlp.0.weight": torch.randn(4, 64), "module.head.last_layer.weight_v": torch.randn(4, 4)}
    assert equal_states(weights.convert(published, "timm"), model.state_dict())


def test_maes_own_names():
    model = drawn(timm.create_model("vit_tiny_patch16_224", num_classes=0, **TINY))
    decoder = ("mask_token", "decoder_pos_embed", "decoder_embed.weight", "decoder_blocks.0.attn.qkv.weight")
    published = {**model.state_dict(), **{name: torch.randn(3) for name in (*decoder, "decoder_pred.bias")}}
    found, coverage = weights.to_ours(published)
    assert equal_states(found, model.state_dict())
    assert len(coverage.dropped) == 5


def _published_jax(state: dict, heads: int) -> dict[str, np.ndarray]:
    """google-research/vision_transformer, flax's names and shapes."""
    found = {
        "cls": state["cls_token"],
        "embedding/kernel": state["patch_embed.proj.weight"].permute(2, 3, 1, 0),
        "embedding/bias": state["patch_embed.proj.bias"],
        "Transformer/posembed_input/pos_embedding": state["pos_embed"],
        "Transformer/encoder_norm/scale": state["norm.weight"],
        "Transformer/encoder_norm/bias": state["norm.bias"],
        "head/kernel": state["head.weight"].T,
        "head/bias": state["head.bias"],
    }
    for index in range(2):
        block, ours = f"Transformer/encoderblock_{index}", f"blocks.{index}"
        for theirs, name in (("LayerNorm_0", "norm1"), ("LayerNorm_2", "norm2")):
            found[f"{block}/{theirs}/scale"] = state[f"{ours}.{name}.weight"]
            found[f"{block}/{theirs}/bias"] = state[f"{ours}.{name}.bias"]
        attention = f"{block}/MultiHeadDotProductAttention_1"
        weight, bias = state[f"{ours}.attn.qkv.weight"], state[f"{ours}.attn.qkv.bias"]
        for part, w, b in zip(("query", "key", "value"), weight.chunk(3), bias.chunk(3)):
            found[f"{attention}/{part}/kernel"] = w.T.reshape(len(w), heads, -1)
            found[f"{attention}/{part}/bias"] = b.reshape(heads, -1)
        w = state[f"{ours}.attn.proj.weight"]
        found[f"{attention}/out/kernel"] = w.T.reshape(heads, -1, len(w))
        found[f"{attention}/out/bias"] = state[f"{ours}.attn.proj.bias"]
        for theirs, name in (("Dense_0", "fc1"), ("Dense_1", "fc2")):
            found[f"{block}/MlpBlock_3/{theirs}/kernel"] = state[f"{ours}.mlp.{name}.weight"].T
            found[f"{block}/MlpBlock_3/{theirs}/bias"] = state[f"{ours}.mlp.{name}.bias"]
    return {name: tensor.contiguous().numpy() for name, tensor in found.items()}


def test_google_researchs_npz(tmp_path):
    sizes = {**TINY, "num_heads": 2}
    theirs, x = drawn(timm.create_model("vit_tiny_patch16_224", num_classes=5, **sizes)), images()
    published = _published_jax(theirs.state_dict(), heads=2)
    np.savez(tmp_path / "theirs.npz", **published)
    ours = vit_fast.load(tmp_path / "theirs.npz", num_heads=2)
    assert relative_error(ours(x), theirs(x)) < CLOSE
    written = weights.convert(ours.state_dict(), "jax", num_heads=2)
    assert written.keys() == published.keys()
    assert all(np.array_equal(written[name].numpy(), published[name]) for name in published)


# ---- what is refused


@pytest.fixture
def state() -> dict:
    return drawn(vit_fast.create_model("vit_tiny_patch16_224", num_classes=5, **TINY)).state_dict()


def test_left_over_and_missing_are_errors_unless_named(state):
    state["extra.weight"] = torch.ones(1)
    with pytest.raises(ValueError, match=r"1 left over: extra\.weight"):
        weights.convert(state, "torchvision")
    assert "conv_proj.weight" in weights.convert(state, "torchvision", partial=["extra.*"])
    del state["extra.weight"], state["blocks.1.norm2.bias"]
    with pytest.raises(ValueError, match=r"1 missing: blocks\.1\.norm2\.bias"):
        weights.convert(state, "torchvision")


def test_one_of_three_is_missing(state):
    there = weights.convert(state, "hf")
    del there["vit.encoder.layer.0.attention.attention.key.weight"]
    with pytest.raises(ValueError, match=r"missing: encoder\.layer\.0\.attention\.attention\.key\.weight"):
        weights.convert(there, "timm")


def test_names_of_two_layouts(state):
    with pytest.raises(ValueError, match=r"names of two layouts, (timm and torchvision|torchvision and timm)"):
        weights.convert({**state, **weights.convert(state, "torchvision")}, "hf")


def test_names_of_no_layout():
    with pytest.raises(ValueError, match="names of no layout that is known: timm, "):
        weights.convert({"conv1.bias": torch.ones(1)}, "timm")
    with pytest.raises(ValueError, match="to: got 'onnx'"):
        weights.convert({}, "onnx")


def test_an_architecture_that_the_weights_do_not_fit(state, tmp_path):
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="of another shape"):
        vit_fast.load(tmp_path / "model.safetensors", model="vit_tiny_patch16_224")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "swin"}))
    with pytest.raises(ValueError, match="model_type: got 'swin', takes "):
        vit_fast.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "vit_none", "model_args": {}}))
    with pytest.raises(ValueError, match="vit_none"):
        vit_fast.load(tmp_path)


def test_partial_load_keeps_fresh_weights(state, tmp_path):
    del state["head.weight"], state["head.bias"]
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    config = {"architecture": "vit_tiny_patch16_224", "model_args": TINY, "num_classes": 7}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"2 missing: head\.weight, head\.bias"):
        vit_fast.load(tmp_path)
    model = vit_fast.load(tmp_path, partial=["head.*"])
    assert torch.equal(model.blocks[0].norm1.weight, state["blocks.0.norm1.weight"])
    assert model.head.weight.isfinite().all()
    assert model(images()).shape == (2, 7)


def test_files_that_are_cut_off_and_pickles(state, tmp_path):
    file = tmp_path / "model.safetensors"
    safetensors.torch.save_file(state, file)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="cut off"):
        vit_fast.load(file)
    np.savez(tmp_path / "a.npz", **{name: tensor.numpy() for name, tensor in state.items()})
    (tmp_path / "a.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:-100])
    with pytest.raises(ValueError, match="cut off"):
        vit_fast.load(tmp_path / "a.npz")
    np.savez(tmp_path / "objects.npz", **{"embedding/kernel": np.array([{}], dtype=object)})
    with pytest.raises(ValueError, match=r"no \.npz of arrays alone"):
        vit_fast.load(tmp_path / "objects.npz")
    torch.save(state, tmp_path / "model.pth")
    torch.save(state, tmp_path / "named.safetensors")
    for name in ("model.pth", "named.safetensors"):
        with pytest.raises(ValueError, match="refused, a pickle"):
            vit_fast.load(tmp_path / name)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-1-of-2.bin", "open_clip_pytorch_model.bin"])
def test_a_folder_of_a_pickle_alone_says_how_to_convert_it(state, tmp_path, name):
    torch.save({}, tmp_path / "optimizer.bin")
    with pytest.raises(ValueError, match=r"no checkpoint: it holds no model\.safetensors"):
        vit_fast.load(tmp_path)
    torch.save(state, tmp_path / name)
    with pytest.raises(ValueError, match=rf"{name}: refused, a pickle .* convert it once: safetensors"):
        vit_fast.load(tmp_path)
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    assert equal_states(weights.read(tmp_path), state)


def test_shards(state, tmp_path):
    names = sorted(state)
    parts = {"model-1.safetensors": names[:10], "model-2.safetensors": names[10:]}
    for part, of_part in parts.items():
        safetensors.torch.save_file({name: state[name] for name in of_part}, tmp_path / part)
    places = {name: part for part, of_part in parts.items() for name in of_part}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    assert equal_states(weights.read(tmp_path), state)
    for wrong in ("../model-1.safetensors", "/etc/model.safetensors", "model-1.bin", "a/b.safetensors"):
        index.write_text(json.dumps({"weight_map": {**places, "x": wrong}}))
        with pytest.raises(ValueError, match=r"refused, .* is no name of a safetensors file"):
            weights.read(tmp_path)
    index.write_text(json.dumps({"weight_map": {**places, "x": "model-1.safetensors"}}))
    with pytest.raises(ValueError, match="x is in no file"):
        weights.read(tmp_path)
    index.write_text("[" * 100_000)
    with pytest.raises(ValueError, match="no JSON that can be read"):
        weights.read(tmp_path)


def test_a_clip_without_a_config_is_not_guessed(tmp_path):
    model = vit_fast.create_model("vit_base_patch16_clip_quickgelu_224", num_classes=24, **TINY)
    safetensors.torch.save_file(model.state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="does not show its activation"):
        vit_fast.load(tmp_path / "model.safetensors")


def test_a_write_that_fails_leaves_the_old_file(state, tmp_path, monkeypatch):
    target = tmp_path / "out.safetensors"
    weights.write(target, {"old": torch.ones(1)})
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("the disk is full")))
    for name in ("out.safetensors", "out.npz"):
        with pytest.raises(OSError, match="the disk is full"):
            weights.write(tmp_path / name, state)
    assert list(weights.read(target)) == ["old"]
    assert os.listdir(tmp_path) == ["out.safetensors"]
    with pytest.raises(ValueError, match=r"takes \.safetensors or \.npz"):
        weights.write(tmp_path / "out.pth", state)


def test_names_of_a_compiled_model(state, tmp_path):
    """And of one whose blocks are compiled by themselves, under DDP."""
    whole = {f"_orig_mod.{name}": tensor for name, tensor in state.items()}
    assert equal_states(weights.convert(whole, "timm"), state)
    model = vit_fast.create_model("vit_tiny_patch16_224", num_classes=5, **TINY)
    for index, block in enumerate(model.blocks):
        model.blocks[index] = torch.compile(block)
    wrapped = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    assert any("._orig_mod." in name for name in wrapped)
    converted = weights.convert(wrapped, "timm")
    again = vit_fast.create_model("vit_tiny_patch16_224", num_classes=5, **TINY)
    again.load_state_dict(converted)
    model.save_pretrained(tmp_path)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).state_dict()
    assert equal_states(dict(loaded.items()), again.state_dict())
    assert torch.equal(again.blocks[1].mlp.fc1.weight, wrapped["module.blocks.1._orig_mod.mlp.fc1.weight"])


@pytest.mark.parametrize(
    "model",
    [
        lambda: hf.ViTForImageClassification(hf.ViTConfig(**SIZES, **LABELS)),
        lambda: torchvision.models.VisionTransformer(32, 8, 2, 1, 64, 128, num_classes=5),
        lambda: _open_clip(OPEN_CLIP),
    ],
)
def test_names_of_a_compiled_model_of_another_library(model):
    """The whole of it, under DDP, or each of its layers."""
    theirs = drawn(model())
    plain = weights.to_ours(theirs.state_dict())[0]
    assert equal_states(weights.to_ours(torch.compile(theirs).state_dict())[0], plain)
    assert equal_states(weights.to_ours({f"module._orig_mod.{name}": tensor for name, tensor in _of(theirs)})[0], plain)
    for parent in list(theirs.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, torch.compile(child))
    wrapped = theirs.state_dict()
    assert any("._orig_mod." in name for name in wrapped)
    assert equal_states(weights.to_ours(wrapped)[0], plain)


def test_two_names_of_one_tensor(state):
    wrapped = {f"module.{name}": tensor for name, tensor in state.items()}
    assert equal_states(weights.convert(wrapped, "timm"), state)
    with pytest.raises(ValueError, match=r"cls_token and module\.cls_token are names of the same tensor"):
        weights.convert({**state, **wrapped}, "timm")


@pytest.mark.parametrize(
    "gone",
    ["norm.weight", "norm.*", "*.norm1.*", "*.mlp.fc1.weight", "blocks.*", "head.weight", "pos_embed", "cls_token"],
)
def test_what_no_model_is_without(state, gone):
    """Though no block has it and the other: of transformers' names, which say so of positions and tokens too."""
    import fnmatch

    kept = {name: tensor for name, tensor in state.items() if not fnmatch.fnmatchcase(name, gone)}
    if gone not in ("pos_embed", "cls_token"):
        with pytest.raises(ValueError, match="missing: "):
            weights.convert(kept, "timm")
    theirs = weights.convert(state, "hf")
    position = {"pos_embed": "vit.embeddings.position_embeddings", "cls_token": "vit.embeddings.cls_token"}
    if gone in position:
        del theirs[position[gone]]
        with pytest.raises(ValueError, match=f"missing: {gone}"):
            weights.convert(theirs, "timm")


def _saved(tmp_path, **config):
    theirs = drawn(hf.ViTForImageClassification(hf.ViTConfig(**SIZES, **LABELS)))
    theirs.save_pretrained(tmp_path)
    said = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**said, **config}))
    return theirs


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers: the config says 1000000000, the weights have 2"),
        ({"hidden_size": 128}, "hidden_size: the config says 128, the weights have 64"),
        ({"num_attention_heads": True}, "num_attention_heads: got True"),
        ({"num_attention_heads": "4"}, "num_attention_heads: got '4'"),
        ({"hidden_act": "relu"}, "hidden_act: got 'relu'"),
        ({"image_size": None}, "img_size: the config has no value for it"),
        ({"model_type": "clip", "vision_config": None}, "a config lacks a field, or one is of another kind"),
        ({"architecture": 5}, "architecture: got 5"),
        ({"architecture": "vit_tiny_patch16_224", "model_args": {"depth": 10**9}}, "depth: the config says 1000000000"),
    ],
)
def test_a_config_that_is_wrong_is_named(tmp_path, config, says):
    _saved(tmp_path, **config)
    with pytest.raises(ValueError, match=says):
        vit_fast.load(tmp_path)


def test_a_config_beside_a_file_counts(tmp_path):
    theirs, x = _saved(tmp_path, layer_norm_eps=0.1), images()
    theirs = hf.ViTForImageClassification.from_pretrained(tmp_path).eval()
    assert relative_error(vit_fast.load(tmp_path / "model.safetensors")(x), theirs(x).logits) < CLOSE
    with pytest.raises(ValueError, match=r"model: got .* says what it is of; leave one out"):
        vit_fast.load(tmp_path, model="vit_tiny_patch16_224")


@pytest.mark.parametrize(
    "processor",
    [
        lambda: hf.ViTImageProcessor(size={"height": 32, "width": 32}, resample=3),
        lambda: hf.CLIPImageProcessor(size={"shortest_edge": 40}, crop_size=32),
        lambda: hf.DeiTImageProcessor(size={"height": 40, "width": 40}, crop_size={"height": 32, "width": 32}),
        lambda: hf.SiglipImageProcessor(size={"height": 32, "width": 32}, do_normalize=False),
        lambda: hf.BitImageProcessor(size={"shortest_edge": 36}, crop_size=32, resample=2),
        lambda: hf.ViTImageProcessor(size={"height": 32, "width": 32}, rescale_factor=1 / 127.5),
        lambda: hf.ViTImageProcessor(size={"height": 32, "width": 32}, do_rescale=False),
        lambda: hf.ViTImageProcessor(size={"height": 32, "width": 32}, rescale_factor=1 / 127.5, do_normalize=False),
    ],
)
def test_pictures_are_those_of_transformers_processor(tmp_path, processor):
    from PIL import Image

    from vit_fast.inference import preprocess

    _saved(tmp_path)
    theirs = processor()
    theirs.save_pretrained(tmp_path)
    model = vit_fast.load(tmp_path)
    # Of a size that leaves even margins: of odd ones transformers cuts the smaller half first, timm the larger.
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (49, 94, 3), dtype=np.uint8))
    names = ("mean", "std", "interpolation", "crop_pct", "crop_mode")
    settings = {name: model.pretrained_cfg[name] for name in names if name in model.pretrained_cfg}
    ours = preprocess(picture, img_size=32, **settings)
    expected = theirs(picture, return_tensors="pt")["pixel_values"]
    levels = (ours - expected).abs().max() * min(settings["std"]) * 255
    assert levels <= 4, "of 256: two ways to resize"
    assert (ours - expected).abs().mean() * min(settings["std"]) * 255 < 0.5


def test_a_picture_that_a_processor_leaves_as_it_is(tmp_path):
    """A DINOv2 would take pictures of the size that it does not resize to."""
    theirs = drawn(TRANSFORMERS["DINOv2"]())
    theirs.save_pretrained(tmp_path)
    processor = hf.ViTImageProcessor(size={"height": 40, "width": 40}, do_resize=False)
    processor.save_pretrained(tmp_path)
    pixels = torch.randint(0, 256, (1, 32, 32, 3), dtype=torch.uint8)
    expected = theirs(**processor(pixels[0].permute(2, 0, 1), return_tensors="pt")).logits.softmax(-1)
    assert relative_error(vit_fast.load(tmp_path).predict(pixels), expected) < CLOSE


@pytest.mark.parametrize("size", [{"shortest_edge": 93}, {"height": 93, "width": 93}])
def test_a_crop_of_a_picture_of_the_very_size(size, tmp_path):
    """32 / (32 / 93) is less than 93 in floating point."""
    from vit_fast.inference import _scaled_size

    _saved(tmp_path)
    hf.DeiTImageProcessor(size=size, crop_size=32).save_pretrained(tmp_path)
    settings = vit_fast.load(tmp_path).pretrained_cfg
    assert _scaled_size((200, 200), (32, 32), settings["crop_pct"], settings["crop_mode"]) == (93, 93)


@pytest.mark.parametrize(
    ("processor", "says"),
    [
        ({"do_resize": False, "crop_size": 32, "do_center_crop": True}, "do_resize: got False with a crop, takes True"),
        (
            {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 36}, "do_center_crop": True},
            "crop_size: got 32 x 36 of a picture of 40 x 40, takes a square",
        ),
        (
            {"size": {"height": 40, "width": 64}, "crop_size": 32, "do_center_crop": True},
            "crop_size: got 32 x 32 of a picture of 40 x 64, takes the same ratio of sides",
        ),
        ({"size": 32, "crop_size": 40, "do_center_crop": True}, "crop_size: got 40 of a picture of 32, takes no more"),
        ({"resample": 4}, "resample: got 4, takes 0, 1, 2, 3"),
        ({"rescale_factor": 0}, "a config lacks a field, or one is of another kind"),
        ({"rescale_factor": -1}, "std: got .* takes a list of numbers above 0"),
    ],
)
def test_a_processor_that_our_pictures_cannot_follow(processor, says, tmp_path):
    _saved(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    with pytest.raises(ValueError, match=says):
        vit_fast.load(tmp_path)


def test_dinov2_takes_pictures_of_its_processors_size(tmp_path):
    """Trained on larger ones: transformers resamples positions in every call, we once."""
    theirs = drawn(TRANSFORMERS["DINOv2"]())
    theirs.save_pretrained(tmp_path)
    hf.BitImageProcessor(size={"shortest_edge": 28}, crop_size=24).save_pretrained(tmp_path)
    ours, x = vit_fast.load(tmp_path), torch.randn(2, 3, 24, 24)
    assert ours.patch_embed.img_size == (24, 24)
    assert relative_error(ours(x), theirs(x).logits) < CLOSE


def test_a_head_of_eighty_in_an_npz(tmp_path):
    theirs, x = drawn(timm.create_model("vit_tiny_patch16_224", **{**TINY, "embed_dim": 160, "num_heads": 2})), images()
    np.savez(tmp_path / "a.npz", **_published_jax(theirs.state_dict(), heads=2))
    ours = vit_fast.load(tmp_path / "a.npz")
    assert relative_error(ours(x), theirs(x)) < CLOSE
    assert ours.pretrained_cfg["mean"] == (0.5, 0.5, 0.5)


def _loaded(theirs: nn.Module, config: dict, folder) -> nn.Module:
    """From a folder as open_clip writes it."""
    before = "" if hasattr(theirs, "visual") else "visual."
    state = {f"{before}{name}": tensor for name, tensor in _of(theirs)}
    safetensors.torch.save_file(state, folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return vit_fast.load(folder)


def test_open_clips_config(tmp_path):
    theirs = _open_clip({**OPEN_CLIP, "head_width": 32}, quick_gelu=True)
    model = {"embed_dim": 24, "vision_cfg": {**OPEN_CLIP, "head_width": 32}, "quick_gelu": True}
    config = {"model_cfg": model, "preprocess_cfg": {"mean": [0.1, 0.2, 0.3], "std": [0.3, 0.2, 0.1]}}
    ours, x = _loaded(theirs, config, tmp_path), images()
    assert relative_error(ours(x), theirs.encode_image(x)) < CLOSE
    assert ours.pretrained_cfg["mean"] == (0.1, 0.2, 0.3)
    with pytest.raises(ValueError, match="the projection of a CLIP, which has no classes"):
        ours.predict(torch.zeros(1, 32, 32, 3, dtype=torch.uint8))
    assert _loaded(theirs, {"model_cfg": model}, tmp_path).pretrained_cfg["mean"][0] == 0.48145466  # open_clip's own


@pytest.mark.parametrize(
    "more",
    [
        {"pool_type": "avg"},
        {"pool_type": "none"},
        {"final_ln_after_pool": True},
        {"pool_type": "avg", "final_ln_after_pool": True},
        {"pool_type": "avg", "final_ln_after_pool": True, "no_ln_pre": True},
        {"no_ln_pre": True},
        {"norm_kwargs": {"eps": 1e-2}},
        {"act_kwargs": {"approximate": "tanh"}},
        {"patch_dropout": 0.5, "block_type": "custom", "pos_embed_type": "sin_cos_2d", "qk_norm": False},
    ],
)
def test_settings_of_open_clips_tower(more, tmp_path):
    theirs, x = _open_clip({**OPEN_CLIP, **more}), images()
    ours = _loaded(theirs, {"model_cfg": {"vision_cfg": {**OPEN_CLIP, **more}}}, tmp_path)
    assert relative_error(ours(x), theirs.encode_image(x)) < CLOSE
    ours.save_pretrained(tmp_path / "ours")
    assert torch.equal(vit_fast.load(tmp_path / "ours")(x), ours(x))


@pytest.mark.parametrize(
    ("vision", "more", "says"),
    [
        ({"scale_heads": True}, {}, "scale_heads: got True, takes False"),
        ({"attentional_pool": "parallel"}, {}, "attentional_pool: got 'parallel', takes False"),
        ({"new_part": 0}, {}, "vision_cfg: got 'new_part', takes layers, width, "),
        ({"pool_type": "max"}, {}, "pool_type: got 'max', takes tok, avg, none"),
        ({"norm_kwargs": {"eps": 1e-5, "bias": False}}, {}, "norm_kwargs: got .*'bias': False.*, takes 'eps' alone"),
        ({"act_kwargs": {"inplace": True}}, {}, "act_kwargs: got {'inplace': True}, takes 'approximate'"),
        ({"act_kwargs": {"approximate": "tanh"}}, {"quick_gelu": True}, "act_kwargs: got"),
        ({"timm_model_name": "vit_tiny_patch16_224", "timm_proj": "mlp"}, {}, "timm_proj: got 'mlp', takes"),
        ({"timm_model_name": "vit_tiny_patch16_224", "timm_pool": "rot_attn"}, {}, "global_pool: got 'rot_attn'"),
    ],
)
def test_settings_of_open_clips_tower_that_are_refused(vision, more, says, tmp_path):
    theirs = _open_clip(OPEN_CLIP)
    with pytest.raises(ValueError, match=says):
        _loaded(theirs, {"model_cfg": {"vision_cfg": {**OPEN_CLIP, **vision}, **more}}, tmp_path)


def test_open_clips_pictures_that_are_padded_are_refused(tmp_path):
    config = {"model_cfg": {"vision_cfg": OPEN_CLIP}, "preprocess_cfg": {"resize_mode": "longest"}}
    with pytest.raises(ValueError, match="resize_mode: got 'longest', takes 'shortest' or 'squash'"):
        _loaded(_open_clip(OPEN_CLIP), config, tmp_path)


def _shipped() -> list[dict]:
    """open_clip's own configs with a tower of its own, of one small block; but one of those that are then alike."""
    found = {}
    for file in Path(open_clip.__file__).parent.glob("model_configs/*.json"):
        config = json.loads(file.read_text())
        vision = config["vision_cfg"]
        if "timm_model_name" not in vision and isinstance(vision["layers"], int):
            vision |= {"layers": 1, "width": vision.get("head_width", 64), "patch_size": 8, "image_size": 16}
            config = {"vision_cfg": vision, "quick_gelu": config.get("quick_gelu", False)}
            found[json.dumps(config, sort_keys=True)] = config
    return list(found.values())


def test_every_config_that_open_clip_ships(tmp_path):
    """Its answers, or a refusal: of an attention pool alone."""
    x, refused = torch.randn(1, 3, 16, 16), []
    for config in _shipped():
        theirs = open_clip.model._build_vision_tower(24, **copy.deepcopy(config))
        try:
            ours = _loaded(drawn(theirs), {"model_cfg": config}, tmp_path)
        except ValueError:
            refused.append(config["vision_cfg"])
            continue
        answer = theirs(x)
        expected = answer[0] if isinstance(answer, tuple) else answer
        assert relative_error(ours(x), expected) < CLOSE, config
    assert len(refused) == 1
    assert refused[0]["attentional_pool"]


@pytest.mark.parametrize(
    "vision",
    [
        {},
        {"timm_pool": "token", "timm_proj": None},  # MobileCLIP2-L-14
        {"timm_pool": "avg", "timm_proj": ""},
        {"timm_pool": "", "timm_proj": "linear", "timm_proj_bias": True},
        {"timm_pool": "token", "timm_proj": "none", "timm_drop": 0.1},
        {"timm_pool": "", "timm_proj": "none"},
    ],
)
def test_settings_of_open_clips_tower_of_timms(vision, tmp_path, monkeypatch):
    name, build = "vit_tiny_patch16_224", settings.build  # whose sizes no config can change
    monkeypatch.setattr(timm, "create_model", functools.partial(timm.create_model, **TINY))
    monkeypatch.setattr(settings, "build", lambda name, classes, args: build(name, classes, {**args, **TINY}))
    said = {key.removeprefix("timm_"): value for key, value in vision.items()}
    theirs, x = drawn(open_clip.timm_model.TimmModel(name, 24, **said)), images()
    ours = _loaded(theirs, {"model_cfg": {"vision_cfg": {"timm_model_name": name, **vision}}}, tmp_path)
    assert relative_error(ours(x), theirs(x)) < CLOSE


def test_timm_builds_what_came_from_transformers(tmp_path):
    _saved(tmp_path, layer_norm_eps=1e-6)
    ours, x = vit_fast.load(tmp_path), images()
    ours.save_pretrained(tmp_path / "ours")
    theirs = timm.create_model(f"local-dir:{tmp_path / 'ours'}", pretrained=True).eval()
    assert relative_error(theirs(x), ours(x)) < CLOSE


# ---- what a config leaves open, and what shapes show


def test_a_loaded_model_is_ready_and_where_it_should_be(tmp_path):
    _saved(tmp_path)
    assert not any(module.training for module in vit_fast.load(tmp_path).modules())
    assert vit_fast.load(tmp_path, device="meta").head.weight.is_meta


def test_what_is_missing_is_drawn(state, tmp_path):
    del state["blocks.1.mlp.fc1.weight"]
    safetensors.torch.save_file(state, tmp_path / "a.safetensors")
    weight = vit_fast.load(tmp_path / "a.safetensors", partial=["blocks.1.mlp.fc1.weight"]).blocks[1].mlp.fc1.weight
    assert 0.01 < weight.std() < 0.03


def test_a_config_beside_any_other_file_does_not_count(state, tmp_path):
    safetensors.torch.save_file(state, tmp_path / "a.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    assert equal_states(vit_fast.load(tmp_path / "a.safetensors").state_dict(), state)


@pytest.mark.parametrize(
    "options",
    [
        {"num_heads": 4, "qk_norm": True},
        {"global_pool": "avg"},
        {"global_pool": "token_avg"},
        {"no_embed_class": True},
        {"embed_dim": 11, "mlp_ratio": 15.5 / 11},  # whose hidden width is not int(11 * (15 / 11))
    ],
    ids=str,
)
def test_what_the_shapes_alone_show(options, tmp_path):
    model, x = drawn(vit_fast.create_model("vit_tiny_patch16_224", num_classes=5, **{**TINY, **options})), images()
    safetensors.torch.save_file(model.state_dict(), tmp_path / "a.safetensors")
    assert torch.equal(vit_fast.load(tmp_path / "a.safetensors")(x), model(x))


def test_a_file_of_dinov2s_own_resamples_as_its_repository(tmp_path):
    model = drawn(timm.create_model("vit_small_patch14_dinov2", **TINY))
    safetensors.torch.save_file(_published_dinov2(model.state_dict(), False, True), tmp_path / "a.safetensors")
    ours = vit_fast.load(tmp_path / "a.safetensors")
    assert ours.pos_interpolation == "offset"
    ours.save_pretrained(tmp_path)
    assert vit_fast.load(tmp_path).pos_interpolation == "offset"


def test_an_npz_of_columns_first_with_heads_that_are_given(tmp_path):
    """Fortran's order, and another number than that of the arrays, whose heads are joined in any case."""
    theirs, x = drawn(timm.create_model("vit_tiny_patch16_224", num_classes=5, **TINY)), images()
    published = _published_jax(theirs.state_dict(), heads=2)
    np.savez(tmp_path / "a.npz", **{name: np.asfortranarray(array) for name, array in published.items()})
    assert relative_error(vit_fast.load(tmp_path / "a.npz", num_heads=1)(x), theirs(x)) < CLOSE


@pytest.mark.parametrize("to", [to for to in weights.TARGETS if to != "open_clip"])
def test_converted_weights_can_be_written(to, state, tmp_path):
    converted = weights.convert(state, to)
    weights.write(tmp_path / "a.safetensors", converted)
    assert equal_states(weights.read(tmp_path / "a.safetensors"), converted)


def test_classes_are_in_the_order_of_their_numbers(tmp_path):
    labels = {index: f"class {index}" for index in range(12)}
    drawn(hf.ViTForImageClassification(hf.ViTConfig(**SIZES, id2label=labels))).save_pretrained(tmp_path)
    assert vit_fast.load(tmp_path).label_names == tuple(labels.values())


def test_a_masked_autoencoder_without_a_processor(tmp_path):
    drawn(TRANSFORMERS["ViT-MAE"]()).save_pretrained(tmp_path)
    assert vit_fast.load(tmp_path).pretrained_cfg["mean"] == (0.485, 0.456, 0.406)


@pytest.mark.parametrize(
    ("processor", "expected"),
    [
        ({"feature_extractor_type": "CLIPFeatureExtractor", "size": 40, "crop_size": 32}, (0.8, "center")),
        ({"feature_extractor_type": "ViTFeatureExtractor", "size": 40, "crop_size": 32}, (0.8, "squash")),
        ({"size": {"shortest_edge": 40}, "crop_size": 32, "do_center_crop": False}, (1.0, "center")),
    ],
)
def test_processors_of_older_versions_of_transformers(processor, expected, tmp_path):
    """Whose sizes are one number: the shorter side for a CLIP, both for the others."""
    _saved(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"do_center_crop": True, **processor}))
    pictures = vit_fast.load(tmp_path).pretrained_cfg
    assert (pictures["crop_pct"], pictures["crop_mode"]) == expected


def test_the_pool_that_timms_config_says(tmp_path):
    options = {**TINY, "fc_norm": False}
    theirs = drawn(timm.create_model("vit_tiny_patch16_224", num_classes=5, global_pool="avg", **options))
    safetensors.torch.save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    config = {"architecture": "vit_tiny_patch16_224", "num_classes": 5, "global_pool": "avg", "model_args": options}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert relative_error(vit_fast.load(tmp_path)(x := images()), theirs(x)) < CLOSE


def test_layer_scale_and_squashed_pictures_of_open_clips_config(tmp_path):
    vision = {"layers": 2, "width": 64, "head_width": 32, "patch_size": 8, "image_size": 32, "ls_init_value": 0.5}
    text = {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 2, "layers": 1}
    theirs = drawn(open_clip.model.CLIP(24, vision, text))
    safetensors.torch.save_file(theirs.state_dict(), tmp_path / "open_clip_model.safetensors")
    model = {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text}
    config = {"model_cfg": model, "preprocess_cfg": {"resize_mode": "squash"}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    ours, x = vit_fast.load(tmp_path), images()
    assert relative_error(ours(x), theirs.encode_image(x)) < CLOSE
    assert ours.pretrained_cfg["crop_mode"] == "squash"


# ---- the Hub, and the command line


def test_a_repository_of_the_hub(tmp_path, monkeypatch):
    import huggingface_hub

    model = drawn(vit_fast.create_model("vit_tiny_patch16_224", num_classes=5, **TINY))
    model.save_pretrained(tmp_path)
    asked = []

    def snapshot_download(repository, revision, allow_patterns):
        asked.append((repository, revision, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    for name in ("hf-hub:someone/vit", "hf-hub:someone/vit@v1"):
        assert torch.equal(vit_fast.load(name).head.weight, model.head.weight)
    assert [(repository, revision) for repository, revision, _ in asked] == [
        ("someone/vit", None),
        ("someone/vit", "v1"),
    ]
    assert asked[0][2] == pretrained.WANTED
    assert not any(pattern.endswith((".bin", ".pt", "*")) for pattern in pretrained.WANTED)
    for name in ("someone/vit", "hf-hub:../secret", "hf-hub:a/b/c", "hf-hub:a", "vit_tiny_patch16_224"):
        with pytest.raises(ValueError, match="no such file or folder"):
            vit_fast.load(name)


def test_push_to_hub(tmp_path, monkeypatch):
    import huggingface_hub

    calls = []

    def upload_folder(repo_id, folder_path, **kwargs):
        calls.append((repo_id, sorted(os.listdir(folder_path)), kwargs))
        return "address"

    monkeypatch.setattr(huggingface_hub, "create_repo", lambda name, **kwargs: calls.append((name, kwargs)))
    monkeypatch.setattr(huggingface_hub, "upload_folder", upload_folder)
    model = vit_fast.create_model("vit_tiny_patch16_224", num_classes=5, **TINY)
    assert model.push_to_hub("someone/vit", commit_message="first") == "address"
    assert calls == [
        ("someone/vit", {"exist_ok": True, "token": None}),
        ("someone/vit", ["config.json", "model.safetensors"], {"commit_message": "first"}),
    ]


def _run(line: str):
    return CliRunner().invoke(cli.app, shlex.split(line))


def test_convert_on_the_command_line(state, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    weights.write(tmp_path / "in.safetensors", state)
    result = _run("convert in.safetensors out.safetensors --to torchvision")
    assert result.exit_code == 0, result.output
    assert f"timm: {len(state)} tensors placed" in result.output
    assert equal_states(weights.convert(weights.read(tmp_path / "out.safetensors"), "timm"), state)
    assert _run("convert in.safetensors out.npz --to jax").exit_code == 0
    assert equal_states(weights.convert(weights.read(tmp_path / "out.npz"), "timm"), state)
    weights.write(tmp_path / "in.safetensors", {**state, "extra": torch.ones(1)})
    result = _run("convert in.safetensors other.safetensors --to torchvision")
    assert result.exit_code == 1
    assert "1 left over: extra" in result.stderr
    assert not (tmp_path / "other.safetensors").exists()
    assert _run("convert in.safetensors other.safetensors --to torchvision --partial 'ext*'").exit_code == 0


def test_classify_and_attend_from_a_checkpoint_of_transformers(tmp_path, monkeypatch):
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    config = hf.ViTConfig(**SIZES, num_labels=2, id2label={0: "cat", 1: "dog"})
    theirs = drawn(hf.ViTForImageClassification(config))
    theirs.save_pretrained("model")
    processor = hf.ViTImageProcessor(size={"height": 32, "width": 32})
    processor.save_pretrained("model")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)).save("picture.png")
    result = _run("classify model picture.png --json")
    assert result.exit_code == 0, result.output
    top = json.loads(result.stdout)[0]["top"]
    with torch.no_grad():
        pixels = processor(Image.open("picture.png"), return_tensors="pt")["pixel_values"]
        expected = theirs(pixels).logits.softmax(-1)[0]
    found = {one["class"]: one["probability"] for one in top}
    assert found == pytest.approx({"cat": expected[0].item(), "dog": expected[1].item()}, abs=1e-3)
    assert _run("attend model picture.png -o looked.png").exit_code == 0
    assert Image.open("looked.png").size[0] > 100


def test_attend_on_a_model_without_a_head(tmp_path, monkeypatch):
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    drawn(hf.Dinov2Model(hf.Dinov2Config(**SIZES))).save_pretrained("model")
    Image.fromarray(np.zeros((40, 60, 3), dtype=np.uint8)).save("picture.png")
    result = _run("attend model picture.png -o looked.png")
    assert result.exit_code == 0, result.output
    result = _run("classify model picture.png")
    assert result.exit_code == 1
    assert "gives no logits of a picture" in result.stderr
