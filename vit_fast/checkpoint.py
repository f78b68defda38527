"""Checkpoints: a folder of safetensors and JSON, without a pickle anywhere.

    config.json             architecture, its arguments, classes, preprocessing
    model.safetensors       the weights, under timm's names
    training.safetensors    all that a run needs to go on: weights, optimiser, generators; its position as JSON in the
                            header, with a digest of all of it
    training.previous.safetensors    the same of the checkpoint before, for where a disk damages the last one

Each file is written beside its place, flushed to the disk and then renamed over the old one, so that at any moment each
is whole, the old one or the new. A run goes on from training.safetensors alone: it never meets weights of one step and
an optimiser of another.
"""

import contextlib
import dataclasses
import fnmatch
import functools
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from vit_fast.inference import check_pictures
from vit_fast.model import VisionTransformer
from vit_fast.ops.backend import dtype_name
from vit_fast.zoo import build

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger("vit_fast")

CONFIG, WEIGHTS, TRAINING = "config.json", "model.safetensors", "training.safetensors"
PREVIOUS = "training.previous.safetensors"
FORMAT = 1
MOST_JSON = 16 << 20  # bytes of a config or an index
MOST_BLOCKS = 256  # of a model that is read: a file may hold any number of tensors of no numbers
LEAST_OF_BLOCK = 8  # tensors: two norms of two, four products
# Of a picture of a model without positions, of which no tensor has a size that depends on it.
MOST_SIDE, MOST_PATCHES = 1024, 4096
PICKLES = (".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt")
# What is given in place of a safetensors file, by its first bytes.
TEXTS = {
    b"version https://git-lfs": "a pointer of git-lfs; `git lfs pull` fetches the file itself",
    b"{": "JSON, which holds no weights",
    b"<": "a page of the web or XML; download the file itself",
}
SHOWN = 5  # names listed in an error
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # of weights


@dataclass(frozen=True)
class Config:
    """What is needed to build the model again and to read its answer."""

    architecture: str  # a name of the zoo
    kwargs: dict  # arguments of create_model, JSON values
    classes: tuple[str, ...]
    preprocessing: dict  # input_size, mean, std, interpolation, crop_pct, crop_mode
    pos_interpolation: str = "antialiased"  # how the weights that a run began with have positions resampled

    def build(self, **overrides) -> VisionTransformer:
        """The model with fresh weights."""
        model = build(self.architecture, len(self.classes), self.kwargs | overrides)
        model.pretrained_cfg = {**model.pretrained_cfg, **self.preprocessing}
        model.pos_interpolation = self.pos_interpolation
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
        probe.unlink(missing_ok=True)  # another process may have tried at the same time
    except OSError as error:
        raise ValueError(f"output: cannot write to {folder}: {error.strerror}") from error


_claims: set[int] = set()


def _let_go() -> None:
    """A process that was forked, as those that decode pictures are, would keep a claim when its parent is killed."""
    for handle in _claims:
        os.close(handle)
    _claims.clear()


if fcntl is not None:
    os.register_at_fork(after_in_child=_let_go)


@contextlib.contextmanager
def claimed(folder: Path):
    """Inside the block no other process has the folder, where the system has locks. A process that dies lets go.

    Raises:
        ValueError: where another process has it.
    """
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    _claims.add(handle)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of the folder itself: no file is left behind
        except BlockingIOError:
            raise ValueError(f"output: another process is training into {folder}; name another folder") from None
        except OSError as error:
            log.warning(f"output: {folder} cannot be locked ({error.strerror}); let no other process write there")
        yield
    finally:
        _claims.discard(handle)
        os.close(handle)


@contextlib.contextmanager
def replacing(path: Path, previous: Path | None = None):
    """A path on the disk of `path` to write to; after the block it is on the disk and has taken the place of `path`.

    What stood there is kept as `previous`.
    """
    # In a folder of its own: safetensors writes to a further name beside the one that it is given, which a process that
    # is killed meanwhile leaves.
    room = _beside(path)
    shutil.rmtree(room, ignore_errors=True)
    try:
        room.mkdir()
        beside = room / path.name
        yield beside
        _flush(beside)
        if previous is not None and path.exists():
            _keep(path, previous)
        os.replace(beside, path)
        if os.name != "nt":  # a folder cannot be opened there
            _flush(path.parent)
    except OSError as error:
        if str(error.filename) == str(room):
            error.filename = str(path.parent)  # that is not there, or may not be written to
        if error.errno is not None and error.filename is None:
            error.filename = str(path)  # a full disk does not say which file did not fit
        raise
    finally:
        shutil.rmtree(room, ignore_errors=True)


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")


def _keep(path: Path, previous: Path) -> None:
    """The file under a second name too, which stays when another takes the first."""
    beside = _beside(previous)
    beside.unlink(missing_ok=True)  # of a process that was killed here
    try:
        try:
            os.link(path, beside)
        except OSError:  # a file system without links
            shutil.copyfile(path, beside)
            _flush(beside)
        os.replace(beside, previous)
    finally:
        beside.unlink(missing_ok=True)  # it is there too where both were one file: then nothing is renamed


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


