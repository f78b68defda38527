"""`pytest benchmarks/`: what is collected, what becomes of samples, and that nobody is timed who is wrong."""

import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="the suite names its version")
pytest.importorskip("timm", reason="what whole models are held to")
pytest.importorskip("pytest_benchmark")

from benchmarks import contenders, gpu, timing, whole_models
from benchmarks.contenders import Case, LeftOut, measure
from vit_fast.ops import backend

ROOT = Path(__file__).parent.parent
SMALL = Case("ln_linear", "tiny", 17, 2, "bf16")


def suite(*options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pytest", "benchmarks", "-p", "no:cacheprovider", *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here: pytest benchmarks/")
def test_table_and_json_are_those_of_the_samples(tmp_path):
    """Min, median and rounds of the JSON are those of its own samples, and contenders stand in one group."""
    chosen = "not compiled and bf16 and ((ln_linear and forward) or (tiny-224 and inference and (vit_fast or timm)))"
    done = suite("-k", chosen, f"--benchmark-json={tmp_path / 'found.json'}", "-rs")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "liger_kernel is not installed" in done.stdout
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["machine_info"]["versions"].keys() >= {"torch", "triton", "vit-fast", "timm"}
    groups = {}
    for one in found["benchmarks"]:
        stats = one["stats"]
        assert stats["rounds"] == len(stats["data"]) == timing.ROUNDS
        assert stats["min"] == min(stats["data"]) > 0
        assert stats["median"] == sorted(stats["data"])[timing.ROUNDS // 2]
        assert f"{one['params']['contender'].replace(' ', '-')}]" in one["name"]
        assert one["params"]["contender"] == "cublas" or 0 < one["extra_info"]["error"] < 0.05
        groups.setdefault(one["group"], set()).add(one["params"]["contender"])
    assert groups["ln_linear-tiny-17-2-bf16-forward"] == {"vit_fast", "eager", "cublas"}
    assert groups["tiny-224-2-bf16-inference"] == {"vit_fast", "timm"}


def test_samples_are_replayed_to_the_digit():
    from benchmarks.conftest import VirtualClock

    clock, seen = VirtualClock(), []

    class Benchmark:
        def pedantic(self, target, rounds, iterations):
            for _ in range(rounds):
                start = clock()
                target()
                seen.append(clock() - start)

    clock.replay(Benchmark(), [2e-6, 5e-4, 1e-5])
    assert seen == pytest.approx([2e-6, 5e-4, 1e-5], rel=1e-12)


@pytest.mark.skipif(torch.cuda.is_available(), reason="its set is another on a GPU")
@pytest.mark.parametrize(("which", "at_least"), [("small", 200), ("main", 200), ("full", 10_000)])
def test_every_set_is_collected(which, at_least):
    done = suite("--collect-only", "-q", "--set", which)
    assert done.returncode == 0, done.stdout + done.stderr
    names = [line for line in done.stdout.splitlines() if "::" in line]
    assert len(names) > at_least
    assert len(names) == len(set(names))


def test_whoever_is_wrong_is_not_timed(monkeypatch):
    off = contenders.OPS["ln_linear"].ours
    wrong = dataclasses.replace(contenders.OPS["ln_linear"], ours=lambda *tensors: 1.1 * off(*tensors))
    monkeypatch.setitem(contenders.OPS, "ln_linear", wrong)
    found = measure(SMALL, ["vit_fast", "eager"])
    assert "the error of its output is 1.0e-01" in found["vit_fast"].wrong
    assert found["vit_fast"].us == {}
    assert len(found["eager"].us["forward"]) == len(found["eager"].us["both"]) == timing.ROUNDS


def test_who_cannot_take_part_says_why(monkeypatch):
    def refuses(case):
        def call(x, *rest):
            raise RuntimeError("no such heads\nand more")

        return call

    def missing(case):
        raise LeftOut("somewhere is not installed")

    peers = {"refuses": refuses, "missing": missing}
    monkeypatch.setitem(contenders.OPS, "ln_linear", dataclasses.replace(contenders.OPS["ln_linear"], peers=peers))
    found = measure(SMALL, ["refuses", "missing", "cublas"])
    assert found["refuses"].left_out == "RuntimeError: no such heads"
    assert found["missing"].left_out == "somewhere is not installed"
    assert found["cublas"].us["forward"]
    assert found["cublas"].error is None, "a product alone is no contender"


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("op", contenders.OPS)
def test_ours_and_eager_agree_with_fp64(op, batch):
    case = Case(op, "tiny", 17, batch, "fp32")
    tensors = contenders._draw(case)
    for name in ("vit_fast", "eager"):
        errors = contenders.errors_of(case, contenders.call_of(case, name), _with_gradients(op, tensors))
        assert max(errors.values()) < 1e-5
        constant = contenders.OPS[op].constant  # the images of patch_embed, bytes or not
        assert list(errors) == ["output", *(f"gradient {at}" for at in range(constant, len(tensors)))]
        assert errors["output"] > 0


@pytest.mark.parametrize(("model", "tokens"), [("tiny", 17), ("S", 201)])
def test_every_form_of_rotary_positions_agrees_with_fp64(model, tokens):
    case = Case("rope_attention", model, tokens, 2, "fp32")
    tensors = _with_gradients(case.op, contenders._draw(case))
    for name in ("vit_fast", "eager", "sdpa flash"):
        assert max(contenders.errors_of(case, contenders.call_of(case, name), tensors).values()) < 1e-5, name


def test_the_tables_of_rotary_positions_are_dinov3s():
    """Those that transformers makes, and what it makes of them."""
    dinov3 = pytest.importorskip("transformers.models.dinov3_vit.modeling_dinov3_vit")
    config = dinov3.DINOv3ViTConfig(hidden_size=384, num_attention_heads=6, image_size=224, patch_size=16)
    theirs = dinov3.DINOv3ViTRopePositionEmbedding(config).eval()(torch.empty(1, 3, 224, 224))
    tables = contenders._rope_settings(Case("rope_attention", "S", 201, 2, "fp32"))
    for ours, other in zip(tables.values(), theirs, strict=True):
        torch.testing.assert_close(ours, other, rtol=0, atol=1e-5)
    q, k = torch.randn(2, 1, 6, 201, 64)
    assert torch.equal(contenders._turned(q, **tables), dinov3.apply_rotary_pos_emb(q, k, **tables)[0])


@pytest.mark.parametrize("stage", ["tiny", "Swin-T 3", "Swin-B 4"])
def test_every_form_of_windows_agrees_with_fp64(stage):
    """Shifted, but for the last stage, which is one window."""
    case = Case("window_attention", stage, 0, 2, "fp32")
    assert contenders._settings(case)["shift"] == {"tiny": 1, "Swin-T 3": 3, "Swin-B 4": 0}[stage]
    tensors = _with_gradients(case.op, contenders._draw(case))
    for name in ("vit_fast", "eager", "sdpa"):
        assert max(contenders.errors_of(case, contenders.call_of(case, name), tensors).values()) < 1e-5, name


def test_rates_of_a_model():
    """A ViT-B's 17.6 GMACs an image, as its paper and timm's table have them; three times that in training."""
    case = whole_models.ModelCase("B", 224, 64, "bf16", "inference")
    rates = whole_models.rates(case, 64e3)
    assert rates["images_per_second"] == pytest.approx(1000)
    assert rates["tflops"] == pytest.approx(35.2, rel=0.01)
    training = whole_models.rates(case._replace(direction="training"), 64e3)
    assert training["tflops"] == pytest.approx(3 * rates["tflops"])


def _with_gradients(op: str, tensors: tuple) -> tuple:
    for tensor in tensors[contenders.OPS[op].constant :]:
        tensor.requires_grad_()
    return tensors


class _Forgets(torch.autograd.Function):
    """A tensor, but of its gradient the last row is forgotten."""

    @staticmethod
    def forward(ctx, y):
        return y.clone()

    @staticmethod
    def backward(ctx, dy):
        return torch.cat([dy[:-1], 0 * dy[-1:]])


@pytest.mark.parametrize("what", ["output", "gradient 0", "gradient 3"])
def test_a_contender_is_held_to_fp64_as_it_is_timed(monkeypatch, what):
    """On the whole batch: one that leaves out an image of many, or a row of a weight's gradient, is not timed."""
    case = SMALL._replace(batch=5)
    eager = contenders.OPS[case.op].eager

    def broken(*tensors):
        if what == "output":
            y = eager(*tensors)
            return torch.cat([y[:-1], 0 * y[-1:]]) if len(y) > 2 else y
        return eager(*(_Forgets.apply(t) if what == f"gradient {at}" else t for at, t in enumerate(tensors)))

    peers = {"broken": lambda case: broken}
    monkeypatch.setitem(contenders.OPS, case.op, dataclasses.replace(contenders.OPS[case.op], peers=peers))
    found = measure(case, ["broken", "eager"])
    assert found["broken"].wrong.startswith(f"the error of its {what} is ")
    assert not found["broken"].us
    assert found["eager"].us["both"]


def test_a_peer_that_holds_its_parameters_gets_the_cases():
    """As transformer_engine's modules do: its gradients are those of its own parameters."""
    module = torch.nn.Linear(6, 4)
    peer = contenders._Held(module, ("weight", "bias"), residual=False)
    x, weight, bias = torch.randn(3, 6, requires_grad=True), torch.randn(4, 6), torch.randn(4)
    torch.testing.assert_close(peer(x, weight, bias), torch.nn.functional.linear(x, weight, bias))
    gradients = contenders._both(peer, 0, torch.ones(3, 4), x, weight, bias)
    assert [g.shape for g in gradients] == [x.shape, weight.shape, bias.shape]


def test_contenders_take_turns_in_both_orders():
    order = []
    runs = {name: lambda name=name: order.append(name) for name in "ab"}
    found = timing.time_in_turn(runs, rounds=2, shortest=0.0)
    assert order[-4:] == ["b", "a", "a", "b"]
    assert all(len(samples) == 2 for samples in found.values())


def test_contenders_apart_run_once_in_an_empty_memory_before_they_count(monkeypatch):
    order = []
    monkeypatch.setattr(timing, "empty_memory", lambda: order.append("-"))
    runs = {name: lambda name=name: order.append(name) for name in "ab"}
    timing.time_in_turn(runs, rounds=1, apart=True, shortest=0.0)
    assert order[-6:] == ["-", "b", "b", "-", "a", "a"]


def test_the_device_is_asked_under_the_load_of_a_run(monkeypatch):
    assert timing.state_under(lambda: 0) == {}, "on a CPU there is nothing to ask"
    calls, seen = [], []

    def asked():
        before = len(calls)
        time.sleep(0.2)
        seen.extend((before, len(calls)))
        return {"clock_mhz": 1500.0}

    monkeypatch.setattr(timing, "DEVICE", "cuda")
    monkeypatch.setattr(timing, "device_state", asked)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: time.sleep(0.001))
    assert timing.state_under(lambda: calls.append(1)) == {"clock_mhz": 1500.0}
    assert 10 < seen[0] < seen[1], "it ran before, and it runs meanwhile"


