"""Checkpoints: a folder of safetensors and JSON, without a pickle anywhere.

    config.json             architecture, its arguments, classes, preprocessing
    model.safetensors       the weights, under timm's names
    training.safetensors    all that a run needs to go on: weights, optimiser, generators; its position as JSON in the
                            header

Each file is written beside its place, flushed to the disk and then renamed over the old one, so that at any moment each
is whole, the old one or the new. A run goes on from training.safetensors alone: it never meets weights of one step and
an optimiser of another.
"""

import contextlib
import dataclasses
import fnmatch
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from vit_fast.zoo import create_model

CONFIG, WEIGHTS, TRAINING = "config.json", "model.safetensors", "training.safetensors"
FORMAT = 1
PICKLES = (".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt")
SHOWN = 5  # names listed in an error


@dataclass(frozen=True)
class Config:
    """What is needed to build the model again and to read its answer."""

    architecture: str  # a name of the zoo
    kwargs: dict  # arguments of create_model, JSON values
    classes: tuple[str, ...]
    preprocessing: dict  # input_size, mean, std, interpolation, crop_pct

    def build(self, **overrides) -> nn.Module:
        """The model with fresh weights."""
        model = create_model(self.architecture, len(self.classes), **self.kwargs | overrides)
        model.pretrained_cfg = {**model.pretrained_cfg, **self.preprocessing}
        return model


def check_writable(folder: str | Path) -> None:
    """Make the folder, and try to write into it.

    Raises:
        ValueError: where that fails, saying why.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable.tmp"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise ValueError(f"output: cannot write to {folder}: {error.strerror}") from error


@contextlib.contextmanager
def replacing(path: Path):
    """A path beside `path` to write to; after the block it is on the disk and has taken the place of `path`."""
    beside = path.with_name(f".{path.name}.tmp")
    try:
        yield beside
        _flush(beside)
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    if os.name != "nt":  # a folder cannot be opened there
        _flush(path.parent)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """A whole new content for a text file, or the old one, never a part."""
    with replacing(path) as beside:
        beside.write_text(text, encoding="utf-8")


def save(folder: str | Path, model: nn.Module, config: Config, training: dict[str, Tensor], state: dict) -> None:
    """Write a checkpoint, replacing the one that the folder holds.

    Args:
        training: tensors of the optimiser and the generators by name; no name begins with "model.".
        state: JSON values: the position of the run.
    """
    folder = Path(folder)
    weights = _weights_of(model)
    everything = {f"model.{name}": tensor for name, tensor in weights.items()} | training
    text = json.dumps({"format": FORMAT, **dataclasses.asdict(config)}, indent=2)
    write_text(folder / CONFIG, text + "\n")
    _write_tensors(folder / TRAINING, everything, {"state": json.dumps(state)})
    _write_tensors(folder / WEIGHTS, weights, {})


def _weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}


def write_weights(path: Path, weights: nn.Module | dict[str, Tensor]) -> None:
    """Write weights beside the config of their folder, replacing what is there.

    Raises:
        ValueError: where that fails, as on a full disk.
    """
    _write_tensors(path, weights if isinstance(weights, dict) else _weights_of(weights), {})


def _write_tensors(path: Path, tensors: dict[str, Tensor], header: dict[str, str]) -> None:
    import safetensors  # where a file is: a model needs torch alone
    from safetensors.torch import save_file

    with replacing(path) as beside:
        try:
            save_file(tensors, beside, {"format": "pt", **header})
        except safetensors.SafetensorError as error:  # a full disk comes as this
            raise ValueError(f"output: cannot write {path}: {error}") from error
        umask = os.umask(0)
        os.umask(umask)
        beside.chmod(0o666 & ~umask)  # safetensors makes files that only their owner may read


def load(folder: str | Path, device: str | torch.device = "cpu") -> tuple[nn.Module, Config]:
    """The model of a checkpoint folder, in evaluation mode, and its config.

    Raises:
        ValueError: for a folder without a checkpoint, a file cut off, weights of another architecture, a pickle.
    """
    folder = Path(folder)
    config = load_config(folder)
    model = config.build()
    load_weights(model, folder / WEIGHTS)
    return model.to(device).eval(), config


def load_config(folder: str | Path) -> Config:
    """The config of a checkpoint folder.

    Raises:
        ValueError: for a folder without one, and one that cannot be read.
    """
    path = Path(folder) / CONFIG
    if not path.is_file():
        raise ValueError(f"{folder}: no checkpoint: it holds no {CONFIG}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        config = Config(**{field.name: values[field.name] for field in dataclasses.fields(Config)})
        shape = [dict, list, dict, str]
        if values["format"] != FORMAT:
            raise ValueError(f"format {values['format']!r}, this version of vit_fast reads {FORMAT}")
        if [type(part) for part in (config.kwargs, config.classes, config.preprocessing, config.architecture)] != shape:
            raise TypeError("a field has the wrong type")
        return dataclasses.replace(config, classes=tuple(map(str, config.classes)))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: no config of a checkpoint ({error})") from error


def load_training(folder: str | Path) -> tuple[dict[str, Tensor], dict[str, Tensor], dict]:
    """What `save` wrote for going on: (weights, tensors of optimiser and generators, state).

    Raises:
        ValueError: as `load`.
    """
    path = Path(folder) / TRAINING
    tensors, header = read_tensors(path)
    if "state" not in header:
        raise ValueError(f"{path}: holds weights alone; a run goes on from the {TRAINING} of `vit-fast train`")
    weights = {name.removeprefix("model."): tensors.pop(name) for name in list(tensors) if name.startswith("model.")}
    try:
        state = json.loads(header["state"])
    except ValueError as error:
        raise ValueError(f"{path}: damaged, its state is no JSON ({error})") from error
    return weights, tensors, state


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file, on the CPU, and its header's text fields.

    Raises:
        ValueError: for a pickle, which is never opened, and a file that is cut off or no safetensors.
    """
    import safetensors
    from safetensors.torch import load_file

    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    if path.suffix.lower() in PICKLES or _is_pickle(path):
        raise ValueError(
            f"{path}: refused, a pickle can run any code when it is opened. Where you trust it, convert it once: "
            "safetensors.torch.save_file(torch.load(FILE, weights_only=True), 'FILE.safetensors')"
        )
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
        return load_file(path), header
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path}: cut off, or no safetensors file ({error})") from error


