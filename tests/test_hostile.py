"""Hostile files: mutated ones, pickles under other names, ways out of the folder, sizes that are not true."""

import ast
import contextlib
import json
import os
import pathlib
import pickle
import re
import struct
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image, ImageFile

import vit_fast
from tests import hostile
from tests.small_runs import bomb, picture
from vit_fast import checkpoint, inference, pretrained, weights

SEED = 4  # python -m tests.hostile draws more
FILES = 200


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile") / "good"
    hostile.make_good(folder)
    return folder


@pytest.fixture
def state():
    return vit_fast.create_model("vit_tiny_patch16_224", num_classes=5, **hostile.MODEL).state_dict()


@pytest.mark.parametrize("kind", hostile.KINDS)
def test_mutated_files_are_read_or_refused(good, kind):
    found, wrong = hostile.judge_all(kind, hostile.seeds_of(kind, SEED, FILES), good)
    assert not wrong, "python -m tests.hostile --case SEED reads one again"
    assert found[f"{kind} refused"] > FILES / 4
    assert found[f"{kind} read"] > 0, "mutations that spare the file show that it is read at all"


# ---- that the judge sees what it is for ----------------------------------------------------------------------------


def _spin() -> None:
    started = time.process_time()
    while time.process_time() < started + hostile.SECONDS + 0.1:
        pass


def _spin_and_fail() -> None:
    _spin()
    raise KeyError("key")


DEEDS = {
    "unpickles": (lambda: pickle.loads(pickle.dumps(hostile.Bomb())), "did more than read"),
    "starts a program": (lambda: os.system("true"), "did more than read"),
    "writes": (lambda: Path("written").write_text(""), "did more than read"),
    "reads elsewhere": (lambda: Path("/etc/hostname").exists() and Path("/etc/hostname").read_text(), "did more"),
    "runs text": (lambda: exec("1"), "did more than read"),
    "takes memory": (lambda: bytearray(1 << 30), "asked for more than"),
    "takes torch's memory": (lambda: torch.empty(1 << 30), "asked for more than"),
    "writes from C": (lambda: safetensors.torch.save_file({"a": torch.ones(1)}, "elsewhere.safetensors"), "did more"),
    "takes time": (_spin, "took"),
    "takes time and raises another error": (_spin_and_fail, "KeyError: 'key'"),
    "waits": (lambda: time.sleep(0.6), "waited"),
    "raises another error": (lambda: {}["key"], "KeyError: 'key'"),
}


def _judged(deed: str, folder: Path, pipe) -> None:
    os.chdir(folder)
    watch = hostile.Watch()
    hostile.read = lambda kind, path: DEEDS[deed][0]()
    hostile.WAIT_S = 0.5 if deed == "waits" else hostile.PATIENCE_S
    hostile.limit_memory(hostile.room_for("json"))
    pipe.send(hostile.judge("json", folder, watch))


@pytest.mark.parametrize("deed", DEEDS)
def test_the_judge_sees(tmp_path, deed):
    ours, theirs = hostile.CONTEXT.Pipe(duplex=False)
    process = hostile.CONTEXT.Process(target=_judged, args=(deed, tmp_path, theirs))
    process.start()
    theirs.close()
    outcome, why = ours.recv()
    process.join()
    assert outcome == "wrong"
    says = DEEDS[deed][1]
    assert why.startswith(says) or why.rstrip().endswith(says)  # between the two stand lines of this file


def _dies(kind: str, seeds: list[str], good: Path, pipe) -> None:
    for seed in seeds:
        if seed.endswith("2"):
            os.abort() if kind == "npz" else time.sleep(600)
        pipe.send(("read", ""))


