"""Overrides, unions told apart by ``kind``, and errors that name the key, the place and the nearest valid one."""

from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field

from wavelatent.common.config import Config, dump_yaml, find_config, load_config, preset_names
from wavelatent.common.errors import UsageError


class Kl(Config):
    kind: Literal["kl"] = "kl"
    weight: float = 1e-6


class Bounded(Config):
    kind: Literal["bounded"] = "bounded"
    bound: float = 3.0


class Model(Config):
    bottleneck: Annotated[Kl | Bounded, Field(discriminator="kind")] = Kl()
    channels: int = Field(4, ge=1)


class Run(Config):
    model: Model = Model()
    steps: int = 10
    lr: float = 1e-3


@pytest.fixture
def yaml_file(tmp_path: Path):
    def write(text: str) -> str:
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return str(path)

    return write


def test_overrides_and_scientific_notation(yaml_file):
    source = yaml_file("lr: 1e-4\nmodel: {bottleneck: {kind: kl, weight: 5e-7}}\n")
    config = load_config(Run, source, ["steps=7", "model.channels=16"])
    assert (config.lr, config.steps, config.model.channels) == (1e-4, 7, 16)
    assert config.model.bottleneck == Kl(weight=5e-7)


def test_dump_reads_back_equal(yaml_file):
    config = load_config(Run, yaml_file("model: {bottleneck: {kind: bounded, bound: 1.5}}"), ["lr=3e-5"])
    assert load_config(Run, yaml_file(dump_yaml(config))) == config


def test_changing_the_kind_drops_the_former_kinds_settings(yaml_file):
    source = yaml_file("model: {bottleneck: {kind: kl, weight: 1e-3}}")
    config = load_config(Run, source, ["model.bottleneck.kind=bounded", "model.bottleneck.bound=2"])
    assert config.model.bottleneck == Bounded(bound=2)


@pytest.mark.parametrize(
    ("text", "overrides", "fragments"),
    [
        ("stpes: 3", [], ["run.yaml", "'stpes'", "did you mean 'steps'"]),
        ("model: {chanels: 3}", [], ["run.yaml", "'model.chanels'", "did you mean 'channels'"]),
        ("{}", ["model.bottleneck.bond=3", "model.bottleneck.kind=bounded"], ["'model.bottleneck.bond'", "'bound'"]),
        ("model: {bottleneck: {kind: bouned}}", [], ["model.bottleneck.kind", "did you mean 'bounded'"]),
        ("{}", ["steps=many"], ["override 'steps=many'", "steps", "integer"]),
        ("model: {bottleneck: {kind: bounded, bound: wide}}", [], ["run.yaml: model.bottleneck.bound:", "number"]),
        ("{}", ["model.channels=0"], ["model.channels", "greater than or equal to 1"]),
        ("steps: 1\nsteps: 2", [], ["run.yaml", "given twice"]),
        ("{}", ["steps"], ["key=value"]),
        ("{}", ["lr.x=1", "lr=2", "lr.y=1"], ["is a value, not a section"]),
        ("- 1", [], ["expected keys"]),
    ],
)
def test_errors_name_the_key_the_place_and_the_nearest_valid_one(yaml_file, text, overrides, fragments):
    with pytest.raises(UsageError) as caught:
        load_config(Run, yaml_file(text), overrides)
    message = str(caught.value)
    assert caught.value.exit_code == 2
    assert "\n" not in message
    for fragment in fragments:
        assert fragment in message


def test_an_unknown_preset_names_the_nearest(tmp_path):
    name = preset_names()[0]
    assert find_config(name).is_file()
    with pytest.raises(UsageError, match=f"did you mean '{name}'"):
        find_config(name + "x")
    with pytest.raises(UsageError, match="no such file"):
        find_config(str(tmp_path / "absent.yaml"))
