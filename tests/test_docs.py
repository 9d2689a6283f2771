"""The references of both stages name what there is, and what they and the README name is there."""

import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import fields as fields_of
from functools import reduce
from pathlib import Path
from typing import Any, get_args

import click
import pytest
from pydantic import BaseModel
from tiny_cache import write_cache

import cli
from wavelatent.common.config import PRESETS, Config, load_config, parse_yaml, preset_names
from wavelatent.common.power_ema import PowerEMAConfig
from wavelatent.common.run_folder import MAY_CHANGE
from wavelatent.common.runtime import RuntimeOptions
from wavelatent.pipelines.ablate_config import AblationConfig
from wavelatent.pipelines.diffusion_config import DiffusionRunConfig
from wavelatent.pipelines.run_config import AutoencoderRunConfig
from wavelatent.pipelines.sample_images import SampleOptions
from wavelatent.pipelines.train_diffusion import train_diffusion
from wavelatent.stage1_autoencoder.adversarial import AdversarialConfig
from wavelatent.stage1_autoencoder.autoencoder import (
    DECODERS,
    ENCODERS,
    AutoencoderConfig,
    DecoderConfig,
    EncoderConfig,
)
from wavelatent.stage1_autoencoder.bottlenecks import BOTTLENECKS, BottleneckConfig
from wavelatent.stage1_autoencoder.discriminators import DISCRIMINATORS, DiscriminatorConfig
from wavelatent.stage1_autoencoder.gan_losses import GAN_LOSSES
from wavelatent.stage1_autoencoder.objective import ObjectiveConfig
from wavelatent.stage1_autoencoder.perturbations import PERTURBATIONS, PerturbationConfig
from wavelatent.stage1_autoencoder.phases import PhaseConfig
from wavelatent.stage1_autoencoder.pretrained import PretrainedConfig
from wavelatent.stage2_diffusion.generation import evaluations
from wavelatent.stage2_diffusion.model import WhiteningKind
from wavelatent.stage2_diffusion.networks import DENOISERS, DenoiserConfig
from wavelatent.stage2_diffusion.noise_tables import NOISE_TABLES
from wavelatent.stage2_diffusion.objectives import OBJECTIVES
from wavelatent.stage2_diffusion.objectives import ObjectiveConfig as DiffusionObjectiveConfig
from wavelatent.stage2_diffusion.samplers import SAMPLERS
from wavelatent.stage2_diffusion.sampling import GRIDS, Sampling
from wavelatent.stage2_diffusion.train_config import DiffusionTrainConfig
from wavelatent.stage2_diffusion.uncertainty import UncertaintyConfig
from wavelatent.stage2_diffusion.validation import SIGMA_BINS
from wavelatent.stage2_diffusion.weighting import WEIGHTINGS, WeightingConfig

ROOT = PRESETS.parent.parent
PAGES = {"README.md": ROOT / "README.md", **{f"docs/{p.name}": p for p in (ROOT / "docs").glob("*.md")}}
REFERENCES = {"tiny/": "docs/stage-one.md", "tiny2/": "docs/stage-two.md"}
"""The reference of each stage, by the folder of its presets."""


def sections(page: str) -> dict[str, str]:
    text = PAGES[page].read_text(encoding="utf-8")
    return {part.partition("\n")[0]: part for part in re.split(r"^## ", text, flags=re.MULTILINE)[1:]}


TEXT = PAGES["docs/stage-one.md"].read_text(encoding="utf-8")
SECTIONS = sections("docs/stage-one.md")
SOURCE = "\n".join(p.read_text(encoding="utf-8") for p in sorted((ROOT / "stage1_autoencoder").glob("*.py")))
PANEL = ("gan/", "latent/")
CONFIGS = {"train-ae": AutoencoderRunConfig, "train-diffusion": DiffusionRunConfig, "ablate": AblationConfig}
PRESET_NAME = r"ldm8|(?:tiny2?/|(?:ae|litevae|kl|pretrained|ablation|unet)-)[\w/-]+"


def keys(*titles: str) -> set[str]:
    """Every name in the first cells of the tables of these sections, where an option's row says its key."""
    rows = [line for title in titles for line in SECTIONS[title].splitlines() if line.startswith("| ")]
    return {name for row in rows for code in re.findall("`([^`]*)`", row.split("|")[1]) for name in _names(code)}


def _names(code: str) -> Iterator[str]:
    """``kind: kl`` as it stands, and every key of ``a: {b: 1, c: 2}`` with the last part of a dotted one."""
    yield code
    yield from (name.rpartition(".")[2] for name in re.findall(r"([\w.]+)(?=:|$)", code))


def everywhere(title: str) -> set[str]:
    """Every name in code anywhere in a section."""
    return {name for code in re.findall("`([^`\n]+)`", SECTIONS[title]) for name in re.findall(r"\w+", code)}


