"""What a checkpoint says beside its weights: architecture, eps, activation, pool, and what pictures it takes.

Read from the config of timm or of transformers, or from the shapes of the weights where there is none; written as
timm's.
"""

import inspect
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from vit_fast.checkpoint import uncompiled
from vit_fast.inference import CROP_MODES
from vit_fast.layers import LayerScale, SwiGLUPacked, activation_of
from vit_fast.model import NORM_AFTER, VisionTransformer, VisionTransformerDistilled
from vit_fast.weights.layout import Coverage, is_gated
from vit_fast.zoo import build

# transformers' names of activations, and ours.
ACTIVATIONS = {"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "quick_gelu": "quick_gelu"}
RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers
# By layout, what its library builds where a file has no config: eps. A CLIP's activation cannot be guessed.
EPS = {"timm": 1e-6, "torchvision": 1e-6, "google-research": 1e-6, "dinov2": 1e-6, "transformers": 1e-12}
ANY = "vit_base_patch16_224"  # whose arguments are all replaced, where a checkpoint names no architecture
# By layout, how its library prepares pictures for the weights that it publishes.
PICTURES = {
    "google-research": {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "crop_mode": "squash", "crop_pct": 1.0},
    "torchvision": {"interpolation": "bilinear", "crop_pct": 0.875},
}
NORMALISATION = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
OF_CLIP = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}


class Settings(NamedTuple):
    """All that builds the model that a checkpoint is of."""

    args: dict  # of VisionTransformer, with "norm_eps" and "distilled"
    pictures: dict  # mean, std, interpolation, crop_pct, crop_mode: of `pretrained_cfg`
    architecture: str = ""  # a name of the zoo, whose arguments `args` replace
    classes: tuple[str, ...] = ()
    pos_interpolation: str = "antialiased"
    projection: bool = False  # whether the head gives no classes, but a point in a space of pictures and text

    def build(self, **more) -> VisionTransformer:
        """The model with fresh weights; `more` are further arguments.

        Raises:
            ValueError: for an argument without a value that must have one, and as `create_model`.
        """
        parameters = inspect.signature(VisionTransformer).parameters
        may_be_none = {name for name, parameter in parameters.items() if parameter.default is None}
        empty = [name for name, value in self.args.items() if value is None and name not in may_be_none]
        if empty:
            raise ValueError(f"{empty[0]}: the config has no value for it")
        args = {**self.args, **more}
        model = build(self.architecture or ANY, args.pop("num_classes", None), args)
        pictures = {name: tuple(value) if isinstance(value, list) else value for name, value in self.pictures.items()}
        pictures.pop("input_size", None)
        model.pretrained_cfg |= pictures
        model.pretrained_cfg["input_size"] = (model.in_chans, *model.patch_embed.img_size)
        if self.projection:
            model.pretrained_cfg["projection"] = True
        if not self.architecture:
            del model.pretrained_cfg["architecture"]
        model.pos_interpolation = self.pos_interpolation
        return model


# ---- transformers


def from_transformers(config: dict, processor: dict, names: Mapping[str, Tensor]) -> Settings:
    """Of its config.json and preprocessor_config.json; `names` are the weights under our names.

    Raises:
        ValueError: for a model_type, or an activation, that there is none of here.
    """
    kind = config.get("model_type", "")
    if kind in ("clip", "siglip"):  # a picture and a text tower
        config, kind = config["vision_config"], f"{kind}_vision_model"
    if kind not in _TRANSFORMERS:
        takes = ", ".join(sorted(_TRANSFORMERS))
        raise ValueError(f"model_type: got {kind!r}, takes {takes}")
    defaults, ours = _TRANSFORMERS[kind]
    config = {**defaults, **config}
    for name in ("num_attention_heads", "num_hidden_layers", "hidden_size", "num_channels"):
        if type(config[name]) is not int or config[name] < 1:
            raise ValueError(f"{name}: got {config[name]!r}, takes a whole number")
    activation = "silu" if is_gated(names) else ACTIVATIONS.get(config["hidden_act"])  # a gated MLP reads no config
    if activation is None:
        raise ValueError(f"hidden_act: got {config['hidden_act']!r}, takes {', '.join(ACTIVATIONS)}")
    args = {
        "img_size": config["image_size"],
        "patch_size": config["patch_size"],
        "in_chans": config["num_channels"],
        "embed_dim": config["hidden_size"],
        "depth": config["num_hidden_layers"],
        "num_heads": config["num_attention_heads"],
        "mlp_ratio": _ratio(names, config["hidden_size"]),
        "qkv_bias": "blocks.0.attn.qkv.bias" in names,
        "act_layer": activation,
        "norm_eps": config["layer_norm_eps"],
        "num_classes": len(names.get("head.weight", ())),
        **ours,
    }
    how = "plain"
    if kind.startswith("dinov2"):
        args |= _of_dinov2(config, names)
        how = "antialiased" if "reg_token" in names else "plain"
    if kind == "deit":
        args |= _of_deit(names)
    if kind == "siglip_vision_model" and not config["vision_use_head"]:
        args["global_pool"] = ""
    _agree("num_hidden_layers", config["num_hidden_layers"], _depth(names))
    _agree("hidden_size", config["hidden_size"], len(names["patch_embed.proj.weight"]))
    labels = config.get("id2label") or {}
    classes = tuple(str(labels[key]) for key in sorted(labels, key=int)) if args["num_classes"] == len(labels) else ()
    half = (0.5,) * names["patch_embed.proj.weight"].shape[1]
    pictures = _of_processor(processor, _NORMALISED_BY.get(kind, {"mean": half, "std": half}))
    return Settings(args, pictures, "", classes, how, projection=kind == "clip_vision_model")


