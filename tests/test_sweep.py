"""What the sweep makes candidates of, and what it keeps: it runs on a GPU, where an error costs the device's time."""

import contextlib
import itertools
import json
import types

import pytest
import torch

pytest.importorskip("triton", reason="tiles are a kernel's")

from vit_fast.kernels import tile_table

from benchmarks import records, sweep


@pytest.fixture(autouse=True)
def hopper(monkeypatch):
    monkeypatch.setattr(sweep, "arch", lambda: "sm_90")


def in_force(kernel: str, shape: str) -> dict:
    return tile_table.numbers(tile_table.table("sm_90")[kernel]["16"][shape])


def test_candidates_are_entries_and_those_in_force_are_among_them():
    seen = set()
    for kernel, shape, entry, names, models in sweep.candidates():
        now = tile_table.table("sm_90")[kernel]["16"][shape]
        assert not tile_table.fault({**entry, "origin": "predicted"}, like=now), (kernel, shape, entry)
        assert "reason" not in entry, "a reason is that of the entry that it was written for"
        assert set(models) <= sweep.SHAPES.keys()
        assert names
        if entry == in_force(kernel, shape):
            seen.add((kernel, shape))
    assert seen == {(kernel, shape) for kernel, shape, *_ in sweep.candidates()}


@pytest.mark.parametrize(
    ("us", "error", "wins"), [(99.5, 0.0, False), (90.0, 0.0, True), (90.0, 0.1, False), (90.0, float("nan"), False)]
)
def test_what_is_faster_by_more_than_luck_and_right_wins(us, error, wins):
    kernel, shape = "mlp_fc1", "many"
    now = in_force(kernel, shape)
    other = {**now, "num_stages": now["num_stages"] + 1}
    lines = []
    for entry, took, off in ((now, 100.0, 0.0), (other, us, error)):
        line = {"kernel": kernel, "shape": shape, "entry": entry, "error": off, "us": [took]}
        lines += [line | {"model": model} for model in ("B", "H")]
    kept = sweep.winners(lines)
    assert tile_table.numbers(kept[kernel]["16"][shape]) == (other if wins else now)
    tile_table.merge(tile_table.table("sm_90"), kept, "what the sweep keeps")


def test_what_was_not_timed_at_every_shape_does_not_win():
    kernel, shape = "mlp_fc1", "many"
    now = in_force(kernel, shape)
    line = {"kernel": kernel, "shape": shape, "error": 0.0}
    lines = [line | {"entry": now, "us": [100.0], "model": model} for model in ("B", "H")]
    lines += [
        line | {"entry": {**now, "num_stages": 2}, "us": [50.0], "model": "B"},
        line | {"model": "H"} | {"entry": {}},
    ]
    assert tile_table.numbers(sweep.winners(lines)[kernel]["16"][shape]) == now


def test_its_one_file_comes_apart(tmp_path):
    tiles = {"mlp_fc1": {"16": {"many": {**in_force("mlp_fc1", "many"), "origin": "predicted"}}}}
    blocks = [{"model": "B", "us": [["mlp.fc1", 1.0]]}]
    facts = {"ceilings": {"matrix_tflops": 700.0, "copy_tbs": 4.0}, "state": []}
    found = records.record([{"kernel": "mlp_fc1"}], blocks=blocks, tiles=tiles, **facts)
    (tmp_path / "sweep.json").write_text(json.dumps(found))
    sweep.split(tmp_path)
    assert json.loads((tmp_path / "tiles.json").read_text()) == tiles
    written = json.loads((tmp_path / "blocks.json").read_text())
    records.validate(written)
    assert written["results"] == blocks
    assert written["commit"] == found["commit"]
    assert written["ceilings"] == facts["ceilings"], "which the roofline is drawn under"


class FakeBlock:
    def forward(self):
        pass

    def run(self):
        return [torch.ones(2)]


def test_each_time_has_its_samples(monkeypatch):
    """A pass launches two kernels; a sample of each is kept a round, and their median is the time."""
    rounds = itertools.count(1)

    @contextlib.contextmanager
    def clock():
        number = next(rounds)
        start, stop = types.SimpleNamespace(), types.SimpleNamespace(synchronize=lambda: None)
        start.elapsed_time = lambda _: number * 1e-3
        yield [(kernel, start, stop) for kernel in ("mlp.fc1", "mlp.fc2")]

    monkeypatch.setattr(sweep, "launch_clock", clock)
    assert sweep.timed(FakeBlock(), ("",), 3) == [("mlp.fc1", [1.0, 2.0, 3.0]), ("mlp.fc2", [1.0, 2.0, 3.0])]
    task = "mlp_fc1", "many", in_force("mlp_fc1", "many"), ("mlp.fc1",), ("B",)
    line = sweep.measure(task, "B", FakeBlock(), [torch.ones(2)])
    assert line["samples"] == [[4.0, 5.0, 6.0, 7.0, 8.0]]
    assert line["us"] == [6.0]
    assert (line["error"], line["why"]) == (0.0, "")
    records.record([line])
