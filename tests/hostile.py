"""Mutated files of weights, arrays, configs and pictures: each is read or refused, and nothing else happens.

python -m tests.hostile [--files 2000] [--seed 0]

A case is one file, made from a good one by a few changes: bits, cuts, pieces exchanged, lengths and sizes that are not
true, nesting, names that lead elsewhere, pickles under the file's name. It is read as a user reads it. What must hold:

- it is read, or the error is a ValueError
- it takes less than a second of the processor, and five by the clock
- it asks for no more memory than `MEMORY`
- while it is read nothing is written, started, connected to or unpickled, and no file is opened but those of the case:
  as far as Python is told of it, and no file is there afterwards that was not there

Each case draws from a seed of its own, which a failure prints. A process reads many cases; where it dies or does not
answer, the case is known. `make test` runs some of each kind: tests/test_hostile.py.
"""

import argparse
import contextlib
import io
import json
import logging
import multiprocessing
import os
import pathlib
import pickle
import random
import resource
import shutil
import struct
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from PIL import Image

import vit_fast
from tests import counts
from tests.small_runs import tiny_config
from vit_fast import checkpoint, inference, training, weights

KINDS = ("safetensors", "npz", "json", "pictures", "training")
SECONDS = 1.0  # of the processor, for one file
WAIT_S = 5.0  # by the clock, on a machine that does other things too
PATIENCE_S = 60  # for an answer, on a machine that does other things too
MEMORY = {
    "safetensors": 256 << 20,
    "npz": 256 << 20,
    "json": 256 << 20,
    "pictures": 1 << 30,
    "training": 256 << 20,
}  # bytes, for one file
MODEL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.forked"])  # one for all: a process has one such server


