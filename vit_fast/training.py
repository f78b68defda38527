"""Training: `train(Config(...))`, the same with or without the command line.

AdamW (Loshchilov and Hutter 2019) without decay on norms, biases, positions and tokens; linear warm-up and a cosine;
label smoothing (Szegedy et al. 2016); gradients clipped by their norm; stochastic depth; bfloat16 where the device has
it. Everything that a step depends on is in the checkpoint, so that a run that was stopped after any optimiser step goes
on, on a CPU, to the same bits as one that was not.
"""

import dataclasses
import functools
import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vit_fast import checkpoint
from vit_fast.data import ShuffledBatches, load_data
from vit_fast.inference import normalise
from vit_fast.model import VisionTransformer
from vit_fast.pretrained import fit_head, load
from vit_fast.weights.settings import to_timm
from vit_fast.zoo import create_model

HISTORY = "history.jsonl"
DEFAULT_MODEL = "vit_tiny_patch16_224"
# The model for the digits where none is named: six layers of width 64 on the 16 patches of a scan. Learned positions
# start small beside the patches, and 1,438 scans are few to learn them from: the sine-cosine table is there at once.
DIGITS_KWARGS = {
    "img_size": 8,
    "patch_size": 2,
    "embed_dim": 64,
    "depth": 6,
    "num_heads": 4,
    "pos_embed": "sincos2d",
}


def _is_count(value) -> bool:
    return type(value) is int and value >= 0  # a truth value is an int too


def _is_number(value) -> bool:
    return type(value) in (int, float) and abs(value) <= sys.float_info.max  # of an int too large for a float too


def _is_history(value) -> bool:
    return isinstance(value, list) and all(
        isinstance(line, dict) and _is_number(line.get("held_out_accuracy")) for line in value
    )


# What a run keeps of its position, and what each is; a file may hold anything.
STATE = {
    "settings": lambda value: isinstance(value, dict),
    "data": lambda value: isinstance(value, str),
    "epoch": _is_count,
    "batch": _is_count,
    "images": _is_count,
    "loss_sum": _is_number,
    "history": _is_history,
}
PICTURES = ("mean", "std", "interpolation", "crop_pct", "crop_mode")  # what a checkpoint keeps of `pretrained_cfg`
READ_EVERY = 10  # steps between two readings of the loss on a GPU: each makes the host wait for the device


@dataclass(frozen=True)
class Config:
    """The settings of a run, named as the flags of timm's train.py.

    Raises:
        ValueError: for a value out of range, naming it.
    """

    data: str  # "digits", or a folder with one subfolder of pictures a class
    output: str  # folder of the checkpoint and the history
    model: str | None = None  # a name of the zoo; None is vit_tiny_patch16_224, for digits a small one of their own
    model_kwargs: dict = field(default_factory=dict)  # further arguments of create_model
    num_classes: int | None = None  # None is as many as the data has
    img_size: int | None = None  # None is that of the model
    pretrained_path: str | None = None  # weights to begin with, of what `load` reads; other classes get a new head
    epochs: int = 100
    batch_size: int = 64
    lr: float = 1e-3
    min_lr: float = 0.0
    warmup_lr: float = 1e-5
    warmup_epochs: float = 5
    weight_decay: float = 0.05
    smoothing: float = 0.1
    clip_grad: float | None = 1.0
    drop_path: float = 0.0
    hflip: float | None = None  # probability of a mirrored picture; None is 0.5, for digits 0
    seed: int = 42
    amp: bool | None = None  # autocast to bfloat16; None: on a GPU that has it
    workers: int | None = None  # processes that decode pictures; None: up to four, for digits none
    device: str = ""  # "" is cuda where there is one, cpu elsewhere

    def __post_init__(self):
        for name in ("epochs", "batch_size"):
            self._check(name, 1 <= getattr(self, name) < 2**31, "1 or more, below 2^31")
        self._check("warmup_epochs", 0 <= self.warmup_epochs < 2**31, "0 or more, below 2^31")
        for name in ("lr", "min_lr", "warmup_lr", "weight_decay"):
            self._check(name, 0 <= getattr(self, name) < math.inf, "a finite number, 0 or more")
        for name in ("smoothing", "drop_path"):
            self._check(name, 0 <= getattr(self, name) < 1, "0 or more and less than 1")
        self._check("hflip", self.hflip is None or 0 <= self.hflip <= 1, "0 to 1")
        self._check("clip_grad", self.clip_grad is None or self.clip_grad > 0, "more than 0, or nothing")
        self._check("seed", 0 <= self.seed < 2**63, "0 or more")
        self._check("workers", self.workers is None or self.workers >= 0, "0 or more")

    def _check(self, name: str, holds: bool, takes: str) -> None:
        if not holds:
            raise ValueError(f"{name}: got {getattr(self, name)}, takes {takes}")


