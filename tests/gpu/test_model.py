"""Whole models on a device against timm: fp32, pure bf16 and autocast, eager, compiled and in a CUDA graph."""

import pytest
import torch

import vit_fast
from tests.error_rule import assert_close_to_truth

timm = pytest.importorskip("timm")

NAMES = [
    "vit_tiny_patch16_224",
    "deit3_small_patch16_224",
    "vit_small_patch14_reg4_dinov2",
    "vit_base_patch16_clip_quickgelu_224",
]


def _pair(name: str, dtype: torch.dtype):
    """Ours and timm's with the same parameters, every one drawn anew, at depth 2."""
    options = {"depth": 2, "num_classes": 10, "img_size": 112}
    theirs = timm.create_model(name, **options)
    ours = vit_fast.create_model(name, **options)
    for parameter in theirs.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, 0.5, 0.3)
        else:
            torch.nn.init.normal_(parameter, 0.0, 0.05)
    ours.load_state_dict(theirs.state_dict())
    return ours.to("cuda", dtype).eval(), theirs.to("cuda", dtype).eval()


def _run(model, images, upstream):
    output = model(images)
    gradients = torch.autograd.grad(output, list(model.parameters()), upstream.to(output.dtype))
    return {"logits": output.detach()} | {name: g for (name, _), g in zip(model.named_parameters(), gradients)}


@pytest.mark.parametrize("mode", ["fp32", "bf16", "autocast"])
@pytest.mark.parametrize("name", NAMES)
def test_logits_and_gradients(name, mode):
    ours, theirs = _pair(name, torch.bfloat16 if mode == "bf16" else torch.float32)
    images = torch.randn(4, 3, 112, 112, device="cuda")
    images = images.bfloat16() if mode == "bf16" else images
    upstream = torch.randn(4, 10, device="cuda")
    with torch.autocast("cuda", torch.bfloat16, enabled=mode == "autocast"):
        got, peer = _run(ours, images, upstream), _run(theirs, images, upstream)
    truth = _run(theirs.double(), images.double(), upstream.double())
    for key in truth:
        assert_close_to_truth(got[key], peer[key], truth[key], key)


def test_every_block_runs_kernels():
    ours, _ = _pair(NAMES[0], torch.bfloat16)
    lines = list(vit_fast.explain(ours))
    blocks = [line for line in lines if line.name.startswith("blocks.")]
    assert blocks
    assert all(line.backend == "triton" for line in blocks), "\n".join(map(str, blocks))


@pytest.mark.parametrize("training", [False, True])
def test_compiled_equals_eager(training):
    ours, _ = _pair(NAMES[0], torch.bfloat16)
    images = torch.randn(4, 3, 112, 112, device="cuda", dtype=torch.bfloat16)
    compiled = torch.compile(ours, fullgraph=True)
    with torch.set_grad_enabled(training):
        torch.testing.assert_close(compiled(images), ours(images), rtol=2e-2, atol=2e-2)


def test_inference_in_a_cuda_graph():
    ours, _ = _pair(NAMES[0], torch.bfloat16)
    images = torch.randn(4, 3, 112, 112, device="cuda", dtype=torch.bfloat16)
    with torch.inference_mode():
        for _ in range(3):
            expected = ours(images)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = ours(images)
        captured.zero_()
        graph.replay()
        torch.cuda.synchronize()
    assert torch.equal(captured, expected)


def test_a_step_from_another_thread():
    """Backward runs on autograd's thread: a training step from a thread that is not the main one works."""
    import threading

    ours, _ = _pair(NAMES[0], torch.bfloat16)
    images = torch.randn(2, 3, 112, 112, device="cuda", dtype=torch.bfloat16)
    norms = []

    def step():
        ours(images).float().square().sum().backward()
        norms.append(sum(p.grad.float().norm().item() for p in ours.parameters()))

    thread = threading.Thread(target=step)
    thread.start()
    thread.join()
    assert norms
    assert norms[0] > 0
