"""Tuning on a clock of the test's own, in the interpreter: what is chosen, what refused, what is left on the disk."""

import datetime
import importlib.metadata
import json
import math
import pathlib
import types

import pytest
import torch
import vit_fast.kernels

from tests.test_cli import run
from vit_fast import ops, tune, verify

TILES = pathlib.Path(vit_fast.kernels.__file__).parent / "tiles"
KERNEL, GRADIENT = "linear_residual_forward", "linear_input_grad"
OPS = [case for case in verify.SMALL if case.op == "linear_residual"]


@pytest.fixture(autouse=True)
def tiles(monkeypatch, tmp_path):
    """The file for what is found; nothing is remembered from before or kept for after."""
    from vit_fast.kernels import tile_table

    def forget():
        tile_table.table.cache_clear()
        tile_table.forget()

    path = tmp_path / "found" / "own.json"
    monkeypatch.setenv("VIT_FAST_TILES", str(path))
    forget()
    yield path
    monkeypatch.undo()
    forget()


def in_force(kernel: str = KERNEL) -> dict:
    """The entry of a kernel that a launch would take now."""
    from vit_fast.kernels import tile_table

    return tile_table.lookup(kernel, torch.device("cpu"), torch.float32, "few")


class Clock:
    """A run takes what the entry in force of one kernel says; and it is run, as a clock must."""

    def __init__(self, seconds):
        self.seconds, self.kernel, self.seen = seconds, "", []

    def __call__(self, run) -> float:
        run()
        self.seen.append(in_force(self.kernel))
        return self.seconds(self.seen[-1])


class Tuner(tune.Tuner):
    def tune(self, key, *args):
        self.clock.kernel = key[0]
        return super().tune(key, *args)


def by_rows(entry: dict) -> float:
    """Larger tiles are faster."""
    return 1.0 / entry["BLOCK_M"]


def rows_of(*sizes: int):
    """Candidates that differ in BLOCK_M alone, the entry itself first."""

    def candidates(entry: dict) -> list[dict]:
        from vit_fast.kernels.tile_table import launched

        entry = launched(entry)
        return [entry, *({**entry, "BLOCK_M": size} for size in sizes)]

    return candidates


def tuner(monkeypatch, seconds=by_rows, sizes=(16, 64), cases=OPS, rounds=1) -> Tuner:
    monkeypatch.setattr(tune, "candidates", rows_of(*sizes))
    monkeypatch.setattr(tune, "ROUNDS", rounds)
    return Tuner(torch.device("cpu"), cases, Clock(seconds))


def key_of(a_tuner: Tuner, kernel: str = KERNEL) -> tune.Key:
    return next(key for key in a_tuner.keys([kernel], ["32"]) if a_tuner._pass(key))


# ---- candidates ----------------------------------------------------------------------------------------------------

ENTRY = {"BLOCK_M": 128, "BLOCK_N": 16, "HELD": 3, "num_warps": 8, "num_stages": 1, "origin": "predicted"}


def test_candidates_stay_near():
    found = tune.candidates(ENTRY)
    launched = {name: value for name, value in ENTRY.items() if name != "origin"}
    assert found[0] == launched
    assert len({tuple(entry.items()) for entry in found}) == len(found)
    for entry in found:
        assert entry.keys() == launched.keys()
        assert sum(entry[name] != launched[name] for name in entry) <= 2
    reached = {name: {entry[name] for entry in found} for name in launched}
    assert reached == {
        "BLOCK_M": {64, 128, 256},
        "BLOCK_N": {16, 32},
        "HELD": {3},
        "num_warps": {4, 8},
        "num_stages": {1, 2},
    }


def test_a_persistent_kernel_varies_its_blocks_and_its_descriptors():
    table = json.loads((TILES / "sm_90.json").read_text())
    for entry in (table["mlp_fc1"]["16"]["many"], table["linear_residual_forward"]["16"]["many"]):
        found = tune.candidates(entry)
        assert found[0] == {"blocks_per_sm": 1} | vit_fast.kernels.tile_table.numbers(entry)
        assert {one["blocks_per_sm"] for one in found} == {one["TMA"] for one in found} == {1, 2}


