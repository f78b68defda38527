"""The zoo: which names there are, what becomes of a name that is not there, and weights that move both ways."""

import fnmatch
import re

import numpy as np
import pytest
import timm
import torch
from timm.models import _registry

import vit_fast
from vit_fast.zoo import entries


def names_of_timm() -> set[str]:
    modules = ("vision_transformer", "deit")
    names = set().union(*(_registry._module_to_models[module] for module in modules))
    return names - set(_registry._deprecated_models)


def test_every_name_of_timm_is_built_or_said_to_miss_a_part():
    assert set(entries()) == names_of_timm()
    assert len(vit_fast.list_models()) == 156


def test_the_weights_are_those_that_timm_has():
    """312 of 333; without the norms inside a half that beit3 has, 304."""
    theirs = {name for name in timm.list_pretrained() if name.partition(".")[0] in names_of_timm()}
    assert {f"{name}.{tag}" for name, entry in entries().items() for tag in entry["weights"]} == theirs
    counts = {name: len(entries()[name]["weights"]) for name in entries()}
    assert sum(counts.values()) == len(theirs) == 333
    assert sum(counts[name] for name in vit_fast.list_models()) == 312
    normed = {name for name in vit_fast.list_models() if entries()[name]["args"].get("scale_attn_norm")}
    assert sum(counts[name] for name in normed) == 8


@pytest.mark.parametrize("name", sorted(name for name, entry in entries().items() if "missing" in entry))
def test_a_name_with_missing_parts_says_which(name):
    with torch.device("meta"):
        theirs = timm.create_model(name)
    kinds = {type(module).__name__ for module in theirs.modules()}
    parts = {
        "SwiGLU": {"SwiGLU", "GluMlp"},
        "RMSNorm": {"RmsNorm"},
        "parallel blocks": {"ParallelScalingBlock", "ParallelThingsBlock", "DiffParallelScalingBlock"},
        "post-norm blocks": {"ResPostBlock"},
        "differential attention": {"DiffAttention", "DiffParallelScalingBlock"},
    }
    # Differential attention brings an RMSNorm of its own: it is named once.
    missing = {part for part, classes in parts.items() if classes & kinds}
    if "differential attention" in missing and "RMSNorm" not in entries()[name]["missing"]:
        missing.discard("RMSNorm")
    assert set(entries()[name]["missing"]) == missing
    with pytest.raises(ValueError, match=f"{name}.*lacks: {sorted(missing)[0]}"):
        vit_fast.create_model(name)
    assert name not in vit_fast.list_models()


def test_patterns():
    everything = vit_fast.list_models()
    assert everything == sorted(everything)
    assert vit_fast.list_models("deit3") == [name for name in everything if "deit3" in name]
    assert vit_fast.list_models("vit_*_224") == fnmatch.filter(everything, "vit_*_224")
    assert vit_fast.list_models("no such name") == []


def test_an_unknown_name_offers_the_nearest():
    with pytest.raises(ValueError, match=r"vit_bas_patch16_224.*nearest are vit_base_patch16_224"):
        vit_fast.create_model("vit_bas_patch16_224")
    with pytest.raises(ValueError, match="nearest are vit_base_patch16_224"):
        vit_fast.create_model("vit_base_patch16_224.no_such_weights")
    with pytest.raises(ValueError, match="list_models"):
        vit_fast.create_model("resnet50")


def test_weights_are_loaded_by_another_name():
    with pytest.raises(ValueError, match=re.escape("vit_fast.load('hf-hub:timm/vit_base_patch16_224.mae')")):
        vit_fast.create_model("vit_base_patch16_224.mae")
    with pytest.raises(ValueError, match=re.escape("vit_fast.load('hf-hub:timm/deit_tiny_patch16_224.fb_in1k')")):
        vit_fast.create_model("deit_tiny_patch16_224", pretrained=True)
    with pytest.raises(ValueError, match="pretrained: got True"):
        vit_fast.create_model("test_vit", True)
    for count in (10, 0):
        with pytest.raises(TypeError, match=f"pretrained: got {count}, takes False; num_classes is given by its name"):
            vit_fast.create_model("test_vit", count)


