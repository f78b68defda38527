"""Files of weights: safetensors, one or in shards, and google-research's .npz. No pickle is ever opened."""

import json
import re
from pathlib import Path

import torch
from torch import Tensor

from vit_fast import checkpoint

INDEX = "model.safetensors.index.json"
NAMES = (checkpoint.WEIGHTS, "open_clip_model.safetensors")  # of the one file in a folder
MOST_JSON = 16 << 20  # bytes of a config or an index


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, or of the safetensors of a folder, under the names that they have there.

    Raises:
        ValueError: for a pickle, a file that is cut off, a folder without weights, an index that leads out of it.
    """
    path = Path(path)
    if path.is_dir():
        if (path / INDEX).is_file():
            return _read_sharded(path)
        found = next((path / name for name in NAMES if (path / name).is_file()), None)
        if found is None:
            raise ValueError(f"{path}: no checkpoint: it holds no {checkpoint.WEIGHTS}")
        path = found
    if path.suffix != ".npz":
        return checkpoint.read_tensors(path)[0]
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(np.array(arrays[name])) for name in arrays.files}
    except Exception as error:  # zipfile and numpy have many of their own
        raise ValueError(f"{path}: cut off, or no .npz of arrays alone ({error})") from error


def _read_sharded(folder: Path) -> dict[str, Tensor]:
    places = read_json(folder / INDEX).get("weight_map")
    if not isinstance(places, dict):
        raise ValueError(f"{folder / INDEX}: no weight_map")
    tensors = {}
    for name in sorted(set(map(str, places.values()))):
        if not re.fullmatch(r"\w[\w.-]*\.safetensors", name):
            raise ValueError(f"{folder / INDEX}: refused, {name!r} is no name of a safetensors file beside it")
        tensors |= checkpoint.read_tensors(folder / name)[0]
    missing = sorted(set(places) - set(tensors))
    if missing:
        raise ValueError(f"{folder / INDEX}: {missing[0]} is in no file")
    return tensors


def read_json(path: Path) -> dict:
    """The object in a JSON file.

    Raises:
        ValueError: for a file that is not there, too large, or no JSON object.
    """
    try:
        if path.stat().st_size > MOST_JSON:
            raise ValueError(f"larger than {MOST_JSON >> 20} MB")
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError(f"got a {type(found).__name__}, takes an object")
        return found
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: no JSON that can be read ({error})") from error


def write(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a file of safetensors, or a .npz where the name ends so: whole, or the old one stays.

    Raises:
        ValueError: for another ending, or where it cannot be written.
    """
    path = Path(path)
    if path.suffix == ".npz":
        import numpy as np

        with checkpoint.replacing(path) as beside, beside.open("wb") as file:
            np.savez(file, **{name: tensor.numpy() for name, tensor in tensors.items()})
    elif path.suffix == ".safetensors":
        checkpoint.write_weights(path, tensors)
    else:
        raise ValueError(f"{path}: ends in {path.suffix or 'nothing'}, takes .safetensors or .npz")
