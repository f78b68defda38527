"""The prediction's arithmetic, held against numbers worked out by hand."""

import os

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the launches are caught where triton would compile them", allow_module_level=True)

from benchmarks import predictions, roofline, static
from benchmarks.launches import TorchOp, hardware, launches, tensors
from benchmarks.roofline import Work


def found(op: str, kernel: str, dtype: str = "bf16", variant: str = ""):
    return next(
        launch
        for launch in launches([op], "sm_90", dtype)
        if kernel in launch.kernel.__name__ and launch.variant.startswith(variant)
    )


def test_hardware_covers_what_is_claimed_and_says_where_from():
    chips = hardware()["architectures"]
    claimed = {"sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx90a", "gfx942", "gfx950", "gfx1100"}
    assert set(chips) == claimed
    assert "2026-11-25" in hardware()["frozen"]
    for chip in chips.values():
        assert chip["device"]
        assert "datasheet" in chip["source"] or "measured" in chip["source"]
    assert all(constant["source"] for constant in hardware()["model"].values())


@pytest.mark.parametrize(
    ("arch", "registers", "shared", "threads", "blocks", "why"),
    [
        ("sm_90", 128, 0, 256, 2, "128 x 256 registers, of 65,536"),
        ("sm_90", 129, 0, 256, 1, "136 after rounding: three warps a scheduler"),
        ("sm_90", 168, 0, 128, 3, "three warps a scheduler are three blocks of four"),
        ("sm_90", 32, 115_712, 128, 2, "shared memory, 1,024 bytes a block reserved"),
        ("sm_90", 32, 115_713, 128, 1, "one byte too many for two"),
        ("sm_90", 16, 0, 1024, 2, "2,048 threads"),
        ("sm_90", 16, 0, 32, 32, "32 blocks"),
        ("sm_86", 16, 0, 512, 3, "1,536 threads"),
        ("gfx942", 128, 0, 256, 4, "512 registers a lane and SIMD, four waves of 128"),
        ("gfx942", 128, 32_768, 256, 2, "64 KiB"),
        ("gfx1100", 96, 0, 128, 8, "1,536 registers a lane and SIMD, sixteen waves of 96 on each of two"),
        ("sm_90", 255, 300_000, 1024, 1, "what does not fit at all counts as one"),
    ],
)
def test_blocks_of_a_multiprocessor(arch, registers, shared, threads, blocks, why):
    assert roofline.blocks_per_sm(arch, registers, shared, threads) == blocks, why