def _agree(name: str, said: int, held: int) -> None:
    """Refuse a config that the tensors do not bear out, before anything of its size is built."""
    if said != held:
        raise ValueError(f"{name}: the config says {said}, the weights have {held}")


def _depth(names: Mapping[str, Tensor]) -> int:
    return 1 + max((int(name.split(".")[1]) for name in names if name.startswith("blocks.")), default=-1)


_VIT = {
    **{"image_size": 224, "patch_size": 16, "num_channels": 3, "hidden_size": 768, "num_hidden_layers": 12},
    **{"num_attention_heads": 12, "hidden_act": "gelu", "layer_norm_eps": 1e-12},
}
# By model_type: what transformers' config does not write where it is so, and what is always so in ours.
_TRANSFORMERS: dict[str, tuple[dict, dict]] = {
    "vit": (_VIT, {}),
    "vit_mae": (_VIT, {}),
    "deit": (_VIT, {}),
    "ijepa": (
        {**_VIT, "layer_norm_eps": 1e-6},
        {"class_token": False, "global_pool": "avg", "fc_norm": False},
    ),
    "dinov2": ({**_VIT, "layer_norm_eps": 1e-6, "patch_size": 14, "layerscale_value": 1.0}, {}),
    "dinov2_with_registers": ({**_VIT, "layer_norm_eps": 1e-6, "layerscale_value": 1.0}, {"no_embed_class": True}),
    "clip_vision_model": (
        {**_VIT, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "patch_size": 32},
        {"pre_norm": True},
    ),
    "siglip_vision_model": (
        {**_VIT, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6, "vision_use_head": True},
        {"class_token": False, "global_pool": "map"},
    ),
}


# Where no processor says it; the other models take pixels from -1 to 1.
_NORMALISED_BY = {
    **dict.fromkeys(("deit", "dinov2", "dinov2_with_registers", "ijepa", "vit_mae"), NORMALISATION),
    "clip_vision_model": OF_CLIP,
}


def _of_dinov2(config: dict, names: Mapping[str, Tensor]) -> dict:
    args = {"init_values": config["layerscale_value"] or 1.0}
    if "reg_token" in names:
        args["reg_tokens"] = names["reg_token"].shape[1]
    if is_gated(names):
        args["mlp_layer"] = "swiglu"
    if "head.weight" in names and names["head.weight"].shape[1] == 2 * config["hidden_size"]:
        args["global_pool"] = "token_avg"
    return args


def _of_deit(names: Mapping[str, Tensor]) -> dict:
    """Where one head alone reads, the distillation token is a register."""
    return {"distilled": True} if "dist_token" in names else {"reg_tokens": 1}


