"""accelerate: somebody else's models on the fused ops: the cells of docs/matrix.md, the report, what must not fit."""

import collections
import copy
import functools
import gc
import importlib
import json
import logging
import pickle
import subprocess
import sys
import types

import open_clip
import pytest
import timm
import torch
import torchvision
import transformers as hf
from torch import nn
from torch.nn.utils import parametrizations, prune, weight_norm
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

import vit_fast
from tests import matrix
from tests.conftest import INTERPRETING
from tests.error_rule import relative_error
from tests.originals import OriginalVisionTransformer
from tests.small_runs import drawn
from vit_fast import ops
from vit_fast.foreign import block as foreign_block
from vit_fast.foreign.block import Fused

# One a library in every run of the tests, two where there are kinds that differ; the others are slow.
ALWAYS = {
    "vit_tiny_patch16_224",
    "vit_small_patch14_reg4_dinov2",
    "swin_tiny_patch4_window7_224",
    "ViTForImageClassification",
    "SwinForImageClassification",
    "vit_small_patch16_dinov3",
    "DINOv3ViTModel, SwiGLU",
    "Dinov2Model, SwiGLU",
    "CLIPVisionModel",
    "vit_b_16",
    "swin_t",
    "ViT, LayerScale",
    "TransformerEncoder, F.gelu",
    "DINO",
    "DINOv2, SwiGLU",
}
MODELS = [
    pytest.param(*one, id="-".join(one), marks=() if one[1] in ALWAYS else pytest.mark.slow) for one in matrix.NAMES
]


@pytest.mark.parametrize("what", matrix.CELLS)
@pytest.mark.parametrize(("library", "name"), MODELS)
def test_cell(library, name, what):
    matrix.run_cell(library, name, what)


@pytest.mark.parametrize(
    "models",
    [
        pytest.param([one for one in matrix.NAMES if one[1] in ALWAYS], id="some"),
        pytest.param(matrix.NAMES, id="all", marks=pytest.mark.slow),
    ],
)
def test_two_processes(models):
    matrix.run_parallel([(*one, how) for one in models for how in matrix.PARALLEL])


def test_the_page_is_of_these_models_and_cells():
    def without_versions(text: str) -> list[str]:
        return [line for line in text.splitlines() if not line.startswith("torch ")]

    assert without_versions(matrix.PAGE.read_text()) == without_versions(matrix.page())
    assert len(matrix.NAMES) >= 40


@pytest.mark.parametrize("cell", ["forward", "gradients", "training step", "hooks", "autocast"])
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_giant_patch14_reg4_dinov2"])
def test_a_cell_can_fail(monkeypatch, name, cell):
    """What computes something else, by one part in a thousand (in bf16 by one in five), is seen."""
    mlp, scale = foreign_block._mlp, 1.2 if cell == "autocast" else 1.001
    monkeypatch.setattr(foreign_block, "_is_whole", lambda *_: False)
    monkeypatch.setattr(foreign_block, "_mlp", lambda x, half: x + scale * (mlp(x, half) - x))
    with pytest.raises(AssertionError):
        matrix.run_cell("timm", name, cell)


@pytest.mark.parametrize("name", ["ViTModel", "Dinov2Model, SwiGLU", "CLIPVisionModel", "a key without a bias"])
def test_weights_joined_as_on_a_gpu(monkeypatch, name):
    """Three weights of queries, keys and values, or a gate's two, as one product."""
    monkeypatch.setattr(foreign_block, "_joins", lambda *_: True)
    if name == "a key without a bias":
        model = matrix.build("transformers", "ViTModel")
        for layer in model.layers:
            layer.attention.k_proj.bias = None
    else:
        model = matrix.build("transformers", name)
    inputs = matrix.inputs_of(model)
    for cell in ("forward", "gradients", "training step", "autocast"):
        matrix.CELLS[cell](model, inputs)


# ---- in the interpreter


SMALLER = {**matrix.SIZES, "num_hidden_layers": 1, "patch_size": 16}
INTERPRETED = {
    "timm": lambda: timm.create_model(
        "vit_small_patch14_reg4_dinov2", **{**matrix.TINY, "depth": 1, "patch_size": 16, "num_classes": 0}
    ),
    "transformers": lambda: hf.ViTModel(hf.ViTConfig(**SMALLER), add_pooling_layer=False),
    "transformers, SwiGLU": lambda: hf.Dinov2Model(hf.Dinov2Config(**SMALLER, use_swiglu_ffn=True)),
    "timm, DINOv3": lambda: timm.create_model(
        "vit_small_plus_patch16_dinov3", **{**matrix.TINY, "depth": 1, "patch_size": 16}
    ),
    "timm, EVA-02": lambda: timm.create_model("eva02_tiny_patch14_224", **{**matrix.TINY, "depth": 1}),
    "transformers, DINOv3": lambda: hf.DINOv3ViTModel(hf.DINOv3ViTConfig(**SMALLER, num_register_tokens=1)),
    "torchvision": lambda: torchvision.models.VisionTransformer(32, 16, 1, 3, 48, 96, num_classes=5),
    "open_clip": lambda: matrix.open_clip_model(quick_gelu=True, layers=1, patch_size=16).visual,
    "torch.nn": lambda: nn.TransformerEncoderLayer(48, 3, 96, 0.0, "gelu", norm_first=True, batch_first=True),
    "original": lambda: OriginalVisionTransformer("dino", depth=1, patch_size=16),
}


@pytest.mark.interpret
@pytest.mark.skipif(not INTERPRETING, reason="runs in Triton's interpreter")
@pytest.mark.parametrize("name", INTERPRETED)
def test_on_the_kernels(name):
    model = drawn(INTERPRETED[name]())
    x = torch.randn(2, 5, 48) if name == "torch.nn" else torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        upstream = torch.randn(matrix.flat(model(x)).shape)

    def output_and_gradients(one: nn.Module) -> tuple[torch.Tensor, dict]:
        output = matrix.flat(one(x))
        output.backward(upstream)
        return output.detach(), {key: p.grad for key, p in one.named_parameters() if p.grad is not None}

    fast = matrix.accelerated(model)
    expected, their_gradients = output_and_gradients(model)
    with vit_fast.use_backend("triton"):
        output, our_gradients = output_and_gradients(fast)
    assert relative_error(output, expected) <= matrix.OUTPUT
    matrix.assert_equal_gradients(our_gradients, their_gradients)