@pytest.mark.parametrize(("kind", "why"), [("npz", "ended with -6"), ("json", "no answer in 2 s")])
def test_a_process_that_dies_or_does_not_answer_is_the_fault_of_its_file(monkeypatch, good, kind, why):
    monkeypatch.setattr(hostile, "_judge_many", _dies)
    monkeypatch.setattr(hostile, "PATIENCE_S", 2)
    found, wrong = hostile.judge_all(kind, hostile.seeds_of(kind, 0, 5), good)
    assert found == {f"{kind} read": 4}
    assert list(wrong) == [f"{kind} 0 2"]
    assert why in wrong[f"{kind} 0 2"]


# ---- pickles -------------------------------------------------------------------------------------------------------


def _object_array(path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, **{"embedding/kernel": np.array([hostile.Bomb()], dtype=object)})


PICKLES = {
    **{
        f"protocol {protocol}": lambda path, protocol=protocol: path.write_bytes(pickle.dumps(hostile.Bomb(), protocol))
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1)
    },
    "torch's zip": lambda path: torch.save({"w": hostile.Bomb()}, path),
    "torch's old form": lambda path: torch.save(hostile.Bomb(), path, _use_new_zipfile_serialization=False),
    "an array of objects": _object_array,
}


@pytest.mark.parametrize("how", PICKLES)
@pytest.mark.parametrize("name", ["a.safetensors", "a.npz", "config.json", "preprocessor_config.json", "a.png", "a"])
def test_a_pickle_is_refused_by_what_it_is(tmp_path, monkeypatch, state, name, how):
    monkeypatch.chdir(tmp_path)
    if name.endswith(".json"):
        weights.write(tmp_path / checkpoint.WEIGHTS, state)
        (tmp_path / checkpoint.CONFIG).write_text('{"model_type": "vit"}')
    PICKLES[how](tmp_path / name)
    read = inference.open_image if name.endswith(".png") else vit_fast.load
    with pytest.raises(ValueError, match=str(tmp_path)):
        read(tmp_path if name.endswith(".json") else tmp_path / name)
    assert not os.path.exists("unpickled")