def _of_processor(processor: dict, usual: dict) -> dict:
    """What a processor of transformers does to pictures, as `pretrained_cfg` says it.

    Args:
        usual: mean and std where it has none.

    Raises:
        ValueError: for what `preprocess` cannot do, where the pictures would differ.
    """
    processor = processor.get("image_processor", processor)  # as a processor of pictures and text nests it
    if processor.get("do_normalize") is False:
        mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    else:
        mean, std = (tuple(processor.get(f"image_{name}", usual[name])) for name in ("mean", "std"))
    # Ours are of pixels from 0 to 1, theirs of pixels from 0 to 255 times a factor.
    scale = 255 * (1 if processor.get("do_rescale") is False else processor.get("rescale_factor", 1 / 255))
    found: dict[str, Any] = {"mean": tuple(m / scale for m in mean), "std": tuple(s / scale for s in std)}
    if processor.get("resample") is not None:
        if processor["resample"] not in RESAMPLE:
            raise ValueError(f"resample: got {processor['resample']!r}, takes {', '.join(map(str, RESAMPLE))}")
        found["interpolation"] = RESAMPLE[processor["resample"]]
    crop: Any = processor.get("crop_size") if processor.get("do_center_crop", False) else None
    if processor.get("do_resize") is False:
        if crop:
            raise ValueError("do_resize: got False with a crop, takes True: pictures are resized before it")
        return {**found, "crop_pct": 1.0, "crop_mode": "squash"}  # of the model's size, which this leaves as they are
    size: Any = processor.get("size")
    kind = processor.get("image_processor_type") or processor.get("feature_extractor_type") or ""
    if isinstance(size, int):  # a number is the shorter side for a CLIP, both sides for the others
        size = {"shortest_edge": size} if "CLIP" in kind else {"height": size, "width": size}
    if not size:
        return found
    keeps_ratio = bool(size.get("shortest_edge"))
    rows, columns = (size["shortest_edge"],) * 2 if keeps_ratio else (size["height"], size.get("width", size["height"]))
    crop = {"height": crop, "width": crop} if isinstance(crop, int) else crop
    high, wide = (crop["height"], crop["width"]) if crop else (rows, columns)
    if high > rows:
        raise ValueError(f"crop_size: got {high} of a picture of {rows}, takes no more than there is")
    if high * columns != wide * rows:
        takes = "a square" if keeps_ratio else "the same ratio of sides"
        raise ValueError(f"crop_size: got {high} x {wide} of a picture of {rows} x {columns}, takes {takes}")
    exact = all(math.floor(side / (high / rows)) == whole for side, whole in ((high, rows), (wide, columns)))
    found["crop_pct"] = high / rows if exact else math.nextafter(high / rows, 0)  # or the picture is a row short
    found["crop_mode"] = "center" if keeps_ratio else "squash"
    found["input_size"] = (high, wide)
    return found


# ---- timm


def from_timm(config: dict, names: Mapping[str, Tensor]) -> Settings:
    """Of the config.json that timm writes, or `save_pretrained` here.

    Raises:
        ValueError: for an architecture that is not here.
    """
    pictures = config.get("pretrained_cfg") or {}
    args = dict(config.get("model_args", {}))
    if "num_classes" in config:
        args.setdefault("num_classes", config["num_classes"])
    if config.get("global_pool") is not None:
        args.setdefault("global_pool", config["global_pool"])
    taken = ("mean", "std", "interpolation", "crop_pct", "crop_mode", "input_size")
    if not isinstance(config["architecture"], str):
        raise ValueError(f"architecture: got {config['architecture']!r}, takes a name")
    held = {"depth": _depth(names), "embed_dim": len(names["patch_embed.proj.weight"])}
    for name in held.keys() & args.keys():
        _agree(name, args[name], held[name])
    labels = config.get("label_names") or ()
    count = len(names.get("head.weight", ()))
    classes = tuple(map(str, labels)) if isinstance(labels, list) and len(labels) == count else ()
    pictures = {name: value for name, value in pictures.items() if value is not None}
    if pictures.get("crop_mode") not in CROP_MODES:
        pictures.pop("crop_mode", None)
    return Settings(
        args,
        {name: pictures[name] for name in taken if name in pictures},
        config["architecture"],
        classes,
        config.get("pos_interpolation", "antialiased"),
        config.get("projection", False),
    )


_SHELL = {"device": "meta", "weight_init": "skip"}
_NO_WORD = (
    "model: a part is somebody's own, for which config.json has no word ({}); safetensors.torch.save_model keeps the "
    "weights alone"
)