# ---- the report


def _timm(**more) -> nn.Module:
    return drawn(timm.create_model("vit_tiny_patch16_224", **{**matrix.TINY, **more}))


def _vit(**more) -> nn.Module:
    return drawn(hf.ViTModel(hf.ViTConfig(**matrix.SIZES, **more)))


def _ours() -> nn.Module:
    return drawn(vit_fast.create_model("vit_tiny_patch16_224", **matrix.TINY))


def _lines(report) -> dict:
    return {line.name: line for line in report}


def test_report():
    report = vit_fast.accelerate(_timm())
    assert [line.name for line in report] == ["patch_embed.proj", "blocks.0", "blocks.1"]
    assert [line.op for line in report] == ["patch_embed", "block", "block"]
    assert all(line.replaced and not line.reason and 0 < line.error < 1e-6 for line in report)
    assert report[1].kind == "timm Block"
    assert report.verification == "3 verified against fp64, forward"
    text = str(report).splitlines()
    assert text[2].split() == [
        "blocks.0",
        "…",
        "blocks.1",
        "timm",
        "Block",
        "block",
        f"{max(report[1].error, report[2].error):.0e}",
    ]
    assert text[-1] == "3 of 3 modules replaced; 3 verified against fp64, forward"
    found = json.loads(report.to_json())
    assert found["verification"] == report.verification
    assert [one["name"] for one in found["modules"]] == [line.name for line in report]
    assert found["modules"][0]["replaced"] is True


def test_training_is_verified_backwards():
    assert vit_fast.accelerate(_timm().train()).verification.endswith("forward and backward")


def test_a_second_call_changes_nothing():
    model = _timm()
    first = vit_fast.accelerate(model)
    before = [(id(module), type(module)) for module in model.modules()]
    second = vit_fast.accelerate(model)
    assert [(id(module), type(module)) for module in model.modules()] == before
    assert [line[:5] for line in second] == [line[:5] for line in first]
    assert vit_fast.restore(model) == 3
    assert vit_fast.restore(model) == 0


@pytest.mark.parametrize("training", [False, True])
def test_what_is_wrong_goes_back(monkeypatch, training):
    """An op whose output, or whose gradient alone, is a little wrong: what it would run keeps its code."""

    class Shifted(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x if training else x * 1.0001

        @staticmethod
        def backward(ctx, dy):
            return dy * 1.0001

    block = ops.block
    monkeypatch.setattr(ops, "block", lambda x, *rest: Shifted.apply(block(x, *rest)))
    model = _timm().train(training)
    expected = [type(module) for module in model.blocks]
    lines = _lines(vit_fast.accelerate(model))
    assert lines["patch_embed.proj"].replaced
    assert [type(module) for module in model.blocks] == expected
    for name in ("blocks.0", "blocks.1"):
        assert not lines[name].replaced
        what = "gradients" if training else "output"
        assert f"its {what} is further from fp64 than twice the original's" in lines[name].reason


def test_a_model_that_cannot_run_so_goes_back(monkeypatch):
    """The parts are right, but what stands between them does not take what they return."""

    class Picky(nn.Module):
        def forward(self, x):
            assert type(model.blocks[0]).__module__.startswith("timm"), "somebody else's block"
            return x

    model = _timm()
    model.norm_pre = Picky()
    lines = _lines(vit_fast.accelerate(model))
    assert not any(line.replaced for line in lines.values())
    assert "the model as a whole raised AssertionError: somebody else's block" in lines["blocks.0"].reason
    assert not any(isinstance(module, Fused) for module in model.modules())


def test_a_model_that_cannot_run_with_its_convolution_keeps_its_own():
    """What stands behind it takes what it returns for granted; the blocks are on the ops all the same."""

    class Picky(nn.Module):
        def forward(self, x):
            assert type(model.patch_embed.proj) is nn.Conv2d, "somebody else's convolution"
            return x

    model = _timm()
    model.norm_pre = Picky()
    report = vit_fast.accelerate(model, example=torch.randn(1, 3, 32, 32))
    assert [line.op for line in report] == ["", "block", "block"]
    assert "the model as a whole raised AssertionError: somebody else's convolution" in report[0].reason
    model(torch.randn(1, 3, 32, 32))


@pytest.mark.parametrize("given_as", ["tensor", "tuple", "list", "dict", "mapping"])
def test_example(given_as):
    model, images = _timm(), torch.randn(1, 3, 32, 32)
    seen = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((*args, *kwargs.values())), with_kwargs=True
    )
    example = {
        "tensor": images,
        "tuple": (images,),
        "list": [images],
        "dict": {"x": images},
        "mapping": collections.UserDict(x=images),  # as a processor of transformers returns
    }[given_as]
    assert vit_fast.accelerate(model, example=example).verification.startswith("3 verified")
    assert all(one[0] is images for one in seen)
    assert len(seen) == 2  # before, and after


def test_an_example_of_another_kind():
    with pytest.raises(TypeError, match="example: got str, takes a tensor, a tuple or list of arguments, or a mapping"):
        vit_fast.accelerate(_timm(), example="image.jpg")


def test_verification_leaves_no_trace():
    """Neither in the generator, nor in modes, gradients, hooks or buffers."""
    model = matrix.build("timm", "vit_tiny_r_s16_p8_224").train()
    model.blocks[0].eval()
    state = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    generator = torch.get_rng_state()
    vit_fast.accelerate(model)
    assert torch.equal(torch.get_rng_state(), generator)
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


# ---- what does not fit


def test_the_report_can_be_kept_in_a_model():
    model = _timm()
    model.report = vit_fast.accelerate(model)
    for copied in (copy.deepcopy(model).report, pickle.loads(pickle.dumps(model)).report):
        assert copied == model.report
        assert str(copied) == str(model.report)


def test_under_a_default_device():
    model = _timm().train()
    with torch.device("meta"):
        assert _lines(vit_fast.accelerate(model))["blocks.0"].error is not None


def test_an_example_without_images_shows_nothing():
    report = vit_fast.accelerate(_timm(), example=torch.zeros(0, 3, 32, 32))
    assert all(line.error > 0 for line in report)
    assert "on random tokens" in report.verification


