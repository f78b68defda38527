"""`attn_implementation="vit_fast"`: models of transformers against themselves with "eager"."""

import copy
import logging
import subprocess
import sys

import pytest
import torch
import transformers as hf
from torch import nn

import vit_fast
from tests.conftest import INTERPRETING
from tests.error_rule import relative_error
from vit_fast import ops
from vit_fast.ops import backend
from vit_fast.transformers_attention import attention_forward

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
SIGLIP2 = {**{name: SIZES[name] for name in SIZES if name != "image_size"}, "num_patches": 16, "num_channels": 3}
IMAGE = (2, 3, 32, 32)


def _images() -> dict:
    return {"pixel_values": torch.randn(IMAGE)}


def _text() -> dict:
    return {"input_ids": torch.randint(3, 40, (2, 9))}


def _padded_text() -> dict:
    return {**_text(), "attention_mask": torch.tensor([[1] * 9, [1] * 6 + [0] * 3])}


def _patches() -> dict:
    """Two pictures of 3 x 4 patches."""
    mask, shapes = torch.ones(2, 12, dtype=torch.int64), torch.tensor([[3, 4], [3, 4]])
    return {"pixel_values": torch.randn(2, 12, 3 * 64), "pixel_attention_mask": mask, "spatial_shapes": shapes}


def _padded_patches() -> dict:
    """The second picture is one of 2 x 3."""
    inputs = _patches()
    inputs["pixel_attention_mask"][1, 6:] = 0
    inputs["spatial_shapes"][1] = torch.tensor([2, 3])
    return inputs


def _clip() -> nn.Module:
    text, vision = hf.CLIPTextConfig(**TEXT).to_dict(), hf.CLIPVisionConfig(**SIZES).to_dict()
    return hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=vision))


# The model, its inputs, and whether each of its attentions, some or none are what the op computes.
MODELS = {
    "ViT": (lambda: hf.ViTModel(hf.ViTConfig(**SIZES)), _images, "all"),
    "ViT-MAE": (lambda: hf.ViTMAEModel(hf.ViTMAEConfig(**SIZES, mask_ratio=0.5)), _images, "all"),
    "DeiT": (lambda: hf.DeiTModel(hf.DeiTConfig(**SIZES)), _images, "all"),
    "DINOv2": (lambda: hf.Dinov2Model(hf.Dinov2Config(**SIZES)), _images, "all"),
    "DINOv2 registers": (
        lambda: hf.Dinov2WithRegistersModel(hf.Dinov2WithRegistersConfig(**SIZES)),
        _images,
        "all",
    ),
    "DINOv3": (lambda: hf.DINOv3ViTModel(hf.DINOv3ViTConfig(**SIZES)), _images, "all"),
    "CLIP": (_clip, lambda: {**_padded_text(), **_images()}, "some"),
    "CLIP vision": (lambda: hf.CLIPVisionModel(hf.CLIPVisionConfig(**SIZES)), _images, "all"),
    "CLIP text, causal": (lambda: hf.CLIPTextModel(hf.CLIPTextConfig(**TEXT)), _text, "none"),
    "CLIP text, causal and padded": (lambda: hf.CLIPTextModel(hf.CLIPTextConfig(**TEXT)), _padded_text, "none"),
    "SigLIP": (lambda: hf.SiglipVisionModel(hf.SiglipVisionConfig(**SIZES)), _images, "all"),
    "SigLIP 2": (lambda: hf.Siglip2VisionModel(hf.Siglip2VisionConfig(**SIGLIP2)), _patches, "all"),
    "SigLIP 2, padded": (lambda: hf.Siglip2VisionModel(hf.Siglip2VisionConfig(**SIGLIP2)), _padded_patches, "none"),
    "Swin, shifted windows": (lambda: hf.SwinModel(hf.SwinConfig(**SWIN)), _images, "none"),
    "BEiT": (lambda: hf.BeitModel(hf.BeitConfig(**SIZES)), _images, "all"),
    "BEiT, relative positions": (
        lambda: hf.BeitModel(hf.BeitConfig(**SIZES, use_relative_position_bias=True)),
        _images,
        "none",
    ),
    "I-JEPA": (lambda: hf.IJepaModel(hf.IJepaConfig(**SIZES)), _images, "all"),
}