class Bomb:
    """Leaves a mark when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("unpickled",)


# ---- good files ----------------------------------------------------------------------------------------------------


def make_good(folder: Path) -> None:
    """Folder by kind: good files to start from. Of configs, a folder each."""
    torch.manual_seed(0)
    for kind in KINDS:
        (folder / kind).mkdir(parents=True)
    model = vit_fast.create_model("vit_tiny_patch16_224", num_classes=5, **MODEL)
    state = model.state_dict()
    weights.write(folder / "safetensors" / "timm.safetensors", state)
    weights.write(folder / "safetensors" / "hf.safetensors", weights.convert(state, "hf"))
    config = checkpoint.Config("vit_tiny_patch16_224", MODEL, tuple("abcde"), _pictures())
    own = folder / "json" / "own"
    own.mkdir()
    (folder / "json" / "bare").mkdir()
    checkpoint.save(own, model, config, {"generator.cpu": torch.get_rng_state()}, {"step": 3, "history": [{"a": 1.0}]})
    shutil.copy(own / checkpoint.TRAINING, folder / "safetensors" / "training.safetensors")
    (own / checkpoint.TRAINING).unlink()
    bare = MODEL | {"pos_embed": "none"}  # no weight of which depends on the size of a picture
    config = checkpoint.Config("vit_tiny_patch16_224", bare, tuple("abcde"), _pictures())
    checkpoint.save(
        folder / "json" / "bare", vit_fast.create_model("vit_tiny_patch16_224", num_classes=5, **bare), config, {}, {}
    )
    (folder / "json" / "bare" / checkpoint.TRAINING).unlink()
    jax = {name: tensor.numpy() for name, tensor in weights.convert(state, "jax", num_heads=2).items()}
    np.savez(folder / "npz" / "stored.npz", **jax)
    np.savez_compressed(folder / "npz" / "packed.npz", **jax)
    np.savez_compressed(folder / "npz" / "zeros.npz", **jax, zeros=np.zeros(100 << 20, np.uint8))
    _make_configs(folder / "json", model)
    _make_pictures(folder / "pictures")
    _make_run(folder / "training" / "run")


def _make_run(folder: Path) -> None:
    """One that was stopped after its second step."""

    def on_step(report):
        if report.step == 2:
            raise KeyboardInterrupt

    config = tiny_config(folder, model="vit_tiny_patch16_224", model_kwargs=MODEL, batch_size=16)
    with contextlib.suppress(KeyboardInterrupt):
        training.train(config, None, on_step)


def _pictures() -> dict:
    mean = [0.5, 0.5, 0.5]
    return {"input_size": [3, 32, 32], "mean": mean, "std": mean, "interpolation": "bicubic", "crop_pct": 0.9}


def _make_configs(folder: Path, model) -> None:
    model.label_names = tuple("abcde")
    model.save_pretrained(folder / "timm")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    labels = {"id2label": {str(index): letter for index, letter in enumerate("abcde")}}
    processor = {"size": {"height": 32, "width": 32}, "resample": 3, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    of_dinov2 = {**processor, "size": {"shortest_edge": 36}, "crop_size": {"height": 24, "width": 24}}
    dinov2 = vit_fast.create_model("vit_tiny_patch16_224", num_classes=0, **MODEL, init_values=0.1)
    tower = vit_fast.create_model("vit_base_patch16_clip_quickgelu_224", num_classes=24, **MODEL)
    made = {
        "vit": ({"model_type": "vit", "hidden_act": "gelu", **sizes, **labels}, processor, model),
        "dinov2": ({"model_type": "dinov2", "hidden_act": "gelu", **sizes}, of_dinov2, dinov2),
        "clip": ({"model_type": "clip", "vision_config": {"hidden_act": "quick_gelu", **sizes}}, processor, tower),
    }
    for name, (config, preprocessor, of) in made.items():
        (folder / name).mkdir()
        (folder / name / checkpoint.CONFIG).write_text(json.dumps(config))
        (folder / name / "preprocessor_config.json").write_text(json.dumps(preprocessor))
        converted = weights.convert(of.state_dict(), "hf")
        safetensors.torch.save_file(converted, folder / name / checkpoint.WEIGHTS)
    shards = folder / "shards"
    shards.mkdir()
    state = model.state_dict()
    places = {name: f"part-{index % 2}.safetensors" for index, name in enumerate(state)}
    for part in set(places.values()):
        held = {name: tensor for name, tensor in state.items() if places[name] == part}
        safetensors.torch.save_file(held, shards / part)
    (shards / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    clip = folder / "open_clip"
    clip.mkdir()
    vision = {"layers": 2, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 32}
    settings = {"model_cfg": {"embed_dim": 24, "vision_cfg": vision, "quick_gelu": True}, "preprocess_cfg": {}}
    (clip / "open_clip_config.json").write_text(json.dumps(settings))
    held = weights.convert(tower.state_dict(), "open_clip")
    safetensors.torch.save_file(held, clip / "open_clip_model.safetensors")


def _make_pictures(folder: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (23, 37, 4), dtype=np.uint8)
    colour, grey = Image.fromarray(pixels[..., :3].copy()), Image.fromarray(pixels[..., 0].copy())
    alpha, palette = Image.fromarray(pixels), Image.fromarray(pixels[..., :3].copy()).quantize(16)
    exif = Image.Exif()
    exif[0x0112] = 6
    colour.save(folder / "a.jpg", exif=exif)
    colour.save(folder / "progressive.jpg", progressive=True)
    colour.convert("CMYK").save(folder / "cmyk.jpg")
    for name, image in (("a", colour), ("alpha", alpha), ("grey", grey), ("palette", palette)):
        image.save(folder / f"{name}.png")
    Image.fromarray(pixels[..., 0].astype(np.uint16) * 257).save(folder / "sixteen.png")
    colour.save(folder / "lossy.webp")
    alpha.save(folder / "a.webp", lossless=True, exif=exif)
    colour.save(folder / "moving.webp", save_all=True, append_images=[colour.rotate(90)])
    colour.save(folder / "a.bmp")
    palette.save(folder / "palette.bmp")
    palette.save(folder / "a.gif", save_all=True, append_images=[palette.rotate(180)])
    colour.save(folder / "a.ppm")
    grey.save(folder / "grey.pgm")
    for compression in (None, "tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits"):
        colour.save(folder / f"{compression}.tif", compression=compression)
    grey.convert("1").save(folder / "fax.tif", compression="group4")
    colour.save(folder / "tga.png", format="TGA")  # of formats that are not taken, under names that are
    colour.save(folder / "ico.png", format="ICO")
    colour.save(folder / "eps.png", format="EPS")
    colour.save(folder / "pdf.png", format="PDF")
    grey.save(folder / "pcx.png", format="PCX")


# ---- mutations -----------------------------------------------------------------------------------------------------

NUMBERS = (0, 1, 2, 3, 7, 127, 128, 255, 256, 32767, 65535, 65536, 10**6, 2**31 - 1, 2**31, 2**32 - 1, 2**53, 2**63 - 1)
VALUES = (
    *(
        None,
        True,
        False,
        "",
        "a",
        "0",
        "../../x",
        [],
        {},
        [[]],
        {"a": {}},
        0,
        1,
        -1,
        -(2**63),
        0.0,
        -0.0,
        1e-300,
        1e308,
    ),
    *(
        float("inf"),
        float("nan"),
        10**9,
        2**31,
        2**63,
        10**30,
        1.5,
        3,
        64,
        10**5,
        "nan",
        "device",
        "x" * 10_000,
        [0] * 999,
    ),
)


def scrambled(data: bytes, draw: random.Random) -> bytes:
    """A few changes that know nothing of the format."""
    data = bytearray(data)
    for _ in range(draw.choice((1, 1, 1, 2, 3, 8, 40))):
        size = len(data)
        if not size:
            break
        # Headers, which are read first, get half of it.
        at = draw.randrange(size) if draw.random() < 0.5 else draw.randrange(min(size, 200))
        end = min(size, at + draw.choice((1, 2, 4, 8, 64, 1000)))
        how = draw.randrange(9)
        if how <= 1:
            data[at] ^= 1 << draw.randrange(8)
        elif how == 2:
            del data[at:]
        elif how == 3:
            del data[at:end]
        elif how == 4:
            data[at:at] = data[at:end] * draw.choice((1, 1, 50))
        elif how == 5:
            data[at:end] = draw.randbytes(end - at)
        elif how == 6:
            other = draw.randrange(size)
            one, two = bytes(data[at:end]), bytes(data[other : other + end - at])
            data[at:end], data[other : other + len(one)] = two, one
        elif how == 7:
            width = draw.choice(("<H", ">H", "<I", ">I", "<Q", ">Q"))
            number = draw.choice(NUMBERS) % 2 ** (8 * struct.calcsize(width))
            packed = struct.pack(width, number)
            data[at : at + len(packed)] = packed
        else:
            data[at:end] = bytes([draw.choice((0, 255, 127))]) * (end - at)
    return bytes(data)


def deep(draw: random.Random) -> str:
    depth = draw.choice((50, 900, 3_000, 100_000))
    return draw.choice(("[" * depth, "[" * depth + "]" * depth, '{"a":' * depth, '{"a":' * depth + "1" + "}" * depth))


def other_json(value, draw: random.Random):
    """A JSON value with one part of it replaced, taken out, repeated or nested."""
    if isinstance(value, dict) and value and draw.random() < 0.85:
        key = draw.choice(list(value))
        how = draw.random()
        if how < 0.7:
            return {**value, key: other_json(value[key], draw)}
        if how < 0.8:
            return {name: part for name, part in value.items() if name != key}
        if how < 0.9:
            return {
                **value,
                draw.choice(("device", "dtype", "depth", "weight_init", "pos_embed", "../x")): draw.choice(VALUES),
            }
        return {name: value[draw.choice(list(value))] if name == key else part for name, part in value.items()}
    if isinstance(value, list) and value and draw.random() < 0.6:
        index = draw.randrange(len(value))
        return draw.choice(
            (
                [*value[:index], other_json(value[index], draw), *value[index + 1 :]],
                value[:index],
                value * (draw.choice((2, 1000)) if len(value) < 20 else 2),
                [value],
            )
        )
    if isinstance(value, int) and not isinstance(value, bool) and draw.random() < 0.5:
        return draw.choice(
            (value + 1, value - 1, -value, value * 2, value * 1000, value * 10**9, float(value), str(value))
        )
    return draw.choice(VALUES)


def mutated_json(text: str, draw: random.Random) -> bytes:
    how = draw.random()
    if how < 0.2:
        return scrambled(text.encode(), draw)
    if how < 0.3:
        nested = deep(draw)
        at = draw.randrange(len(text))
        return draw.choice((nested, text[:-1] + f', "deep": {nested}}}', text[:at] + nested + text[at:])).encode()
    if how < 0.33:
        return draw.choice(
            (b"", b"\xff\xfe", b"null", b"[]", b"1" * 10_000, b'{"a": ' + b"9" * 100_000 + b"}", b"\0" * 100)
        )
    if how < 0.35:
        return pickled(draw)
    value = json.loads(text)
    for _ in range(draw.choice((1, 1, 2, 4))):
        value = other_json(value, draw)
    return json.dumps(value).encode()


def pickled(draw: random.Random) -> bytes:
    """A pickle, of each protocol, alone or as torch and numpy keep it."""
    how = draw.randrange(4)
    if how == 0:
        return pickle.dumps(Bomb(), protocol=draw.randrange(pickle.HIGHEST_PROTOCOL + 1))
    out = io.BytesIO()
    if how == 1:
        torch.save({"w": Bomb()}, out, _use_new_zipfile_serialization=draw.random() < 0.5)
    elif how == 2:
        np.savez(out, **{"embedding/kernel": np.array([Bomb()], dtype=object)})
    else:
        np.save(out, np.array([Bomb()], dtype=object), allow_pickle=True)
    return out.getvalue()


NAMES = (
    *("blocks.999999999999.norm1.weight", "blocks.1000000.mlp.fc1.weight", "blocks." + "9" * 5000 + ".norm1.weight"),
    *("../../etc/passwd", "/etc/passwd", "\0", "a" * 100_000, "blocks.²⁵.norm1.weight", "{i}", "{0.__class__}", "%s"),
    *(
        "pos_embed",
        "cls_token",
        "head.weight",
        "__metadata__",
        "module.cls_token",
        "encoder.layer.7.layernorm_before.bias",
    ),
)


def mutated_safetensors(data: bytes, draw: random.Random) -> bytes:
    how = draw.random()
    if how < 0.35:
        return scrambled(data, draw)
    if how < 0.4:
        return pickled(draw)
    length = struct.unpack("<Q", data[:8])[0]
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    if how < 0.45:
        return struct.pack("<Q", draw.choice(NUMBERS)) + data[8:]
    if how < 0.5:
        text = deep(draw).encode()
        return struct.pack("<Q", len(text)) + text + body
    if how < 0.52:  # a great many tensors of nothing
        many = {f"blocks.{index}.norm1.weight": _empty_entry([0]) for index in range(draw.choice((1000, 20_000)))}
        return _with_header({**header, **many}, body)
    for _ in range(draw.choice((1, 1, 2, 5))):
        names = list(header)
        name = draw.choice(names)
        entry = header[name]
        what = draw.randrange(7)
        if what == 0:
            header = {draw.choice(NAMES) if one == name else one: part for one, part in header.items()}
        elif what == 1:
            header = {**header, draw.choice(NAMES): _empty_entry(draw.choice(([0], [10**12, 0], [0, 2**62, 2**62])))}
        elif what == 2:
            other = draw.choice(names)
            header = {**header, name: header[other], other: entry}
        elif what == 3 and isinstance(entry, dict) and "shape" in entry:
            shape = [*entry["shape"]]
            shape = draw.choice((shape[::-1], [1, *shape], [*shape, 1], [draw.choice(NUMBERS), *shape], [], [-1, -1]))
            header = {**header, name: {**entry, "shape": shape}}
        elif what == 4 and isinstance(entry, dict) and "dtype" in entry:
            dtype = draw.choice(
                ("F64", "F16", "BF16", "I64", "U8", "BOOL", "C64", "F4", "F8_E4M3", "E8M0", "X", 1, None)
            )
            header = {**header, name: {**entry, "dtype": dtype}}
        else:
            header = {**header, name: other_json(entry, draw)}
    if draw.random() < 0.3:  # offsets that follow from the shapes, so that more is read than the header
        header, body = _packed(header)
    return _with_header(header, body)


def _empty_entry(shape: list[int]) -> dict:
    return {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}


def _packed(header: dict) -> tuple[dict, bytes]:
    """The header with offsets for tensors as large as their shapes say, and their bytes; without very large ones."""
    found, at = {}, 0
    sizes = {"F64": 8, "I64": 8, "F16": 2, "BF16": 2, "U8": 1, "BOOL": 1, "F32": 4, "C64": 8}
    for name, entry in header.items():
        try:
            size = sizes[entry["dtype"]]
            for side in entry["shape"]:
                size *= side
            if isinstance(size, int) and 0 <= size < 1 << 20:
                found[name] = {**entry, "data_offsets": [at, at + size]}
                at += size
        except (KeyError, TypeError):
            found[name] = entry
    return found, bytes(at)


def _with_header(header: dict, body: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def mutated_training(data: bytes, draw: random.Random) -> bytes:
    """The checkpoint of a run with another state, or other tensors, and the digest that is right for them."""
    length = struct.unpack("<Q", data[:8])[0]
    state, tensors = json.loads(data[8 : 8 + length])["__metadata__"]["state"], safetensors.torch.load(data)
    if draw.random() < 0.7:
        state = mutated_json(state, draw).decode(errors="replace")
    else:
        for _ in range(draw.choice((1, 1, 2, 5))):
            name = draw.choice(sorted(tensors))
            tensor = tensors.pop(name)
            how = draw.randrange(5)
            if how == 1:
                tensors[draw.choice(NAMES)] = tensor
            elif how == 2:
                tensors[name] = tensor.to(draw.choice((torch.float64, torch.bfloat16, torch.int64, torch.uint8)))
            elif how == 3:
                shape = draw.choice(((-1,), (1, *tensor.shape), tensor.shape[::-1]))
                tensors[name] = tensor.reshape(shape)
            elif how == 4:
                tensors[name] = torch.full_like(tensor, draw.choice((0, 1, 255)))
    header = {"state": state, "sha256": checkpoint._digest(tensors, state)}
    return safetensors.torch.save(tensors, header)


def mutated_npz(data: bytes, draw: random.Random) -> bytes:
    how = draw.random()
    if how < 0.45:
        return scrambled(data, draw)
    if how < 0.5:
        return pickled(draw)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist() if info.file_size < 1 << 20}
    out = io.BytesIO()
    chosen = set(draw.sample(sorted(members), draw.choice((1, 1, 2, 5))))
    method = zipfile.ZIP_STORED
    if draw.random() < 0.2:
        method = draw.choice((zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA))
    with warnings.catch_warnings(), zipfile.ZipFile(out, "w", method) as archive:
        warnings.simplefilter("ignore")  # of names that are there twice
        for name, content in members.items():
            if name in chosen:
                what = draw.randrange(5)
                if what == 0:
                    name = (
                        draw.choice((*NAMES, *(f"{one}.npy" for one in NAMES), *members))[:60_000].replace("\0", "")
                        or "x"
                    )
                elif what == 1:
                    content = draw.choice((scrambled(content, draw), pickled(draw), b"", bytes(4 << 20)))
                else:
                    content = _other_array(content, draw)
            archive.writestr(name, content)
    data = bytearray(out.getvalue())
    if draw.random() < 0.3:  # a length in the directory, or in front of a member, that is not true
        places = [at for at in range(len(data) - 4) if data[at : at + 4] in (b"PK\1\2", b"PK\3\4")]
        at = draw.choice(places)
        field = at + (24 if data[at + 2] == 1 else 22) - draw.choice((0, 4))
        data[field : field + 4] = struct.pack("<I", draw.choice(NUMBERS) % 2**32)
    return bytes(data)


def _other_array(content: bytes, draw: random.Random) -> bytes:
    """An array under a header that says something else of it."""
    length = struct.unpack("<H", content[8:10])[0]
    said = eval(content[10 : 10 + length].decode(), {"__builtins__": {}})  # our own
    shape = draw.choice(
        (
            *((10**12,), (2**31, 2**31), (-1,), (-1, -4), (0,), (), (1.5,), ("a",), (True,), (10**30,), (2**62, 4)),
            *(said["shape"][::-1], (*said["shape"], 1), (0, 10**12)),
        )
    )
    descr = draw.choice(
        (
            "<f4",
            "<f4",
            "<f4",
            "|O",
            ">f4",
            "<f8",
            "<i8",
            "<c8",
            "|V4",
            "|S4",
            "<U1",
            "<f2",
            "|b1",
            "<M8[s]",
            [("a", "<f4")],
        )
    )
    changed = {**said, draw.choice(("shape", "descr")): None}
    changed = {"shape": shape if changed["shape"] is None else said["shape"], "fortran_order": draw.random() < 0.5} | {
        "descr": descr if changed["descr"] is None else said["descr"]
    }
    text = repr(changed)
    if draw.random() < 0.1:
        text = draw.choice(
            ("__import__('os').mkdir('unpickled')", "(" * 5000, "{" * 90 + "}" * 90, "1" * 9000, "[" * 5000)
        )
    text = text.encode() + b" " * 20 + b"\n"
    return content[:8] + struct.pack("<H", len(text)) + text + content[10 + length :]


def mutated_picture(data: bytes, draw: random.Random) -> bytes:
    how = draw.random()
    if how < 0.6:
        return scrambled(data, draw)
    if how < 0.63:
        return pickled(draw)
    found = bytearray(data)
    for _ in range(draw.choice((1, 2, 2, 4))):  # its sides, wherever they stand, become others
        code = draw.choice(("<H", ">H", "<I", ">I"))
        side = draw.choice((37, 23, 36, 22))  # WEBP keeps one less
        place = found.find(struct.pack(code, side))
        if place >= 0:
            number = draw.choice((*NUMBERS, 9000, 16383, 30_000)) % 2 ** (8 * struct.calcsize(code))
            found[place : place + struct.calcsize(code)] = struct.pack(code, number)
    if data[:2] in (b"P5", b"P6"):
        sides = f"{draw.choice(NUMBERS)} {draw.choice(NUMBERS)}".encode()
        found = bytearray(data.replace(b"37 23", draw.choice((sides, b"9000 9000", b"1 99999999", b"9" * 5000)), 1))
    if found[:4] == b"\x89PNG":
        found = _with_sums(found)
    return bytes(found) if how < 0.9 else scrambled(bytes(found), draw)


def _with_sums(data: bytearray) -> bytearray:
    """A PNG whose chunks have the sums that belong to them."""
    at = 8
    while at + 12 <= len(data):
        length = struct.unpack(">I", data[at : at + 4])[0]
        if at + 12 + length > len(data):
            break
        data[at + 8 + length : at + 12 + length] = struct.pack(">I", zlib.crc32(data[at + 4 : at + 8 + length]))
        at += 12 + length
    return data


# ---- a case, and how it is read ------------------------------------------------------------------------------------


def make(kind: str, seed: str, good: Path, folder: Path) -> Path:
    """Write the case of this seed into an empty folder: the path that a user would give."""
    draw = random.Random(seed)
    if kind == "json":
        source = draw.choice(sorted((good / kind).iterdir()))
        for path in source.iterdir():
            shutil.copy(path, folder)
        for config in draw.sample(sorted(folder.glob("*.json")), 1):
            config.write_bytes(mutated_json(config.read_text(), draw))
        return folder
    source = draw.choice(sorted((good / kind).iterdir()))
    if kind == "training":
        (folder / checkpoint.TRAINING).write_bytes(mutated_training((source / checkpoint.TRAINING).read_bytes(), draw))
        return folder
    mutate = {"safetensors": mutated_safetensors, "npz": mutated_npz, "pictures": mutated_picture}[kind]
    path = folder / source.name
    path.write_bytes(mutate(source.read_bytes(), draw))
    return path


def read(kind: str, path: Path) -> None:
    """As a user reads it."""
    if kind == "pictures":
        for channels in (1, 3):
            inference.preprocess(path, img_size=32, mean=(0.5,), std=(0.5,), in_chans=channels)
    elif kind == "training":  # as `vit-fast train --resume` with no other setting does, for one step
        settings = training.read_settings(path)
        run = training._Run(training.Config(**settings | {"data": "digits", "output": str(path)}))
        run.restore(path)
        for batch in run.batches():
            with contextlib.suppress(FloatingPointError):  # of weights that are none
                run.train_step(*batch)
            break
    elif path.name == checkpoint.TRAINING:
        checkpoint.load_training(path.parent)
    else:
        model = vit_fast.load(path)
        if model.num_classes and not model.pretrained_cfg.get("projection"):
            model.predict(torch.zeros(1, 40, 40, 3, dtype=torch.uint8))


WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
FORBIDDEN = (
    *("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty", "subprocess.Popen", "pty.spawn"),
    *("socket.connect", "socket.bind", "socket.getaddrinfo", "urllib.Request", "pickle.find_class", "ctypes.dlopen"),
    *("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.chmod", "os.chown", "os.truncate"),
    *("os.putenv", "shutil.rmtree", "webbrowser.open"),
)


class Watch:
    """What Python tells of while `folder` is set: whatever no reading of a file should do."""

    def __init__(self):
        self.folder: str | None = None
        self.seen: list[str] = []
        # Where modules are, one of which may be imported as late as here.
        roots = (sys.prefix, sys.base_prefix, pathlib.Path(__file__).parents[1])
        self.code = tuple(f"{os.path.realpath(root)}{os.sep}" for root in roots)
        sys.addaudithook(self)

    def __call__(self, event: str, arguments: tuple) -> None:
        if self.folder is None:
            return
        if event in FORBIDDEN:
            self.seen.append(f"{event} {arguments}")
        elif event == "exec":
            name = getattr(arguments[0], "co_filename", "")
            if not name.startswith((*self.code, "<frozen", "<__array_function__")):
                self.seen.append(f"exec of {name}")
        elif event == "open":
            path, _, flags = arguments
            if isinstance(path, int):
                return
            path = os.path.realpath(os.fsdecode(path))
            if flags & WRITES or not path.startswith((f"{self.folder}{os.sep}", *self.code, "/proc/self/", "/sys/")):
                self.seen.append(f"open {path} {flags}")


def _too_much(error: BaseException | None) -> bool:
    """Whether an error, or one that it came from, is of memory."""
    while error is not None:
        if isinstance(error, MemoryError) or "allocate" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _files(folder: Path) -> set[str]:
    """The files of a case, those beside it, and those where the process is: what C writes Python is not told of."""
    return {
        os.path.join(where, name)
        for top in (folder.parent, Path.cwd())
        for where, *names in os.walk(top)
        for name in (*names[0], *names[1])
    }


def judge(kind: str, path: Path, watch: Watch) -> tuple[str, str]:
    """("read" or "refused", its error), or ("wrong", why).

    A file that took too long is read again: a machine that does other things too makes one reading slow, not three.
    """
    for _ in range(3):
        outcome, said = _judge_once(kind, path, watch)
        if outcome != "slow":
            return outcome, said
    return "wrong", said


def _judge_once(kind: str, path: Path, watch: Watch) -> tuple[str, str]:
    """As `judge` has it, or ("slow", how long)."""
    folder = path if path.is_dir() else path.parent
    watch.seen.clear()
    before = _files(folder)
    watch.folder = os.path.realpath(folder)
    began, started, error, outcome = time.monotonic(), time.process_time(), None, "read"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            read(kind, path)
    except ValueError as caught:
        outcome, error = "refused", caught
    except Exception as caught:
        outcome, error = "wrong", caught
    finally:
        watch.folder = None
    seconds, waited = time.process_time() - started, time.monotonic() - began
    said = "".join(traceback.format_exception(error)[-3:])[:2000] if error is not None else ""
    if _too_much(error):
        return "wrong", f"asked for more than {MEMORY[kind] >> 20} MiB: {said}"
    if (more := _files(folder) - before) or watch.seen:
        return "wrong", f"did more than read: {watch.seen}, {sorted(more)}"
    if outcome == "wrong":
        return outcome, said
    if seconds > SECONDS:
        return "slow", f"took {seconds:.1f} s: {said}"
    if waited > WAIT_S:
        return "slow", f"waited {waited:.1f} s: {said}"
    return outcome, said


def room_for(kind: str) -> int:
    """What this process has of memory now, and what a file of this kind may take beside."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + MEMORY[kind]


