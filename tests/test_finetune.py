"""Weights to train on: other classes, pictures of another size and other channels, as timm makes them of its own."""

import json
import shutil

import pytest
import timm
import torch
import transformers
from typer.testing import CliRunner

import vit_fast
from tests.error_rule import relative_error
from tests.small_runs import colour_folder, equal_states, tiny_config
from tests.test_parity import draw
from vit_fast import checkpoint, cli, training

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
    ],
)
def test_what_does_not_fit_is_refused(overrides, message, folder):
    with pytest.raises(ValueError, match=message):
        vit_fast.load(folder, **overrides)
    with pytest.raises(TypeError, match="load: got 'nothing', takes an argument of VisionTransformer"):
        vit_fast.load(folder, nothing=1)


@pytest.mark.parametrize("img_size", [112, 84, None])
def test_positions_are_resampled_once(img_size, tmp_path):
    """DINOv2 is shown smaller pictures than it has positions for: another size is made from those that it has."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 112, "patch_size": 14}
    theirs = draw(transformers.Dinov2Model(transformers.Dinov2Config(**sizes))).eval()
    theirs.save_pretrained(tmp_path)
    crop = {"size": {"shortest_edge": 64}, "crop_size": {"height": 56, "width": 56}}
    transformers.BitImageProcessor(**crop).save_pretrained(tmp_path)
    ours, side = vit_fast.load(tmp_path, img_size=img_size), img_size or 56
    assert ours.patch_embed.img_size == (side, side)
    x = torch.randn(1, 3, side, side)
    assert relative_error(ours.forward_features(x), theirs(x).last_hidden_state) < CLOSE


# ---- training from them --------------------------------------------------------------------------------------------


def test_a_run_begins_with_the_weights_and_goes_on_without_their_file(folder, tmp_path):
    """To the same bits, from a folder of pictures, with another head and another size."""
    pictures = colour_folder(tmp_path / "pictures", count=10)
    start = shutil.copytree(folder, tmp_path / "start")
    settings = {"epochs": 2, "batch_size": 4, "drop_path": 0.1, "img_size": 48, "warmup_epochs": 0, "workers": 0}
    settings |= {"lr": 1e-6, "pretrained_path": str(start)}
    whole = training.train(training.Config(str(pictures), str(tmp_path / "whole"), **settings))
    before = vit_fast.load(folder, img_size=48)
    after = dict(whole.model.named_parameters())
    for name in ("blocks.1.mlp.fc1.weight", "patch_embed.proj.weight", "pos_embed"):
        moved = (after[name] - dict(before.named_parameters())[name]).abs().max()
        assert 0 < moved < 1e-4, name
    assert whole.model.head.weight.shape[0] == 2

    def stop(step: training.Step) -> None:
        if step.step == 3:
            raise KeyboardInterrupt

    config = training.Config(str(pictures), str(tmp_path / "cut"), **settings)
    with pytest.raises(KeyboardInterrupt):
        training.train(config, on_step=stop)
    shutil.rmtree(start)
    assert training.read_settings(tmp_path / "cut")["pretrained_path"] == str(start)
    again = training.train(config, tmp_path / "cut")
    assert equal_states(again.model.state_dict(), whole.model.state_dict())
    loaded = vit_fast.load(tmp_path / "cut")
    assert loaded.label_names == ("green", "red")
    assert equal_states(loaded.state_dict(), whole.model.state_dict())
    assert tuple(loaded.pretrained_cfg["mean"]) == before.pretrained_cfg["mean"]


def test_grey_digits_from_weights_of_colours_by_the_command_line(folder, tmp_path):
    arguments = ["train", "digits", "--pretrained-path", str(folder), "--img-size", "16", "-b", "512"]
    done = CliRunner().invoke(cli.app, [*arguments, "--epochs", "1", "--output", str(tmp_path / "run")])
    assert done.exit_code == 0, done.output
    model = vit_fast.load(tmp_path / "run")
    assert (model.in_chans, model.num_classes, model.patch_embed.img_size) == (1, 10, (16, 16))
    assert len(model.blocks) == 2


def test_a_projection_is_no_head_of_as_many_classes(tmp_path):
    model = vit_fast.create_model("vit_tiny_patch16_224", num_classes=2, depth=1, img_size=32)
    model.pretrained_cfg["projection"] = True
    model.save_pretrained(tmp_path / "tower")
    pictures = colour_folder(tmp_path / "pictures", count=5)
    settings = {"pretrained_path": str(tmp_path / "tower"), "epochs": 1, "workers": 0, "lr": 0.0, "warmup_lr": 0.0}
    result = training.train(training.Config(str(pictures), str(tmp_path / "run"), **settings))
    assert not torch.equal(result.model.head.weight, model.head.weight)
    assert not torch.equal(vit_fast.load(tmp_path / "tower", num_classes=2).head.weight, model.head.weight)
    assert torch.equal(result.model.blocks[0].mlp.fc1.weight, model.blocks[0].mlp.fc1.weight)
    assert vit_fast.load(tmp_path / "run").predict(str(next(pictures.rglob("*.png")))).shape == (1, 2)


@pytest.mark.parametrize(("names", "keeps"), [(("green", "red"), True), (("cat", "dog"), False), ((), True)])
def test_a_head_is_kept_for_the_classes_that_it_has(names, keeps, tmp_path):
    """Of as many classes whose names nobody knows too, as timm keeps it."""
    model = vit_fast.create_model("vit_tiny_patch16_224", num_classes=2, depth=1, img_size=32)
    model.label_names, model.pos_interpolation = names, "plain"
    model.save_pretrained(tmp_path / "start")
    pictures = colour_folder(tmp_path / "pictures", count=5)
    settings = {"pretrained_path": str(tmp_path / "start"), "epochs": 1, "workers": 0, "lr": 0.0, "warmup_lr": 0.0}
    result = training.train(training.Config(str(pictures), str(tmp_path / "run"), **settings))
    assert torch.equal(result.model.head.weight, model.head.weight) == keeps
    assert vit_fast.load(tmp_path / "run").pos_interpolation == "plain"


def test_a_run_from_before_there_were_weights_to_begin_with(tmp_path):
    """What it did not write is what it was."""
    with pytest.raises(KeyboardInterrupt):
        training.train(tiny_config(tmp_path), on_step=stop_at_once)
    weights, tensors, state = checkpoint.load_training(tmp_path)
    del state["settings"]["pretrained_path"]
    config = checkpoint.load_config(tmp_path)
    model = config.build()
    model.load_state_dict(weights)
    checkpoint.save(tmp_path, model, config, tensors, state)
    text = json.loads((tmp_path / checkpoint.CONFIG).read_text())
    del text["pos_interpolation"]
    (tmp_path / checkpoint.CONFIG).write_text(json.dumps(text))
    settings = training.read_settings(tmp_path)
    assert settings["pretrained_path"] is None
    training.train(training.Config(**{**settings, "data": "digits", "output": str(tmp_path)}), tmp_path)


def stop_at_once(step: training.Step) -> None:
    raise KeyboardInterrupt
