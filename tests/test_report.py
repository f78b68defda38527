"""The measured tables of the pages are those of the files of results."""

import numpy as np
import pytest

pytest.importorskip("triton", reason="the pages' other parts come from compiled kernels")

from benchmarks import report


def test_the_pages_say_what_the_files_say():
    for path, text in report.pages().items():
        assert path.read_text() == text, f"{path.name}: python -m benchmarks.report"


@pytest.mark.parametrize("name", report.PICTURES)
def test_the_pictures_show_what_the_files_say(name, tmp_path):
    pytest.importorskip("matplotlib")
    image = pytest.importorskip("PIL.Image")
    report.PICTURES[name](tmp_path / "now.png")
    now, kept = (
        np.asarray(image.open(path).convert("L"), float)
        for path in (tmp_path / "now.png", report.ROOT / f"docs/{name}.png")
    )
    assert now.shape == kept.shape, "python -m benchmarks.report"
    # Another version of a font moves edges by a pixel; another figure moves a bar or a point.
    assert np.abs(now - kept).mean() < 1, "python -m benchmarks.report"


def test_a_contender_counts_by_its_fastest_form():
    times = {"vit_fast": [8, 9, 10], "vit_fast graph": [5, 6, 7], "timm": [1, 2, 3], "cublas": [0, 1, 1]}
    assert report.best(times, True) == ("vit_fast graph", 6)
    assert report.best(times, False) == ("timm", 2)


def test_what_is_slower_is_said_to_be(monkeypatch):
    row = {"model": "vit_base_patch16_224", "batch": 64, "training": False, "facts": {}}
    row |= {"case": ["B", 224, 64, "bf16", "inference"], "us": {"vit_fast": [9, 9, 9], "timm": [6, 6, 6]}}
    file = {"ceilings": {"matrix_tflops": 800}, "results": [row]}
    monkeypatch.setattr(report, "results", lambda name: file)
    assert "0.67, slower" in report.models_table(False, (64,))