def test_without_a_tile_warps_stages_and_blocks_vary():
    """As of attention in windows."""
    found = tune.candidates({"num_warps": 4, "num_stages": 2, "blocks_per_sm": 3, "origin": "predicted"})
    reached = {name: {entry[name] for entry in found} for name in found[0]}
    assert reached == {"num_warps": {4, 8}, "num_stages": {1, 2, 3}, "blocks_per_sm": {2, 3, 4}}
    assert {entry["blocks_per_sm"] for entry in tune.candidates({"num_warps": 16, "blocks_per_sm": 1})} == {1, 2}


@pytest.mark.parametrize("architecture", sorted(path.stem for path in TILES.glob("*.json")))
def test_every_entry_has_a_few_candidates(architecture):
    table = json.loads((TILES / f"{architecture}.json").read_text())
    for kernel, dtypes in table.items():
        for classes in dtypes.values():
            for entry in classes.values():
                assert 5 <= len(tune.candidates(entry)) <= 70, (kernel, entry)


# ---- what is chosen ------------------------------------------------------------------------------------------------


@pytest.mark.interpret
def test_the_fastest_is_kept_and_looked_up_by_every_later_process(monkeypatch, tiles):
    from vit_fast.kernels import tile_table

    mine = tuner(monkeypatch)
    key = key_of(mine)
    before = mine.table[KERNEL]["32"][key[2]]
    parts = []
    outcome = mine.tune(key, parts.append)
    assert parts == pytest.approx([1 / 3, 2 / 3, 1])
    assert outcome.before is before
    assert outcome.rejected == []
    assert (outcome.seconds_before, outcome.seconds_after) == (1 / before["BLOCK_M"], 1 / 64)
    assert outcome.after["BLOCK_M"] == 64
    assert outcome.after["origin"] == {
        "device": "interpreter",
        "date": datetime.date.today().isoformat(),
        "triton": importlib.metadata.version("triton"),
        "torch": torch.__version__,
    }
    assert in_force()["BLOCK_M"] == 64, "in this process"
    kept = {KERNEL: {"32": {key[2]: outcome.after}}}
    assert tiles.read_text() == tile_table.text(kept)
    assert list(tiles.parent.iterdir()) == [tiles], "nothing is left beside it"
    tile_table.table.cache_clear()
    tile_table.forget()
    assert in_force()["BLOCK_M"] == 64, "in one that starts now"


@pytest.mark.interpret
def test_what_is_not_faster_by_the_margin_changes_nothing(monkeypatch, tiles):
    mine = tuner(monkeypatch, lambda entry: 1.0 if entry["BLOCK_M"] != 64 else 1.0 - 0.9 * tune.MARGIN)
    before = in_force()
    outcome = mine.tune(key_of(mine))
    assert outcome.after is outcome.before
    assert outcome.seconds_before == outcome.seconds_after == 1.0
    assert in_force() == before
    assert json.loads(tiles.read_text()) == {}


@pytest.mark.interpret
def test_luck_does_not_last(monkeypatch, tiles):
    """A candidate that was the fastest of many must win again, alone against the entry in force."""
    calls = []

    def lucky_at_first(entry):
        calls.append(entry)
        return 0.5 if entry["BLOCK_M"] == 64 and len(calls) <= 3 else 1.0

    mine = tuner(monkeypatch, lucky_at_first)
    outcome = mine.tune(key_of(mine))
    assert outcome.after is outcome.before
    assert json.loads(tiles.read_text()) == {}


@pytest.mark.interpret
def test_candidates_take_turns(monkeypatch):
    mine = tuner(monkeypatch, lambda entry: 1.0, rounds=3)
    mine.tune(key_of(mine))
    rows = [entry["BLOCK_M"] for entry in mine.clock.seen]
    assert rows == rows[:3] * 3
    assert len(set(rows)) == 3


@pytest.mark.interpret
def test_the_median_counts(monkeypatch):
    """One slow run of three does not cost a candidate its place."""
    seen = []

    def with_a_hiccup(entry):
        seen.append(entry["BLOCK_M"])
        return 9.0 if entry["BLOCK_M"] == 64 and seen.count(64) == 1 else by_rows(entry)

    mine = tuner(monkeypatch, with_a_hiccup, rounds=3)
    assert mine.tune(key_of(mine)).after["BLOCK_M"] == 64