# What may differ when a run goes on: where it is written and how its pictures are read.
FREE_ON_RESUME = ("output", "workers", "device")


@dataclass(frozen=True)
class Step:
    """What `on_step` is told after each optimiser step."""

    step: int  # steps done, of all epochs
    steps: int  # steps of the whole run
    epoch: int  # from 0
    loss: float  # of the last batch that was read
    lr: float
    images: int  # in this step


@dataclass(frozen=True)
class Result:
    """A finished run."""

    model: nn.Module
    history: list[dict]  # one an epoch, as in history.jsonl
    output: Path

    @property
    def accuracy(self) -> float:
        """Share of the held-out pictures that the finished model names rightly, 0 to 1."""
        return self.history[-1]["held_out_accuracy"]


def train(
    config: Config,
    resume: str | Path | None = None,
    on_step: Callable[[Step], None] | None = None,
    on_epoch: Callable[[dict], None] | None = None,
) -> Result:
    """Train a model and leave it in the folder `config.output`: the files of a checkpoint, and history.jsonl.

    A checkpoint is written after each epoch, before the error of a picture that cannot be read, and after the running
    step on Ctrl-C (a second Ctrl-C stops at once, and leaves the checkpoint before). The last weights are kept,
    whatever the held-out accuracy of an earlier epoch was. While it trains no other process may train into this folder.

    Args:
        resume: the folder of a checkpoint to go on from. Settings other than `FREE_ON_RESUME` must be as they were.
            Where the last checkpoint is damaged the run goes on from the one before, and a warning says so.
        on_step: called after each step. It may raise KeyboardInterrupt, which counts as Ctrl-C.
        on_epoch: called after each epoch with its line of the history: epoch, step, lr, train_loss, held_out_loss,
            held_out_accuracy, images_per_second (of training).

    Raises:
        ValueError: for an output that cannot be written, holds another run or is trained into by another process, data
            that does not fit, a picture that cannot be read, a checkpoint of other settings or data.
        OSError: for a disk that is full. KeyboardInterrupt: after Ctrl-C.
        FloatingPointError: where the loss is no number any more; the last checkpoint is from before.
    """
    checkpoint.check_writable(config.output)
    output = Path(config.output)
    with checkpoint.claimed(output):
        return _train(config, output, resume, on_step, on_epoch)


def _train(config: Config, output: Path, resume: str | Path | None, on_step, on_epoch) -> Result:
    held = any((output / name).exists() for name in (checkpoint.TRAINING, checkpoint.PREVIOUS))
    if held and (resume is None or not output.samefile(resume)):
        raise ValueError(f"output: {output} holds a checkpoint already; resume it, or name another folder")
    run = _Run(config, resume)
    if resume is not None:
        run.restore(Path(resume))
        # A checkpoint from the start, should the output be another folder, or the last one damaged: that is not kept.
        run.save(output, keep_previous=False)
    with _Interrupt() as interrupt:
        while run.epoch < config.epochs:
            started, images_before = time.monotonic(), run.images
            for images, labels in run.batches():
                run.train_step(images, labels)
                if on_step is not None:
                    try:
                        on_step(run.report(len(labels)))
                    except KeyboardInterrupt:
                        interrupt.wanted = True
                if interrupt.wanted:
                    run.save(output)
                    raise KeyboardInterrupt
            seconds = time.monotonic() - started
            speed = (run.images - images_before) / seconds
            loss, accuracy = evaluate(run.model, run.held_out(interrupt), run.device, run.amp)
            if interrupt.wanted:
                run.save(output)
                raise KeyboardInterrupt
            record = run.finish_epoch(loss, accuracy, speed)
            run.save(output)
            if on_epoch is not None:
                on_epoch(record)
    return Result(run.model.eval(), run.history, output)


