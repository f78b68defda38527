"""The kernels as a GPU's compiler sees them, which the interpreter does not: it types nothing and has no registers."""

import os

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter and the compiler cannot share a process", allow_module_level=True)

from benchmarks.static import OPS, faults, launches, row

# One of each kind; `python -m benchmarks.static --check` compiles all of them.
VARIANTS = {
    "attention": ("head width 64", "head width 80"),
    "mlp": ("gelu, all operands",),
}


@pytest.mark.parametrize("arch", ["sm_90", "sm_80"])
@pytest.mark.parametrize("op", OPS)
def test_main_entries_compile_without_a_fault(op, arch):
    chosen = [launch for launch in launches([op], arch, "bf16") if launch[1] in VARIANTS.get(op, ("all operands",))]
    assert chosen
    rows = [row(arch, "bf16", launch) for launch in chosen]
    found = [f"{r.kernel}, {r.variant}, {r.entry}: {fault}" for r in rows for fault in faults(r)]
    assert not found, "\n".join(found)


def test_a_fault_is_found():
    """The check has teeth: the widest tile on one warp spills, and is said to."""
    op, variant, kernel, args, kwargs = next(
        launch for launch in launches(["linear_residual"], "sm_90", "bf16") if launch[2].__name__ == "_forward_kernel"
    )
    r = row("sm_90", "bf16", (op, variant, kernel, args, kwargs | {"num_warps": 1}))
    assert any("spilled" in fault for fault in faults(r)), r
