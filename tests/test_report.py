"""The measured tables of the pages are those of the files of results."""

import pytest

pytest.importorskip("triton", reason="the pages' other parts come from compiled kernels")

from benchmarks import pages, predictions, report
from benchmarks.launches import sameness


def test_the_pages_say_what_the_files_say():
    for path, text in report.pages().items():
        assert path.read_text() == text, f"{path.name}: python -m benchmarks.report"


def test_the_figures_that_are_typed_are_those_of_the_files():
    def span(dtype: str, *directions: str) -> str:
        lines = report.results("cpu", report.CPU_RESULTS)["results"]
        ratios = [row["ratio"] for row in lines if row["dtype"] == dtype and row["direction"] in directions]
        return f"{min(ratios):.2f} to {max(ratios):.2f}"

    text = " ".join((report.ROOT / "README.md").read_text().split())
    of_bf16 = f"bf16: training steps {span('bf16', 'training')}, inference {span('bf16', 'inference')}"
    assert f"{of_bf16}; fp32: {span('fp32', 'training', 'inference')}" in text
    tried = report.results("tried")["results"]
    ms = {row["contender"]: row["us"][1] / 1e3 for row in tried if row["experiment"].startswith("eager ViT-B, batch 1")}
    assert f"{ms['vit_fast']:.1f} ms beside timm's {ms['timm']:.1f}" in text
    both = {row["model"]: row["us"] for row in report.measured_models("inference", report.LATER)}[
        "vit_base_patch16_224"
    ]
    assert f"ViT-B is at {both['timm compiled'][1] / both['vit_fast compiled'][1]:.2f})" in text


def _shown(path) -> str:
    """What a picture's header says that it shows."""
    image = pytest.importorskip("PIL.Image")
    return image.open(path).info["Description"]


@pytest.mark.parametrize("name", report.PICTURES)
def test_the_pictures_show_what_the_files_say(name, tmp_path):
    pytest.importorskip("matplotlib")
    report.PICTURES[name](tmp_path / "now.png")
    assert _shown(tmp_path / "now.png") == _shown(report.ROOT / f"docs/{name}.png"), "python -m benchmarks.report"


@pytest.mark.parametrize(
    ("name", "file"), [("measured", "models"), ("latency", "models"), ("memory", "models"), ("roofline", "kernels")]
)
def test_a_picture_of_other_figures_is_seen(name, file, tmp_path, monkeypatch):
    """By one part in fifty, of one contender of a ViT-B."""
    pytest.importorskip("matplotlib")
    results = report.results

    def changed(wanted, *folder):
        found = results(wanted, *folder)
        for row in found["results"] if wanted.startswith(file) else []:
            if row["model"] != "vit_base_patch16_224":
                continue
            if file == "kernels":
                row["launches"] = [[kernel, *(1.02 * us for us in times)] for kernel, *times in row["launches"]]
                continue
            row["us"]["vit_fast"] = [1.02 * us for us in row["us"]["vit_fast"]]
            if "vit_fast graph" in row["us"]:
                row["us"]["vit_fast graph"] = [1.02 * us for us in row["us"]["vit_fast graph"]]
            facts = row["facts"]["vit_fast"]
            facts |= {"peak_gb": 1.02 * facts["peak_gb"]} if "peak_gb" in facts else {}
        return found

    monkeypatch.setattr(report, "results", changed)
    monkeypatch.setattr(predictions, "results", changed)
    report.PICTURES[name](tmp_path / "now.png")
    assert _shown(tmp_path / "now.png") != _shown(report.ROOT / f"docs/{name}.png")


def test_a_picture_of_the_same_heights_and_other_rates_is_seen(tmp_path, monkeypatch):
    """All contenders slower alike, by one part in fifty, leave every bar as it is: the images a second tell."""
    pytest.importorskip("matplotlib")
    results = report.results

    def changed(wanted, *folder):
        found = results(wanted, *folder)
        for row in found["results"] if wanted in report.DAYS else []:
            row["us"] = {form: [1.02 * us for us in quantiles] for form, quantiles in row["us"].items()}
        return found

    monkeypatch.setattr(report, "results", changed)
    report.plot_speed(tmp_path / "now.png")
    assert _shown(tmp_path / "now.png") != _shown(report.ROOT / "docs/measured.png")


def test_a_contender_counts_by_its_fastest_form():
    times = {"vit_fast": [8, 9, 10], "vit_fast graph": [5, 6, 7], "timm": [1, 2, 3], "cublas": [0, 1, 1]}
    assert report.best(times, True) == ("vit_fast graph", 6)
    assert report.best(times, False) == ("timm", 2)


