"""Somebody else's models, accelerated, and what else is done with models: `python -m tests.matrix` writes the page.

Each cell of docs/matrix.md is a run. One that fails stops the page from being written; tests/test_accelerate.py runs
the cells too.
"""

import copy
import importlib.metadata
import os
import pathlib
import pickle
import sys
import tempfile
import warnings
from collections.abc import Callable

import torch
import torch.multiprocessing as multiprocessing
from torch import Tensor, nn

from tests import mend_torchvision

mend_torchvision.mend()

import open_clip  # noqa: E402 - all import torchvision, which had to be mended
import timm  # noqa: E402
import torchvision  # noqa: E402
import transformers as hf  # noqa: E402

import vit_fast  # noqa: E402
from tests.error_rule import relative_error  # noqa: E402
from tests.originals import OriginalVisionTransformer  # noqa: E402
from tests.small_runs import drawn  # noqa: E402
from vit_fast.foreign.block import Fused, FusedBlock  # noqa: E402

PAGE = pathlib.Path(__file__).parent.parent / "docs" / "matrix.md"
OUTPUT, GRADIENT = 1e-5, 1e-4  # in norm, fp32

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 5}
SIZES = {
    **{"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 96},
    **{"image_size": 32, "patch_size": 8},
}
# Maps of 8 x 8 and of 4 x 4 tokens, windows of 4 x 4, heads of 16 and of 32.
SWIN = {"patch_size": 4, "embed_dim": 32, "depths": (2, 2), "num_heads": (2, 2), "window_size": 4}
LABELS = {"num_labels": 5}
TEXT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 50}


def _timm(name: str, **more) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, **{**TINY, **more})


def _timm_swin(name: str, **more) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, **{"img_size": 32, "num_classes": 5, **SWIN, **more})


def _swin_t() -> nn.Module:
    heads, depths = list(SWIN["num_heads"]), list(SWIN["depths"])
    return torchvision.models.SwinTransformer(
        [4, 4], 32, depths, heads, [4, 4], stochastic_depth_prob=0.3, num_classes=5
    )


def _clip() -> nn.Module:
    return hf.CLIPModel(hf.CLIPConfig(vision_config=SIZES, text_config=TEXT, projection_dim=24))


def _siglip() -> nn.Module:
    text = {**TEXT, "max_position_embeddings": 9, "projection_size": SIZES["hidden_size"]}
    return hf.SiglipModel(hf.SiglipConfig(vision_config=SIZES, text_config=text))


def _siglip2() -> nn.Module:
    sizes = {name: value for name, value in SIZES.items() if name != "image_size"}
    return hf.Siglip2VisionModel(hf.Siglip2VisionConfig(**sizes, num_patches=16, num_channels=3))


def open_clip_model(quick_gelu: bool = False, **more) -> nn.Module:
    vision = open_clip.model.CLIPVisionCfg(**{"width": 48, "head_width": 16, "patch_size": 8, "image_size": 32, **more})
    text = open_clip.model.CLIPTextCfg(context_length=8, vocab_size=50, width=32, heads=2, layers=1)
    return open_clip.model.CLIP(24, vision, text, quick_gelu=quick_gelu)


def _encoder(activation, **more) -> nn.Module:
    layer = nn.TransformerEncoderLayer(48, 3, 96, 0.0, activation, norm_first=True, batch_first=True, **more)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


