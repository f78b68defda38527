"""`attn_implementation="vit_fast"`: models of transformers against themselves with "eager"."""

import subprocess
import sys

import pytest
import torch
import transformers as hf
from torch import nn

import vit_fast
from tests.conftest import INTERPRETING
from vit_fast import ops, transformers_attention

SIZES = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 96,
    "image_size": 32,
    "patch_size": 8,
}
TEXT = {**{name: SIZES[name] for name in list(SIZES)[:4]}, "vocab_size": 40, "max_position_embeddings": 12}
SWIN = {"image_size": 32, "patch_size": 2, "embed_dim": 24, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
IMAGE = (2, 3, 32, 32)
PIXELS = {"pixel_values": IMAGE}


def _siglip2_inputs() -> dict:
    """Two pictures of 3 x 4 and 2 x 3 patches, the second padded."""
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[1, 6:] = 0
    shapes = torch.tensor([[3, 4], [2, 3]])
    return {"pixel_values": torch.randn(2, 12, 3 * 64), "pixel_attention_mask": mask, "spatial_shapes": shapes}


def _text_inputs() -> dict:
    return {"input_ids": torch.randint(3, 40, (2, 9)), "attention_mask": torch.tensor([[1] * 9, [1] * 6 + [0] * 3])}


MODELS = {
    "ViT": (lambda: hf.ViTModel(hf.ViTConfig(**SIZES)), PIXELS),
    "ViT-MAE": (lambda: hf.ViTMAEModel(hf.ViTMAEConfig(**SIZES, mask_ratio=0.0)), PIXELS),
    "DeiT": (lambda: hf.DeiTModel(hf.DeiTConfig(**SIZES)), PIXELS),
    "DINOv2": (lambda: hf.Dinov2Model(hf.Dinov2Config(**SIZES)), PIXELS),
    "DINOv2 registers": (lambda: hf.Dinov2WithRegistersModel(hf.Dinov2WithRegistersConfig(**SIZES)), PIXELS),
    "DINOv3": (lambda: hf.DINOv3ViTModel(hf.DINOv3ViTConfig(**SIZES)), PIXELS),
    "CLIP vision": (lambda: hf.CLIPVisionModel(hf.CLIPVisionConfig(**SIZES)), PIXELS),
    "CLIP text, causal": (lambda: hf.CLIPTextModel(hf.CLIPTextConfig(**TEXT)), _text_inputs),
    "SigLIP": (lambda: hf.SiglipVisionModel(hf.SiglipVisionConfig(**SIZES)), PIXELS),
    "SigLIP 2, padded": (
        lambda: hf.Siglip2VisionModel(
            hf.Siglip2VisionConfig(**{**SIZES, "num_patches": 16, "num_channels": 3}),
        ),
        _siglip2_inputs,
    ),
    "Swin, shifted windows": (lambda: hf.SwinModel(hf.SwinConfig(**SWIN)), PIXELS),
    "BEiT, relative positions": (
        lambda: hf.BeitModel(hf.BeitConfig(**SIZES, use_relative_position_bias=True)),
        PIXELS,
    ),
    "I-JEPA": (lambda: hf.IJepaModel(hf.IJepaConfig(**SIZES)), PIXELS),
}
MASKED = ("CLIP text, causal", "SigLIP 2, padded", "Swin, shifted windows", "BEiT, relative positions")


def _drawn_anew(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.15 * torch.randn_like(parameter) + (1.0 if parameter.dim() == 1 else 0.0))
    return model.eval()


def _inputs(shapes) -> dict:
    return shapes() if callable(shapes) else {name: torch.randn(shape) for name, shape in shapes.items()}


def _run(model: nn.Module, implementation: str, inputs: dict, **more):
    """The last hidden state, the attentions where they are asked for, and the gradient of every parameter."""
    model.set_attn_implementation(implementation)
    model.zero_grad()
    output = model(**inputs, **more)
    upstream = torch.randn(output.last_hidden_state.shape, generator=torch.Generator().manual_seed(1))
    output.last_hidden_state.backward(upstream.to(output.last_hidden_state.dtype))
    return output, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def _relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.fixture(autouse=True)
def _registered():
    vit_fast.register_transformers()


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_what_it_was(name):
    build, shapes = MODELS[name]
    model, inputs = _drawn_anew(build()), _inputs(shapes)
    torch.manual_seed(0)
    theirs, their_gradients = _run(model, "eager", inputs)
    torch.manual_seed(0)
    ours, our_gradients = _run(model, "vit_fast", inputs)
    assert _relative(ours.last_hidden_state, theirs.last_hidden_state) < 1e-5
    if getattr(theirs, "pooler_output", None) is not None:
        assert _relative(ours.pooler_output, theirs.pooler_output) < 1e-5
    assert our_gradients.keys() == their_gradients.keys()
    size = torch.cat([g.flatten() for g in their_gradients.values()]).norm()
    for parameter, gradient in their_gradients.items():
        assert (our_gradients[parameter] - gradient).norm() < 1e-4 * size, parameter


@pytest.mark.parametrize("name", MODELS)
def test_the_op_runs_unless_the_call_has_a_mask(name, monkeypatch):
    build, shapes = MODELS[name]
    model, inputs, calls = _drawn_anew(build()), _inputs(shapes), []
    attention = ops.attention
    monkeypatch.setattr(ops, "attention", lambda *args: calls.append(args) or attention(*args))
    model.set_attn_implementation("vit_fast")
    model(**inputs)
    assert bool(calls) == (name not in MASKED)


@pytest.mark.parametrize("name", MODELS)
def test_attentions_are_returned_when_asked_for(name):
    build, shapes = MODELS[name]
    model, inputs = _drawn_anew(build()), _inputs(shapes)
    torch.manual_seed(0)
    theirs, _ = _run(model, "eager", inputs, output_attentions=True)
    torch.manual_seed(0)
    ours, _ = _run(model, "vit_fast", inputs, output_attentions=True)
    assert _relative(ours.last_hidden_state, theirs.last_hidden_state) < 1e-5
    assert len(ours.attentions) == len(theirs.attentions) > 0
    for mine, other in zip(ours.attentions, theirs.attentions):
        assert mine.shape == other.shape
        assert _relative(mine, other) < 1e-5
    assert not model(**inputs).attentions


def test_dropout_in_training_is_drawn():
    model = _drawn_anew(hf.ViTModel(hf.ViTConfig(**SIZES, attention_probs_dropout_prob=0.5))).train()
    model.set_attn_implementation("vit_fast")
    images = torch.randn(IMAGE)
    first, second = model(images).last_hidden_state, model(images).last_hidden_state
    assert _relative(first, second) > 1e-3
    assert torch.equal(model.eval()(images).last_hidden_state, model(images).last_hidden_state)


class _Module(nn.Module):
    is_causal = False


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("recorded", [False, True])
def test_fewer_heads_of_keys(causal, recorded):
    module = _Module()
    q, (k, v) = torch.randn(2, 6, 7, 16), torch.randn(2, 2, 3, 7, 16).unbind(0)
    module.num_key_value_groups = 2
    mask = torch.ones(7, 7).tril() == 1 if causal else torch.ones(7, 7) == 1
    scores = (q @ k.repeat_interleave(2, 1).transpose(2, 3) / 4).masked_fill(~mask, -torch.inf)
    truth = scores.softmax(-1)
    output, weights = transformers_attention.attention_forward(
        module, q, k, v, None, is_causal=causal, output_attentions=recorded
    )
    assert _relative(output, (truth @ v.repeat_interleave(2, 1)).transpose(1, 2)) < 1e-5
    assert (weights is not None) == recorded
    assert not recorded or _relative(weights, truth) < 1e-5


def test_compile_and_export():
    model = _drawn_anew(hf.ViTModel(hf.ViTConfig(**SIZES), add_pooling_layer=False))
    model.set_attn_implementation("vit_fast")
    images = torch.randn(IMAGE)
    expected = model(images).last_hidden_state
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert _relative(compiled(images).last_hidden_state, expected) < 1e-5
    exported = torch.export.export(model, (images,))
    assert not [node for node in exported.graph.nodes if "vit_fast" in str(node.target)]
    assert _relative(exported.module()(images).last_hidden_state, expected) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast(dtype):
    model = _drawn_anew(hf.ViTModel(hf.ViTConfig(**SIZES), add_pooling_layer=False))
    images = torch.randn(IMAGE)
    model.set_attn_implementation("eager")
    truth = model.double()(images.double()).last_hidden_state
    limit = 4 * _relative(model.to(dtype)(images.to(dtype)).last_hidden_state.double(), truth)
    model.set_attn_implementation("vit_fast")
    assert _relative(model(images.to(dtype)).last_hidden_state.double(), truth) < limit
    with torch.autocast("cpu", dtype):
        assert _relative(model.float()(images).last_hidden_state.double(), truth) < limit


@pytest.mark.parametrize("first", ["transformers", "vit_fast"])
def test_whichever_is_imported_first(first):
    lines = ["import transformers", "import vit_fast; vit_fast.register_transformers()"]
    mend = "from tests.mend_torchvision import mend; mend(); "
    code = mend + "; ".join(lines if first == "transformers" else reversed(lines))
    check = "; from transformers import AttentionInterface; assert 'vit_fast' in AttentionInterface().valid_keys()"
    subprocess.run([sys.executable, "-c", code + check], check=True)


@pytest.mark.interpret
@pytest.mark.skipif(not INTERPRETING, reason="runs in Triton's interpreter")
@pytest.mark.parametrize("name", ["ViT", "SigLIP"])
def test_on_the_kernels(name):
    build, shapes = MODELS[name]
    model, inputs = _drawn_anew(build()), _inputs(shapes)
    theirs, their_gradients = _run(model, "eager", inputs)
    with vit_fast.use_backend("triton"):
        ours, our_gradients = _run(model, "vit_fast", inputs)
    assert _relative(ours.last_hidden_state, theirs.last_hidden_state) < 1e-5
    size = torch.cat([g.flatten() for g in their_gradients.values()]).norm()
    for parameter, gradient in their_gradients.items():
        assert (our_gradients[parameter] - gradient).norm() < 1e-4 * size, parameter
