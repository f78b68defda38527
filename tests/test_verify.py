"""`vit-fast env`, with and without --verify: every entry of the tables is reached, and a wrong one is seen."""

import math
import pathlib

import pytest
import torch
import vit_fast.kernels

from vit_fast import ops, verify
from vit_fast.ops import backend

pytestmark = pytest.mark.interpret

TILES = pathlib.Path(vit_fast.kernels.__file__).parent / "tiles"
CASE = {case.op: case for case in verify.SMALL}


def entries(table: dict) -> set[tuple[str, str, str]]:
    return {
        (kernel, dtype, shape) for kernel, by in table.items() for dtype, classes in by.items() for shape in classes
    }


@pytest.mark.parametrize("architecture", sorted(path.stem for path in TILES.glob("*.json")))
def test_the_cases_reach_every_entry(architecture, monkeypatch):
    """With that architecture's table, and no kernel really launched: what counts is which entries are looked up."""
    from triton.runtime.interpreter import GridExecutor
    from vit_fast.kernels import tile_table

    monkeypatch.setattr(GridExecutor, "__call__", lambda *args, **kwargs: None)
    monkeypatch.setattr(tile_table, "architecture", lambda device: architecture)
    with tile_table.recording() as reached, ops.use_backend("triton"):
        for dtype in verify.DTYPES:
            for case in verify.EVERY_CLASS:
                tensors = [
                    torch.empty(s, dtype=dtype, requires_grad=n >= case.spared) for n, s in enumerate(case.shapes)
                ]
                output = case.call(*tensors)
                if output.requires_grad:
                    torch.autograd.grad(output, tensors[case.spared :], torch.empty_like(output))
    tile_table.forget()
    assert entries(tile_table.table(architecture)) - set(reached) == set(), "no case of verify.EVERY_CLASS comes there"


def test_every_op_has_a_case():
    names = {name for name in ops.__all__ if name != "use_backend"}
    assert names == {case.op for case in verify.SMALL}
    assert names == {case.op for case in verify.EVERY_CLASS}


def verified(*names: str) -> list[dict]:
    return verify.verify_entries("cpu", [CASE[name] for name in names], [torch.float32])


def lines_of(*names: str) -> dict[str, dict]:
    """kernel → the line of the entry that the small cases of these ops come to."""
    return {line["kernel"]: line for line in verified(*names) if line["agrees"] is not None}


def shape_of(op: str, kernel: str) -> str:
    return lines_of(op)[kernel]["shape"]


def test_one_line_an_entry():
    from vit_fast.kernels import tile_table

    lines = verified("mlp", "attention_qkv")
    table = tile_table.table("interpreter")
    expected = [(kernel, shape) for kernel, dtype, shape in entries(table) if dtype == "32"]
    assert sorted((line["kernel"], line["shape"]) for line in lines) == sorted(expected)
    reached = {line["kernel"]: line for line in lines if line["agrees"] is not None}
    for name in ("mlp_fc1", "mlp_hidden_grad", "linear_residual_forward", "linear_weight_grad"):
        line = reached[name]
        assert line["agrees"] is True, line
        assert 0 < line["error"] < 1e-6, line
        assert (line["dtype"], line["origin"], line["why"]) == ("float32", "predicted", "")
    unreached = [line for line in lines if line["agrees"] is None]
    assert "patch_embed_forward" in {line["kernel"] for line in unreached}
    assert all(math.isnan(line["error"]) and line["why"] == "no case came to it" for line in unreached)


def skew(monkeypatch, module: str, function: str, factor: float, index: int = 0):
    """A kernel's launch function whose result `index` is off by a factor."""
    from importlib import import_module

    kernel = import_module(f"vit_fast.kernels.{module}")
    launch = getattr(kernel, function)

    def wrong(*args, **kwargs):
        results = launch(*args, **kwargs)
        if isinstance(results, tuple):
            return tuple(r * factor if n == index else r for n, r in enumerate(results))
        return results * factor

    monkeypatch.setattr(kernel, function, wrong)


@pytest.mark.parametrize("factor", [1 + 1e-5, math.nan])
def test_a_wrong_gradient_is_laid_on_the_backward_pass_alone(monkeypatch, factor):
    skew(monkeypatch, "linear_residual", "input_grad", factor)
    lines = lines_of("linear_residual", "patch_embed")
    assert lines["linear_input_grad"]["agrees"] is False
    assert lines["linear_residual_forward"]["agrees"] is True
    assert lines["patch_embed_forward"]["agrees"] is True, "of another op, whose results are right"


def test_the_gradient_of_a_table_counts(monkeypatch):
    skew(monkeypatch, "window_attention", "backward", 1 + 1e-5, index=1)
    lines = lines_of("window_attention")
    assert lines["window_attention_forward"]["agrees"] is True
    assert lines["window_attention_grad"]["agrees"] is False


