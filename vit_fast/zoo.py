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

# Of timm's create_model alone, and not of a model: what serves in the place of each where it asks for something.
FACTORY = {
    "checkpoint_path": "vit_fast.load(FILE, model=NAME) builds a model with its weights",
    "features_only": "forward_intermediates of the model gives features",
    "out_indices": "forward_intermediates of the model takes indices",
    "pretrained_cfg": "the model's pretrained_cfg can be changed",
    "pretrained_cfg_overlay": "the model's pretrained_cfg can be changed",
    "scriptable": "torch.export and torch.jit.trace take the model as it is",
    "use_naflex": "NaFlexVit is not here",
}
WITHOUT_EFFECT = ("cache_dir", "exportable", "no_jit")  # nothing is fetched, and every model can be exported


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
    model_name: str, pretrained: bool | None = False, *, num_classes: int | None = None, **overrides
) -> VisionTransformer:
    """A model by its name in timm, with fresh weights.

    Args:
        model_name: one of `list_models()`.
        pretrained: only False: `vit_fast.load` gives a model with weights, and fetches them.
        num_classes: width of the logits; None leaves the number of the architecture's default weights, 0 no head.
        overrides: arguments of VisionTransformer that replace those of the name. One that is None replaces nothing, as
            with timm; so does one of timm's factory alone that asks for nothing, as scriptable=False.

    Raises:
        ValueError: for an unknown name, naming the nearest; for a name whose parts are missing, naming the parts; for
            pretrained=True, and what else only timm's factory does, naming what serves in its place.
        TypeError: for a `pretrained` that is a number: the class count is given by its name.
    """
    if pretrained is not None and not isinstance(pretrained, bool):
        raise TypeError(f"pretrained: got {pretrained!r}, takes False; num_classes is given by its name")
    if pretrained:
        tags = entries().get(model_name, {}).get("weights") or ["TAG"]
        raise ValueError(
            "pretrained: got True, takes False; a model with weights is "
            f"vit_fast.load('hf-hub:timm/{model_name}.{tags[0]}'), or that of a file or folder"
        )
    for name in FACTORY.keys() & overrides.keys():
        if overrides[name]:
            raise ValueError(f"{name}: got {overrides[name]!r}, takes nothing; {FACTORY[name]}")
    given = {name: value for name, value in overrides.items() if name not in (*FACTORY, *WITHOUT_EFFECT)}
    return build(model_name, num_classes, {name: value for name, value in given.items() if value is not None})


def build(name: str, num_classes: int | None, overrides: dict) -> VisionTransformer:
    """`create_model` where None is a value, as in a config that says so."""
    entry = entries().get(name)
    if entry is None:
        base, _, tag = name.partition(".")
        if tag in entries().get(base, {}).get("weights", ()):
            raise ValueError(
                f"model_name: got {name!r}, of which .{tag} names weights: vit_fast.load('hf-hub:timm/{name}')"
            )
        near = difflib.get_close_matches(base, list_models(), n=3, cutoff=0.5)
        hint = f"; the nearest are {', '.join(near)}" if near else "; vit_fast.list_models() gives all"
        raise ValueError(f"model_name: got {name!r}, no architecture of that name{hint}")
    if "missing" in entry:
        raise ValueError(
            f"model_name: got {name!r}, which needs parts that vit_fast lacks: {', '.join(entry['missing'])}"
        )
    args = entry["args"] | overrides
    eps = args.pop("norm_eps", None)
    if eps is not None:
        args.setdefault("norm_layer", functools.partial(nn.LayerNorm, eps=eps))
    kind = VisionTransformerDistilled if args.pop("distilled", False) else VisionTransformer
    if num_classes is not None:
        args["num_classes"] = num_classes
    model = kind(**args)
    config = {key: tuple(value) if isinstance(value, list) else value for key, value in entry["pretrained_cfg"].items()}
    model.pretrained_cfg |= {"architecture": name, **config, **statistics_of(config, model.in_chans)}
    return model


def statistics_of(config: dict, in_chans: int) -> dict:
    """The mean and std of pictures of so many channels; where they are not those of the config, the mean over its."""
    return {
        key: config[key] if len(config[key]) == in_chans else (sum(config[key]) / len(config[key]),) * in_chans
        for key in ("mean", "std")
    }
