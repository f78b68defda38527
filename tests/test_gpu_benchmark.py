"""A GPU's day, rehearsed on a CPU at tiny shapes: that it runs to the end and what its page says, not its figures."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="the steps count its launches")
pytest.importorskip("timm", reason="what models are compared with")

import vit_fast
from benchmarks import accelerated, gpu, records, timing

ROOT = Path(__file__).parent.parent
STEPS = ("entries", "ops", "models", "rest", "kernels")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here: make gpu")
def test_the_steps_run_to_the_end(tmp_path):
    """As `make gpu-rehearsal` runs them, in a copy that is not installed; six files at most, and a page."""
    command = [sys.executable, "-m", "benchmarks.gpu", str(tmp_path), *STEPS]
    command += ["--no-compile", "--batch-size", "2", "--workers", "2", "--minutes", "5"]
    environment = os.environ | {"VIT_FAST_BACKEND": "torch"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=340)
    assert done.returncode == 0, done.stdout + done.stderr
    for step in STEPS:
        assert f"{step} ended with 0" in done.stdout, done.stdout + done.stderr
        written = json.loads((tmp_path / f"{gpu.FILES.get(step, step)}.json").read_text())
        records.validate(written)
        assert written["device"] == "rehearsal", "no figure of a rehearsal counts"
        assert written["results"]
        if step != "entries":
            assert written["ceilings"].keys() == {"matrix_tflops", "copy_tbs"}
    assert len(list(tmp_path.iterdir())) <= 6
    page = (tmp_path / "page.txt").read_text()
    assert page.startswith("WRONG (0)\n"), page
    assert "NOT DONE, OR NOT TO THE END: tiles, tests" in page
    cases = [line["case"] for line in json.loads((tmp_path / "models.json").read_text())["results"]]
    lines = json.loads((tmp_path / "models.json").read_text())["results"]
    assert lines[0]["ceilings"] == lines[1]["ceilings"] != lines[2]["ceilings"], "two calls, each with its own"
    assert [case[3] for case in cases] == ["bf16", "bf16", "fp32", "fp32"], "those of `models`, then those of `rest`"


def line(ours: float, theirs: float, **more) -> dict:
    us = {"vit_fast": [ours] * 3, "eager": [theirs] * 3, "cublas": [1.0] * 3}
    return {
        "op": "mlp",
        "model": "B",
        "tokens": 197,
        "batch": 2,
        "dtype": "bf16",
        "direction": "both",
        "us": us,
        "wrong": [],
        "aside": {},
        **more,
    }


def test_the_page_says_what_is_wrong_and_slow_and_comes_first():
    entries = [
        {"kernel": "mlp_fc1", "shape": "few", "dtype": "float16", "agrees": True, "error": 1e-3, "why": ""},
        {"kernel": "mlp_fc1", "shape": "many", "dtype": "float16", "agrees": False, "error": 0.5, "why": ""},
        {"kernel": "mlp_fc2", "shape": "many", "dtype": "float16", "agrees": None, "error": 0.5, "why": "no case came"},
    ]
    ops = [line(100.0, 90.0), line(500.0, 300.0, op="attention"), line(10.0, 20.0)]
    model = {
        "case": ["B", 224, 64, "bf16", "inference"],
        "model": "vit_base_patch16_224",
        "training": False,
        "batch": 64,
        "wrong": ["timm"],
        "aside": {"timm": "off"},
    }
    model["us"] = {"vit_fast": [1e3] * 3, "vit_fast graph": [900.0] * 3}
    larger = {**model, "case": ["B", 384, 64, "bf16", "inference"], "wrong": []}
    found = {
        "entries": {"results": entries},
        "ops": {"results": ops, "ceilings": {"matrix_tflops": 1.0}},
        "models": {"results": [model, larger], "ceilings": {"matrix_tflops": 5000.0}},
    }
    goals = {"vit_base_patch16_224 inference": 75}
    endings = {"entries": 0, "ops": 0, "models": -6, "rest": "cut", "tests": 1}
    text = gpu.page(found, goals, endings, "1 failed").splitlines()
    assert text[0] == "WRONG (6)"
    assert text[1] == "the step models ended with -6: what it has not written was not measured"
    assert text[2] == "the step rest was cut: what it has not written was not measured"
    assert text[3].startswith("the step tests ended with 1")
    assert text[4] == "mlp_fc1 many float16: 0.5"
    assert text[5] == "mlp_fc2 many float16: no case came"
    assert text[6] == "vit_base_patch16_224 224 px, batch 64, bf16, inference: timm: off"
    assert text[7].startswith("SLOWER THAN THE BEST PEER (2)")
    assert text[8] == "attention B 197 2 bf16 both: 500.0 us, eager 300.0"
    assert text[9].startswith("mlp B 197 2 bf16 both: 100.0 us")
    assert text[11] == "vit_base_patch16_224 224 px, batch 64, bf16, inference: 50 % of 75"
    assert text[12] == "vit_base_patch16_224 384 px, batch 64, bf16, inference: 158 %, no goal"
    assert "NOT DONE, OR NOT TO THE END: tiles, rest, kernels" in text
    assert "FIRST: mend what is wrong" in text
    assert text[-1] == "1 failed"

    found["entries"] = {"results": entries[:1]}
    model["wrong"] = []
    endings = {"entries": 0, "tests": "not run: pytest is not installed"}
    text = gpu.page(found, {}, endings, "").splitlines()
    assert text[0] == "WRONG (0)"
    assert "FIRST: attention B 197 2 bf16 both: 500.0 us, eager 300.0" in text
    assert text[-1] == "not run: pytest is not installed"


def test_no_list_of_the_page_is_longer_than_a_screen():
    found = {"ops": {"results": [line(100.0 + index, 90.0) for index in range(40)]}}
    text = gpu.page(found, {}, {"ops": 0}, "").splitlines()
    assert text[1] == "SLOWER THAN THE BEST PEER (40), most time lost first"
    assert text[2 + gpu.MOST_LINES] == "and 25 more"


def test_a_full_set_goes_on_where_it_was_cut(monkeypatch):
    """Cases that a file has are not measured again."""
    measured = []
    monkeypatch.setattr(
        gpu.contenders, "cases_of", lambda which: [gpu.contenders.Case("mlp", "tiny", 17, n, "bf16") for n in (1, 2)]
    )

    def measure(case, names):
        measured.append(case.batch)
        return {"vit_fast": gpu.contenders.Measured({"forward": [1.0, 2.0], "both": [3.0, 4.0]}, 0.0)}

    monkeypatch.setattr(gpu.contenders, "measure", measure)
    written = []
    gpu.measure_ops(written.append, 2, False, "full")
    assert measured == [1, 2]
    assert [one["direction"] for one in written[-1]] == ["forward", "both"] * 2
    gpu.measure_ops(written.append, 2, False, "full", done=written[0][:2])
    assert measured == [1, 2, 2]


def test_one_file_is_one_run(tmp_path, monkeypatch):
    """What another tree or device left is not gone on with."""
    path = tmp_path / "ops.json"
    assert gpu.known_of(path) == []
    path.write_text(json.dumps(records.record([{"op": "mlp"}], rehearsal=gpu.REHEARSAL)))
    assert gpu.known_of(path) == [{"op": "mlp"}]
    monkeypatch.setenv("VIT_FAST_COMMIT", "another")
    with pytest.raises(SystemExit, match=r"its commit is .*, here it is another; choose another OUT"):
        gpu.known_of(path)


def test_accelerated_models_before_and_after(tmp_path, monkeypatch):
    """One command leaves one file; an accelerated model whose numbers are wrong is not timed."""
    monkeypatch.setattr(timing, "ROUNDS", 2)
    monkeypatch.setattr(sys, "argv", ["accelerated", str(tmp_path / "accelerated.json"), "--no-compile"])
    accelerated.main()
    found = json.loads((tmp_path / "accelerated.json").read_text())
    records.validate(found)
    assert [line["training"] for line in found["results"]] == [False, True]
    for line in found["results"]:
        assert set(line["us"]) == {"before", "after"}
        assert line["wrong"] == []
    assert set(found["results"][0]["aside"]) == {"before graph", "after graph"}

    monkeypatch.setattr(vit_fast, "accelerate", lambda model, verify: model.blocks[0].norm1.weight.data.mul_(1.5))
    line = accelerated.measure("timm ViT-Ti/16, one block", False, 1, compiling=False)
    assert line["wrong"] == ["after"]
    assert set(line["us"]) == {"before"}


def test_a_whole_day_leaves_six_files():
    names = {gpu.FILES.get(step, step) for step in gpu.STEPS if step != "tests"}
    assert len(names) + len(["page.txt"]) <= 6


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks/results").rglob("*.json")), ids=lambda path: path.stem)
def test_every_file_of_results_says_what_it_must(path):
    records.validate(json.loads(path.read_text()))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"date": "today"}, "date: got 'today'"),
        ({"results": [1]}, "results: takes objects"),
        ({"extra": 1}, "extra: got 1"),
    ],
)
def test_what_is_no_file_of_results_is_refused(change, says):
    right = {"device": "d", "driver": "", "architecture": "", "versions": {}, "date": "2026-01-31"}
    right |= {"commit": "", "command": "c", "results": []}
    records.validate(right)
    with pytest.raises(ValueError, match=says):
        records.validate(right | change)
