"""Every architecture against timm itself: structure on the meta device, then numbers, forward and each gradient."""

import copy

import pytest
import timm
import torch
from torch import nn

import vit_fast
from tests.error_rule import assert_close_to_truth, relative_error

# Chosen so that every part and every head dim of the zoo is met, alone and with its usual company.
FORTY = [
    "vit_tiny_patch16_224",  # the plain model
    "vit_base_patch8_224",  # small patches
    "vit_base_patch32_224",  # large patches
    "vit_small_patch16_36x1_224",  # LayerScale
    "vit_base_patch16_gap_224",  # no class token, mean, norm before the pool, head dim 48
    "vit_base_patch16_224_miil",  # QKV without bias
    "vit_base_patch16_plus_240",  # 896 wide, LayerScale
    "vit_base_patch16_reg4_gap_256",  # registers without position
    "vit_medium_patch16_gap_256",  # no QKV bias, LayerScale, mean
    "vit_wee_patch16_reg1_gap_256",  # MLP ratio 5
    "vit_little_patch16_reg4_gap_256",  # MLP ratio 5.6
    "vit_betwixt_patch16_reg4_gap_256",
    "vit_so150m_patch16_reg4_gap_256",  # registers with a position, 14 heads
    "vit_so150m_patch16_reg4_map_256",  # registers, attention pool
    "vit_so150m2_patch16_reg1_gap_256",  # 13 heads, a ratio that is no integer
    "vit_xsmall_patch16_clip_224",  # pre_norm, patches without bias, eps 1e-5
    "vit_base_patch16_clip_quickgelu_224",  # quick GELU
    "vit_base_patch16_siglip_224",  # attention pool, exact GELU
    "vit_base_patch32_siglip_256",  # attention pool, tanh GELU
    "vit_base_patch16_siglip_gap_224",
    "vit_so400m_patch14_siglip_224",  # head dim 72, MLP 4304, attention pool
    "vit_so400m_patch16_siglip_gap_256",  # head dim 72, tanh GELU
    "vit_so400m_patch14_reg1_tipsv2",  # head dim 72, LayerScale 1.0, register
    "vit_so400m_patch16_radio_v4",  # head dim 72, 9 registers, no final norm
    "vit_huge_patch14_224",  # head dim 80
    "vit_huge_patch14_gap_224",  # head dim 80, mean
    "vit_huge_patch14_clip_quickgelu_224",  # head dim 80, quick GELU
    "vit_giant_patch14_224",  # head dim 88
    "beit3_base_patch16_224",  # norms before proj and fc2
    "vit_giantopt_patch16_siglip_gap_256",  # head dim 96, tanh GELU
    "vit_gigantic_patch14_clip_224",  # head dim 104, pre_norm
    "vit_intern300m_patch14_448",  # images of any size, no final norm
    "vit_small_patch14_dinov2",
    "vit_small_patch14_reg4_dinov2",
    "flexivit_small",  # class token without position
    "eva_large_patch14_196",  # class token and mean
    "deit_tiny_distilled_patch16_224",  # two heads
    "deit3_small_patch16_224",
    "test_vit2",  # head dim 32, any size, registers
    "test_vit3",  # pool over registers too
]
assert len(set(FORTY)) == 40


