"""The kernels as a GPU's compiler sees them, which the interpreter does not: it types nothing and has no registers."""

import dataclasses
import json
import os
import re
from collections import Counter

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter and the compiler cannot share a process", allow_module_level=True)

from vit_fast.kernels import hopper_attention

from benchmarks import compiled, static
from benchmarks.launches import (
    OPS,
    Catch,
    Launch,
    TorchOp,
    kernel_name,
    launches,
    model_launches,
    nbytes,
    parameter,
    table_in_force,
)
from benchmarks.predictions import main_rows
from vit_fast import ops

EVERY_ARCHITECTURE = static.ARCHITECTURES


@pytest.mark.parametrize("arch", ["sm_90", "sm_80"])
def test_main_entries_compile_without_a_fault(arch):
    """One launch of each kernel and entry; `make static` compiles every variant for every architecture."""
    rows = main_rows(arch, "bf16")
    found = [f"{r.kernel}, {r.variant}, {r.tile}: {fault}" for r in rows for fault in static.faults(r)]
    assert not found, "\n".join(found)
    assert {r.op for r in rows} == set(OPS)
    assert {r.direction for r in rows} == {"forward", "backward"}
    assert all(r.predicted_us > 0 and 0 < r.predicted_fraction < 1 for r in rows)
    assert all(r.matrix_instruction for r in rows if r.flops)
    # The tiles of attention for Hopper are no entries of the table: what it takes fits one way.
    assert {r.kernel for r in rows if r.flops and not r.origin} <= {"hopper_attention.forward"}


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("arch", EVERY_ARCHITECTURE)
def test_every_entry_of_every_table_is_reached(arch, dtype):
    found = launches(OPS, arch, dtype)
    assert static.not_reached(arch, [dtype], found) == []
    few = found[: len(found) // 4]
    assert static.not_reached(arch, [dtype], few), "and one that is not reached would be named"


def test_a_launch_knows_its_entry():
    """By the order of the look-ups, not by the tile alone: many entries hold the same numbers."""
    table = table_in_force("sm_90")
    for launch in launches(["mlp"], "sm_90", "bf16"):
        if "PRECISION" in launch.kwargs:
            stem = launch.kernel.__name__.strip("_").removesuffix("_kernel")
            assert stem.split("_")[-1] in launch.entry_name or stem in launch.entry_name, launch.entry_name
            assert launch.entry == table[launch.entry_name]
        else:
            assert launch.entry_name == ""


WAITING = {
    *("patch_embed.cut", "patch_embed.forward", "layer_norm.forward", "ln_linear.forward", "attention.forward"),
    *("linear_residual.forward", "mlp.fc1", "mlp.hidden_grad", "swiglu.gated_fc1", "swiglu.hidden_grad"),
    *("linear.input_grad", "rope.rotate"),
}


@pytest.mark.parametrize(
    ("arch", "early"), [("sm_90", WAITING), ("sm_100", WAITING), ("sm_89", set()), ("gfx942", set())]
)
def test_where_a_launch_may_begin_early(arch, early):
    """With few rows alone; `test_main_entries…` looks at the code of each."""
    found = launches(OPS, arch, "bf16")
    assert {kernel_name(launch.kernel) for launch in found if launch.kwargs.get("launch_pdl")} == early
    assert not any(
        launch.kwargs.get("launch_pdl") for launch in found if launch.variant in ("all operands", "gelu, all operands")
    )


def test_who_may_begin_early_waits_first():
    """And the compiler moves nothing before the wait: what it makes of each kernel is looked at in `resources`."""
    entry = ".entry kernel(.param .u64 .ptr .global .align 16 x_ptr)\n{\n"
    assert not compiled.is_early(f"{entry}griddepcontrol.wait;\nld.global.b32 %r1, [%rd1];")
    assert compiled.is_early(f"{entry}ld.global.b32 %r1, [%rd1];\ngriddepcontrol.wait;")
    assert compiled.is_early(f"{entry}ld.global.b32 %r1, [%rd1];")


def test_tiles_through_pointers_do_the_arithmetic_of_descriptors(monkeypatch):
    """Their bits are equal on a device too: where an epilogue leaves it to the compiler whether a product and a sum
    become one operation, it decides by how the tiles come."""
    arithmetic = re.compile(r"\b(?:wgmma\.mma_async|fma|mul|add|sub|div|max|ex2|tanh)\.\S*f32\S*")
    monkeypatch.setattr(compiled, "resources", lambda _, code: {"does": Counter(arithmetic.findall(code.asm["ptx"]))})
    of_many_rows = {}
    for launch in launches(OPS, "sm_90", "bf16"):
        if launch.kwargs.get("TMA") and launch.entry_name.endswith(("many", "any")):
            of_many_rows.setdefault(launch.entry_name, launch)
    pairs = [(x, dataclasses.replace(x, kwargs=x.kwargs | {"TMA": 0})) for x in of_many_rows.values()]
    found = compiled.compile_launches(("sm_90", launch) for pair in pairs for launch in pair)
    for described, _ in pairs:
        descriptors, pointers = next(found)["does"], next(found)["does"]
        assert any("wgmma" in name for name in descriptors), descriptors
        assert descriptors == pointers, described.entry_name


@pytest.mark.parametrize("tokens", [65, 197, 240, 272])
@pytest.mark.parametrize("width", [64, 80])
def test_attention_for_hopper_compiles_without_a_fault(tokens, width):
    """Forward and, with a log-sum-exp, for training."""
    with Catch("sm_90") as catch:
        catch.run("attention", "", ops.attention_qkv, parameter(256, tokens, 3, 12, width, dtype=torch.bfloat16))
    mine = [x for x in catch.seen if isinstance(x, Launch) and x.kernel is hopper_attention._forward_kernel]
    assert [launch.kwargs["lse_ptr"] is None for launch in mine] == [True, False]
    for launch, found in zip(mine, compiled.compile_launches([("sm_90", launch) for launch in mine])):
        assert static.faults(static.row("sm_90", "bf16", launch, found)) == []
        assert found["matrix_instruction"] == "HGMMA"
        assert found["spill_bytes"] == 0


@pytest.mark.parametrize(
    ("shape", "dtype", "arch"),
    [
        ((256, 64, 3, 12, 64), torch.bfloat16, "sm_90"),  # one tile of queries
        ((256, 273, 3, 12, 64), torch.bfloat16, "sm_90"),  # too long
        ((256, 197, 3, 12, 72), torch.bfloat16, "sm_90"),
        ((256, 197, 3, 12, 64), torch.float32, "sm_90"),
        ((8, 197, 3, 12, 64), torch.bfloat16, "sm_90"),  # few heads
        ((256, 197, 3, 12, 64), torch.bfloat16, "sm_80"),
        ((256, 197, 3, 12, 64), torch.bfloat16, "sm_100"),
    ],
)
def test_attention_for_hopper_leaves_the_rest_alone(shape, dtype, arch):
    with Catch(arch) as catch:
        catch.run("attention", "", ops.attention_qkv, parameter(*shape, dtype=dtype))
    launched = [x.kernel for x in catch.seen if isinstance(x, Launch)]
    assert launched
    assert hopper_attention._forward_kernel not in launched


def test_a_fault_is_found():
    """The check has teeth: the widest tile on one warp spills, and is said to."""
    launch = next(x for x in launches(["linear_residual"], "sm_90", "bf16") if x.kernel.__name__ == "_forward_kernel")
    launch = dataclasses.replace(launch, kwargs=launch.kwargs | {"num_warps": 1})
    (found,) = compiled.compile_launches([("sm_90", launch)])
    r = static.row("sm_90", "bf16", launch, found)
    assert any("spilled" in fault for fault in static.faults(r)), r


SPILLS = {"spill_bytes": 96, "excused_spill_bytes": 96, "reason": "and yet the fastest", "origin": {"device": "H200"}}


def a_row(**changes) -> static.Row:
    row = static.Row("mlp", "mlp.fc1", "forward", "gelu", "sm_90", "bf16", "mlp_fc1 16 any", "m128 n128 k64 w8 s3")
    right = {"shared_limit": 232448, "matrix_instruction": "HGMMA", "flops": 1e9}
    return dataclasses.replace(row, **right | changes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, ""),
        ({"spill_bytes": 4}, "0 allowed"),
        (SPILLS | {"origin": "predicted"}, "0 allowed"),
        (SPILLS, ""),
        (SPILLS | {"spill_bytes": 100}, "96 allowed"),
        (SPILLS | {"reason": ""}, "0 allowed"),
        (SPILLS | {"excused_spill_bytes": 0}, "0 allowed"),
        ({"slow_products": 4}, "from registers"),
        ({"slow_products": 4, "flops": 0}, ""),
        ({"spill_bytes": 4, "arch": "sm_100"}, "0 allowed"),
        ({"spill_bytes": 64, "arch": "sm_89"}, ""),
        ({"spill_bytes": 68, "arch": "sm_89"}, "64 allowed"),
        (SPILLS | {"origin": "predicted", "arch": "sm_89"}, ""),
        (SPILLS | {"origin": "predicted", "arch": "sm_89", "spill_bytes": 100}, "96 allowed"),
        ({"spill_bytes": 68, "dtype": "fp32"}, "64 allowed"),
        ({"shared_bytes": 232_449}, "shared memory"),
        ({"matrix_instruction": "HMMA"}, "without wgmma"),
        ({"matrix_instruction": ""}, "without wgmma"),
        ({"matrix_instruction": "HMMA", "tile": "m32 n128 k64 w8 s3"}, ""),
        ({"matrix_instruction": "HMMA", "tile": "m64 n128 k64 w2 s3"}, ""),
        ({"matrix_instruction": "HMMA", "arch": "sm_80"}, ""),
        ({"matrix_instruction": "HMMA", "op": "attention", "tile": "n32 w4 s2"}, "without wgmma"),
        ({"matrix_instruction": "HMMA", "op": "rope_attention", "tile": "n32 w4 s2"}, "without wgmma"),
        ({"matrix_instruction": "HMMA", "op": "window_attention", "tile": "w4 s2"}, "without wgmma"),
        ({"matrix_instruction": "", "flops": 0}, ""),
        ({"error": "Pass failed"}, "Pass failed"),
    ],
)
def test_what_the_check_holds_against_a_row(changes, said):
    found = static.faults(a_row(**changes))
    assert (said in "".join(found)) if said else found == []


