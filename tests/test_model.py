"""The model as its users meet it: timm's methods and draws, hooks and wrappers, compile and export, maps, bad input."""

import copy
import io
import logging
import math
import pickle
import subprocess
import sys

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

import vit_fast
from tests.error_rule import assert_close_to_truth, relative_error
from tests.test_parity import assert_same, draw, run
from vit_fast import layers, reference
from vit_fast.ops import backend

SMALL = {
    "img_size": (8, 12),
    "patch_size": 4,
    "embed_dim": 32,
    "depth": 3,
    "num_heads": 2,
    "num_classes": 5,
    "norm_layer": None,
}
Timm = timm.models.vision_transformer.VisionTransformer
TimmDistilled = timm.models.deit.VisionTransformerDistilled


def small(**overrides) -> vit_fast.VisionTransformer:
    return draw(vit_fast.VisionTransformer(**{**SMALL, **overrides}))


def twins(**overrides) -> tuple[nn.Module, nn.Module]:
    """(timm's, ours) in float64 with the same parameters."""
    options = {**SMALL, "dtype": torch.float64, **overrides}
    theirs, ours = Timm(**options), vit_fast.VisionTransformer(**options)
    ours.load_state_dict(draw(theirs).state_dict())
    return theirs, ours


def pictures(batch: int = 2, dtype=torch.float64, size=(8, 12)) -> torch.Tensor:
    return torch.randn(batch, 3, *size, dtype=dtype)


def close(ours, theirs) -> bool:
    return ours.shape == theirs.shape and relative_error(ours.detach(), theirs.detach()) < 1e-12


# --- timm's methods


def test_features_and_head_in_two_steps():
    theirs, ours = twins(global_pool="avg")
    images = pictures()
    features = ours.forward_features(images)
    assert close(features, theirs.forward_features(images))
    assert close(ours.forward_head(features, pre_logits=True), theirs.forward_head(features, pre_logits=True))
    assert close(ours.forward_head(features), theirs.forward_head(features))
    for pool in ("token", "max", ""):
        assert close(ours.pool(features, pool), theirs.pool(features, pool))


def test_pieces_that_other_code_calls():
    theirs, ours = twins(reg_tokens=2)
    images = pictures()
    tokens = ours._pos_embed(ours.patch_embed(images))
    assert close(tokens, theirs._pos_embed(theirs.patch_embed(images)))
    assert isinstance(ours.blocks, nn.Sequential)
    assert close(ours.norm(ours.blocks(ours.norm_pre(ours.patch_drop(tokens)))), ours.forward_features(images))
    block, attn = ours.blocks[1], ours.blocks[1].attn
    assert close(attn(tokens), theirs.blocks[1].attn(tokens))
    assert close(block.mlp(tokens), theirs.blocks[1].mlp(tokens))
    assert ours.patch_embed.grid_size == (2, 3)
    assert attn.fused_attn is True
    assert attn.qkv.weight.shape == (96, 32)
    assert block.mlp.fc2(block.mlp.fc1(tokens)).shape == tokens.shape


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"indices": 2, "norm": True, "return_prefix_tokens": True},
        {"indices": [0, -1], "output_fmt": "NLC", "intermediates_only": True},
        {"indices": [1], "stop_early": True, "output_dict": True, "return_prefix_tokens": True},
        {"indices": [0], "stop_early": True, "output_dict": True, "intermediates_only": True},
        {"is_causal": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("tokens", [{"reg_tokens": 2}, {"class_token": False, "global_pool": "avg"}], ids=str)
def test_forward_intermediates(options, tokens):
    theirs, ours = twins(**tokens)
    images = pictures()
    compare_nested(ours.forward_intermediates(images, **options), theirs.forward_intermediates(images, **options))


def compare_nested(ours, theirs):
    if isinstance(theirs, torch.Tensor):
        assert close(ours, theirs)
    elif isinstance(theirs, dict):
        assert list(ours) == list(theirs)
        for key in theirs:
            compare_nested(ours[key], theirs[key])
    else:
        assert len(ours) == len(theirs)
        for mine, yours in zip(ours, theirs):
            compare_nested(mine, yours)


def test_get_intermediate_layers():
    theirs, ours = twins()
    images = pictures()
    for options in ({}, {"n": 2, "reshape": True}, {"n": [0, 2], "return_prefix_tokens": True, "norm": True}):
        compare_nested(
            ours.get_intermediate_layers(images, **options), theirs.get_intermediate_layers(images, **options)
        )


def test_prune_intermediate_layers():
    theirs, ours = twins(global_pool="avg")
    assert ours.prune_intermediate_layers([1], prune_norm=True) == theirs.prune_intermediate_layers(
        [1], prune_norm=True
    )
    images = pictures()
    assert close(ours(images), theirs(images))
    assert list(ours.state_dict()) == list(theirs.state_dict())


def test_reset_classifier():
    theirs, ours = twins(global_pool="map")
    for model in (theirs, ours):
        model.reset_classifier(3, "avg")
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    images = pictures()
    assert close(ours(images), theirs(images))
    ours.reset_classifier(0)
    assert ours(images).shape == (2, 32)
    assert isinstance(ours.get_classifier(), nn.Identity)
    with pytest.raises(ValueError, match="global_pool: got 'map'"):
        ours.reset_classifier(3, "map")
    with pytest.raises(ValueError, match="no class token"):
        small(class_token=False, global_pool="avg").reset_classifier(3, "token")
    for wrong in (-1, "x", [1]):
        with pytest.raises(ValueError, match="num_classes: got"):
            ours.reset_classifier(wrong, "token")
    assert (ours.num_classes, ours.global_pool) == (0, "avg"), "what is refused changes nothing"


@pytest.mark.parametrize("change", [{"img_size": (16, 8)}, {"patch_size": 2}, {"img_size": (18, 9), "patch_size": 3}])
@pytest.mark.parametrize("tokens", [{}, {"no_embed_class": True, "reg_tokens": 1}], ids=str)
def test_set_input_size(change, tokens):
    theirs, ours = twins(**tokens)
    for model in (theirs, ours):
        model.set_input_size(**change)
    assert ours.patch_embed.grid_size == theirs.patch_embed.grid_size
    # timm resamples the projection by a pseudoinverse in fp32 too
    for name, tensor in theirs.state_dict().items():
        assert relative_error(ours.state_dict()[name], tensor) < 1e-6, name
    ours.load_state_dict(theirs.state_dict())
    images = pictures(size=change.get("img_size", (8, 12)))
    assert close(ours(images), theirs(images))


def test_what_is_frozen_stays_frozen_at_another_size():
    model = small()
    model.pos_embed.requires_grad_(False)
    model.patch_embed.proj.requires_grad_(False)
    model.set_input_size((16, 12), patch_size=2)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert not trained & {"pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"}


@pytest.mark.parametrize(
    "change", [{"patch_size": 64}, {"img_size": 2}, {"img_size": "x", "patch_size": 2}, {"patch_size": True}], ids=str
)
def test_a_size_that_is_refused_changes_nothing(change):
    model = small()
    images, before = pictures().float(), {name: t.clone() for name, t in model.state_dict().items()}
    logits = model(images)
    with pytest.raises(ValueError, match="_size: got"):
        model.set_input_size(**change)
    assert torch.equal(model(images), logits)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_names_for_optimisers():
    theirs, ours = twins()
    assert ours.no_weight_decay() == theirs.no_weight_decay()
    assert ours.group_matcher() == theirs.group_matcher()
    assert ours.feature_info == theirs.feature_info


def test_gradient_checkpointing_changes_nothing():
    model = small(drop_path_rate=0.5, proj_drop_rate=0.1, dtype=torch.float64)
    images = pictures()
    results = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        torch.manual_seed(3)
        results.append({name: tensor.clone() for name, tensor in run(model, images).items()})
    assert_same(*results)


def test_masks():
    theirs, ours = twins()
    images = pictures()
    mask = torch.rand(7, 7) > 0.3
    mask.fill_diagonal_(True)
    for options in ({"attn_mask": mask}, {"is_causal": True}, {"attn_mask": torch.randn(7, 7, dtype=torch.float64)}):
        for fused in (True, False):
            for model in (theirs, ours):
                for block in model.blocks:
                    block.attn.fused_attn = fused
            assert close(ours(images, **options), theirs(images, **options))


# --- the last block, of which the head reads the class token alone

VARIANTS = {
    "plain": {},
    "LayerScale, drop path": {"init_values": 0.5, "drop_path_rate": 0.4},
    "registers, norms of queries and keys": {"reg_tokens": 2, "qk_norm": True},
    "norms inside, no bias": {"scale_attn_norm": True, "scale_mlp_norm": True, "qkv_bias": False},
    "distilled": {"drop_path_rate": 0.4},
    "SwiGLU, another final norm": {"mlp_layer": layers.SwiGLUPacked, "act_layer": nn.SiLU, "fc_norm": True},
}


def _tokens_of_the_last_block(monkeypatch, model, images) -> int:
    """How many tokens the last MLP of a model sees."""
    seen = []
    fused = layers.Block._fused_mlp
    monkeypatch.setattr(layers.Block, "_fused_mlp", lambda block, x: seen.append(x.shape[1]) or fused(block, x))
    model(images)
    return seen[-1]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_tokens_that_the_head_does_not_read_are_left_out(variant, training, monkeypatch):
    """Logits and the gradient of every parameter are those of all tokens."""
    distilled = variant == "distilled"
    kind = vit_fast.model.VisionTransformerDistilled if distilled else vit_fast.VisionTransformer
    model = draw(kind(**SMALL, dtype=torch.float64, **VARIANTS[variant])).train(training)
    images = pictures()

    def results(forward) -> list[torch.Tensor]:
        torch.manual_seed(1)
        logits = forward(images)
        wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return [logits, *torch.autograd.grad(logits.square().sum(), wanted)]

    ours, every = results(model), results(lambda x: model.forward_head(model.forward_features(x)))
    for one, other in zip(ours, every):  # what shifts all keys alike has a gradient of zero, but for rounding
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)
    assert _tokens_of_the_last_block(monkeypatch, model, images) == 1 + distilled