def test_short_runs_are_called_often_enough_for_the_clock():
    calls = []
    timing.time_in_turn({"short": lambda: calls.append(1)}, rounds=1)
    assert len(calls) > 50


@pytest.mark.parametrize("whose", whole_models.PEERS)
def test_every_library_has_the_same_model(whose):
    """By its number of parameters, and by logits that are its own weights' in fp64."""
    case = whole_models.ModelCase("tiny", 224, 2, "fp32", "inference")
    try:
        model = whole_models.draw_anew(whole_models.PEERS[whose](case)).eval()
    except LeftOut as reason:
        pytest.skip(str(reason))
    ours = whole_models.PEERS["vit_fast"](case)
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in ours.parameters())
    images = torch.randn(2, 3, 224, 224)
    assert 0 < whole_models.error_of(model(images), whole_models.truth_of(model, images)) < 1e-4


def test_a_model_is_held_to_fp64_in_the_form_that_is_timed(monkeypatch):
    """A compiler that makes something else of it: only that form is wrong."""
    monkeypatch.setattr(whole_models, "compiled", lambda model, mode: lambda images: 0 * model(images))
    monkeypatch.setattr(timing, "ROUNDS", 1)
    case = whole_models.ModelCase("tiny", 224, 2, "fp32", "inference")
    found = whole_models.measure(case, ["vit_fast", "vit_fast compiled"], rounds=1)
    assert found["vit_fast"].us
    assert found["vit_fast compiled"].wrong.startswith("ValueError: its error is 1.0e+00")
    assert not found["vit_fast compiled"].us