def test_what_is_slower_is_said_to_be(monkeypatch):
    row = {"model": "vit_base_patch16_224", "batch": 64, "training": False, "facts": {}}
    row |= {"case": ["B", 224, 64, "bf16", "inference"], "us": {"vit_fast": [9, 9, 9], "timm": [6, 6, 6]}}
    op = {
        "op": "fc2",
        "model": "B",
        "batch": 256,
        "direction": "both",
        "us": {"vit_fast": [9, 1000, 9], "eager": [8, 996, 8]},
    }
    cpu = {"model": "S", "dtype": "fp32", "direction": "training", "ratio": 1.25}
    files = {name: {"date": "2026-01-02", "ceilings": {"matrix_tflops": 800}, "results": [row]} for name in report.DAYS}
    files |= {"ops": {"results": [op]}, "cpu": {"results": [cpu]}}
    monkeypatch.setattr(report, "results", lambda name, *folder: files[name])
    assert "0.67, slower" in report.models_table((64,), "inference")
    row["facts"] = {"vit_fast": {"peak_gb": 3.0}, "timm": {"peak_gb": 2.0}}
    assert report.slower_list().splitlines() == [
        "- whole models, inference: ViT-B/16 at batch 64 (0.67 of timm)",
        "- whole models, training step: none",
        "- ops, forward: none",
        "- ops, forward and backward: `fc2` of ViT-B/16 (0.996 of PyTorch eager)",
        "- peak memory of inference: ViT-B/16 at batch 64 (3.00 GB, timm 2.00)",
        "- whole models on a CPU, of the best of three libraries: ViT-S/16 in fp32, training (0.80)",
    ]


def test_where_no_peer_ran_the_tables_say_so(monkeypatch):
    """As on a card that holds our step of a model and no other's; and of checkpointing the tables say that too."""
    us = {"vit_fast": [1, 1000, 1], "cublas": [1, 500, 1]}
    ways = ("forward", "both")
    op = {"op": "mlp", "model": "B", "us": us}
    ops = [{**op, "batch": batch, "direction": way} for way in ways for batch in (256, 8)]
    ops.append({"op": "attention", "model": "L at 384", "batch": 64, "direction": "forward", "us": us})  # as `few` has
    row = {"model": "vit_base_patch16_224", "batch": 256, "us": {"vit_fast": [1, 1e6, 1]}, "aside": {"timm": "no room"}}
    row |= {"case": ["B", 224, 256, "bf16", "checkpointed"], "facts": {"vit_fast": {"peak_gb": 3.0, "first_call_s": 1}}}
    plain = {**row, "case": ["B", 224, 256, "bf16", "training"]}
    day = {"date": "2026-01-02", "commit": "c", "ceilings": {"matrix_tflops": 800}, "results": [row, plain]}
    files = dict.fromkeys(report.DAYS, day) | {"ops": {**day, "results": ops}, "cpu": {"results": []}}
    monkeypatch.setattr(report, "results", lambda name, *folder: files.get(name) or pages.results(name, *folder))
    table = report.models_table((256,), "training", "checkpointed")
    shown = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    assert [cells[:5] for cells in shown] == [
        ["ViT-B/16", "256", "256 eager", "did not run", "-"],
        ["ViT-B/16, checkpointed", "256", "256 eager", "did not run", "-"],
    ]
    assert report.ops_table().splitlines()[2:] == [
        "| `mlp` | ViT-B/16, batch 256 | 1,000 | - | - | 1,000 | - | - |",
        "| `attention` | ViT-L/16 at 384, batch 64 | 1,000 | - | - | - | - | - |",
    ]
    assert all(line.endswith(": none") for line in report.slower_list().splitlines())


def _measured(monkeypatch, op: str, model: str, us: dict) -> None:
    """As if that were all that was measured of ops."""
    lines = [{"op": op, "model": model, "batch": size, "us": us} for size in (256, 64)]
    files = {"ops": {"results": [{**line, "direction": "forward"} for line in lines]}}
    monkeypatch.setattr(report, "results", lambda name, *folder: files.get(name) or pages.results(name, *folder))


def test_rotary_positions_stand_in_the_tables_once_they_are_measured(monkeypatch):
    us = {"vit_fast": [1, 100, 1], "eager": [1, 300, 1], "sdpa cudnn": [1, 125, 1]}
    _measured(monkeypatch, "rope_attention", "DINOv3 L", us)
    assert report.ops_table().splitlines()[2:] == [
        "| `rope_attention` | DINOv3 ViT-L/16, batch 256 | 100 | 125 sdpa cudnn | 1.25 | - | - | - |"
    ]


def test_windows_stand_in_the_tables_once_they_are_measured(monkeypatch):
    us = {"vit_fast": [1, 100, 1], "eager": [1, 300, 1], "sdpa": [1, 90, 1]}
    _measured(monkeypatch, "window_attention", "Swin-T 1", us)
    assert report.ops_table().splitlines()[2:] == [
        "| `window_attention` | Swin-T, stage 1, batch 256 | 100 | 90 sdpa | 0.90, slower | - | - | - |"
    ]
    assert "- ops, forward: `window_attention` of Swin-T, stage 1 (0.90 of sdpa)" in report.slower_list().splitlines()


