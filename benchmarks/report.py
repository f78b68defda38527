"""The measured tables and pictures of README.md and docs/performance.md, made from the files of results alone.

python -m benchmarks.report
"""

import json
import pathlib

from benchmarks.launches import kernel_name
from benchmarks.pages import CPU_RESULTS, markdown_table, replace_part, results
from benchmarks.predictions import MODELS, forward_flops, measured_launches
from benchmarks.roofline import work

ROOT = pathlib.Path(__file__).parent.parent
NAMES = {
    "vit_tiny_patch16_224": "ViT-Ti/16",
    "vit_small_patch16_224": "ViT-S/16",
    "vit_base_patch16_224": "ViT-B/16",
    "vit_large_patch16_224": "ViT-L/16",
    "vit_huge_patch14_224": "ViT-H/14",
    "vit_giant_patch14_224": "ViT-g/14",
    "vit_so400m_patch14_siglip_224": "so400m/14",
}
SHAPES = {"B": "ViT-B/16", "L": "ViT-L/16", "H": "ViT-H/14"}
SHAPES |= {f"{letter} at 384": f"{SHAPES[letter]} at 384" for letter in "BL"}
SHAPES |= {f"DINOv3 {letter}": f"DINOv3 {SHAPES[letter]}" for letter in "BL"}
SHAPES |= {f"Swin-{letter} {stage}": f"Swin-{letter}, stage {stage}" for letter in "TB" for stage in (1, 2, 3, 4)}
DEPTHS = {"B": 12, "L": 24, "H": 32}


def best(times: dict[str, list], ours: bool) -> tuple[str, float] | None:
    """The fastest form of ours, or of all peers, and its median in microseconds; "cublas" is no peer but a limit.

    None where there is none.
    """
    medians = {run: quantiles[1] for run, quantiles in times.items() if run.startswith("vit_fast") is ours}
    medians.pop("cublas", None)
    return min(medians.items(), key=lambda one: one[1], default=None)


def lead(times: dict[str, list]) -> float | None:
    """How many times as fast ours is as the fastest peer, each in its fastest form; None where no peer was measured."""
    ours, theirs = best(times, True), best(times, False)
    return theirs and theirs[1] / ours[1]


def to_digits(ratio: float) -> str:
    """A ratio to two digits, or three where two would hide that it is under 1."""
    return f"{ratio:.2f}" if ratio >= 1 or ratio < 0.995 else f"{ratio:.3f}"


def against(ratio: float) -> str:
    """How many times as fast ours is, and where it is slower, that it is."""
    return to_digits(ratio) + ", slower" * (ratio < 1)


def title_of(row: dict) -> str:
    """Which model a line of whole models is of, and what of its case is not usual: pictures, dtype, checkpointing."""
    size = f" at {row['pixels']}" * (row["pixels"] != 224)
    dtype = "fp32 under autocast" if row["dtype"] == "amp" else row["dtype"]
    checkpointed = ", checkpointed" * (row["direction"] == "checkpointed")
    return NAMES[row["model"]] + size + f", {dtype}" * (dtype != "bf16") + checkpointed


DIRECTIONS = ("inference", "training")
FIRST, LATER = DAYS = "models", "models-889e7e1"  # the files of the first day and of the last


def measured_models(direction: str, *files: str, **wanted) -> list[dict]:
    """Lines of whole models in a direction, of these files or of all; where two have a case, that of the later.

    With the "date" and the "ceilings" of their runs, and the peak memory of each contender as "gb". `wanted` are values
    of their cases.
    """
    names = ("model", "pixels", "batch", "dtype", "direction")
    wanted["direction"] = direction
    found = {}
    for file in map(results, files or DAYS):
        for row in file["results"]:
            case = dict(zip(names, row["case"]))
            if all(case[name] == value for name, value in wanted.items()) and "vit_fast" in row["us"]:
                gb = {name: facts["peak_gb"] for name, facts in row["facts"].items() if "peak_gb" in facts}
                of_its_run = {name: file[name] for name in ("date", "ceilings")}
                found[tuple(row["case"])] = {**of_its_run, **row, **case, "model": row["model"], "gb": gb}
    return list(found.values())


PLAIN = {"pixels": 224, "dtype": "bf16"}  # what pictures show