@pytest.fixture(autouse=True)
def _registered():
    vit_fast.register_transformers()


@pytest.fixture
def calls(monkeypatch) -> list:
    """The calls of `ops.attention`."""
    calls, attention = [], ops.attention
    monkeypatch.setattr(ops, "attention", lambda *args: calls.append(args) or attention(*args))
    return calls


def _drawn_anew(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.15 * torch.randn_like(parameter) + (1.0 if parameter.dim() == 1 else 0.0))
    return model.eval()


def _made(name: str) -> tuple[nn.Module, dict]:
    build, inputs, _ = MODELS[name]
    return _drawn_anew(build()), inputs()


def _parts(output) -> tuple[list, list]:
    """The floating tensors of an output and of those inside it, and its attentions."""
    tensors, attentions = [], []
    for name, value in output.items():
        if name == "attentions":
            attentions += value or ()
        elif isinstance(value, dict):
            for mine, inner in zip((tensors, attentions), _parts(value)):
                mine += inner
        elif isinstance(value, torch.Tensor) and value.is_floating_point():
            tensors.append(value)
    return tensors, attentions


def _run(model: nn.Module, implementation: str, inputs: dict, **more):
    """Every tensor that the model returns, its attentions, and the gradient of every parameter."""
    model.set_attn_implementation(implementation)
    model.zero_grad()
    torch.manual_seed(0)  # ViT-MAE draws its mask
    tensors, attentions = _parts(model(**inputs, **more))
    results = [tensor for tensor in tensors if tensor.requires_grad]
    torch.autograd.backward(results, [torch.randn_like(tensor) for tensor in results])
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return tensors, attentions, gradients


