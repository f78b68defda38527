"""A GPU's day, rehearsed on a CPU at tiny shapes: that it runs to the end and what its page says, not its figures."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="the steps count its launches")
pytest.importorskip("timm", reason="what models are compared with")

import vit_fast
from benchmarks import accelerated, gpu, largest, records, timing
from benchmarks.pages import RESULTS

ROOT = Path(__file__).parent.parent
STEPS = tuple(step for step in gpu.STEPS if step != "tiles")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here: make gpu")
def test_the_steps_run_to_the_end(tmp_path):
    """As `make gpu-rehearsal` runs them, in a copy that is not installed; eight files at most, one of them a page."""
    command = [sys.executable, "-m", "benchmarks.gpu", str(tmp_path), *STEPS]
    command += ["--batch-size", "2", "--workers", "2"]
    environment = os.environ | {"VIT_FAST_BACKEND": "torch"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    for step in STEPS:
        assert f"{step} ended with 0" in done.stdout, done.stdout + done.stderr
        if step == "tests":
            continue
        written = json.loads((tmp_path / f"{gpu.FILES.get(step, step)}.json").read_text())
        records.validate(written)
        assert written["device"] == "rehearsal", "no figure of a rehearsal counts"
        assert written["results"]
        if step not in ("entries", "largest", "curves"):
            assert written["ceilings"].keys() == {"matrix_tflops", "sustained_tflops", "copy_tbs"}
    assert len(list(tmp_path.iterdir())) <= 8
    page = (tmp_path / "page.txt").read_text()
    assert page.startswith("WRONG (0)\n"), page
    assert "NOT DONE, OR NOT TO THE END: tiles\n" in page
    assert re.search(r"^\d+ skipped", page.partition("\nTESTS\n")[2], re.MULTILINE), "each of tests/gpu wants a GPU"
    lines = json.loads((tmp_path / "models.json").read_text())["results"]
    assert lines[0]["ceilings"] == lines[1]["ceilings"]
    assert lines[2]["ceilings"] == lines[3]["ceilings"], "those of a call of their own, which may be as high"
    assert [one["case"][3] for one in lines] == ["bf16", "bf16", "fp32", "fp32", "amp", "bf16"], (
        "of `models`, then of `rest`"
    )
    assert ["timm compiled" in one["us"] for one in lines] == [True, True, *4 * [False]]
    lines = json.loads((tmp_path / "ops.json").read_text())["results"]
    assert [one["batch"] for one in lines] == sorted((one["batch"] for one in lines), reverse=True), "`few` adds"
    assert {(one["batch"], one["direction"]) for one in lines} == {(2, "forward"), (2, "both"), (1, "forward")}
    for op, peer in (("rope_attention", "sdpa flash"), ("window_attention", "sdpa")):
        found = [one for one in lines if one["op"] == op and one["direction"] == "both"]
        assert found
        assert all({"vit_fast", "eager", peer} <= one["us"].keys() for one in found)


def test_without_a_step_every_step_is_meant(capsys):
    """As `make gpu` calls it."""
    assert gpu.arguments(["out", "--minutes", "9"]).steps == list(gpu.STEPS)
    assert gpu.arguments(["out", "models", "few"]).steps == ["models", "few"]
    with pytest.raises(SystemExit):
        gpu.arguments(["out", "nonsense"])
    assert "steps: got nonsense, takes entries" in capsys.readouterr().err


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
    assert text[0] == "WRONG (5)"
    assert text[1] == "the step models ended with -6: what it has not written was not measured"
    assert text[2].startswith("the step tests ended with 1")
    assert text[3] == "mlp_fc1 many float16: 0.5"
    assert text[4] == "mlp_fc2 many float16: no case came"
    assert text[5] == "vit_base_patch16_224 224 px, batch 64, bf16, inference: timm: off"
    assert text[6].startswith("SLOWER THAN THE BEST PEER (2)")
    assert text[7] == "attention B 197 2 bf16 both: 500.0 us, eager 300.0"
    assert text[8].startswith("mlp B 197 2 bf16 both: 100.0 us")
    assert text[10] == "vit_base_patch16_224 224 px, batch 64, bf16, inference: 50 % of 75"
    assert text[11] == "vit_base_patch16_224 384 px, batch 64, bf16, inference: 158 %, no goal"
    assert "NOT DONE, OR NOT TO THE END: tiles, rest (cut), kernels, few, largest, curves" in text
    assert f"FIRST: mend {text[1]}" in text
    assert text[-1] == "1 failed"

    alone = gpu.page({"rest": found["models"]}, goals, {"rest": 0}, "").splitlines()
    assert {text[5], text[10], text[11]} <= set(alone), "the models that `rest` alone measured"

    found["entries"] = {"results": entries[:1]}
    model["wrong"] = []
    endings = {"entries": 0, "rest": "cut", "tests": "not run: pytest is not installed"}
    found["tiles"] = {"tiles": {"mlp_fc1": {"16": {"many": {"BLOCK_M": 64, "num_warps": 8, "origin": "predicted"}}}}}
    text = gpu.page(found, {}, endings, "").splitlines()
    assert "mlp_fc1, many: {'BLOCK_M': 64, 'num_warps': 8}" in text
    assert text[0] == "WRONG (0)"
    assert "FIRST: attention B 197 2 bf16 both: 500.0 us, eager 300.0" in text
    assert text[-1] == "not run: pytest is not installed"


def test_no_list_of_the_page_is_longer_than_a_screen():
    found = {"ops": {"results": [line(100.0 + index, 90.0) for index in range(40)]}}
    text = gpu.page(found, {}, {"ops": 0}, "").splitlines()
    assert text[1] == "SLOWER THAN THE BEST PEER (40), most time lost first"
    assert text[2 + gpu.MOST_LINES] == "and 25 more"


def test_a_full_set_goes_on_where_it_was_cut(tmp_path, monkeypatch):
    """Two calls make one file: the second measures what the first did not, and each line keeps its own call's facts."""
    cases = [gpu.contenders.Case(op, "tiny", 17, 2, "fp32") for op in ("patch_embed", "mlp", "projection")]
    monkeypatch.setattr(gpu.contenders, "cases_of", lambda which: cases)
    monkeypatch.setattr(sys, "argv", ["gpu", str(tmp_path), "ops", "--alone", "--set", "full", "--no-compile"])
    path = tmp_path / "ops.json"
    gpu.main()
    whole = json.loads(path.read_text())
    records.validate(whole)
    assert [line["op"] for line in whole["results"]] == [case.op for case in cases for _ in range(2)]
    assert not any(name.startswith("compiled") for line in whole["results"] for name in line["us"] | line["aside"])
    assert all(line["samples"].keys() == line["us"].keys() != set() for line in whole["results"])

    first = whole | {"date": "2026-01-31", "ceilings": {"matrix_tflops": 7.0}, "results": whole["results"][:4]}
    for line in first["results"][2:]:
        del line["us"]["eager"], line["samples"]["eager"]  # as another set leaves a case: with fewer contenders
    for line in first["results"]:
        line |= {"date": "2026-01-31", "ceilings": {"matrix_tflops": 7.0}}
    for line in first["results"][:1]:
        del line["date"], line["ceilings"], line["state"]  # as files were before: the file's are its
    path.write_text(json.dumps(first))
    measure, measured = gpu.contenders.measure, []
    monkeypatch.setattr(
        gpu.contenders, "measure", lambda case, names, **_: measured.append(case) or measure(case, names)
    )
    gpu.main()
    assert measured == cases[1:], "what lacks a contender is measured again, what is whole is not"
    second = json.loads(path.read_text())
    assert [line["op"] for line in second["results"]] == [case.op for case in cases for _ in range(2)]
    assert second["results"][1] == first["results"][1]
    for index, line in enumerate(second["results"]):
        assert (line["date"] == "2026-01-31") == (line["ceilings"] == {"matrix_tflops": 7.0}) == (index < 2)
        assert len(line["state"]) == 2, "before and after"
        assert "eager" in line["us"]


