"""The pages name what there is, and what they and the README name is there."""

import itertools
import json
import math
import re
import shlex
from collections.abc import Iterator
from dataclasses import fields as fields_of
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple, get_args

import click
import numpy as np
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
from wavelatent.pipelines.study_analysis import UNEVEN
from wavelatent.pipelines.study_config import ComparisonConfig, NamedConfig, StudyConfig
from wavelatent.pipelines.study_design import make_variants, pairs
from wavelatent.pipelines.study_statistics import AdditiveModel, detectable_effect, paired, uneven_spread
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
CONFIGS = {
    "train-ae": AutoencoderRunConfig,
    "train-diffusion": DiffusionRunConfig,
    "ablate": AblationConfig,
    "study": StudyConfig,
}
PRESET_NAME = r"ldm8|kl-f8|(?:tiny2?/|(?:ae|litevae|pretrained|ablation|unet|study)-)[\w/-]+"


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
            load_config(CONFIGS[words[0]], words[1], [word for word in words[2:] if re.match(r"[a-z_][\w.-]*=", word)])


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


# --- the study

STUDY = sections("docs/study.md")
STUDY_PRESETS = [n for n in preset_names() if n.startswith("study-") and n not in ("study-ae", "study-unet")]


def cells_of(title: str, heading: str = "") -> list[list[str]]:
    """The rows of a section's tables, or of the one whose heading begins so, split into cells; no headings."""
    rows: list[list[str]] = []
    for table in re.findall(r"(?:^\|.*\n)+", STUDY[title], flags=re.MULTILINE):
        head, _, *lines = table.splitlines()
        if head.startswith(f"| {heading}"):
            rows += [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return rows


def codes(cell: str) -> list[str]:
    return re.findall("`([^`]*)`", cell)


def test_the_variants_of_the_study_are_those_of_its_presets():
    design = load_config(StudyConfig, "study-claims").design
    assert isinstance(design, NamedConfig)
    rows = cells_of("Variants", "variant")
    named = {codes(row[0])[0]: parse_yaml("{" + ", ".join(codes(row[1])) + "}", row[0]) for row in rows}
    assert list(named) == list(design.variants)  # best first
    assert {name: {f: str(level) for f, level in levels.items()} for name, levels in named.items()} == design.variants


def variants_of(preset: str, *overrides: str) -> dict[str, dict[str, str]]:
    return {variant.name: variant.levels for variant in make_variants(load_config(StudyConfig, preset, overrides))}


def test_the_levels_of_which_most_studies_can_say_nothing_are_listed_with_who_has_them():
    rows = {codes(row[0])[0]: codes(row[1]) for row in cells_of("Variants", "level")}
    every = {
        f"{f}: {name}" for f, levels in load_config(StudyConfig, "study-claims").factors.items() for name in levels
    }
    named = variants_of("study-faces64")
    for preset in ("study-faces32", "study-faces64", "study-ffhq256"):
        assert variants_of(preset) == named
        assert every - {f"{f}: {name}" for levels in named.values() for f, name in levels.items()} == rows.keys()
    further = {name: levels for name, levels in variants_of("study-faces128").items() if name not in named}
    assert {name for names in rows.values() for name in names} == further.keys()
    for level, names in rows.items():
        factor, name = level.split(": ")
        having = {variant for variant, levels in further.items() if levels[factor] == name}
        assert set(names) <= having
        assert bool(names) == bool(having)


def interactions_of(variants: dict[str, dict[str, str]]) -> set[tuple[str, str]]:
    """The factors of which four variants are there: at both their first levels, at another of each, and of both."""
    base, *others = variants.values()
    return {
        (one, other)
        for levels in others
        for one, other in itertools.combinations([f for f in base if levels[f] != base[f]], 2)
        if all({**levels, **{f: base[f] for f in back}} in variants.values() for back in ([one], [other], [one, other]))
    }


def test_the_interactions_that_the_named_variants_have_and_what_one_more_adds():
    two = {("bottleneck", "channels"), ("bottleneck", "whitening")}
    for preset in ("study-faces64", "study-faces128"):
        assert interactions_of(variants_of(preset)) == two
    told = STUDY["Factors"].replace("\n", " ")
    assert all(f"`{one}` with `{other}`" in told for one, other in two)
    (further,) = re.findall(r"`'(design\.[^']*)'`", told)
    assert interactions_of(variants_of("study-faces64", further)) == two | {("channels", "perturbations")}
    (further,) = re.findall(r"`'(design\.[^']*)'`", STUDY["Variants"])
    assert len(variants_of("study-faces64", further)) == len(variants_of("study-faces64")) + 1
    factors = load_config(StudyConfig, "study-claims").factors
    assert f"{math.prod(map(len, factors.values())):,} variants" in told


def test_the_factors_and_claims_of_the_study_are_those_of_its_presets():
    config = load_config(StudyConfig, "study-claims")
    named = {codes(row[0])[0]: codes(row[1]) for row in cells_of("Factors")}
    assert named == {factor: list(levels) for factor, levels in config.factors.items()}
    assert [codes(row[0])[0] for row in cells_of("Claims")] == list(config.claims)
    margins = {c.margin for claim in config.claims.values() for c in claim.comparisons}
    assert margins == {0.0, 0.1}
    assert "10 % of KID" in STUDY["Claims"]


def test_every_setting_of_a_study_has_a_row_with_the_codes_default():
    default = StudyConfig(title="t", factors={"f": {"level": {}, "other": {}}}).model_dump(mode="json")
    named: dict[str, set[str]] = {}
    for row in cells_of("A study of your own", "key"):
        for code in codes(row[0]):
            if ":" not in code:
                named.setdefault(code, set())
                continue
            for key, value in parse_yaml("{" + code + "}", "docs").items():
                named.setdefault(key, set()).update(value if isinstance(value, dict) else ())
                if key != "design" or value["kind"] == default["design"]["kind"]:
                    given = value if isinstance(value, dict) else {key: value}
                    meant = default[key] if isinstance(value, dict) else default
                    assert given == {name: meant[name] for name in given}
    assert named.keys() == default.keys()
    for section in ("data", "evaluation", "rule"):
        assert named[section] == default[section].keys()
    (comparison,) = re.findall(r"`\{(factor, level[^`]*)\}`", STUDY["A study of your own"])
    assert set(re.findall(r"(\w+)(?=[,:]|$)", re.sub(r": (\{\}|\w+)", ":", comparison))) == fields(ComparisonConfig)


@pytest.mark.parametrize("contexts_and_seeds", [(1, 3), (2, 3), (1, 5)])
def test_the_power_of_the_study_is_what_its_arithmetic_gives(contexts_and_seeds):
    config = load_config(StudyConfig, "study-claims")
    comparisons = sum(len(claim.comparisons) for claim in config.claims.values())
    assert (len(config.seeds), comparisons, len(make_variants(config))) == (3, 12, 11)  # as the section says
    contexts, seeds = contexts_and_seeds
    column = {(1, 3): 1, (2, 3): 2, (1, 5): 3}[contexts_and_seeds]
    effect = detectable_effect(1.0, variants=11, seeds=seeds, comparisons=comparisons, contexts=contexts)
    for row in cells_of("Power"):
        scatter, told = (float(row[c].removesuffix(" %")) / 100 for c in (0, column))
        assert told == pytest.approx(1 - math.exp(-effect * scatter), abs=0.005)
    if contexts == 1:
        largest = {3: 2.8, 5: 3.9}[seeds]
        assert f"{largest} %" in STUDY["Power"]
        assert largest == pytest.approx(100 * math.log(1.1) / effect, abs=0.05)


class Rates(NamedTuple):
    """Per cent of studies in which any claim was called, and in which any deciding interval left out the truth."""

    called: float
    missed: float


def null_studies(uneven: str = "", times: float = 1, spread: str = "pooled", *, of_autoencoders: bool = False) -> Rates:
    """Simulated studies of the presets' design in which nothing differs; ``of_autoencoders``: all scatter is theirs."""
    config = load_config(StudyConfig, "study-claims")
    variants = make_variants(config)
    names = [variant.name for variant in variants]
    recipes = [variant.recipe.autoencoder.model_dump_json() for variant in variants]
    own = [v for v, recipe in enumerate(recipes) if recipes.index(recipe) == v]
    rng = np.random.default_rng(0)
    scatter = np.where(np.array(names) == uneven, times, 1.0)[:, None] * 0.05
    cells = {metric: scatter * rng.normal(size=(10_000, len(names), 3)) for metric in ("kid_mean", "rfid")}
    if of_autoencoders:
        cells["kid_mean"] = cells["kid_mean"][:, [recipes.index(recipe) for recipe in recipes]]
    cells["rfid"] = cells["rfid"][:, own]  # of reconstructions, those with one autoencoder count as one
    models = {metric: AdditiveModel(values) for metric, values in cells.items()}
    level = config.rule.level / sum(len(claim.comparisons) for claim in config.claims.values())
    called, missed = np.zeros(10_000, dtype=bool), np.zeros(10_000, dtype=bool)
    for claim in config.claims.values():
        supported = np.ones(10_000, dtype=bool)
        for c in claim.comparisons:
            weights = np.zeros(len(names))
            contexts = pairs(variants, c.factor, c.level, c.against, c.at, c.against_at)
            for one, other in contexts:
                weights[[names.index(one), names.index(other)]] += np.array([1, -1]) / len(contexts)
            weights = weights[own] if c.metric == "rfid" else weights
            effect = models[c.metric].contrast(weights) if spread == "pooled" else paired(cells[c.metric], weights)
            missed |= np.abs(effect.value) > effect.interval(level)[1] - effect.value
            low, high = (bound - math.log1p(c.margin) for bound in effect.interval(level))
            supported &= low > 0 if c.expect == "worse" else high < 0
            called |= high < 0 if c.expect == "worse" else low > 0  # refuted
        called |= supported
    return Rates(100 * float(np.mean(called)), 100 * float(np.mean(missed)))


def test_the_error_rates_of_the_study_are_those_of_simulated_ones():
    (told,) = re.findall(r"^- \*\*Seeds\.\*\*.*?(?=^- )", STUDY["Threats to validity"], flags=re.MULTILINE | re.DOTALL)
    alike, twice, thrice, reference_twice, reference_thrice, largest = map(float, re.findall(r"([\d.]+)\s%", told))
    assert null_studies().called == pytest.approx(alike, abs=0.5)  # three standard errors and more, as below
    assert null_studies("bounded-4", 2).called == pytest.approx(twice, abs=1)
    assert null_studies("bounded-4", 3).called == pytest.approx(thrice, abs=1.2)
    assert null_studies("kl-4", 2).called == pytest.approx(reference_twice, abs=0.6)
    assert null_studies("kl-4", 3).called == pytest.approx(reference_thrice, abs=0.8)
    for uneven in ("", "bounded-4", "kl-4"):
        assert null_studies(uneven, 3, "paired").called < largest
    (told,) = re.findall(r"^- \*\*Shared auto.*?(?=^- )", STUDY["Threats to validity"], flags=re.MULTILINE | re.DOTALL)
    called, missed = map(float, re.findall(r"([\d.]+)\s%", told)[:2])
    shared = null_studies(of_autoencoders=True)
    assert shared.called == pytest.approx(called, abs=0.6)
    assert shared.missed == pytest.approx(missed, abs=0.8)
    rng = np.random.default_rng(0)
    for times, share in ((3, 2 / 5), (2, 1 / 6)):
        residuals = rng.normal(size=(500, 11, 3)) * np.where(np.arange(11) == 1, times, 1)[:, None]
        noted = [uneven_spread(study)[1][1] * 11 < UNEVEN for study in residuals]
        assert np.mean(noted) == pytest.approx(share, abs=0.07)


def test_the_table_of_the_studies_is_what_their_presets_hold():
    rows = {codes(row[0])[0]: row for row in cells_of("Presets and what they cost", "preset")}
    assert set(rows) == set(STUDY_PRESETS) - {"study-claims"}
    above: dict[str, str] = {}
    for name, (_, images, latents, one, two, samples, cells, _) in rows.items():
        config = load_config(StudyConfig, name)
        size = config.data.size
        assert f"{size} px" in images
        assert latents == "x".join([str(size // config.autoencoder.model.encoder.downsampling)] * 2)
        assert int(samples.replace(",", "")) == config.evaluation.num_samples
        assert int(cells) == len(make_variants(config)) * len(config.seeds)
        for text, train in ((one, config.autoencoder.train), (two, config.diffusion.train)):
            above[train.__class__.__name__] = text = above.get(train.__class__.__name__, "") if "same" in text else text
            batch = "" if "steps" in text else f" x {train.batch_size}"
            assert f"{train.steps:,}{batch or ' steps'}" in text


def test_the_cost_of_the_largest_study_is_the_sum_of_its_parts():
    """From its operations, images and hours per part to the hours of a data set."""
    config = load_config(StudyConfig, "study-ffhq256")
    one, encode, two, samples = cells_of("Presets and what they cost", "|")
    assert float(one[2].split()[0]) * 1e6 == config.autoencoder.train.images_at(config.autoencoder.train.steps)
    assert float(two[2].split()[0]) * 1e6 == config.diffusion.train.images_at(config.diffusion.train.steps)
    for row, rate in ((one, 0.35 * 312), (two, 0.35 * 312), (samples, 0.5 * 19.5)):
        images = float(row[2].split()[0].replace(",", "")) * (1e6 if "M" in row[2] else 1)
        assert float(row[3]) == pytest.approx(float(row[1]) * images / rate / 3600, rel=0.03)
    autoencoder, diffusion = float(one[3]) + float(encode[3]), float(two[3]) + float(samples[3])
    assert f"24 autoencoders x {autoencoder:.1f} + 33 diffusion models x {diffusion:.1f} hours" in STUDY[
        "Presets and what they cost"
    ].replace("\n", " ")
    assert 24 * autoencoder + 33 * diffusion == pytest.approx(1400, rel=0.02)


def test_the_example_of_a_study_makes_its_variants(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(blocks("docs/study.md", "yaml"), encoding="utf-8")
    variants = make_variants(load_config(StudyConfig, "mine.yaml"))
    assert [variant.name for variant in variants] == ["0, 4", "0, 16", "0.1, 4", "0.3, 4", "0.3, 16"]
    assert {variant.recipe.autoencoder.model.bottleneck.kind for variant in variants} == {"bounded"}