def test_a_compiler_that_dies_is_a_row_with_an_error(monkeypatch):
    monkeypatch.setattr(compiled.triton, "compile", lambda *args, **kwargs: os._exit(3))
    launch = launches(["linear_residual"], "sm_90", "bf16")[0]
    (found,) = compiled.compile_launches([("sm_90", launch)])
    assert "ended with 3" in static.row("sm_90", "bf16", launch, found).error


def loops_of(*text: str) -> dict:
    return compiled.read_loops([(f"{16 * i:04x}", each) for i, each in enumerate(text)])


def test_loops_are_read_from_the_code():
    inner = ["FADD", "HGMMA", "MUFU.EX2", "@P0 BRA 0x20"]
    assert loops_of("MOV", "MUFU.RCP", *inner, "ST", "EXIT", "BRA 0x80") == {"step": 4, "tile": 0, "special": 1}
    nested = loops_of("MOV", "MOV", *inner, "MUFU.RCP", "ST", "@!P1 BRA 0x10", "EXIT")
    assert nested == {"step": 4, "tile": 4, "special": 2}, "a loop over tiles round it: once a tile"
    epilogue = ["MUFU.TANH"] * 40
    flat = loops_of("MOV", "HGMMA", f"@P1 BRA 0x{16 * 43:x}", *epilogue, "FADD", "BRA.U UP0, 0x10", "EXIT")
    assert flat == {"step": 4, "tile": 40, "special": 40}, "one flattened loop, whose branch skips the epilogue"
    aside = loops_of("HGMMA", "WAIT", "@P0 BRA 0x50", "@P1 BRA 0x0", "EXIT", "WAIT", "BRA 0x20")
    assert aside["step"] == 4, "code put aside that comes back is no loop"
    assert loops_of("MOV", "BRA 0x10") == {"step": 0, "tile": 0, "special": 0}


