"""Pictures as a decoder gives them: a model reads bytes, and what it makes of them is what it makes of their pixels."""

import numpy as np
import pytest
import torch
from torch import nn

import vit_fast
from tests.error_rule import relative_error
from tests.test_parity import draw
from vit_fast import ops
from vit_fast.layers import PatchEmbed

INTERPRETED = pytest.param("triton", marks=pytest.mark.interpret)
SMALL = {"img_size": (8, 12), "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
MEAN, STD = (0.485, 0.456, 0.406, 0.1), (0.229, 0.224, 0.225, 0.3)


def small(cls=vit_fast.VisionTransformer, **options) -> vit_fast.VisionTransformer:
    model = draw(cls(**{**SMALL, **options}))
    model.pretrained_cfg |= {"mean": MEAN[: model.in_chans], "std": STD[: model.in_chans]}
    return model.eval()


def pictures(batch: int = 2, size=(8, 12), channels: int = 3) -> torch.Tensor:
    """[B, C, rows, columns], whose channels come last in memory."""
    decoded = np.random.default_rng(batch).integers(0, 256, (batch, *size, channels), dtype=np.uint8)
    return torch.from_numpy(decoded).permute(0, 3, 1, 2)


def pixels(model, images: torch.Tensor) -> torch.Tensor:
    """The same normalised, in the model's dtype."""
    mean, std = (np.array(model.pretrained_cfg[name]).reshape(-1, 1, 1) for name in ("mean", "std"))
    return ((images.double() / 255 - torch.from_numpy(mean)) / torch.from_numpy(std)).to(model.head.weight.dtype)


class Mine(vit_fast.VisionTransformer):
    def _pos_embed(self, x):
        return super()._pos_embed(2 * x)


def hooked(model) -> None:
    model.patch_embed.register_forward_hook(lambda module, inputs, output: 2 * output)


def with_a_stem(model) -> None:
    model.patch_embed.proj = nn.Sequential(nn.Conv2d(3, 8, 2, 2), nn.ReLU(), nn.Conv2d(8, 32, 2, 2)).double()


# Options of the model, the size of its pictures, and what is done to it.
MODELS = {
    "plain": ({}, (8, 12), None),
    "distilled": ({"cls": vit_fast.model.VisionTransformerDistilled}, (8, 12), None),
    "registers without positions": ({"reg_tokens": 2, "no_embed_class": True}, (8, 12), None),
    "pixels that fill no patch": ({"img_size": (9, 14)}, (9, 14), None),
    "one channel": ({"in_chans": 1}, (8, 12), None),
    "four channels": ({"in_chans": 4}, (8, 12), None),
    "any size": ({"dynamic_img_size": True}, (12, 8), None),
    "padded": ({"dynamic_img_size": True, "dynamic_img_pad": True}, (7, 10), None),
    "nothing to pad": ({"dynamic_img_size": True, "dynamic_img_pad": True}, (8, 12), None),
    "hooked": ({}, (8, 12), hooked),
    "hooked and padded": ({"dynamic_img_size": True, "dynamic_img_pad": True}, (7, 10), hooked),
    "a stem": ({}, (8, 12), with_a_stem),
    "positions of one's own": ({"cls": Mine}, (8, 12), None),
}


class Reads(nn.Module):
    """Somebody's own patch embedding, which normalises for itself."""

    def __init__(self, embed: nn.Module):
        super().__init__()
        self.embed = embed

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.embed(images.double() / 255)


def with_an_embedding_of_ones_own(model) -> None:
    model.patch_embed = Reads(model.patch_embed)


def with_a_hook_before(model) -> None:
    model.patch_embed.register_forward_pre_hook(lambda module, inputs: (inputs[0].double() / 255,))


def with_another_forward(model) -> None:
    embed = model.patch_embed
    own = embed.forward
    embed.forward = lambda images: own(images.double() / 255)


@pytest.mark.parametrize("change", [with_an_embedding_of_ones_own, with_a_hook_before, with_another_forward])
def test_what_may_read_bytes_itself_gets_them(change):
    """As it did before the model knew what to do with them: nothing is normalised twice."""
    model = small(dtype=torch.float64)
    images = pictures()
    with torch.no_grad():
        expected = model(images.double() / 255)
        change(model)
        torch.testing.assert_close(model(images), expected)


@pytest.mark.parametrize("name", MODELS)
def test_bytes_are_their_pixels(name):
    """Logits and gradients in fp64, in which two right ways differ by rounding alone."""
    options, size, change = MODELS[name]
    model = small(**options, dtype=torch.float64)
    if change is not None:
        change(model)
    images = pictures(size=size, channels=model.in_chans)
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    found, expected = model(images), model(pixels(model, images))
    assert relative_error(found.detach(), expected.detach()) < 1e-13
    upstream = torch.randn_like(expected)
    grads = (torch.autograd.grad(logits, wanted, upstream) for logits in (found, expected))
    for ours, truth in zip(*grads, strict=True):
        assert relative_error(ours, truth) < 1e-11


METHODS = {
    "forward_features": lambda model, images: model.forward_features(images),
    "a mask": lambda model, images: model(images, is_causal=True),
    "forward_intermediates": lambda model, images: model.forward_intermediates(images)[1][0],
    "get_intermediate_layers": lambda model, images: model.get_intermediate_layers(images, reshape=True)[0],
    "forward_masked": lambda model, images: model.forward_masked(images, noise=torch.arange(12.0).view(2, 6))[0],
    "attention_maps": lambda model, images: model.attention_maps(images),
    "attention_rollout": lambda model, images: model.attention_rollout(images),
    "rollout_map": lambda model, images: model.rollout_map(images),
}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_takes_them(method, padded):
    model = small(dtype=torch.float64, dynamic_img_size=padded, dynamic_img_pad=padded)
    images = pictures(size=(7, 10) if padded else (8, 12))
    found, expected = (METHODS[method](model, given).detach() for given in (images, pixels(model, images)))
    assert found.shape == expected.shape
    assert relative_error(found, expected) < 1e-12


@pytest.mark.parametrize("backend", ["torch", INTERPRETED])
def test_the_op_gets_the_bytes_themselves(backend, monkeypatch):
    """And no copy in another dtype or layout."""
    given = []

    def noting(images, *others):
        given.append((images, others[-2:]))
        return op(images, *others)

    op, model, images = ops.patch_embed, small(), pictures()
    expected = model(pixels(model, images)).detach()
    monkeypatch.setattr(ops, "patch_embed", noting)
    with ops.use_backend(backend):
        found = model(images).detach()
    ((seen, statistics),) = given
    assert (seen.dtype, seen.data_ptr(), seen.stride()) == (torch.uint8, images.data_ptr(), images.stride())
    assert statistics == (MEAN[:3], STD[:3])
    assert relative_error(found, expected) < 1e-5


@pytest.mark.parametrize("backend", ["torch", INTERPRETED])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, "autocast"])
def test_in_half_precision(dtype, backend):
    """In the dtype that pixels would give, and as near to fp64 as those, whose rounding is the same."""
    model = small(dtype=torch.float32 if dtype == "autocast" else dtype)
    images = pictures()
    amp = torch.autocast("cpu", torch.bfloat16, enabled=dtype == "autocast")
    with ops.use_backend(backend), torch.no_grad(), amp:
        found, expected = model(images), model(pixels(model, images))
    assert found.dtype == expected.dtype
    assert relative_error(found, expected) < torch.finfo(found.dtype).eps


