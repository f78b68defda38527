"""The demo from end to end, with a model too small to pass it."""

import numpy as np
import pytest
from PIL import Image

from tests.small_runs import TINY_FLAGS
from vit_fast import demo
from vit_fast.data import load_data, load_digits

DIGITS = {"input_size": (1, 8, 8), "crop_pct": 1.0, "interpolation": "bicubic", "crop_mode": "center"}


@pytest.fixture
def short(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "TRAIN", ("--epochs", "2", *TINY_FLAGS.split()))
    monkeypatch.setattr("sys.argv", ["demo", "--picture", "picture.png"])
    return tmp_path


def test_the_demo_fails_below_its_accuracy(short):
    with pytest.raises(SystemExit, match="the held-out accuracy is below 95 %"):
        demo.main()


def test_the_demo_removes_nothing_of_others(short):
    kept = short / "demo-output" / "model" / "thesis.txt"
    kept.parent.mkdir(parents=True)
    kept.write_text("years of work")
    with pytest.raises(SystemExit, match=r"thesis\.txt, which no demo made"):
        demo.main()
    assert kept.exists()


def test_the_demo(short, monkeypatch, capfd):
    monkeypatch.setattr(demo, "LEAST_ACCURACY", 0.0)
    for name in ("model", "digits"):  # an earlier demo left something
        (short / "demo-output" / name).mkdir(parents=True)
        (short / "demo-output" / name / "config.json").write_text("")
    demo.main()
    output, errors = capfd.readouterr()
    assert "Warning" not in errors, "of a process of its own too"
    lines = output.splitlines()
    assert sum(line.startswith("held-out accuracy: ") and line.endswith(" %") for line in lines) == 1
    assert sum(line.startswith("PyTorch and the kernels agree: ") for line in lines) == 1
    for name in ("demo-output/attention.png", "demo-output/training.png", "picture.png"):
        assert name in lines
        with Image.open(short / name) as picture:
            assert picture.width > 500
    model, digits = (short / "demo-output" / name for name in ("model", "digits"))
    monkeypatch.setattr(demo, "LARGEST_DIFFERENCE", -1.0)
    with pytest.raises(SystemExit, match="they do not agree"):
        demo.compare(model, next(digits.glob("3-*.png")))
    assert (model / "training.previous.safetensors").is_file(), "as each run of two epochs leaves it"
    for folder in (model, digits):  # which the next demo does
        demo.remove_earlier(folder)
        assert not folder.exists()


def test_the_scans_of_the_demo_were_never_trained_on(tmp_path):
    files = demo.write_digits(tmp_path / "digits")
    data, (images, labels) = load_data("digits", DIGITS), load_digits()
    trained_on = {scan.numpy().tobytes() for scan in data.train.pixels}
    for digit, file in enumerate(files):
        with Image.open(file) as picture:
            scan = np.asarray(picture)
        index = int(file.stem.split("-")[-1])
        assert np.array_equal(scan, images[index].numpy())
        assert labels[index] == digit
        assert scan.tobytes() not in trained_on
