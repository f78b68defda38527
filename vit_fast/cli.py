"""The command line: `vit-fast train | classify | attend | convert | models | env | tune`; each tells more with -h."""

import dataclasses
import functools
import json
import math
import os
import platform
import re
import select
import shlex
import sys
import time
from pathlib import Path
from typing import Annotated, Any

try:
    import typer
    from rich import box, markup
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn
    from rich.table import Table
except ImportError as error:
    raise SystemExit(f"vit-fast: {error}; the command line needs more: pip install 'vit-fast[cli]'") from None

import torch

import vit_fast
from vit_fast import inference, training
from vit_fast.ops.backend import chosen_backend, why_not_triton
from vit_fast.weights import TARGETS

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Vision Transformers on fused Triton kernels: train one, classify pictures with it, see what it looked at.",
)
# Errors that a user can mend. Anything else is a bug of ours, and shows its traceback.
USER_ERRORS = (ValueError, TypeError, OSError, ImportError, ArithmeticError, RuntimeError, MemoryError)
TOP = 5
BATCH = 32
MOST_WORKERS = 16  # that check tiles: each holds memory of the GPU for itself
NOT_FINITE = "{}: the model's answer is not finite: its weights hold NaN, or numbers that overflow"
NUMBERS = ("error", "before", "after", "gain")  # columns of tables that stand right


def _plain_errors(command):
    """Errors become one red line on stderr and exit code 1; Ctrl-C becomes exit code 130."""

    @functools.wraps(command)
    def wrapped(*args, **kwargs):
        try:
            return command(*args, **kwargs)
        except KeyboardInterrupt:
            _say_error("stopped")
            raise typer.Exit(130) from None
        except typer.Exit:  # a RuntimeError itself
            raise
        except BrokenPipeError as error:
            if _reader_is_gone():
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is still to be flushed
            else:
                _say_error(str(error))
            raise typer.Exit(1) from None
        except USER_ERRORS as error:
            _say_error(str(error) or type(error).__name__)
            raise typer.Exit(1) from None

    return wrapped


def _reader_is_gone() -> bool:
    """Whether nobody reads stdout any more, as behind `| head`."""
    stdout = select.poll()
    stdout.register(sys.stdout.fileno(), 0)
    return bool(stdout.poll(0))


def escape(text: str) -> str:
    """Text of a file, or a name, as it may be printed: no markup, and no command to the terminal."""
    return markup.escape(re.sub(r"[\x00-\x1f\x7f-\x9f]", "?", text))


def _say_error(message: str) -> None:
    message = " ".join(message.split())
    Console(stderr=True, soft_wrap=True, highlight=False).print(f"[bold red]error:[/] [red]{escape(message)}[/]")


def _console() -> Console:
    return Console(highlight=False, soft_wrap=not sys.stdout.isatty())


def _show_version(asked: bool) -> None:
    if asked:
        print(f"vit-fast {vit_fast.__version__}")
        raise typer.Exit


@app.callback()
def _global(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


DEFAULTS: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(training.Config)}
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1 … (default: cuda where there is one)", show_default=False)]