def test_nothing_in_the_library_unpickles_or_runs_text():
    """No import of pickle, no torch.load, no numpy.load, no eval: what is not there cannot be reached by any file."""
    root = pathlib.Path(vit_fast.__file__).parent
    for path in sorted(root.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
                assert not {"pickle", "marshal", "shelve", "joblib", "dill", "cloudpickle"} & set(names), path
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("torch.load", "np.load", "numpy.load", "eval", "exec", "compile"), (path, called)


# ---- weights -------------------------------------------------------------------------------------------------------


def _within_a_second(call, path: Path, says: str) -> None:
    """The least of three calls: a processor that others use meanwhile, and Python's collector, which goes through what
    all tests before left, take time of the process that is not the file's."""
    seconds = []
    for _ in range(3):
        started = time.process_time()
        with pytest.raises(ValueError, match=says):
            call(path)
        seconds.append(time.process_time() - started)
        if seconds[-1] < hostile.SECONDS:
            break
    assert min(seconds) < hostile.SECONDS


def test_a_block_of_any_number(tmp_path, state):
    state["blocks.999999999999.norm1.weight"] = torch.ones(32)
    weights.write(tmp_path / "a.safetensors", state)
    _within_a_second(vit_fast.load, tmp_path / "a.safetensors", r"missing: blocks\.")


def test_a_great_many_names(tmp_path, state):
    state |= {f"blocks.{index}.norm1.weight": torch.ones(1) for index in range(10_000)}
    weights.write(tmp_path / "a.safetensors", state)
    _within_a_second(vit_fast.load, tmp_path / "a.safetensors", "tensors, takes 10000 at most")


def test_many_names_take_no_longer_than_they_must(state):
    """3,000 names of one pattern: to look for each among all that were found took the square of it."""
    names = {**state, **{f"blocks.{index}.norm1.weight": torch.ones(1) for index in range(3000)}}
    started = time.process_time()
    with pytest.raises(ValueError, match="missing"):
        weights.to_ours(names)
    assert time.process_time() - started < 5


def test_a_tensor_of_no_numbers_and_any_side(tmp_path, state):
    """A head for a million million classes weighs nothing in a file, and would be built."""
    state["head.weight"], state["head.bias"] = torch.empty(10**12, 0), torch.empty(0)
    weights.write(tmp_path / "a.safetensors", state)
    _within_a_second(vit_fast.load, tmp_path / "a.safetensors", "no number in head")


def test_a_tensor_of_another_shape_than_its_layout_has(tmp_path, state):
    names = weights.convert(state, "torchvision")
    names["encoder.layers.encoder_layer_0.self_attention.in_proj_weight"] = torch.ones(())
    weights.write(tmp_path / "a.safetensors", names)
    with pytest.raises(ValueError, match="shape"):
        vit_fast.load(tmp_path / "a.safetensors")
    kernels = weights.convert(state, "jax")
    kernels["Transformer/encoderblock_0/MultiHeadDotProductAttention_1/query/kernel"] = torch.ones(())
    weights.write(tmp_path / "a.npz", kernels)
    with pytest.raises(ValueError, match="a tensor is of another shape than in google-research"):
        vit_fast.load(tmp_path / "a.npz")


def _npz(path: Path, header: str, data: bytes) -> Path:
    import zipfile

    text = header.encode() + b"\n"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("w.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + data)
    return path


def test_an_array_that_is_longer_than_its_file(tmp_path):
    header = "{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000,)}"
    path = _npz(tmp_path / "a.npz", header, bytes(16))
    _within_a_second(weights.read, path, r"not of the length of \(1000000000000,\)")
    path = _npz(tmp_path / "b.npz", header.replace("<f4", "|O"), pickle.dumps([hostile.Bomb()]))
    _within_a_second(weights.read, path, "holds pickled objects")
    header = "{'descr': '<f4', 'fortran_order': True, 'shape': (2, 2)}"
    path = _npz(tmp_path / "c.npz", header, np.arange(4, dtype=np.float32).tobytes())
    assert torch.equal(weights.read(path)["w"], torch.tensor([[0.0, 2.0], [1.0, 3.0]]))


def test_a_file_that_unpacks_to_a_thousand_times_its_size(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", zeros=np.zeros(100 << 20, np.uint8))
    assert (tmp_path / "a.npz").stat().st_size < 1 << 20
    _within_a_second(weights.read, tmp_path / "a.npz", "unpacks to")


def test_a_directory_that_is_longer_than_its_file(tmp_path):
    """Of a zip: Python allocates what it is asked to read, whether it is there or not."""
    np.savez(tmp_path / "a.npz", w=np.ones(3, np.float32))
    data = bytearray((tmp_path / "a.npz").read_bytes())
    end = data.rindex(b"PK\5\6")
    data[end + 12 : end + 16] = struct.pack(
        "<I", 2**32 - 2
    )  # its size; it begins before the file, which is not looked at
    data[end + 16 : end + 20] = struct.pack("<I", 0)
    (tmp_path / "a.npz").write_bytes(data)
    with _in_a_megabyte(), pytest.raises(ValueError, match="cut off"):
        weights.read(tmp_path / "a.npz")


@contextlib.contextmanager
def _in_a_megabyte():
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


# ---- configs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"depth": 10**9}, "depth: the config says 1000000000, the weights are"),
        ({"img_size": [10**6, 10**6]}, "img_size: the config says"),
        ({"img_size": 24_000, "pos_embed": "sincos2d"}, "of another shape: pos_embed"),
        ({"in_chans": 10**9}, "in_chans: the config says"),
        ({"reg_tokens": 10**9}, "reg_tokens: the config says"),
        ({"mlp_ratio": 1e300}, "describes no model|mlp_ratio"),
        ({"embed_dim": "32"}, "embed_dim: got '32', takes 1 or more"),
        ({"device": "cuda"}, "device: the config says 'cuda'"),
        ({"device": "meta"}, "device: the config says 'meta'"),
        ({"nothing": 1}, "describes no model"),
    ],
    ids=str,
)
def test_a_config_that_asks_for_more_than_its_weights(good, tmp_path, changes, says):
    for path in (good / "json" / "own").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / checkpoint.CONFIG).read_text())
    config["kwargs"] |= changes
    (tmp_path / checkpoint.CONFIG).write_text(json.dumps(config))
    _within_a_second(checkpoint.load, tmp_path, says)