MODELS: dict[str, dict[str, Callable[[], nn.Module]]] = {
    "timm": {
        "vit_tiny_patch16_224": _timm("vit_tiny_patch16_224", drop_path_rate=0.3),
        "vit_base_patch16_224.mae": _timm("vit_base_patch16_224", global_pool="avg"),
        "vit_small_patch8_224.dino": _timm("vit_small_patch8_224", num_classes=0),
        "vit_base_patch16_224, dynamic size": _timm("vit_base_patch16_224", dynamic_img_size=True),
        "vit_large_patch14_clip_224": _timm("vit_large_patch14_clip_224"),
        "vit_base_patch16_clip_quickgelu_224": _timm("vit_base_patch16_clip_quickgelu_224"),
        "vit_base_patch16_siglip_224": _timm("vit_base_patch16_siglip_224"),
        "vit_so400m_patch14_siglip_gap_224": _timm("vit_so400m_patch14_siglip_gap_224"),
        "vit_medium_patch16_reg4_gap_256": _timm("vit_medium_patch16_reg4_gap_256"),
        "vit_small_patch14_dinov2": _timm("vit_small_patch14_dinov2", drop_path_rate=0.3),
        "vit_small_patch14_reg4_dinov2": _timm("vit_small_patch14_reg4_dinov2"),
        "vit_giant_patch14_reg4_dinov2": _timm("vit_giant_patch14_reg4_dinov2"),
        "vit_tiny_patch16_224, qk_norm": _timm("vit_tiny_patch16_224", qk_norm=True),
        "vit_tiny_patch16_224, no biases": _timm("vit_tiny_patch16_224", qkv_bias=False, proj_bias=False),
        "beit3_base_patch16_224": _timm("beit3_base_patch16_224"),
        "deit_tiny_distilled_patch16_224": _timm("deit_tiny_distilled_patch16_224"),
        "deit3_small_patch16_224": _timm("deit3_small_patch16_224"),
        "vit_tiny_r_s16_p8_224": lambda: timm.create_model(
            "vit_tiny_r_s16_p8_224", img_size=64, embed_dim=48, depth=2, num_heads=3, num_classes=5
        ),
        "vit_small_patch16_dinov3": _timm("vit_small_patch16_dinov3", drop_path_rate=0.3),
        "vit_small_plus_patch16_dinov3": _timm("vit_small_plus_patch16_dinov3"),
        "vit_pe_core_tiny_patch16_384": _timm("vit_pe_core_tiny_patch16_384"),
        "vit_small_patch16_rope_mixed_224": _timm("vit_small_patch16_rope_mixed_224"),
        "eva_giant_patch14_224": _timm("eva_giant_patch14_224"),
        "eva02_tiny_patch14_224": _timm("eva02_tiny_patch14_224"),
        "eva02_base_patch14_224": _timm("eva02_base_patch14_224"),
        "swin_tiny_patch4_window7_224": _timm_swin("swin_tiny_patch4_window7_224", drop_path_rate=0.3),
        "swin_base_patch4_window12_384, dynamic size": _timm_swin(
            "swin_base_patch4_window12_384", dynamic_img_size=True
        ),
        "swin_s3_tiny_224": _timm_swin("swin_s3_tiny_224", window_size=(2, 4)),
    },
    "transformers": {
        "ViTModel": lambda: hf.ViTModel(hf.ViTConfig(**SIZES)),
        "ViTForImageClassification": lambda: hf.ViTForImageClassification(hf.ViTConfig(**SIZES, **LABELS)),
        "ViTMAEModel": lambda: hf.ViTMAEModel(hf.ViTMAEConfig(**SIZES)),
        "ViTMAEForPreTraining": lambda: hf.ViTMAEForPreTraining(
            hf.ViTMAEConfig(**SIZES, decoder_hidden_size=32, decoder_num_attention_heads=2, decoder_num_hidden_layers=1)
        ),
        "DeiTModel": lambda: hf.DeiTModel(hf.DeiTConfig(**SIZES)),
        "DeiTForImageClassificationWithTeacher": lambda: hf.DeiTForImageClassificationWithTeacher(
            hf.DeiTConfig(**SIZES, **LABELS)
        ),
        "Dinov2Model": lambda: hf.Dinov2Model(hf.Dinov2Config(**SIZES, drop_path_rate=0.3)),
        "Dinov2ForImageClassification": lambda: hf.Dinov2ForImageClassification(hf.Dinov2Config(**SIZES, **LABELS)),
        "Dinov2Model, SwiGLU": lambda: hf.Dinov2Model(hf.Dinov2Config(**SIZES, use_swiglu_ffn=True)),
        "Dinov2WithRegistersModel": lambda: hf.Dinov2WithRegistersModel(hf.Dinov2WithRegistersConfig(**SIZES)),
        "DINOv3ViTModel": lambda: hf.DINOv3ViTModel(
            hf.DINOv3ViTConfig(**SIZES, num_register_tokens=4, drop_path_rate=0.3)
        ),
        "DINOv3ViTModel, SwiGLU": lambda: hf.DINOv3ViTModel(
            hf.DINOv3ViTConfig(**SIZES, num_register_tokens=1, use_gated_mlp=True, hidden_act="silu", mlp_bias=False)
        ),
        "CLIPVisionModel": lambda: hf.CLIPVisionModel(hf.CLIPVisionConfig(**SIZES)),
        "CLIPVisionModelWithProjection": lambda: hf.CLIPVisionModelWithProjection(
            hf.CLIPVisionConfig(**SIZES, projection_dim=24)
        ),
        "CLIPModel": _clip,
        "SiglipVisionModel": lambda: hf.SiglipVisionModel(hf.SiglipVisionConfig(**SIZES)),
        "SiglipModel": _siglip,
        "Siglip2VisionModel": _siglip2,
        "IJepaModel": lambda: hf.IJepaModel(hf.IJepaConfig(**SIZES)),
        "SwinModel": lambda: hf.SwinModel(hf.SwinConfig(image_size=32, **SWIN, drop_path_rate=0.3)),
        "SwinForImageClassification": lambda: hf.SwinForImageClassification(
            hf.SwinConfig(image_size=32, **SWIN, **LABELS)
        ),
    },
    "torchvision": {
        f"vit_{name}": (
            lambda sizes=sizes: torchvision.models.VisionTransformer(32, *sizes, 48, 96, num_classes=5)
        )  # patch, layers, heads
        for name, sizes in (
            ("b_16", (8, 2, 3)),
            ("b_32", (16, 2, 3)),
            ("l_16", (8, 3, 3)),
            ("l_32", (16, 3, 3)),
            ("h_14", (4, 2, 1)),
        )
    }
    | {"swin_t": _swin_t},
    "open_clip": {
        "ViT-B-16": lambda: open_clip_model(layers=2),
        "ViT-B-16-quickgelu": lambda: open_clip_model(quick_gelu=True, layers=2),
        "ViT, LayerScale": lambda: open_clip_model(layers=2, ls_init_value=0.5),
    },
    "torch.nn": {
        "TransformerEncoder, F.gelu": lambda: _encoder("gelu"),
        "TransformerEncoder, nn.GELU(tanh)": lambda: _encoder(nn.GELU("tanh")),
    },
    "original code, by its shape": {
        "DINO": lambda: OriginalVisionTransformer("dino", drop_path=0.3),
        "DINOv2": lambda: OriginalVisionTransformer("dinov2"),
        "DINOv2, registers": lambda: OriginalVisionTransformer("dinov2", registers=2),
        "DINOv2, SwiGLU": lambda: OriginalVisionTransformer("dinov2 gated"),
    },
}
NAMES = [(library, name) for library, models in MODELS.items() for name in models]