def test_models_too_are_not_measured_twice(monkeypatch):
    asked = []

    def measure(case, names):
        asked.append((case, names))
        return {name: gpu.whole_models.MeasuredModel([1.0, 2.0, 3.0]) for name in names}

    monkeypatch.setattr(gpu.whole_models, "measure", measure)
    cases = gpu.whole_models.cases("small")
    monkeypatch.setattr(gpu, "model_cases", lambda batch, which: cases[:2] if which == "main" else cases)
    written = []
    gpu.measure_models(written.append, 2, True, "main", done=())
    assert [case for case, _ in asked] == cases[:2]
    gpu.measure_models(written.append, 2, True, "rest", done=json.loads(json.dumps(written[-1])))
    assert [case for case, _ in asked] == cases
    gpu.measure_models(written.append, 2, False, "full", done=json.loads(json.dumps(written[-1])))
    assert [case for case, _ in asked] == cases * 2, "the full set has more contenders"
    assert [one["case"] for one in written[-1]] == [list(case) for case in cases]
    assert not any("compiled" in name for _, names in asked[4:] for name in names), "--no-compile is of each set"


def test_what_was_measured_in_one_direction_is_measured_again_in_both(monkeypatch):
    case = gpu.contenders.Case("projection", "tiny", 17, 2, "fp32")
    monkeypatch.setattr(gpu.contenders, "cases_of", lambda which: [case])
    written = []
    for which in ("few", "main", "few"):
        gpu.measure_ops(written.append, 1, False, which, done=written[-1] if written else [])
    assert [[line["direction"] for line in lines] for lines in written] == [["forward"], ["forward", "both"]], (
        "and what both directions have is not measured again"
    )