HUB = """
import torch

def dinov2_vits14(*, pretrained, img_size, patch_size, init_values):
    assert (pretrained, img_size, patch_size, init_values) == (False, 224, 16, None)
    return torch.nn.Sequential(torch.nn.AvgPool2d(img_size // 16), torch.nn.Flatten(), torch.nn.Linear(3 * 16**2, 384))
"""


def test_dinov2_comes_from_a_clone_alone(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    case = whole_models.ModelCase("S", 224, 2, "fp32", "inference")
    with pytest.raises(LeftOut, match="no clone of facebookresearch/dinov2"):
        whole_models.PEERS["dinov2"](case)
    (tmp_path / "facebookresearch_dinov2_main").mkdir()
    (tmp_path / "facebookresearch_dinov2_main/hubconf.py").write_text(HUB)
    assert whole_models.PEERS["dinov2"](case)(torch.randn(2, 3, 224, 224)).shape == (2, 1000)
    with pytest.raises(LeftOut, match="no model of this size"):
        whole_models.PEERS["dinov2"](case._replace(model="H"))


def test_no_timed_call_compiles(monkeypatch):
    """Whatever a compiled contender compiles it has compiled before its time counts, and it has compiled something."""
    graphs, seen = [], []
    compiler, timer = torch.compile, timing.time_in_turn

    def keep(graph, _):
        graphs.append(graph)
        return graph

    def timed(*args, **options):
        before = len(graphs)
        samples = timer(*args, **options)
        seen.append((before, len(graphs)))
        return samples

    monkeypatch.setattr(torch, "compile", lambda what, mode, dynamic: compiler(what, backend=keep, dynamic=dynamic))
    monkeypatch.setattr(timing, "time_in_turn", timed)
    assert measure(SMALL, ["compiled"])["compiled"].us["both"]
    models = [whole_models.ModelCase("tiny", 224, 2, "fp32", way) for way in ("inference", "training")]
    for case in models:
        assert whole_models.measure(case, ["timm compiled", "vit_fast compiled"], rounds=1)["vit_fast compiled"].us
    assert len(seen) == 4
    so_far = 0
    for before, after in seen[:1] + seen[2:]:  # the op's forward and both are compiled before either is timed
        assert so_far < before == after
        so_far = after
    assert seen[1][0] == seen[1][1]


def test_on_a_gpu_kernels_are_timed_and_not_what_auto_runs_for_them(monkeypatch):
    """Else what was measured would decide what is measured."""
    seen = []
    ours = dataclasses.replace(contenders.OPS["mlp"], ours=lambda *_, **__: seen.append(backend.chosen_backend()))
    monkeypatch.setitem(contenders.OPS, "mlp", ours)
    monkeypatch.setattr(contenders, "DEVICE", "cuda")
    contenders.call_of(SMALL._replace(op="mlp"), "vit_fast")()
    assert seen == ["triton"]


def test_channels_last_is_the_layout_before_the_clock_starts(monkeypatch):
    layouts, call = [], contenders._conv2d

    def noted(images, weight, *others):
        layouts.append([t.is_contiguous(memory_format=torch.channels_last) for t in (images, weight)])
        return call(images, weight, *others)

    monkeypatch.setattr(contenders, "_conv2d", noted)
    found = measure(SMALL._replace(op="patch_embed"), ["channels last"], rounds=1)["channels last"]
    assert found.us["both"]
    assert layouts
    assert all(layout == [True, True] for layout in layouts)


def failing(monkeypatch, name: str, error: Exception) -> None:
    """Have a contender of an op fail when it is called."""
    call_of = contenders.call_of

    def replaced(case, which):
        def call(*_):
            raise error

        return call if which == name else call_of(case, which)

    monkeypatch.setattr(contenders, "call_of", replaced)


def test_without_eager_pytorch_nobody_can_be_held_to_it(monkeypatch):
    failing(monkeypatch, "eager", torch.OutOfMemoryError("CUDA out of memory"))
    found = contenders.measure(SMALL, ["vit_fast", "eager"])
    assert all("eager PyTorch" in one.left_out and "out of memory" in one.left_out for one in found.values())
    assert found.keys() == {"vit_fast", "eager"}


def test_who_takes_the_device_with_it_is_named_and_nobody_is_timed(monkeypatch):
    failing(monkeypatch, "cublas", RuntimeError("CUDA error: an illegal memory access was encountered"))
    found = contenders.measure(SMALL, ["vit_fast", "cublas", "eager"])
    assert "illegal memory access" in found["cublas"].left_out
    assert found["vit_fast"].left_out == found["eager"].left_out == "the device was lost to cublas"
    with pytest.raises(SystemExit, match="illegal memory access"):
        gpu.end_where_lost({name: one.left_out for name, one in found.items()})