def _assert_same(ours: tuple, theirs: tuple) -> None:
    for mine, other in zip(ours[:2], theirs[:2]):
        assert [x.shape for x in mine] == [x.shape for x in other]
        assert all(relative_error(x, y) < 1e-5 for x, y in zip(mine, other))
    gradients, their_gradients = ours[2], theirs[2]
    assert gradients.keys() == their_gradients.keys()
    # The gradient of a key's bias is zero but for rounding: nothing is 1e-4 of it.
    rounding = 1e-6 * torch.cat([gradient.flatten() for gradient in their_gradients.values()]).norm()
    for name, gradient in their_gradients.items():
        assert (gradients[name] - gradient).norm() < 1e-4 * gradient.norm() + rounding, name


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_what_it_was(name, recorded, calls):
    model, inputs = _made(name)
    theirs = _run(model, "eager", inputs, output_attentions=True)
    assert theirs[1]
    ours = _run(model, "vit_fast", inputs, output_attentions=recorded)
    assert bool(ours[1]) == recorded
    _assert_same(ours, theirs if recorded else (theirs[0], [], theirs[2]))
    wanted = {"all": len(theirs[1]), "some": len(theirs[1]) // 2, "none": 0}[MODELS[name][2]]
    assert len(calls) == wanted


def test_attentions_that_the_config_asks_for():
    """No call says so here, and of Swin no hook stands on the module that computes them."""
    model, inputs = _made("Swin, shifted windows")
    model.set_attn_implementation("eager")
    model.config.output_attentions = True
    _, theirs = _parts(model(**inputs))
    model.set_attn_implementation("vit_fast")
    _, ours = _parts(model(**inputs))
    assert len(ours) == len(theirs) > 0
    assert all(relative_error(x, y) < 1e-5 for x, y in zip(ours, theirs))


def test_attentions_that_a_hook_alone_collects(monkeypatch):
    """The config of the whole asks, whose attention modules have another."""
    model, inputs = _made("ViT")
    for module in model.modules():
        if type(module).__name__ == "ViTAttention":
            module.config = copy.deepcopy(module.config)
    model.set_attn_implementation("eager")
    model.config.output_attentions = True
    model(**inputs)
    for module in model.modules():
        if type(module).__name__ == "ViTAttention":
            module.config._attn_implementation = "vit_fast"
    _, ours = _parts(model(**inputs))
    assert len(ours) == SIZES["num_hidden_layers"]
    model.config.output_attentions = False
    monkeypatch.setattr(ops, "attention_maps", None)
    model(
        **inputs, output_hidden_states=True
    )  # the hooks are still there, and nobody computes what they do not collect


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")  # its new name is of 5.24
@pytest.mark.parametrize("accelerated", [False, True])
@pytest.mark.parametrize("name", ["ViT", "SigLIP", "SigLIP 2, padded"])
def test_gradient_checkpointing_with_attentions(name, accelerated):
    """Layers run again in the backward pass, when nobody collects; SigLIP's do not say what was asked for."""
    model, inputs = _made(name)
    theirs = _run(model, "eager", inputs, output_attentions=True)
    if accelerated:
        vit_fast.accelerate(model, verify=False)
    model.train().gradient_checkpointing_enable()  # its dropouts are 0
    for recorded in (True, False, True):
        ours = _run(model, "vit_fast", inputs, output_attentions=recorded)
        _assert_same(ours, theirs if recorded else (theirs[0], [], theirs[2]))


def test_from_pretrained(tmp_path, calls):
    model, inputs = _made("ViT")
    model.save_pretrained(tmp_path)
    fast = hf.ViTModel.from_pretrained(tmp_path, attn_implementation="vit_fast")
    assert relative_error(fast(**inputs).last_hidden_state, model(**inputs).last_hidden_state) < 1e-5
    assert len(calls) == SIZES["num_hidden_layers"]


def test_the_log_says_once_what_runs_in_pytorch(caplog):
    model, inputs = _made("Swin, shifted windows")
    model.set_attn_implementation("vit_fast")
    backend._say_once.cache_clear()
    with caplog.at_level(logging.WARNING, logger="vit_fast"):
        model(**inputs)
        model(**inputs, output_attentions=True)
    assert [record.getMessage() for record in caplog.records if record.name.startswith("vit_fast")] == [
        "attention of a SwinAttention runs in PyTorch: a mask or a bias is given"
    ]


class _Module(nn.Module):
    is_causal = False


# The shape of q, that of k and, unless the arguments have another, of v, the arguments, and whether the op computes it.
CALLS = {
    "plain": ((2, 3, 7, 16), (2, 3, 7, 16), {}, True),
    "a scale of its own": ((2, 3, 7, 16), (2, 3, 7, 16), {"scaling": 0.4}, True),
    "other tokens as keys": ((2, 3, 7, 16), (2, 3, 5, 16), {}, True),
    "one query sees all keys, causal or not": ((2, 3, 1, 16), (2, 3, 5, 16), {"is_causal": True}, True),
    "causal": ((2, 3, 7, 16), (2, 3, 7, 16), {"is_causal": True}, False),
    "fewer heads of keys": ((2, 6, 7, 16), (2, 2, 7, 16), {}, False),
    "fewer heads of keys, causal": ((2, 6, 7, 16), (2, 2, 7, 16), {"is_causal": True}, False),
    "a query for every image": ((1, 3, 7, 16), (4, 3, 7, 16), {}, False),
    "values of another width": ((2, 3, 7, 16), (2, 3, 7, 16), {"value": (2, 3, 7, 24)}, False),
    "boolean mask": ((2, 3, 7, 16), (2, 3, 7, 16), {"attention_mask": (2, 1, 1, 7), "scaling": 0.4}, False),
    "bias for each head": ((2, 3, 7, 16), (2, 3, 7, 16), {"attention_mask": (1, 3, 7, 7)}, False),
    "position bias": ((2, 3, 7, 16), (2, 3, 7, 16), {"position_bias": (1, 3, 7, 7)}, False),
    "position bias, causal": ((2, 3, 7, 16), (2, 3, 7, 16), {"position_bias": (1, 3, 7, 7), "is_causal": True}, False),
    "capped scores": ((2, 3, 7, 16), (2, 3, 7, 16), {"softcap": 0.7}, False),
    "capped scores, boolean mask": (
        (2, 3, 7, 16),
        (2, 3, 7, 16),
        {"softcap": 0.7, "attention_mask": (2, 1, 1, 7)},
        False,
    ),
}


def _truth(q, k, v, scaling=None, is_causal=False, attention_mask=None, position_bias=None, softcap=None):
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = q @ k.transpose(2, 3) * (scaling or q.shape[-1] ** -0.5)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if position_bias is not None:
        scores = scores + position_bias
    if is_causal and q.shape[2] > 1:
        scores = scores + torch.full(scores.shape[2:], -torch.inf).triu(1)
    if attention_mask is not None:
        boolean = attention_mask.dtype == torch.bool
        scores = scores.where(attention_mask, -torch.inf) if boolean else scores + attention_mask
    weights = scores.softmax(-1)
    return (weights @ v).transpose(1, 2), weights


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_a_call_against_the_formula(name, recorded, calls):
    shape, keys, arguments, fits = CALLS[name]
    arguments = dict(arguments)
    for argument in ("attention_mask", "position_bias"):
        if argument in arguments:
            arguments[argument] = torch.randn(arguments[argument])
    if "boolean mask" in name:
        arguments["attention_mask"] = arguments["attention_mask"] > 0
        arguments["attention_mask"][..., 0] = True  # every query sees one key
    module = _Module()
    module.num_key_value_groups = shape[1] // keys[1]
    values = arguments.pop("value", keys)
    operands = [torch.randn(size, requires_grad=True) for size in (shape, keys, values)]
    wide = [operand.detach().double().requires_grad_() for operand in operands]
    mask = arguments.pop("attention_mask", None)
    output, weights = attention_forward(module, *operands, mask, **arguments, output_attentions=recorded)
    # A mask and a bias of fp32 are exact in fp64.
    truth, true_weights = _truth(*wide, attention_mask=mask, **arguments)
    results, truths = [output], [truth]
    assert (weights is not None) == recorded
    if recorded:
        results, truths = [output, weights], [truth, true_weights]
    upstream = [torch.randn_like(result) for result in results]
    gradients = torch.autograd.grad(results, operands, upstream)
    true_gradients = torch.autograd.grad(truths, wide, [gradient.double() for gradient in upstream])
    for mine, true in zip((*results, *gradients), (*truths, *true_gradients)):
        assert mine.shape == true.shape
        assert relative_error(mine, true) < 2e-6
    assert bool(calls) == fits


def test_a_query_that_sees_no_key_gets_numbers():
    q, k, v = torch.randn(3, 2, 3, 7, 16).unbind(0)
    mask = torch.ones(2, 1, 7, 7, dtype=torch.bool)
    mask[:, :, 2] = False
    output, weights = attention_forward(_Module(), q, k, v, mask, output_attentions=True)
    assert output.isfinite().all()
    torch.testing.assert_close(weights[:, :, 2], torch.full((2, 3, 7), 1 / 7))


def test_a_module_that_does_not_say_is_causal():
    """As transformers' own "sdpa" takes it."""
    q, k, v = torch.randn(3, 2, 3, 7, 16).unbind(0)
    output, _ = attention_forward(nn.Module(), q, k, v, None)
    torch.testing.assert_close(output, _truth(q, k, v, is_causal=True)[0])


@pytest.mark.parametrize("name", ["s_aux", "sinks"])
def test_attention_sinks_are_rejected(name):
    q, k, v = torch.randn(3, 2, 3, 7, 16).unbind(0)
    with pytest.raises(ValueError, match=f"{name}: got attention sinks, takes None"):
        attention_forward(_Module(), q, k, v, None, **{name: torch.randn(3)})


def test_dropout_in_training():
    """Half of the weights are dropped, the others doubled: as many draws as there are images have the mean of none."""
    module, images = _Module().train(), 4096
    q, k, v = torch.randn(3, 1, 1, 5, 16).unbind(0)
    truth, weights = _truth(q, k, v)
    q, k, v = (x.expand(images, -1, -1, -1) for x in (q, k, v))
    for recorded in (False, True):
        output, drawn = attention_forward(module, q, k, v, None, dropout=0.5, output_attentions=recorded)
        error = output.std(0) / images**0.5
        assert ((output.mean(0) - truth[0]).abs() < 5 * error).all()
        assert (error > 0).all()
    assert torch.isclose(drawn, 2 * weights).logical_xor(drawn == 0).all()
    assert relative_error(output, (drawn @ v).transpose(1, 2)) < 1e-6


def test_no_dropout_of_recorded_weights_in_evaluation():
    q, k, v = torch.randn(3, 2, 3, 7, 16).unbind(0)
    found = attention_forward(_Module().eval(), q, k, v, None, dropout=0.5, output_attentions=True)
    for one, truth in zip(found, _truth(q, k, v)):
        torch.testing.assert_close(one, truth)


@pytest.mark.parametrize("name", ["ViT", "CLIP text, causal and padded"])
def test_compile_and_export(name):
    model, inputs = _made(name)
    model.set_attn_implementation("eager")
    expected = model(**inputs, output_attentions=True)
    model.set_attn_implementation("vit_fast")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(**inputs, output_attentions=True)
    assert relative_error(compiled.last_hidden_state, expected.last_hidden_state) < 1e-5
    assert len(compiled.attentions) == len(expected.attentions)
    assert all(relative_error(x, y) < 1e-5 for x, y in zip(compiled.attentions, expected.attentions))
    with vit_fast.use_backend("triton"):
        exported = torch.export.export(model, (), inputs)
    assert not [node for node in exported.graph.nodes if "vit_fast" in str(node.target)]
    assert relative_error(exported.module()(**inputs).last_hidden_state, expected.last_hidden_state) < 1e-5


class _Causal(nn.Module):
    is_causal = True

    def forward(self, q, k, v):
        return attention_forward(self, q, k, v, None)[0]


def test_a_causal_call_of_any_length_is_exported():
    q, k, v = torch.randn(3, 2, 3, 9, 16).unbind(0)
    length = {2: torch.export.Dim("length", min=2, max=64)}
    exported = torch.export.export(_Causal(), (q, k, v), dynamic_shapes={"q": length, "k": length, "v": length})
    shorter = [x[:, :, :5] for x in (q, k, v)]
    assert relative_error(exported.module()(*shorter), _truth(*shorter, is_causal=True)[0]) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["ViT", "Swin, shifted windows"])
