"""What a user installs: a wheel and an sdist, built here, each put into a clean environment and used from elsewhere."""

import importlib.metadata
import pathlib
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile

import pytest

import vit_fast

ROOT = pathlib.Path(__file__).parent.parent
SITE = sysconfig.get_paths()["purelib"]

# What a person who has just installed the package tries first.
USE = """
import importlib.metadata, importlib.resources, pathlib, sys
import torch
import vit_fast, vit_fast.kernels, vit_fast.reference

home = pathlib.Path(sys.prefix).resolve()
for module in (vit_fast, vit_fast.kernels):
    assert home in pathlib.Path(module.__file__).resolve().parents, module.__file__
assert pathlib.Path(vit_fast.kernels.__file__).parent == pathlib.Path(vit_fast.__file__).parent / "kernels"
assert vit_fast.__version__ == importlib.metadata.version("vit-fast")
files = importlib.resources.files("vit_fast")
for name in ("py.typed", "zoo.json", "kernels/tiles/interpreter.json", "kernels/tiles/sm_90.json"):
    assert files.joinpath(*name.split("/")).is_file(), name
from vit_fast.kernels import tile_table
assert tile_table.table(tile_table.architecture(torch.device("cpu")))
model = vit_fast.create_model("vit_tiny_patch16_224", num_classes=3, depth=1, img_size=32)
assert model(torch.rand(2, 3, 32, 32)).shape == (2, 3)
print("used", vit_fast.__version__)
"""


