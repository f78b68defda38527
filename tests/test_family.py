"""ViT's relatives on our own model: SwiGLU, DINOv2's classifier, MAE's encoder, DeiT's two heads, dense features.

Each is held against timm or transformers with the same weights, copied here by hand, every parameter drawn anew. CLIP's
and SigLIP's towers are in test_parity.py, with every other architecture of timm's.
"""

import functools

import pytest
import timm
import torch
import transformers
from torch import nn

import vit_fast
from tests.error_rule import relative_error
from tests.test_model import RATES, SMALL, Timm, _after, pictures, small, twins
from tests.test_parity import assert_same, draw, pair_of, run, small_images
from vit_fast import layers, reference

GIANTS = ["vit_giant_patch14_dinov2", "vit_giant_patch14_reg4_dinov2", "vit_giant_patch14_reg1_tipsv2"]
GATED = {"mlp_layer": timm.layers.SwiGLUPacked, "act_layer": nn.SiLU}


# --- SwiGLU


@pytest.mark.parametrize("name", GIANTS)
def test_dinov2s_giants_give_what_timms_give(name):
    theirs, ours = pair_of(name, embed_dim=48, num_heads=3, depth=2, img_size=(28, 42), num_classes=5)
    assert ours.blocks[0].mlp.fc1.out_features == 256
    images = small_images(theirs)
    assert_same(run(theirs, images), run(ours, images))


@pytest.mark.parametrize(
    "options",
    [
        {"scale_mlp_norm": True},  # the norm before fc2, as wide as a half
        {"proj_bias": False},
        {"global_pool": "map"},  # whose own MLP has no gate, and timm gives it the same activation
    ],
    ids=str,
)
def test_swiglu_beside_other_parts(options):
    theirs, ours = twins(**GATED, **options)
    images = pictures()
    assert_same(run(theirs, images), run(ours, images))


def test_the_specification_knows_swiglu_and_dinov2s_pool():
    model = draw(vit_fast.VisionTransformer(**{**SMALL, **GATED, "global_pool": "token_avg"}, dtype=torch.float64))
    images = pictures()
    expected = reference.vision_transformer(
        images, model.state_dict(), heads=2, pool="token_avg", activation="swiglu"
    )  # fmt: skip
    assert relative_error(model(images).detach(), expected) < 1e-12


def test_one_seed_drops_what_timm_drops():
    theirs, ours = twins(**GATED, **RATES, init_values=0.1)
    images, results = pictures(batch=8), []
    for model in (theirs.train(), ours.train()):
        torch.manual_seed(7)
        results.append(run(model, images))
    assert_same(*results)
    assert torch.rand(()) == _after(theirs, images, 7)


@pytest.mark.parametrize("weight_init", ["", "jax", "moco", "reset"])
def test_one_seed_gives_the_weights_of_timm(weight_init):
    models = []
    for kind in (Timm, vit_fast.VisionTransformer):
        torch.manual_seed(5)
        models.append(kind(**SMALL, **GATED, weight_init=weight_init, fix_init=weight_init == ""))
    theirs, ours = (model.state_dict() for model in models)
    assert list(ours) == list(theirs)
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name


