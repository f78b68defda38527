"""Runs, pictures, folders and models small enough for a test."""

from pathlib import Path

import torch
from PIL import Image
from torch import nn

from vit_fast import training

# 1,438 digits make six steps an epoch, and a step takes milliseconds.
TINY = {"model_kwargs": {"embed_dim": 16, "depth": 2, "num_heads": 1}, "batch_size": 256, "warmup_epochs": 1}
TINY_FLAGS = "--model-kwargs embed_dim=16 --model-kwargs depth=2 --model-kwargs num_heads=1 -b 256 --warmup-epochs 1"


def tiny_config(output: Path, **settings) -> training.Config:
    return training.Config("digits", str(output), **TINY | {"epochs": 1, "drop_path": 0.2} | settings)


def picture(path: Path, colour=(200, 30, 30), size=(12, 10)) -> Path:
    """A picture file of one colour with one pixel of another; size is (columns, rows)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", size, colour)
    image.putpixel((1, 2), (255, 255, 255))
    image.save(path)
    return path


def colour_folder(folder: Path, count: int = 10) -> Path:
    """Two classes that differ in colour."""
    for name, colour in (("red", (200, 30, 30)), ("green", (30, 200, 30))):
        for index in range(count):
            picture(folder / name / f"{index}.png", tuple(min(255, level + index) for level in colour))
    return folder


def bomb(path: Path, side: int = 20_000) -> Path:
    """A small file that says it is 400 million pixels: a PNG header alone."""
    import struct
    import zlib

    header = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    data = b"IDAT" + zlib.compress(bytes(1000))
    chunks = (
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in (header, data)
    )
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
    return path


def equal_states(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether two dicts hold the same names and the same bits."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def without_speed(history: list[dict]) -> list[dict]:
    return [{key: value for key, value in record.items() if key != "images_per_second"} for record in history]


def drawn(model: nn.Module) -> nn.Module:
    """Every parameter drawn anew: some heads start at zero, LayerScale at 1e-5."""
    with torch.no_grad():
        for parameter in model.parameters():
            near = 1.0 if parameter.dim() == 1 else 0.0
            parameter.copy_(near + (0.3 if near else 0.1) * torch.randn_like(parameter))
    return model.eval()