@pytest.mark.interpret
def test_a_gradients_entry_is_timed_in_the_backward_pass(monkeypatch):
    mine = tuner(monkeypatch)
    forwards = []
    forward = verify.Trial.forward
    monkeypatch.setattr(verify.Trial, "forward", lambda trial: forwards.append(len(mine.clock.seen)) or forward(trial))
    outcome = mine.tune(key_of(mine, GRADIENT))
    assert outcome.after["BLOCK_M"] == 64
    assert forwards
    assert max(forwards) == 0, "no forward pass while the clock runs"


@pytest.mark.interpret
def test_an_entry_is_timed_where_least_runs_beside_it(monkeypatch):
    """The input's gradient is made in the backward pass of both: of mlp's it is a small part."""
    mine = tuner(monkeypatch, cases=[case for case in verify.SMALL if case.op in ("mlp", "linear_residual")][::-1])
    assert [case.op for case in mine.cases] == ["mlp", "linear_residual"]
    for kernel, op, backward in (
        (GRADIENT, "linear_residual", True),
        (KERNEL, "linear_residual", False),
        ("mlp_fc1", "mlp", False),
        ("mlp_hidden_grad", "mlp", True),
    ):
        case, in_backward = mine._pass(key_of(mine, kernel))
        assert (case.op, in_backward) == (op, backward), kernel