def models_table(batches: tuple[int, ...], *directions: str) -> str:
    """Images a second of whole models, ours and timm's, each in its fastest form that was measured, and when.

    A star is where timm's compiled form was not.
    """
    order = list(NAMES)
    lines = [row for way in directions for row in measured_models(way) if row["batch"] in batches]
    head = ["model", "batch", "vit_fast", "timm", "ratio", "% of the matrix ceiling", "peak memory, GB", "measured"]
    rows = []
    for row in sorted(lines, key=lambda row: (order.index(row["model"]), row["batch"])):

        def rate(ours: bool, row=row) -> str:
            if not best(row["us"], ours):
                return "did not run"
            form, us = best(row["us"], ours)
            return f"{row['batch'] / us * 1e6:,.0f} {form.partition(' ')[2] or 'eager'}"

        ratio = lead(row["us"])
        theirs = rate(False) + "\\*" * (ratio is not None and "timm compiled" not in row["us"])
        cells = [title_of(row), row["batch"], rate(True), theirs, against(ratio) if ratio else "-"]
        cells.append(f"{share_of_ceiling(row):.0f}")
        forms = {"vit_fast": "", "timm": "timm eager ", "timm compiled": "compiled "}
        memory = [f"{said}{row['gb'][name]:.2f}" for name, said in forms.items() if name in row["gb"]]
        rows.append([*cells, ", ".join(memory) or "-", row["date"]])
    return markdown_table(head, rows)


def share_of_ceiling(row: dict, us: float | None = None) -> float:
    """What our fastest form, or a run that takes `us`, reaches of the ceiling of its run, in per cent."""
    flops = forward_flops(row["model"], row["pixels"]) * row["batch"] * (1 if row["direction"] == "inference" else 3)
    return 100 * flops / (us or best(row["us"], True)[1]) / 1e6 / row["ceilings"]["matrix_tflops"]


# What this project set out to reach on a Hopper, bf16, 224 pixels; the shares of the ceiling are in predictions.MODELS.
OVER_TIMM = {"inference": 1.3, "training": 1.25}
LATENCY_MS, MEMORY = 0.25, 0.68


# Of each of DAYS the file of ops.
OPS_OF = {FIRST: "ops-3d8ab98", LATER: "ops"}


def goals_table() -> str:
    """Each goal, and what was reached on either day."""
    rows = []

    def add(what: str, goal: str, of) -> None:
        rows.append([what, goal, *(of(file) or "not measured" for file in DAYS)])

    def case(file: str, direction: str, model: str, batch: int) -> dict | None:
        return next((r for r in measured_models(direction, file, batch=batch, **PLAIN) if r["model"] == model), None)

    def told(value: float, goal: float, text: str) -> str:
        return text if value >= goal else f"{text}, short"

    for which, direction in enumerate(DIRECTIONS):
        for model, name, *shares in MODELS:
            share, ratio = shares[which], OVER_TIMM[direction]

            def reached(file, direction=direction, model=model, share=share):
                row = case(file, direction, model, 256)
                value = row and share_of_ceiling(row)
                return row and told(value, share, f"{value:.0f} %")

            def over_timm(file, direction=direction, model=model, ratio=ratio):
                row = case(file, direction, model, 256)
                value = row and lead(row["us"])
                return value and told(round(value, 2), ratio, f"{value:.2f}")

            def compiled_over_timm(file, direction=direction, model=model, ratio=ratio):
                us = (case(file, direction, model, 256) or {"us": {}})["us"]
                ours, theirs = us.get("vit_fast compiled"), us.get("timm compiled")
                value = ours and theirs and theirs[1] / ours[1]
                return value and told(round(value, 2), ratio, f"{value:.2f}")

            add(f"{name}, {direction}: share of the ceiling", f"{share} %", reached)
            add(f"{name}, {direction}: times timm's fastest measured form", f"{ratio}", over_timm)
            add(f"{name}, {direction}: the same, both compiled", f"{ratio}", compiled_over_timm)

    def latency(file):
        row = case(file, "inference", MODELS[0][0], 1)
        us = row and row["us"].get("vit_fast graph")
        ms = us[1] / 1e3 if us else tried_at_one_image() if file == LATER else None
        return ms and told(-ms, -LATENCY_MS, f"{ms:.2f} ms")

    def memory(file):
        row = case(file, "training", MODELS[0][0], 256)
        value = row and "timm" in row["gb"] and row["gb"]["vit_fast"] / row["gb"]["timm"]
        return value and told(-round(value, 2), -MEMORY, f"{value:.2f}")

    add("ViT-B/16, batch 1 in a graph", f"{LATENCY_MS} ms", latency)
    add("ViT-B/16, training: peak memory over timm eager's", f"{MEMORY}", memory)
    for letter in ("B", "L"):

        def attention(file, letter=letter):
            us = op_times(OPS_OF[file])["attention", letter, "forward"]
            form = min((form for form in us if form.startswith("sdpa")), key=lambda form: us[form][1])
            ours, theirs = us["vit_fast"][1], us[form][1]
            return told(-ours, -theirs, f"{ours:,.0f} µs, {form.removeprefix('sdpa ')} {theirs:,.0f}")

        add(f"attention of {SHAPES[letter]}, 197 tokens, batch 256", "ahead of every SDPA backend", attention)
    days = [
        f"{results(file)['date']}, {results(file)['commit'][:7]}, ops {results(OPS_OF[file])['commit'][:7]}"
        for file in DAYS
    ]
    return markdown_table(["goal", "at", *days], rows)