def test_weights_that_are_not_finite():
    model = _timm()
    with torch.no_grad():
        model.blocks[0].mlp.fc1.weight.fill_(torch.nan)
    line = _lines(vit_fast.accelerate(model))["blocks.0"]
    assert not line.replaced
    assert "not finite in its own code either" in line.reason


def test_numbers_that_overflow():
    model = _timm().half()
    with torch.no_grad():
        model.blocks[0].mlp.fc2.weight.fill_(6e4)
    assert not _lines(vit_fast.accelerate(model))["blocks.0"].replaced


def test_autocast_keeps_a_half_of_two_dtypes_on_the_ops():
    model = _timm()
    vit_fast.accelerate(model)
    model.blocks[0].attn.qkv.bfloat16()
    assert model.blocks[0].attention_aside() == "attn.qkv holds torch.bfloat16, what stands before it torch.float32"
    with torch.autocast("cpu", torch.bfloat16):
        assert model.blocks[0].attention_aside() == ""


def test_a_model_of_ours_runs_on_the_ops_already(caplog):
    with caplog.at_level(logging.WARNING, "vit_fast"):
        vit_fast.accelerate(_ours())
    assert "was replaced: it runs on the ops already" in caplog.text


def test_a_class_of_the_same_name_is_told_by_its_library():
    model = _timm()
    linear = model.blocks[0].attn.qkv
    linear.__class__ = type("Linear", (nn.Linear,), {"__module__": "wrappers.lora"})
    vit_fast.accelerate(model, verify=False)
    assert model.blocks[0].attention_aside() == "attn.qkv is a wrappers Linear"


@pytest.mark.parametrize("more", [{"kernel_size": 3, "padding": 1}, {"kernel_size": 2, "stride": 2}])
def test_only_convolutions_that_cut_patches_are_told_of(more):
    """Code behind another whose kernel is its stride may want its output contiguous, which a kernel's is not."""
    model = _timm()
    model.neck = nn.Conv2d(48, 48, **more)
    assert [line.name for line in vit_fast.accelerate(model)] == ["patch_embed.proj", "blocks.0", "blocks.1"]


def test_nothing_that_fits(caplog):
    model = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.Linear(3, 3))
    with caplog.at_level(logging.WARNING, "vit_fast"):
        report = vit_fast.accelerate(model)
    assert list(report) == []
    assert "nothing of the Sequential was replaced: no module of a library that it knows" in caplog.text
    assert type(model[0]) is nn.Conv2d
    with pytest.raises(TypeError, match=r"model: got str, takes an nn\.Module"):
        vit_fast.accelerate("vit_tiny_patch16_224")


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda: nn.TransformerEncoderLayer(48, 3, 96, batch_first=True), "norm_first is False"),
        (lambda: nn.TransformerEncoderLayer(48, 3, 96, norm_first=True), "batch_first is False"),
        (lambda: _timm().double(), "its parameters are float64"),
        (lambda: _mixed(), "its parameters are bfloat16, float32"),
        (lambda: hf.CLIPTextModel(hf.CLIPTextConfig(**matrix.TEXT)), "a causal tower"),
    ],
)
def test_what_stays(build, reason, caplog):
    model = build()
    before = [type(module) for module in model.modules()]
    with caplog.at_level(logging.WARNING, "vit_fast"):
        report = vit_fast.accelerate(model)
    assert reason in caplog.text
    assert [type(module) for module in model.modules()] == before
    assert all(reason in line.reason for line in report if not line.replaced)


def _mixed() -> nn.Module:
    model = _timm()
    for block in model.blocks:
        block.norm1.bfloat16()
    return model


def test_every_model_is_verified_whole():
    """With what accelerate makes up for itself, and forwards that want more than tokens."""
    for library, name in [*matrix.NAMES[:3], ("transformers", "Siglip2VisionModel"), ("transformers", "SiglipModel")]:
        report = vit_fast.accelerate(matrix.build(library, name))
        assert all(line.replaced and line.error is not None for line in report), str(report)
        assert "failed" not in report.verification


def test_images_of_another_number_of_channels():
    report = vit_fast.accelerate(_timm(in_chans=1))
    assert report.verification == "3 verified against fp64, forward"


def test_a_model_that_does_not_run_on_its_own_is_compared_part_by_part():
    model = _timm()
    model.patch_embed.img_size = (32, 24)  # as somebody's config may be wrong
    assert vit_fast.accelerate(model).verification.endswith("3 of them on random tokens: no run came by them")


def _more_parameters(model: nn.Module) -> str:
    for block in model.blocks:
        block.attn.q_bias = nn.Parameter(torch.zeros(48))
    return "it holds tensors that the block of DINO and DINOv2 does not"


def _another_scale(model: nn.Module) -> str:
    for block in model.blocks:
        block.attn.scale = 0.3
    return "its attention has another scale"


def _another_part(model: nn.Module) -> str:
    for block in model.blocks:
        block.more = nn.Identity()
    return "its parts are not those of DINO's or DINOv2's block"


@pytest.mark.parametrize("change", [_more_parameters, _another_scale, _another_part])
@pytest.mark.parametrize("training", [False, True])
def test_a_block_of_that_name_that_is_none(change, training, caplog):
    """As BEiT's is, whose further parameters start at zero: no comparison of a fresh model would see them."""
    model = drawn(OriginalVisionTransformer("dino")).train(training)
    reason = change(model)
    assert not any(line.replaced for line in vit_fast.accelerate(model))
    assert reason in caplog.text


def test_a_forward_that_somebody_set():
    model = _timm()
    block = model.blocks[0]
    block.forward = types.MethodType(lambda self, x, **kwargs: type(self).forward(self, x) * 2, block)
    lines = _lines(vit_fast.accelerate(model))
    assert lines["blocks.0"].reason == "somebody has given it, or its class, another forward"
    assert lines["blocks.1"].replaced


