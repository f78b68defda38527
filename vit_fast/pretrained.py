"""Models from checkpoints of timm, transformers and other libraries, with their settings, and to the Hub and back."""

import inspect
import json
import logging
import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from vit_fast import checkpoint
from vit_fast.arguments import whole_number
from vit_fast.inference import check_pictures
from vit_fast.model import VisionTransformer
from vit_fast.weights import jax, read, to_ours
from vit_fast.weights.files import NAMES
from vit_fast.weights.settings import Settings, from_open_clip, from_shapes, from_timm, from_transformers, to_timm
from vit_fast.zoo import entries, statistics_of

log = logging.getLogger("vit_fast")

PROCESSORS = ("preprocessor_config.json", "processor_config.json")
OPEN_CLIP = "open_clip_config.json"
MOST_SIDE = 4096  # of the pictures that a processor makes
# Of a repository: no pickle.
WANTED = [checkpoint.CONFIG, *PROCESSORS, OPEN_CLIP, "*.safetensors", "*.safetensors.index.json"]


def load(
    path_or_repo: str | os.PathLike,
    *,
    model: str | None = None,
    num_heads: int | None = None,
    partial: Sequence[str] = (),
    device: str | torch.device = "cpu",
    **overrides,
) -> VisionTransformer:
    """A model with the weights and the settings of a checkpoint, in evaluation mode.

    Args:
        path_or_repo: a folder with config.json and safetensors, as timm, transformers, `save_pretrained` and `vit-fast
            train` write it; a file of safetensors, or google-research's .npz; a repository of the Hub,
            "hf-hub:owner/name", of which only those files are fetched.
        model: a name of `list_models()`, for a file that does not say what it is of. Without it the architecture is
            worked out from the shapes, with heads of 64, and the log says what was assumed.
        num_heads: for such a file, the number of heads.
        partial: shell patterns of names that may be missing (they keep fresh weights) or left over.
        device: where the model shall be.
        overrides: arguments of VisionTransformer in the place of the checkpoint's, as timm's create_model takes them
            beside pretrained=True; one that is None replaces nothing. Another num_classes makes a new head, another
            img_size resamples the positions, and for other in_chans the weights of the first layer are summed or
            repeated. Whatever else changes the shape of a weight is refused.

    Returns:
        A VisionTransformer with the checkpoint's eps, activation and pool. `pretrained_cfg` has mean, std,
        interpolation and crop of its pictures, `pos_interpolation` how its library resamples positions, `label_names`
        its classes where they are known. It is in fp32 whatever the file's dtype; `.bfloat16()` makes it another.

    Raises:
        ValueError: for names of no layout or of two, names missing or left over, weights that do not fit the
            architecture, a file that is cut off, and a pickle, which is never opened.
        TypeError: for an override that is no argument of VisionTransformer.
        ImportError: for a repository where huggingface_hub is not installed.
    """
    overrides = {name: value for name, value in overrides.items() if value is not None}
    if unknown := overrides.keys() - inspect.signature(VisionTransformer).parameters.keys():
        raise TypeError(f"load: got {min(unknown)!r}, takes an argument of VisionTransformer")
    adapted = {name: overrides.pop(name) for name in ("num_classes", "img_size", "in_chans") if name in overrides}
    network, shown = _load(path_or_repo, model, num_heads, partial, overrides)
    return _adapted(network, **{"img_size": shown, **adapted}).to(device).eval()


def _load(
    path_or_repo, model: str | None, num_heads: int | None, partial: Sequence[str], overrides: dict
) -> tuple[VisionTransformer, Sequence[int] | None]:
    """The model of `load` with the classes, pictures and channels of the checkpoint; the size of the pictures that it
    is shown, where that is not the one that it has positions for."""
    path = Path(path_or_repo)
    if not path.exists():
        path = _fetched(str(path_or_repo))
    folder = path if path.is_dir() else path.parent
    config = _config(path, checkpoint.CONFIG)
    if "format" in config and model is None:
        network, own = checkpoint.load(folder, **overrides)
        network.label_names = own.classes
        return network, None
    tensors = read(path)
    args = config.get("model_args")
    unnormed = isinstance(args, dict) and args.get("final_norm") is False
    names, coverage = to_ours(tensors, (*partial, "norm.*") if unnormed else partial)
    log.info(str(coverage))
    said = next((key for key in ("architecture", "model_type") if key in config), "")
    if model is not None and said:
        raise ValueError(f"model: got {model!r}, but {folder / checkpoint.CONFIG} says what it is of; leave one out")
    try:
        if model is not None:
            settings = Settings({"num_classes": len(names.get("head.weight", ()))}, {}, model)
        elif said == "architecture":
            settings = from_timm(config, names)
        elif said:
            processor = next(filter(None, (_config(path, name) for name in PROCESSORS)), {})
            settings = from_transformers(config, processor, names)
        elif clip := _config(path, OPEN_CLIP):
            settings = from_open_clip(clip, names)
        else:
            settings = from_shapes(names, coverage, num_heads or jax.heads(tensors))
            assumed = {name: settings.args[name] for name in ("num_heads", "norm_eps", "global_pool")}
            log.warning(f"{path}: it does not say what model it is of; assumed from its names and shapes: {assumed}")
        check_pictures(settings.pictures)
    except (ArithmeticError, AttributeError, IndexError, KeyError, RecursionError, TypeError) as error:
        raise ValueError(f"{folder}: a config lacks a field, or one is of another kind ({error!r})") from error

    def build(**more) -> VisionTransformer:
        return settings.build(**{"weight_init": "" if partial else "skip", **overrides, **more})

    checkpoint.check_described(build, settings.args, names, str(path), partial)
    network = build()
    checkpoint.load_weights(network, names, str(path), partial)
    network.label_names = settings.classes
    size = settings.pictures.get("input_size", ())[-2:]
    if not (said == "model_type" and config["model_type"].startswith("dinov2") and size):
        return network, None
    # Trained on larger pictures than it is shown: it resamples positions, and makes them for all of a picture.
    if not all(isinstance(side, int) and 0 < side <= MOST_SIDE for side in size):
        raise ValueError(f"size: the processor says {size}, takes 1 to {MOST_SIDE}")
    return network, size