@pytest.mark.parametrize("steps", [["models"], ["rest"], ["entries", "models", "rest", "kernels"]])
def test_what_models_launch_is_compiled_before_they_are_measured(monkeypatch, steps):
    """Each compiled contender and ours, as they are measured: a kernel or a graph may be of one batch alone."""
    monkeypatch.setattr(gpu, "REHEARSAL", False)
    monkeypatch.setattr(gpu, "MODELS", ("B", "L", "H"))
    tasks = gpu.tasks(steps, 256, True)
    assert len(tasks) == len(set(tasks))
    for step in set(steps) & {"models", "rest"}:
        which = "main" if step == "models" else step
        for case in gpu.model_cases(256, which):
            names = gpu.model_contenders(case, 256, True, which)
            assert {(case, name) for name in names if name.endswith("compiled")} <= set(tasks)
            assert (case, "vit_fast") in tasks
    places = ["compiled" in name for _, name in tasks]
    assert places == sorted(places, reverse=True), "what takes longest is first"
    assert gpu.tasks(steps, 256, False) == tasks[sum(places) :]


@pytest.mark.parametrize("name", ["vit_fast", "vit_fast compiled"])
def test_preparing_runs_a_case_once(monkeypatch, name):
    seen = []
    started = gpu.whole_models.started

    def watched(model, form, case, *drawn):
        found = started(model, form, case, *drawn)
        seen.append((form, case, len(drawn[0])))
        return found._replace(run=lambda: seen.append(found.run()))

    monkeypatch.setattr(gpu.whole_models, "started", watched)
    monkeypatch.setattr(gpu.whole_models, "compiled", lambda model, mode=None: model)
    case = gpu.whole_models.ModelCase("tiny", 224, 3, "fp32", "training")
    assert gpu.prepare((case, name)) == ""
    assert seen == [(name.partition(" ")[2], case, 3), None]


def test_what_cannot_be_prepared_is_said_in_words(monkeypatch):
    class NoWords(Exception):
        def __init__(self, one, two):
            super().__init__("no room")

    def started(*_):
        raise NoWords(1, 2)

    monkeypatch.setattr(gpu.whole_models, "started", started)
    case = gpu.whole_models.ModelCase("tiny", 224, 1, "fp32", "training")
    assert "no room" in gpu.prepare((case, "vit_fast"))


def test_one_file_is_one_run(tmp_path, monkeypatch):
    """What another tree or device left is not gone on with."""
    path = tmp_path / "ops.json"
    assert gpu.known_of(path) == []
    found = records.record([{"op": "mlp"}], rehearsal=gpu.REHEARSAL)
    path.write_text(json.dumps(found))
    assert gpu.known_of(path) == [{"op": "mlp", "date": found["date"]}]
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
    assert [line["training"] for line in found["results"]] == [False, True] * len(accelerated.MODELS)
    for line in found["results"]:
        assert set(line["us"]) == {"before", "after"}
        assert line["wrong"] == []
    assert set(found["results"][0]["aside"]) == {"before graph", "after graph"}

    monkeypatch.setattr(vit_fast, "accelerate", lambda model, verify: model.blocks[0].norm1.weight.data.mul_(1.5))
    line = accelerated.measure("timm ViT-Ti/16, one block", False, 1, compiling=False)
    assert line["wrong"] == ["after"]
    assert set(line["us"]) == {"before"}


@pytest.mark.parametrize("most", [1, 2, 63, 900, 999, 1000, 1001, 1100, 4000])
def test_the_largest_batch_is_found_from_a_guess(most):
    fitting, too_large = largest.search(lambda batch: batch <= most, 1000)
    assert fitting <= most < too_large
    assert too_large - fitting <= max(1, fitting // 100)


@pytest.mark.parametrize("words", ["CUDA out of memory.", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED", "illegal address"])
def test_a_batch_too_large_is_told_from_a_fault(words, monkeypatch):
    def peak(batch):
        raise RuntimeError(words)

    steps = largest.Steps("tiny", "vit_fast")
    monkeypatch.setattr(steps, "peak", peak)
    if words == "illegal address":
        with pytest.raises(RuntimeError, match=words):
            steps.fits(8)
    else:
        assert not steps.fits(8)


def test_where_no_batch_fits_the_search_ends():
    assert largest.search(lambda batch: False, 1000) == (0, 1)


def test_a_whole_day_leaves_eight_files():
    names = {gpu.FILES.get(step, step) for step in gpu.STEPS if step != "tests"}
    assert len(names) + len(["page.txt"]) <= 8


@pytest.mark.parametrize(
    "path", sorted(RESULTS.parent.glob("*/*.json")), ids=lambda path: f"{path.parent.name}-{path.stem}"
)
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


def test_times_without_their_samples_are_not_written():
    line = {"op": "mlp", "us": {"vit_fast": [1.0, 2.0, 3.0]}}
    with pytest.raises(ValueError, match=r"results: got times without samples in .*mlp"):
        records.record([line])
    records.record([line | {"samples": {"vit_fast": [1.0, 2.0, 3.0]}}])


def test_a_file_says_what_was_typed():
    """Of python -m too, whose sys.argv names a file."""
    code = "import sys; from benchmarks import records; print(records.record([])['command'])"
    done = subprocess.run([sys.executable, "-c", code, "17"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"python -c {code} 17"