def device_named(name: str) -> torch.device:
    """The device of this name; "" is cuda where there is one, cpu elsewhere.

    Raises:
        ValueError: for a name that torch does not know, and a GPU that is not there.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ValueError(f"device: got {name!r}, takes cpu, cuda, cuda:1 …") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device: got {name!r}, torch sees {torch.cuda.device_count()} GPUs here")
    return device


def learning_rate(config: Config, step: int, steps_per_epoch: int) -> float:
    """The rate of optimiser step `step`, from 0: linear from warmup_lr to lr, then half a cosine down to min_lr."""
    steps, warmup = config.epochs * steps_per_epoch, round(config.warmup_epochs * steps_per_epoch)
    if step < warmup:
        return config.warmup_lr + (config.lr - config.warmup_lr) * step / warmup
    progress = (step - warmup) / max(steps - warmup, 1)
    return config.min_lr + (config.lr - config.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def parameter_groups(model: VisionTransformer, weight_decay: float) -> list[dict]:
    """AdamW's groups: no decay on vectors (norms, biases, LayerScale) and on what `no_weight_decay` names."""
    spared = model.no_weight_decay()
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (others if parameter.dim() <= 1 or name in spared else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


@torch.no_grad()
def evaluate(model: nn.Module, batches, device: torch.device, amp: bool = False) -> tuple[float, float]:
    """(mean cross entropy, share named rightly) over batches of (images, classes)."""
    training = model.training
    model.eval()
    loss, right, count = 0.0, 0, 0
    for images, labels in batches:
        images, labels = images.to(device), labels.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            logits = model(images)
        loss += F.cross_entropy(logits.float(), labels, reduction="sum").item()
        right += (logits.argmax(dim=1) == labels).sum().item()
        count += len(labels)
    model.train(training)
    return loss / max(count, 1), right / max(count, 1)


def _use_amp(config: Config, device: torch.device) -> bool:
    has_it = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if config.amp and device.type == "cuda" and not has_it:
        raise ValueError(f"amp: {torch.cuda.get_device_name(device)} has no bfloat16; train without it")
    return has_it if config.amp is None else config.amp


def architecture(config: Config) -> checkpoint.Config:
    """The model of a run and how it wants its pictures, before the data says which classes there are.

    The drop path is left out: it is training's alone.
    """
    result = checkpoint.Config(config.model or DEFAULT_MODEL, _model_kwargs(config), (), {})
    return dataclasses.replace(result, preprocessing=_preprocessing(config, result.build(device="meta")))


def pretrained(config: Config, path: str) -> tuple[checkpoint.Config, VisionTransformer]:
    """`architecture` of the model that is at this path, and that model, its drop path with it."""
    model = load(path, model=config.model, drop_path_rate=config.drop_path, **_model_kwargs(config))
    said = to_timm(model, ())
    kwargs = {**said["model_args"], "global_pool": said["global_pool"]}
    pictures = _preprocessing(config, model)
    return checkpoint.Config(said["architecture"], kwargs, (), pictures, model.pos_interpolation), model


def _preprocessing(config: Config, model: VisionTransformer) -> dict:
    preprocessing = {key: model.pretrained_cfg[key] for key in PICTURES}
    preprocessing["input_size"] = [model.in_chans, *model.patch_embed.img_size]
    if config.data == "digits":
        preprocessing["crop_pct"] = 1.0  # a scan is all digit: there is no margin to cut
    return json.loads(json.dumps(preprocessing))


def _model_kwargs(config: Config) -> dict:
    kwargs = dict(config.model_kwargs)
    if config.data == "digits":
        fresh = config.model is None and config.pretrained_path is None
        kwargs = {"in_chans": 1, **(DIGITS_KWARGS if fresh else {}), **kwargs}
    if config.img_size is not None:
        kwargs["img_size"] = config.img_size
    for name, setting in (("num_classes", "num_classes"), ("drop_path_rate", "drop_path")):
        if name in kwargs:
            raise ValueError(f"model_kwargs: got {name}, which is the setting {setting}")
    return kwargs


def class_names(config: Config, names: Sequence[str]) -> tuple[str, ...]:
    """The names of the data's classes, and of those that `num_classes` adds."""
    count = len(names) if config.num_classes is None else config.num_classes
    if count < len(names):
        raise ValueError(f"num_classes: got {count}, the data has {len(names)}")
    return (*names, *(f"class {index}" for index in range(len(names), count)))


class _Interrupt:
    """Inside the block Ctrl-C sets `wanted`, so that no step is cut in two; the second one raises at once."""

    def __enter__(self):
        self.wanted = False
        self.before = None
        if threading.current_thread() is threading.main_thread():  # signals can be caught nowhere else
            self.before = signal.signal(signal.SIGINT, self._catch)
        return self

    def _catch(self, number, frame) -> None:
        if self.wanted:
            raise KeyboardInterrupt
        self.wanted = True

    def __exit__(self, *_) -> None:
        if self.before is not None:
            signal.signal(signal.SIGINT, self.before)


class _ErrorsAsValues(torch.utils.data.Dataset):
    """Gives the error of a picture that cannot be read as a value: raised in a worker, it arrives as a traceback."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __getitems__(self, indices: list[int]):
        try:
            return self.dataset.__getitems__(indices)
        except (ValueError, OSError, MemoryError) as error:
            return error


def _as_it_is(batch):
    return batch


def _ignore_interrupt(worker: int) -> None:
    """Ctrl-C reaches every process of a terminal; the one that trains decides what follows."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class _Run:
    """The state of a run between two optimiser steps: all of it is saved and restored here."""

    def __init__(self, config: Config, resume: str | Path | None = None):
        self.config = config
        self.device = device_named(config.device)
        self.amp = _use_amp(config, self.device)
        model = None
        if config.pretrained_path is None:
            self.model_config = architecture(config)
        elif resume is None:
            self.model_config, model = pretrained(config, config.pretrained_path)
        else:  # what it began with may be gone
            self.model_config = checkpoint.load_config(resume)
        self.data = load_data(config.data, self.model_config.preprocessing, config.hflip)
        self.data.augment.to(self.device)
        classes = class_names(config, self.data.classes)
        self.model_config = dataclasses.replace(self.model_config, classes=classes)
        torch.manual_seed(config.seed)
        if model is None:
            model = self.model_config.build(drop_path_rate=config.drop_path)
        else:
            fit_head(model, len(classes), classes)
        self.model = model.to(self.device).train()
        fused = self.device.type in ("cpu", "cuda")
        self.optimiser = torch.optim.AdamW(parameter_groups(self.model, config.weight_decay), fused=fused)
        self.sampler = ShuffledBatches(len(self.data.train), config.batch_size, config.seed)
        self.epoch, self.batch = 0, 0  # of the next step
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)  # over the images of this epoch
        self.images = 0  # of this epoch
        self.last_loss = math.nan
        self.history: list[dict] = []

    def _loader(self, dataset, batches):
        workers = self.config.workers
        if workers is None:
            workers = 0 if self.config.data == "digits" else min(4, os.cpu_count() or 1)
        loader = torch.utils.data.DataLoader(
            _ErrorsAsValues(dataset),
            batch_sampler=batches,
            collate_fn=_as_it_is,  # the data sets give whole batches
            num_workers=workers,
            worker_init_fn=_ignore_interrupt,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # workers' seeds: not from the generator that the run depends on
        )
        for batch in loader:
            if isinstance(batch, Exception):
                if self.step:
                    self._save_before(batch)
                raise batch
            yield batch

    def _save_before(self, error: Exception) -> None:
        """Save what was trained before a picture that cannot be read, and raise the error with what to do."""
        try:
            self.save(Path(self.config.output))
        except (ArithmeticError, ValueError, OSError) as other:
            raise error from other
        hint = f"the {self.step} steps before it are saved: put a readable picture in its place and resume"
        raise ValueError(f"{error}; {hint}") from error

    def batches(self):
        """What is left of this epoch: (uint8 images, classes)."""
        return self._loader(self.data.train, list(self.sampler.epoch(self.epoch, self.batch)))

    def held_out(self, interrupt: _Interrupt):
        """The held-out pictures, bytes that the model normalises as `predict` does, until Ctrl-C."""
        count, size = len(self.data.held_out), self.config.batch_size
        order = [list(range(start, min(start + size, count))) for start in range(0, count, size)]
        for images, labels in self._loader(self.data.held_out, order):
            if interrupt.wanted:
                return
            yield images, labels

    def _normalise(self, images: Tensor) -> Tensor:
        preprocessing = self.model_config.preprocessing
        return normalise(images, preprocessing["mean"], preprocessing["std"])

    @property
    def step(self) -> int:
        return self.epoch * len(self.sampler) + self.batch

    def train_step(self, images: Tensor, labels: Tensor) -> None:
        images, labels = (tensor.to(self.device, non_blocking=True) for tensor in (images, labels))
        images = self._normalise(self.data.augment(images.float() / 255))
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate(self.config, self.step, len(self.sampler))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
            logits = self.model(images)
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=self.config.smoothing)
        self.optimiser.zero_grad()
        loss.backward()
        if self.config.clip_grad is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_grad)
        self.optimiser.step()
        self.loss_sum += loss.detach().double() * len(labels)
        self.images += len(labels)
        self.batch += 1
        if self.device.type == "cpu" or self.batch % READ_EVERY == 0 or self.batch == len(self.sampler):
            self.last_loss = loss.item()
            if not math.isfinite(self.last_loss):
                raise FloatingPointError(f"the loss is {self.last_loss} at step {self.step}; try a lower lr")

    def _last_lr(self) -> float:
        return learning_rate(self.config, self.step - 1, len(self.sampler))

    def report(self, images: int) -> Step:
        steps = self.config.epochs * len(self.sampler)
        return Step(self.step, steps, self.epoch, self.last_loss, self._last_lr(), images)

    def finish_epoch(self, held_out_loss: float, accuracy: float, speed: float) -> dict:
        record = {
            "epoch": self.epoch,
            "step": self.step,
            "lr": self._last_lr(),
            "train_loss": self.loss_sum.item() / self.images,
            "held_out_loss": held_out_loss,
            "held_out_accuracy": accuracy,
            "images_per_second": round(speed, 1),
        }
        self.history.append(record)
        self.epoch, self.batch, self.images = self.epoch + 1, 0, 0
        self.loss_sum.zero_()
        return record

    def _named_state(self):
        """(name, AdamW's state) of every parameter that has one."""
        for name, parameter in self.model.named_parameters():
            if parameter in self.optimiser.state:
                yield name, self.optimiser.state[parameter]

    def save(self, output: Path, keep_previous: bool = True) -> None:
        if not all(parameter.isfinite().all() for parameter in self.model.parameters()):
            raise FloatingPointError(f"a weight is no number any more at step {self.step}; try a lower lr")
        tensors = {
            f"optimiser.{name}.{key}": value.detach().cpu().contiguous()
            for name, values in self._named_state()
            for key, value in values.items()
        }
        tensors["generator.cpu"] = torch.get_rng_state()
        if self.device.type == "cuda":
            tensors["generator.cuda"] = torch.cuda.get_rng_state(self.device)
        state = {
            "settings": self._settings(),
            "data": self.data.digest,
            "epoch": self.epoch,
            "batch": self.batch,
            "images": self.images,
            "loss_sum": self.loss_sum.item(),
            "history": self.history,
        }
        checkpoint.save(output, self.model, self.model_config, tensors, state, keep_previous)
        checkpoint.write_text(output / HISTORY, "".join(json.dumps(record) + "\n" for record in self.history))

    def _settings(self) -> dict:
        settings = {key: value for key, value in dataclasses.asdict(self.config).items() if key not in FREE_ON_RESUME}
        return json.loads(json.dumps(settings))

    def restore(self, folder: Path) -> None:
        """Everything as it was when `save` wrote this folder.

        Raises:
            ValueError: for settings or data that differ, naming them, and for a checkpoint that cannot be read.
        """
        weights, tensors, state = checkpoint.load_training(folder)
        _check(state, STATE, folder)
        if "generator.cpu" not in tensors:
            raise ValueError(f"{folder}: damaged, it lacks generator.cpu")
        differing = [
            f"{name} was {state['settings'].get(name)}, got {value}"
            for name, value in self._settings().items()
            if name != "data" and value != state["settings"].get(name)
        ]
        if differing:
            raise ValueError(f"resume: a run goes on with its own settings: {'; '.join(differing)}")
        if state["data"] != self.data.digest:
            raise ValueError(f"resume: {self.config.data} is not the data that {folder} was trained on")
        epoch, batch, images, history = (state[name] for name in ("epoch", "batch", "images", "history"))
        within = epoch <= self.config.epochs and batch <= len(self.sampler) and images <= len(self.data.train)
        if not within or bool(images) != bool(batch) or epoch != len(history):
            place = f"epoch {epoch}, batch {batch}, image {images}"
            raise ValueError(f"{folder}: damaged, {place} is no place in this run with {len(history)} epochs behind it")
        checkpoint.load_weights(self.model, weights)
        for name, parameter in self.model.named_parameters():
            if not parameter.requires_grad:
                continue
            for key, like in (("step", torch.zeros(())), ("exp_avg", parameter), ("exp_avg_sq", parameter)):
                value = tensors.get(f"optimiser.{name}.{key}")
                if value is None or value.shape != like.shape or value.dtype != like.dtype:
                    got = "nothing" if value is None else f"{value.dtype} of shape {list(value.shape)}"
                    raise ValueError(f"{folder}: damaged, the optimiser's {key} of {name} is {got}")
                self.optimiser.state[parameter][key] = value.clone().to(self.device)
        try:
            torch.set_rng_state(tensors["generator.cpu"].clone())
            if self.device.type == "cuda" and "generator.cuda" in tensors:
                torch.cuda.set_rng_state(tensors["generator.cuda"].clone(), self.device)
        except (RuntimeError, TypeError) as error:
            raise ValueError(f"{folder}: damaged, a generator's state is none ({error})") from error
        self.epoch, self.batch, self.images, self.history = epoch, batch, images, history
        self.loss_sum.fill_(float(state["loss_sum"]))  # JSON has ints of any size