# ---- a model and what it takes


def build(library: str, name: str) -> nn.Module:
    return drawn(MODELS[library][name]())


def inputs_of(model: nn.Module, batch: int = 2) -> dict[str, Tensor]:
    images = torch.randn(batch, 3, 32, 32)
    if isinstance(model, hf.Siglip2VisionModel):
        shapes = torch.tensor([[4, 3]] * batch)
        mask = torch.ones(batch, 12, dtype=torch.int64)
        return {"pixel_values": torch.randn(batch, 12, 192), "pixel_attention_mask": mask, "spatial_shapes": shapes}
    if isinstance(model, (hf.CLIPModel, hf.SiglipModel)):
        return {"pixel_values": images, "input_ids": torch.randint(3, 40, (batch, 7))}
    if isinstance(model, hf.PreTrainedModel):
        return {"pixel_values": images}
    if isinstance(model, open_clip.model.CLIP):
        return {"image": images, "text": torch.randint(1, 40, (batch, 8))}
    if isinstance(model, nn.TransformerEncoder):
        return {"src": torch.randn(batch, 9, 48)}
    if type(model).__module__.startswith("timm") and model.patch_embed.img_size != (32, 32):
        images = torch.randn(batch, 3, *model.patch_embed.img_size)
    return {"x": images}


