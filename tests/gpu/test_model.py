"""Whole models on a device against timm: fp32, pure bf16 and autocast, eager, compiled and in a CUDA graph."""

import math
import threading

import pytest
import torch

import vit_fast
from tests.error_rule import assert_close_to_truth
from tests.gpu.conftest import captured_in_a_graph

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


def _images(dtype: torch.dtype = torch.bfloat16):
    return torch.randn(4, 3, 112, 112, device="cuda", dtype=dtype)


def _run(model, images, upstream):
    output = model(images)
    gradients = torch.autograd.grad(output, list(model.parameters()), upstream.to(output.dtype))
    return {"logits": output.detach()} | {name: g for (name, _), g in zip(model.named_parameters(), gradients)}


def _assert_close(got: dict, peer: dict, truth: dict) -> None:
    assert set(got) == set(peer) == set(truth)
    for key in truth:
        # In norm over the whole tensor, for the reason that tests/test_parity.py gives: in a gradient through a model
        # some row cancels to almost nothing.
        assert_close_to_truth(*(found[key].flatten() for found in (got, peer, truth)), key)


@pytest.mark.parametrize("mode", ["fp32", "bf16", "autocast"])
@pytest.mark.parametrize("name", NAMES)
def test_logits_and_gradients(name, mode):
    dtype = torch.bfloat16 if mode == "bf16" else torch.float32
    ours, theirs = _pair(name, dtype)
    images, upstream = _images(dtype), torch.randn(4, 10, device="cuda")
    with torch.autocast("cuda", torch.bfloat16, enabled=mode == "autocast"):
        got, peer = _run(ours, images, upstream), _run(theirs, images, upstream)
    _assert_close(got, peer, _run(theirs.double(), images.double(), upstream.double()))


@pytest.mark.parametrize("mode", ["fp32", "bf16", "autocast"])
def test_the_last_block_of_many_tokens(mode):
    """So many that it computes the class token alone: logits and gradients by the error rule."""
    dtype = torch.bfloat16 if mode == "bf16" else torch.float32
    ours, theirs = _pair(NAMES[0], dtype)
    images, upstream = torch.randn(64, 3, 112, 112, device="cuda", dtype=dtype), torch.randn(64, 10, device="cuda")
    seen = []
    ours.blocks[-1].first_tokens = lambda *args: (
        seen.append(args[1]) or type(ours.blocks[-1]).first_tokens(ours.blocks[-1], *args)
    )
    with torch.autocast("cuda", torch.bfloat16, enabled=mode == "autocast"):
        got, peer = _run(ours, images, upstream), _run(theirs, images, upstream)
    assert seen == [1]
    _assert_close(got, peer, _run(theirs.double(), images.double(), upstream.double()))


def test_every_block_runs_kernels():
    ours, _ = _pair(NAMES[0], torch.bfloat16)
    lines = list(vit_fast.explain(ours))
    blocks = [line for line in lines if line.name.startswith("blocks.")]
    assert blocks
    assert all(line.backend == "triton" for line in blocks), "\n".join(map(str, blocks))


@pytest.mark.parametrize("training", [False, True])
def test_compiled_equals_eager(training):
    """No further from the truth than eager is, by the error rule: logits, and in training each gradient."""
    ours, theirs = _pair(NAMES[0], torch.bfloat16)
    images, upstream = _images(), torch.randn(4, 10, device="cuda", dtype=torch.bfloat16)

    def results(model, images):
        if training:
            return _run(model.train(), images, upstream)
        with torch.no_grad():
            return {"logits": model(images)}

    eager, truth = results(ours, images), results(theirs.double(), images.double())
    ours.compile(fullgraph=True)
    _assert_close(results(ours, images), eager, truth)