def test_who_looks_at_every_token_sees_them(monkeypatch):
    """A hook on the last block, in either of its halves, on the final norm or on what holds the blocks."""
    model = draw(vit_fast.VisionTransformer(**SMALL, dtype=torch.float64)).eval()
    images, seen = pictures(), []
    tokens = model.forward_features(images).shape[1]
    expected = model(images)
    assert model.last_block_aside() == ""
    for name, module in (("blocks.2", model.blocks[-1]), ("norm", model.norm), ("blocks", model.blocks)):
        handle = module.register_forward_hook(lambda module, args, output: seen.append(output.shape[1]))
        assert model.last_block_aside() == f"{name} has a hook"
        assert close(model(images), expected)
        assert seen.pop() == tokens
        handle.remove()
    for module in (model.blocks[-1].attn.proj, model.blocks[-1].mlp.fc1):
        handle = module.register_forward_hook(lambda module, args, output: seen.append(output.shape[1]))
        assert close(model(images), expected)
        assert seen.pop() == tokens
        handle.remove()
    for module in (model.blocks, model.blocks[-1]):
        with monkeypatch.context() as patch:
            patch.setattr(module, "_compiled_call_impl", lambda x: seen.append(x.shape[1]) or x)
            model(images)
        assert seen.pop() == tokens


@pytest.mark.parametrize("distilled", [False, True])
@pytest.mark.parametrize("name", ["forward_features", "_encode", "pool", "forward_head"])
def test_a_method_of_somebodys_own_gets_every_token(name, distilled, monkeypatch):
    """In the model, in a class of theirs, and in ours, as mock.patch puts it there."""
    kind = vit_fast.model.VisionTransformerDistilled if distilled else vit_fast.VisionTransformer
    if distilled and name == "pool":
        pytest.skip("the distilled model's head reads its two tokens itself")
    tokens = vit_fast.model.VisionTransformer(**SMALL).patch_embed.num_patches + 1 + distilled
    seen = []

    def own(self, x, *args):
        y = original(self, x, *args)
        seen.append((y if name == "forward_features" else x).shape[1])
        return y

    original = getattr(kind, name)
    model, images = kind(**SMALL).eval(), pictures(dtype=torch.float32)
    expected = model(images)
    with monkeypatch.context() as patch:
        patch.setattr(model, name, own.__get__(model))
        torch.testing.assert_close(model(images), expected)
    theirs = type("Theirs", (kind,), {name: own})(**SMALL).eval()
    theirs.load_state_dict(model.state_dict())
    torch.testing.assert_close(theirs(images), expected)
    with monkeypatch.context() as patch:
        patch.setattr(kind, name, own)
        torch.testing.assert_close(model(images), expected)
    assert seen == 3 * [tokens]


