"""The zoo: which names there are, what becomes of a name that is not there, and weights that move both ways."""

import fnmatch

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
        vit_fast.create_model("vit_base_patch16_224.augreg_in21k")
    with pytest.raises(ValueError, match="list_models"):
        vit_fast.create_model("resnet50")
    with pytest.raises(ValueError, match="pretrained: got True"):
        vit_fast.create_model("test_vit", pretrained=True)
    with pytest.raises(TypeError, match="num_classes: got True, takes a number; pretrained is given by its name"):
        vit_fast.create_model("test_vit", True)
    with pytest.raises(TypeError, match="features_only"):
        vit_fast.create_model("test_vit", features_only=True)


def test_none_replaces_nothing():
    """As a script has it whose flags were not given."""
    none = dict.fromkeys(("img_size", "in_chans", "drop_rate", "drop_path_rate", "global_pool", "norm_layer"))
    model, usual = vit_fast.create_model("test_vit", None, **none), vit_fast.create_model("test_vit")
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