def draw(model: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter anew: vectors around 0.5, so that no gain, bias or γ stays 1 or 0; all else small."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            mean, std = (0.5, 0.3) if parameter.dim() == 1 else (0.0, 0.05)
            parameter.normal_(mean, std, generator=generator)
    return model


def pair_of(name: str, dtype=torch.float64, **overrides) -> tuple[nn.Module, nn.Module]:
    """(timm's, ours) with the same parameters."""
    models = []
    for create in (timm.create_model, vit_fast.create_model):
        with torch.device("meta"):
            models.append(create(name, **overrides))
        models[-1].to_empty(device="cpu").to(dtype)
    theirs, ours = models
    ours.load_state_dict(draw(theirs).state_dict(), strict=True)
    return theirs, ours


def run(model: nn.Module, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """The logits, and the gradient of each parameter and of the images for one random upstream gradient."""
    images = images.clone().requires_grad_()
    logits = model(images)
    generator = torch.Generator().manual_seed(1)
    logits.backward(torch.randn(logits.shape, generator=generator, dtype=torch.float64).to(logits.dtype))
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {"logits": logits.detach(), "images": images.grad, **gradients}


def small_images(model: nn.Module, dtype=torch.float64, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, *model.patch_embed.img_size, dtype=dtype, generator=torch.Generator().manual_seed(2))


def assert_same(theirs: dict, ours: dict) -> None:
    """In float64 two right programs differ by rounding alone."""
    assert set(theirs) == set(ours)
    for name, truth in theirs.items():
        assert truth is not None, f"{name} got no gradient from timm: the case does not test it"
        assert ours[name] is not None, f"{name} got no gradient"
        if name.endswith("k_norm.bias"):
            # The same shift of all keys changes no softmax: the gradient is zero, and both get noise.
            size = theirs[name.replace("bias", "weight")].norm()
            assert max(truth.norm(), ours[name].norm()) < 1e-11 * size, name
            continue
        assert truth.norm() > 0, f"the gradient of {name} is zero: the case does not test it"
        assert relative_error(ours[name], truth) < 1e-11, name


def traits(model: nn.Module) -> dict:
    """What two models must have in common beside their numbers."""
    names = [
        *("num_classes", "global_pool", "num_features", "embed_dim", "num_prefix_tokens", "num_reg_tokens"),
        *("has_class_token", "no_embed_class", "pool_include_prefix", "dynamic_img_size", "feature_info"),
    ]
    found = {name: getattr(model, name) for name in names}
    embed = model.patch_embed
    found |= {name: getattr(embed, name) for name in ("img_size", "grid_size", "patch_size", "strict_img_size")}
    found["eps"] = {name: m.eps for name, m in model.named_modules() if isinstance(m, nn.LayerNorm)}
    found["norms"] = {
        name for name in ("norm_pre", "norm", "fc_norm") if isinstance(getattr(model, name), nn.LayerNorm)
    }
    found["activation"] = {name: activation(m) for name, m in model.named_modules() if type(m).__name__ == "Mlp"}
    found["heads"] = [(block.attn.num_heads, block.attn.head_dim) for block in model.blocks]
    found["decay"] = model.no_weight_decay()
    return found


def activation(mlp: nn.Module) -> str:
    """Told by what it computes."""
    x = torch.linspace(-3, 3, 13, dtype=torch.float64)
    known = {
        "gelu": nn.functional.gelu(x),
        "gelu_tanh": nn.functional.gelu(x, approximate="tanh"),
        "quick_gelu": x * torch.sigmoid(1.702 * x),
    }
    return next(name for name, y in known.items() if torch.allclose(mlp.act(x), y, rtol=0, atol=1e-9))


@pytest.mark.parametrize("name", vit_fast.list_models())
def test_every_name_on_the_meta_device(name):
    with torch.device("meta"):
        theirs, ours = timm.create_model(name), vit_fast.create_model(name)
    keys = [(key, tensor.shape, tensor.dtype) for key, tensor in theirs.state_dict().items()]
    assert [(key, tensor.shape, tensor.dtype) for key, tensor in ours.state_dict().items()] == keys
    assert traits(ours) == traits(theirs)
    for key in ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode", "first_conv", "classifier"):
        assert ours.pretrained_cfg[key] == theirs.pretrained_cfg[key]


EXPORTED = {
    "activation": {"act_layer": "quick_gelu"},
    "pool over prefix": {"global_pool": "avg", "pool_include_prefix": True},
    "pool without norm": {"global_pool": "avg", "fc_norm": False},
    "any size": {"dynamic_img_size": True},
}


@pytest.mark.parametrize("name", EXPORTED)
def test_timms_export_of_our_model(name, tmp_path):
    """Its `save_for_hf`, and `push_to_hf_hub` with it, writes what the model is now."""
    model = draw(vit_fast.create_model("test_vit", num_classes=5, img_size=64, depth=3, **EXPORTED[name])).eval()
    model.set_input_size(img_size=(32, 48))
    timm.models.save_for_hf(model, str(tmp_path), safe_serialization=True)
    theirs = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert theirs.patch_embed.img_size == (32, 48)
    x = torch.randn(2, 3, 32, 48)
    assert relative_error(theirs(x), model(x)) < 2e-5
    assert timm.models.get_model_input_config(model)["fixed_input_size"] == (not model.dynamic_img_size)


def test_timms_factory_builds_our_class():
    """As people register a model of their own there."""
    model = timm.models.build_model_with_cfg(vit_fast.VisionTransformer, "vit_tiny_patch16_224", False, depth=1)
    assert model.default_cfg["classifier"] == "head"
    assert model._model_args["depth"] == 1
    model.default_cfg = {"url": ""}
    assert model.pretrained_cfg == {"url": ""}


def test_a_part_of_ones_own_has_no_arguments_to_export():
    """And what looks at every attribute, as torch.jit.trace does, is told that there are none."""
    model = vit_fast.create_model("test_vit", depth=1, img_size=32).eval()
    model.head = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 3))
    assert not hasattr(model, "_model_args")
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(torch.jit.trace(model, x)(x), model(x))


