"""warm: the passes that compile ahead are made, and leave no trace. Without a GPU the interpreter runs them."""

import types

import pytest
import torch

import vit_fast
from vit_fast.warm import _compiled_names, pass_over

INTERPRETED = pytest.param("triton", marks=pytest.mark.interpret)


def small(**options) -> vit_fast.VisionTransformer:
    sizes = {"img_size": 32, "embed_dim": 32, "num_heads": 2, "depth": 2, "num_classes": 3}
    return vit_fast.create_model("vit_tiny_patch16_224", **sizes | options)


class Passes(list):
    """What the model was called with, and how: training, gradients wanted, whether backward came."""

    def __init__(self, model):
        super().__init__()
        model.register_forward_hook(self)

    def __call__(self, model, inputs, output):
        made = types.SimpleNamespace(
            images=inputs[0], training=model.training, grad=output.requires_grad, backward=False, dtype=output.dtype
        )
        self.append(made)
        if output.requires_grad:
            output.register_hook(lambda gradient: setattr(made, "backward", True))


def count_steps(model) -> None:
    """A buffer that every pass changes."""
    model.register_buffer("steps", torch.zeros(()))

    def count(module, inputs):
        module.steps += 1

    model.register_forward_pre_hook(count)


@pytest.mark.interpret
def test_one_pass_a_size():
    model = small(dynamic_img_size=True).eval()
    passes = Passes(model)
    with vit_fast.use_backend("triton"):
        assert vit_fast.warm(model, [2, (3,), (1, 16, 48)]) == [], "the interpreter compiles nothing"
    assert [tuple(one.images.shape) for one in passes] == [(2, 3, 32, 32), (3, 3, 32, 32), (1, 3, 16, 48)]
    for one in passes:
        assert not one.images.any()
        assert not one.grad


@pytest.mark.interpret
def test_training_makes_the_backward_pass_too():
    model = small().train()
    passes = Passes(model)
    with vit_fast.use_backend("triton"), torch.no_grad():  # whatever surrounds the call
        vit_fast.warm(model, [2])
    (one,) = passes
    assert one.training
    assert one.backward


@pytest.mark.interpret
def test_two_heads_in_distillation():
    model = vit_fast.create_model(
        "deit_tiny_distilled_patch16_224", img_size=32, embed_dim=32, num_heads=2, depth=1, num_classes=3
    )
    model.set_distilled_training()
    asked = []
    model.head_dist.register_full_backward_hook(lambda *_: asked.append(1))
    with vit_fast.use_backend("triton"):
        vit_fast.warm(model.train(), [2])
    assert asked


def test_a_patch_embedding_of_somebodys_own_is_told_the_size():
    model = small()
    model.patch_embed = torch.nn.Sequential(model.patch_embed)
    with pytest.raises(ValueError, match=r"sizes: got 2, takes \(batch, rows, columns\): patch_embed does not say"):
        vit_fast.warm(model, [2])
    assert vit_fast.warm(model, [(2, 32, 32)]) == []


@pytest.mark.interpret
def test_it_reaches_the_kernels_of_a_training_step(monkeypatch):
    """The same launches, by kernel, as a real step has."""
    from triton.runtime.interpreter import GridExecutor

    launched = []
    launch = GridExecutor.__call__

    def noting(executor, *args, **kwargs):
        launched.append(executor.fn.__qualname__)
        return launch(executor, *args, **kwargs)

    monkeypatch.setattr(GridExecutor, "__call__", noting)
    model = small(depth=1).train()
    with vit_fast.use_backend("triton"):
        vit_fast.warm(model, [2])
        ahead = launched.copy()
        launched.clear()
        model(torch.randn(2, 3, 32, 32)).square().sum().backward()
    assert launched
    assert sorted(ahead) == sorted(launched)


def test_on_a_cpu_it_returns_at_once():
    model = small()
    passes = Passes(model)
    assert vit_fast.warm(model, [1 << 40]) == [], "not even the images are made"
    assert passes == []