@pytest.mark.parametrize("layer", ["swiglu", layers.SwiGLUPacked, timm.layers.SwiGLUPacked])
@pytest.mark.parametrize("activation", ["silu", nn.SiLU])
def test_swiglu_by_class_and_name(layer, activation):
    model = vit_fast.VisionTransformer(**SMALL, mlp_layer=layer, act_layer=activation)
    assert type(model.blocks[0].mlp) is layers.SwiGLUPacked
    assert not model.blocks[0].mlp_aside()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mlp_layer": "swiglu"}, "act_layer: got None, takes 'silu' or nn.SiLU with SwiGLU"),
        ({"mlp_layer": "swiglu", "act_layer": "gelu"}, "act_layer: got 'gelu', takes 'silu'"),
        ({"mlp_layer": timm.layers.GluMlp}, "mlp_layer: got 'GluMlp', takes Mlp, SwiGLUPacked"),
        (
            {"mlp_layer": functools.partial(timm.layers.GluMlp, act_layer=nn.SiLU)},  # the gate last
            "mlp_layer: got functools.partial",
        ),
        ({**GATED, "mlp_ratio": 33 / 32}, "hidden_features: got 33, takes an even number"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        vit_fast.VisionTransformer(**{**SMALL, **options})


def test_swiglu_steps_aside_and_computes_the_same():
    _, model = twins(**GATED)
    images = pictures()
    expected = model(images)
    found = {(line.name, line.op): line.reason for line in vit_fast.explain(model)}
    assert ("blocks.0.mlp", "swiglu") in found
    assert not any(op == "mlp" for _, op in found)
    seen = []
    model.blocks[1].mlp.fc1.register_forward_hook(lambda *_: seen.append(1))
    assert relative_error(model(images), expected) < 1e-12
    assert seen == [1]
    found = {(line.name, line.op): line.reason for line in vit_fast.explain(model)}
    assert found["blocks.1.mlp", "swiglu"] == "mlp.fc1 has a hook"
    model.blocks[0].mlp.act = nn.GELU()
    assert model.blocks[0].mlp_aside() == "mlp.act is a GELU"
    assert relative_error(model(images), expected) > 1e-3


# --- against transformers


@torch.no_grad()
def copy_block(ours: layers.Block, theirs: nn.Module) -> None:
    dino = hasattr(theirs, "norm1")
    norms = (theirs.norm1, theirs.norm2) if dino else (theirs.layernorm_before, theirs.layernorm_after)
    ours.norm1.load_state_dict(norms[0].state_dict())
    ours.norm2.load_state_dict(norms[1].state_dict())
    for kind in ("weight", "bias"):
        parts = [getattr(theirs.attention.get_submodule(f"{name}_proj"), kind) for name in "qkv"]
        getattr(ours.attn.qkv, kind).copy_(torch.cat(parts))
    ours.attn.proj.load_state_dict(theirs.attention.o_proj.state_dict())
    if dino:
        ours.ls1.gamma.copy_(theirs.layer_scale1.lambda1)
        ours.ls2.gamma.copy_(theirs.layer_scale2.lambda1)
    if isinstance(ours.mlp, layers.SwiGLUPacked):
        for kind in ("weight", "bias"):
            halves = getattr(theirs.mlp.gate_proj, kind), getattr(theirs.mlp.up_proj, kind)
            getattr(ours.mlp.fc1, kind).copy_(torch.cat(halves))
        ours.mlp.fc2.load_state_dict(theirs.mlp.down_proj.state_dict())
    else:
        ours.mlp.fc1.load_state_dict(theirs.mlp.fc1.state_dict())
        ours.mlp.fc2.load_state_dict(theirs.mlp.fc2.state_dict())


@torch.no_grad()
def copy_trunk(ours: vit_fast.VisionTransformer, theirs: nn.Module, blocks: nn.ModuleList) -> None:
    """Embeddings, blocks and the final norm; of the class token, in front of everything, the position comes with it."""
    embeddings = theirs.embeddings
    positions = embeddings.position_embeddings
    ours.patch_embed.proj.load_state_dict(embeddings.patch_embeddings.projection.state_dict())
    if ours.no_embed_class:
        ours.cls_token.copy_(embeddings.cls_token + positions[:, :1])
        ours.reg_token.copy_(embeddings.register_tokens)
        ours.pos_embed.copy_(positions[:, 1:])
    else:
        ours.cls_token.copy_(embeddings.cls_token)
        ours.pos_embed.copy_(positions)
    for mine, yours in zip(ours.blocks, blocks, strict=True):
        copy_block(mine, yours)
    ours.norm.load_state_dict(theirs.layernorm.state_dict())


SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}


def pair(config: type, kind: type, settings: dict, **options) -> tuple[nn.Module, vit_fast.VisionTransformer]:
    """(transformers' model, ours without its weights), of the same sizes, in float64."""
    theirs = draw(kind(config(**SIZES, **settings)).double()).eval()
    norm = functools.partial(nn.LayerNorm, eps=theirs.config.layer_norm_eps)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "norm_layer": norm}
    model = options.pop("model", vit_fast.VisionTransformer)
    return theirs, model(**sizes, **options, dtype=torch.float64)


def images_32(batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, 32, 32, dtype=torch.float64, requires_grad=True)


def assert_same_output_and_gradient(ours, theirs, images: torch.Tensor) -> None:
    """Of two outputs that were computed from the same images; the upstream gradient is random."""
    upstream = torch.randn_like(theirs)
    assert relative_error(ours.detach(), theirs.detach()) < 1e-11
    gradients = [torch.autograd.grad(output, images, upstream, retain_graph=True)[0] for output in (ours, theirs)]
    assert relative_error(*gradients) < 1e-11