@pytest.mark.parametrize(
    ("text", "counts"),
    [
        ("MUFU.EX2 R4, R4", True),
        ("MUFU.TANH R4, R4", True),
        ("v_exp_f32_e32 v1, v1", True),
        ("v_rcp_iflag_f32_e32 v1, v1", True),
        ("v_rsq_f16_e64 v1, v1", True),
        ("v_ldexp_f32 v1, v1, v2", False),
        ("FMUL R4, R4, R4", False),
    ],
)
def test_special_functions_are_told_by_name(text, counts):
    assert bool(compiled.SPECIAL_INSTRUCTION.search(text)) == counts


def test_bytes_count_every_distinct_tensor_once():
    import torch

    qkv = torch.empty(2, 5, 3, 4, 8, dtype=torch.bfloat16, device="meta")
    q, k, v = qkv.unbind(2)
    assert nbytes(((q, 1), (k, 2), v)) == qkv.numel() * 2
    assert nbytes((q, {"again": q, "alias": q.view(q.shape)}, None)) == q.numel() * 2
    assert nbytes(torch.empty(4, device="meta").expand(3, 4)) == 16


@pytest.mark.parametrize("training", [False, True])
def test_a_whole_model_is_caught(training):
    """Twelve blocks' launches, and what PyTorch does besides."""
    seen = model_launches("vit_base_patch16_224", "sm_90", 2, training)
    kernels = [x.kernel.__name__ for x in seen if not isinstance(x, TorchOp)]
    assert len(kernels) % 12 < 6, "all but the patch embedding's are in the blocks"
    assert kernels.count("_fc1_kernel") == 12
    assert any(isinstance(x, TorchOp) and x.flops for x in seen), "the head"
    directions = {x.direction for x in seen if not isinstance(x, TorchOp)}
    assert directions == ({"forward", "backward"} if training else {"forward"})