def to_timm(model: VisionTransformer, classes: tuple[str, ...]) -> dict:
    """A config.json as timm reads it: what the model's architecture leaves to be said, and its settings.

    Raises:
        ValueError: where a part of the model is somebody's own, or a block unlike the others: a config has no word for
            it. For a model without a block, whose names are of no layout.
    """
    if not len(model.blocks):
        raise ValueError("depth: got 0, a checkpoint takes a model of one block or more")
    name = model.pretrained_cfg.get("architecture", "")
    try:
        said, blocks = arguments_of(model), [_of_block(block) for block in model.blocks]
    except AttributeError as error:
        raise ValueError(_NO_WORD.format(error)) from error
    block: Any
    for index, block in enumerate(model.blocks):
        if blocks[index] != blocks[0]:
            raise ValueError(_NO_WORD.format(f"blocks.{index} is not set as blocks.0 is"))
        if not block.attn.fused_attn and block.attn.scale != block.attn.head_dim**-0.5:
            raise ValueError(_NO_WORD.format("attn.scale is not that of the head width"))
    usual = arguments_of(build(name or ANY, None, _SHELL))
    args = {key: value for key, value in said.items() if usual.get(key) != value}
    if said["final_norm"] and said["fc_norm"] != (model.global_pool in NORM_AFTER):  # its default goes by the pool
        args["fc_norm"] = said["fc_norm"]
    shell = build(name or ANY, model.num_classes, {**args, "global_pool": model.global_pool, **_SHELL})
    ours, theirs = _facts(model), _facts(shell)
    if differing := sorted(key for key in ours.keys() | theirs if ours.get(key) != theirs.get(key)):
        raise ValueError(_NO_WORD.format(f"{differing[0]} is not what its settings say"))
    pictures = {key: v for key, v in model.pretrained_cfg.items() if key not in ("architecture", "projection")}
    config = {
        "architecture": name or ANY,
        "num_classes": model.num_classes,
        "num_features": model.num_features,
        "global_pool": model.global_pool,
        "model_args": args,
        "pretrained_cfg": pictures,
        "pos_interpolation": model.pos_interpolation,
        "projection": model.pretrained_cfg.get("projection", False),
    }
    return {**config, "label_names": list(classes)} if classes else config


def _facts(model: nn.Module) -> dict[str, Any]:
    """The shape of each weight and the eps of each norm, by their uncompiled names."""
    modules = model.named_modules(remove_duplicate=False)
    facts: dict[str, Any] = {name: tensor.shape for name, tensor in model.state_dict().items()}
    facts |= {f"{name}.eps": module.eps for name, module in modules if isinstance(module, nn.LayerNorm)}
    return {uncompiled(name): fact for name, fact in facts.items()}


def arguments_of(model: VisionTransformer) -> dict:
    """The arguments that build this model, as JSON has them, rates of dropout left out."""
    embed, norms = model.patch_embed, [m for m in (model.norm, model.fc_norm) if isinstance(m, nn.LayerNorm)]
    args = {
        "img_size": list(embed.img_size),
        "patch_size": list(embed.patch_size),
        "in_chans": model.in_chans,
        "num_classes": model.num_classes,
        "global_pool": model.global_pool,
        "embed_dim": model.embed_dim,
        "depth": len(model.blocks),
        "class_token": model.has_class_token,
        "reg_tokens": model.num_reg_tokens,
        "no_embed_class": model.no_embed_class,
        "pos_embed": "none" if model.pos_embed is None else "sincos2d" if model.fixed_pos_embed else "learn",
        "embed_norm_layer": "layernorm" if isinstance(embed.norm, nn.LayerNorm) else None,
        "pre_norm": isinstance(model.norm_pre, nn.LayerNorm),
        "final_norm": bool(norms),
        "fc_norm": isinstance(model.fc_norm, nn.LayerNorm),
        "pool_include_prefix": model.pool_include_prefix,
        "dynamic_img_size": model.dynamic_img_size,
        "dynamic_img_pad": embed.dynamic_img_pad,
        "distilled": isinstance(model, VisionTransformerDistilled),
        "representation_size": None if isinstance(model.pre_logits, nn.Identity) else model.head_hidden_size,
    }
    return args | _of_block(model.blocks[0])


def _of_block(block: Any) -> dict:
    """The arguments that build a block."""
    attn, mlp = block.attn, block.mlp
    gated = isinstance(mlp, SwiGLUPacked)
    return {
        "num_heads": attn.num_heads,
        "mlp_ratio": _ratio({"blocks.0.mlp.fc1.weight": mlp.fc1.weight}, block.norm1.weight.numel()),
        "qkv_bias": attn.qkv.bias is not None,
        "proj_bias": attn.proj.bias is not None,
        "qk_norm": isinstance(attn.q_norm, nn.LayerNorm),
        "scale_attn_norm": isinstance(attn.norm, nn.LayerNorm),
        "scale_mlp_norm": isinstance(mlp.norm, nn.LayerNorm),
        "init_values": block.ls1.init_values if isinstance(block.ls1, LayerScale) else None,
        "mlp_layer": "swiglu" if gated else None,
        "act_layer": "silu" if gated else activation_of(mlp.act),
        "norm_eps": block.norm1.eps,
    }


