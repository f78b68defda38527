"""What the roofline says of whole models and of small ones, and the page and the picture that show it.

All of it is predicted but for the one table that holds it against a device.
"""

import collections
import dataclasses
import math
import pathlib
import statistics
from collections.abc import Iterator

import torch

from benchmarks import roofline, static
from benchmarks.compiled import compile_launches
from benchmarks.launches import (
    DTYPES,
    ODD,
    OPS,
    Catch,
    Launch,
    TorchOp,
    kernel_name,
    launches,
    model_launches,
    op_calls,
    sameness,
)
from benchmarks.pages import markdown_table, replace_part, results

# Name, title, and the goals in per cent of the measured matrix rate: inference and training.
MODELS = (
    ("vit_base_patch16_224", "ViT-B/16", 75, 62),
    ("vit_large_patch16_224", "ViT-L/16", 80, 68),
    ("vit_huge_patch14_224", "ViT-H/14", 82, 70),
)
BATCH = 256
LOSSES = {
    "again": "products made again for backward",
    "edges": "edges of tiles",
    "fill": "starts and ends of tiles, at these K",
    "rate": "products that wait for products, and mma.sync",
    "special": "special functions",
    "issue": "other instructions",
    "exposed": "epilogues that no product hides",
    "memory": "memory",
    "waves": "the last wave",
    "launch": "launches",
    "torch": "PyTorch's own steps",
}


def predict_all(arch: str, dtype: str, found: list[Launch]) -> list[roofline.Prediction]:
    """The prediction of each launch; what is the same is compiled once.

    Raises:
        RuntimeError: where the compiler refuses a launch.
    """
    distinct = {sameness(launch): launch for launch in found}
    known = {}
    for key, compiled in zip(distinct, compile_launches((arch, launch) for launch in distinct.values())):
        if "error" in compiled:
            raise RuntimeError(f"{distinct[key].kernel.__name__} on {arch}: {compiled['error']}")
        known[key] = static.predict(arch, dtype, distinct[key], compiled)
    return [known[sameness(launch)] for launch in found]


# ---- whole models --------------------------------------------------------------------------------------------------


def forward_flops(name: str, pixels: int = 224, **more) -> int:
    """Operations of one image's forward pass, two a multiply-add: every product of the model as it is published.

    `more` are further arguments of the model.
    """
    import vit_fast

    with torch.device("meta"):
        model = vit_fast.create_model(name, num_classes=1000, img_size=pixels, **more)

    def of_mlp(mlp: torch.nn.Module) -> int:
        return mlp.fc1.weight.numel() + mlp.fc2.weight.numel()

    patches, width = model.patch_embed.num_patches, model.embed_dim
    tokens = patches + model.num_prefix_tokens
    macs = len(model.blocks) * tokens * (4 * width * width + of_mlp(model.blocks[0].mlp) + 2 * tokens * width)
    macs += patches * model.patch_embed.proj.weight.numel() + model.head.weight.numel()
    if model.attn_pool is not None:  # one query that looks at every patch, and an MLP for it
        macs += (2 * patches + 2) * width * width + 2 * patches * width + of_mlp(model.attn_pool.mlp)
    return 2 * macs


def model_parts(name: str, arch: str, training: bool) -> tuple[dict[str, float], dict[str, float]]:
    """Microseconds of a batch by what they go to, "ideal" and LOSSES; and what each kernel takes besides products."""
    seen = model_launches(name, arch, BATCH, training)
    predictions = iter(predict_all(arch, "bf16", [step for step in seen if isinstance(step, Launch)]))
    parts, lost = collections.Counter(), collections.Counter()
    for step in seen:
        if isinstance(step, TorchOp):
            products = step.flops / (roofline.matrix_tflops(arch, "bf16") * 1e6)
            us = roofline.predict_torch(arch, "bf16", step)
            parts.update(products=products, torch=us - products)
            lost[step.name] += us - products
        else:
            prediction = next(predictions)
            parts.update(prediction.parts)
            lost[kernel_name(step.kernel)] += prediction.us - prediction.parts["products"]
    ideal = (3 if training else 1) * forward_flops(name) * BATCH / (roofline.matrix_tflops(arch, "bf16") * 1e6)
    parts["again"] = parts.pop("products") - ideal
    return {"ideal": ideal} | dict(parts), dict(lost)


def models_table(arch: str) -> str:
    """A Markdown table: every model, inference and training step, its fraction of the ceiling, its goal, the blame."""
    head = [f"model, batch {BATCH}, bf16", "images/s", "% of ceiling", "goal", *LOSSES, "to blame"]
    rows = []
    for name, title, *goals in MODELS:
        for training, goal in zip((False, True), goals):
            parts, lost = model_parts(name, arch, training)
            total = sum(parts.values())
            shares = {loss: 100 * parts.get(loss, 0) / total for loss in LOSSES}
            worst = sorted(shares, key=shares.get, reverse=True)[:2]
            kernels = sorted(lost, key=lost.get, reverse=True)[:3]
            blame = " and ".join(LOSSES[loss] for loss in worst)
            blame += "; most in " + ", ".join(f"`{kernel}` {100 * lost[kernel] / total:.0f} %" for kernel in kernels)
            fraction = 100 * parts["ideal"] / total
            cells = [
                f"{title} {'training step' if training else 'inference'}",
                f"{BATCH / total * 1e6:,.0f}",
                f"{fraction:.0f}",
                f"{goal}",
                *(f"{share:.0f}" for share in shares.values()),
                blame if fraction < goal else f"reaches the goal; then {blame}",
            ]
            rows.append(cells)
    return markdown_table(head, rows)