def fields(*models: type[BaseModel]) -> set[str]:
    return {name for model in models for name in model.model_fields} - {"kind"}


def members(union: object) -> tuple[type[Config], ...]:
    """The classes of an ``Annotated[A | B, ...]``."""
    return get_args(get_args(union)[0])


KINDS = [
    ("Encoders", "kind", set(ENCODERS) - {"pretrained"}),
    ("Pretrained autoencoders", "kind", {"pretrained"}),
    ("Decoders", "kind", set(DECODERS) - {"pretrained"}),
    ("Bottlenecks", "kind", set(BOTTLENECKS)),
    ("Perturbations", "kind", set(PERTURBATIONS)),
    ("Discriminators", "kind", set(DISCRIMINATORS)),
    ("Adversarial losses and regularisers", "loss", set(GAN_LOSSES)),
]


@pytest.mark.parametrize(("title", "word", "kinds"), KINDS, ids=[title for title, *_ in KINDS])
def test_every_kind_has_a_row_and_every_row_a_kind(title, word, kinds):
    assert {key.removeprefix(f"{word}: ") for key in keys(title) if key.startswith(f"{word}: ")} == kinds


SETTINGS = [
    ("Encoders", fields(*members(EncoderConfig)) - fields(PretrainedConfig)),
    ("Pretrained autoencoders", fields(PretrainedConfig)),
    ("Decoders", fields(*members(DecoderConfig)) - fields(PretrainedConfig)),
    ("Bottlenecks", fields(*members(BottleneckConfig))),
    ("Perturbations", fields(*members(PerturbationConfig))),
    ("Discriminators", fields(*members(DiscriminatorConfig))),
    ("Phases", fields(PhaseConfig)),
]


@pytest.mark.parametrize(("title", "names"), SETTINGS, ids=[title for title, _ in SETTINGS])
def test_every_setting_is_named_in_its_section(title, names):
    assert names - everywhere(title) == set()


def test_every_setting_of_the_adversarial_part_has_a_row():
    named = keys("Adversarial losses and regularisers", "Adversarial weight and schedule", "Stability")
    assert fields(AdversarialConfig) - {"discriminator"} - named == set()
    assert "`discriminator`" in SECTIONS["Adversarial losses and regularisers"]


def test_every_reconstruction_term_has_a_row_with_its_settings_and_its_name_in_the_log():
    terms = {name: field for name, field in ObjectiveConfig.model_fields.items() if name != "adversarial"}
    assert set(terms) - keys("Reconstruction losses") == set()
    for name, field in terms.items():
        row = next(line for line in SECTIONS["Reconstruction losses"].splitlines() if line.startswith(f"| `{name}:"))
        assert f"`loss/{name.removesuffix('_weight')}`" in row
        if isinstance(field.default, Config):
            assert [f for f in fields(type(field.default)) if f"{f}:" not in row] == []


def test_the_defaults_are_the_codes():
    """Where a row says ``name: value`` for a setting of one class only, it is that class's default."""
    by_section = {
        "Pretrained autoencoders": PretrainedConfig,
        "Adversarial weight and schedule": AdversarialConfig,
        "Reconstruction losses": ObjectiveConfig,
    }
    for title, model in by_section.items():
        for row in (line for line in SECTIONS[title].splitlines() if line.startswith("| `")):
            for name, value in parse_yaml("{" + re.findall("`([^`]*)`", row)[0] + "}", title).items():
                if name == "kind":
                    continue
                default = model.model_fields[name].default
                if default is None and isinstance(value, dict):  # off by default: those it has where it is turned on
                    default = next(c for c in get_args(model.model_fields[name].annotation) if c is not type(None))()
                plain = default.model_dump(mode="json") if isinstance(default, BaseModel) else default
                assert value == plain, f"{title}: {name}"


@pytest.mark.parametrize("folder", REFERENCES)
def test_every_tiny_preset_is_named(folder):
    text = PAGES[REFERENCES[folder]].read_text(encoding="utf-8")
    assert {name for name in preset_names() if name.startswith(folder)} - set(
        re.findall(rf"{folder}[\w-]+", text)
    ) == set()


@pytest.mark.parametrize("page", PAGES)
def test_presets_that_are_named_exist(page):
    text = PAGES[page].read_text(encoding="utf-8")
    named = re.findall(rf"`({PRESET_NAME})`", text) + re.findall(rf"^base: ({PRESET_NAME})", text, flags=re.MULTILINE)
    assert set(named) - set(preset_names()) == set()


def blocks(page: str, language: str) -> str:
    """Return the page's blocks of code in a language, joined."""
    text = PAGES[page].read_text(encoding="utf-8")
    return "\n".join(re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL))