@pytest.mark.parametrize(
    ("attention", "build", "ops"),
    [
        (
            "timm.layers.Attention",
            'timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, embed_dim=48)',
            ["patch_embed", "mlp", "mlp"],
        ),
        (
            "transformers.models.vit.modeling_vit.ViTAttention",
            "transformers.ViTModel(transformers.ViTConfig(**SIZES))",
            ["patch_embed", "mlp", "", "mlp", ""],
        ),
    ],
    ids=["timm", "transformers"],
)
def test_a_class_that_somebody_patched(attention, build, ops):
    """Before accelerate has met it: another process, since forwards are noted at the first look."""
    code = f"""
import functools
from tests.matrix import SIZES
import timm, torch, transformers, vit_fast
calls, forward = [], {attention}.forward
@functools.wraps(forward)
def patched(self, *args, **kwargs):
    calls.append(1)
    return forward(self, *args, **kwargs)
{attention}.forward = patched
model = {build}.eval()
report = vit_fast.accelerate(model, verify=False)
assert [line.op for line in report] == {ops}, str(report)
model(torch.randn(1, 3, 32, 32))
assert len(calls) == 2
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def doubled(function):
    @functools.wraps(function)
    def call(*args, **kwargs):
        output = function(*args, **kwargs)
        return (2 * output[0], *output[1:]) if isinstance(output, tuple) else 2 * output

    return call


def hold_to_a_patch(monkeypatch, original, fast, x, kind: type, method: str, counting) -> None:
    """Assert that an accelerated model, a compiled one too, does what its original does while a method of a class is
    patched, and runs on the ops, whose calls `counting` counts, when it is not."""
    torch._dynamo.reset()
    compiled = torch.compile(fast, fullgraph=True, backend="eager")
    with torch.no_grad():
        before = matrix.flat(compiled(x))
        with monkeypatch.context() as patch:
            patch.setattr(kind, method, doubled(getattr(kind, method)))
            expected = matrix.flat(original(x))
            assert relative_error(expected, before) > 1e-3
            for run in (fast, compiled):
                assert relative_error(matrix.flat(run(x)), expected) < 1e-5
        calls = counting(monkeypatch)
        for run in (fast, compiled):
            assert relative_error(matrix.flat(run(x)), before) < 1e-5
        assert calls


@pytest.mark.parametrize(
    ("library", "name", "patched"),
    [
        ("timm", "vit_tiny_patch16_224", "timm.models.vision_transformer.Block.forward"),
        ("transformers", "ViTModel", "transformers.models.vit.modeling_vit.ViTLayer.forward"),
        ("transformers", "ViTModel", "transformers.models.vit.modeling_vit.ViTAttention.forward"),
        ("torchvision", "vit_b_16", "torchvision.models.vision_transformer.EncoderBlock.forward"),
        ("torchvision", "vit_b_16", "torch.nn.Conv2d.forward"),
        ("open_clip", "ViT-B-16", "open_clip.transformer.ResidualAttentionBlock.forward"),
        ("open_clip", "ViT-B-16", "open_clip.transformer.ResidualAttentionBlock.attention"),
        ("torch.nn", "TransformerEncoder, F.gelu", "torch.nn.TransformerEncoderLayer.forward"),
        ("torch.nn", "TransformerEncoder, F.gelu", "torch.nn.TransformerEncoderLayer._sa_block"),
        ("torch.nn", "TransformerEncoder, F.gelu", "torch.nn.TransformerEncoderLayer._ff_block"),
    ],
)
def test_a_class_that_somebody_patches_afterwards(monkeypatch, library, name, patched):
    """Every call asks, a compiled one too; and goes back to the ops when the patch does."""
    model = matrix.build(library, name)
    model = model.visual if library == "open_clip" else model
    x = torch.randn(2, 5, 48) if library == "torch.nn" else torch.randn(2, 3, 32, 32)
    original = copy.deepcopy(model)
    vit_fast.accelerate(model, verify=False)
    home, kind, method = patched.rsplit(".", 2)
    hold_to_a_patch(monkeypatch, original, model, x, getattr(importlib.import_module(home), kind), method, _counting)


@pytest.mark.parametrize(
    ("library", "name", "helper", "other"),
    [
        ("open_clip", "ViT-B-16", "attention", "mlp"),
        ("torch.nn", "TransformerEncoder, F.gelu", "_sa_block", "mlp"),
        ("torch.nn", "TransformerEncoder, F.gelu", "_ff_block", "attention"),
    ],
)
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_helper_that_somebody_set(library, name, helper, other, when):
    """A method that the library's forward calls."""
    model = matrix.build(library, name)
    model = model.visual if library == "open_clip" else model
    x = torch.randn(2, 5, 48) if library == "torch.nn" else torch.randn(2, 3, 32, 32)
    original = copy.deepcopy(model)
    if when == "after":
        vit_fast.accelerate(model)
    for one in (model, original):
        block = one.transformer.resblocks[0] if library == "open_clip" else one.layers[0]
        setattr(block, helper, types.MethodType(doubled(getattr(block, helper).__func__), block))
    line = next(line for line in vit_fast.accelerate(model) if "0" in line.name)
    assert (line.op, line.reason) == (other, f"somebody has given it, or its class, another {helper}")
    assert relative_error(model(x), original(x)) < 1e-5


def test_heads_pruned_afterwards():
    model, x = _timm(), torch.randn(2, 3, 32, 32)
    vit_fast.accelerate(model)
    for block in model.blocks:
        attn = block.attn
        attn.qkv, attn.proj = nn.Linear(48, 96), nn.Linear(32, 48)
        attn.num_heads, attn.attn_dim = 2, 32
    ours = model(x)
    vit_fast.restore(model)
    assert relative_error(ours, model(x)) < 1e-5


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"is_causal": True}, "attention is causal"),
        ({"head_dim": 8, "scaling": 8**-0.5}, ""),
        ({"head_dim": 8}, "attention.scaling is changed"),
    ],
)
def test_what_attention_of_transformers_is_told_afterwards(changes, reason):
    model, x = _vit(attn_implementation="sdpa"), torch.randn(2, 3, 32, 32)
    original = copy.deepcopy(model)
    vit_fast.accelerate(model)
    for one in (model, original):
        for layer in one.layers:
            for name, value in changes.items():
                setattr(layer.attention, name, value)
    assert model.layers[0].attention_aside() == reason
    for _ in range(2):
        assert relative_error(matrix.flat(model(x)), matrix.flat(original(x))) < 1e-5
        for layer in model.layers:  # now the attention module itself is called
            layer.attention.register_forward_hook(lambda *_: None)