def _ratio(names: Mapping[str, Tensor], width: int) -> float:
    """The hidden width of an MLP over the width, such that `int` of their product is the hidden width."""
    hidden = len(names["blocks.0.mlp.fc1.weight"]) if "blocks.0.mlp.fc1.weight" in names else 4 * width
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else (hidden + 0.5) / width


# ---- open_clip

# What open_clip's vision_cfg is where it does not say it, of what is read here.
_VISION = {
    **{"layers": 12, "width": 768, "head_width": 64, "patch_size": 16, "image_size": 224, "ls_init_value": None},
    **{"no_ln_pre": False, "final_ln_after_pool": False, "pool_type": "tok", "act_kwargs": None, "norm_kwargs": None},
    **{"timm_model_name": None, "timm_pool": "avg", "timm_proj": "linear"},
}
# Of training alone, or shown by the weights, or of a part that is refused.
_UNREAD = (
    *("mlp_ratio", "patch_dropout", "pos_embed_type", "output_tokens", "block_type"),
    *("attn_pooler_queries", "attn_pooler_heads"),
    *("timm_model_pretrained", "timm_proj_bias", "timm_drop", "timm_drop_path"),
)
_NOT_HERE = (
    *("attentional_pool", "qk_norm", "scaled_cosine_attn", "scale_heads"),
    *("scale_attn_inner", "scale_attn", "scale_fc"),
)
_POOLED = {"tok": "token", "avg": "avg", "none": ""}
# By whether it is a QuickGELU, and what else open_clip gives it.
_GELU = {
    (True, ()): "quick_gelu",
    (False, ()): "gelu",
    (False, (("approximate", "none"),)): "gelu",
    (False, (("approximate", "tanh"),)): "gelu_tanh",
}


def from_open_clip(config: dict, names: dict[str, Tensor]) -> Settings:
    """Of open_clip_config.json: its own vision tower, or one of timm's.

    Args:
        names: the weights under our names. Only the config says that a norm stands behind a pool of all tokens: that
            one is renamed here.

    Raises:
        ValueError: for a tower with parts that are not here, or settings that nobody knows.
    """
    model, pictures = config["model_cfg"], config.get("preprocess_cfg", {})
    for name, value in model["vision_cfg"].items():
        if name in _NOT_HERE and value:
            raise ValueError(f"{name}: got {value!r}, takes False: there is no such part here")
        if name not in (*_VISION, *_UNREAD, *_NOT_HERE):
            raise ValueError(f"vision_cfg: got {name!r}, takes {', '.join((*_VISION, *_UNREAD))}")
    vision: dict[str, Any] = {**_VISION, **model["vision_cfg"]}
    if pictures.get("resize_mode") not in (None, "shortest", "squash"):
        raise ValueError(f"resize_mode: got {pictures['resize_mode']!r}, takes 'shortest' or 'squash'")
    taken = {name: pictures[name] for name in ("mean", "std", "interpolation") if name in pictures}
    taken = {**OF_CLIP, "interpolation": "bicubic", **taken, "crop_pct": 1.0}
    taken["crop_mode"] = "squash" if pictures.get("resize_mode") == "squash" else "center"
    args: dict[str, Any] = {"num_classes": len(names.get("head.weight", ()))}
    if vision["timm_model_name"]:
        pool, projection = vision["timm_pool"], vision["timm_proj"]
        if projection not in (None, "", "none", "linear"):
            raise ValueError(f"timm_proj: got {projection!r}, takes 'linear', 'none' or null")
        if pool or (pool == "" and projection != "linear"):  # else that of the architecture
            args["global_pool"] = pool
        # With a projection of open_clip's own the pool is changed behind the norm, which stays where it was.
        args["fc_norm"] = "fc_norm.weight" in names
        return Settings(args, taken, vision["timm_model_name"], projection=True)
    _agree("layers", vision["layers"], _depth(names))
    if vision["pool_type"] not in _POOLED:
        raise ValueError(f"pool_type: got {vision['pool_type']!r}, takes {', '.join(_POOLED)}")
    activation = _GELU.get((bool(model.get("quick_gelu")), tuple((vision["act_kwargs"] or {}).items())))
    if activation is None:
        raise ValueError(f"act_kwargs: got {vision['act_kwargs']!r}, takes 'approximate' of a GELU: 'tanh' or 'none'")
    norm = {"eps": 1e-5, **(vision["norm_kwargs"] or {})}
    if len(norm) > 1:
        raise ValueError(f"norm_kwargs: got {vision['norm_kwargs']!r}, takes 'eps' alone")
    behind = bool(vision["final_ln_after_pool"]) and vision["pool_type"] == "avg"  # of one token it is the same
    if behind:
        for name in [name for name in names if name.startswith("norm.")]:
            names[f"fc_{name}"] = names.pop(name)
    args |= {
        "img_size": vision["image_size"],
        "patch_size": vision["patch_size"],
        "embed_dim": vision["width"],
        "depth": vision["layers"],
        "num_heads": vision["width"] // vision["head_width"],
        "mlp_ratio": _ratio(names, vision["width"]),
        "init_values": vision["ls_init_value"],
        "act_layer": activation,
        "norm_eps": norm["eps"],
        "pre_norm": not vision["no_ln_pre"],
        "global_pool": _POOLED[vision["pool_type"]],
        "fc_norm": behind,
    }
    return Settings(args, taken, projection=True)