@pytest.mark.parametrize("back", [False, True])
def test_a_wrong_turn_is_laid_on_the_pass_that_makes_it(monkeypatch, back):
    """Forward or back. There is no entry of its own: attention's is beside it."""
    from vit_fast.kernels import rope

    turn = rope.rotate

    def wrong(x, y, cos, sin, interleaved, its_way):
        turn(x, y, cos, sin * (1 + 1e-4 * (its_way == back)), interleaved, its_way)

    monkeypatch.setattr(rope, "rotate", wrong)
    lines = lines_of("rope_attention")
    assert lines["attention_forward"]["agrees"] is back
    assert lines["attention_grad"]["agrees"] is False


def test_the_worst_of_several_cases_counts(monkeypatch):
    """linear_input_grad serves both ops and is wrong in one: the order of the cases must not matter."""
    skew(monkeypatch, "ln_linear", "input_grad", 1.1)
    for names in (("linear_residual", "ln_linear"), ("ln_linear", "linear_residual")):
        line = lines_of(*names)["linear_input_grad"]
        assert line["agrees"] is False
        assert line["error"] > 0.05


def test_one_wrong_element_is_seen():
    """In norm over the whole it would pass in half precision; its row gives it away."""
    trial = verify.Trial(
        CASE["ln_linear"]._replace(shapes=[(8, 64, 32), (32,), (32,), (96, 32), (96,)]), "cpu", torch.bfloat16
    )
    with ops.use_backend("torch"):
        output = trial.forward().detach()
    assert trial.judge([output])[1]
    output[0, 0, 0] += 0.1 * trial.truth[0][0, 0].abs().max()
    error, agrees = trial.judge([output])
    assert error <= trial.limits[0][0], "the whole tensor's norm alone lets it pass"
    assert not agrees


def test_a_tile_that_does_not_launch_is_named(monkeypatch):
    from vit_fast.kernels import tile_table

    shape = shape_of("mlp", "mlp_hidden_grad")
    entry = {**tile_table.table("interpreter")["mlp_hidden_grad"]["32"][shape], "BLOCK_M": 24}  # no power of two
    with tile_table.using("interpreter", "mlp_hidden_grad", "32", shape, entry):
        lines = lines_of("mlp")
    assert lines["mlp_fc1"]["agrees"] is True
    line = lines["mlp_hidden_grad"]
    assert line["agrees"] is False
    assert "power of 2" in line["why"]


def test_a_measured_origin_is_told():
    from vit_fast.kernels import tile_table

    origin = {"device": "NVIDIA H100", "date": "2026-01-02", "triton": "3.6.0", "torch": "2.11.0"}
    shape = shape_of("mlp", "mlp_fc1")
    entry = {**tile_table.table("interpreter")["mlp_fc1"]["32"][shape], "origin": origin}
    with tile_table.using("interpreter", "mlp_fc1", "32", shape, entry):
        line = lines_of("mlp")["mlp_fc1"]
    assert line["origin"] == "measured on NVIDIA H100, 2026-01-02, triton 3.6.0, torch 2.11.0"


def test_the_small_run_sees_a_wrong_kernel(monkeypatch):
    case = CASE["mlp"]
    assert [line["agrees"] for line in verify.verify("cpu", [case])] == [True]

    for factor in (1 + 1e-5, math.nan):

        def wrong(*tensors, factor=factor):
            return case.call(*tensors) * (factor if backend.chosen_backend() == "triton" else 1)

        assert [line["agrees"] for line in verify.verify("cpu", [case._replace(call=wrong)])] == [False]


def test_the_command_tells_and_its_exit_code_says_so(monkeypatch):
    from tests.test_cli import run

    line = {"kernel": "mlp_fc1", "shape": "any", "dtype": "float32", "origin": "predicted"}
    fine = line | {"error": 2e-7, "agrees": True, "why": ""}
    unreached = line | {"kernel": "other", "error": math.nan, "agrees": None, "why": "no case came to it"}
    monkeypatch.setattr(verify, "verify_entries", lambda device, workers: [fine, unreached])
    code, output, errors = run("env", "--verify", "--device", "cpu")
    assert (code, errors) == (0, "")
    assert "mlp_fc1 any float32 2.0e-07 agrees predicted" in output
    assert "other any float32 not run predicted: no case came to it" in output
    wrong = line | {"error": 0.1, "agrees": False, "why": ""}
    broken = line | {"error": math.nan, "agrees": False, "why": "OutOfResources: shared memory [100]"}
    monkeypatch.setattr(verify, "verify_entries", lambda device, workers: [fine, wrong, broken])
    code, output, errors = run("env", "--verify", "--device", "cpu")
    assert code == 1
    assert "mlp_fc1 any float32 1.0e-01 DIFFERS predicted" in output
    assert "mlp_fc1 any float32 DIFFERS predicted: OutOfResources: shared memory [100]" in output
    assert errors.startswith("error: mlp_fc1: differs from fp64 on this device")