@pytest.mark.parametrize("known_as", ["mine", "sdpa"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_an_attention_function_that_somebody_registers(monkeypatch, known_as, when):
    model, x = _vit(attn_implementation="sdpa"), torch.randn(2, 3, 32, 32)
    original = copy.deepcopy(model)
    if when == "after":
        vit_fast.accelerate(model)
    if known_as == "mine":
        monkeypatch.setitem(AttentionInterface._global_mapping, "mine", doubled(sdpa_attention_forward))
    else:
        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", doubled(sdpa_attention_forward))
    for one in (model, original):
        one.set_attn_implementation(known_as)
    line = _lines(vit_fast.accelerate(model))["layers.0"]
    assert (line.op, line.reason) == ("mlp", f"attention implementation {known_as!r} is none of transformers' own")
    assert relative_error(matrix.flat(model(x)), matrix.flat(original(x))) < 1e-5


@pytest.mark.parametrize("implementation", ["sdpa", "eager", "flash_attention_2", "vit_fast"])
def test_attention_functions_that_are_known(implementation):
    vit_fast.register_transformers()
    model = _vit()
    model.config._attn_implementation = implementation
    assert _lines(vit_fast.accelerate(model, verify=False))["layers.0"].op == "block"


@pytest.mark.parametrize("name", ["ViTModel", "Dinov2Model", "CLIPVisionModel"])
def test_a_hook_sees_the_call_of_the_library(name):
    model, x = matrix.build("transformers", name), torch.randn(2, 3, 32, 32)
    seen = []
    for one in (copy.deepcopy(model), model):
        if one is model:
            vit_fast.accelerate(one, verify=False)
        attention = next(module for module in one.modules() if type(module).__name__.endswith("Attention"))
        attention.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append((len(args), sorted(kwargs))), with_kwargs=True
        )
        one(x)
    assert seen[0] == seen[1]


def _own_tower() -> nn.Module:
    return nn.Sequential(nn.Linear(48, 48), open_clip.transformer.Transformer(48, 1, 3))


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda: matrix.open_clip_model(layers=1).visual.transformer, ""),
        (lambda: matrix.open_clip_model(layers=1).visual.transformer.resblocks, ""),
        (_own_tower, ""),
        (lambda: open_clip.transformer.TextTransformer(8, 50, 48, 3, 1), "it reads text"),
        (lambda: open_clip.transformer.MultimodalTransformer(48, 1, 3), "it reads text"),
    ],
    ids=["transformer", "resblocks", "own tower", "text", "multimodal"],
)
def test_parts_of_open_clip(build, reason):
    line = next(iter(vit_fast.accelerate(build().eval())))
    assert line.replaced == (not reason)
    assert line.reason.startswith(reason)


def test_a_patch_projection_with_a_weight_of_another_class():
    model = _timm()
    weight = model.patch_embed.proj.weight.detach().as_subclass(_Quantised)
    model.patch_embed.proj._parameters["weight"] = weight
    assert _lines(vit_fast.accelerate(model, verify=False))["patch_embed.proj"].reason == "weight is a _Quantised"


def test_the_report_tells_of_dropout_in_training():
    layer = nn.TransformerEncoderLayer(48, 3, 96, 0.1, "gelu", norm_first=True, batch_first=True).train()
    (line,) = vit_fast.accelerate(layer)
    assert (line.op, line.reason) == ("block", "its own code in training: self_attn.dropout is active")


def test_relu_keeps_its_half():
    layer = nn.TransformerEncoderLayer(48, 3, 96, 0.0, "relu", norm_first=True, batch_first=True).eval()
    x = torch.randn(2, 5, 48)
    expected = layer(x)
    (line,) = vit_fast.accelerate(layer)
    assert (line.op, line.reason) == ("attention", "activation is relu")
    assert relative_error(layer(x), expected) < 1e-6


def test_meta_and_two_devices():
    model = timm.create_model("vit_tiny_patch16_224", **matrix.TINY, device="meta")
    report = vit_fast.accelerate(model)
    assert all(line.replaced for line in report)
    assert report.verification == "not verified: parameters on meta have no values"
    model = _timm()
    model.blocks[1].to("meta")
    assert all(line.replaced for line in vit_fast.accelerate(model))


def test_in_a_compiled_region():
    model = _timm()

    def change(x):
        vit_fast.accelerate(model)
        return x

    with pytest.raises(Exception, match="called in a region that is being compiled"):
        torch.compile(change, fullgraph=True, backend="eager")(torch.ones(1))


def test_under_inference_mode():
    model = _timm().train()
    with torch.inference_mode():
        report = vit_fast.accelerate(model)
    assert report.verification == "3 verified against fp64, forward and backward"
    assert all(line.replaced for line in report)
    model(torch.randn(1, 3, 32, 32)).sum().backward()


def test_a_model_of_ours_is_left_alone():
    model = vit_fast.create_model("vit_tiny_patch16_224", **matrix.TINY)
    before = [type(module) for module in model.modules()]
    assert list(vit_fast.accelerate(model)) == []
    assert [type(module) for module in model.modules()] == before


def test_a_subclass_of_the_users_stays():
    class Mine(type(_timm().blocks[0])):
        def forward(self, x, **kwargs):
            return super().forward(x) * 2

    model = _timm()
    model.blocks[0].__class__ = Mine
    lines = _lines(vit_fast.accelerate(model))
    assert lines["blocks.0"].reason == "it is a Mine, a class of its own"
    assert lines["blocks.1"].replaced


def test_no_library_is_imported():
    code = """
import sys, torch, vit_fast
vit_fast.accelerate(torch.nn.TransformerEncoderLayer(8, 1, 8, activation="gelu", norm_first=True, batch_first=True))
vit_fast.accelerate(torch.nn.Sequential(torch.nn.Linear(2, 2)))
assert not {"timm", "transformers", "torchvision", "open_clip"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- what somebody wrapped


class _Lora(nn.Module):
    """As peft wraps a Linear."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


class _Quantised(torch.Tensor):
    """A weight of a class of its own."""


def _as_lora(parent: nn.Module, name: str) -> str:
    setattr(parent, name, _Lora(getattr(parent, name)))
    return "is a _Lora"


def _as_quantised(parent: nn.Module, name: str) -> str:
    linear = getattr(parent, name)
    weight = linear.weight.detach().as_subclass(_Quantised)
    del linear.weight
    linear.register_parameter("weight", None)
    linear._parameters["weight"] = weight
    return "holds a _Quantised"