def test_a_case_that_was_measured_again_is_that_of_the_later_day():
    first, later = (
        {row["model"]: row for row in report.measured_models("inference", day, batch=256)} for day in report.DAYS
    )
    found = {row["model"]: row for row in report.measured_models("inference", batch=256)}
    assert later
    assert found == first | later
    assert found["vit_base_patch16_224"]["date"] > found["vit_small_patch16_224"]["date"]


def test_the_measured_launches_of_the_page_are_those_of_the_file():
    """Its other columns come from the compiler, and are made again by hand."""
    text = (report.ROOT / "docs/performance.md").read_text()
    part = text.partition("<!-- begin: launches -->")[2].partition("<!-- end: launches -->")[0]
    shown = [[cell.strip() for cell in line.split("|")[1:-1]] for line in part.strip().splitlines()[2:]]
    expected = []
    for _, timed in predictions.measured_launches():
        alike = {}
        for launch, us in timed:
            alike.setdefault(sameness(launch), []).append(us)
        expected += [[str(len(times)), f"{sum(times) / len(times):,.0f}"] for times in alike.values()]
    assert [[cells[4], cells[6]] for cells in shown] == expected


def test_a_model_that_launches_otherwise_than_was_timed_is_an_error(monkeypatch):
    file = report.results("kernels")
    file["results"][0]["launches"][0][0] = "patch_embed.other"
    monkeypatch.setattr(predictions, "results", lambda name: file)
    with pytest.raises(ValueError, match=r"got launches of .*patch_embed\.other.* the model makes"):
        next(predictions.measured_launches())


def test_a_goal_that_is_not_reached_is_short(monkeypatch):
    """And one that no run speaks of is not measured."""
    table = report.goals_table().splitlines()
    cells = {line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ")[1:] for line in table[2:]}
    assert cells["ViT-B/16, inference: share of the ceiling"] == ["75 %", "66 %, short", "65 %, short"]
    assert cells["ViT-B/16, inference: times timm's fastest measured form"] == ["1.3", "1.31", "1.31"]
    assert cells["ViT-H/14, training: share of the ceiling"] == ["70 %", "not measured", "not measured"]
    assert cells["ViT-B/16, inference: the same, both compiled"] == ["1.3", "not measured", "1.17, short"]
    assert cells["ViT-B/16, batch 1 in a graph"] == ["0.25 ms", "0.63 ms, short", "0.50 ms, short"]
    attention = cells["attention of ViT-B/16, 197 tokens, batch 256"]
    assert attention[1:] == ["182 µs, cudnn 170, short", "125 µs, cudnn 167"]
    monkeypatch.setattr(report, "LATENCY_MS", 0.6)
    assert "| 0.6 ms | 0.63 ms, short | 0.50 ms |" in report.goals_table()


def test_parts_and_whole_are_each_of_the_ceiling_of_their_own_run(monkeypatch):
    us = {"vit_fast": [1, 1000, 1], "eager": [1, 2000, 1], "cublas": [1, 500, 1]}
    ops = [
        {"op": op, "model": "B", "batch": 256, "direction": way, "us": us}
        for op in ("patch_embed", "ln_linear", "projection", "mlp", "block")
        for way in ("forward", "both")
    ]
    case = {"case": ["B", 224, 256, "bf16", "inference"], "model": "vit_base_patch16_224", "batch": 256, "facts": {}}
    case["us"] = {"vit_fast": [1, 26_000, 1], "timm": [1, 39_000, 1]}
    files = {
        "ops": {"ceilings": {"matrix_tflops": 1000.0}, "results": ops},
        report.LATER: {"ceilings": {"matrix_tflops": 500.0}, "date": "2026-01-02", "results": [case]},
    }
    monkeypatch.setattr(report, "results", files.__getitem__)
    shown = [cell.strip() for cell in report.whole_table().splitlines()[2].split("|")[1:-1]]
    flops = report.forward_flops("vit_base_patch16_224") * 256
    least, parts, whole = 500 + 12 * 1500, 13_000, 26_000
    assert shown == [
        "ViT-B/16, inference",
        f"18.5, {100 * flops / least / 1e6 / 1000:.0f} %",
        f"13.0, {100 * flops / parts / 1e6 / 1000:.0f} %",
        f"26.0, {100 * flops / whole / 1e6 / 500:.0f} %",
        "2.00",
        "1.50",
    ]


def test_a_ratio_just_under_one_is_not_rounded_away():
    assert [report.against(ratio) for ratio in (1.004, 1.0, 0.996, 0.99)] == [
        "1.00",
        "1.00",
        "0.996, slower",
        "0.99, slower",
    ]