@pytest.mark.parametrize("patch_size", [1, 8, 16, 32])
def test_pictures_of_a_size_that_no_weight_bears_out(tmp_path, patch_size):
    """What a picture costs goes by its patches: a file of a few kilobytes would keep `predict` busy for hours."""
    kwargs = hostile.MODEL | {"pos_embed": "none", "patch_size": patch_size}
    model = vit_fast.create_model("vit_tiny_patch16_224", num_classes=5, **kwargs)
    most = min(64, 1024 // patch_size)
    for grid in (most, most + 1):
        sized = kwargs | {"img_size": grid * patch_size}
        config = checkpoint.Config("vit_tiny_patch16_224", sized, tuple("abcde"), hostile._pictures())
        checkpoint.save(tmp_path, model, config, {}, {})
        if grid == most:
            read = checkpoint.load(tmp_path)[0]
            assert read.patch_embed.num_patches == most * most
            with torch.inference_mode():
                assert read(torch.zeros(1, 3, *read.patch_embed.img_size)).shape == (1, 5)
    says = rf"img_size: the config says .*, {(most + 1) ** 2} patches, of a model without positions: 1024 a side and"
    _within_a_second(checkpoint.load, tmp_path, says)


@pytest.mark.parametrize(("depth", "says"), [(257, "depth: the config says 257, .* 256 at most"), (256, "missing")])
def test_many_blocks_of_nothing(tmp_path, depth, says):
    config = checkpoint.Config("vit_tiny_patch16_224", hostile.MODEL | {"depth": depth}, (), hostile._pictures())
    checkpoint.save(tmp_path, torch.nn.Identity(), config, {}, {})
    nothing = {f"blocks.{index}.norm1.weight": torch.empty(0) for index in range(5000)}
    checkpoint.write_weights(tmp_path / checkpoint.WEIGHTS, nothing | {"cls_token": torch.zeros(1000)})
    _within_a_second(checkpoint.load, tmp_path, says)


def test_an_architecture_that_is_larger_than_its_weights_is_not_built(good, tmp_path, monkeypatch):
    for path in (good / "json" / "own").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / checkpoint.CONFIG).read_text())
    config |= {"architecture": "vit_giant_patch14_224", "kwargs": {}}
    (tmp_path / checkpoint.CONFIG).write_text(json.dumps(config))
    with pytest.raises(ValueError, match="of another architecture"):
        checkpoint.load(tmp_path)
    built = []
    monkeypatch.setattr(checkpoint, "build", lambda name, classes, kwargs: built.append(kwargs["device"]) or 1 / 0)
    with pytest.raises(ValueError, match="describes no model"):
        checkpoint.load(tmp_path)
    assert built == ["meta"]


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "null", "[]", "9" * 10_000, "", "\ufeff{}"])
def test_a_config_that_is_nested_or_nothing(good, tmp_path, text):
    for path in (good / "json" / "own").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / checkpoint.CONFIG).write_text(text, encoding="utf-8")
    _within_a_second(checkpoint.load, tmp_path, "no config of a checkpoint")