def test_half_precision_and_autocast(name, dtype):
    model, inputs = _made(name)
    images = inputs["pixel_values"]
    model.set_attn_implementation("eager")
    truth = copy.deepcopy(model).double()(images.double()).last_hidden_state
    half = copy.deepcopy(model).to(dtype)
    limit = 2 * relative_error(half(images.to(dtype)).last_hidden_state, truth)
    for fast in (model, half):
        fast.set_attn_implementation("vit_fast")
    output = half(images.to(dtype), output_attentions=True)
    assert relative_error(output.last_hidden_state, truth) < limit
    assert {x.dtype for x in (output.last_hidden_state, *output.attentions)} == {dtype}
    with torch.autocast("cpu", dtype):
        assert relative_error(model(images).last_hidden_state, truth) < limit


def test_vit_fast_imported_first():
    code = (
        "from tests.mend_torchvision import mend; mend(); import sys, vit_fast;"
        "assert 'transformers' not in sys.modules; vit_fast.register_transformers();"
        "from transformers import ViTConfig, ViTModel;"
        "ViTModel(ViTConfig(num_hidden_layers=0)).set_attn_implementation('vit_fast')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_transformers_is_missing_or_old(monkeypatch):
    monkeypatch.setattr("transformers.__version__", "4.57.1")
    with pytest.raises(ImportError, match=r"got 4\.57\.1, takes version 5 or later"):
        vit_fast.register_transformers()
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match="got none, takes version 5 or later"):
        vit_fast.register_transformers()


@pytest.mark.interpret
@pytest.mark.skipif(not INTERPRETING, reason="runs in Triton's interpreter")
@pytest.mark.parametrize("name", ["ViT", "SigLIP"])
def test_on_the_kernels(name, calls):
    model, inputs = _made(name)
    theirs = _run(model, "eager", inputs)
    with torch.no_grad():
        attentions = model(**inputs, output_attentions=True).attentions
    with vit_fast.use_backend("triton"):
        ours = _run(model, "vit_fast", inputs)
        assert len(calls) == SIZES["num_hidden_layers"]
        with torch.no_grad():  # the kernel of the maps has no gradient
            our_attentions = model(**inputs, output_attentions=True).attentions
    _assert_same(ours, theirs)
    assert len(our_attentions) == len(attentions) == SIZES["num_hidden_layers"]
    assert all(relative_error(x, y) < 1e-5 for x, y in zip(our_attentions, attentions))