@pytest.mark.parametrize(("tokens", "others"), [(197, (193, 196, 200, 208)), (257, (259, 272)), (577, (576, 680))])
def test_another_image_size_compiles_nothing_anew(tokens, others):
    """As long as the same pieces cover the tokens and the products stay in their class of rows."""

    def compiled_of(count: int) -> list[str]:
        catch = Catch("sm_90")
        x, norm = parameter(3, count, 128, dtype=torch.bfloat16), parameter(128, dtype=torch.bfloat16)
        square, wide = (parameter(n, 128, dtype=torch.bfloat16) for n in (128, 384))
        first = norm, norm, wide, None, square, None, None, None
        second = norm, norm, square, None, square, None, None, None
        with catch:
            catch.run("block", "", ops.block, x, *first, *second, 2)
        sources = [compiled.source_for("sm_90", step) for step in catch.seen if isinstance(step, Launch)]
        return [f"{source.hash()} {sorted(options.items(), key=str)}" for source, _, options in sources]

    first = compiled_of(tokens)
    assert len(set(first)) > 10
    for count in others:
        assert compiled_of(count) == first, count


def test_the_program_writes_its_rows_and_fails_where_one_breaks_a_rule(monkeypatch, tmp_path, capsys):
    found = {"registers": 100, "shared_bytes": 1000, "slow_products": 0, "instructions": 900, "special": 9}
    found |= {"loops": {"step": 90, "tile": 300, "special": 8}, "threads": 256}

    def compiled(jobs, spilled):
        for _, launch in jobs:
            instruction = "HGMMA" if "PRECISION" in launch.kwargs else ""
            yield found | {"spill_bytes": spilled, "matrix_instruction": instruction}

    for spilled, code in ((0, 0), (4, 1)):
        monkeypatch.setattr(static, "compile_launches", lambda jobs, spilled=spilled: compiled(jobs, spilled))
        assert static.main(["--op", "linear_residual", "--check", "--json", str(tmp_path / "rows.json")]) == code
        assert ("FAULT: 4 bytes a thread spilled" in capsys.readouterr().out) is bool(code)
        rows = json.loads((tmp_path / "rows.json").read_text())
        promised = "op kernel pass arch dtype entry registers spill_bytes shared_bytes shared_limit matrix_instruction "
        promised += "blocks_per_sm special_per_element bytes flops predicted_us predicted_fraction origin"
        assert all(set(promised.split()) <= row.keys() for row in rows)
        assert {row["pass"] for row in rows} == {"forward", "backward"}