def read_settings(folder: str | Path) -> dict:
    """The settings that a checkpoint was trained with, as arguments of `Config` without those of `FREE_ON_RESUME`.

    Raises:
        ValueError: for a folder that no run can go on from, and for settings of another model than that of its weights,
            of which nothing is allocated.
    """
    weights, _, state = checkpoint.load_training(folder)
    _check(state, {"settings": STATE["settings"]}, folder)
    settings = {"pretrained_path": None, **state["settings"]}  # which a run from before it was there has not
    takes = {field.name: field.type for field in dataclasses.fields(Config) if field.name not in FREE_ON_RESUME}
    _check(settings, {name: functools.partial(_is_setting, kind) for name, kind in takes.items()}, folder)
    if unknown := [name for name in settings if name not in takes]:
        raise ValueError(f"{folder}: damaged, it has settings that no run has: {str(unknown)[:100]}")
    config = Config(**settings, output=str(folder))
    classes = config.num_classes
    if classes is None:  # as many as the data has: those of the weights
        head = weights.get("head.weight", torch.empty(0))
        classes = min(head.shape[:1].numel(), head.numel())
    kwargs = {"num_classes": classes, **_model_kwargs(config)}
    build: Callable[..., VisionTransformer] = functools.partial(create_model, config.model or DEFAULT_MODEL, **kwargs)
    if config.pretrained_path is not None:
        described = checkpoint.load_config(folder)
        kwargs, build = described.kwargs, described.build
    checkpoint.check_described(build, kwargs, weights, f"{folder}: its settings")
    return settings


def _is_setting(kind, value) -> bool:
    """Whether a value is of the type of a setting: JSON has one kind of number, and a truth value is none."""
    kinds = (kind,) if isinstance(kind, type) else kind.__args__
    return type(value) in (*kinds, *((int,) if float in kinds else ())) and (
        type(value) is not int or _is_number(value)
    )


def _check(state, takes: dict, folder: str | Path) -> None:
    if not isinstance(state, dict):
        raise ValueError(f"{folder}: damaged, its state is {type(state).__name__}")
    missing = [key for key in takes if key not in state]
    if missing:
        raise ValueError(f"{folder}: damaged, it lacks {', '.join(missing)}")
    for key, is_one in takes.items():
        if not is_one(state[key]):
            raise ValueError(f"{folder}: damaged, its {key} is {str(state[key])[:100]!r}")