@pytest.mark.parametrize("distilled", [False, True])
def test_who_runs_the_blocks_in_a_way_of_their_own_runs_the_last_too(distilled):
    seen = []

    def own(self, block, *args):
        seen.append(block)
        return block(args[0])

    kind = vit_fast.model.VisionTransformerDistilled if distilled else vit_fast.VisionTransformer
    model = type("Theirs", (kind,), {"_run_block": own})(**SMALL).eval()
    model.set_grad_checkpointing()
    model(pictures(dtype=torch.float32))
    assert seen == list(model.blocks)


def test_what_reads_more_than_the_class_token_gets_it(monkeypatch):
    for pool in ("avg", "token_avg", "max", "map", ""):
        model = vit_fast.VisionTransformer(**{**SMALL, "global_pool": pool}).eval()
        assert model.first_tokens_read() is None
    model = vit_fast.VisionTransformer(**{**SMALL, "global_pool": "map"}).eval()
    model.global_pool = "token"  # its attention pool reads them all nevertheless
    assert model.first_tokens_read() is None
    distilled = vit_fast.model.VisionTransformerDistilled(**SMALL).eval()
    assert _tokens_of_the_last_block(monkeypatch, distilled, pictures(dtype=torch.float32)) == 2


def test_the_blocks_before_the_last_are_checkpointed(monkeypatch):
    model, seen = small(), []
    fused = layers.Block._fused
    monkeypatch.setattr(layers.Block, "_fused", lambda block, x: seen.append(1) or fused(block, x))
    model.set_grad_checkpointing()
    model(pictures(dtype=torch.float32)).sum().backward()
    assert len(seen) == 2 * (SMALL["depth"] - 1), "once forward, once again backward"