def test_work_of_a_product():
    launch = found("linear_residual", "_forward")
    work = roofline.work(launch)
    M, N, K = 256 * 197, 768, 768
    assert work.flops == 2 * M * N * K
    assert work.tiles == (M // launch.kwargs["BLOCK_M"]) * (N // launch.kwargs["BLOCK_N"])
    assert work.padded_flops == work.flops, "every tile is full"
    # x, W, residual (x again here: once) and y in bf16; b, LayerScale and drop.
    assert work.bytes == 2 * (M * K + N * K + M * N + N + N + 256)


def test_work_of_a_weight_gradient_counts_its_splits():
    launch = found("linear_residual", "weight_grad")
    M, N, K = 256 * 197, 768, 768
    work = roofline.work(launch)
    assert work.flops == 2 * M * N * K
    assert work.tiles == launch.grid[0] * launch.grid[1]
    assert work.steps * launch.kwargs["BLOCK_K"] == launch.kwargs["span"]


def test_work_of_the_patch_embedding():
    work = roofline.work(found("patch_embed", "_forward"))
    assert work.flops == 2 * 256 * 197 * 768 * 768


@pytest.mark.parametrize(("kernel", "products"), [("forward", 2), ("maps", 1)])
def test_work_of_attention(kernel, products):
    work = roofline.work(found("attention", kernel, variant="head width 64, 197"))
    assert work.flops == 2 * products * 256 * 12 * 197 * 197 * 64
    assert work.padded_flops > work.flops
    assert work.padded_flops / (2 * products * 64) == work.elements >= 256 * 12 * 208 * 197
    assert work.matrix_share == roofline.constant("back_to_back" if kernel == "forward" else "back_to_back_streaming")


def test_work_of_a_turn():
    """Every number of queries and keys read once and written once, also where it is turned in place; the tables."""
    tables, matrix = 2 * 4 * 196 * 64, 2 * 256 * 201 * 2 * 12 * 64
    for back, matrices in ((False, 2), (True, 1)):
        (launch,) = [
            launch
            for launch in launches(["rope_attention"], "sm_90", "bf16")
            if launch.variant == "head width 64, halves"
            and launch.kwargs.get("BACK") is back
            and launch.direction == ("backward" if back else "forward")
        ]
        assert len(tensors((launch.kwargs["x"], launch.kwargs["y"]))) == matrices
        work = roofline.work(launch)
        assert work.bytes == 2 * matrix + tables
        assert (work.flops, work.tile_elements) == (0, 32 * 4 * 64), "four heads of 32 tokens a program"
        assert work.tiles == launch.grid[0] * launch.grid[1] == 256 * 7 * 6


@pytest.mark.parametrize(("kernel", "products", "maps"), [("_forward", 2, 3 + 1), ("_grad", 5, 3 + 3 + 1)])
def test_work_of_attention_in_windows(kernel, products, maps):
    """Of 56 x 56 tokens in windows of 7 x 7, three heads of 32 each; a program has many, one after the other."""
    launch = found("window_attention", kernel, variant="width 32")
    work, windows = roofline.work(launch), 256 * 8 * 8
    assert work.flops == 2 * products * windows * 3 * 49 * 49 * 32
    assert work.padded_flops == 2 * products * windows * 3 * 64 * 64 * 32
    assert (work.tiles, work.tile_elements, work.elements) == (windows * 3, 64 * 64, windows * 3 * 64 * 64)
    partials = 4 * launch.grid[0] * 49 * 49 if kernel == "_grad" else 0  # the sums of each program, in fp32
    assert work.bytes == 2 * (256 * 56 * 56 * maps * 96 + 13 * 13 * 3) + partials
    assert launch.grid[0] * launch.kwargs["span"] >= work.tiles > launch.grid[0] * (launch.kwargs["span"] - 1)


def test_what_a_program_does_once_is_no_part_of_its_windows():
    """The bias and the sums of its gradient: a window is what stands in the loop."""
    launch = found("window_attention", "_grad")
    made = {"instructions": 2200, "special": 40, "threads": 128, "loops": {"step": 1000, "tile": 4, "special": 32}}
    assert static.a_tile(launch, made) == {
        "step_instructions": 1000,
        "tile_instructions": 4,
        "special_per_element": 1.0,
    }


def test_a_kernel_that_multiplies_unknown_products_is_an_error():
    import dataclasses

    launch = found("linear_residual", "_forward")
    unknown = dataclasses.replace(launch, kwargs={k: v for k, v in launch.kwargs.items() if k != "PRECISION"})
    made = {"registers": 128, "spill_bytes": 0, "shared_bytes": 0, "matrix_instruction": "HGMMA", "instructions": 1}
    made |= {"loops": None, "special": 0, "threads": 256}
    assert "knows no products" in static.row("sm_90", "bf16", unknown, made).error
    assert not static.row("sm_90", "bf16", launch, made).error


def test_tiles_do_not_come_from_the_grid_of_a_product():
    """A persistent kernel's grid is the number of multiprocessors."""
    import dataclasses

    launch = found("linear_residual", "_forward")
    persistent = dataclasses.replace(launch, grid=(132,))
    assert roofline.work(persistent) == roofline.work(launch)


def product(tiles: int, steps: int = 12, **changes) -> Work:
    flops = 2.0 * tiles * 128 * 128 * 64 * steps
    return Work(0, tiles, 128 * 128, tiles * 128 * 128, **{"flops": flops, "padded_flops": flops} | changes)


def time_of(work: Work, blocks: int = 1, threads: int = 256, **changes) -> roofline.Prediction:
    return roofline.predict("sm_90", "bf16", work, blocks, threads, **{"instruction": "HGMMA"} | changes)


def test_the_matrix_rate():
    work = product(132 * 10)
    prediction = time_of(work)
    assert prediction.bound == "matrix"
    assert prediction.us == pytest.approx(2 + work.flops / 790e6)
    assert prediction.fraction == pytest.approx(1 - 2 / prediction.us)
    assert time_of(work, instruction="HMMA").us == pytest.approx(2 + work.flops / (0.62 * 790e6))
    assert roofline.predict("sm_80", "bf16", work, 1, 256, instruction="HMMA").us == pytest.approx(
        2 + work.flops / 312e6 * 108 * 13 / 1320
    ), "mma.sync is the widest product there is; 1,320 tiles in 13 rounds of 108"


def test_waves():
    full = time_of(product(132)).us - 2
    assert time_of(product(133)).us - 2 == pytest.approx(2 * full)
    assert time_of(product(133), blocks=2).us - 2 == pytest.approx(2 * full), "one block of 8 warps busies it"
    assert time_of(product(264), blocks=2, threads=128).us - 2 == pytest.approx(2 * full)
    assert time_of(product(133), blocks=2, threads=128).us - 2 == pytest.approx(2 * full), "264 places, half empty"


def test_the_other_terms():
    assert time_of(Work(43_000_000, 1000, 1, 1000)).us == pytest.approx(12)
    special = time_of(Work(0, 132, 4096, 132 * 4096), special_per_element=16)
    assert special.bound == "special"
    assert special.us == pytest.approx(2 + 4096 / 1700)
    issue = time_of(Work(0, 132, 1, 132), issued=1700)
    assert issue.bound == "issue"
    assert issue.us == pytest.approx(2 + 2), "1,700 instructions of 8 warps on four schedulers at 1.7 GHz"


@pytest.mark.parametrize(
    ("work", "changes"),
    [
        (product(133, fill_flops=1e9), {"instruction": "HMMA"}),
        (product(500, matrix_share=0.34), {}),
        (product(500), {"special_per_element": 300}),
        (product(500), {"issued": 100_000}),
        (Work(10**9, 100, 1, 100, flops=1e6, padded_flops=2e6), {}),
    ],
)
def test_the_parts_of_a_time_sum_to_it(work, changes):
    prediction = time_of(work, **changes)
    assert sum(prediction.parts.values()) == pytest.approx(prediction.us)
    assert min(prediction.parts.values()) >= 0
    assert 0 < prediction.fraction < 1


def test_a_step_of_pytorch():
    assert roofline.predict_torch("sm_90", "bf16", TorchOp("aten.add", 43_000_000, 0)) == pytest.approx(12)


def test_operations_of_the_published_models():
    assert predictions.forward_flops("vit_base_patch16_224") / 2e9 == pytest.approx(17.6, abs=0.05)
    assert predictions.forward_flops("vit_huge_patch14_224") / 2e9 == pytest.approx(167, abs=1)


def test_a_part_of_a_page_is_replaced():
    page = "before\n<!-- begin: models -->\nold\n<!-- end: models -->\nafter\n"
    made = predictions.replace_part(page, "models", r"new \1")
    assert made == "before\n<!-- begin: models -->\nnew \\1\n<!-- end: models -->\nafter\n"
    with pytest.raises(ValueError, match="no part"):
        predictions.replace_part(page, "kernels", "")


def test_the_plot(tmp_path):
    pytest.importorskip("matplotlib")
    row = static.Row(
        "mlp", "mlp.fc1", "forward", "", "sm_90", "bf16", "", "", bytes=10**8, flops=1e11, predicted_us=200
    )
    predictions.plot([row], tmp_path / "roofline.png")
    assert (tmp_path / "roofline.png").stat().st_size > 10_000