def limit_memory(room: int | None) -> None:
    most = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (most if room is None else room, most))


def _judge_many(kind: str, seeds: list[str], good: Path, pipe) -> None:
    torch.set_num_threads(1)
    logging.disable()
    if kind == "pictures":  # libtiff prints what it finds
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    watch = Watch()
    with tempfile.TemporaryDirectory() as outer:
        os.chdir(outer)
        for path in sorted((good / kind).iterdir()):  # what is imported late, and memory that stays
            with contextlib.suppress(ValueError):
                read(kind, path)
        room = room_for(kind)
        for seed in seeds:
            folder = Path(outer) / "case"
            folder.mkdir()
            try:
                path = make(kind, seed, good, folder)
            except Exception:
                pipe.send(("no case", traceback.format_exc()))
                return
            limit_memory(room)
            answer = judge(kind, path, watch)
            limit_memory(None)
            shutil.rmtree(folder)
            shutil.rmtree("unpickled", ignore_errors=True)
            pipe.send(answer)


def judge_all(kind: str, seeds: list[str], good: Path) -> tuple[Counter, dict[str, str]]:
    """(how many were read and refused, seed → what went wrong)"""
    found, wrong = Counter(), {}
    left = list(seeds)
    while left:
        ours, theirs = CONTEXT.Pipe(duplex=False)
        process = CONTEXT.Process(target=_judge_many, args=(kind, left, good, theirs))
        process.start()
        theirs.close()
        ended = False
        while left:
            try:
                if not ours.poll(PATIENCE_S):
                    process.kill()
                    ended = True
                    outcome, why = "wrong", f"no answer in {PATIENCE_S} s"
                else:
                    outcome, why = ours.recv()
            except EOFError:
                process.join()
                outcome, why = "wrong", f"the process ended with {process.exitcode}"
                ended = True
            seed = left.pop(0)
            assert outcome != "no case", f"{seed}: {why}"
            if outcome == "wrong":
                wrong[seed] = why
            else:
                found[f"{kind} {outcome}"] += 1
            if ended:  # the others are for another process
                break
        process.join()
    return found, wrong