def op_rows(file: str) -> dict[tuple, dict]:
    """(op, model, "forward" or "both") → the line of the largest batch, of a file of ops."""
    found = {}
    for row in results(file)["results"]:
        key = row["op"], row["model"], row["direction"]
        if row["batch"] >= found.get(key, row)["batch"]:
            found[key] = row
    return found


def op_times(file: str) -> dict[tuple, dict]:
    """As `op_rows`, contender → quantiles."""
    return {key: row["us"] for key, row in op_rows(file).items()}


def tried_at_one_image() -> float:
    """Milliseconds of ViT-B at batch 1 in a graph on the last day, of the experiment with launches that overlap."""
    found = [
        row for row in results("tried")["results"] if row["experiment"].startswith("overlapping launches of up to")
    ]
    return next(row["on"][1] for row in found if (row["model"], row["batch"]) == ("B", 1)) / 1e3


def whole_table() -> str:
    """What of a whole model's time is that of its parts measured alone, and what of theirs cuBLAS's products take.

    Both of the last day, milliseconds. The parts are the patch embedding and the blocks, one block times the depth: the
    last counts as the others do, though what no head reads of it is left out since. Each share is of the ceiling of its
    own run.
    """
    timed, ceilings = op_times("ops"), results("ops")["ceilings"]
    letters = {name: letter for letter, name in SHAPES.items()}
    rows = []
    for row in [row for way in DIRECTIONS for row in measured_models(way, LATER, batch=256, **PLAIN)]:
        if NAMES[row["model"]] not in letters:  # whose ops are not timed
            continue
        letter, way = letters[NAMES[row["model"]]], "both" if row["direction"] == "training" else "forward"

        def alone(form, *ops, letter=letter, way=way):
            embed, *block = (timed[op, letter, way][form][1] for op in ops)
            return embed + DEPTHS[letter] * sum(block)

        least = alone("cublas", "patch_embed", "ln_linear", "projection", "mlp")
        ours, theirs = (alone(form, "patch_embed", "block") for form in ("vit_fast", "eager"))
        whole = best(row["us"], True)[1]
        of_parts = {**row, "ceilings": ceilings}
        rows.append(
            [
                f"{NAMES[row['model']]}, {row['direction']}",
                *(f"{us / 1e3:.1f}, {share_of_ceiling(of_parts, us):.0f} %" for us in (least, ours)),
                f"{whole / 1e3:.1f}, {share_of_ceiling(row):.0f} %",
                f"{whole / ours:.2f}",
                f"{row['us']['timm'][1] / theirs:.2f}" if "timm" in row["us"] else "-",
            ]
        )
    times = [f"{what}, ms, share" for what in ("cuBLAS's products alone", "our parts alone", "the whole")]
    return markdown_table(["model", *times, "whole / parts", "of timm, eager"], rows)


def days_table() -> str:
    """Milliseconds of the contenders that were measured on more than one day, and the last over the first."""
    files = (FIRST, "models-d6bd20c", LATER)
    rows = []
    for way in DIRECTIONS:
        by_file = [{row["model"]: row["us"] for row in measured_models(way, f, batch=256, **PLAIN)} for f in files]
        for model in by_file[-1]:
            for form in by_file[-1][model]:
                us = [times.get(model, {}).get(form, [None] * 2)[1] for times in by_file]
                if sum(one is not None for one in us) > 1:
                    times = ["-" if one is None else f"{one / 1e3:.1f}" for one in us]
                    last = f"{us[-1] / us[0]:.2f}" if us[0] else "-"
                    rows.append([f"{NAMES[model]}, {way}", form, *times, last])
    days = [f"{results(file)['date']}, {results(file)['commit'][:7]}" for file in files]
    return markdown_table(["model", "contender", *days, "last / first"], rows)