def test_a_compiled_model_keeps_its_kernels():
    """As in tests/test_model.py, by the choice that `auto` makes."""
    ours, _ = _pair(NAMES[0], torch.bfloat16)
    found = set()

    def keep(graph, example_inputs):
        found.update(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    with torch.no_grad():
        torch.compile(ours, fullgraph=True, backend=keep)(_images())
    for op in ("patch_embed", "block"):
        assert any(f"vit_fast.{op}" in target for target in found), (op, found)


def test_inference_in_a_cuda_graph():
    ours, _ = _pair(NAMES[0], torch.bfloat16)
    images = _images()
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


def test_bytes_in_a_cuda_graph():
    """Captured, which no copy from the host would be, and replayed on pictures that it was not captured with; as near
    to fp64 as timm's model is on the same pictures normalised."""
    ours, theirs = _pair(NAMES[0], torch.bfloat16)
    images, others = torch.randint(0, 256, (2, 4, 112, 112, 3), device="cuda", dtype=torch.uint8).permute(0, 1, 4, 2, 3)
    with torch.inference_mode():
        expected = ours(others)
        graph, (captured,), _ = captured_in_a_graph(lambda: (ours(images),))
        images.copy_(others)
        graph.replay()
        torch.cuda.synchronize()
        mean, std = (others.new_tensor(ours.pretrained_cfg[name], dtype=torch.float64) for name in ("mean", "std"))
        pixels = (others.double() / 255 - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)
        peer, truth = theirs(pixels.float().bfloat16()), theirs.double()(pixels)
    assert torch.equal(captured, expected)
    assert_close_to_truth(captured.flatten(), peer.flatten(), truth.flatten(), "logits")


@pytest.mark.parametrize("name", ["vit_large_patch16_224", "vit_huge_patch14_224"])
def test_eagerly_after_a_graph_of_the_same_model(name):
    """As benchmarks/whole_models.py does it, where that ended in an illegal access once: there nobody held the model of
    the graph (docs/performance.md)."""
    with torch.device("cuda"):
        model = vit_fast.create_model(name, num_classes=10).bfloat16().eval()
    images = torch.randn(256, 3, 224, 224, device="cuda", dtype=torch.bfloat16)
    with torch.inference_mode(), vit_fast.use_backend("triton"):
        first = model(images)
        side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            model(images)
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(graph):
            captured = model(images)
        graph.replay()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        again = [model(images) for _ in range(3)]
        torch.cuda.synchronize()
    assert all(torch.equal(one, first) for one in (captured, *again))


def test_a_training_step_in_a_cuda_graph():
    """Captured as PyTorch's documents say; replayed on pictures that it was not captured with."""
    ours, theirs = _pair(NAMES[0], torch.bfloat16)
    ours.train()
    images, upstream = _images(), torch.randn(4, 10, device="cuda", dtype=torch.bfloat16)
    others = torch.randn_like(images)
    expected = _run(ours, others, upstream)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            ours.zero_grad(set_to_none=True)
            ours(images).backward(upstream)
    torch.cuda.current_stream().wait_stream(side)

    ours.zero_grad(set_to_none=True)  # so that the gradients lie in the graph's own memory, and a replay writes them
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = ours(images)
        logits.backward(upstream)
    images.copy_(others)
    graph.replay()
    torch.cuda.synchronize()
    got = {"logits": logits.detach()} | {name: parameter.grad for name, parameter in ours.named_parameters()}
    _assert_close(got, expected, _run(theirs.double(), others.double(), upstream.double()))


def test_a_step_from_another_thread():
    """Backward runs on autograd's thread: a training step from a thread that is not the main one works."""
    ours, _ = _pair(NAMES[0], torch.bfloat16)
    images = _images()
    norms = []

    def step():
        ours(images).float().square().sum().backward()
        norms.append(sum(p.grad.float().norm().item() for p in ours.parameters()))

    thread = threading.Thread(target=step)
    thread.start()
    thread.join()
    assert norms
    assert norms[0] > 0


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices, torch sees fewer")
def test_on_the_second_device():
    """Kernels run where their tensors are, while the first device stays the current one."""
    ours, theirs = _pair(NAMES[0], torch.bfloat16)
    images, upstream = _images(), torch.randn(4, 10, device="cuda")
    first, truth = _run(ours, images, upstream), _run(theirs.double(), images.double(), upstream.double())
    second = _run(ours.to("cuda:1"), images.to("cuda:1"), upstream.to("cuda:1"))
    assert torch.cuda.current_device() == 0
    assert {tensor.device.index for tensor in second.values()} == {1}
    _assert_close(second, first, truth)


def test_nan_in_one_picture_harms_no_other():
    ours, _ = _pair(NAMES[0], torch.bfloat16)
    images = _images()
    with torch.no_grad():
        clean = ours(images)
        images[1, 0, 0, 0] = math.nan
        logits = ours(images)
    assert torch.isnan(logits[1]).all()
    assert torch.equal(logits[[0, 2, 3]], clean[[0, 2, 3]])


def test_channels_last_images():
    """The kernels read any strides: the same numbers in the same order, so the same bits."""
    ours, _ = _pair(NAMES[0], torch.bfloat16)
    images, upstream = _images(), torch.randn(4, 10, device="cuda")
    packed = _run(ours, images, upstream)
    strided = _run(ours, images.to(memory_format=torch.channels_last), upstream)
    for key in packed:
        assert torch.equal(strided[key], packed[key]), key


@pytest.mark.parametrize("batch", [4, 16])
def test_an_image_has_the_same_bits_in_two_batches_of_a_class(batch):
    """200 and 400 rows take the same tiles, and so do 800 and 1,600, whose last block computes the class token alone;
    the interpreter cannot say in which order a product sums."""
    ours, _ = _pair(NAMES[0], torch.bfloat16)
    images = torch.randn(2 * batch, 3, 112, 112, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(ours(images)[:batch], ours(images[:batch]))


def test_two_trainings_end_in_the_same_bits():
    """200 steps each: every gradient is summed in the same order in each run."""

    def trained():
        torch.manual_seed(0)
        model = vit_fast.create_model(NAMES[0], depth=2, num_classes=10, img_size=112).to("cuda", torch.bfloat16)
        optimiser = torch.optim.AdamW(model.parameters(), 1e-3, fused=True)
        images, labels = _images(), torch.arange(4, device="cuda")
        for _ in range(200):
            optimiser.zero_grad()
            torch.nn.functional.cross_entropy(model(images).float(), labels).backward()
            optimiser.step()
        return model.state_dict()

    first, second = trained(), trained()
    assert all(torch.equal(first[name], second[name]) for name in first)