@pytest.mark.parametrize("backend", ["torch", INTERPRETED])
@pytest.mark.parametrize("dynamic", [None, True])
def test_compiled_into_one_graph(dynamic, backend):
    """Of a batch in training and of others, for which shapes are symbols."""
    torch.compiler.reset()  # its limits are for one piece of code, and all tests share theirs
    model = small().train()
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    weight = model.patch_embed.proj.weight
    with ops.use_backend(backend):
        for batch in (2, 3):
            found, expected = compiled(pictures(batch)), model(pictures(batch))
            torch.testing.assert_close(found, expected)
            grads = (torch.autograd.grad(logits.square().sum(), weight)[0] for logits in (found, expected))
            torch.testing.assert_close(*grads)
    torch.compiler.reset()


@pytest.mark.parametrize("strict", [False, True])
def test_exported_with_a_free_batch(strict):
    """The program holds mean and std, and PyTorch's own ops."""
    model = small()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (pictures(2),), dynamic_shapes=({0: batch},), strict=strict)
    calls = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert all(call.startswith("aten.") or call.startswith("<built-in function") for call in calls), calls
    assert relative_error(program.module()(pictures(5)), model(pictures(5))) < 1e-5


def test_under_functional_call_and_checkpoints():
    model, images = small(), pictures()
    expected = torch.autograd.grad(model(images).square().sum(), model.pos_embed)[0]
    model.set_grad_checkpointing()
    assert torch.equal(torch.autograd.grad(model(images).square().sum(), model.pos_embed)[0], expected)
    parameters = {name: 2 * parameter.detach() for name, parameter in model.named_parameters()}
    found = torch.func.functional_call(model, parameters, (images,))
    assert relative_error(found, torch.func.functional_call(model, parameters, (pixels(model, images),))) < 1e-5