def facts_table() -> str:
    """First call, launches and peak memory of each contender of the last day.

    What a first call compiles may have been prepared by `make gpu`.
    """
    rows = []
    for way in DIRECTIONS:
        for row in measured_models(way, LATER, batch=256, **PLAIN):
            for form, us in row["us"].items():
                facts = row["facts"][form]
                cells = [f"{us[1] / 1e3:.1f}", f"{facts['first_call_s']:.1f}", facts["launches"]]
                cells.append(f"{facts['peak_gb']:.2f}" if "peak_gb" in facts else "-")
                rows.append([f"{title_of(row)}, {row['direction']}", form, *cells])
    return markdown_table(["model, batch 256", "contender", "ms", "first call, s", "launches", "peak memory, GB"], rows)


def sustained_table() -> str:
    """Products made again and again for a third of a second, where the power limit sets the clock."""
    rows = []
    for line in results("sustained")["results"]:
        if line["kind"] == "product":
            us, mhz, watts = line["at"]
            rows.append([SHAPES[line["model"]], line["what"], f"{us:,.0f}", f"{mhz:,.0f}", f"{watts:.0f}"])
    return markdown_table(["model, batch 256", "product", "µs", "MHz", "W"], rows)


def counters_table() -> str:
    """What the counters of the device say of each of our launches of a training step."""
    rows = []
    for line in results("counters")["results"]:
        if (ROOT / "kernels" / line["kernel"]).with_suffix(".py").is_file():
            numbers = [f"{line[name]:.0f}" for name in ("duration_us", "mhz", "sm", "dram", "l2", "l1")]
            rows.append([f"`{line['kernel']}`", *numbers, f"{line['cycles_an_issue']:.1f}", f"{line['occupancy']:.0f}"])
    head = ["kernel", "µs", "MHz", "multiprocessors, %", "memory, %", "L2, %", "L1, %", "cycles an issue", "warps, %"]
    return markdown_table(head, rows)


def slower_list() -> str:
    """Everything of the tables in which ours is behind, a line a table; and inference's peak memory beside timm's."""
    lines = []

    def add(what: str, behind: list[str]) -> None:
        lines.append(f"- {what}: {', '.join(behind) or 'none'}")

    for way, rows in (
        ("inference", measured_models("inference")),
        ("training step", measured_models("training") + measured_models("checkpointed")),
    ):
        behind = []
        for row in rows:
            if (ratio := lead(row["us"])) and ratio < 1:
                form, _ = best(row["us"], False)
                behind.append(f"{title_of(row)} at batch {row['batch']} ({to_digits(ratio)} of {form})")
        add(f"whole models, {way}", behind)
    for direction, way in (("forward", "forward"), ("both", "forward and backward")):
        behind = []
        for (op, model, its), us in op_times("ops").items():
            if its == direction and (ratio := lead(us)) and ratio < 1:
                form, _ = best(us, False)
                form = {"eager": "PyTorch eager", "compiled": "PyTorch compiled"}.get(form, form)
                behind.append(f"`{op}` of {SHAPES[model]} ({to_digits(ratio)} of {form})")
        add(f"ops, {way}", behind)
    behind = []
    for row in measured_models("inference"):
        gb = row["gb"]
        if "vit_fast" in gb and gb["vit_fast"] > min(gb.values()):
            form = min(gb, key=gb.get)
            behind.append(f"{title_of(row)} at batch {row['batch']} ({gb['vit_fast']:.2f} GB, {form} {gb[form]:.2f})")
    add("peak memory of inference", behind)
    behind = [
        f"ViT-{row['model']}/16 in {row['dtype']}, {row['direction']} ({to_digits(1 / row['ratio'])})"
        for row in results("cpu", CPU_RESULTS)["results"]
        if row["ratio"] > 1
    ]
    add("whole models on a CPU, of the best of three libraries", behind)
    return "\n".join(lines)