def test_few_tokens_on_another_device_than_a_cpu_take_the_block_op(monkeypatch):
    """The meta device stands for a GPU: 7 tokens a picture."""
    model = vit_fast.VisionTransformer(**SMALL, device="meta").eval()
    few = layers.Block.first_tokens
    seen, normed = [], []
    monkeypatch.setattr(layers.Block, "first_tokens", lambda block, *args: seen.append(1) or few(block, *args))
    norm = nn.LayerNorm.forward
    for batch, alone in ((vit_fast.model.FEW_TOKENS // 7, False), (vit_fast.model.FEW_TOKENS // 7 + 1, True)):
        assert model(torch.empty(batch, 3, 8, 12, device="meta")).shape == (batch, SMALL["num_classes"])
        assert bool(seen) is alone
    monkeypatch.setattr(model.norm, "forward", lambda x: normed.append(x.shape[1]) or norm(model.norm, x))
    model(torch.empty(1, 3, 8, 12, device="meta"))
    assert normed == [7]


def test_distilled_model_in_training_and_evaluation():
    options = {**SMALL, "dtype": torch.float64}
    theirs = TimmDistilled(**options)
    ours = vit_fast.model.VisionTransformerDistilled(**options)
    ours.load_state_dict(draw(theirs).state_dict())
    images = pictures()
    assert close(ours(images), theirs(images))
    features = ours.forward_features(images)
    assert close(ours.forward_head(features, pre_logits=True), theirs.forward_head(features, pre_logits=True))
    for model in (theirs, ours):
        model.set_distilled_training()
    compare_nested(ours(images), theirs(images))
    compare_nested(ours.eval()(images), theirs.eval()(images))
    for model in (theirs, ours):
        model.reset_classifier(3)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert [head.out_features for head in ours.get_classifier()] == [3, 3]


# --- draws

RATES = {
    "drop_rate": 0.2,
    "pos_drop_rate": 0.1,
    "patch_drop_rate": 0.3,
    "proj_drop_rate": 0.1,
    "attn_drop_rate": 0.2,
    "drop_path_rate": 0.5,
}


@pytest.mark.parametrize(
    "rates", [{"drop_path_rate": 0.5}, *({key: rate} for key, rate in RATES.items()), RATES], ids=str
)
@pytest.mark.parametrize("scale", [None, 0.1])
def test_one_seed_drops_what_timm_drops(rates, scale):
    theirs, ours = twins(init_values=scale, **rates)
    images = pictures(batch=8)
    results = []
    for model in (theirs.train(), ours.train()):
        torch.manual_seed(7)
        results.append(run(model, images))
    assert_same(*results)
    assert torch.rand(()) == _after(theirs, images, 7)


def _after(model: nn.Module, images: torch.Tensor, seed: int) -> torch.Tensor:
    """The number that the generator gives next: the models must have drawn equally often."""
    torch.manual_seed(seed)
    model(images)
    return torch.rand(())


def test_a_drop_path_that_does_not_scale():
    theirs, ours = twins(drop_path_rate=0.5)
    images, results = pictures(batch=8), []
    for model in (theirs.train(), ours.train()):
        for block in model.blocks[1:]:
            block.drop_path1.scale_by_keep = block.drop_path2.scale_by_keep = False
        torch.manual_seed(7)
        results.append(run(model, images))
    assert_same(*results)


def test_the_older_name_of_its_settings():
    model = small()
    assert model.default_cfg is model.pretrained_cfg


@pytest.mark.parametrize("weight_init", ["", "jax", "jax_nlhb", "moco", "reset"])
@pytest.mark.parametrize("options", [{}, {"global_pool": "map", "reg_tokens": 1, "init_values": 0.1}], ids=str)
def test_one_seed_gives_the_weights_of_timm(weight_init, options):
    models = []
    for kind in (Timm, vit_fast.VisionTransformer):
        torch.manual_seed(5)
        models.append(kind(**SMALL, **options, weight_init=weight_init, fix_init=weight_init == ""))
    theirs, ours = (model.state_dict() for model in models)
    assert list(ours) == list(theirs)
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name


# --- dtypes


@pytest.mark.parametrize("mode", ["bf16", "autocast", "autocast, drop path and LayerScale"])
def test_low_precision_is_as_close_to_float64_as_timm(mode):
    options = {"depth": 2}
    if "drop path" in mode:
        options |= {"drop_path_rate": 0.4, "init_values": 0.5}
    theirs, ours = twins(**options)
    dtype = torch.bfloat16 if mode == "bf16" else torch.float32
    theirs, ours = theirs.to(dtype), ours.to(dtype)
    images = pictures(batch=8).to(dtype)
    truth_model = copy.deepcopy(theirs).double()
    results = []
    for model, autocast in ((truth_model, False), (theirs, mode != "bf16"), (ours, mode != "bf16")):
        torch.manual_seed(11)
        given = images.double() if model is truth_model else images
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            results.append(run(model, given))
    truth, unfused, fused = results
    for name in truth:
        assert_close_to_truth(fused[name], unfused[name], truth[name], name)


@pytest.mark.parametrize("options", [{}, {"qk_norm": True, "scale_attn_norm": True, "scale_mlp_norm": True}], ids=str)
def test_dtype_of_every_stage_is_that_of_timm(options):
    theirs, ours = (model.float() for model in twins(**options))
    images = pictures().float()
    with torch.autocast("cpu", torch.bfloat16):
        assert relative_error(ours(images).detach(), theirs(images).detach()) < torch.finfo(torch.bfloat16).eps * 4
        assert ours.forward_features(images).dtype == theirs.forward_features(images).dtype == torch.float32
        assert ours(images).dtype == theirs(images).dtype == torch.bfloat16
    assert ours.bfloat16()(images.bfloat16()).dtype == torch.bfloat16


# --- the specification


@pytest.mark.parametrize(
    ("options", "pool"),
    [
        ({}, "token"),
        ({"init_values": 0.5, "reg_tokens": 2, "qk_norm": True}, "token"),
        ({"class_token": False, "global_pool": "avg", "act_layer": "gelu_tanh"}, "avg"),
        ({"pos_embed": "sincos2d", "no_embed_class": True}, "token"),
        ({"representation_size": 24, "act_layer": "quick_gelu"}, "token"),
        ({"pre_norm": True, "qkv_bias": False}, "token"),
        ({"scale_attn_norm": True, "scale_mlp_norm": True}, "token"),
        ({"global_pool": "max", "reg_tokens": 1}, "max"),
        ({"global_pool": "avgmax", "fc_norm": False}, "avgmax"),
        ({"global_pool": "map", "class_token": False}, "map"),
        ({"global_pool": "", "num_classes": 0}, ""),
        ({"distilled": True}, "token"),
    ],
    ids=str,
)
def test_the_reference_says_the_same(options, pool):
    kind = vit_fast.model.VisionTransformerDistilled if "distilled" in options else vit_fast.VisionTransformer
    model = kind(**{**SMALL, "dtype": torch.float64, **{k: v for k, v in options.items() if k != "distilled"}}).eval()
    draw(model)
    images = pictures()
    activation = options.get("act_layer", "gelu")
    logits = reference.vision_transformer(images, model.state_dict(), heads=2, pool=pool, activation=activation)
    assert close(model(images), logits)


def test_the_reference_reads_every_parameter_or_says_so():
    parameters = small(dtype=torch.float64).state_dict()
    with pytest.raises(ValueError, match=r"blocks\.0\.attn\.gate are of another architecture"):
        reference.vision_transformer(pictures(), {**parameters, "blocks.0.attn.gate": torch.ones(1)}, heads=2)
    with pytest.raises(ValueError, match="pool: got 'mean'"):
        reference.vision_transformer(pictures(), parameters, heads=2, pool="mean")


def test_sincos_positions_are_fixed_and_saved():
    model = vit_fast.VisionTransformer(**SMALL, pos_embed="sincos2d", reg_tokens=1)
    assert not model.pos_embed.requires_grad
    table = reference.sincos_position(2, 3, 32)
    assert torch.equal(model.pos_embed[0, :2], torch.zeros(2, 32))
    torch.testing.assert_close(model.pos_embed[0, 2:], table.float(), rtol=0, atol=1e-7)
    before = model.pos_embed.clone()
    model.init_weights()
    assert torch.equal(model.pos_embed, before)
    Timm(**SMALL, reg_tokens=1).load_state_dict(model.state_dict(), strict=True)
    model.set_input_size((16, 12))
    assert not model.pos_embed.requires_grad
    torch.testing.assert_close(model.pos_embed[0, 2:], reference.sincos_position(4, 3, 32).float(), rtol=0, atol=1e-7)
    with torch.device("meta"):
        model = vit_fast.VisionTransformer(**SMALL, pos_embed="sincos2d", reg_tokens=1)
    model.to_empty(device="cpu").init_weights()
    assert torch.equal(model.pos_embed, before)
    loaded = torch.randn_like(before)
    model.load_state_dict({**model.state_dict(), "pos_embed": loaded})
    model.set_input_size((8, 12))
    assert torch.equal(model.pos_embed, loaded)  # the same grid: nothing to make anew
    with pytest.raises(ValueError, match="multiple of 4"):
        vit_fast.VisionTransformer(**{**SMALL, "embed_dim": 34}, pos_embed="sincos2d")


# --- stepping aside


class Doubled(nn.Module):
    """A wrapper as LoRA's: another class that holds the original."""

    def __init__(self, base):
        super().__init__()
        self.base = base

    def forward(self, x):
        return 2 * self.base(x)


class Shifted(nn.Module):
    def forward(self, weight):
        return weight + 0.1


class Quantised(torch.Tensor):
    """A weight that is a tensor of another kind."""


PARTS = [
    *("norm1", "attn", "attn.qkv", "attn.q_norm", "attn.k_norm", "attn.proj", "attn.proj_drop", "ls1", "drop_path1"),
    *("norm2", "mlp", "mlp.fc1", "mlp.act", "mlp.drop1", "mlp.norm", "mlp.fc2", "mlp.drop2", "ls2", "drop_path2"),
]


@pytest.mark.parametrize("kind", ["forward", "pre", "backward", "backward pre"])
@pytest.mark.parametrize("part", PARTS)
def test_a_hook_fires_and_what_it_changes_counts(part, kind):
    theirs, ours = twins(init_values=0.1, drop_path_rate=0.1, qk_norm=True)
    images, calls = pictures(), []

    def forward_hook(module, args, output):
        calls.append(part)
        return output * 1.5

    def pre_hook(module, args):
        calls.append(part)
        return (args[0] * 1.5, *args[1:])

    def backward_hook(module, grad_input, grad_output):
        calls.append(part)
        return tuple(None if grad is None else grad * 1.5 for grad in grad_input)

    def backward_pre_hook(module, grad_output):
        calls.append(part)
        return tuple(grad * 1.5 for grad in grad_output)

    results = []
    for model in (theirs.eval(), ours.eval()):
        module = model.blocks[1].get_submodule(part)
        if kind == "forward":
            module.register_forward_hook(forward_hook)
        elif kind == "pre":
            module.register_forward_pre_hook(pre_hook)
        elif kind == "backward":
            module.register_full_backward_hook(backward_hook)
        else:
            module.register_full_backward_pre_hook(backward_pre_hook)
        results.append(run(model, images))
    assert calls == [part, part]
    assert_same(*results)


def test_a_hook_on_the_embedding_fires():
    theirs, ours = twins()
    images, calls = pictures(), []
    for model in (theirs, ours):
        for part in ("patch_embed", "patch_embed.proj", "patch_embed.norm", "pos_drop", "norm_pre", "norm", "head"):
            model.get_submodule(part).register_forward_hook(
                lambda module, args, output: calls.append(1) or output * 1.1
            )
    assert close(ours(images), theirs(images))
    assert len(calls) == 14


def test_a_global_hook_sees_every_module():
    theirs, ours = twins()
    images, seen = pictures(), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module).__name__))
    try:
        ours(images)
        mine = list(seen)
        seen.clear()
        theirs(images)
    finally:
        handle.remove()
    mine.remove("Identity")  # pre_logits, which timm no longer has
    assert sorted(mine) == sorted(seen)