def _is_pickle(path: Path) -> bool:
    with path.open("rb") as file:
        start = file.read(9)
    if start[8:] == b"{":  # safetensors: eight bytes of length, which may look like anything, then JSON
        return False
    return start.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"))


def load_weights(
    model: nn.Module, source: str | Path | dict[str, Tensor], name: str = "the weights", partial: Sequence[str] = ()
) -> None:
    """Put the weights of a safetensors file, or a dict, into a model: all of them, and nothing else.

    Args:
        name: what errors call a dict.
        partial: shell patterns of names that may be missing or left over.

    Raises:
        ValueError: where names are missing, left over or of another shape, listing them, and as `read_tensors`.
    """
    weights = source
    if not isinstance(source, dict):
        name, weights = str(source), read_tensors(source)[0]
    wanted = model.state_dict()

    def known(key: str) -> bool:
        return any(fnmatch.fnmatchcase(key, pattern) for pattern in partial)

    problems = {
        "missing": [key for key in wanted if key not in weights and not known(key)],
        "left over": [key for key in weights if key not in wanted and not known(key)],
        "of another shape": [
            f"{key} {list(weights[key].shape)}, the model has {list(wanted[key].shape)}"
            for key in wanted
            if key in weights and weights[key].shape != wanted[key].shape
        ],
    }
    if any(problems.values()):
        lines = [f"{name}: the weights are of another architecture"]
        for problem, keys in problems.items():
            if keys:
                more = f", and {len(keys) - SHOWN} more" if len(keys) > SHOWN else ""
                lines.append(f"{len(keys)} {problem}: {', '.join(keys[:SHOWN])}{more}")
        raise ValueError("; ".join(lines))
    model.load_state_dict(weights, strict=not partial)