def absent_list() -> str:
    """The contenders that the benchmarks know and the ops' run on the device did not have, and why."""
    why = {}
    for row in results("ops")["results"]:
        for form, reason in row["aside"].items():
            why.setdefault(reason, set()).add(form)
    return "; ".join(f"{', '.join(sorted(forms))}: {reason}" for reason, forms in sorted(why.items())) + "."


def eager_table() -> str:
    """Milliseconds of small batches launched one by one, where the host is what takes the time."""
    rows = []
    for batch in (1, 8):
        for row in measured_models("inference", FIRST, batch=batch, **PLAIN):
            times = [row["us"][run][1] / 1e3 for run in ("vit_fast", "timm", "vit_fast graph", "timm graph")]
            rows.append([NAMES[row["model"]], batch, *(f"{ms:.2f}" for ms in times)])
    forms = ["vit_fast eager, ms", "timm eager, ms", "vit_fast in a graph, ms", "timm in a graph, ms"]
    return markdown_table(["model", "batch", *forms], rows)


def made_by(name: str) -> str:
    """Where a table of a CPU's file comes from."""
    file = results(name, CPU_RESULTS)
    return f"\n\nBy `{file['command']}` on {file['device']}, {file['date']}, commit {file['commit'][:7]}."


def host_table() -> str:
    """Microseconds of a CPU that one call of an op takes but for the launches themselves, beside a bare op's call."""
    rows = []
    for row in results("host_cost", CPU_RESULTS)["results"]:
        medians = [f"{row[key]['median']:.1f}" for key in ("op_us", "bare_us", "ratio")]
        rows.append([f"`{row['op']}`", row["mode"], *medians, row["python_calls"]])
    head = ["op", "mode", "µs", "a bare op, µs", "ratio", "Python calls"]
    return markdown_table(head, rows) + made_by("host_cost")


def cpu_table() -> str:
    """Whole models on a CPU: milliseconds of each library's, and the ratio of ours to the best of the others."""
    head = [
        "model",
        "dtype",
        "pass",
        "vit_fast, ms",
        "timm",
        "transformers",
        "torchvision",
        "ratio to the best",
        "quartiles",
    ]
    rows = []
    for row in results("cpu", CPU_RESULTS)["results"]:
        times = [f"{row['ms'][name]:.1f}" for name in ("vit_fast", "timm", "transformers", "torchvision")]
        quartiles = "{:.2f} to {:.2f}".format(*row["quartiles"])
        place = f"ViT-{row['model']}/16, batch {row['batch']}", row["dtype"], row["direction"]
        rows.append([*place, *times, f"{row['ratio']:.2f}" + ", slower" * (row["ratio"] > 1.03), quartiles])
    return markdown_table(head, rows) + made_by("cpu")


def ops_table() -> str:
    """Microseconds of each op at its largest batch, forward, and forward and backward, beside its best peer."""
    head = ["op", "model", "forward, µs", "best peer", "ratio", "forward and backward, µs", "best peer", "ratio"]
    found, rows = op_rows("ops"), []
    for op, model in dict.fromkeys(key[:2] for key in found):
        lines = [found.get((op, model, way), {"us": {}}) for way in ("forward", "both")]
        cells = [f"`{op}`", f"{SHAPES[model]}, batch {lines[0]['batch']}"]
        for us in (line["us"] for line in lines):
            ours, peer = best(us, True), best(us, False)
            cells.append(f"{ours[1]:,.0f}" if ours else "-")
            cells += [f"{peer[1]:,.0f} {peer[0]}", against(lead(us))] if ours and peer else ["-", "-"]
        rows.append(cells)
    return markdown_table(head, rows)


def pages() -> dict[pathlib.Path, str]:
    """Every page with its measured parts made anew."""
    readme, performance = ROOT / "README.md", ROOT / "docs/performance.md"
    text = replace_part(readme.read_text(), "inference", models_table((1, 8, 64, 256), "inference"))
    text = replace_part(text, "training", models_table((64, 256), "training", "checkpointed"))
    text = replace_part(text, "slower", slower_list())
    notes = replace_part(performance.read_text(), "ops", ops_table())
    notes = replace_part(notes, "goals", goals_table())
    parts = {"whole": whole_table, "days": days_table, "facts": facts_table, "absent": absent_list}
    parts |= {"sustained": sustained_table, "counters": counters_table}
    for name, made in parts.items():
        notes = replace_part(notes, name, made())
    notes = replace_part(notes, "host", host_table())
    notes = replace_part(notes, "cpu", cpu_table())
    return {readme: text, performance: replace_part(notes, "eager", eager_table())}


