"""Files of weights: safetensors, one or in shards, and google-research's .npz. No pickle is ever opened."""

import math
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vit_fast import checkpoint
from vit_fast.inference import NoLonger

INDEX = "model.safetensors.index.json"
NAMES = (checkpoint.WEIGHTS, "open_clip_model.safetensors")  # of the one file in a folder
# What a .npz may unpack to. Weights hardly pack; zeros unpack to a thousand times their file.
MOST_UNPACKED = 64 << 20  # bytes of a small file
MOST_RATIO = 20  # times a larger one


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, or of the safetensors of a folder, under the names that they have there.

    Raises:
        ValueError: for a pickle, a file that is cut off, a folder without weights, an index that leads out of it.
    """
    path = Path(path)
    if path.is_dir():
        if (path / INDEX).is_file():
            return _read_sharded(path)
        pickled = sorted(path.glob("*pytorch_model*.bin"))  # which `read_tensors` refuses, saying how to convert it
        found = next((file for file in (*(path / name for name in NAMES), *pickled) if file.is_file()), None)
        if found is None:
            raise ValueError(f"{path}: no checkpoint: it holds no {checkpoint.WEIGHTS}")
        path = found
    if path.suffix != ".npz":
        return checkpoint.read_tensors(path)[0]
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        with NoLonger(path) as file, zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            unpacked = sum(member.file_size for member in members)
            if unpacked > max(MOST_UNPACKED, MOST_RATIO * path.stat().st_size):
                raise ValueError(f"it says that it unpacks to {unpacked:,} bytes")
            return {member.filename.removesuffix(".npy"): _array(archive, member) for member in members}
    except Exception as error:  # zipfile and numpy have many of their own
        raise ValueError(f"{path}: cut off, or no .npz of arrays alone ({error})") from error


def _array(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Tensor:
    """One array of a .npz. numpy's own reader allocates what the header says before it has seen that it is there."""
    import numpy as np

    if not member.filename.endswith(".npy"):
        raise ValueError(f"{member.filename} is no array")
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{member.filename} is packed as no .npz is")
    with archive.open(member) as file:
        version = np.lib.format.read_magic(file)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"{member.filename} is of version {version}")
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, columns_first, dtype = read_header(file)
        if dtype.hasobject:
            raise ValueError(f"{member.filename} holds pickled objects")
        if math.prod(shape) * dtype.itemsize != member.file_size - file.tell():
            raise ValueError(f"{member.filename} is not of the length of {shape} {dtype}")
        array = np.frombuffer(bytearray(file.read()), dtype)
    return torch.from_numpy(array.reshape(shape, order="F" if columns_first else "C"))


def _read_sharded(folder: Path) -> dict[str, Tensor]:
    places = checkpoint.read_json(folder / INDEX).get("weight_map")
    if not isinstance(places, dict):
        raise ValueError(f"{folder / INDEX}: no weight_map")
    tensors: dict[str, Tensor] = {}
    for name in places.values():
        if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]{,200}\.safetensors", name):
            raise ValueError(f"{folder / INDEX}: refused, {name!r} is no name of a safetensors file beside it")
    for name in sorted(set(places.values())):
        tensors |= checkpoint.read_tensors(folder / name)[0]
    missing = sorted(set(places) - set(tensors))
    if missing:
        raise ValueError(f"{folder / INDEX}: {missing[0]} is in no file")
    return tensors


def write(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a file of safetensors, or a .npz where the name ends so: whole, or the old one stays.

    Raises:
        ValueError: for another ending, or where it cannot be written.
    """
    path = Path(path)
    if path.suffix == ".npz":
        import numpy as np

        with checkpoint.replacing(path) as beside, beside.open("wb") as file:
            arrays: dict[str, Any] = {name: tensor.numpy() for name, tensor in tensors.items()}
            np.savez(file, **arrays)
    elif path.suffix == ".safetensors":
        checkpoint.write_weights(path, tensors)
    else:
        raise ValueError(f"{path}: ends in {path.suffix or 'nothing'}, takes .safetensors or .npz")