def commands(page: str) -> Iterator[list[str]]:
    """Yield the arguments of every ``wavelatent`` in the page's blocks, also of those under torchrun."""
    for line in blocks(page, "bash").replace("\\\n", " ").splitlines():
        program, *words = shlex.split(line, comments=True) or [""]
        if program in ("wavelatent", "torchrun"):
            yield words if program == "wavelatent" else past_torchrun(words)


def past_torchrun(words: list[str]) -> list[str]:
    """Return the arguments that torchrun hands on to us; it keeps abbreviations of its own options, such as --run."""
    from torch.distributed.run import parse_args

    parsed = parse_args(words)
    assert parsed.training_script in ("cli.py", "wavelatent.cli")
    return list(parsed.training_script_args)


@pytest.mark.parametrize("page", PAGES)
def test_commands_resolve(page, tmp_path, monkeypatch):
    """Every command in a block of code has only arguments that it takes, and every CONFIG and override is valid."""
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(blocks(page, "yaml"), encoding="utf-8")
    found = list(commands(page))
    assert any(words[0] in CONFIGS for words in found)
    for words in found:
        take(cli.cli, words)
        if words[0] in CONFIGS:
            load_config(CONFIGS[words[0]], words[1], [word for word in words[2:] if re.match(r"[a-z_.]+=", word)])


@pytest.mark.parametrize("page", [name for name, path in PAGES.items() if "`torchrun" in path.read_text("utf-8")])
def test_torchrun_in_the_text_hands_on_every_option(page):
    sample = ["sample", "--run", "runs/unet", "--num", "4", "--out", "samples"]
    for code in re.findall(r"`torchrun (-[^`]*)`", PAGES[page].read_text(encoding="utf-8")):
        words = shlex.split(code)
        take(cli.cli, past_torchrun(words if "sample" in words else [*words, *sample]))


def take(command: click.Command, words: list[str]) -> None:
    """Parse a command line, which raises where it is wrong, without running it."""
    while isinstance(command, click.Group):
        command, words = command.commands[words[0]], words[1:]
    command.make_context(command.name, list(words))


@pytest.mark.parametrize("page", PAGES)
def test_relative_links_lead_somewhere(page):
    path = PAGES[page]
    links = re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8"))
    files = [link.partition("#")[0] for link in links if not re.match(r"https?://|#", link)]
    assert files
    assert [file for file in files if not (path.parent / file).exists()] == []


def test_every_figure_of_the_log_that_is_named_is_logged_and_the_other_way_round():
    named = set(re.findall(r"`-?((?:gan|latent|loss|gradient_norm)/\w+)`", TEXT))
    literal = set(re.findall(r'"((?:gan|latent)/\w+)"', SOURCE))
    assert {name for name in named if name.startswith(PANEL)} == literal
    parts = {name.partition("/")[2] for name in named if not name.startswith(PANEL)}
    assert {part for part in parts if f'"{part}"' not in SOURCE and f'"loss/{part}"' not in SOURCE} == set()
    assert {"total", "adversarial", "discriminator", "r1", "r2", "lecam", "kl", "latent_mean"} <= parts
    assert AutoencoderConfig().bottleneck.penalty_weights.keys() <= parts


# --- stage two: the first cell of a row is YAML, in one or more pieces of code

TWO = sections("docs/stage-two.md")
OF_STAGE_TWO: list[tuple[str, tuple[type[Config], ...], set[str]]] = [
    ("Networks", members(DenoiserConfig), set(DENOISERS)),
    ("Objectives", members(DiffusionObjectiveConfig), set(OBJECTIVES)),
    ("Weighting of noise levels", members(WeightingConfig), set(WEIGHTINGS)),
    ("Averages of the weights", (PowerEMAConfig,), set()),
    ("Training options", (DiffusionTrainConfig,), set()),
]


def first_cells(title: str) -> list[list[str]]:
    """The pieces of code in the first cell of every row of a section's tables."""
    rows = [line for line in TWO[title].splitlines() if line.startswith("| ")]
    return [codes for row in rows if (codes := re.findall("`([^`]*)`", row.split("|")[1]))]


def settings(title: str) -> list[dict[str, Any]]:
    return [parse_yaml("{" + ", ".join(codes) + "}", title) for codes in first_cells(title) if ":" in codes[0]]


@pytest.mark.parametrize(("title", "models", "kinds"), OF_STAGE_TWO, ids=[title for title, *_ in OF_STAGE_TWO])
def test_every_setting_of_stage_two_has_a_row_with_the_codes_default(title, models, kinds):
    rows = settings(title)
    assert {row["kind"] for row in rows if "kind" in row} == kinds
    sections_of_their_own = {"weighting", "ema"}
    assert fields(*models) - sections_of_their_own - {name for row in rows for name in row} == set()
    for row in rows:
        defaults = [model().model_dump(mode="json") for model in models]
        meant = [d for d in defaults if row.keys() <= d.keys() and row.get("kind") in (None, d.get("kind"))]
        assert meant, row
        for default in meant:
            assert row == {name: default[name] for name in row}