# ---- nothing but weights


def from_shapes(names: Mapping[str, Tensor], coverage: Coverage, num_heads: int | None) -> Settings:
    """Of the weights under our names alone: square pictures, heads of 64 unless a norm shows them or they are given.

    Raises:
        ValueError: where the shapes fit no architecture, or for a CLIP, whose activation they do not show.
    """
    library = coverage.layout.split()[0]
    weight = names["patch_embed.proj.weight"]
    width, channels, *patch = weight.shape
    blocks = _depth(names)
    if library not in EPS or "norm_pre.weight" in names:
        raise ValueError("the weights: a CLIP's file does not show its activation; give the name of its model")
    prefix = [names[name].shape[1] for name in ("cls_token", "dist_token", "reg_token") if name in names]
    patches = names["pos_embed"].shape[1] if "pos_embed" in names else 0
    side = math.isqrt(patches)
    bare = side * side == patches
    if not bare:
        side = math.isqrt(patches - sum(prefix))
        if side * side + sum(prefix) != patches:
            raise ValueError(f"pos_embed: {patches} positions are no square and {sum(prefix)} tokens; name the model")
    heads = num_heads or max(1, width // 64)
    if "blocks.0.attn.q_norm.weight" in names:
        heads = width // len(names["blocks.0.attn.q_norm.weight"])
    pooled = "map" if "attn_pool.latent" in names else "token" if "cls_token" in names else "avg"
    if "fc_norm.weight" in names:
        pooled = "avg"
    if "head.weight" in names and names["head.weight"].shape[1] == 2 * width:
        pooled = "token_avg"
    registers = names["reg_token"].shape[1] if "reg_token" in names else 0
    distilled = "dist_token" in names
    args = {
        "img_size": [side * patch[0], side * patch[1]],
        "patch_size": patch,
        "in_chans": channels,
        "embed_dim": width,
        "depth": blocks,
        "num_heads": heads,
        "mlp_ratio": _ratio(names, width),
        "qkv_bias": "blocks.0.attn.qkv.bias" in names,
        "proj_bias": "blocks.0.attn.proj.bias" in names,
        "qk_norm": "blocks.0.attn.q_norm.weight" in names,
        "scale_attn_norm": "blocks.0.attn.norm.weight" in names,
        "scale_mlp_norm": "blocks.0.mlp.norm.weight" in names,
        "init_values": 1.0 if "blocks.0.ls1.gamma" in names else None,
        "class_token": "cls_token" in names,
        "reg_tokens": registers,
        "no_embed_class": bare and bool(prefix),
        "pos_embed": "learn" if patches else "none",
        "final_norm": "norm.weight" in names or "fc_norm.weight" in names,
        "fc_norm": "fc_norm.weight" in names,
        "global_pool": pooled,
        "num_classes": len(names.get("head.weight", ())),
        "distilled": distilled,
        "representation_size": len(names["pre_logits.fc.weight"]) if "pre_logits.fc.weight" in names else None,
        "norm_eps": EPS[library],
    }
    if is_gated(names):
        args |= {"mlp_layer": "swiglu", "act_layer": "silu"}
    how = "offset" if library == "dinov2" else "plain" if library == "transformers" else "antialiased"
    return Settings(args, {**NORMALISATION, **PICTURES.get(library, {})}, pos_interpolation=how)