def _adapted(
    model: VisionTransformer, num_classes: int | None = None, img_size=None, in_chans: int | None = None
) -> VisionTransformer:
    """A model for other classes, pictures of another size, or of other channels."""
    if in_chans is not None and in_chans != model.in_chans:
        proj, before = model.patch_embed.proj, model.in_chans
        wanted = whole_number("in_chans", in_chans, 1)
        # As timm: a grey picture is one whose colours are equal, and of more channels each has its share of the sum.
        weight = proj.weight.detach()
        if wanted == 1:
            weight = weight.sum(1, keepdim=True)
        else:
            weight = weight.repeat(1, -(-wanted // before), 1, 1)[:, :wanted] * (before / wanted)
        proj.weight, proj.in_channels, model.in_chans = torch.nn.Parameter(weight), wanted, wanted
        model.pretrained_cfg |= statistics_of(model.pretrained_cfg, wanted)
    if img_size is not None:
        model.set_input_size(img_size=img_size)
    if num_classes is not None:
        fit_head(model, num_classes)
    model.pretrained_cfg["input_size"] = (model.in_chans, *model.patch_embed.img_size)
    return model


def fit_head(model: VisionTransformer, num_classes: int, names: tuple[str, ...] = ()) -> None:
    """A new head where the model's has another number of classes, others by their names, or projects, as a CLIP's."""
    others = names and model.label_names not in ((), names)
    if num_classes != model.num_classes or others or model.pretrained_cfg.get("projection"):
        model.reset_classifier(num_classes)


def _config(path: Path, name: str) -> dict:
    """A config of the folder, or beside a file that has the name of a folder's weights; an empty one elsewhere."""
    folder = path if path.is_dir() else path.parent
    counts = path.is_dir() or path.name in NAMES
    return checkpoint.read_json(folder / name) if counts and (folder / name).is_file() else {}


def save_pretrained(model: VisionTransformer, folder: str | os.PathLike) -> None:
    """Write config.json and model.safetensors as timm reads them, each whole or not at all.

    What timm's config has no word for (a norm's eps, SwiGLU by argument, how positions are resampled) stands there too:
    `load` reads it, and timm refuses what it cannot build.

    Raises:
        ValueError: for a folder that cannot be written to.
    """
    folder = Path(folder)
    checkpoint.check_writable(folder)
    config = to_timm(model, tuple(getattr(model, "label_names", ())))
    checkpoint.write_text(folder / checkpoint.CONFIG, json.dumps(config, indent=2) + "\n")
    checkpoint.write_weights(folder / checkpoint.WEIGHTS, model)


def push_to_hub(model: VisionTransformer, repository: str, **kwargs) -> str:
    """Upload what `save_pretrained` writes to a repository of the Hub, made where it is not there.

    Args:
        repository: owner/name.
        kwargs: of huggingface_hub.upload_folder: commit_message, token, revision, …

    Returns:
        The address of the commit.

    Raises:
        ImportError: where huggingface_hub is not installed.
    """
    hub = _hub()
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, folder)
        hub.create_repo(repository, exist_ok=True, token=kwargs.get("token"))
        return str(hub.upload_folder(repo_id=repository, folder_path=folder, **kwargs))


def _hub():
    try:
        import huggingface_hub
    except ImportError as error:
        raise ImportError("repositories of the Hub need huggingface_hub: pip install 'vit-fast[hub]'") from error
    return huggingface_hub


def _fetched(name: str) -> Path:
    """The folder that holds a repository's files."""
    kind, _, repository = name.partition(":")
    # No ".." in a revision: the Hub's client keeps it as the name of a file.
    if kind != "hf-hub" or not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*(@\w[\w./-]*)?", repository) or ".." in repository:
        known = "; it is an architecture: create_model makes one with fresh weights" if name in entries() else ""
        raise ValueError(f"{name}: no such file or folder{known or '; a repository of the Hub is hf-hub:owner/name'}")
    repository, _, revision = repository.partition("@")
    return Path(_hub().snapshot_download(repository, revision=revision or None, allow_patterns=WANTED))
