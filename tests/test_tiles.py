"""The tile tables: data that is whole, found for every architecture, and whose single entries a user may replace."""

import json
import logging
import pathlib

import pytest
import torch
from vit_fast.kernels import tile_table

FILES = sorted(tile_table.FOLDER.glob("*.json"))
TABLES = {path.stem: json.loads(path.read_text()) for path in FILES}
CPU = torch.device("cpu")
MEASURED = {"device": "NVIDIA H100", "date": "2026-01-02", "triton": "3.6.0", "torch": "2.11.0"}
KERNEL = "linear_input_grad"
SHAPE = next(iter(TABLES["interpreter"][KERNEL]["32"]))  # one of those that its launch tells apart


@pytest.fixture(autouse=True)
def caches(monkeypatch, tmp_path):
    """A user's cache of the test's own, and nothing remembered from before or kept for after."""
    monkeypatch.delenv("VIT_FAST_TILES", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def forget():
        tile_table.table.cache_clear()
        tile_table.forget()

    forget()
    yield forget
    monkeypatch.undo()
    forget()


def entry_like(**numbers) -> dict:
    return {**TABLES["interpreter"][KERNEL]["32"][SHAPE], **numbers}


def look_up(dtype: torch.dtype = torch.float32) -> dict:
    return tile_table.lookup(KERNEL, CPU, dtype, SHAPE)


def write(path: pathlib.Path, table) -> pathlib.Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(table if isinstance(table, str) else json.dumps(table))
    return path


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_is_canonical_and_whole(path):
    table = TABLES[path.stem]
    assert tile_table.text(table) == path.read_text(), "write it with tile_table.text"
    for kernel, dtypes in table.items():
        assert list(dtypes) == ["16", "32"], kernel
        for dtype, classes in dtypes.items():
            assert classes, (kernel, dtype)
            for shape, entry in classes.items():
                assert not tile_table.fault(entry, like=entry), (kernel, dtype, shape)
                launched = tile_table.launched(entry)
                assert {"num_warps", "num_stages"} <= launched.keys(), (kernel, dtype, shape)
                assert isinstance(entry.get("reason", ""), str), (kernel, dtype, shape)
                assert "spills" not in entry or entry["reason"], (kernel, dtype, shape)


def test_all_files_have_the_same_kernels_in_the_same_order():
    kernels = {path.stem: list(TABLES[path.stem]) for path in FILES}
    for name in kernels:
        assert kernels[name] == kernels["sm_90"], name


@pytest.mark.parametrize(
    ("origin", "right"),
    [
        ("predicted", True),
        (MEASURED, True),
        ("measured", False),
        (None, False),
        ({}, False),
        ({**MEASURED, "commit": "abc"}, False),
        ({**MEASURED, "date": 20260102}, False),
    ],
)
def test_an_origin_is_predicted_or_says_what_measured_it(origin, right):
    entry = entry_like(origin=origin)
    assert bool(tile_table.fault(entry, like=entry)) is not right


def test_an_entry_without_an_origin_is_no_entry():
    entry = entry_like()
    del entry["origin"]
    assert "origin: got None" in tile_table.fault(entry, like=entry)


@pytest.mark.parametrize(
    ("name", "takes"),
    [
        ("sm_90", "sm_90"),
        ("sm_86", "sm_80"),  # the nearest below
        ("sm_89", "sm_80"),
        ("sm_100", "sm_90"),
        ("sm_120", "sm_90"),
        ("sm_75", "sm_80"),  # nothing below
        ("gfx942", "gfx942"),
        ("gfx950", "gfx942"),
        ("gfx1100", "gfx942"),
        ("gfx90a", "gfx942"),  # nothing below
    ],
)
def test_the_nearest_architecture(name, takes, monkeypatch, tmp_path):
    """Of the files of today, whatever will be added to them."""
    for known in ("sm_80", "sm_90", "gfx942"):
        write(tmp_path / f"{known}.json", TABLES[known])
    monkeypatch.setattr(tile_table, "FOLDER", tmp_path)
    assert tile_table.nearest(name) == takes


@pytest.mark.parametrize(("name", "takes"), [("gfx1030", "gfx1100"), ("gfx1201", "gfx1100"), ("gfx908", "gfx942")])
def test_amds_two_families_stay_apart(name, takes):
    assert tile_table.nearest(name) == takes


def test_a_missing_architecture_says_so_once(caplog):
    with caplog.at_level(logging.WARNING, logger="vit_fast"):
        for _ in range(3):
            assert tile_table.table("sm_99")[KERNEL] == TABLES[tile_table.nearest("sm_99")][KERNEL]
    (record,) = caplog.records
    assert "sm_99" in record.getMessage()
    assert "vit-fast tune" in record.getMessage()


def test_a_known_architecture_says_nothing(caplog):
    tile_table.table("sm_90")
    assert not caplog.records


@pytest.mark.parametrize("where", ["VIT_FAST_TILES", "the user's cache"])
def test_a_users_file_replaces_single_entries(where, monkeypatch, tmp_path):
    own = {KERNEL: {"32": {SHAPE: entry_like(BLOCK_M=64, origin=MEASURED)}}}
    if where == "VIT_FAST_TILES":
        monkeypatch.setenv("VIT_FAST_TILES", str(write(tmp_path / "own.json", own)))
    else:
        write(tmp_path / "cache" / "vit_fast" / "tiles" / "interpreter.json", own)
    expected = json.loads(json.dumps(TABLES["interpreter"]))
    expected[KERNEL]["32"][SHAPE] = own[KERNEL]["32"][SHAPE]
    assert tile_table.table("interpreter") == expected, "that entry and nothing else"
    assert look_up() == {**tile_table.launched(entry_like()), "BLOCK_M": 64}
    assert look_up(torch.float16) == tile_table.launched(TABLES["interpreter"][KERNEL]["16"][SHAPE])


def test_the_named_file_goes_before_the_cache(monkeypatch, tmp_path):
    cache = tmp_path / "cache" / "vit_fast" / "tiles" / "interpreter.json"
    write(cache, {KERNEL: {"32": {SHAPE: entry_like(BLOCK_M=16)}}})
    named = write(tmp_path / "own.json", {KERNEL: {"32": {SHAPE: entry_like(BLOCK_M=64)}}})
    monkeypatch.setenv("VIT_FAST_TILES", str(named))
    assert look_up()["BLOCK_M"] == 64


def test_a_user_may_tell_shapes_apart_that_the_package_does_not():
    base = {KERNEL: {"32": {"any": entry_like(BLOCK_M=16)}}}
    few = entry_like(BLOCK_M=64)
    merged = tile_table.merge(base, {KERNEL: {"32": {"few": few}}}, "own.json")
    assert merged == {KERNEL: {"32": {"any": entry_like(BLOCK_M=16), "few": few}}}
    assert base == {KERNEL: {"32": {"any": entry_like(BLOCK_M=16)}}}


def without(name: str) -> dict:
    entry = entry_like()
    del entry[name]
    return entry


@pytest.mark.parametrize(
    ("own", "says"),
    [
        ("", "got no tile table"),
        ("[1]", "got no tile table"),
        ("{", "got no tile table"),
        ({KERNEL: {"32": [1]}}, "got no tile table"),
        ({KERNEL: None}, "got no tile table"),
        ("[" * 100_000, "got no tile table"),
        ('{"a": ' + "1" * 5000 + "}", "got no tile table"),
        ({"gemm": {"32": {SHAPE: entry_like()}}}, f"gemm, 32, {SHAPE}: the package has no such kernel and dtype"),
        ({KERNEL: {"8": {SHAPE: entry_like()}}}, f"{KERNEL}, 8, {SHAPE}: the package has no such kernel and dtype"),
        ({KERNEL: {"32": {SHAPE: 128}}}, f"{KERNEL}, 32, {SHAPE}: got 128, takes an entry"),
        ({KERNEL: {"32": {SHAPE: without("num_warps")}}}, f"{KERNEL}, 32, {SHAPE}: got"),
        ({KERNEL: {"32": {SHAPE: entry_like(BLOCK_Q=1)}}}, f"{KERNEL}, 32, {SHAPE}: got"),
        ({KERNEL: {"32": {SHAPE: entry_like(BLOCK_M="64")}}}, f"{KERNEL}, 32, {SHAPE}: got"),
        ({KERNEL: {"32": {SHAPE: entry_like(BLOCK_M=True)}}}, f"{KERNEL}, 32, {SHAPE}: got"),
        ({KERNEL: {"32": {SHAPE: entry_like(BLOCK_M=0)}}}, f"{KERNEL}, 32, {SHAPE}: got"),
        ({KERNEL: {"32": {SHAPE: entry_like(BLOCK_M=48)}}}, f"{KERNEL}, 32, {SHAPE}: got"),
        ({KERNEL: {"32": {SHAPE: entry_like(BLOCK_M=1 << 40)}}}, f"{KERNEL}, 32, {SHAPE}: got"),
        ({KERNEL: {"32": {SHAPE: entry_like(num_warps=3)}}}, f"{KERNEL}, 32, {SHAPE}: got"),
        ({KERNEL: {"32": {"few": entry_like(BLOCK_M=6.4)}}}, f"{KERNEL}, 32, few: got"),
        ({KERNEL: {"32": {"mnay": entry_like()}}}, f"{KERNEL}, 32, mnay: there is no such shape class"),
        ({KERNEL: {"32": {SHAPE: entry_like(blocks_per_sm=0)}}}, f"{KERNEL}, 32, {SHAPE}: got"),
        ({KERNEL: {"32": {SHAPE: entry_like(blocks_per_sm=1.5)}}}, f"{KERNEL}, 32, {SHAPE}: got"),
        ({KERNEL: {"32": {SHAPE: entry_like(origin="here")}}}, f"{KERNEL}, 32, {SHAPE}: the origin: got 'here'"),
    ],
)
def test_a_wrong_file_is_named_and_changes_nothing(own, says, monkeypatch, tmp_path, caches):
    path = write(tmp_path / "own.json", own)
    monkeypatch.setenv("VIT_FAST_TILES", str(path))
    before = path.read_bytes()
    for _ in range(2):  # not remembered either
        with pytest.raises(ValueError, match=r"own\.json") as error:
            look_up()
        assert says in str(error.value)
    assert path.read_bytes() == before
    monkeypatch.delenv("VIT_FAST_TILES")
    assert tile_table.table("interpreter") == TABLES["interpreter"]


def test_bytes_that_are_no_text(monkeypatch, tmp_path):
    (tmp_path / "own.json").write_bytes(b"\xff\xfe\x00")
    monkeypatch.setenv("VIT_FAST_TILES", str(tmp_path / "own.json"))
    with pytest.raises(ValueError, match=r"own\.json: got no tile table"):
        tile_table.table("interpreter")


def test_a_named_file_must_be_there(monkeypatch, tmp_path):
    monkeypatch.setenv("VIT_FAST_TILES", str(tmp_path / "gone.json"))
    with pytest.raises(ValueError, match=r"VIT_FAST_TILES: got .*gone\.json, takes a file that is there"):
        tile_table.table("interpreter")


def test_lookup_takes_any_where_the_shape_is_not_told_apart(monkeypatch):
    table = {KERNEL: {"32": {"any": entry_like(BLOCK_M=16), "few": entry_like(BLOCK_M=64)}}}
    monkeypatch.setattr(tile_table, "table", lambda name: table)
    assert tile_table.lookup(KERNEL, CPU, torch.float32, "few")["BLOCK_M"] == 64
    assert tile_table.lookup(KERNEL, CPU, torch.float32, "many")["BLOCK_M"] == 16
    assert tile_table.lookup(KERNEL, CPU, torch.float32)["BLOCK_M"] == 16


def test_recording_tells_what_was_looked_up():
    look_up()
    with tile_table.recording() as first:
        look_up()
        look_up(torch.bfloat16)
    look_up(torch.float16)
    assert first == [(KERNEL, "32", SHAPE), (KERNEL, "16", SHAPE)]


def test_using_puts_an_entry_in_place_for_a_while():
    before = look_up()
    with tile_table.using("interpreter", KERNEL, "32", SHAPE, entry_like(BLOCK_M=64)):
        assert look_up() == before | {"BLOCK_M": 64}
    assert look_up() == before


def test_using_puts_it_back_after_an_error():
    before = look_up()
    candidate = tile_table.using("interpreter", KERNEL, "32", SHAPE, entry_like(BLOCK_M=64))
    with pytest.raises(KeyError), candidate:
        tile_table.lookup("no such kernel", CPU, torch.float32)
    assert look_up() == before


@pytest.mark.parametrize(
    ("rows", "shape"),
    [(1, "few"), (512, "few"), (513, "some"), (2048, "some"), (2049, "many"), (50432, "many")],
)
def test_the_class_of_a_product_by_its_rows(rows, shape):
    assert tile_table.rows_class(rows) == shape


@pytest.mark.parametrize(
    ("classes", "taken"),
    [(("few", "some", "many"), 32), (("few", "many"), 16), (("any",), 64)],
)
def test_a_table_that_does_not_tell_some_rows_apart(classes, taken, monkeypatch):
    """It takes what is said of few, or of any."""
    rows = {"few": 16, "some": 32, "many": 128, "any": 64}
    entries = {shape: entry_like(BLOCK_M=rows[shape]) for shape in classes}
    monkeypatch.setattr(tile_table, "table", lambda name: {KERNEL: {"32": entries}})
    tile_table.forget()
    try:
        assert tile_table.lookup(KERNEL, CPU, torch.float32, "some")["BLOCK_M"] == taken
        assert tile_table.residents(KERNEL, CPU, torch.float32, "some") == 3
    finally:
        tile_table.forget()