@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("gated", [False, True])
def test_dinov2s_classifier(registers, gated):
    """[class token, mean of the patch tokens], and no register in the mean."""
    config, kind, options = transformers.Dinov2Config, transformers.Dinov2ForImageClassification, {}
    settings = {"num_labels": 5, "use_swiglu_ffn": gated, "mlp_ratio": 3}
    if registers:
        config, kind = transformers.Dinov2WithRegistersConfig, transformers.Dinov2WithRegistersForImageClassification
        settings["num_register_tokens"] = registers
        options = {"reg_tokens": registers, "no_embed_class": True}
    # DINOv2 takes two thirds of the width and makes of them a multiple of 8: 64 gates for 96.
    options |= {"mlp_layer": "swiglu", "act_layer": "silu", "mlp_ratio": 4} if gated else {"mlp_ratio": 3}
    theirs, ours = pair(config, kind, settings, **options, init_values=1.0, num_classes=5, global_pool="token_avg")
    copy_trunk(ours, theirs.base_model, theirs.base_model.encoder.layer)
    ours.head.load_state_dict(theirs.classifier.state_dict())
    images = images_32()
    assert_same_output_and_gradient(ours(images), theirs(images).logits, images)


def test_the_width_of_a_head_follows_the_pool():
    model = vit_fast.VisionTransformer(**{**SMALL, "global_pool": "token_avg"})
    images = pictures(dtype=torch.float32)
    assert model.head.in_features == model.num_features == model.head_hidden_size == 2 * model.embed_dim == 64
    assert model.forward_head(model.forward_features(images), pre_logits=True).shape == (2, 64)
    model.reset_classifier(3, "avg")
    assert (model.head.in_features, model.num_features, model(images).shape) == (32, 32, (2, 3))
    model.reset_classifier(4, "token_avg")
    assert (model.head.in_features, model.num_features, model(images).shape) == (64, 64, (2, 4))
    model = vit_fast.VisionTransformer(**{**SMALL, "global_pool": "token_avg"}, fc_norm=True, representation_size=7)
    assert (model.fc_norm.normalized_shape, model.pre_logits.fc.in_features) == ((64,), 64)
    assert model(images).shape == (2, 5)
    with pytest.raises(ValueError, match="global_pool: got 'token', of another width than fc_norm or pre_logits reads"):
        model.reset_classifier(3, "token")
    with pytest.raises(ValueError, match="global_pool: got 'token_avg' with class_token=False"):
        vit_fast.VisionTransformer(**{**SMALL, "global_pool": "token_avg"}, class_token=False)


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.75])
def test_maes_encoder(ratio):
    settings = {"mask_ratio": ratio, "intermediate_size": 48}
    theirs, ours = pair(transformers.ViTMAEConfig, transformers.ViTMAEModel, settings, mlp_ratio=1.5, num_classes=0)
    copy_trunk(ours, theirs, theirs.layers)
    images, noise = images_32(), torch.rand(2, 16)
    expected = theirs(images, noise=noise)
    latent, mask, ids_restore = ours.forward_masked(images, ratio, noise)
    assert latent.shape == (2, 1 + int(16 * (1 - ratio)), 32)
    assert torch.equal(mask, expected.mask.float())
    assert torch.equal(ids_restore, expected.ids_restore)
    assert_same_output_and_gradient(latent, expected.last_hidden_state, images)


@pytest.mark.parametrize("options", [{}, {"reg_tokens": 2, "no_embed_class": True}, {"pre_norm": True}], ids=str)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_what_is_masked_is_not_read(options, checkpointing):
    model = draw(vit_fast.VisionTransformer(**SMALL, **options, patch_drop_rate=0.5, dynamic_img_size=True)).train()
    model.set_grad_checkpointing(checkpointing)
    images = pictures(dtype=torch.float32, size=(16, 12))  # 4 rows of 3 patches, another grid than the model's own
    torch.manual_seed(3)
    latent, mask, ids_restore = model.forward_masked(images, 0.5)
    assert latent.shape == (2, model.num_prefix_tokens + 6, 32)
    assert mask.sum(1).tolist() == [6, 6]
    torch.manual_seed(3)
    noise = torch.rand(2, 12)
    assert torch.equal(model.forward_masked(images, 0.5, noise)[2], ids_restore)
    hidden = mask.bool().reshape(2, 1, 4, 3).repeat_interleave(4, 2).repeat_interleave(4, 3)
    others = torch.where(hidden, torch.randn_like(images), images)
    assert torch.equal(model.forward_masked(others, 0.5, noise)[0], latent)
    seen = torch.where(hidden, images, torch.randn_like(images))
    assert not torch.allclose(model.forward_masked(seen, 0.5, noise)[0], latent)


