"""Checkpoints: out and in again, whole at any moment, and what is refused."""

import json
import os
import pickle
import stat

import pytest
import safetensors.torch
import torch

import vit_fast
from tests.small_runs import equal_states
from vit_fast import checkpoint

SMALL = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 1}
CONFIG = checkpoint.Config(
    "vit_tiny_patch16_224",
    SMALL,
    ("cat", "dog"),
    {
        "input_size": [3, 16, 16],
        "mean": [0.1, 0.2, 0.3],
        "std": [1.0] * 3,
        "interpolation": "bilinear",
        "crop_pct": 0.8,
    },
)


@pytest.fixture
def saved(tmp_path):
    model = CONFIG.build()
    checkpoint.save(tmp_path, model, CONFIG, {"generator.cpu": torch.get_rng_state()}, {"step": 3})
    return tmp_path, model


def test_out_and_in(saved):
    folder, model = saved
    loaded, config = checkpoint.load(folder)
    assert config == CONFIG
    assert equal_states(loaded.state_dict(), model.state_dict())
    assert not loaded.training
    assert {key: loaded.pretrained_cfg[key] for key in CONFIG.preprocessing} == CONFIG.preprocessing
    weights, tensors, state = checkpoint.load_training(folder)
    assert equal_states(weights, model.state_dict())
    assert (list(tensors), state) == (["generator.cpu"], {"step": 3})


def test_the_folder_holds_these_files_and_anyone_may_read_them(saved):
    folder, _ = saved
    assert sorted(os.listdir(folder)) == [checkpoint.CONFIG, checkpoint.WEIGHTS, checkpoint.TRAINING]
    (folder / "other").write_text("")
    modes = {stat.S_IMODE((folder / name).stat().st_mode) for name in os.listdir(folder)}
    assert len(modes) == 1  # that of any new file


def test_timm_loads_the_weights(saved):
    import timm

    folder, model = saved
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=2, **SMALL)
    theirs.load_state_dict(safetensors.torch.load_file(folder / checkpoint.WEIGHTS))
    images = torch.randn(2, 3, 16, 16)
    assert torch.allclose(model.eval()(images), theirs.eval()(images), atol=1e-5)


@pytest.mark.parametrize("name", [checkpoint.CONFIG, checkpoint.TRAINING, checkpoint.WEIGHTS])
def test_a_write_that_fails_leaves_the_old_checkpoint(saved, monkeypatch, name):
    folder, model = saved
    replace = os.replace

    def fails(source, target):
        if os.path.basename(target) == name:
            raise OSError("the disk is full")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fails)
    other = CONFIG.build()
    with pytest.raises(OSError, match="the disk is full"):
        checkpoint.save(folder, other, CONFIG, {}, {"step": 4})
    monkeypatch.undo()
    # Either all of the old or all of the new in each file, and nothing in the way of the next write.
    loaded, _ = checkpoint.load(folder)
    weights, _, state = checkpoint.load_training(folder)
    assert equal_states(loaded.state_dict(), model.state_dict())
    assert equal_states(weights, (model if state["step"] == 3 else other).state_dict())
    checkpoint.save(folder, other, CONFIG, {}, {"step": 4})
    assert equal_states(checkpoint.load(folder)[0].state_dict(), other.state_dict())


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, -1])
@pytest.mark.parametrize("name", [checkpoint.TRAINING, checkpoint.WEIGHTS])
def test_a_file_that_is_cut_off(saved, name, keep):
    folder, _ = saved
    path = folder / name
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep) if isinstance(keep, float) else keep])
    read = checkpoint.load if name == checkpoint.WEIGHTS else checkpoint.load_training
    with pytest.raises(ValueError, match="cut off") as caught:
        read(folder)
    assert str(path) in str(caught.value)


def _config(folder, **changes):
    path = folder / checkpoint.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"kwargs": SMALL | {"depth": 2}}, "12 missing: blocks.1.norm1.weight, .* and 7 more"),
        ({"kwargs": SMALL | {"qkv_bias": False}}, "1 left over: blocks.0.attn.qkv.bias"),
        (
            {"kwargs": SMALL | {"patch_size": 4}},
            r"of another shape: pos_embed \[1, 5, 16\], the model has \[1, 17, 16\]",
        ),
        ({"classes": ["a"]}, r"2 of another shape: head.weight \[2, 16\], the model has \[1, 16\]"),
        ({"architecture": "vit_tiny"}, "the nearest are vit_"),
        ({"format": 2}, "this version of vit_fast reads 1"),
        ({"classes": "cat"}, "wrong type"),
    ],
)
def test_another_architecture(saved, changes, says):
    folder, _ = saved
    _config(folder, **changes)
    with pytest.raises(ValueError, match=says):
        checkpoint.load(folder)


