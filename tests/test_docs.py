"""The reference of stage one names what there is, and what it and the README name is there."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
from pydantic import BaseModel

from wavelatent.common.config import PRESETS, Config, load_config, parse_yaml, preset_names
from wavelatent.pipelines.ablate_config import AblationConfig
from wavelatent.pipelines.diffusion_config import DiffusionRunConfig
from wavelatent.pipelines.run_config import AutoencoderRunConfig
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

ROOT = PRESETS.parent.parent
PAGES = {"README.md": ROOT / "README.md", **{f"docs/{p.name}": p for p in (ROOT / "docs").glob("*.md")}}
TEXT = (ROOT / "docs" / "stage-one.md").read_text(encoding="utf-8")
SECTIONS = {part.partition("\n")[0]: part for part in re.split(r"^## ", TEXT, flags=re.MULTILINE)[1:]}
SOURCE = "\n".join(p.read_text(encoding="utf-8") for p in sorted((ROOT / "stage1_autoencoder").glob("*.py")))
PANEL = ("gan/", "latent/")
CONFIGS = {"train-ae": AutoencoderRunConfig, "train-diffusion": DiffusionRunConfig, "ablate": AblationConfig}
PRESET_NAME = r"(?:tiny/|(?:ae|litevae|kl|pretrained|ablation|unet)-)[\w/-]+"


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


def test_every_tiny_preset_is_named():
    assert {name for name in preset_names() if name.startswith("tiny/")} - set(
        re.findall(r"tiny/[\w-]+", TEXT)
    ) == set()


@pytest.mark.parametrize("page", PAGES)
def test_presets_that_are_named_exist(page):
    text = PAGES[page].read_text(encoding="utf-8")
    named = re.findall(rf"`({PRESET_NAME})`", text) + re.findall(rf"^base: ({PRESET_NAME})", text, flags=re.MULTILINE)
    assert set(named) - set(preset_names()) == set()


@pytest.mark.parametrize("page", PAGES)
def test_commands_resolve(page, tmp_path, monkeypatch):
    """Every CONFIG of a training command in a block of code, with its overrides, is one that the command takes."""
    monkeypatch.chdir(tmp_path)
    text = PAGES[page].read_text(encoding="utf-8")
    Path("mine.yaml").write_text("\n".join(re.findall(r"```yaml\n(.*?)```", text, flags=re.DOTALL)), encoding="utf-8")
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)).replace("\\\n", " ")
    commands = [
        words for line in blocks.splitlines() if (words := shlex.split(line, comments=True))[:1] == ["wavelatent"]
    ]
    configs = [words for words in commands if words[1] in CONFIGS]
    assert configs
    for _, command, source, *rest in configs:
        load_config(CONFIGS[command], source, [word for word in rest if re.match(r"[a-z_.]+=", word)])


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