def test_a_config_of_gigabytes(good, tmp_path):
    with (tmp_path / checkpoint.CONFIG).open("wb") as file:
        file.truncate(4 << 30)  # of nothing: it takes no disk
    _within_a_second(checkpoint.load, tmp_path, "larger than 16 MB")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"mean": "abc"}, "mean: got 'abc'"),
        ({"mean": [1e300, 0.5, 0.5]}, "mean: got"),
        ({"std": [0.0, 1.0, 1.0]}, "std: got"),
        ({"crop_pct": "1"}, "crop_pct: got '1'"),
        ({"crop_pct": 0}, "crop_pct: got 0"),
        ({"interpolation": ["bicubic"]}, "interpolation: got"),
        ({"input_size": 224}, "input_size: got 224"),
    ],
    ids=str,
)
def test_pictures_that_cannot_be_prepared_are_refused_when_the_model_is_loaded(good, tmp_path, changes, says):
    for name, key in (("own", "preprocessing"), ("timm", "pretrained_cfg")):
        folder = tmp_path / name
        folder.mkdir()
        for path in (good / "json" / name).iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        config = json.loads((folder / checkpoint.CONFIG).read_text())
        config[key] |= changes
        (folder / checkpoint.CONFIG).write_text(json.dumps(config))
        with pytest.raises(ValueError, match=says):
            vit_fast.load(folder)


def test_a_crop_of_almost_nothing(tmp_path):
    """The picture would be resized to as many pixels as the crop is small."""
    how = {"img_size": 32, "mean": (0.5,), "std": (0.5,), "crop_pct": 1e-5}
    path = picture(tmp_path / "a.png")
    for images in (path, torch.zeros(1, 40, 40, 3, dtype=torch.uint8)):
        _within_a_second(lambda images: inference.preprocess(images, **how), images, "crop_pct: asks for a picture of")


def test_a_processor_of_pictures_without_end(good, tmp_path):
    for path in (good / "json" / "dinov2").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    vit_fast.load(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"size": {"height": 1000000, "width": 1000000}}')
    _within_a_second(vit_fast.load, tmp_path, "size: the processor says")


# ---- names that lead elsewhere -------------------------------------------------------------------------------------

ELSEWHERE = (
    "../a.safetensors",
    "/etc/a.safetensors",
    "a/b.safetensors",
    "..\\a.safetensors",
    ".a.safetensors",
    "a\0.safetensors",
)


@pytest.mark.parametrize("name", [*ELSEWHERE, "a" * 5000 + ".safetensors", ["a.safetensors"], None, 1])
def test_an_index_that_leads_out_of_its_folder(tmp_path, state, name):
    weights.write(tmp_path.parent / "a.safetensors", state)
    weights.write(tmp_path / "b.safetensors", state)
    places = {**dict.fromkeys(state, "b.safetensors"), "x": name}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    with pytest.raises(ValueError, match=r"refused, .* is no name of a safetensors file beside it"):
        weights.read(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "hf-hub:a/../b",
        "hf-hub:../a",
        "hf-hub:a/b@../../x",
        "hf-hub:a/b@refs/../../x",
        "hf-hub:a/b@x/..",
        "hf-hub:a/b/../c",
    ],
)
def test_a_repository_that_leads_out_of_the_cache(monkeypatch, name):
    """The Hub's client keeps a revision as a file of that name."""
    monkeypatch.setattr(pretrained, "_hub", lambda: pytest.fail("the Hub was asked"))
    with pytest.raises(ValueError, match="no such file or folder"):
        vit_fast.load(name)


def test_members_of_an_archive_are_never_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez(tmp_path / "a.npz", **{"../outside": np.ones(3, np.float32)})
    assert list(weights.read(tmp_path / "a.npz")) == ["../outside"]  # a name like any other, of no layout
    with pytest.raises(ValueError, match="names of no layout"):
        vit_fast.load(tmp_path / "a.npz")
    assert os.listdir(tmp_path) == ["a.npz"]
    assert not (tmp_path.parent / "outside.npy").exists()


# ---- pictures ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["TGA", "ICO", "EPS", "PDF", "PCX", "SGI", "DDS", "ICNS", "MPO"])
def test_formats_that_are_not_taken(tmp_path, kind):
    """Whatever the name: EPS would start Ghostscript."""
    path = tmp_path / "a.png"
    Image.new("RGB", (32, 32)).save(path, format=kind, **({"save_all": True} if kind == "MPO" else {}))
    if kind == "MPO":  # a JPEG with others behind it: the first is read
        assert inference.open_image(path).size == (32, 32)
        return
    with pytest.raises(ValueError, match="no picture that can be read, takes JPEG, PNG, WEBP, BMP, GIF, PPM, TIFF"):
        inference.open_image(path)