@app.command()
@_plain_errors
def train(
    context: typer.Context,
    data: Annotated[
        str, typer.Argument(metavar="DATA", help="'digits', or a folder of pictures with one subfolder a class.")
    ],
    output: Annotated[
        str | None, typer.Option(help="Folder for checkpoint and history (default: that of --resume).")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="A name of `vit-fast models` (default: vit_tiny_patch16_224, a smaller one for digits)."),
    ] = DEFAULTS["model"],
    model_kwargs: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="A further argument of the model; may be repeated.")
    ] = None,
    num_classes: Annotated[int | None, typer.Option(help="Classes of the head (default: those of the data).")] = None,
    img_size: Annotated[int | None, typer.Option(help="Side of the model's input (default: the model's own).")] = None,
    pretrained_path: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|FOLDER|hf-hub:OWNER/NAME", help="Weights to begin with; other classes get a new head."
        ),
    ] = None,
    epochs: Annotated[int, typer.Option(help="Passes over the data.")] = DEFAULTS["epochs"],
    batch_size: Annotated[int, typer.Option("--batch-size", "-b", help="Pictures in a step.")] = DEFAULTS["batch_size"],
    lr: Annotated[float, typer.Option(help="Learning rate after the warm-up.")] = DEFAULTS["lr"],
    min_lr: Annotated[float, typer.Option(help="Learning rate at the end of the cosine.")] = DEFAULTS["min_lr"],
    warmup_lr: Annotated[float, typer.Option(help="Learning rate at the start.")] = DEFAULTS["warmup_lr"],
    warmup_epochs: Annotated[float, typer.Option(help="Epochs of linear warm-up.")] = DEFAULTS["warmup_epochs"],
    weight_decay: Annotated[float, typer.Option(help="None is put on norms, biases and positions.")] = DEFAULTS[
        "weight_decay"
    ],
    smoothing: Annotated[float, typer.Option(help="Label smoothing.")] = DEFAULTS["smoothing"],
    clip_grad: Annotated[float, typer.Option(help="Largest norm of the gradient; 0 for no limit.")] = DEFAULTS[
        "clip_grad"
    ],
    drop_path: Annotated[float, typer.Option(help="Stochastic depth of the last block.")] = DEFAULTS["drop_path"],
    hflip: Annotated[
        float | None,
        typer.Option(help="Probability of a mirrored picture (default: 0.5, for digits 0).", show_default=False),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of weights, order and augmentation.")] = DEFAULTS["seed"],
    amp: Annotated[
        bool | None, typer.Option("--amp/--no-amp", help="bfloat16 products (default: on a GPU that has them).")
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option("--workers", "-j", help="Processes that decode pictures (default: up to 4, for digits none)."),
    ] = None,
    resume: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="Go on from this checkpoint, with its settings.")
    ] = None,
    device: Device = "",
) -> None:
    """Train a model, and leave a checkpoint and its history in a folder. Ctrl-C leaves a good one, to --resume."""
    given: dict[str, Any] = {
        "model": model,
        "model_kwargs": dict(map(_name_and_value, model_kwargs or ())),
        "num_classes": num_classes,
        "img_size": img_size,
        "pretrained_path": pretrained_path,
        "epochs": epochs,
        "batch_size": batch_size,
        "lr": lr,
        "min_lr": min_lr,
        "warmup_lr": warmup_lr,
        "warmup_epochs": warmup_epochs,
        "weight_decay": weight_decay,
        "smoothing": smoothing,
        "clip_grad": clip_grad or None,
        "drop_path": drop_path,
        "hflip": hflip,
        "seed": seed,
        "amp": amp,
        "workers": workers,
        "device": device,
    }
    if resume is not None:  # what is not typed is as it was; what is typed and differs is refused by `train`
        typed = {name for name in given if getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"}
        settings = training.read_settings(resume)
        given = settings | {name: value for name, value in given.items() if name in typed or name not in settings}
        output = output or resume
    if output is None:
        raise ValueError("--output: a folder for the checkpoint is needed")
    config = training.Config(**given | {"data": data, "output": output})
    console = _console()
    with _TrainingProgress(console, config.epochs) as progress:
        try:
            result = training.train(config, resume, progress.on_step, progress.on_epoch)
        except KeyboardInterrupt:
            if progress.steps:
                again = shlex.join(["vit-fast", "train", data, "--resume", output])
                console.print(f"stopped at step {progress.steps}; go on with [bold]{escape(again)}[/]")
            raise
    console.print(f"held-out accuracy: {100 * result.accuracy:.1f} %")
    console.print(f"checkpoint: {escape(str(result.output))}")


def _name_and_value(text: str) -> tuple[str, object]:
    """NAME=VALUE, the value read as JSON where it is JSON (8, 0.1, true, [224, 160]) and as text elsewhere."""
    name, sign, value = text.partition("=")
    if not sign or not name.isidentifier():
        raise ValueError(f"--model-kwargs: got {text!r}, takes NAME=VALUE")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


class _TrainingProgress:
    """A bar with loss, images a second and time left, and a line an epoch; in a pipe the lines alone."""

    def __init__(self, console: Console, epochs: int):
        self.console, self.epochs, self.steps = console, epochs, 0
        self.bar = Progress(
            TextColumn("epoch {task.fields[epoch]}/" + str(epochs)),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("loss {task.fields[loss]:.3f} · {task.fields[rate]:,.0f} images/s · left"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self.task: TaskID | None = None

    def __enter__(self):
        self.bar.start()
        return self

    def __exit__(self, *_):
        self.bar.stop()

    def on_step(self, step: training.Step) -> None:
        now = time.monotonic()
        if self.task is None:
            self.rate, self.last = math.nan, now
            self.task = self.bar.add_task("", total=step.steps, epoch=step.epoch + 1, loss=step.loss, rate=0.0)
        elif now > self.last:
            rate = step.images / (now - self.last)
            self.rate = rate if math.isnan(self.rate) else 0.95 * self.rate + 0.05 * rate
        self.last, self.steps = now, step.step
        rate = 0.0 if math.isnan(self.rate) else self.rate
        self.bar.update(self.task, completed=step.step, epoch=step.epoch + 1, loss=step.loss, rate=rate)

    def on_epoch(self, record: dict) -> None:
        self.last = time.monotonic()
        self.console.print(
            f"epoch {record['epoch'] + 1:>{len(str(self.epochs))}}/{self.epochs}   loss {record['train_loss']:.3f}   "
            f"held out {100 * record['held_out_accuracy']:5.1f} %   {record['images_per_second']:,.0f} images/s"
        )


ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A checkpoint: a folder or file of this library, timm or transformers, or hf-hub:OWNER/NAME; or a name of "
        "`vit-fast models` with --checkpoint.",
    ),
]
Checkpoint = Annotated[
    str | None, typer.Option("--checkpoint", metavar="FILE", help="Weights for a model given by its name.")
]
Partial = Annotated[
    list[str] | None,
    typer.Option(metavar="PATTERN", help="Names that may be missing or left over, such as 'head.*'; may be repeated."),
]


def _open_model(model: str, weights: str | None, device: str) -> tuple[vit_fast.VisionTransformer, tuple[str, ...]]:
    """The model that the command line names, in evaluation mode, and its classes."""
    place = training.device_named(device)
    named = os.sep not in model and not Path(model).exists()
    if weights is None and named and ":" not in model:
        vit_fast.create_model(model, device="meta")  # an unknown name: the nearest are offered
        raise ValueError(f"{model}: its weights are not here; give them with --checkpoint FILE.safetensors")
    network = vit_fast.load(model if weights is None else weights, model=None if weights is None else model)
    classes = network.label_names or tuple(map(str, range(network.num_classes)))
    return network.to(place), classes


@app.command()
@_plain_errors
def classify(
    model: ModelArgument,
    images: Annotated[list[str], typer.Argument(metavar="IMAGE...", help="Picture files, and folders of them.")],
    weights: Checkpoint = None,
    topk: Annotated[int, typer.Option(min=1, help="How many classes to show.")] = TOP,
    as_json: Annotated[bool, typer.Option("--json", help="A JSON list, for machines.")] = False,
    device: Device = "",
) -> None:
    """Name what is on pictures: the most probable classes of each.

    A picture that cannot be read, or of which the model says nothing finite, is named on stderr, the others are
    classified, and the exit code is 1.
    """
    paths = inference.find_images(images)
    network, classes = _open_model(model, weights, device)
    results, failed = [], False
    for start in range(0, len(paths), BATCH):
        opened = []
        for path in paths[start : start + BATCH]:
            try:
                opened.append((path, inference.open_image(path, network.in_chans)))
            except (ValueError, OSError, MemoryError) as error:
                failed = True
                _say_error(str(error))
        for (path, _), row in zip(opened, network.predict([image for _, image in opened]).cpu()):
            if not row.isfinite().all():
                failed = True
                _say_error(NOT_FINITE.format(path))
                continue
            top = row.topk(min(topk, len(classes)))
            both = zip(top.indices.tolist(), top.values.tolist())
            ranked = [{"class": classes[index], "probability": probability} for index, probability in both]
            results.append({"image": str(path), "top": ranked})
    if as_json:
        print(json.dumps(results, indent=2))
    elif results:
        _console().print(_classes_table(results))
    if failed:
        raise typer.Exit(1)


def _classes_table(results: list[dict]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("image", overflow="fold")
    table.add_column("class", overflow="fold")
    table.add_column("probability", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for result in results:
        for rank, one in enumerate(result["top"]):
            bar = "█" * round(20 * one["probability"])
            style = "bold" if rank == 0 else "dim"
            cells = (result["image"] if rank == 0 else "", one["class"], f"{100 * one['probability']:.1f} %", bar)
            table.add_row(*map(escape, cells), style=style, end_section=one is result["top"][-1])
    return table


@app.command()
@_plain_errors
def attend(
    model: ModelArgument,
    images: Annotated[list[str], typer.Argument(metavar="IMAGE...", help="Picture files, and folders of them.")],
    output: Annotated[str, typer.Option("--output", "-o", metavar="FILE.png", help="Where the figure goes.")],
    weights: Checkpoint = None,
    device: Device = "",
) -> None:
    """Draw what a model looked at: the picture, the attention rolled out, each head of the last layer, side by side."""
    from vit_fast import maps

    paths = inference.find_images(images)
    if Path(output).exists() and any(path.samefile(output) for path in paths):
        raise ValueError(f"--output: got {output}, one of the pictures that are read; takes another file")
    maps.check_picture_path(output)
    network, classes = _open_model(model, weights, device)
    looked = [maps.look(network, path) for path in paths]
    says_classes = network.num_classes and not network.pretrained_cfg.get("projection")
    titles = []
    for path, one in zip(paths, looked):
        if not one.probabilities.isfinite().all():
            raise ValueError(NOT_FINITE.format(path))
        probability, index = one.probabilities.max(dim=0)
        name = classes[index] if says_classes else path.name
        name = name if len(name) <= 14 else name[:13] + "…"
        titles.append(f"{name} · {100 * probability:.1f} %" if says_classes else name)
    maps.draw_attention(looked, titles, output)
    _console().print(escape(output))


@app.command()
@_plain_errors
def convert(
    source: Annotated[
        str, typer.Argument(metavar="IN", help="A checkpoint: a folder, or a file of safetensors or .npz.")
    ],
    target: Annotated[str, typer.Argument(metavar="OUT", help="The file that is written, .safetensors or .npz.")],
    to: Annotated[str, typer.Option(help=f"The layout: {', '.join(TARGETS)}.")],
    partial: Partial = None,
    num_heads: Annotated[int | None, typer.Option(help="For jax alone: heads (default: one for each 64).")] = None,
) -> None:
    """Write weights under another library's names. What is missing or left over is an error, but for --partial."""
    from vit_fast import weights

    tensors = weights.read(Path(source))
    found, coverage = weights.to_ours(tensors, partial or ())
    console = _console()
    console.print(escape(f"{source}: {coverage}"))
    found = weights.convert(found, to, num_heads=num_heads, partial=partial or ())
    weights.write(Path(target), found)
    console.print(escape(f"{target}: {len(found)} tensors as {to}"))


@app.command()
@_plain_errors
def models(
    pattern: Annotated[
        str, typer.Argument(metavar="[PATTERN]", help="Part of a name, or a pattern such as 'deit*_224'.")
    ] = "",
) -> None:
    """List the architectures that can be built by name. In a pipe: the names alone, one a line."""
    names = vit_fast.list_models(pattern)
    if not names:
        vit_fast.create_model(pattern)  # says what is nearest, or what the name misses
    if not sys.stdout.isatty():
        print("\n".join(names))
        return
    from vit_fast.zoo import entries

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("name", "image", "patch", "width", "depth", "heads", "weights"):
        table.add_column(column, justify="left" if column == "name" else "right", no_wrap=True)
    weights = {name: len(entry["weights"]) for name, entry in entries().items()}
    for name in names:
        args = {"patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12, **entries()[name]["args"]}
        size = entries()[name]["pretrained_cfg"]["input_size"][-1]
        numbers = (size, args["patch_size"], args["embed_dim"], args["depth"], args["num_heads"], weights[name])
        table.add_row(escape(name), *map(str, numbers))
    console = _console()
    console.print(table)
    covered, total = sum(weights[name] for name in names), sum(weights.values())
    console.print(
        f"{len(names)} architectures, which have {covered} of the {total} pretrained weights of timm's "
        "vision_transformer.py and deit.py"
    )


@app.command()
@_plain_errors
def env(
    device: Device = "",
    verify: Annotated[
        bool, typer.Option("--verify", help="Check every entry of the tile table in force, instead.")
    ] = False,
) -> None:
    """Show device, versions and backend, and whether a small run of every kernel agrees with PyTorch here."""
    place = training.device_named(device)
    console = _console()
    console.print(_facts(place))
    (_verify_entries if verify else _verify_small)(place, console)


def _facts(place: torch.device) -> Table:
    """Device, versions and backend."""
    from importlib import metadata

    facts = Table(box=None, show_header=False, pad_edge=False)
    if place.type == "cuda":
        capability = "{}.{}".format(*torch.cuda.get_device_capability(place))
        facts.add_row("device", f"{place}, {torch.cuda.get_device_name(place)}, compute capability {capability}")
    else:
        facts.add_row("device", f"{place}, {platform.machine()}, {torch.get_num_threads()} threads")
    facts.add_row("python", f"{platform.python_version()} on {platform.system()}")
    for name in ("vit-fast", "torch", "triton", "safetensors", "numpy"):
        try:
            facts.add_row(name, metadata.version(name))
        except metadata.PackageNotFoundError:
            facts.add_row(name, "not installed")
    chosen, reason = chosen_backend(), why_not_triton(place)
    if chosen == "auto":
        facts.add_row("backend", f"PyTorch ({reason})" if reason else "Triton")
    else:
        facts.add_row("backend", {"torch": "PyTorch", "triton": "Triton"}[chosen] + " (VIT_FAST_BACKEND)")
    return facts


def _titled(title: str, *columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left", title_style="bold")
    for column in columns:
        table.add_column(column, justify="right" if column in NUMBERS else "left")
    return table


def _verify_small(place: torch.device, console: Console) -> None:
    from vit_fast import verify

    with console.status("running every kernel once …"):
        lines, how = verify.report(place)
    if not lines:
        console.print(f"\nkernels: not run, {escape(how)}")
        return
    table = _titled(f"kernels, {how}", "op", "dtype", "error", "agrees with PyTorch")
    for line in lines:
        verdict = "[green]ok[/]" if line["agrees"] else "[bold red]NOT[/]"
        table.add_row(line["op"], line["dtype"], f"{line['error']:.1e}", verdict)
    console.print(table)
    console.print("error: the largest ‖kernel − fp64‖ / ‖fp64‖ of the output and every gradient")
    if not all(line["agrees"] for line in lines):
        raise ValueError(
            "a kernel does not agree with PyTorch on this device; VIT_FAST_BACKEND=torch runs without them"
        )


def _verify_entries(place: torch.device, console: Console) -> None:
    from vit_fast import verify

    with console.status("compiling and running every entry of the tile table …"):
        lines = verify.verify_entries(place, workers=min(MOST_WORKERS, os.cpu_count() or 1))
    table = _titled("tile table in force", "kernel", "shape", "dtype", "error", "", "origin")
    verdicts = {True: "[green]agrees[/]", False: "[bold red]DIFFERS[/]", None: "[yellow]not run[/]"}
    for line in lines:
        error = "" if line["why"] else f"{line['error']:.1e}"
        cells = (line["kernel"], line["shape"], line["dtype"], error, verdicts[line["agrees"]])
        table.add_row(*cells, escape(": ".join(filter(None, (line["origin"], line["why"])))))
    console.print(table)
    console.print("error: the largest ‖kernel − fp64‖ / ‖fp64‖ of the results that the entry had a part in")
    differ = sorted({line["kernel"] for line in lines if line["agrees"] is False})
    if differ:
        raise ValueError(
            f"{', '.join(differ)}: differs from fp64 on this device by more than it may; "
            "VIT_FAST_BACKEND=torch runs without the kernels"
        )


@app.command()
@_plain_errors
def tune(
    kernel: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="A kernel of the tile table, as `vit-fast env --verify` names it; repeatable."
        ),
    ] = None,
    precision: Annotated[
        str | None, typer.Option(help="16 (bfloat16 and float16) or 32 (default: both).", show_default=False)
    ] = None,
    device: Device = "",
) -> None:
    """Measure tiles on this GPU and keep those that beat the table's by 2 % or more, numbers proven first.

    They go to the file that VIT_FAST_TILES names, or to the user's cache, one by one: Ctrl-C keeps what was found.
    """
    from vit_fast import tune as tuning

    tuner = tuning.Tuner(training.device_named(device))
    keys = tuner.keys(kernel or (), (precision,) if precision else tuple(tuning.DTYPES))
    console, outcomes = _console(), []
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    try:
        with bar:
            task = bar.add_task("", total=len(keys))
            for index, key in enumerate(keys):
                bar.update(task, description=" ".join(key), completed=index)

                def show(part: float, index: int = index) -> None:
                    bar.update(task, completed=index + part)

                outcomes.append(tuner.tune(key, show))
    finally:
        _tell_outcomes(outcomes, console)
        kept = sum(outcome.after is not outcome.before for outcome in outcomes)
        console.print(f"{len(outcomes)} of {len(keys)} entries tried, {kept} new in {escape(str(tuner.file))}")


def _tell_outcomes(outcomes: list, console: Console) -> None:
    """A line an entry, then the candidates whose numbers were wrong."""
    table = _titled("time of the op's pass", "kernel", "dtype", "shape", "before", "after", "gain", "entry", "new")
    for outcome in outcomes:
        before, after = outcome.seconds_before, outcome.seconds_after
        new = {name: value for name, value in outcome.after.items() if value != outcome.before[name]}
        table.add_row(
            *map(escape, outcome.key),
            "fails" if math.isnan(before) and not math.isnan(after) else _milliseconds(before),
            _milliseconds(after),
            f"{100 * (before / after - 1):.1f} %" if before > after else "",
            _numbers(outcome.before),
            f"[bold]{_numbers(new)}[/]",
        )
    if outcomes:
        console.print(table)
    for outcome in outcomes:
        if math.isnan(outcome.seconds_after):
            why = "no case comes to this entry"
            if outcome.rejected:
                why = (
                    f"none of {len(outcome.rejected)} candidates counts, the entry in force: {outcome.rejected[0].why}"
                )
            console.print(f"[yellow]{escape(' '.join(outcome.key))}[/] not measured: {escape(why)}")
        for entry, why, wrong in outcome.rejected:
            if wrong:
                told = f"{' '.join(outcome.key)}, {_numbers(entry)}: {why}"
                console.print(f"[bold red]rejected[/] {escape(told)}")


def _milliseconds(seconds: float) -> str:
    return "not measured" if math.isnan(seconds) else f"{1e3 * seconds:.3f} ms"


def _numbers(entry: dict) -> str:
    """An entry's numbers, such as M 128 N 64 K 64 warps 8 stages 3."""
    numbers = {name: value for name, value in entry.items() if isinstance(value, int)}
    return " ".join(f"{name.removeprefix('BLOCK_').removeprefix('num_')} {value}" for name, value in numbers.items())


def main() -> None:
    """The entry point of `vit-fast`."""
    app()


if __name__ == "__main__":
    main()
