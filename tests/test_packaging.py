"""What an install brings: every module and preset, nothing else, and a command that runs from anywhere."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("common", "pipelines", "stage1_autoencoder", "stage2_diffusion")
DATA = {".yaml", ".html", ".css", ".js", ".j2"}


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """The command's standard output; PYTHONPATH of this process is not passed on."""
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | environment
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=variables, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def shipped_files() -> set[str]:
    """What a wheel should hold, by what is in the checkout."""
    paths = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in {".py", *DATA}]
    return {"wavelatent/cli.py", *(f"wavelatent/{path.relative_to(ROOT).as_posix()}" for path in paths)}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the tree, where no left-over ``build/`` can slip deleted modules into it."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("cli.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-q"]
    run(*pip, "-w", out, source, cwd=out)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the unpacked wheel and nothing else."""
    target = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    return target


def test_the_listed_packages_are_the_folders_of_the_tree() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (listed,) = re.findall(r"^packages = \[(.*)\]$", text, re.MULTILINE)
    mapped = dict(re.findall(r'^"(wavelatent[\w.]*)" = "([\w.]+)"$', text, re.MULTILINE))
    packages = {"wavelatent": ".", **{f"wavelatent.{folder}": folder for folder in FOLDERS}}
    assert set(re.findall(r'"([\w.]+)"', listed)) == set(packages)
    assert mapped == packages
    assert {path.parent.relative_to(ROOT).as_posix() for path in ROOT.glob("*/__init__.py")} == set(FOLDERS)
    assert not [path for folder in FOLDERS for path in (ROOT / folder).glob("*/**/*.py")], "a package inside a package"


def test_no_module_can_be_shadowed_or_shadow_another() -> None:
    assert [path.name for path in ROOT.glob("*.py")] == ["cli.py"]
    assert not (ROOT / "tests" / "__init__.py").exists()  # torch-fidelity installs a package named tests


def test_the_wheel_holds_every_module_and_data_file_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == shipped_files()
    assert any(name.startswith("wavelatent/pipelines/presets/") for name in names)


def test_every_data_file_of_the_tree_is_of_a_kind_that_is_shipped() -> None:
    others = [
        path.name
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix not in {".py", ".pyc", *DATA}
    ]
    assert others == []


def test_the_installed_package_imports_and_finds_its_presets(installed: Path, tmp_path: Path) -> None:
    code = (
        "import wavelatent.common.config as c; print(c.__file__); print(*sorted(p.name for p in c.PRESETS.iterdir()))"
    )
    file, presets = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(installed)).splitlines()
    assert Path(file).is_relative_to(installed)
    assert presets.split() == sorted(path.name for path in (ROOT / "pipelines" / "presets").iterdir())


def test_the_command_line_runs_from_anywhere(installed: Path, tmp_path: Path) -> None:
    from_checkout = run(sys.executable, ROOT / "cli.py", "--help", cwd=tmp_path)
    code = "import sys; from wavelatent.cli import main; sys.argv = ['cli.py', '--help']; main()"
    from_wheel = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(installed))
    assert "train-ae" in from_checkout
    assert from_wheel == from_checkout