def test_the_number_of_pixels_is_known_before_one_is_decoded(good, monkeypatch, tmp_path):
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: pytest.fail("it was decoded"))
    taken = {".jpg", ".png", ".webp", ".bmp", ".gif", ".ppm", ".pgm", ".tif"}
    paths = [path for path in (good / "pictures").iterdir() if path.stem not in ("tga", "ico", "eps", "pdf", "pcx")]
    assert {path.suffix for path in paths} == taken
    for path in paths:
        with pytest.raises(pytest.fail.Exception, match="it was decoded"):  # as many as are taken
            inference.open_image(path, max_pixels=851)
        with pytest.raises(ValueError, match="refused, it has 37 x 23 pixels, takes 850 at most"):
            inference.open_image(path, max_pixels=850)
    _within_a_second(inference.open_image, bomb(tmp_path / "bomb.png"), "refused, it has")


def test_a_picture_without_memory_for_it(tmp_path, monkeypatch):
    def no_memory(image):
        raise MemoryError

    monkeypatch.setattr(ImageFile.ImageFile, "load", no_memory)
    with pytest.raises(MemoryError, match=r"a\.png: no memory for the picture, 12 x 10 pixels"):
        inference.open_image(picture(tmp_path / "a.png"))


def _read_within(room: int, path: Path, pipe) -> None:
    hostile.limit_memory(hostile.room_for("pictures") - hostile.MEMORY["pictures"] + room)
    try:
        hostile.read("pictures", path)
        pipe.send("read")
    except MemoryError as error:
        pipe.send(str(error))


LARGEST = {
    "a.webp": ("RGBA", {"lossless": True}),
    "b.webp": ("RGB", {"save_all": True, "quality": 1}),
    "a.png": ("RGBA", {}),
    "b.png": ("I;16", {}),
    "a.jpg": ("RGB", {"progressive": True}),
    "b.jpg": ("CMYK", {"progressive": True}),
    "a.tif": ("RGBA", {"compression": "tiff_lzw"}),
    "b.tif": ("CMYK", {"compression": "tiff_adobe_deflate"}),
    "c.tif": ("I;16", {}),
    "a.bmp": ("RGB", {}),
    "a.gif": ("P", {"save_all": True}),
    "a.ppm": ("RGB", {}),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "room", "says"),
    [
        *((name, 2 << 30, "read") for name in LARGEST),
        ("a.png", 1 << 29, r".*a\.png: no memory for the picture, 9459 x 9459 pixels"),
    ],
)
def test_the_largest_picture(tmp_path, name, room, says):
    """Of each format and turned, in the memory that SECURITY.md says; with less the error is one of memory."""
    mode, options = LARGEST[name]
    exif = Image.Exif()
    exif[0x0112] = 6
    first, second = (Image.new(mode, (9459, 9459), color) for color in (0, 1))
    more = {"append_images": [second]} if "save_all" in options else {}  # in WebP frames are of one size
    first.save(tmp_path / name, exif=exif, **options, **more)
    ours, theirs = hostile.CONTEXT.Pipe(duplex=False)
    process = hostile.CONTEXT.Process(target=_read_within, args=(room, tmp_path / name, theirs))
    process.start()
    theirs.close()
    process.join()
    assert process.exitcode == 0
    assert re.fullmatch(says, ours.recv())


def test_a_chunk_that_is_longer_than_its_file(tmp_path):
    """Of a PNG: Pillow reads what is left of it in one piece."""
    data = bytearray(picture(tmp_path / "a.png").read_bytes())
    place = data.index(b"IDAT")
    data[place - 4 : place] = struct.pack(">I", 2**31 - 1)
    (tmp_path / "a.png").write_bytes(data)
    with _in_a_megabyte():
        assert inference.open_image(tmp_path / "a.png").size == (12, 10)