# ---- pictures ------------------------------------------------------------------------------------------------------


def _figure(*args, **options):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(*args, **options)


def _drawn(figure) -> str:
    """What a figure shows, as JSON: heights of bars, points of lines and clouds, to four digits, and its words."""
    shown = [[text.get_text() for text in figure.texts]]
    for axis in figure.axes:
        numbers = [
            *(bar.get_height() for bar in axis.patches),
            *(value for line in axis.lines for point in line.get_xydata() for value in point),
            *(value for cloud in axis.collections for point in cloud.get_offsets() for value in point),
        ]
        legend = axis.get_legend()
        ticks = [] if axis.get_xticklabels()[0].get_text().startswith("$") else axis.get_xticklabels()  # powers of ten
        words = [axis.title, *ticks, *axis.texts, *(legend.get_texts() if legend else ())]
        shown.append([*(f"{float(number):.4g}" for number in numbers), *(text.get_text() for text in words)])
    return json.dumps(shown)


def _save(figure, path: pathlib.Path) -> None:
    """The picture, and in its header what it shows: pixels differ between versions, numbers do not."""
    from matplotlib import pyplot

    figure.tight_layout()
    figure.savefig(path, dpi=150, metadata={"Description": _drawn(figure)})
    pyplot.close(figure)


def plot_speed(path: pathlib.Path) -> None:
    """The speed of each contender over that of timm's eager form, by model: inference and training step."""
    figure, axes = _figure(1, 2, figsize=(9, 3.2), width_ratios=(3, 1))
    for axis, way, title in zip(axes, DIRECTIONS, ("inference", "training step")):
        rows = [row for row in measured_models(way, batch=256, **PLAIN) if "timm" in row["us"]]
        forms = {
            "timm eager": lambda us: us["timm"][1],
            "timm, its fastest measured form": lambda us: best(us, False)[1],
            "vit_fast, as well": lambda us: best(us, True)[1],
        }
        for number, (label, of) in enumerate(forms.items()):
            heights = [us_of["us"]["timm"][1] / of(us_of["us"]) for us_of in rows]
            places = [place + 0.27 * (number - 1) for place in range(len(rows))]
            bars = axis.bar(places, heights, 0.25, label=label, color=("0.8", "0.55", "tab:blue")[number])
            if number == 2:
                for bar, row in zip(bars, rows):
                    rate = row["batch"] / of(row["us"]) * 1e6
                    axis.annotate(f"{rate:,.0f}/s", (bar.get_x() + 0.12, bar.get_height()), ha="center", fontsize=7)
        axis.set_xticks(range(len(rows)), [NAMES[row["model"]] for row in rows], fontsize=8)
        axis.set_title(title, fontsize=9)
        axis.set_ylim(0, 1.85)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("speed over timm eager", fontsize=8)
    axes[0].legend(fontsize=7, loc="upper right", ncols=3, frameon=False)
    figure.suptitle(f"{results('models')['device']}, bf16, batch 256, measured", fontsize=10)
    _save(figure, path)