def test_predict_gives_their_probabilities():
    """Of pictures of the model's size, which nothing resizes."""
    model, images = small(), pictures()
    model.pretrained_cfg["crop_pct"] = 1.0
    expected = model.predict(images.permute(0, 2, 3, 1))
    assert relative_error(model(images).softmax(dim=-1).detach(), expected) < 1e-6


def test_one_value_serves_every_channel():
    model, images = small(dtype=torch.float64), pictures()
    model.pretrained_cfg |= {"mean": (0.5,) * 3, "std": (0.25,) * 3}
    expected = model(images)
    for one in ({"mean": (0.5,), "std": [0.25]}, {"mean": 0.5, "std": 0.25}):
        model.pretrained_cfg |= one
        assert torch.equal(model(images), expected)


@pytest.mark.parametrize("change", [None, hooked])
def test_a_std_of_zero_is_refused(change):
    model = small()
    if change is not None:
        change(model)
    model.pretrained_cfg["std"] = (0.2, 0.0, 0.2)
    message = r"pretrained_cfg\['std'\]: got \(0.2, 0.0, 0.2\), takes 3 finite numbers above 0"
    with pytest.raises(ValueError, match=message):
        model(pictures())


def test_settings_that_are_changed_count_for_a_compiled_model():
    torch.compiler.reset()
    model, images = small(), pictures()
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(compiled(images), model(images))
    model.pretrained_cfg["mean"] = (0.0, 0.0, 0.0)
    torch.testing.assert_close(compiled(images), model(images))
    torch.compiler.reset()


WRONG = {
    "no mean": (lambda cfg: cfg.pop("mean"), "images: got bytes, and pretrained_cfg has no 'mean' to normalise"),
    "no std": (lambda cfg: cfg.update(std=None), "pretrained_cfg has no 'std' to normalise them by"),
    "two means": (lambda cfg: cfg.update(mean=(0.5, 0.5)), r"pretrained_cfg\['mean'\]: got 2 values, takes 1 or 3"),
}


@pytest.mark.parametrize("change", [None, hooked])
@pytest.mark.parametrize("wrong", WRONG)
def test_a_model_that_does_not_say_how(wrong, change):
    """Where the fused op would read them and where modules would; pixels it takes all the same."""
    model, images = small(), pictures()
    normalised, (spoil, message) = pixels(model, images), WRONG[wrong]
    spoil(model.pretrained_cfg)
    if change is not None:
        change(model)
    assert model(normalised).shape == (2, 5)
    with pytest.raises(ValueError, match=message):
        model(images)


@pytest.mark.parametrize("change", [None, hooked])
def test_images_of_another_shape_are_named(change):
    model, images = small(dtype=torch.float64), pictures()
    if change is not None:
        change(model)
    with pytest.raises(ValueError, match=r"images: got 8 channels, takes 3; \.permute\(0, 3, 1, 2\) puts those of"):
        model(images.permute(0, 2, 3, 1))
    with pytest.raises(ValueError, match=r"images: got 4 channels, takes 3$"):
        model(pictures(channels=4))
    with pytest.raises(ValueError, match=r"images: got shape \[3, 8, 12\], takes \[B, "):
        model(images[0])


def test_an_embedding_alone_has_no_mean():
    with pytest.raises(RuntimeError):
        PatchEmbed(8, 4, embed_dim=16)(pictures(size=(8, 8)))
