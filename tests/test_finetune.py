"""Weights to train on: other classes, pictures of another size and other channels, as timm makes them of its own."""

import pytest
import timm
import torch

import vit_fast
from tests.error_rule import relative_error
from tests.test_parity import draw

CLOSE = 2e-5
OVERRIDES = {
    "classes": {"num_classes": 7},
    "no classes": {"num_classes": 0},
    "size": {"img_size": 48},
    "sides": {"img_size": (32, 48)},
    "grey": {"in_chans": 1},
    "five channels": {"in_chans": 5},
    "any size": {"dynamic_img_size": True},
    "all": {"num_classes": 7, "img_size": 48, "in_chans": 1, "drop_path_rate": 0.1},
}
ARCHITECTURES = ("test_vit", "deit_tiny_distilled_patch16_224")


@pytest.fixture(scope="module", params=ARCHITECTURES)
def folder(request, tmp_path_factory):
    """A model of timm's, as its export leaves it."""
    folder = tmp_path_factory.mktemp("timm")
    model = draw(timm.create_model(request.param, num_classes=5, img_size=64, depth=2, embed_dim=64, num_heads=2))
    timm.models.save_for_hf(model, str(folder), safe_serialization=True)
    return folder


@pytest.mark.parametrize("name", OVERRIDES)
def test_as_timm_loads_its_own(name, folder):
    overrides = OVERRIDES[name]
    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True, **overrides).eval()
    ours = vit_fast.load(folder, **overrides)
    x = torch.randn(2, overrides.get("in_chans", 3), *ours.patch_embed.img_size)
    assert relative_error(theirs.forward_features(x), ours.forward_features(x)) < CLOSE
    assert (ours.num_classes, ours.in_chans) == (theirs.num_classes, ours.patch_embed.proj.in_channels)
    assert ours.patch_embed.img_size == theirs.patch_embed.img_size
    if "num_classes" not in overrides:
        assert relative_error(theirs(x), ours(x)) < CLOSE
    elif ours.num_classes:
        assert ours(x).shape == (2, 7)
    assert ours.pretrained_cfg["input_size"] == (ours.in_chans, *ours.patch_embed.img_size)
    assert len(ours.pretrained_cfg["mean"]) == len(ours.pretrained_cfg["std"]) == ours.in_chans
    rates = [block.drop_path1.drop_prob for block in ours.blocks if hasattr(block.drop_path1, "drop_prob")]
    assert rates == ([pytest.approx(0.1)] if "drop_path_rate" in overrides else [])


def test_what_is_loaded_for_other_classes_is_saved_and_classifies(folder, tmp_path):
    model = vit_fast.load(folder, num_classes=3, in_chans=1, img_size=32)
    model.save_pretrained(tmp_path)
    again, x = vit_fast.load(tmp_path), torch.randn(2, 1, 32, 32)
    assert torch.equal(again(x), model(x))
    assert again.predict(torch.randint(256, (2, 40, 40, 3), dtype=torch.uint8)).shape == (2, 3)


def test_a_trained_checkpoint_of_ours(tmp_path):
    from vit_fast import checkpoint

    kwargs = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    preprocessing = {"mean": [0.1, 0.2, 0.3], "std": [1.0] * 3, "input_size": [3, 16, 16]}
    config = checkpoint.Config("vit_tiny_patch16_224", kwargs, ("cat", "dog"), preprocessing)
    model = draw(config.build())
    checkpoint.save(tmp_path, model, config, {}, {})
    same = vit_fast.load(tmp_path, num_classes=2, drop_path_rate=None)
    assert torch.equal(same.head.weight, model.head.weight)
    assert same.label_names == ("cat", "dog")
    other = vit_fast.load(tmp_path, num_classes=4, img_size=32, drop_path_rate=0.2)
    assert other.label_names == ()
    assert other.blocks[1].drop_path1.drop_prob == pytest.approx(0.2)
    assert other(torch.randn(1, 3, 32, 32)).shape == (1, 4)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"depth": 3}, "missing: blocks"),
        ({"embed_dim": 32}, "of another shape"),
        ({"num_classes": -1}, "num_classes: got -1"),
        ({"in_chans": 0}, "in_chans: got 0"),
        ({"img_size": 4}, "img_size: got"),
        ({"nothing": 1}, "nothing"),
    ],
)
def test_what_does_not_fit_is_refused(overrides, message, folder):
    with pytest.raises(ValueError, match=message):
        vit_fast.load(folder, **overrides)