def plot_latency(path: pathlib.Path) -> None:
    """Milliseconds of inference against batch, ours and timm's, each in its fastest form and launched one by one.

    Of the first day: the lines of one picture are of one run.
    """
    rows = measured_models("inference", FIRST, **PLAIN)
    shown = [name for name in NAMES if sum(row["model"] == name for row in rows) > 1]
    figure, axes = _figure(1, len(shown), figsize=(11, 3), sharey=True)
    lines = {
        "vit_fast": ("tab:blue", "-", lambda us: best(us, True)[1]),
        "timm": ("0.4", "-", lambda us: best(us, False)[1]),
        "vit_fast, eager": ("tab:blue", ":", lambda us: us["vit_fast"][1]),
        "timm, eager": ("0.4", ":", lambda us: us["timm"][1]),
    }
    for axis, name in zip(axes, shown):
        mine = sorted((row for row in rows if row["model"] == name), key=lambda row: row["batch"])
        for label, (colour, style, of) in lines.items():
            times = [of(row["us"]) / 1e3 for row in mine]
            axis.plot([row["batch"] for row in mine], times, style, color=colour, label=label, marker=".")
        axis.set(xscale="log", yscale="log")
        axis.set_xticks([row["batch"] for row in mine], [row["batch"] for row in mine], fontsize=7)
        axis.minorticks_off()
        axis.set_title(NAMES[name], fontsize=9)
        axis.set_xlabel("batch", fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("ms", fontsize=8)
    axes[0].legend(fontsize=7, frameon=False)
    file = results(FIRST)
    figure.suptitle(f"{file['device']}, bf16, inference, measured {file['date']}", fontsize=10)
    _save(figure, path)


def plot_roofline(path: pathlib.Path) -> None:
    """Operations a byte against TFLOP/s of each product of a ViT-B's training step, under the ceilings of its run."""
    file = results("kernels")
    tflops, copy = file["ceilings"]["matrix_tflops"], file["ceilings"]["copy_tbs"]
    timed = next(found for line, found in measured_launches() if line["model"] == MODELS[0][0] and line["training"])
    figure, axis = _figure(figsize=(7, 4))
    axis.plot([30, tflops / copy, 1000], [30 * copy, tflops, tflops], color="0.7")
    seen = {}
    for launch, us in timed:
        todo = work(launch)
        if todo.flops:
            seen.setdefault(kernel_name(launch.kernel), []).append((todo.flops / todo.bytes, todo.flops / us / 1e6))
    for number, (name, points) in enumerate(seen.items()):
        axis.scatter(*zip(*points), s=28, color=f"C{number}", marker="os^v"[number % 4], label=name)
    axis.set(xscale="log", yscale="log", xlabel="operations a byte", ylabel="TFLOP/s")
    axis.legend(fontsize=7, loc="lower right", frameon=False)
    axis.set_title(f"{file['device']}, bf16, training step of ViT-B, batch 256, measured {file['date']}", fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def plot_memory(path: pathlib.Path) -> None:
    """Peak memory of a training step by model, ours and timm's forms."""
    rows = measured_models("training", batch=256, **PLAIN)
    figure, axis = _figure(figsize=(5, 3))
    forms = {"timm eager": "timm", "timm compiled": "timm compiled", "vit_fast": "vit_fast"}
    for number, (label, form) in enumerate(forms.items()):
        places = [place + 0.27 * (number - 1) for place in range(len(rows))]
        heights = [row["gb"].get(form, float("nan")) for row in rows]
        bars = axis.bar(places, heights, 0.25, label=label, color=("0.8", "0.55", "tab:blue")[number])
        axis.bar_label(bars, fmt="%.1f", fontsize=7)
    axis.set_xticks(range(len(rows)), [NAMES[row["model"]] for row in rows], fontsize=8)
    axis.set_ylabel("peak memory, GB", fontsize=8)
    axis.margins(y=0.3)
    axis.legend(fontsize=7, loc="upper right", ncols=3, frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_title(f"{results('models')['device']}, bf16, training step, batch 256, measured", fontsize=9)
    _save(figure, path)


def plot_curves(path: pathlib.Path) -> None:
    """The loss of each training step, on the kernels and in PyTorch from the same seeds."""
    file = results("curves")
    figure, axes = _figure(1, 2, figsize=(9, 3))
    titles = {"digits": "ViT-Ti on scanned digits", "stripes": "ViT-S on drawn stripes"}
    for axis, (task, title) in zip(axes, titles.items()):
        for line in (one for one in file["results"] if one["task"] == task):
            if line["backend"] == "triton":
                label, color, style = "vit_fast", "tab:blue", "-"
            elif line.get("off"):  # a file of before the third run has none
                label, color, style = "PyTorch, parameters off by a millionth", "0.7", ":"
            else:
                label, color, style = "PyTorch", "0.4", "--"
            axis.plot(line["losses"], color=color, lw=0.8, ls=style, label=label if line["seed"] == 0 else None)
        axis.set(yscale="log", xlabel="step")
        axis.set_title(title, fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("loss", fontsize=8)
    axes[0].legend(fontsize=7, frameon=False)
    figure.suptitle(f"{file['device']}, bf16 by autocast, AdamW, measured {file['date']}", fontsize=10)
    _save(figure, path)


PICTURES = {
    "measured": plot_speed,
    "latency": plot_latency,
    "roofline": plot_roofline,
    "memory": plot_memory,
    "curves": plot_curves,
}


def main() -> None:
    for path, text in pages().items():
        path.write_text(text)
    for name, plot in PICTURES.items():
        plot(ROOT / f"docs/{name}.png")


if __name__ == "__main__":
    main()
