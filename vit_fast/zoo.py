"""Named architectures. zoo.json holds, one a line, the arguments, the picture statistics and the weights of each.

The names, arguments, image sizes, class counts, means and crops are those of timm 1.0.31's `vision_transformer.py` and
`deit.py`, each for the architecture's default weights. An entry with "missing" names the parts that vit_fast lacks.
"weights" are the tags of all pretrained weights that timm has of an architecture, as in vit_base_patch16_224.TAG.
"""

import difflib
import fnmatch
import functools
import importlib.resources
import json

from torch import nn

from vit_fast.model import VisionTransformer, VisionTransformerDistilled


@functools.cache
def entries() -> dict[str, dict]:
    """The whole data file: name → {"args", "pretrained_cfg", "weights"} or {"missing", "weights"}."""
    return json.loads(importlib.resources.files("vit_fast").joinpath("zoo.json").read_text())


def list_models(pattern: str = "") -> list[str]:
    """Names that `create_model` builds, sorted.

    Args:
        pattern: a shell pattern such as "deit3_*_224"; a text without * ? [ finds every name that contains it.

    Names whose parts are missing here are left out; `create_model` says what each of them misses.
    """
    names = sorted(name for name, entry in entries().items() if "missing" not in entry)
    if not any(sign in pattern for sign in "*?["):
        return [name for name in names if pattern in name]
    return [name for name in names if fnmatch.fnmatchcase(name, pattern)]


def create_model(
    name: str, num_classes: int | None = None, *, pretrained: bool | None = False, **overrides
) -> VisionTransformer:
    """A model by its name in timm, with fresh weights.

    Args:
        name: one of `list_models()`.
        num_classes: width of the logits; None leaves the number of the architecture's default weights, 0 no head.
        pretrained: only False: nothing is downloaded. Load a state dict of timm's with `load_state_dict`.
        overrides: arguments of VisionTransformer that replace those of the name; one that is None replaces nothing, as
            with timm.

    Raises:
        ValueError: for an unknown name, naming the nearest; for a name whose parts are missing, naming the parts; for
            pretrained=True.
        TypeError: for a num_classes that is true or false: timm's second argument is `pretrained`.
    """
    if isinstance(num_classes, bool):
        raise TypeError(f"num_classes: got {num_classes}, takes a number; pretrained is given by its name")
    if pretrained:
        raise ValueError(
            "pretrained: got True, takes False: nothing is downloaded; load_state_dict takes timm's weights"
        )
    return build(name, num_classes, {key: value for key, value in overrides.items() if value is not None})


def build(name: str, num_classes: int | None, overrides: dict) -> VisionTransformer:
    """`create_model` where None is a value, as in a config that says so."""
    entry = entries().get(name)
    if entry is None:
        near = difflib.get_close_matches(name.split(".")[0], list_models(), n=3, cutoff=0.5)
        hint = f"; the nearest are {', '.join(near)}" if near else "; vit_fast.list_models() gives all"
        raise ValueError(f"name: got {name!r}, no architecture of that name{hint}")
    if "missing" in entry:
        raise ValueError(f"name: got {name!r}, which needs parts that vit_fast lacks: {', '.join(entry['missing'])}")
    args = entry["args"] | overrides
    eps = args.pop("norm_eps", None)
    if eps is not None:
        args.setdefault("norm_layer", functools.partial(nn.LayerNorm, eps=eps))
    kind = VisionTransformerDistilled if args.pop("distilled", False) else VisionTransformer
    if num_classes is not None:
        args["num_classes"] = num_classes
    model = kind(**args)
    config = {key: tuple(value) if isinstance(value, list) else value for key, value in entry["pretrained_cfg"].items()}
    if model.in_chans != len(config["mean"]):  # a greyscale model sees the mean of the colours
        for key in ("mean", "std"):
            config[key] = (sum(config[key]) / len(config[key]),) * model.in_chans
    model.pretrained_cfg |= {"architecture": name, **config}
    return model
