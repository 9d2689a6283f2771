"""The import arrows of the package: cli -> pipelines -> the two stages -> common, and no other way."""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAY_IMPORT = {
    "common": {"common"},
    "stage1_autoencoder": {"stage1_autoencoder", "common"},
    "stage2_diffusion": {"stage2_diffusion", "common"},
    "pipelines": {"pipelines", "stage1_autoencoder", "stage2_diffusion", "common"},
    "cli": {"pipelines", "common"},
}
OURS = {*MAY_IMPORT, "wavelatent"}
SLOW_OR_FRAGILE = {
    "torchvision",
    "lpips",
    "torch_fidelity",
    "datasets",
    "matplotlib",
    "tensorboard",
    "diffusers",
    "wandb",
}
DISTRIBUTIONS = {"PIL": "pillow", "yaml": "pyyaml", "pywt": "pywavelets", "skimage": "scikit-image"}


class Import(NamedTuple):
    """One imported module: dots before the name, the name, whether it is imported when the module is."""

    level: int
    module: str
    line: int
    eager: bool


def imports_of(source: str) -> Iterator[Import]:
    """Every import of a module, wherever it stands in it."""

    def walk(node: ast.AST, eager: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(0, alias.name, node.lineno, eager)
        elif isinstance(node, ast.ImportFrom):
            names = [node.module] if node.module else [alias.name for alias in node.names]
            for name in names:
                yield Import(node.level, name, node.lineno, eager)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            eager = False
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            for child in node.body:
                yield from walk(child, False)
            for child in node.orelse:
                yield from walk(child, eager)
            return
        for child in ast.iter_child_nodes(node):
            yield from walk(child, eager)

    yield from walk(ast.parse(source), True)


def violations(package: str, source: str) -> list[str]:
    """What is wrong with the imports of a module in the folder ``package`` (or of ``cli``)."""
    found = []
    for item in imports_of(source):
        where = f"line {item.line}: {'.' * item.level}{item.module}"
        top, *rest = item.module.split(".")
        if package == "cli" and top == "wavelatent" and not item.level:
            target = rest[0] if rest else "wavelatent"
        elif item.level == 0:
            if top in OURS:
                found.append(f"{where} is not relative")
            if item.eager and (top in SLOW_OR_FRAGILE or item.module == "torch.utils.tensorboard"):
                found.append(f"{where} is imported at module level")
            continue
        else:
            target = package if item.level == 1 and package != "cli" else top
        if target not in MAY_IMPORT[package]:
            found.append(f"{where}: {package} may not import {target}")
    return found


def modules() -> list[tuple[str, Path]]:
    inside = [(folder, path) for folder in MAY_IMPORT if folder != "cli" for path in (ROOT / folder).rglob("*.py")]
    return [*inside, ("cli", ROOT / "cli.py")]


@pytest.mark.parametrize(("package", "path"), modules(), ids=lambda x: str(x).removeprefix(f"{ROOT}/"))
def test_arrows(package: str, path: Path) -> None:
    assert violations(package, path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("package", "source", "complaint"),
    [
        ("common", "from ..pipelines.encode import encode", "may not import pipelines"),
        ("common", "def f():\n    from ..stage2_diffusion import unet", "may not import stage2_diffusion"),
        ("common", "from .. import stage1_autoencoder", "may not import stage1_autoencoder"),
        ("stage1_autoencoder", "from ..stage2_diffusion.unet import UNet", "may not import stage2_diffusion"),
        ("stage2_diffusion", "if TYPE_CHECKING:\n    from ..stage1_autoencoder import x", "may not import stage1"),
        ("pipelines", "from ..cli import main", "may not import cli"),
        ("pipelines", "from wavelatent.common import latents", "not relative"),
        ("common", "import pipelines", "not relative"),
        ("common", "try:\n    import torchvision.ops\nexcept OSError: pass", "module level"),
        ("common", "class A:\n    from torch.utils.tensorboard import SummaryWriter", "module level"),
        ("cli", "from wavelatent.stage1_autoencoder import litevae", "may not import stage1"),
    ],
)
def test_a_planted_wrong_arrow_is_caught(package: str, source: str, complaint: str) -> None:
    (found,) = violations(package, source)
    assert complaint in found


@pytest.mark.parametrize(
    ("package", "source"),
    [
        ("pipelines", "from ..stage1_autoencoder.litevae import LiteVAE\nfrom .loading import load_autoencoder"),
        ("stage1_autoencoder", "from ..common import latents\nfrom . import wavelets"),
        ("common", "def f():\n    import torchvision"),
        ("common", "if TYPE_CHECKING:\n    import datasets"),
        ("cli", "from wavelatent.pipelines.encode import encode"),
    ],
)
def test_right_arrows_pass(package: str, source: str) -> None:
    assert violations(package, source) == []


def declared(section: str) -> set[str]:
    """Distribution names in the one list of pyproject.toml that begins with ``section``."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")  # tomllib came with Python 3.11
    (block,) = re.findall(rf"^{section} = \[(.*?)\]$", text, re.MULTILINE | re.DOTALL)
    return {name.lower().replace("_", "-") for name in re.findall(r'"([A-Za-z0-9_.-]+)', block)}


def test_declared_dependencies_are_those_imported() -> None:
    imported = {"torchvision"}  # by name, in common/torchvision_import.py
    for _, path in modules():
        for item in imports_of(path.read_text(encoding="utf-8")):
            top = "tensorboard" if item.module == "torch.utils.tensorboard" else item.module.split(".")[0]
            if item.level == 0 and top not in sys.stdlib_module_names and top not in OURS:
                imported.add(DISTRIBUTIONS.get(top, top.replace("_", "-")))
    extras = declared("diffusers") | declared("dinov2") | declared("wandb")
    assert imported - extras == declared("dependencies")