@pytest.mark.parametrize("options", [{}, {"pre_norm": True}], ids=str)
def test_nothing_masked_is_every_token(options):
    model, images = small(**options).eval(), pictures(dtype=torch.float32)
    latent, _, _ = model.forward_masked(images, 0.0, torch.arange(6.0).expand(2, -1))
    torch.testing.assert_close(latent, model.forward_features(images))


def test_what_a_mask_may_not_be():
    model = vit_fast.VisionTransformer(**SMALL)
    images = pictures(dtype=torch.float32)
    for ratio in (-0.1, 1.0):
        with pytest.raises(ValueError, match=f"mask_ratio: got {ratio}, takes 0 or more and less than 1"):
            model.forward_masked(images, ratio)
    with pytest.raises(ValueError, match=r"noise: got shape \[2, 7\], takes \[2, 6\], a number for each patch"):
        model.forward_masked(images, 0.5, torch.rand(2, 7))
    assert model.forward_masked(images, 0.99)[0].shape == (2, 2, 32), "one patch stays"


def test_deits_two_heads():
    settings = {"intermediate_size": 48, "num_labels": 5}
    theirs, ours = pair(
        transformers.DeiTConfig,
        transformers.DeiTForImageClassificationWithTeacher,
        settings,
        mlp_ratio=1.5,
        num_classes=5,
        model=vit_fast.model.VisionTransformerDistilled,
    )
    copy_trunk(ours, theirs.deit, theirs.deit.layers)
    with torch.no_grad():
        ours.dist_token.copy_(theirs.deit.embeddings.distillation_token)
    ours.head.load_state_dict(theirs.cls_classifier.state_dict())
    ours.head_dist.load_state_dict(theirs.distillation_classifier.state_dict())
    images = images_32()
    expected = theirs(images)
    assert_same_output_and_gradient(ours.eval()(images), expected.logits, images)
    ours.set_distilled_training()
    both = ours.train()(images)
    for mine, yours in zip(both, (expected.cls_logits, expected.distillation_logits), strict=True):
        assert_same_output_and_gradient(mine, yours, images)


# --- dense features


def test_feature_maps_are_those_of_transformers_backbone():
    settings = {"out_indices": [1, 2], "mlp_ratio": 2, "apply_layernorm": True, "reshape_hidden_states": True}
    theirs, ours = pair(
        transformers.Dinov2Config, transformers.Dinov2Backbone, settings, mlp_ratio=2, init_values=1.0, num_classes=0
    )
    copy_trunk(ours, theirs, theirs.encoder.layer)
    images = images_32()
    expected = theirs(images).feature_maps
    found = ours.forward_intermediates(images, indices=2, norm=True, intermediates_only=True)
    for mine, yours in zip(found, expected, strict=True):
        assert mine.shape == (2, 32, 4, 4)
        assert_same_output_and_gradient(mine, yours, images)


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({"reg_tokens": 2, "no_embed_class": True}, (16, 20)),
        ({"dynamic_img_pad": True}, (13, 9)),  # padded to 16 x 12
        ({"class_token": False, "global_pool": "avg"}, (20, 8)),
    ],
    ids=str,
)
@pytest.mark.parametrize("method", ["forward_intermediates", "get_intermediate_layers"])
def test_feature_maps_of_pictures_of_any_size(method, options, size):
    theirs, ours = twins(**options, dynamic_img_size=True)
    images = pictures(size=size)
    for chosen in ({"norm": True}, {"return_prefix_tokens": bool(ours.num_prefix_tokens)}):
        if method == "forward_intermediates":
            arguments = {"indices": [0, 2], "output_fmt": "NCHW", "intermediates_only": True}
        else:
            arguments = {"n": [0, 2], "reshape": True}
        found, expected = (getattr(model, method)(images, **arguments, **chosen) for model in (ours, theirs))
        for mine, yours in zip(found, expected, strict=True):
            for one, other in zip(mine, yours, strict=True) if isinstance(yours, tuple) else [(mine, yours)]:
                assert one.shape == other.shape
                assert relative_error(one.detach(), other.detach()) < 1e-12