def test_the_rest_of_stage_two_is_named():
    assert settings("Whitening") == [{"whitening": kind} for kind in ("channel", "scalar", "none")]
    assert set(get_args(WhiteningKind)) == {"channel", "scalar", "none"}
    assert set(NOISE_TABLES) <= set(re.findall("`([^`\n]+)`", TWO["Objectives"]))
    assert fields(UncertaintyConfig) <= set(re.findall(r"\w+", TWO["Weighting of noise levels"]))
    plain = {"weighting", "whitening", "class_conditional", "objective", "model", "train"}
    assert plain - set(re.findall(r"\w+", "".join(TWO.values()))) == set()


def test_what_a_resumed_run_may_change_is_marked():
    marked = {
        name
        for title in ("Training options", "Averages of the weights")
        for line in TWO[title].splitlines()
        if line.startswith("| ") and "°" in line
        for name in re.findall(r"\w+", line)
    }
    ours = [path for path in MAY_CHANGE if exists(DiffusionRunConfig().model_dump(), path)]
    assert len(ours) > 10
    assert {path.rpartition(".")[2] for path in ours} - marked == set()


def exists(tree: dict[str, Any], path: str) -> bool:
    try:
        reduce(lambda node, name: node[name], path.split("."), tree)
    except KeyError:
        return False
    return True


def test_the_readme_names_every_kind_of_stage_two():
    rows = [line for line in PAGES["README.md"].read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    cells = {row.split("|")[1].strip(): set(re.findall("`([^`]*)`", row.split("|")[2])) for row in rows}
    assert cells["denoiser"] == set(DENOISERS)
    assert cells["objective"] == set(OBJECTIVES) | set(WEIGHTINGS) - {"network"}
    assert cells["samplers"] == set(SAMPLERS) | set(GRIDS)


def test_the_tables_of_samplers_and_grids():
    codes = [codes[0] for codes in first_cells("Samplers and grids") if not codes[0].startswith("--")]
    assert codes == [*sorted(SAMPLERS, key=codes.index), *sorted(GRIDS, key=codes.index)]
    evaluated = {"$N$": 7, "$2N - 1$": 13}
    for name in SAMPLERS:
        row = next(line for line in TWO["Samplers and grids"].splitlines() if line.startswith(f"| `{name}` "))
        assert evaluated[row.split("|")[3].strip()] == evaluations(Sampling(name, steps=7))


def test_every_option_of_sampling_is_named_with_its_default():
    given: dict[str, Any] = {}
    for title in ("Averages of the weights", "Samplers and grids", "Guidance", "Sampling"):
        for code in re.findall(r"`(--[a-z][^`\n]*)`", TWO[title]):
            option, _, value = code.removeprefix("--").partition(" ")
            given.setdefault(option.replace("-", "_"), value)
            if re.fullmatch(r"[\d.]+", value) and option != "eta":  # --eta's default is the sampler's
                default = {f.name: f.default for kind in (Sampling, SampleOptions) for f in fields_of(kind)}
                assert default.get(option.replace("-", "_"), float(value)) == float(value), code
    options = {f.name for kind in (Sampling, SampleOptions) for f in fields_of(kind)} - {"sampling"}
    assert options - {"mixed_precision", "tile"} - set(given) == set()  # those two are every command's
    assert set(given) - {param.name for param in cli.cli.commands["sample"].params} - {"flips", "dtype"} == set()


def test_the_example_of_stage_two_trains_and_every_figure_it_logs_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(blocks("docs/stage-two.md", "yaml"), encoding="utf-8")
    config = load_config(DiffusionRunConfig, "mine.yaml", ["train.uncertainty={channels: 4}", "train.sample_every=0"])
    run = tmp_path / "run"
    train_diffusion(config, latents=write_cache(tmp_path / "cache"), out=run, options=RuntimeOptions("cpu"))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    logged = {name for line in lines for name in line} - {"step", "images", "seconds"}
    named = {name for codes in first_cells("What every run logs") for name in codes}
    assert logged >= {f"validation/{name}" for name in ("loss", *(f"sigma_{name}" for name in SIGMA_BINS))}
    assert logged - named == set()
    not_drawn = {f"loss/denoising/sigma_{name}" for name in SIGMA_BINS}  # of so few samples
    assert named - logged - not_drawn == {"quick_fid", "quick_kid", "quick_seconds"}
    assert {path.name for path in run.iterdir()} >= {"model", "best", "ema"}