def _as_hooked(parent: nn.Module, name: str) -> str:
    getattr(parent, name).register_forward_hook(lambda module, args, output: output * 1.25)
    return "has a hook"


def _as_parametrised(parent: nn.Module, name: str) -> str:
    parametrizations.weight_norm(getattr(parent, name))
    return "is a ParametrizedLinear"


def _as_patched(parent: nn.Module, name: str) -> str:
    linear = getattr(parent, name)
    linear.forward = types.MethodType(lambda self, x: 0.5 * nn.functional.linear(x, self.weight, self.bias), linear)
    return "has a forward of its own"


def _as_buffer(parent: nn.Module, name: str) -> str:
    linear = getattr(parent, name)
    weight = linear.weight.detach()
    del linear.weight
    linear.register_buffer("weight", weight)
    return "has a weight or a bias that is no parameter"


def _without_a_bias(parent: nn.Module, name: str) -> str:
    linear = getattr(parent, name)
    del linear.bias
    linear.bias = None
    return "has a weight or a bias that is no parameter"


WRAPPERS = (_as_lora, _as_quantised, _as_hooked, _as_parametrised, _as_patched, _as_buffer, _without_a_bias)
HALVES = {
    "timm attention": (_timm, lambda m: (m.blocks[0].attn, "qkv"), "blocks.0", "mlp"),
    "timm mlp": (_timm, lambda m: (m.blocks[0].mlp, "fc2"), "blocks.0", "attention"),
    "transformers attention": (_vit, lambda m: (m.layers[0].attention, "v_proj"), "layers.0", "mlp"),
    "transformers mlp": (_vit, lambda m: (m.layers[0].mlp, "fc1"), "layers.0", "attention"),
}


@pytest.mark.parametrize("wrap", WRAPPERS)
@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_wrapped_half_keeps_its_code(wrap, half, when):
    build, place, name, other = HALVES[half]
    model = build()
    original = copy.deepcopy(model)
    torch.manual_seed(3)
    wrap(*place(original))
    if when == "after":
        vit_fast.accelerate(model, verify=False)
    torch.manual_seed(3)
    reason = wrap(*place(model))
    x = torch.randn(2, 3, 32, 32)
    line = _lines(vit_fast.accelerate(model, verify=False))[name]
    assert line.replaced
    assert line.op == other
    assert reason in line.reason
    with torch.no_grad():
        ours, theirs = matrix.flat(model(x)), matrix.flat(original(x))
    assert relative_error(ours, theirs) < 1e-5


def _pruned(parent: nn.Module, name: str) -> nn.Module:
    return prune.l1_unstructured(getattr(parent, name), "weight", 0.3)


def _normed(parent: nn.Module, name: str) -> nn.Module:
    return weight_norm(getattr(parent, name))


def _quantised(parent: nn.Module, name: str) -> nn.Module:
    linear = nn.Sequential(getattr(parent, name))
    (quantised,) = torch.ao.quantization.quantize_dynamic(linear)
    setattr(parent, name, quantised)
    return quantised


@pytest.mark.filterwarnings("ignore")  # two of the three are deprecated
@pytest.mark.parametrize("wrap", [_pruned, _normed, _quantised])
@pytest.mark.parametrize("half", HALVES)
def test_a_wrapped_half_is_no_bar_to_the_comparison_of_the_other(wrap, half):
    """A weight with a history, which deepcopy refuses, and a Linear that takes no fp64."""
    build, place, name, other = HALVES[half]
    model = build().train(wrap is not _quantised)
    wrap(*place(model))
    line = _lines(vit_fast.accelerate(model))[name]
    assert (line.op, line.replaced) == (other, True), line.reason
    assert line.error > 0


@pytest.mark.filterwarnings("ignore")
def test_the_half_that_is_compared_alone_can_fail(monkeypatch):
    build, place, name, _ = HALVES["transformers mlp"]
    model = build()
    _quantised(*place(model))
    attention = foreign_block._attention
    monkeypatch.setattr(foreign_block, "_attention", lambda x, half: 1.0001 * attention(x, half))
    assert "is further from fp64" in _lines(vit_fast.accelerate(model))[name].reason


@pytest.mark.parametrize("kept", ["buffer", "attribute"])
def test_a_layer_scale_that_is_no_parameter(kept):
    """Frozen as a buffer, or kept elsewhere, as FSDP's first version does with what it ignores."""
    model = drawn(timm.create_model("vit_tiny_patch16_224", init_values=0.3, **matrix.TINY))
    for block in model.blocks:
        for scale in (block.ls1, block.ls2):
            gamma = scale.gamma.detach()
            del scale.gamma
            scale.register_buffer("gamma", gamma) if kept == "buffer" else setattr(scale, "gamma", gamma)
    original, x = copy.deepcopy(model), torch.randn(2, 3, 32, 32)
    assert _lines(vit_fast.accelerate(model))["blocks.0"].op == "block"
    assert relative_error(model(x), original(x)) < 1e-5


BUILDS = {"vit_fast": _ours, "timm": _timm, "transformers": _vit}


@pytest.mark.parametrize("library", BUILDS)
def test_a_forward_set_after_the_first_compiled_call(library):
    """torch.compile is to see it; other libraries hook modules so."""
    model, x = BUILDS[library](), torch.randn(2, 3, 32, 32)
    if library != "vit_fast":
        vit_fast.accelerate(model, verify=False)
    block = model.layers[0] if library == "transformers" else model.blocks[0]
    attention = block.attention if library == "transformers" else block.attn
    product = attention.q_proj if library == "transformers" else attention.qkv
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        before = matrix.flat(compiled(x))
        for module in (product, attention, block.mlp.fc1, block.mlp):
            module.forward = functools.partial(_negated, module.forward)
            found, expected = matrix.flat(compiled(x)), matrix.flat(model(x))
            assert relative_error(expected, before) > 1e-3
            assert relative_error(found, expected) < 1e-5
            del module.forward
        if library == "vit_fast":
            for name in ("_pos_embed", "_encode"):
                setattr(model, name, functools.partial(_negated, getattr(model, name)))
                assert relative_error(matrix.flat(compiled(x)), matrix.flat(model(x))) < 1e-5
                delattr(model, name)


def _negated(forward, *args, **kwargs):
    return torch.utils._pytree.tree_map_only(torch.Tensor, torch.neg, forward(*args, **kwargs))