def run(*command, **options) -> str:
    """Its output; where it fails, an error that shows all of it."""
    done = subprocess.run(
        [str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
    )
    assert done.returncode == 0, f"{command} ended with {done.returncode}:\n{done.stdout}"
    return done.stdout


def run_python(code: str, **options) -> str:
    return run(sys.executable, "-c", code, **options)


@pytest.fixture(scope="module")
def archives(tmp_path_factory) -> dict[str, pathlib.Path]:
    """The sdist of this tree, and the wheel that the sdist builds: what the tree has and the sdist lacks is missed."""
    pytest.importorskip("build", reason="needs the package build, of the extra dev")
    folder = tmp_path_factory.mktemp("built")
    # From a copy: setuptools leaves build/ and *.egg-info in the source, and takes over what an older build left there.
    made = shutil.ignore_patterns(".*", "build", "dist", "demo-output", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, folder / "source", ignore=made)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", folder / "source")
    (wheel,), (sdist,) = (list((folder / "dist").glob(pattern)) for pattern in ("*.whl", "*.tar.gz"))
    return {"wheel": wheel, "sdist": sdist}


@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_installs_clean_and_runs_from_another_directory(kind, archives, tmp_path):
    """An environment without vit_fast, which finds this one's torch but none of its editable installs."""
    environment, elsewhere = tmp_path / "environment", tmp_path / "elsewhere"
    elsewhere.mkdir()
    run(sys.executable, "-m", "venv", "--without-pip", environment)
    python = environment / "bin" / "python"
    site = pathlib.Path(run(python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])").strip())
    (site / "dependencies.pth").write_text(SITE + "\n")  # a .pth named here is not read there: no editable install
    missing = "import importlib.util as u; assert u.find_spec('torch') and not u.find_spec('vit_fast')"
    run(python, "-c", missing, cwd=elsewhere)
    pip = (sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check")
    run(*pip, "install", "--no-deps", "--no-index", "--no-build-isolation", archives[kind], cwd=elsewhere)
    assert not (site / "kernels").exists(), "a top-level package kernels would overwrite Hugging Face's"
    assert "used" in run(python, "-c", USE, cwd=elsewhere)
    assert "vit_tiny_patch16_224" in run(environment / "bin" / "vit-fast", "models", "vit_tiny*", cwd=elsewhere)


def test_what_the_archives_hold(archives):
    names = zipfile.ZipFile(archives["wheel"]).namelist()
    top = {name.split("/")[0] for name in names}
    assert top == {"vit_fast", f"vit_fast-{vit_fast.__version__}.dist-info"}, "nothing else at the top level"
    licence = [name for name in names if name.endswith("LICENSE")]
    assert licence, "the licence travels with the wheel"
    with tarfile.open(archives["sdist"]) as sdist:
        held = {name.partition("/")[2] for name in sdist.getnames()}
    needed = {"Makefile", "constraints.txt", "CHANGELOG.md", "tests/conftest.py", "benchmarks/cpu.py"}
    assert needed <= held, "the sdist can run its own tests"


def test_metadata(archives, tmp_path):
    with zipfile.ZipFile(archives["wheel"]) as wheel:
        wheel.extractall(tmp_path)
    (distribution,) = importlib.metadata.distributions(path=[str(tmp_path)])
    core = {line.replace('"', "'") for line in distribution.requires if "extra ==" not in line}
    assert "triton>=3.6; sys_platform == 'linux'" in core, "the lowest that was run: torch brings its own version"
    names = {line.split(";")[0].strip(" ").split(">")[0] for line in core}
    assert names == {"torch", "triton", "safetensors", "numpy"}
    assert set(distribution.metadata.get_all("Provides-Extra")) == {"cli", "hub", "export", "bench", "dev", "all"}
    assert distribution.metadata["License-Expression"] == "Apache-2.0"
    assert distribution.metadata["Requires-Python"] == ">=3.10"
    assert [(entry.name, entry.value) for entry in distribution.entry_points] == [("vit-fast", "vit_fast.cli:main")]


def test_import_is_light():
    """Neither the kernels' compiler nor the command line's packages load before they are wanted."""
    heavy = "triton", "PIL", "timm", "torchvision", "matplotlib", "rich", "typer", "sklearn", "kornia", "torch._dynamo"
    code = f"""
import sys, torch
before = set(sys.modules)
import vit_fast
model = vit_fast.create_model("vit_tiny_patch16_224", depth=1, img_size=32)
loaded = [name for name in {heavy} if name in set(sys.modules) - before]
assert not loaded, loaded
model(torch.rand(1, 3, 32, 32)).sum().backward()
assert "triton" not in sys.modules or "triton" in before
"""
    run_python(code, cwd=ROOT)


def test_a_gpus_day_needs_torch_and_triton_alone():
    """`make gpu` takes the Python that is there: no package of ours or of the tests' need be."""
    code = """
import sys
for name in ("safetensors", "numpy", "timm", "transformers", "torchvision", "pytest", "rich", "PIL", "matplotlib"):
    sys.modules[name] = None
import torch, vit_fast
from benchmarks import accelerated, gpu, sweep
model = vit_fast.create_model("vit_tiny_patch16_224", depth=1, img_size=32)
model(torch.rand(1, 3, 32, 32)).sum().backward()
vit_fast.accelerate(torch.nn.TransformerEncoderLayer(16, 1, 16, 0.0, "gelu", norm_first=True, batch_first=True))
"""
    run_python(code, cwd=ROOT)


def test_without_triton_everything_runs_in_pytorch():
    """triton has no wheels for Windows and macOS."""
    code = """
import sys
sys.modules["triton"] = None  # as where it is not installed: neither found nor imported
import torch, vit_fast
torch.manual_seed(0)
model = vit_fast.create_model("vit_tiny_patch16_224", num_classes=3, depth=1, img_size=32).eval()
images = torch.rand(2, 3, 32, 32)
logits = model(images)
logits.sum().backward()
assert all(parameter.grad is not None for parameter in model.parameters())
with torch.no_grad():
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(images)
torch.testing.assert_close(compiled, logits)
try:
    with vit_fast.use_backend("triton"):
        model(images)
except RuntimeError as error:
    assert "triton is not installed" in str(error), error
else:
    raise AssertionError("use_backend('triton') ran without triton")
"""
    run_python(code, cwd=ROOT)