def save(
    folder: str | Path,
    model: nn.Module,
    config: Config,
    training: dict[str, Tensor],
    state: dict,
    keep_previous: bool = True,
) -> None:
    """Write a checkpoint, replacing the one that the folder holds.

    Args:
        training: tensors of the optimiser and the generators by name; no name begins with "model.".
        state: JSON values: the position of the run.
        keep_previous: keep what a run went on from until now as the checkpoint before.
    """
    folder = Path(folder)
    weights = _weights_of(model)
    everything = {f"model.{name}": tensor for name, tensor in weights.items()} | training
    text = json.dumps({"format": FORMAT, **dataclasses.asdict(config)}, indent=2)
    write_text(folder / CONFIG, text + "\n")
    header = {"state": json.dumps(state)}
    header["sha256"] = _digest(everything, header["state"])
    _write_tensors(folder / TRAINING, everything, header, folder / PREVIOUS if keep_previous else None)
    _write_tensors(folder / WEIGHTS, weights, {})


def _digest(tensors: Mapping[str, Tensor], text: str) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        digest.update(f"\n{name} {tensors[name].dtype} {list(tensors[name].shape)}\n".encode())
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def uncompiled(name: str) -> str:
    """The name that a weight has without torch.compile, which puts what it wraps under one of its own."""
    return name.replace("_orig_mod.", "")


def _weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {uncompiled(name): tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}


def write_weights(path: Path, weights: nn.Module | dict[str, Tensor]) -> None:
    """Write weights beside the config of their folder, replacing what is there.

    Raises:
        ValueError: where that fails, as on a full disk.
    """
    _write_tensors(path, weights if isinstance(weights, dict) else _weights_of(weights), {})


def _write_tensors(
    path: Path, tensors: dict[str, Tensor], header: dict[str, str], previous: Path | None = None
) -> None:
    import safetensors  # where a file is: a model needs torch alone
    from safetensors.torch import save_file

    with replacing(path, previous) as beside:
        try:
            save_file(tensors, beside, {"format": "pt", **header})
        except safetensors.SafetensorError as error:  # a full disk comes as this
            raise ValueError(f"output: cannot write {path}: {error}") from error
        umask = os.umask(0)
        os.umask(umask)
        beside.chmod(0o666 & ~umask)  # safetensors makes files that only their owner may read


def load(folder: str | Path, device: str | torch.device = "cpu", **overrides) -> tuple[VisionTransformer, Config]:
    """The model of a checkpoint folder, in evaluation mode, and its config; `overrides` are further arguments of it.

    Raises:
        ValueError: for a folder without a checkpoint, a file cut off, weights of another architecture, a pickle.
    """
    folder = Path(folder)
    config = load_config(folder)
    weights = read_tensors(folder / WEIGHTS)[0]
    name = str(folder / WEIGHTS)
    build = functools.partial(config.build, **overrides)
    check_described(build, config.kwargs, weights, name)
    model = build()
    load_weights(model, weights, name)
    return model.to(device).eval(), config