def run(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """What the model returns, as one vector a batch entry; what is random in it by one seed."""
    torch.manual_seed(0)
    return flat(model(**inputs))


def flat(output) -> Tensor:
    leaves = torch.utils._pytree.tree_leaves(output)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def gradients(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of a random linear function of the output."""
    model.zero_grad()
    output = run(model, inputs)
    output.backward(torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output.dtype))
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal_gradients(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """Each parameter's within a share of the norm of all: some are zero but for rounding, a key's bias among them."""
    assert ours.keys() == theirs.keys()
    size = torch.cat([gradient.flatten() for gradient in theirs.values()]).norm()
    worst = max(theirs, key=lambda name: (ours[name] - theirs[name]).norm())
    assert (ours[worst] - theirs[worst]).norm() <= GRADIENT * size, worst


def accelerated(model: nn.Module) -> nn.Module:
    """A copy, accelerated, of which no block kept its own code."""
    model = copy.deepcopy(model)
    report = vit_fast.accelerate(model, verify=False)
    assert any(line.replaced for line in report), str(report)
    stays = [line for line in report if not line.replaced and "text" not in line.reason and "causal" not in line.reason]
    assert not stays, str(report)
    return model


# ---- the cells


def forward(model: nn.Module, inputs: dict[str, Tensor]) -> None:
    with torch.no_grad():
        assert relative_error(run(accelerated(model), inputs), run(model, inputs)) <= OUTPUT


def gradients_cell(model: nn.Module, inputs: dict[str, Tensor]) -> None:
    assert_equal_gradients(gradients(accelerated(model), inputs), gradients(model, inputs))


def training_step(model: nn.Module, inputs: dict[str, Tensor]) -> None:
    """Three steps of an optimiser that was made before, drop paths drawn."""
    results = []
    for changes in (False, True):
        one = copy.deepcopy(model).train()
        optimiser = torch.optim.AdamW(one.parameters(), lr=1e-3, eps=1e-4)
        if changes:
            vit_fast.accelerate(one, verify=False)
        for _ in range(3):
            gradients(one, inputs)
            optimiser.step()
        results.append(torch.cat([parameter.detach().flatten() for parameter in one.parameters()]))
    start = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    assert relative_error(results[0], start) > 1e-4, "the step changed nothing"
    assert relative_error(results[1], results[0]) <= OUTPUT


def hooks(model: nn.Module, inputs: dict[str, Tensor]) -> None:
    """One on a block sees what it saw; one inside a block is called, and changes what it did."""
    seen = {}
    for name, one in (("before", copy.deepcopy(model)), ("after", accelerated(model))):
        blocks = [m for m in one.modules() if isinstance(m, (FusedBlock, *block_kinds(model)))]
        blocks[0].register_forward_hook(lambda module, args, output, name=name: seen.setdefault(name, output))
        linear = next(m for m in blocks[-1].modules() if isinstance(m, nn.Linear) and type(m) is nn.Linear)
        linear.register_forward_hook(lambda module, args, output, name=name: output * 1.5)
        with torch.no_grad():
            seen[f"{name}, output"] = run(one, inputs)
    assert relative_error(flat(seen["after"]), flat(seen["before"])) <= OUTPUT
    assert relative_error(seen["after, output"], seen["before, output"]) <= OUTPUT


def block_kinds(model: nn.Module) -> tuple[type, ...]:
    """The classes of the blocks of a model that is not accelerated."""
    return tuple({type(m).original() for m in accelerated(model).modules() if isinstance(m, FusedBlock)})


def deepcopy_cell(model: nn.Module, inputs: dict[str, Tensor]) -> None:
    one = accelerated(model)
    again = copy.deepcopy(one)
    assert kinds(again) == kinds(one)
    with torch.no_grad():
        assert torch.equal(run(again, inputs), run(one, inputs))


def kinds(model: nn.Module) -> list[type]:
    return [type(module) for module in model.modules()]


def pickle_cell(model: nn.Module, inputs: dict[str, Tensor]) -> None:
    one = accelerated(model)
    again = pickle.loads(pickle.dumps(one))
    assert kinds(again) == kinds(one)
    with torch.no_grad():
        assert torch.equal(run(again, inputs), run(one, inputs))


def compile_cell(model: nn.Module, inputs: dict[str, Tensor]) -> None:
    """Whole, without a graph break, forward and backward."""
    torch._dynamo.reset()
    one = accelerated(model)
    output = run(torch.compile(one, fullgraph=True, backend="aot_eager"), inputs)
    upstream = torch.randn(output.shape)
    output.backward(upstream)
    expected = run(model, inputs)
    assert relative_error(output, expected) <= OUTPUT
    expected.backward(upstream)
    ours, theirs = ({name: p.grad for name, p in m.named_parameters() if p.grad is not None} for m in (one, model))
    assert_equal_gradients(ours, theirs)


def export_cell(model: nn.Module, inputs: dict[str, Tensor]) -> None:
    """Into PyTorch's own ops."""
    with torch.no_grad():
        program = torch.export.export(accelerated(model), (), inputs)
        assert not [node for node in program.graph.nodes if "vit_fast" in str(node.target)]
        assert relative_error(run(program.module(), inputs), run(model, inputs)) <= OUTPUT


def autocast_cell(model: nn.Module, inputs: dict[str, Tensor]) -> None:
    """In bf16 no further from fp64 than twice the original."""
    wide = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in inputs.items()}
    with torch.no_grad():
        truth = run(copy.deepcopy(model).double(), wide)
        with torch.autocast("cpu", torch.bfloat16):
            ours, theirs = run(accelerated(model), inputs), run(model, inputs)
    assert relative_error(ours, truth) <= 2 * relative_error(theirs, truth) + torch.finfo(torch.bfloat16).eps / 8


def restore_cell(model: nn.Module, inputs: dict[str, Tensor]) -> None:
    """The classes, the keys, what each module holds, and the output to the bit."""
    one = copy.deepcopy(model)
    held = [(type(module), list(vars(module))) for module in one.modules()]
    parameters = {name: id(parameter) for name, parameter in one.named_parameters()}
    vit_fast.accelerate(one, verify=False)
    assert [list(vars(module)) for module in one.modules()] == [names for _, names in held]
    assert list(one.state_dict()) == list(model.state_dict())
    assert {name: id(parameter) for name, parameter in one.named_parameters()} == parameters
    assert vit_fast.restore(one) > 0
    assert [(type(module), list(vars(module))) for module in one.modules()] == held
    with torch.no_grad():
        assert torch.equal(run(one, inputs), run(model, inputs))


CELLS: dict[str, Callable[[nn.Module, dict], None]] = {
    "forward": forward,
    "gradients": gradients_cell,
    "training step": training_step,
    "hooks": hooks,
    "deepcopy": deepcopy_cell,
    "pickle": pickle_cell,
    "compile": compile_cell,
    "export": export_cell,
    "autocast": autocast_cell,
    "restore": restore_cell,
}
PARALLEL = ("DDP", "FSDP2")
COLUMNS = (*CELLS, *PARALLEL)


def run_cell(library: str, name: str, what: str) -> None:
    """Raises where the cell is not what the page says of all."""
    torch.manual_seed(sum(map(ord, library + name + what)))
    model = build(library, name)
    with vit_fast.use_backend("torch"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        CELLS[what](model, inputs_of(model))


# ---- two processes


def parallel(library: str, name: str, how: str) -> None:
    """In one of two processes: a training step on half of the batch each is one process's on the whole."""
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    rank = torch.distributed.get_rank()
    torch.manual_seed(sum(map(ord, library + name)))
    model = build(library, name)
    inputs = inputs_of(model)
    half = {key: tensor[rank : rank + 1] for key, tensor in inputs.items()}
    # Of the two halves, each alone: a loss that compares the entries of a batch has no sum of them.
    expected = [gradients(copy.deepcopy(model), {k: t[i : i + 1] for k, t in inputs.items()}) for i in range(2)]
    model = accelerated(model)
    if how == "DDP":
        wrapped = DistributedDataParallel(model, find_unused_parameters=True)
        found = {key.removeprefix("module."): gradient for key, gradient in gradients(wrapped, half).items()}
    else:
        for block in [module for module in model.modules() if isinstance(module, FusedBlock)]:
            fully_shard(block)
        scalars = {name: parameter for name, parameter in model.named_parameters() if not parameter.dim()}
        wrapped = fully_shard(model, ignored_params=set(scalars.values()))  # a CLIP's logit_scale: not to be sharded
        assert any(isinstance(module, Fused) for module in wrapped.modules())
        found = gradients(wrapped, half)
        found = {key: gradient.full_tensor() for key, gradient in found.items() if key not in scalars}
        expected = [{key: gradient for key, gradient in one.items() if key not in scalars} for one in expected]
    mean = {key: (expected[0][key] + expected[1][key]) / 2 for key in expected[0]}
    assert_equal_gradients(found, mean)


def _process(rank: int, file: str, tasks: list[tuple[str, str, str]], results) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    with vit_fast.use_backend("torch"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for task in tasks:
            parallel(*task)
            if rank == 0:
                results.put(task)
    torch.distributed.barrier()  # who leaves first takes the connection from the other's threads
    torch.distributed.destroy_process_group()


def run_parallel(tasks: list[tuple[str, str, str]]) -> None:
    """Each (library, name, DDP or FSDP2) in the same two processes; the first that fails raises."""
    with tempfile.TemporaryDirectory() as folder:
        results = multiprocessing.get_context("spawn").SimpleQueue()
        arguments = (os.path.join(folder, "rendezvous"), tasks, results)
        try:
            multiprocessing.spawn(_process, arguments, nprocs=2)
        finally:
            done = []
            while not results.empty():
                done.append(results.get())
            if len(done) < len(tasks):
                print("failed at", tasks[len(done)], file=sys.stderr)


# ---- the page


def page() -> str:
    """The page, once every cell has run."""
    versions = ", ".join(
        f"{package} {importlib.metadata.version(package)}"
        for package in ("torch", "timm", "transformers", "torchvision", "open_clip_torch")
    )
    lines = [
        "# Accelerated models, and what was run with them",
        "",
        f"{len(NAMES)} models of six libraries at tiny sizes (two blocks, of a Swin two stages of two; 32 pixels),",
        "every parameter drawn anew, on a CPU in fp32 through the PyTorch backend: output within 1e-5 and gradients",
        "within 1e-4, in norm, of the model before `vit_fast.accelerate`. DDP and FSDP2 (each block sharded, then the",
        "model) ran on two CPU processes with gloo. What each column does is in `tests/matrix.py`;",
        "`python -m tests.matrix` runs every cell and then",
        "writes this page, where none fails. Run with:",
        "",
        versions,
    ]
    for library, models in MODELS.items():
        lines += ["", f"## {library}", "", f"| model | {' | '.join(COLUMNS)} |", "|" + "---|" * (1 + len(COLUMNS))]
        lines += [f"| {name} |{' yes |' * len(COLUMNS)}" for name in models]
    return "\n".join(lines) + "\n"


def main() -> None:
    torch.set_num_threads(1)
    for library, name in NAMES:
        for what in CELLS:
            run_cell(library, name, what)
        print(library, name, flush=True)
    run_parallel([(*one, how) for one in NAMES for how in PARALLEL])
    PAGE.write_text(page())


if __name__ == "__main__":
    main()