def test_under_pytorchs_backend_there_is_nothing_to_do():
    model = small()
    passes = Passes(model)
    with vit_fast.use_backend("torch"):
        assert vit_fast.warm(model, [2]) == []
    assert passes == []


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_a_pass_leaves_no_trace(training, checkpointing):
    """Drop path and dropout draw random numbers; a gradient is there already; some parameters are frozen."""
    model = small(drop_path_rate=0.5, drop_rate=0.5, proj_drop_rate=0.5).train(training)
    model.set_grad_checkpointing(checkpointing)
    model.cls_token.requires_grad_(False)
    model.head.weight.grad = torch.ones_like(model.head.weight)
    count_steps(model)
    parameters = {name: p.detach().clone() for name, p in model.named_parameters()}
    state = torch.get_rng_state()
    pass_over(model, (4, 3, 32, 32))
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training is training
    assert model.blocks[0].training is training
    assert model.steps == 0
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, parameters[name]), name
        if name == "head.weight":
            assert torch.equal(parameter.grad, torch.ones_like(parameter))
        else:
            assert parameter.grad is None, name
    assert torch.is_grad_enabled()


def test_a_pass_that_fails_leaves_no_trace_either():
    model = small(drop_path_rate=0.5).train()
    count_steps(model)
    state = torch.get_rng_state()

    def fail(*_):
        torch.rand(1)
        raise RuntimeError("a hook of the user's")

    model.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="a hook of the user's"):
        pass_over(model, (1, 3, 32, 32))
    assert torch.equal(torch.get_rng_state(), state)
    assert model.steps == 0


def test_in_inference_mode_a_training_pass_is_still_made():
    model = small().train()
    passes = Passes(model)
    with torch.inference_mode():
        pass_over(model, (1, 3, 32, 32))
        assert torch.is_inference_mode_enabled()
    assert passes[0].backward


def test_a_pass_under_autocast_does_not_spoil_the_next():
    """Autocast keeps a cast of each weight: one made without gradients would give the next step none."""
    model = small().eval()
    passes = Passes(model)
    with torch.autocast("cpu", torch.bfloat16):
        pass_over(model, (1, 3, 32, 32))
        model.train()
        model(torch.randn(2, 3, 32, 32)).float().square().sum().backward()
    assert passes[0].dtype == torch.bfloat16
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_frozen_model_has_no_backward_pass():
    model = small().train().requires_grad_(False)
    passes = Passes(model)
    pass_over(model, (1, 3, 32, 32))
    assert not passes[0].grad


def test_a_parameter_that_no_pass_reads():
    model = small().train()
    model.unread = torch.nn.Parameter(torch.zeros(1))
    pass_over(model, (1, 3, 32, 32))
    assert model.unread.grad is None


@pytest.mark.parametrize(
    ("sizes", "says"),
    [
        ([0], r"sizes: got 0, takes batch, \(batch,\) or \(batch, rows, columns\), each 1 or more"),
        ([4, (1, 32)], r"sizes: got \(1, 32\), takes batch"),
        ([(1, 32, 32.0)], r"sizes: got \(1, 32, 32.0\), takes batch"),
        ([(1, 48, 32)], r"sizes: images: got 48 x 32, takes 32 x 32"),
        (["2"], r"sizes: got '2', takes batch"),
        ([1.5], r"sizes: got 1.5, takes batch"),
        ([True], r"sizes: got True, takes batch"),
        (3, r"sizes: got 3, takes an iterable"),
    ],
)
def test_sizes_that_it_does_not_take(sizes, says):
    with pytest.raises(ValueError, match=says):
        vit_fast.warm(small(), sizes)


def test_another_model():
    with pytest.raises(ValueError, match="model: got Linear, takes a VisionTransformer"):
        vit_fast.warm(torch.nn.Linear(2, 2), [1])


def test_names_of_what_is_compiled(monkeypatch):
    """By Triton's hook after each compilation, beside one of the user's."""
    knobs = pytest.importorskip("triton").knobs
    seen = []

    def mine(**compiled):
        seen.append(compiled["fn"].name)

    monkeypatch.setattr(knobs.runtime, "jit_post_compile_hook", mine)
    with _compiled_names() as names:
        for name in ("_forward_kernel", "_fc1_kernel"):
            knobs.runtime.jit_post_compile_hook(fn=types.SimpleNamespace(name=name), key="", compile={})
    assert names == seen == ["_forward_kernel", "_fc1_kernel"]
    assert knobs.runtime.jit_post_compile_hook is mine