@pytest.mark.parametrize("library", BUILDS)
def test_norms_in_float32_inside_a_model_in_bfloat16(library):
    model = BUILDS[library]()
    if library == "vit_fast":
        original = _timm()
        original.load_state_dict(model.state_dict())
    else:
        original = copy.deepcopy(model)
        vit_fast.accelerate(model)
    for one in (model, original):
        one.bfloat16()
        for module in one.modules():
            if isinstance(module, nn.LayerNorm):
                module.float()
    x = torch.randn(2, 3, 32, 32).bfloat16()
    with torch.no_grad():
        assert relative_error(matrix.flat(model(x)), matrix.flat(original(x))) < 0.02
    block = model.layers[0] if library == "transformers" else model.blocks[0]
    assert "holds torch.bfloat16, what stands before it torch.float32" in block.attention_aside()


def test_both_halves_wrapped_stay():
    model = _timm()
    _as_hooked(model.blocks[0].attn, "proj")
    _as_lora(model.blocks[0].mlp, "fc1")
    line = _lines(vit_fast.accelerate(model))["blocks.0"]
    assert not line.replaced
    assert line.reason == "attn.proj has a hook"


# ---- what a call asks for


def _counting(monkeypatch) -> list[str]:
    """The names of the ops of blocks that run from here on."""
    calls = []

    def counted(name: str, op):
        def call(*args):
            calls.append(name)
            return op(*args)

        return call

    for name in ("block", "attention", "attention_qkv", "mlp"):
        monkeypatch.setattr(ops, name, counted(name, getattr(ops, name)))
    return calls


def test_masks_go_the_librarys_way(monkeypatch):
    model, x = _timm(), torch.randn(2, 3, 32, 32)
    mask = torch.ones(17, 17).tril() == 1
    expected = model(x, attn_mask=mask)
    vit_fast.accelerate(model)
    calls = _counting(monkeypatch)
    assert torch.equal(model(x, attn_mask=mask), expected)
    assert calls == []
    layer = nn.TransformerEncoderLayer(48, 3, 96, 0.0, "gelu", norm_first=True, batch_first=True).eval()
    src, padding = torch.randn(2, 5, 48), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    expected = layer(src, src_key_padding_mask=padding)
    vit_fast.accelerate(layer, verify=False)
    assert torch.equal(layer(src, src_key_padding_mask=padding), expected)
    assert calls == []


def test_dinos_attention_map():
    model = drawn(OriginalVisionTransformer("dino"))
    x = torch.randn(2, 5, 48)
    expected = model.blocks[0](x, return_attention=True)
    vit_fast.accelerate(model)
    assert torch.equal(model.blocks[0](x, return_attention=True), expected)
    nested = drawn(OriginalVisionTransformer("dinov2"))
    expected = nested.blocks[0]([x, x[:1]])
    vit_fast.accelerate(nested)
    assert all(torch.equal(a, b) for a, b in zip(nested.blocks[0]([x, x[:1]]), expected))


def test_attentions_of_transformers(monkeypatch):
    """Asked for, they are right whichever implementation is set; afterwards the fused path is taken as before."""
    model, x = _vit(attn_implementation="sdpa"), torch.randn(2, 3, 32, 32)
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    expected = eager(x, output_attentions=True)
    vit_fast.accelerate(model)
    found = model(x, output_attentions=True, output_hidden_states=True)
    assert len(found.attentions) == 2
    for ours, theirs in zip(found.attentions, expected.attentions):
        assert relative_error(ours, theirs) < 1e-5
    assert len(found.hidden_states) == 3
    assert relative_error(found.last_hidden_state, expected.last_hidden_state) < 1e-5
    calls = _counting(monkeypatch)
    assert not model(x).attentions
    assert calls == ["attention", "mlp"] * 2  # on a CPU three weights are not joined


def test_attention_read_out_of_timm_by_a_hook():
    """The way to timm's attention: no fused one, and a hook on its dropout."""
    model, x = _timm(), torch.randn(2, 3, 32, 32)
    seen = []
    for one in (model, copy.deepcopy(model)):
        if one is not model:
            vit_fast.accelerate(one)
        one.blocks[1].attn.fused_attn = False
        one.blocks[1].attn.attn_drop.register_forward_hook(lambda module, args, output: seen.append(args[0]))
        one(x)
    assert relative_error(seen[1], seen[0]) < 1e-5
    assert seen[1].sum(-1).allclose(torch.ones(1))


def test_dropout_inside_a_block_is_drawn_in_training(monkeypatch):
    model, x = _timm(proj_drop_rate=0.5), torch.randn(2, 3, 32, 32)
    report = vit_fast.accelerate(model)
    assert all(line.op in ("block", "patch_embed") for line in report)  # in evaluation mode
    model.train()
    torch.manual_seed(0)
    ours = model(x)
    vit_fast.restore(model)
    torch.manual_seed(0)
    assert torch.equal(ours, model(x))


def test_gradient_checkpointing():
    model, x = _vit(), torch.randn(2, 3, 32, 32)
    expected = matrix.gradients(model, {"pixel_values": x})
    vit_fast.accelerate(model)
    model.train()
    model.activation_checkpointing_enable()
    matrix.assert_equal_gradients(matrix.gradients(model, {"pixel_values": x}), expected)


def test_explain_tells_of_it():
    model = _timm()
    vit_fast.accelerate(model, verify=False)
    _as_hooked(model.blocks[0].attn, "qkv")
    lines = [(line.name, line.op, line.reason) for line in vit_fast.explain(model)]
    assert ("blocks.0", "mlp", "a tensor on cpu: the kernels run on CUDA and ROCm") in lines
    assert ("blocks.0.attention", "attention", "attn.qkv has a hook") in lines
    assert ("blocks.1", "block", "a tensor on cpu: the kernels run on CUDA and ROCm") in lines


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_torch_fx_traces_what_it_traced_before(library):
    """By symbols, with the library's own code."""
    if library == "timm":
        model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2)
        node = "blocks.1.mlp.fc2"
    else:
        model = torchvision.models.VisionTransformer(32, 8, 2, 2, 32, 64)
        node = "encoder.ln"
    x = torch.randn(2, 3, 32, 32)
    model.eval()
    extractor = torchvision.models.feature_extraction.create_feature_extractor
    expected = extractor(model, [node])(x)[node]
    vit_fast.accelerate(model, verify=False)
    torch.testing.assert_close(extractor(model, [node])(x)[node], expected)


