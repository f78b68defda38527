"""Whole models against every peer that has the same one: inference, and training steps with fused AdamW.

Every parameter is drawn anew (some heads start at zero, and any two models would agree), and what a contender returns
is held to its own weights in fp64 before it is timed. A case has one batch of images for every contender and run, not a
rotation: a model's weights and what its blocks hand on pass through the cache between two runs, but those of ViT-S and
Ti at batch 1, which a large L2 holds, for all contenders alike.
"""

import copy
import functools
import itertools
import pathlib
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch._dynamo
import torch.nn.functional as F
from torch import Tensor, nn

import vit_fast
from benchmarks import timing
from benchmarks.contenders import LOST, LeftOut, compiled, installed, lost
from benchmarks.launches import DTYPES
from benchmarks.predictions import forward_flops
from benchmarks.timing import DEVICE
from tests import mend_torchvision
from vit_fast.verify import in_a_line

# timm's name and ours; "tiny" is a rehearsal's: ViT-Ti of two blocks.
NAMES = {
    "tiny": "vit_tiny_patch16_224",
    "Ti": "vit_tiny_patch16_224",
    "S": "vit_small_patch16_224",
    "B": "vit_base_patch16_224",
    "L": "vit_large_patch16_224",
    "H": "vit_huge_patch14_224",
    "g": "vit_giant_patch14_224",
    "so400m": "vit_so400m_patch14_siglip_224",
}
CLASSES = 1000
FORMS = ("", " graph", " compiled", " compiled max")
PARAMETERS = {**DTYPES, "amp": torch.float32}  # the dtype of a case's parameters, and of its images


class ModelCase(NamedTuple):
    """A model at one size of images and batch."""

    model: str
    pixels: int
    batch: int
    dtype: str  # "amp" is bf16 by autocast, the parameters in fp32
    direction: str  # "inference", "training", or "checkpointed": training with each library's activation checkpointing

    def __str__(self) -> str:
        return "-".join(map(str, self))


class MeasuredModel(NamedTuple):
    """What became of a contender: its samples in microseconds a batch, or why there are none."""

    us: list[float]
    error: float | None = None  # of its logits, ‖y − fp64‖ / ‖fp64‖
    facts: dict = {}  # noqa: RUF012 - first call in seconds, peak memory in GB, launches; clock, power under it
    left_out: str = ""
    wrong: str = ""


def cases(which: str) -> list[ModelCase]:
    if which == "small":
        ways = [(dtype, way) for dtype in ("bf16", "fp32") for way in ("inference", "training")]
        return [ModelCase("tiny", 224, 2, *way) for way in (*ways, ("amp", "training"), ("bf16", "checkpointed"))]
    models = [name for name in NAMES if name != "tiny"] if which == "full" else ["S", "B", "L", "H"]
    pixels = (224, 384, 518) if which == "full" else (224,)
    found = []
    for name, side in itertools.product(models, pixels):
        if side % (14 if name in ("H", "g", "so400m") else 16):
            continue
        found += [ModelCase(name, side, batch, "bf16", "inference") for batch in (1, 8, 32, 64, 256)]
        found += [ModelCase(name, side, batch, "bf16", "training") for batch in (64, 256)]
    return found


# ---- the peers' models ---------------------------------------------------------------------------------------------


def _installed_with_torchvision(package: str) -> None:
    """As `installed`, for what imports torchvision, which beside a CPU build of torch wants mending first."""
    installed(package)
    mend_torchvision.mend()


def _without_checkpointing(case: ModelCase) -> None:
    if case.direction == "checkpointed":
        raise LeftOut("its model has no switch for activation checkpointing")


def _arguments(case: ModelCase) -> dict[str, int]:
    """What our `create_model` takes, and timm's."""
    depth = {"depth": 2} if case.model == "tiny" else {}
    return {"num_classes": CLASSES, "img_size": case.pixels, **depth}


def _ours(case: ModelCase, **options) -> nn.Module:
    model = vit_fast.create_model(NAMES[case.model], **_arguments(case) | options)
    model.set_grad_checkpointing(case.direction == "checkpointed")
    return model


def _timm(case: ModelCase) -> nn.Module:
    _installed_with_torchvision("timm")
    import timm

    model = timm.create_model(NAMES[case.model], **_arguments(case))
    model.set_grad_checkpointing(case.direction == "checkpointed")
    return model


@functools.cache
def _sizes(case: ModelCase) -> dict[str, int]:
    """Of the model that has a class token and one linear head, as every library has it."""
    if case.model == "so400m":
        raise LeftOut("its model has a class token, this one attention pooling")
    with torch.device("meta"):
        ours = _ours(case)
    block = ours.blocks[0]
    return {
        "width": ours.embed_dim,
        "depth": len(ours.blocks),
        "heads": block.attn.num_heads,
        "hidden": block.mlp.fc1.out_features,
        "patch": ours.patch_embed.patch_size[0],
    }