def test_a_config_that_cannot_be_read(saved, tmp_path):
    folder, _ = saved
    (folder / checkpoint.CONFIG).write_text('{"format": 1')
    with pytest.raises(ValueError, match="no config of a checkpoint"):
        checkpoint.load(folder)
    with pytest.raises(ValueError, match=r"it holds no config\.json"):
        checkpoint.load(tmp_path / "gone")


class Bomb:
    """Leaves a mark when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("unpickled",)


@pytest.mark.parametrize("name", ["a.pt", "a.pth", "a.bin", "a.safetensors"])
@pytest.mark.parametrize("how", ["zip", "legacy", "plain"])
def test_a_pickle_is_refused_unopened(tmp_path, monkeypatch, name, how):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / name
    if how == "plain":
        path.write_bytes(pickle.dumps(Bomb()))
    else:
        torch.save(Bomb(), path, _use_new_zipfile_serialization=how == "zip")
    with pytest.raises(ValueError, match="refused, a pickle") as caught:
        checkpoint.read_tensors(path)
    assert str(path) in str(caught.value)
    assert not os.path.exists("unpickled")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "a pointer of git-lfs; `git lfs pull`"),
        ('{"error": "Entry not found"}', "JSON, which holds no weights"),
        ("<!DOCTYPE html><html></html>", "a page of the web or XML"),
    ],
)
def test_a_text_in_place_of_a_safetensors_file(tmp_path, text, says):
    path = tmp_path / "a.safetensors"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"a\.safetensors: no safetensors file, but {says}"):
        checkpoint.read_tensors(path)


@pytest.mark.parametrize("sign", [b"{", b"<"])
def test_a_file_that_is_cut_off_is_no_text(tmp_path, sign):
    """The low byte of its header's length may be any sign."""
    path = tmp_path / "a.safetensors"
    path.write_bytes(sign + bytes(7) + b'{"w":{"dtype":"F32","shape":[1')
    with pytest.raises(ValueError, match="cut off"):
        checkpoint.read_tensors(path)


def test_a_config_with_a_byte_order_mark(saved):
    folder, model = saved
    path = folder / checkpoint.CONFIG
    path.write_text(path.read_text(), encoding="utf-8-sig")
    assert equal_states(checkpoint.load(folder)[0].state_dict(), model.state_dict())


def test_a_header_whose_length_looks_like_a_pickle_is_read(tmp_path):
    path = tmp_path / "a.safetensors"
    for length in range(500, 640):  # some header is 0x0280 bytes long, and a pickle begins with \x80\x02 as well
        safetensors.torch.save_file({"w": torch.ones(2)}, path, {"text": "x" * length})
        if path.read_bytes()[:2] == b"\x80\x02":
            break
    assert path.read_bytes()[:2] == b"\x80\x02"
    assert torch.equal(checkpoint.read_tensors(path)[0]["w"], torch.ones(2))


def test_weights_of_any_strides_are_written(tmp_path):
    model = CONFIG.build().to(memory_format=torch.channels_last)
    assert not model.patch_embed.proj.weight.is_contiguous()
    checkpoint.write_weights(tmp_path / "a.safetensors", model)
    assert equal_states(checkpoint.read_tensors(tmp_path / "a.safetensors")[0], model.state_dict())


def test_weights_of_lower_precision_are_taken():
    model = CONFIG.build()
    weights = {
        name: tensor.bfloat16()
        for name, tensor in vit_fast.create_model("vit_tiny_patch16_224", num_classes=2, **SMALL).state_dict().items()
    }
    checkpoint.load_weights(model, weights)
    assert equal_states(model.state_dict(), {name: tensor.float() for name, tensor in weights.items()})


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn], ids=str)
def test_weights_of_no_dtype_of_weights(saved, dtype):
    """copy_ would take them, without the scale that they were divided by."""
    folder, model = saved
    weights = model.state_dict()
    weights["head.weight"] = weights["head.weight"].to(dtype)
    checkpoint.write_weights(folder / checkpoint.WEIGHTS, weights)
    with pytest.raises(
        ValueError, match=rf"head\.weight is of {str(dtype)[6:]}, takes float16, bfloat16, float32, float64"
    ):
        checkpoint.load(folder)


def test_a_file_and_its_name_are_on_the_disk_before_it_counts(tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr(checkpoint, "_flush", lambda path: flushed.append((path.name, (tmp_path / "a.txt").exists())))
    checkpoint.write_text(tmp_path / "a.txt", "x")
    assert [there for _, there in flushed] == [False, True], "the file under another name, then the folder"
    assert flushed[1][0] == tmp_path.name


def test_an_output_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"output: cannot write to .*file.run: Not a directory"):
        checkpoint.check_writable(tmp_path / "file" / "run")