# ---- the MLP of small models ---------------------------------------------------------------------------------------


def one_mlp_kernel(M: int, D: int, F: int, fc1: tuple[Launch, dict], fc2: tuple[Launch, dict]) -> tuple:
    """The work of a kernel that keeps 128 rows of the hidden layer to itself, and the instructions that a warp issues.

    Its epilogues and its loops are those that the compiler made of fc1 and fc2; rows are normalised once, not once for
    each tile of the hidden layer.
    """
    tiles = math.ceil(M / 128)
    chunks, steps = math.ceil(F / fc1[0].kwargs["BLOCK_N"]), roofline.work(fc1[0]).steps
    first, second = static.a_tile(*fc1), static.a_tile(*fc2)
    issued = chunks * first["tile_instructions"]
    issued += first["step_instructions"] * steps + 2 * chunks * steps * second["step_instructions"]
    work = roofline.Work(
        bytes=2 * (2 * M * D + 2 * D * F),
        tiles=tiles,
        tile_elements=128 * F,
        elements=tiles * 128 * F,
        flops=4 * M * D * F,
        padded_flops=4 * tiles * 128 * D * F,
        fill_flops=2 * tiles * 128 * D * roofline.constant("tile_fill_k"),
        matrix_share=roofline.constant("back_to_back"),
    )
    return work, issued


def small_mlp_table(arch: str) -> str:
    """Whether the whole MLP in one kernel pays at D = 192 and 384: a Markdown table and the answer."""
    head = [
        "D",
        "F",
        "LayerNorm, fc1 and fc2, µs",
        "one kernel, µs",
        "bound by",
        "as fast at a share of the matrix rate",
    ]
    rows, pays = [], {}
    for D in (192, 384):
        M, F = BATCH * 197, 4 * D
        catch = Catch(arch)
        with catch, torch.no_grad():
            for op, _, call, *operands in op_calls(DTYPES["bf16"], BATCH, 197, D, F, every=False):
                if op == "mlp":
                    call(*operands)
        found = [step for step in catch.seen if isinstance(step, Launch)]
        compiled = list(compile_launches((arch, launch) for launch in found))
        apart = sum(static.predict(arch, "bf16", *pair).us for pair in zip(found, compiled))
        fc1, fc2 = (pair for pair in zip(found, compiled) if roofline.work(pair[0]).flops)
        work, issued = one_mlp_kernel(M, D, F, fc1, fc2)
        special = static.a_tile(*fc1)["special_per_element"]
        fused = roofline.predict(arch, "bf16", work, 1, 256, special, issued)
        at_full_rate = dataclasses.replace(work, matrix_share=1.0)
        least = roofline.predict(arch, "bf16", at_full_rate, 1, 256, special, issued)
        launch_us = roofline.constant("launch_us")
        matrix_us = roofline.predict(arch, "bf16", dataclasses.replace(at_full_rate, bytes=0), 1, 256).us - launch_us
        share = f"{matrix_us / (apart - launch_us):.2f}" if least.us < apart else "none"
        pays[D] = fused.us < apart
        rows.append([D, F, f"{apart:.0f}", f"{fused.us:.0f}", fused.bound, share])
    answer = ", ".join(f"at D = {D} {'pays' if pay else 'does not pay'}" for D, pay in pays.items())
    return markdown_table(head, rows) + f"\n\nOne kernel {answer}, by this model and with the kernels as they are."


# ---- page and picture ----------------------------------------------------------------------------------------------


def main_launches(arch: str, dtype: str) -> list[Launch]:
    """The first launch of each op, kernel and entry, with every operand there."""
    first = {}
    for launch in launches(OPS, arch, dtype):
        if not launch.variant.startswith((ODD, "autocast")) and "no optional" not in launch.variant:
            first.setdefault((launch.op, launch.kernel, launch.direction, launch.entry_name), launch)
    return list(first.values())


def main_rows(arch: str, dtype: str) -> list[static.Row]:
    chosen = main_launches(arch, dtype)
    compiled = compile_launches((arch, launch) for launch in chosen)
    return [static.row(arch, dtype, launch, found) for launch, found in zip(chosen, compiled)]