class _Logits(nn.Module):
    """A model of transformers, its logits alone."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images).logits


def _transformers(case: ModelCase) -> nn.Module:
    _installed_with_torchvision("transformers")
    from transformers import ViTConfig, ViTForImageClassification

    sizes = _sizes(case)
    config = ViTConfig(
        hidden_size=sizes["width"],
        num_hidden_layers=sizes["depth"],
        num_attention_heads=sizes["heads"],
        intermediate_size=sizes["hidden"],
        patch_size=sizes["patch"],
        image_size=case.pixels,
        layer_norm_eps=1e-6,
        num_labels=CLASSES,
        attn_implementation="sdpa",
    )
    model = ViTForImageClassification(config)
    if case.direction == "checkpointed":
        model.gradient_checkpointing_enable()
    return _Logits(model)


def _torchvision(case: ModelCase) -> nn.Module:
    _installed_with_torchvision("torchvision")
    _without_checkpointing(case)
    from torchvision.models import VisionTransformer

    sizes = _sizes(case)
    return VisionTransformer(
        case.pixels,
        sizes["patch"],
        sizes["depth"],
        sizes["heads"],
        sizes["width"],
        sizes["hidden"],
        num_classes=CLASSES,
    )


DINOV2 = {"S": "dinov2_vits14", "B": "dinov2_vitb14", "L": "dinov2_vitl14"}  # its giant is another model


def _dinov2(case: ModelCase) -> nn.Module:
    """Of a clone of its repository where torch.hub keeps one: nothing is fetched."""
    _without_checkpointing(case)
    clone = pathlib.Path(torch.hub.get_dir()) / "facebookresearch_dinov2_main"
    if case.model not in DINOV2:
        raise LeftOut("it has no model of this size")
    if not clone.is_dir():
        raise LeftOut(f"no clone of facebookresearch/dinov2 at {clone}")
    sizes = _sizes(case)
    backbone = torch.hub.load(
        str(clone),
        DINOV2[case.model],
        source="local",
        pretrained=False,
        img_size=case.pixels,
        patch_size=sizes["patch"],
        init_values=None,
    )
    return nn.Sequential(backbone, nn.Linear(sizes["width"], CLASSES))


PEERS = {
    "vit_fast": _ours,
    "timm": _timm,
    "transformers": _transformers,
    "torchvision": _torchvision,
    "dinov2": _dinov2,
}


def built(case: ModelCase, whose: str, **options) -> nn.Module:
    """A library's model as the case has it: in its dtype, on the device, in training or not. Of ours, with options."""
    with torch.device(DEVICE):
        return PEERS[whose](case, **options).to(PARAMETERS[case.dtype]).train(case.direction != "inference")


def drawn(case: ModelCase) -> tuple[Tensor, Tensor]:
    """Images of a case [batch, 3, pixels, pixels] and their labels [batch]."""
    images = torch.randn(case.batch, 3, case.pixels, case.pixels, device=DEVICE).to(PARAMETERS[case.dtype])
    return images, torch.randint(CLASSES, (case.batch,), device=DEVICE)


def rates(case: ModelCase, us: float) -> dict[str, float]:
    """Images a second, and TFLOP/s of the model as it is published, of a batch that took so many microseconds.

    What checkpointing computes again counts for nothing.
    """
    sizes = {name: value for name, value in _arguments(case).items() if name == "depth"}
    flops = forward_flops(NAMES[case.model], case.pixels, **sizes) * (1 if case.direction == "inference" else 3)
    return {"images_per_second": 1e6 * case.batch / us, "tflops": flops * case.batch / us / 1e6}


def names(case: ModelCase) -> list[str]:
    """Every contender: a library's model in eager form, in a CUDA graph, and compiled; training steps in no graph."""
    forms = FORMS if case.direction == "inference" else (FORMS[0], *FORMS[2:])
    return [whose + form for whose in PEERS for form in forms]


# ---- measuring -----------------------------------------------------------------------------------------------------


