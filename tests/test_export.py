"""A model for inference in the two forms that PyTorch exports to other programs, held to the eager model's numbers.

Other batches than the example's: the batch is free in both.
"""

import shutil

import pytest
import torch

import vit_fast
from tests.error_rule import relative_error

# What timm's names have between them: class and register tokens or none, three pools, layer scale, norms of q and k.
MODELS = {
    "class token": {},
    "registers, layer scale, q and k normed": {"reg_tokens": 2, "init_values": 0.1, "qk_norm": True},
    "attention pool": {"class_token": False, "global_pool": "map", "act_layer": "gelu_tanh"},
}
BATCH = ({0: torch.export.Dim("batch", min=1, max=64)},)


def small(**options) -> vit_fast.VisionTransformer:
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
    model = vit_fast.VisionTransformer(**sizes, **options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) / 10)
    return model


def pictures(batch: int) -> torch.Tensor:
    return torch.randn(batch, 3, 16, 16)


@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
def test_onnx(options, tmp_path):
    onnx = pytest.importorskip("onnx", reason="needs onnx, of the extra export")
    pytest.importorskip("onnxscript", reason="needs onnxscript, of the extra export")
    model, path = small(**options), tmp_path / "model.onnx"
    torch.onnx.export(model, (pictures(2),), path, dynamo=True, dynamic_shapes=BATCH, verbose=False)
    onnx.checker.check_model(path, full_check=True)
    images = pictures(5)
    with torch.no_grad():
        logits = model(images)
    assert relative_error(torch.from_numpy(evaluated(path, images.numpy())), logits) < 1e-5


@pytest.mark.parametrize("options", [*MODELS.values(), "timm"], ids=[*MODELS, "timm, accelerated"])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_onnx_by_tracing(options, tmp_path):
    """The older exporter, which takes for constants what Python reads of a shape."""
    pytest.importorskip("onnx", reason="needs onnx, of the extra export")
    if options == "timm":
        timm = pytest.importorskip("timm")
        model = timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=32, depth=2, num_heads=2)
        vit_fast.accelerate(model.eval())
    else:
        model = small(**options)
    path, images = tmp_path / "model.onnx", pictures(5)
    axes = {"images": {0: "batch"}}
    torch.onnx.export(model, (pictures(2),), path, dynamo=False, input_names=["images"], dynamic_axes=axes)
    with torch.no_grad():
        assert relative_error(torch.from_numpy(evaluated(path, images.numpy())), model(images)) < 1e-5


def evaluated(path, images):
    """What ONNX Runtime makes of it, or where that is not installed onnx's own evaluator, which is slower."""
    try:
        from onnxruntime import InferenceSession
    except ImportError:
        from onnx.reference import ReferenceEvaluator as InferenceSession
    session = InferenceSession(str(path))
    name = getattr(session, "input_names", None) or [taken.name for taken in session.get_inputs()]
    return session.run(None, {name[0]: images})[0]


@pytest.mark.slow  # a C++ compiler takes half a minute for it
def test_aot_inductor(tmp_path):
    if not shutil.which("c++") and not shutil.which("g++"):
        pytest.skip("AOTInductor needs a C++ compiler: neither c++ nor g++ is on the PATH")
    model = small(**MODELS["registers, layer scale, q and k normed"])
    program = torch.export.export(model, (pictures(2),), dynamic_shapes=BATCH)
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    images = pictures(5)
    with torch.no_grad():
        assert relative_error(torch._inductor.aoti_load_package(package)(images), model(images)) < 1e-5