def seeds_of(kind: str, seed: int, files: int) -> list[str]:
    return [f"{kind} {seed} {index}" for index in range(files)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=2000, help="of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", help="the seed that a failure printed: read this one, here")
    arguments = parser.parse_args()
    started, found, wrong = time.monotonic(), Counter(), {}
    with tempfile.TemporaryDirectory() as folder:
        good = Path(folder) / "good"
        make_good(good)
        if arguments.case:
            kind = arguments.case.split()[0]
            (Path(folder) / "case").mkdir()
            read(kind, make(kind, arguments.case, good, Path(folder) / "case"))
            return
        for kind in KINDS:
            some, bad = judge_all(kind, seeds_of(kind, arguments.seed, arguments.files), good)
            found += some
            wrong |= bad
            print(f"{time.monotonic() - started:.0f} s: {kind}: {dict(some)}, {len(bad)} wrong", flush=True)
            for seed, why in bad.items():
                print(f"\n--case {seed!r}: {why}", file=sys.stderr, flush=True)
    if wrong:
        sys.exit(f"{len(wrong)} of {len(KINDS) * arguments.files} files went wrong")
    seconds = time.monotonic() - started
    command = f"python -m tests.hostile --files {arguments.files} --seed {arguments.seed}"
    what = (
        "mutated files, each of which was read or refused with a ValueError within a second of the processor, in the "
        f"memory that tests/hostile.py allows ({MEMORY['json'] >> 20} MiB, for pictures {MEMORY['pictures'] >> 20}), "
        "with nothing written, started, connected to or unpickled"
    )
    print(counts.keep("hostile", what, command, seconds, dict(found)))


if __name__ == "__main__":
    from tests import hostile

    del __file__  # the forked processes would run it again to find what they are given: it is in tests.hostile
    __spec__ = None
    hostile.main()