def draw_anew(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        mean, std = (0.5, 0.3) if parameter.dim() == 1 else (0.0, 0.05)
        nn.init.normal_(parameter, mean, std)
    return model


def graphed(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """A run as a CUDA graph; what it returns lies in the same memory each time."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = run()

    def replay() -> Tensor:
        graph.replay()
        return output

    replay.captured = run  # a graph reads its model's weights and does not keep them
    return replay


def fused_adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), fused=True)


def training_step(
    optimiser: torch.optim.Optimizer, forward: Callable[[], Tensor], labels: Tensor
) -> Callable[[], None]:
    """`forward`, which gives a model's logits, backward and a step of its optimiser."""

    def step():
        F.cross_entropy(forward().float(), labels).backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    return step


def ends(batch: Tensor) -> Tensor:
    """The first and the last of a batch: those that are held to fp64, from a run of the whole."""
    return batch[[0, -1]]


@torch.no_grad()
def truth_of(model: nn.Module, images: Tensor) -> Tensor:
    """The logits of both ends of a batch in fp64, in evaluation mode: no contender draws in training."""
    return copy.deepcopy(model).double().eval()(ends(images).double())


def error_of(logits: Tensor, truth: Tensor) -> float:
    """‖y − fp64‖ / ‖fp64‖ of both ends of a batch of logits."""
    return ((ends(logits.detach()).double() - truth).norm() / truth.norm()).item()


def launches_of(run: Callable) -> int:
    """How many kernels a run launches on the device."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    on_device = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return sum(not event.name.startswith(("Memcpy", "Memset", "Optimizer")) for event in on_device)


class Contender(NamedTuple):
    """What is timed, and the same in a form that returns logits."""

    run: Callable
    logits: Callable[[], Tensor]


def autocast(case: ModelCase) -> torch.autocast:
    """Around a forward pass, in bf16 or not at all."""
    return torch.autocast(DEVICE, torch.bfloat16, enabled=case.dtype == "amp")


def started(model: nn.Module, form: str, case: ModelCase, images: Tensor, labels: Tensor) -> Contender:
    """A model in one of `FORMS`, as a case has it run; a graph is captured here, compilation waits for the first run.

    Raises:
        LeftOut: for a graph without a GPU.
    """
    if form == "graph" and DEVICE == "cpu":
        raise LeftOut("graphs are a GPU's")
    training = case.direction != "inference"
    if form.startswith("compiled"):
        mode = None
        if form.endswith("max"):
            mode = "max-autotune-no-cudagraphs" if training else "max-autotune"
        model = compiled(model, mode)

    def forward():
        with autocast(case):
            return model(images)

    if training:
        return Contender(training_step(fused_adamw(model), forward, labels), forward)
    infer = torch.inference_mode()(forward)
    run = graphed(infer) if form == "graph" else infer
    return Contender(run, run)


def measure(case: ModelCase, contenders: list[str], rounds: int = timing.ROUNDS) -> dict[str, MeasuredModel]:
    """Each contender's time a batch, in turn with the others.

    Logits of the form that is timed, at both ends of the batch, may be four times as far from fp64 as those of our
    model in PyTorch in the same dtype. A contender's first call includes capture or compilation, and of training the
    first step; its kernels may lie in the compilers' caches from the contender before, or an earlier run. Its memory is
    the most that it takes with the images, without what the others hold; of a graph, which has a pool of its own, it is
    not known. Where one takes the device with it, those that were not timed are left out.
    """
    torch._dynamo.reset()  # its limits are for one piece of code, and all cases share theirs
    images, labels = drawn(case)
    with vit_fast.use_backend("torch"):
        ours = draw_anew(built(case, "vit_fast")).eval()
        with torch.no_grad():
            with autocast(case):
                logits = ours(ends(images))
            allowed = 4 * error_of(logits, truth_of(ours, images))
    del ours
    found, runs = {}, {}
    for name in contenders:
        model = contender = run = None  # of one that failed, whose memory is not that of the others
        timing.empty_memory()
        try:
            others = timing.held_gb() - images.nbytes / 1e9
            whose, _, form = name.partition(" ")
            model = draw_anew(built(case, whose))
            truth = truth_of(model, images)
            timing.empty_memory()
            began = time.perf_counter()
            contender = started(model, form, case, images, labels)
            error = error_of(contender.logits(), truth)
            if not error <= allowed:
                raise ValueError(f"its error is {error:.1e}, {allowed:.1e} is allowed")
            run = contender.run
            run()
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            facts = {"first_call_s": round(time.perf_counter() - began, 3)}
            if DEVICE == "cuda":
                if not name.endswith(" graph"):
                    timing.empty_memory()
                    run()
                    facts["peak_gb"] = round(timing.peak_gb() - others, 2)
                facts["launches"] = launches_of(run)
            found[name], runs[name] = MeasuredModel([], error, facts), run
        except LeftOut as reason:
            found[name] = MeasuredModel([], left_out=str(reason))
        except Exception as error:  # too little memory, or what a compiler says; a failure of ours is a fault
            said = in_a_line(error)
            wrong = name.startswith("vit_fast") or isinstance(error, ValueError)
            found[name] = MeasuredModel([], wrong=said) if wrong else MeasuredModel([], left_out=said)
            if lost(said):
                gone = MeasuredModel([], left_out=LOST + name)
                timed = {other: one for other, one in found.items() if one.left_out or one.wrong}
                return dict.fromkeys(contenders, gone) | timed
    apart = case.direction != "inference" and DEVICE == "cuda"
    try:
        timed = timing.time_in_turn(runs, rounds, held=False, apart=apart, shortest=timing.SUSTAINED)
    except torch.OutOfMemoryError as error:  # each had room beside those before it, and all together have none
        return found | dict.fromkeys(runs, MeasuredModel([], left_out=in_a_line(error)))
    for name, samples in timed.items():
        facts = found[name].facts | timing.state_under(runs[name])
        found[name] = found[name]._replace(us=samples, facts=facts)
    return found