def test_nothing_is_left_behind():
    """After a hundred times to and fro there are no more tensors and classes than after ten."""
    model = _timm()

    def count() -> tuple[int, int]:
        gc.collect()
        objects = gc.get_objects()
        kinds = [type(one) for one in objects]  # isinstance would ask objects that answer with a warning
        return sum(issubclass(kind, torch.Tensor) for kind in kinds), sum(issubclass(kind, type) for kind in kinds)

    for turn in range(100):
        vit_fast.accelerate(model, verify=turn < 3)
        vit_fast.restore(model)
        if turn == 9:
            before = count()
    # Not as many: what tests before this one have left may go meanwhile.
    assert all(now <= then for now, then in zip(count(), before, strict=True)), (before, count())


# ---- what no op computes


def _encoder_layer(**more) -> nn.Module:
    layer = nn.TransformerEncoderLayer(48, 3, 96, 0.0, "gelu", norm_first=True, batch_first=True)
    layer.self_attn = nn.MultiheadAttention(48, 3, batch_first=True, **more)
    return layer


def _gate_behind_its_value() -> nn.Module:
    block = timm.models.vision_transformer.Block(48, 3)
    block.mlp = timm.layers.GluMlp(48, 96, act_layer=nn.SiLU, gate_last=True)
    return block


def _patches_in_groups() -> nn.Module:
    return nn.Sequential(nn.Conv2d(4, 48, 4, 4, groups=2), nn.Flatten(2), _encoder_layer())


def _open_clips_block() -> nn.Module:
    from open_clip.transformer import ResidualAttentionBlock

    return ResidualAttentionBlock(48, 3)


# What builds it, the shape of what it is called with, and whatever else.
NO_OP = {
    "a key of zeros": (lambda: _encoder_layer(add_zero_attn=True), (2, 5, 48), {}),
    "a key that is a bias": (lambda: _encoder_layer(add_bias_kv=True), (2, 5, 48), {}),
    "a gate behind its value": (_gate_behind_its_value, (2, 5, 48), {}),
    "patches cut in groups": (_patches_in_groups, (2, 4, 24, 32), {}),
    "open_clip, a mask": (_open_clips_block, (2, 5, 48), {"attn_mask": torch.ones(5, 5, dtype=torch.bool).triu(1)}),
}


@pytest.mark.parametrize("name", NO_OP)
def test_what_no_op_computes_the_library_does(name):
    """Though nobody compares."""
    build, shape, more = NO_OP[name]
    module, x = drawn(build()), torch.randn(shape)
    expected = module(x, **more)
    vit_fast.accelerate(module, verify=False)
    torch.testing.assert_close(module(x, **more), expected)


@pytest.mark.parametrize(
    "name", ["ViTForImageClassification", "Dinov2ForImageClassification", "SwinForImageClassification"]
)
def test_a_step_as_transformers_trainer_calls_it(monkeypatch, name):
    """With the number of the batch's labels, which is the loss's and reaches every layer."""
    model = matrix.build("transformers", name)
    inputs = {"pixel_values": torch.randn(2, 3, 32, 32), "labels": torch.tensor([1, 0])}
    expected = model(**inputs).loss
    fast, calls, fused = matrix.accelerated(model), [], foreign_block.FusedBlock.fused
    monkeypatch.setattr(foreign_block.FusedBlock, "fused", lambda *a, **k: calls.append(a) or fused(*a, **k))
    for more in ({}, {"num_items_in_batch": torch.tensor(2)}, {"num_items_in_batch": 2}):
        calls.clear()
        assert relative_error(fast(**inputs, **more).loss, expected) <= matrix.OUTPUT
        blocks = {one for one in fast.modules() if isinstance(one, foreign_block.FusedBlock)}
        assert {call[0] for call in calls} == blocks
        assert blocks


@pytest.mark.parametrize("name", ["ViTModel", "Dinov2Model", "CLIPVisionModel", "DINOv3ViTModel", "SwinModel"])
def test_arguments_that_are_no_business_of_attention(monkeypatch, name):
    """Models that do not know them hand them to every layer."""
    model = matrix.accelerated(matrix.build("transformers", name))
    inputs, calls, fused = matrix.inputs_of(model), [], foreign_block.FusedBlock.fused
    expected = matrix.run(model, inputs)
    monkeypatch.setattr(foreign_block.FusedBlock, "fused", lambda *a, **k: calls.append(a) or fused(*a, **k))
    for more in ({"labels": torch.tensor([1, 0])}, {"return_loss": True}, {"interpolate_pos_encoding": True}):
        calls.clear()
        assert relative_error(matrix.run(model, {**inputs, **more}), expected) <= matrix.OUTPUT
        assert len(calls) == sum(isinstance(one, foreign_block.FusedBlock) for one in model.modules())


CALLS_ASIDE = {
    "timm": (lambda: timm.models.vision_transformer.Block(48, 3), {"attn_mask": torch.zeros(5, 5)}, "a mask is given"),
    "open_clip": (_open_clips_block, {"attn_mask": torch.zeros(5, 5)}, "a mask or other keys are given"),
    "torch.nn": (_encoder_layer, {"src_mask": torch.zeros(5, 5)}, "a mask is given, or no batch"),
    "transformers, a mask": (
        lambda: _vit().layers[0],
        {"attention_mask": torch.zeros(2, 1, 5, 5)},
        "attention_mask is given",
    ),
    "transformers, sinks": (lambda: _vit().layers[0], {"s_aux": torch.zeros(3)}, "s_aux is given"),
}


@pytest.mark.parametrize("name", CALLS_ASIDE)
def test_a_call_that_the_library_computes_is_told(monkeypatch, name, caplog):
    build, more, reason = CALLS_ASIDE[name]
    module = build()
    vit_fast.accelerate(module, verify=False)
    monkeypatch.setattr("vit_fast.ops.backend._say_once", functools.cache(logging.getLogger("vit_fast").warning))
    with caplog.at_level(logging.WARNING, "vit_fast"):
        module(torch.randn(2, 5, 48), **more)
    (message,) = (record.getMessage() for record in caplog.records)
    assert message == f"a {type(module).__name__} runs in PyTorch: {reason}"