def test_a_config_without_a_crop_mode():
    """As DeiT's own code writes them."""
    model = vit_fast.create_model("test_vit", depth=1, img_size=32)
    pixels = torch.randint(256, (1, 40, 60, 3), dtype=torch.uint8)
    expected = model.predict(pixels)
    model.default_cfg = {name: value for name, value in model.default_cfg.items() if name != "crop_mode"}
    assert torch.equal(model.predict(pixels), expected)


def test_what_subclasses_of_timms_model_draw_with():
    theirs = draw(timm.create_model("test_vit", depth=2))
    ours = draw(vit_fast.create_model("test_vit", depth=2))
    for model in (theirs, ours):
        torch.manual_seed(0)
        model.head.apply(model._init_weights)
        model.fix_init_weight()
    for key in ("blocks.1.attn.proj.weight", "blocks.1.mlp.fc2.weight", "head.weight", "head.bias"):
        assert torch.equal(ours.state_dict()[key], theirs.state_dict()[key])


def test_a_pool_that_is_none():
    with pytest.raises(ValueError, match="pool_type: got 'mean', takes one of"):
        vit_fast.create_model("test_vit", depth=1).pool(torch.zeros(1, 5, 64), "mean")


@pytest.mark.parametrize("name", FORTY)
def test_logits_and_every_gradient_at_true_width(name):
    side = vit_fast.zoo.entries()[name]["args"].get("patch_size", 16)
    # Two rows of three patches: a grid that is not square shows rows taken for columns.
    theirs, ours = pair_of(name, img_size=(2 * side, 3 * side), depth=2, num_classes=7)
    images = small_images(theirs)
    assert_same(run(theirs, images), run(ours, images))


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("vit_tiny_patch16_224", {}),  # at its own size too: 197 tokens
        ("vit_small_patch16_36x1_224", {"img_size": 32}),  # the deepest of the small ones
    ],
)
def test_full_depth(name, overrides):
    theirs, ours = pair_of(name, **overrides)
    images = small_images(theirs)[:1]
    assert_same(run(theirs, images), run(ours, images))


@pytest.mark.parametrize(
    "overrides",
    [
        {"qk_norm": True},
        {"qk_norm": True, "init_values": 0.1, "scale_attn_norm": True},
        {"scale_mlp_norm": True},
        {"proj_bias": False, "qkv_bias": False},
        {"num_heads": 12},  # head dim 16
        {"embed_dim": 256, "num_heads": 2},  # head dim 128
        {"pos_embed": "none"},
        {"pos_embed": "none", "class_token": False, "global_pool": "max"},
        {"global_pool": "avgmax", "fc_norm": False},
        {"global_pool": "avg", "pool_include_prefix": True, "reg_tokens": 2},
        {"global_pool": "map"},
        {"global_pool": ""},
        {"final_norm": False, "pre_norm": True},
        {"embed_norm_layer": "layernorm"},
        {"patch_size": (16, 8), "img_size": (32, 24)},
        {"in_chans": 3, "img_size": (40, 50)},  # the last rows and columns fill no patch
        {"dynamic_img_size": True, "dynamic_img_pad": True},
        {"norm_layer": nn.LayerNorm, "act_layer": "quick_gelu"},
    ],
    ids=lambda overrides: "-".join(f"{key}={value}" for key, value in overrides.items())[:60],
)
def test_arguments_that_no_name_uses(overrides):
    theirs, ours = pair_of("vit_tiny_patch16_224", **{"img_size": (32, 48), "depth": 2, "num_classes": 5, **overrides})
    images = small_images(theirs)
    assert_same(run(theirs, images), run(ours, images))
    assert traits(ours) == traits(theirs)