def test_the_recipe_for_attention_maps_still_works():
    """fused_attn off and a hook on attn_drop: what people do with timm."""
    theirs, ours = twins()
    images, maps = pictures(), []
    for model in (theirs, ours):
        model.blocks[1].attn.fused_attn = False
        model.blocks[1].attn.attn_drop.register_forward_hook(lambda module, args, output: maps.append(output))
    assert close(ours(images), theirs(images))
    assert close(maps[1], maps[0])


def _wrap(model, name):
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, Doubled(model.get_submodule(name)))


def _parametrise(model, name):
    parametrize.register_parametrization(model.get_submodule(name), "weight", Shifted())


def _weight_norm(model, name):
    nn.utils.parametrizations.weight_norm(model.get_submodule(name))


def _own_forward(model, name):
    module = model.get_submodule(name)
    module.forward = lambda x: F.linear(x, module.weight, module.bias) + 1


@pytest.mark.parametrize("change", [_wrap, _parametrise, _weight_norm, _own_forward])
@pytest.mark.parametrize("part", ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"])
def test_a_wrapped_product_is_called_and_not_read(change, part):
    theirs, ours = twins()
    for model in (theirs, ours):
        change(model, f"blocks.1.{part}")
    images = pictures()
    assert close(ours(images), theirs(images))
    lines = [line for line in vit_fast.explain(ours) if line.name == f"blocks.1.{part.split('.')[0]}"]
    assert any(part in line.reason for line in lines)


def test_a_weight_of_another_kind_is_not_read():
    _, ours = twins()
    weight = ours.blocks[0].mlp.fc1.weight
    ours.blocks[0].mlp.fc1.weight = nn.Parameter(weight.detach().as_subclass(Quantised))
    assert ours.blocks[0].mlp_aside() == "mlp.fc1 holds a Quantised"
    assert ours.blocks[0].attention_aside() == ""


def test_parts_swapped_for_others():
    theirs, ours = twins(act_layer="quick_gelu")
    for model in (theirs, ours):
        model.blocks[0].mlp.act = nn.ReLU()
        model.blocks[1].norm1 = nn.LayerNorm(32, bias=False, dtype=torch.float64)
        model.blocks[2].attn = nn.Identity() if model is ours else _Ignoring()
    images = pictures()
    with pytest.raises(TypeError):
        ours(images)  # nn.Identity takes no mask, as with timm
    ours.blocks[2].attn = _Ignoring()
    assert close(ours(images), theirs(images))
    reasons = {line.reason for line in vit_fast.explain(ours)}
    assert {"mlp.act is a ReLU", "norm1 has no weight or no bias", "attn is a _Ignoring"} <= reasons


class _Ignoring(nn.Module):
    def forward(self, x, attn_mask=None, is_causal=False):
        return x


def test_a_changed_class_is_not_overlooked(monkeypatch):
    """Code that patches timm's Attention.forward would patch ours; the fused path must not ignore it."""
    _, ours = twins()
    monkeypatch.setattr(layers.Attention, "forward", lambda self, x, attn_mask=None, is_causal=False: x * 0)
    assert ours.blocks[0].attention_aside() == "attn has a forward of its own"
    images = pictures()
    removed = ours(images)
    monkeypatch.undo()
    assert not torch.allclose(removed, ours(images))


def test_an_overridden_position_embedding_is_called():
    class Mine(vit_fast.VisionTransformer):
        def _pos_embed(self, x):
            return super()._pos_embed(x) + 1

    model = Mine(**SMALL)
    plain = small()
    plain.load_state_dict(model.state_dict())
    assert model.embed_aside() == "_pos_embed is replaced"
    images = pictures(dtype=torch.float32)
    assert not torch.allclose(model(images), plain(images))


@pytest.mark.parametrize(
    "option",
    [{"padding": 1}, {"stride": 3}, {"kernel_size": 2}, {"kernel_size": 2, "dilation": 2}, {"groups": 3}],
    ids=str,
)
def test_a_projection_that_cuts_no_patches_is_called_as_it_is(option):
    theirs, ours = twins(embed_dim=48)
    projection = nn.Conv2d(3, 48, **{"kernel_size": 4, "stride": 4, "dtype": torch.float64, **option})
    theirs.patch_embed.proj = ours.patch_embed.proj = projection
    assert ours.embed_aside() == "patch_embed.proj is no plain patch projection"
    images = pictures()
    assert close(ours(images), theirs(images))


def test_a_model_without_layers():
    theirs, ours = twins(depth=0)
    images = pictures()
    assert close(ours(images), theirs(images))
    assert close(ours(images), reference.vision_transformer(images, ours.state_dict(), heads=2))
    for maps in (ours.attention_rollout, ours.rollout_map):
        with pytest.raises(ValueError, match="has no layer"):
            maps(images)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_with_dynamic_shapes(dynamic):
    torch.compiler.reset()  # its limits are for one piece of code, and all tests share theirs
    model = small(dynamic_img_size=dynamic).eval()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in (2, 3):
        images = pictures(batch, torch.float32)
        with torch.no_grad():
            torch.testing.assert_close(compiled(images), model(images))


@pytest.mark.parametrize(
    ("dynamic", "how"), [(None, "antialiased"), (True, "antialiased"), (True, "plain"), (True, "offset")]
)
def test_compiled_training_on_pictures_of_several_sizes(dynamic, how):
    """Resized positions and their gradient, at sizes that a graph was not made for."""
    torch.compiler.reset()  # its limits are for one piece of code, and all tests share theirs
    model = small(dynamic_img_size=True)
    model.pos_interpolation = how
    compiled = torch.compile(model, dynamic=dynamic, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):  # in which positions keep their dtype
        resampled = torch.compile(lambda: model._positions(6, 5), backend="aot_eager")
        torch.testing.assert_close(resampled(), model._positions(6, 5))
    for size in ((8, 12), (16, 8), (12, 20)):
        images = pictures(2, torch.float32, size)
        expected = torch.autograd.grad(model(images).square().sum(), model.pos_embed)[0]
        found = torch.autograd.grad(compiled(images).square().sum(), model.pos_embed)[0]
        torch.testing.assert_close(found, expected)
    torch.compiler.reset()


def test_a_projection_of_somebodys_own():
    """As timm runs it; what else asks for the projection's numbers does without."""
    theirs, ours = twins()
    stem = nn.Sequential(nn.Conv2d(3, 8, 2, 2), nn.ReLU(), nn.Conv2d(8, SMALL["embed_dim"], 2, 2)).double()
    theirs.patch_embed.proj = stem
    ours.patch_embed.proj = copy.deepcopy(stem)
    images = pictures()
    assert relative_error(ours(images), theirs(images)) < 1e-12
    assert vit_fast.explain(ours)[0][1:] == ("patch_embed", "torch", "patch_embed.proj is a Sequential")
    ours.reset_classifier(7)
    assert ours(images).shape == (2, 7)
    assert ours.head.weight.dtype == torch.float64
    with pytest.raises(ValueError, match=r"images: got shape \[3, 8, 12\], takes \[B, C, rows, columns\]"):
        ours(images[0])


@pytest.mark.parametrize("last", [True, False])
def test_pruned_heads(last):
    """One head of each block left out, as timm runs it; where a last block has every token and where not."""
    theirs, ours = twins(global_pool="token" if last else "avg")
    for model in (theirs, ours):
        for block in model.blocks:
            attn, width = block.attn, SMALL["embed_dim"]
            kept = torch.arange(width).view(attn.num_heads, -1)[1:].flatten()
            attn.qkv.weight.data = attn.qkv.weight.data.view(3, width, width)[:, kept].flatten(0, 1)
            attn.qkv.bias.data = attn.qkv.bias.data.view(3, width)[:, kept].flatten()
            attn.proj.weight.data = attn.proj.weight.data[:, kept]
            attn.num_heads, attn.attn_dim = attn.num_heads - 1, len(kept)
    images = pictures()
    assert relative_error(ours(images), theirs(images)) < 1e-12
    loss = [model(images).square().sum() for model in (ours, theirs)]
    grads = [torch.autograd.grad(one, model.blocks[0].attn.qkv.weight)[0] for one, model in zip(loss, (ours, theirs))]
    assert relative_error(*grads) < 1e-10


def test_maps_of_a_scale_of_ones_own():
    """It counts where the probabilities are written out, and there alone, as in timm."""
    _, ours = twins()
    attn, images = ours.blocks[0].attn, pictures()
    usual = ours.attention_maps(images, layers=[0])
    attn.scale *= 3
    assert torch.equal(ours.attention_maps(images, layers=[0]), usual)
    attn.fused_attn = False
    found = []
    attn.attn_drop.register_forward_hook(lambda module, given, maps: found.append(maps))
    ours.eval()(images)
    assert relative_error(ours.attention_maps(images, layers=[0])[0], found[0]) < 1e-12


def test_the_log_says_it_once(caplog):
    backend._say_once.cache_clear()
    _, ours = twins(proj_drop_rate=0.1)
    with caplog.at_level(logging.INFO, "vit_fast"):
        ours.train()(pictures())
        ours(pictures())
    lines = [record.getMessage() for record in caplog.records if "module by module" in record.getMessage()]
    assert len(lines) == len(set(lines)) == 2  # attention's projection and the MLP, not one line a block
    assert all("is active" in line for line in lines)


# --- explain


def test_explain_lists_every_op():
    model = small(global_pool="map", scale_mlp_norm=True)
    lines = vit_fast.explain(model)
    found = [(line.name, line.op) for line in lines]
    assert found[:6] == [
        ("patch_embed", "patch_embed"),
        ("blocks.0.attn", "ln_linear"),
        ("blocks.0.attn", "attention_qkv"),
        ("blocks.0.attn", "linear_residual"),
        ("blocks.0.mlp", "ln_linear"),
        ("blocks.0.mlp", "linear_residual"),
    ]
    assert found[-2:] == [("attn_pool", "attention"), ("attn_pool.mlp", "mlp")]
    assert all(line.backend == "torch" and "cpu" in line.reason for line in lines)
    assert "blocks.2.mlp" in str(lines)
    assert len(str(lines).splitlines()) == len(lines) + 1


def test_explain_of_a_block_in_two_places_tells_of_the_first():
    model = small()
    names = [line.op for line in vit_fast.explain(model) if line.name == "blocks.2.attn"]
    assert names == ["ln_linear", "attention", "linear_residual"], "of the class token alone"
    model.blocks[-1] = model.blocks[0]
    found = {line.name: line.op for line in vit_fast.explain(model) if line.op.startswith("attention")}
    assert found == {"blocks.0.attn": "attention_qkv", "blocks.1.attn": "attention_qkv"}


def test_explain_of_a_last_block_that_computes_every_token():
    model = small()
    model.norm.register_forward_hook(lambda *_: None)
    names = [line.op for line in vit_fast.explain(model) if line.name == "blocks.2.attn"]
    assert names == ["ln_linear", "attention_qkv", "linear_residual"]


def test_explain_gives_the_reason():
    model = small(attn_drop_rate=0.1).train()
    model.blocks[1].mlp.fc1.register_forward_hook(lambda *_: None)
    reasons = {(line.name, line.op): line.reason for line in vit_fast.explain(model)}
    assert reasons["blocks.0.attn", "attention"] == "attn.attn_drop is active"
    assert reasons["blocks.1.mlp", "mlp"] == "mlp.fc1 has a hook"
    with vit_fast.use_backend("torch"):
        assert vit_fast.explain(model.eval())[0].reason == "use_backend('torch')"
    with vit_fast.use_backend("triton"):
        line = vit_fast.explain(model)[0]
    if not backend.interpreting():
        assert line.backend == "none"
        assert "raises RuntimeError: use_backend('triton') got a tensor on cpu" in line.reason
    with pytest.raises(ValueError, match="takes a VisionTransformer"):
        vit_fast.explain(nn.Linear(2, 2))
    pooled = small(class_token=False, global_pool="map")
    pooled.patch_embed, pooled.attn_pool.mlp = nn.Identity(), nn.Identity()
    reasons = {line.name: line.reason for line in vit_fast.explain(pooled)}
    assert reasons["patch_embed"] == "patch_embed is a Identity"
    assert reasons["attn_pool.mlp"] == "mlp is a Identity"
    assert vit_fast.explain(nn.Sequential(model))[0].name == "0.patch_embed"
    assert "head width 8: the kernels take 16" in vit_fast.explain(small(num_heads=4))[2].reason


@pytest.mark.interpret
def test_explain_and_maps_on_the_kernels():
    model = small()
    images = pictures(dtype=torch.float32)
    maps = model.attention_maps(images)
    with vit_fast.use_backend("triton"):
        assert {line.backend for line in vit_fast.explain(model)} == {"triton"}
        assert relative_error(model.attention_maps(images), maps) < 1e-5
        with pytest.raises(ValueError, match="head width: got 8"):
            small(num_heads=4)(images)
        line = vit_fast.explain(small(num_heads=4))[2]
        assert line.backend == "none"
        assert "raises ValueError: attention_qkv: head width 8: the kernels take 16" in line.reason
        line = vit_fast.explain(small(dtype=torch.float64))[0]
        assert line.backend == "none"
        assert "raises TypeError: patch_embed: the kernels take float32, float16 and bfloat16" in line.reason
        # What no kernel does, PyTorch does, and the draws stay those of the seed.
        dropping = small(attn_drop_rate=0.2, drop_path_rate=0.5).train()
        torch.manual_seed(1)
        logits = dropping(images)
    torch.manual_seed(1)
    assert relative_error(logits.detach(), dropping(images).detach()) < 1e-5


# --- compile, export, copies


@pytest.mark.parametrize("training", [True, False])
def test_compiles_into_one_graph(training):
    model = small(drop_path_rate=0.2, init_values=0.1, qk_norm=True, global_pool="map").train(training)
    images = pictures(dtype=torch.float32)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.manual_seed(1)
    logits = compiled(images)
    torch.manual_seed(1)
    assert relative_error(logits.detach(), model(images).detach()) < 1e-5
    logits.sum().backward()
    assert model.patch_embed.proj.weight.grad is not None


@pytest.mark.interpret
def test_a_compiled_model_keeps_its_kernels():
    """torch 2.11 says that it exports while it compiles: a choice that believed it would leave the kernels out."""
    model = small().eval()
    images, found = pictures(dtype=torch.float32), set()

    def keep(graph, example_inputs):
        found.update(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    with vit_fast.use_backend("triton"), torch.no_grad():
        logits = torch.compile(model, fullgraph=True, backend=keep)(images)
    assert relative_error(logits, model(images).detach()) < 1e-5
    for op in ("patch_embed", "block"):
        assert any(f"vit_fast.{op}" in target for target in found), (op, found)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("dynamic", [False, True])
def test_exports_with_free_batch_and_height(dynamic, strict):
    model = small(dynamic_img_size=dynamic, depth=1).eval()
    batch, rows = torch.export.Dim("batch", min=1, max=64), torch.export.Dim("rows", min=1, max=16)
    shape = {0: batch, 2: 4 * rows} if dynamic else {0: batch}
    example = pictures(2, torch.float32, (16, 12) if dynamic else (8, 12))
    program = torch.export.export(model, (example,), dynamic_shapes=(shape,), strict=strict)
    calls = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert all(call.startswith("aten.") or call.startswith("<built-in function") for call in calls), calls
    images = pictures(5, torch.float32, (28, 12) if dynamic else (8, 12))
    assert relative_error(program.module()(images), model(images)) < 1e-5


def test_copies_and_pickles():
    model = small(drop_path_rate=0.1, init_values=0.1, global_pool="map", norm_layer=nn.LayerNorm)
    images = pictures(dtype=torch.float32)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for twin in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(buffer, weights_only=False),
    ):
        assert torch.equal(twin.eval()(images), model.eval()(images))


def test_functional_call_reads_the_given_parameters():
    model = small()
    other = {name: tensor + 0.1 for name, tensor in model.named_parameters()}
    images = pictures(dtype=torch.float32)
    twin = copy.deepcopy(model)
    twin.load_state_dict(other)
    assert torch.equal(torch.func.functional_call(model, other, (images,)), twin(images))


# --- maps


@pytest.mark.parametrize("options", [{}, {"qk_norm": True, "reg_tokens": 2}], ids=str)
def test_attention_maps_are_those_of_the_reference(options):
    model = small(**options).double()
    images = pictures()
    maps = model.attention_maps(images)
    tokens = 6 + model.num_prefix_tokens
    assert maps.shape == (3, 2, 2, tokens, tokens)
    assert maps.dtype == torch.float64  # fp32 for every narrower model
    assert (maps.sum(-1) - 1).abs().max() < 1e-6
    truth, x = [], model._embed(images)
    for block in model.blocks:
        q, k, _ = block.attn.queries_keys_values(block.norm1(x))
        truth.append(reference.attention_probabilities(q.transpose(1, 2), k.transpose(1, 2)))
        x = block(x)
    truth = torch.stack(truth)
    assert relative_error(maps, truth) < 1e-12
    assert torch.equal(model.attention_maps(images, layers=[-1, 0]), maps[[2, 0]])
    assert close(model.attention_maps(images, layers=2, queries=torch.tensor([0])), maps[1:, :, :, :1])
    rollout = model.attention_rollout(images)
    assert relative_error(rollout, reference.rollout(truth)) < 1e-12
    assert (rollout.sum(-1) - 1).abs().max() < 1e-12
    grid = model.rollout_map(images)
    assert grid.shape == (2, 2, 3)
    assert torch.equal(grid.flatten(1), rollout[:, 0, model.num_prefix_tokens :])
    assert model.bfloat16().attention_maps(images.bfloat16()).dtype == torch.float32


def test_maps_look_and_do_not_touch():
    model = small(class_token=False, global_pool="avg", drop_path_rate=0.9, attn_drop_rate=0.5).train()
    model.blocks[0].eval()
    images = pictures(dtype=torch.float32)
    once, again = model.rollout_map(images), model.rollout_map(images)
    assert torch.equal(once, again)
    assert not once.requires_grad
    assert model.training
    assert not model.blocks[0].training
    assert model.blocks[1].training
    flow = model.attention_rollout(images)
    assert torch.equal(once.flatten(1), flow.mean(dim=1))
    with pytest.raises(ValueError, match="takes -3 to 2"):
        model.attention_maps(images, layers=[3])


def test_maps_of_a_wrapped_layer():
    """LoRA round qkv changes the map: the wrapper is called."""
    model = small()
    images = pictures(dtype=torch.float32)
    plain = model.attention_maps(images, layers=[0])
    _wrap(model, "blocks.0.attn.qkv")
    assert not torch.allclose(model.attention_maps(images, layers=[0]), plain)


def test_predict_gives_probabilities(tmp_path):
    image = pytest.importorskip("PIL.Image")
    model = vit_fast.create_model("test_vit", num_classes=4, img_size=32).train()
    pixels = torch.randint(0, 256, (2, 40, 50, 3), dtype=torch.uint8)
    probabilities = model.predict(pixels)
    assert probabilities.shape == (2, 4)
    assert probabilities.dtype == torch.float32
    assert (probabilities.sum(-1) - 1).abs().max() < 1e-6
    assert model.training
    picture = image.fromarray(pixels[0].numpy())
    picture.save(tmp_path / "one.png")
    one = model.predict(picture)
    assert torch.equal(model.predict(tmp_path / "one.png"), one)
    assert torch.allclose(model.predict([picture, str(tmp_path / "one.png")]), one.expand(2, -1), atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        assert model.predict(picture).dtype == torch.float32
    model.bfloat16()
    assert model.predict(picture).dtype == torch.float32
    with pytest.raises(ValueError, match="no logits"):
        vit_fast.create_model("test_vit", num_classes=0).predict(pixels)


# --- bad input


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (torch.zeros(3, 8, 12), ValueError, r"got shape \[3, 8, 12\], takes \[B, 3, rows, columns\]"),
        (torch.zeros(1, 1, 8, 12), ValueError, "got 1 channels, takes 3"),
        (torch.zeros(1, 3, 12, 8), ValueError, "got 12 x 8, takes 8 x 12"),
        (torch.zeros(1, 3, 8, 12, dtype=torch.int64), TypeError, "int64"),
        (torch.zeros(1, 3, 8, 12, dtype=torch.float64), TypeError, "float64"),
        (torch.zeros(1, 3, 8, 12, device="meta"), ValueError, "meta"),
        ([[1.0]], TypeError, "got list, takes a tensor"),
    ],
)
def test_bad_images_are_named(images, error, message):
    with pytest.raises(error, match=message):
        small()(images)


