"""What needs nothing but the package, its requirements and Pillow: each combination of `make compatibility` runs it.

In PyTorch, and in Triton's interpreter where there is Triton; and each of a user's first steps as a program of its own,
under `python -W error`.
"""

import os
import pathlib
import subprocess
import sys

import pytest
import torch

import vit_fast
from tests.error_rule import relative_error
from tests.small_runs import colour_folder, equal_states
from vit_fast import checkpoint, reference, training

ROOT = pathlib.Path(__file__).parent.parent
SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 3}
BACKENDS = ["torch", pytest.param("triton", marks=pytest.mark.interpret)]


def small(**overrides) -> vit_fast.VisionTransformer:
    """A model whose biases and class token are no zeros either."""
    model = vit_fast.VisionTransformer(**SMALL | overrides)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) / 10)
    return model


def pictures(batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, 32, 32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)], ids=["fp32", "bf16"])
def test_the_model_is_the_specification(backend, dtype, bound):
    model, images = small(dtype=dtype).eval(), pictures().to(dtype)
    parameters = {name: tensor.double() for name, tensor in model.state_dict().items()}
    truth = reference.vision_transformer(images.double(), parameters, heads=2)
    with vit_fast.use_backend(backend), torch.no_grad():
        assert relative_error(model(images), truth) < bound


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_are_those_of_the_specification(backend):
    model, images = small(), pictures()
    upstream = torch.randn(2, 3)
    with vit_fast.use_backend(backend):
        model(images).backward(upstream)
    parameters = {name: tensor.detach().double().requires_grad_() for name, tensor in model.state_dict().items()}
    reference.vision_transformer(images.double(), parameters, heads=2).backward(upstream.double())
    for name, parameter in model.named_parameters():
        assert relative_error(parameter.grad, parameters[name].grad) < 1e-5, name


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_into_one_graph(backend):
    model, images = small(), pictures()
    torch.compiler.reset()
    with vit_fast.use_backend(backend):
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(images)
        assert relative_error(compiled.detach(), model(images).detach()) < 1e-5
    compiled.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("backend", BACKENDS)
def test_accelerated_and_restored(backend):
    layer = torch.nn.TransformerEncoderLayer(32, 2, 64, 0.0, "gelu", norm_first=True, batch_first=True)
    tokens = torch.randn(2, 5, 32)
    wanted = layer(tokens)
    vit_fast.accelerate(layer)
    with vit_fast.use_backend(backend):
        assert relative_error(layer(tokens).detach(), wanted.detach()) < 1e-5
    assert vit_fast.restore(layer) == 1
    assert torch.equal(layer(tokens), wanted)


def test_trained_saved_and_read(tmp_path):
    pytest.importorskip("kornia", reason="needs the extra cli")
    colour_folder(tmp_path / "pictures")
    model = {"embed_dim": 16, "depth": 1, "num_heads": 1, "patch_size": 8}
    settings = {"model_kwargs": model, "img_size": 16, "batch_size": 4, "epochs": 1, "workers": 0}
    result = training.train(training.Config(str(tmp_path / "pictures"), str(tmp_path / "run"), **settings))
    network, _ = checkpoint.load(tmp_path / "run")
    assert equal_states(network.state_dict(), result.model.state_dict())
    assert network.predict(tmp_path / "pictures" / "red" / "0.png").shape == (1, 2)


MODEL = """
import torch, vit_fast
model = vit_fast.create_model("vit_tiny_patch16_224", num_classes=3, depth=1, img_size=32)
images = torch.rand(2, 3, 32, 32)
model(images).sum().backward()
with torch.no_grad():
    model.eval()(images), model.rollout_map(images), vit_fast.explain(model)
    torch.compile(model, fullgraph=True, backend="aot_eager")(images)
layer = torch.nn.TransformerEncoderLayer(16, 1, 16, 0.0, "gelu", norm_first=True, batch_first=True)
vit_fast.accelerate(layer)
layer(torch.rand(1, 4, 16)).sum().backward()
vit_fast.restore(layer)
"""
TRAINING = """
import pathlib, tempfile
from tests.small_runs import colour_folder
from vit_fast import checkpoint, training
if __name__ == "__main__":  # workers start by importing this
    with tempfile.TemporaryDirectory() as name:
        colour_folder(pathlib.Path(name, "pictures"))
        small = {"embed_dim": 16, "depth": 1, "num_heads": 1, "patch_size": 8}
        settings = {"model_kwargs": small, "img_size": 16, "batch_size": 4, "epochs": 1}
        training.train(training.Config(name + "/pictures", name + "/run", **settings))
        checkpoint.load(name + "/run")
"""
COMMANDS = """
import sys
from vit_fast import cli
for command in ("models vit_tiny*", "train --help"):
    sys.argv = ["vit-fast", *command.split()]
    try:
        cli.main()
    except SystemExit as end:
        assert not end.code, (command, end.code)
"""
# Let through, as -W takes it.
THIRD_PARTIES = (
    "ignore:Guards may run slower on Python 3.13.0:RuntimeWarning",  # torch.compile, of that one release of Python
    "ignore:`torch.jit.script` is deprecated:DeprecationWarning",  # kornia 0.8.3
    "ignore:'click.utils.get_:DeprecationWarning",  # typer before 0.26 beside click 8.5
)
STEPS = {"import": "import vit_fast", "model": MODEL, "training": TRAINING, "command line": COMMANDS}


@pytest.mark.parametrize("step", STEPS)
def test_warns_of_nothing(step, tmp_path):
    """As `python -W error` runs it: a warning ends the program, but for those of THIRD_PARTIES."""
    if step in ("training", "command line"):
        pytest.importorskip("kornia", reason="needs the extra cli")
    program = tmp_path / "step.py"
    program.write_text(STEPS[step])
    out = ("TRITON_INTERPRET", "PYTHONWARNINGS")
    environment = {name: value for name, value in os.environ.items() if name not in out}
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-W", "error", *(f"-W{known}" for known in THIRD_PARTIES), program],
        env=environment | {"PYTHONPATH": path},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