@pytest.mark.parametrize(
    ("overrides", "size"),
    [
        ({}, (64, 48)),
        ({"no_embed_class": True, "reg_tokens": 2}, (16, 80)),
        ({"dynamic_img_pad": True}, (50, 37)),  # padded to 64 x 48
        ({"dynamic_img_pad": True, "patch_size": (16, 8)}, (50, 37)),  # padded to 64 x 40
        ({"class_token": False, "global_pool": "avg"}, (48, 48)),
    ],
)
def test_images_of_another_size(overrides, size):
    theirs, ours = pair_of(
        "vit_tiny_patch16_224", img_size=(32, 48), depth=2, num_classes=5, dynamic_img_size=True, **overrides
    )
    for images in (torch.randn(2, 3, *size, dtype=torch.float64), small_images(theirs)):
        for model in (theirs, ours):
            model.zero_grad()
        assert_same(run(theirs, images), run(ours, images))


TINY = {"img_size": (8, 12), "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}


@pytest.mark.interpret
@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("vit_tiny_patch16_224", {}),
        ("deit_tiny_distilled_patch16_224", {}),
        ("vit_small_patch14_reg4_dinov2", {"embed_dim": 48, "num_heads": 1}),  # LayerScale, registers, head dim 48
        ("vit_base_patch32_siglip_256", {}),  # tanh GELU, attention pool
        ("vit_giant_patch14_dinov2", {"depth": 1, "mlp_ratio": 2}),  # SwiGLU
        ("vit_xsmall_patch16_clip_224", {"act_layer": "quick_gelu", "qk_norm": True}),  # no patch bias
        ("vit_tiny_patch16_224", {"patch_size": (2, 4), "img_size": (7, 10)}),  # patches no square, rows left over
    ],
)
def test_the_kernels_in_the_interpreter(name, overrides):
    """Every op in Triton, forward and backward, in fp32: as close to float64 as timm in fp32 is, by the error rule."""
    options = {**TINY, **overrides}
    truth = run(pair_of(name, **options)[0], small_images(pair_of(name, **options)[0]))
    theirs, ours = pair_of(name, dtype=torch.float32, **options)
    images = small_images(theirs).float()
    unfused = run(theirs, images)
    with vit_fast.use_backend("triton"):
        kernels = run(ours, images)
    for key in truth:
        if key != "images":
            assert_close_to_truth(kernels[key], unfused[key], truth[key], key)


@pytest.mark.interpret
@pytest.mark.parametrize("mode", ["bf16", "autocast"])
def test_the_kernels_in_low_precision(mode):
    """Against timm in the same mode. The interpreter's bf16 is mended by the tests and proves nothing of a GPU's."""
    options = {**TINY, "init_values": 0.5, "drop_path_rate": 0.2}
    dtype = torch.bfloat16 if mode == "bf16" else torch.float32
    theirs, ours = pair_of("vit_tiny_patch16_224", dtype=dtype, **options)
    truth_model = copy.deepcopy(theirs).double()
    images = small_images(theirs, batch=8).to(dtype)
    results = []
    for model, backend in ((truth_model, "torch"), (theirs, "torch"), (ours, "triton")):
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast" and model is not truth_model)
        torch.manual_seed(4)
        with vit_fast.use_backend(backend), autocast:
            results.append(run(model, images.double() if model is truth_model else images))
    truth, unfused, kernels = results
    assert_close_to_truth(kernels["logits"], unfused["logits"], truth["logits"], "logits")
    for key in truth:
        # In norm over the whole tensor: through a model some row of a gradient cancels to almost nothing, and there the
        # ratio of two rounding errors says nothing. A row that is wrong still shows: one of 96 is 10 % of the norm.
        if key != "images":
            assert_close_to_truth(*(found[key].flatten() for found in (kernels, unfused, truth)), key)