def rows_table(rows: list[static.Row]) -> str:
    """A Markdown table of rows."""
    head = ["op", "kernel", "entry", "tile", "registers", "spilled", "shared", "instruction", "blocks"]
    head += ["special per element", "MB", "GFLOP", "predicted µs", "% of ceiling", "bound"]
    lines = []
    for r in rows:
        cells = [r.op, f"`{r.kernel}`", r.entry, r.tile, r.registers, r.spill_bytes, r.shared_bytes]
        cells += [r.matrix_instruction, r.blocks_per_sm, f"{r.special_per_element:.2f}", f"{r.bytes / 1e6:.0f}"]
        cells += [f"{r.flops / 1e9:.0f}", f"{r.predicted_us:.0f}", f"{100 * r.predicted_fraction:.0f}", r.bound]
        lines.append(cells)
    return markdown_table(head, lines)


def measured_launches() -> Iterator[tuple[dict, list[tuple[Launch, float]]]]:
    """Each line of kernels.json, and its launches as they are made now with what a device took for them then, in µs.

    The file has the kernels' names alone: a tile or an epilogue that is another since pairs with the time of the old.

    Raises:
        ValueError: where the model now launches other kernels, or in another order, than the device timed.
    """
    for line in results("kernels")["results"]:
        whole = {"depth": 2, "global_pool": "avg"}  # as benchmarks/gpu.py: what reads all tokens leaves out none
        seen = model_launches(line["model"], "sm_90", line["batch"], line["training"], **whole)
        found = [step for step in seen if isinstance(step, Launch)]
        now, then = [kernel_name(launch.kernel) for launch in found], [kernel for kernel, *_ in line["launches"]]
        if now != then:
            raise ValueError(f"kernels.json, {line['model']}: got launches of {then}, the model makes {now}")
        yield line, [(launch, us) for launch, (_, _, us, _) in zip(found, line["launches"])]


def launches_table() -> str:
    """Each launch of a model of two blocks as it is predicted now and as a device measured it: a Markdown table.

    Launches that differ in nothing are one line: how many, and the mean of their times.
    """
    titles = {name: title for name, title, *_ in MODELS}
    rows = []
    for line, timed in measured_launches():
        alike = {}
        for launch, us in timed:
            alike.setdefault(sameness(launch), (launch, []))[1].append(us)
        predictions = predict_all("sm_90", "bf16", [launch for launch, _ in alike.values()])
        for (launch, times), prediction in zip(alike.values(), predictions):
            us = statistics.mean(times)
            rows.append(
                [
                    titles[line["model"]],
                    f"training, {launch.direction}" if line["training"] else "inference",
                    f"`{kernel_name(launch.kernel)}`",
                    " x ".join(f"{launch.kwargs[name]}" for name in "MNK" if name in launch.kwargs) or "-",
                    len(times),
                    f"{prediction.us:,.0f}",
                    f"{us:,.0f}",
                    f"{us / prediction.us:.2f}",
                ]
            )
    head = ["model", "pass", "kernel", "M x N x K", "launches", "predicted, µs", "measured, µs", "measured / predicted"]
    return markdown_table(head, rows)


def write_page(path: pathlib.Path) -> None:
    """Make the parts of a page again that come from the compiler, all for sm_90."""
    text = path.read_text()
    parts = {
        "kernels": rows_table(main_rows("sm_90", "bf16")),
        "models": models_table("sm_90"),
        "small MLP": small_mlp_table("sm_90"),
        "launches": launches_table(),
    }
    for name, body in parts.items():
        text = replace_part(text, name, body)
    path.write_text(text)


def plot(rows: list[static.Row], path: pathlib.Path) -> None:
    """Operations a byte against predicted rate, a point a kernel and a panel an architecture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    archs = list(dict.fromkeys(r.arch for r in rows))
    columns = min(5, len(archs))
    lines = math.ceil(len(archs) / columns)
    figure, axes = pyplot.subplots(lines, columns, squeeze=False, figsize=(7 * columns, 5 * lines))
    for axis, arch in zip(axes.flat, archs):
        chip, points = roofline.device(arch), {}
        for r in rows:
            if r.arch == arch and r.flops and not r.error:
                points.setdefault((r.kernel, r.dtype), (r.flops / r.bytes, r.flops / r.predicted_us / 1e6))
        for dtype in dict.fromkeys(dtype for _, dtype in points):
            ceiling = roofline.matrix_tflops(arch, dtype)
            corner = ceiling / chip["memory_tbs"]
            axis.plot([10, corner, 1000], [10 * chip["memory_tbs"], ceiling, ceiling], color="0.7")
        for index, ((kernel, dtype), point) in enumerate(sorted(points.items())):
            colour = pyplot.get_cmap("tab20")(index % 20)
            axis.scatter(*point, s=24, color=colour, marker="os^v"[index % 4], label=f"{kernel} {dtype}")
        axis.legend(fontsize=6, loc="lower right")
        axis.set(xscale="log", yscale="log", xlabel="operations a byte", ylabel="TFLOP/s, predicted")
        axis.set_title(f"{arch}, {chip['device']}: predicted, not measured", fontsize=10)
    for axis in axes.flat[len(archs) :]:
        axis.remove()
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