def test_bad_images_for_any_size():
    with pytest.raises(ValueError, match="got 9 x 12, takes multiples of the patch, 4 x 4"):
        small(dynamic_img_size=True)(pictures(dtype=torch.float32, size=(9, 12)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"embed_dim": 30, "num_heads": 4}, "num_heads: got 4, takes a divisor of embed_dim, 30"),
        ({"global_pool": "prr"}, "global_pool: got 'prr', takes one of '', 'token'"),
        ({"class_token": False}, "takes another pool or a class token"),
        ({"pos_embed": "rope"}, "pos_embed: got 'rope'"),
        ({"act_layer": nn.SiLU}, "act_layer: got .*SiLU.*, takes 'gelu', 'gelu_tanh', 'quick_gelu'"),
        ({"act_layer": "relu"}, "act_layer: got 'relu'"),
        ({"norm_layer": nn.RMSNorm}, "norm_layer: got .*RMSNorm.*, takes 'layernorm'"),
        ({"norm_layer": "rmsnorm"}, "norm_layer: got 'rmsnorm'"),
        ({"block_fn": nn.Linear}, "block_fn: got 'Linear', takes Block"),
        ({"mlp_layer": timm.layers.SwiGLU}, "mlp_layer: got 'SwiGLU', takes Mlp"),
        ({"attn_layer": "diff"}, "attn_layer: got 'diff', takes Attention"),
        ({"embed_layer": nn.Conv2d}, "embed_layer: got 'Conv2d', takes PatchEmbed"),
        ({"weight_init": "he"}, "weight_init: got 'he'"),
        ({"img_size": 2}, "takes at least one patch"),
        ({"patch_size": 0}, "patch_size: got 0"),
        ({"depth": -1}, "depth: got -1"),
        ({"mlp_ratio": -1}, "mlp_ratio: got -1, takes"),
        ({"mlp_ratio": 0}, "mlp_ratio: got 0, takes"),
        ({"drop_path_rate": 1.5}, "drop_path_rate: got 1.5, takes 0 or more and less than 1"),
        *(({rate: -0.1}, f"{rate}: got -0.1, takes 0 or more") for rate in RATES),
        ({"init_values": math.nan}, "init_values: got nan, takes a finite number"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        vit_fast.VisionTransformer(**{**SMALL, **options})


@pytest.mark.parametrize(
    ("layer", "eps"),
    [(None, 1e-6), (nn.LayerNorm, 1e-5), ("layernorm", 1e-6), (timm.layers.LayerNorm, 1e-6)],
)
def test_layers_by_class_and_name(layer, eps):
    model = vit_fast.VisionTransformer(
        **{**SMALL, "norm_layer": layer},
        act_layer=timm.layers.activations.QuickGELU,
        block_fn=timm.models.vision_transformer.Block,
        mlp_layer=timm.layers.Mlp,
        attn_layer="attn",
    )
    assert model.norm.eps == model.blocks[0].norm1.eps == eps
    assert type(model.blocks[0].mlp.act) is layers.QuickGELU


@pytest.mark.parametrize(
    "options",
    [{}, {"global_pool": "map"}, {"mlp_layer": "swiglu", "act_layer": "silu", "scale_attn_norm": True}],
    ids=str,
)
def test_every_norm_has_its_own_eps(options):
    """As in a model whose modules are called one by one."""
    model, images = small(**options, dtype=torch.float64), pictures()
    for index, norm in enumerate(module for module in model.modules() if isinstance(module, nn.LayerNorm)):
        norm.eps = 0.1 * (index + 1)
    logits = model(images)
    for _, module in list(model.named_modules())[1:]:
        module.register_forward_hook(lambda *_: None)
    assert close(logits, model(images))


def test_an_empty_batch_gives_an_empty_answer():
    for options in ({}, {"global_pool": "map"}, {"qk_norm": True}):
        model = small(**options)
        assert model(pictures(0, torch.float32)).shape == (0, 5)
    assert model.attention_rollout(pictures(0, torch.float32)).shape == (0, 7, 7)


def test_nan_in_one_picture_harms_no_other():
    model = small().eval()
    images = pictures(3, torch.float32)
    clean = model(images)
    images[1, 0, 0, 0] = math.nan
    logits = model(images)
    assert torch.isnan(logits[1]).all()
    assert torch.equal(logits[[0, 2]], clean[[0, 2]])


def test_import_loads_nothing_heavy():
    script = "import sys, vit_fast; print(*[m for m in ('triton', 'timm', 'PIL', 'torchvision') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == ""