def check_described(
    build: Callable[..., VisionTransformer],
    kwargs: Mapping[str, object],
    weights: Mapping[str, Tensor],
    name: str,
    partial: Sequence[str] = (),
) -> None:
    """Refuse a config whose model the weights are not of, without allocating what it describes.

    Args:
        build: makes the model, with further arguments.
        kwargs: what the config says.
        name, partial: as `load_weights`.

    Raises:
        ValueError: for a config of no model, or of one that the weights are not of.
    """
    held = sum(tensor.numel() for tensor in weights.values())
    for key, value in kwargs.items():
        if key in ("device", "dtype"):
            raise ValueError(f"{key}: the config says {value!r}; that is not for a checkpoint to say")
        # The shell of a block is no memory, but a while.
        most = min(len(weights) // LEAST_OF_BLOCK, MOST_BLOCKS) if key == "depth" else held
        sizes = value if isinstance(value, (list, tuple)) else [value]
        if any(isinstance(size, int) and size > most for size in sizes):
            numbers = f"{len(weights)} tensors of {held} numbers"
            raise ValueError(f"{key}: the config says {value}, the weights are {numbers}: {most} at most")
    try:
        shell = build(device="meta", weight_init="skip")
    except ValueError:
        raise
    except Exception as error:  # of arguments of any type and size: whatever PyTorch raises
        raise ValueError(f"{name}: its config describes no model ({error!r})") from error
    _check_fit(shell.state_dict(), weights, name, partial)
    sides, patches = shell.patch_embed.img_size, shell.patch_embed.num_patches
    if shell.pos_embed is None and (max(sides) > MOST_SIDE or patches > MOST_PATCHES):
        raise ValueError(
            f"img_size: the config says {sides}, {patches} patches, of a model without positions: {MOST_SIDE} a side "
            f"and {MOST_PATCHES} patches at most"
        )


def load_config(folder: str | Path) -> Config:
    """The config of a checkpoint folder.

    Raises:
        ValueError: for a folder without one, and one that cannot be read.
    """
    path = Path(folder) / CONFIG
    if not path.is_file():
        raise ValueError(f"{folder}: no checkpoint: it holds no {CONFIG}")
    try:
        # A folder from before it was there says nothing of how positions are resampled.
        values = {"pos_interpolation": Config.pos_interpolation, **read_json(path)}
        config = Config(**{field.name: values[field.name] for field in dataclasses.fields(Config)})
        shape = [dict, list, dict, str, str]
        if values["format"] != FORMAT:
            raise ValueError(f"format {values['format']!r}, this version of vit_fast reads {FORMAT}")
        parts = (config.kwargs, config.classes, config.preprocessing, config.architecture, config.pos_interpolation)
        if [type(part) for part in parts] != shape:
            raise TypeError("a field has the wrong type")
        check_pictures(config.preprocessing)
        return dataclasses.replace(config, classes=tuple(map(str, config.classes)))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: no config of a checkpoint ({error})") from error


def read_json(path: Path) -> dict:
    """The object in a JSON file.

    Raises:
        ValueError: for a file that is not there, too large, or no JSON object.
    """
    try:
        if path.stat().st_size > MOST_JSON:
            raise ValueError(f"larger than {MOST_JSON >> 20} MB")
        found = json.loads(path.read_text(encoding="utf-8-sig"))
        if not isinstance(found, dict):
            raise ValueError(f"got a {type(found).__name__}, takes an object")
        return found
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: no JSON that can be read ({error})") from error


def load_training(folder: str | Path) -> tuple[dict[str, Tensor], dict[str, Tensor], dict]:
    """What `save` wrote for going on: (weights, tensors of optimiser and generators, state).

    Where the last checkpoint is damaged it is that of the one before, and a warning says so.

    Raises:
        ValueError: as `load`.
    """
    path, before = Path(folder) / TRAINING, Path(folder) / PREVIOUS
    try:
        return _read_training(path)
    except (ValueError, OSError) as error:
        if not before.is_file():
            raise
        try:
            found = _read_training(before)
        except (ValueError, OSError) as other:
            raise ValueError(f"{error}; nor can the checkpoint before be read: {other}") from error
        log.warning(f"{error}; going on from the checkpoint before, {before}")
        return found


def _read_training(path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor], dict]:
    tensors, header = read_tensors(path)
    if "state" not in header:
        raise ValueError(f"{path}: holds weights alone; a run goes on from the {TRAINING} of `vit-fast train`")
    if header.get("sha256") != _digest(tensors, header["state"]):
        raise ValueError(f"{path}: damaged, its digest is of other contents")
    weights = {name.removeprefix("model."): tensors.pop(name) for name in list(tensors) if name.startswith("model.")}
    try:
        return weights, tensors, json.loads(header["state"])
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: damaged, its state is no JSON ({error})") from error


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
    except Exception as error:  # besides its own errors PyTorch's, of shapes and types that only the header has
        start = _start(path)
        text = next((text for sign, text in TEXTS.items() if start.startswith(sign) and b"\0" not in start), None)
        raise ValueError(
            f"{path}: no safetensors file, but {text}" if text else f"{path}: cut off, or no safetensors file ({error})"
        ) from error


def _start(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(32)


def _is_pickle(path: Path) -> bool:
    start = _start(path)
    if start[8:9] == b"{":  # safetensors: eight bytes of length, which may look like anything, then JSON
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
        ValueError: where names are missing, left over, of another shape or of no dtype of weights, naming them, and as
            `read_tensors`.
    """
    if isinstance(source, dict):
        weights = source
    else:
        name, weights = str(source), read_tensors(source)[0]
    _check_fit(model.state_dict(), weights, name, partial)
    model.load_state_dict(weights, strict=not partial)


def matches_any(name: str, patterns: Sequence[str]) -> bool:
    """Whether one of these shell patterns fits."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def shortened(names: Sequence[str]) -> str:
    """Names for an error: the first of them, and how many more."""
    more = f", and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _check_fit(wanted: Mapping[str, Tensor], weights: Mapping[str, Tensor], name: str, partial: Sequence[str]) -> None:
    for key in wanted:
        if key in weights and weights[key].dtype not in DTYPES:
            got, *takes = map(dtype_name, (weights[key].dtype, *DTYPES))
            raise ValueError(f"{name}: {key} is of {got}, takes {', '.join(takes)}; convert quantised weights back")
    problems = {
        "missing": [key for key in wanted if key not in weights and not matches_any(key, partial)],
        "left over": [key for key in weights if key not in wanted and not matches_any(key, partial)],
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
                lines.append(f"{len(keys)} {problem}: {shortened(keys)}")
        raise ValueError("; ".join(lines))