def test_arguments_of_timms_factory():
    """As its train.py passes them, and with what asks for something."""
    nothing = {"checkpoint_path": "", "scriptable": False, "exportable": True, "no_jit": None, "drop_block_rate": None}
    model = vit_fast.create_model(model_name="test_vit", pretrained=False, features_only=False, **nothing)
    assert repr(model) == repr(vit_fast.create_model("test_vit", False))
    for name, value, hint in (
        ("checkpoint_path", "w.safetensors", "vit_fast.load"),
        ("features_only", True, "forward_intermediates"),
        ("scriptable", True, "torch.export"),
    ):
        with pytest.raises(ValueError, match=f"{name}: got {value!r}, takes nothing; .*{hint}"):
            vit_fast.create_model("test_vit", **{name: value})


def test_counts_of_other_libraries():
    """A class count is `labels.max() + 1` more often than it is typed."""
    labels = np.array([0, 4, 2])
    model = vit_fast.create_model(
        "test_vit", num_classes=labels.max() + 1, img_size=np.array([32, 48]), patch_size=np.int64(8), depth=np.int32(1)
    )
    assert type(model.num_classes) is int
    assert (model.num_classes, model.patch_embed.img_size, model.patch_embed.patch_size) == (5, (32, 48), (8, 8))
    model.reset_classifier(torch.tensor(7))
    assert (type(model.num_classes), len(model.head.weight)) == (int, 7)
    for name, value in (("num_classes", True), ("num_classes", 2.0), ("img_size", "ab"), ("img_size", (1, 2, 3))):
        with pytest.raises(ValueError, match=f"{name}: got "):
            vit_fast.create_model("test_vit", **{name: value})


def test_a_new_head_has_no_names_of_the_old_one():
    for name in ("test_vit", "deit_tiny_distilled_patch16_224"):
        model = vit_fast.create_model(name, num_classes=2, depth=1)
        model.label_names, model.pretrained_cfg["projection"] = ("cat", "dog"), True
        model.reset_classifier(2)
        assert model.label_names == ()
        assert "projection" not in model.pretrained_cfg


def test_none_replaces_nothing():
    """As a script has it whose flags were not given."""
    none = dict.fromkeys(("img_size", "in_chans", "drop_rate", "drop_path_rate", "global_pool", "norm_layer"))
    model, usual = vit_fast.create_model("test_vit", num_classes=None, **none), vit_fast.create_model("test_vit")
    assert repr(model) == repr(usual)
    name, none = "vit_base_patch16_clip_quickgelu_224", dict.fromkeys(("act_layer", "norm_layer", "fc_norm"))
    assert repr(vit_fast.create_model(name, **none)) == repr(vit_fast.create_model(name))


def test_overrides():
    model = vit_fast.create_model("test_vit", num_classes=3, in_chans=1, img_size=32, drop_path_rate=0.1)
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 3)
    assert len(model.pretrained_cfg["mean"]) == len(model.pretrained_cfg["std"]) == 1
    assert model.pretrained_cfg["architecture"] == "test_vit"
    assert vit_fast.create_model("vit_small_patch14_dinov2", depth=1).num_classes == 0
    norm = vit_fast.create_model("vit_xsmall_patch16_clip_224", depth=1, norm_layer="layernorm").norm
    assert norm.eps == 1e-6


@pytest.mark.parametrize("name", ["test_vit", "test_vit2", "test_vit3", "deit_tiny_distilled_patch16_224"])
def test_state_dicts_move_both_ways(name):
    theirs, ours = timm.create_model(name, depth=2).eval(), vit_fast.create_model(name, depth=2).eval()
    images = torch.randn(1, 3, *theirs.patch_embed.img_size)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert torch.allclose(ours(images), theirs(images), atol=1e-5)
    ours = vit_fast.create_model(name, depth=2).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert torch.allclose(ours(images), theirs(images), atol=1e-5)
    with pytest.raises(RuntimeError, match="pos_embed"):
        vit_fast.create_model(name, depth=2, img_size=64).load_state_dict(theirs.state_dict())