@pytest.mark.interpret
@pytest.mark.parametrize("kernel", ["window_attention_forward", "window_attention_grad"])
def test_an_entry_without_a_tile_is_raced(kernel, monkeypatch, tiles):
    """Fewer blocks on a multiprocessor are faster here, and the kernels really run with them."""
    from vit_fast.kernels import tile_table

    seen = []

    def clock(run) -> float:
        run()
        seen.append(tile_table.residents(kernel, torch.device("cpu"), torch.float32) // 3)
        return float(seen[-1])

    mine = tune.Tuner(torch.device("cpu"), [case for case in verify.SMALL if case.op == "window_attention"], clock)
    monkeypatch.setattr(tune, "ROUNDS", 1)
    outcome = mine.tune((kernel, "32", "any"))
    assert (outcome.before["blocks_per_sm"], outcome.after["blocks_per_sm"]) == (2, 1)
    assert (outcome.seconds_before, outcome.seconds_after, outcome.rejected) == (2.0, 1.0, [])
    assert set(seen) == {1, 2, 3}
    assert json.loads(tiles.read_text()) == {kernel: {"32": {"any": outcome.after}}}


# ---- what is refused -----------------------------------------------------------------------------------------------


def skewed(monkeypatch, *rows: int):
    """The kernel gives numbers that are a little off where its tile has so many rows."""
    from vit_fast.kernels import linear_residual

    forward = linear_residual.forward

    def wrong(*args):
        y = forward(*args)
        return y * (1 + 1e-5) if in_force()["BLOCK_M"] in rows else y

    monkeypatch.setattr(linear_residual, "forward", wrong)


@pytest.mark.interpret
def test_wrong_numbers_are_refused_however_fast(monkeypatch):
    skewed(monkeypatch, 64)
    mine = tuner(monkeypatch, sizes=(16, 64, 48 + 80))
    outcome = mine.tune(key_of(mine))
    assert outcome.after["BLOCK_M"] == 128, "the fastest that is right"
    (rejection,) = outcome.rejected
    assert rejection.entry["BLOCK_M"] == 64
    assert rejection.wrong
    assert rejection.why.startswith("wrong numbers: error 1.0e-05 in float32")
    assert 64 not in {entry["BLOCK_M"] for entry in mine.clock.seen}, "its time was never taken"


@pytest.mark.interpret
def test_every_dtype_of_the_class_must_be_right(monkeypatch):
    """The entry is timed in bfloat16, and serves float16 too."""
    mine = tuner(monkeypatch)
    key = (KERNEL, "16", key_of(mine)[2])
    case, _ = mine._pass(key)
    seen = []

    class Right(verify.Trial):
        def judge(self, results, first=0):
            seen.append(self.tensors[0].dtype)
            return 0.5, self.tensors[0].dtype == torch.bfloat16

    trials = [Right(case, torch.device("cpu"), dtype) for dtype in tune.DTYPES["16"]]
    entry = tune.candidates(mine.table[KERNEL]["16"][key[2]])[0]
    _, rejection = mine._check(key, entry, trials, math.inf)
    assert seen == [torch.bfloat16, torch.float16]
    assert rejection.why == "wrong numbers: error 5.0e-01 in float16"


@pytest.mark.interpret
def test_what_does_not_launch_is_dropped(monkeypatch):
    mine = tuner(monkeypatch, sizes=(24, 64))  # no power of two
    outcome = mine.tune(key_of(mine))
    (rejection,) = outcome.rejected
    assert rejection.entry["BLOCK_M"] == 24
    assert not rejection.wrong
    assert "power of 2" in rejection.why
    assert outcome.after["BLOCK_M"] == 64


@pytest.mark.interpret
@pytest.mark.parametrize(("wrong", "of_64", "allowed"), [((), 7, 2), ((32,), 17, 16)])
def test_what_spills_more_is_dropped(wrong, of_64, allowed, monkeypatch):
    """More than the entry in force, or than any may where the numbers of that one, 32 rows, are wrong. The interpreter
    compiles nothing: what a compiled kernel would tell is put in its place."""
    import contextlib

    @contextlib.contextmanager
    def compiled():
        yield [types.SimpleNamespace(n_spills=of_64 if in_force()["BLOCK_M"] == 64 else 2)]

    skewed(monkeypatch, *wrong)
    mine = tuner(monkeypatch, sizes=(16, 64, 128))
    monkeypatch.setattr(tune, "_compiled", compiled)
    outcome = mine.tune(key_of(mine))
    rejection = outcome.rejected[-1]
    assert rejection == (rejection.entry, f"spills {of_64} registers, {allowed} allowed", False)
    assert rejection.entry["BLOCK_M"] == 64
    assert outcome.after["BLOCK_M"] == 128


def test_compiled_kernels_are_noted():
    """Of a real JITFunction, with its run replaced: nothing is compiled for a device that is not there."""
    jit = pytest.importorskip("triton.runtime.jit")
    run = jit.JITFunction.run
    fake = types.SimpleNamespace(run=lambda self, *args, **kwargs: ("kernel", args, kwargs))
    jit.JITFunction.run = fake.run
    try:
        with tune._compiled() as found:
            jit.JITFunction.run(None, 1, grid=2)
        assert found == [("kernel", (1,), {"grid": 2})]
        assert jit.JITFunction.run is fake.run
    finally:
        jit.JITFunction.run = run


@pytest.mark.interpret
def test_an_entry_that_is_wrong_gives_way_to_any_that_is_right(monkeypatch):
    mine = tuner(monkeypatch, seconds=lambda entry: float(entry["BLOCK_M"]), sizes=(64, 128))
    key = key_of(mine)
    skewed(monkeypatch, mine.table[KERNEL]["32"][key[2]]["BLOCK_M"])
    outcome = mine.tune(key)
    assert math.isnan(outcome.seconds_before)
    assert (outcome.after["BLOCK_M"], outcome.seconds_after) == (64, 64.0)
    assert outcome.rejected[0].wrong
    assert in_force()["BLOCK_M"] == 64


@pytest.mark.interpret
def test_where_nothing_counts_nothing_changes(monkeypatch, tiles):
    mine = tuner(monkeypatch)
    key = key_of(mine)
    skewed(monkeypatch, 16, 64, mine.table[KERNEL]["32"][key[2]]["BLOCK_M"])
    outcome = mine.tune(key)
    assert outcome.after is outcome.before
    assert math.isnan(outcome.seconds_after)
    assert len(outcome.rejected) == 3
    assert json.loads(tiles.read_text()) == {}


@pytest.mark.interpret
def test_an_entry_that_no_case_comes_to(monkeypatch):
    mine = tuner(monkeypatch)
    (key,) = mine.keys(["patch_embed_forward"], ["32"])[:1]
    outcome = mine.tune(key)
    assert outcome.after is outcome.before
    assert math.isnan(outcome.seconds_after)
    assert outcome.rejected == []


# ---- what is left on the disk --------------------------------------------------------------------------------------


@pytest.mark.interpret
def test_what_was_found_before_an_interruption_stays(monkeypatch, tiles):
    def interrupted(entry):
        if in_force(GRADIENT)["BLOCK_M"] == 16:
            raise KeyboardInterrupt
        return by_rows(entry)

    mine = tuner(monkeypatch, interrupted)
    first, second = key_of(mine), key_of(mine, GRADIENT)
    mine.tune(first)
    kept = tiles.read_text()
    before = in_force(GRADIENT)
    with pytest.raises(KeyboardInterrupt):
        mine.tune(second)
    assert tiles.read_text() == kept
    assert json.loads(kept)[KERNEL]["32"][first[2]]["BLOCK_M"] == 64
    assert in_force(GRADIENT) == before, "the candidate is not left in place"


@pytest.mark.interpret
def test_the_file_is_whole_at_any_moment(monkeypatch, tiles):
    """A write that fails half way leaves the file as it was, and nothing beside it."""
    mine = tuner(monkeypatch)
    mine.tune(key_of(mine))
    kept = tiles.read_text()

    def full(path, text):
        pathlib.Path(path).write_bytes(text.encode()[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pathlib.Path, "write_text", full)
    with pytest.raises(ValueError, match=r"own\.json: cannot be written: No space left"):
        mine.tune(key_of(mine, GRADIENT))
    assert tiles.read_text() == kept
    assert list(tiles.parent.iterdir()) == [tiles]


@pytest.mark.interpret
def test_a_second_run_goes_on_from_the_first(monkeypatch, tiles):
    from vit_fast.kernels import tile_table

    first = tuner(monkeypatch)
    first.tune(key_of(first))
    tile_table.table.cache_clear()
    second = tuner(monkeypatch, sizes=(16, 128))
    outcome = second.tune(key_of(second))
    assert (outcome.before["BLOCK_M"], outcome.after["BLOCK_M"]) == (64, 128)
    second.tune(key_of(second, GRADIENT))
    assert set(json.loads(tiles.read_text())) == {KERNEL, GRADIENT}


@pytest.mark.interpret
def test_a_damaged_file_is_named_and_left_alone(monkeypatch, tiles):
    tiles.parent.mkdir()
    tiles.write_text("{")
    with pytest.raises(ValueError, match=r"own\.json: got no tile table"):
        tuner(monkeypatch)
    assert tiles.read_text() == "{"


@pytest.mark.interpret
def test_a_place_that_cannot_be_written_shows_before_anything_is_measured(monkeypatch, tmp_path):
    (tmp_path / "a file").write_text("")
    monkeypatch.setenv("VIT_FAST_TILES", str(tmp_path / "a file" / "own.json"))
    with pytest.raises(ValueError, match=r"own\.json: cannot be written: (Not a directory|File exists)"):
        tuner(monkeypatch)


@pytest.mark.interpret
@pytest.mark.parametrize("damage", ["gone", "{", "null"])
def test_a_file_that_is_damaged_meanwhile(monkeypatch, tiles, damage):
    """A winner goes into a new file where the old one is gone; what is no table is named and left alone."""
    one = tuner(monkeypatch)
    if damage == "gone":
        tiles.unlink()
        one.tune(key_of(one))
        assert set(json.loads(tiles.read_text())) == {KERNEL}
        return
    text = damage if damage == "{" else json.dumps({KERNEL: None})
    tiles.write_text(text)
    with pytest.raises(ValueError, match=r"own\.json: got no tile table"):
        one.tune(key_of(one))
    assert tiles.read_text() == text


# ---- the command ---------------------------------------------------------------------------------------------------


def test_it_needs_a_gpu(tiles):
    code, _, errors = run("tune", "--device", "cpu")
    assert code == 1
    assert errors == "error: device: got cpu, takes a GPU: tiles are chosen by timing them on it"
    assert not tiles.exists()


@pytest.fixture
def command(monkeypatch):
    """`vit-fast tune` with the clock, the cases and the candidates of the test."""

    def typed(*arguments, seconds=by_rows, sizes=(16, 64)):
        made = tuner(monkeypatch, seconds, sizes)
        monkeypatch.setattr(tune, "Tuner", lambda device: made)
        return run("tune", "--device", "cpu", *arguments)

    return typed


@pytest.mark.interpret
def test_the_command_tells_what_changed(command, tiles):

    before = json.loads((TILES / "interpreter.json").read_text())
    code, output, errors = command("--kernel", KERNEL, "--precision", "32")
    assert (code, errors) == (0, "")
    shape = next(iter(json.loads(tiles.read_text())[KERNEL]["32"]))
    rows = before[KERNEL]["32"][shape]["BLOCK_M"]
    assert f"{KERNEL} 32 {shape} {1e3 / rows:.3f} ms 15.625 ms {100 * (64 / rows - 1):.1f} %" in output
    assert f"M {rows} " in output
    assert output.endswith("own.json")
    assert f"1 new in {tiles}" in output


@pytest.mark.interpret
def test_the_command_names_wrong_candidates(command, monkeypatch):
    skewed(monkeypatch, 64)
    code, output, _ = command("--kernel", KERNEL, "--precision", "32")
    assert code == 0
    assert f"rejected {KERNEL} 32" in output
    assert "wrong numbers: error 1.0e-05 in float32" in output


@pytest.mark.interpret
def test_the_command_says_why_nothing_was_measured(command):
    code, output, _ = command("--kernel", KERNEL, "--kernel", "mlp_fc1", "--precision", "32", sizes=(24,))
    assert code == 0
    assert "mlp_fc1 32" in output
    assert "not measured: no case comes to this entry" in output
    assert "0 new in" in output


@pytest.mark.interpret
def test_the_command_says_why_no_candidate_counts(command, monkeypatch):
    skewed(monkeypatch, *range(1, 257))
    code, output, _ = command("--kernel", KERNEL, "--precision", "32")
    assert code == 0
    assert "not measured: none of 3 candidates counts, the entry in force: wrong numbers" in output


@pytest.mark.interpret
def test_ctrl_c_keeps_what_was_found(command, tiles):
    def interrupted(entry):
        if in_force(GRADIENT)["BLOCK_M"] == 16:
            raise KeyboardInterrupt
        return by_rows(entry)

    code, output, errors = command("--kernel", GRADIENT, "--kernel", KERNEL, "--precision", "32", seconds=interrupted)
    assert (code, errors) == (130, "error: stopped")
    assert KERNEL in output
    assert GRADIENT not in output
    assert list(json.loads(tiles.read_text())) == [KERNEL]


@pytest.mark.interpret
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--kernel", "gemm"), "error: kernel: got 'gemm', takes one of "),
        (("--precision", "8"), "error: precision: got '8', takes one of 16, 32"),
    ],
)
def test_a_name_that_is_not_there(command, arguments, says):
    code, _, errors = command(*arguments)
    assert code == 1
    assert errors.startswith(says)


# ---- the cases of the real thing -----------------------------------------------------------------------------------


@pytest.mark.interpret
@pytest.mark.parametrize("architecture", sorted(path.stem for path in TILES.glob("*.json")))
def test_the_cases_reach_every_entry(architecture, monkeypatch):
    """No kernel is really launched: what counts is which entries are looked up."""
    from triton.runtime.interpreter import GridExecutor
    from vit_fast.kernels import tile_table

    from tests.test_verify import entries

    monkeypatch.delenv("VIT_FAST_TILES")
    monkeypatch.setattr(GridExecutor, "__call__", lambda *args, **kwargs: None)
    monkeypatch.setattr(tile_table, "architecture", lambda device: architecture)
    with tile_table.recording() as reached, ops.use_backend("triton"):
        for dtype in (torch.float32, torch.bfloat16):
            for case in tune.CASES:
                tensors = [
                    torch.empty(s, dtype=dtype, requires_grad=n >= case.spared) for n, s in enumerate(case.shapes)
                ]
                output = case.call(*tensors)
                if output.requires_grad:
                    torch.autograd.grad(output, tensors[case.spared :], torch.empty_like(output))
    assert entries(tile_table.table(architecture)) - set(reached) == set()
