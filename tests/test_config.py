"""Overrides, unions told apart by ``kind``, and errors that name the key, the place and the nearest valid one."""

from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field

from wavelatent.common.config import Config, dump_yaml, find_config, load_config, parse_yaml, preset_names, read_config
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


def test_merge_keys_are_merged() -> None:
    assert parse_yaml("a: &a {b: 1, c: 2}\nd: {<<: *a, c: 3}", "x") == {"a": {"b": 1, "c": 2}, "d": {"b": 1, "c": 3}}


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
        (
            "{}",
            ["model.bottleneck={bound: 3}"],
            ["model.bottleneck: needs a kind: give model.bottleneck.kind", "bounded"],
        ),
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


def test_a_preset_in_a_sub_folder_goes_by_its_path(tmp_path, monkeypatch):
    (tmp_path / "tiny").mkdir()
    for name in ("whole", "tiny/small"):
        (tmp_path / f"{name}.yaml").write_text("steps: 3\n")
    monkeypatch.setattr("wavelatent.common.config.PRESETS", tmp_path)
    assert preset_names() == ["tiny/small", "whole"]
    assert find_config("tiny/small") == tmp_path / "tiny" / "small.yaml"
    with pytest.raises(UsageError, match="did you mean 'tiny/small'"):
        find_config("tiny/smal")
    with pytest.raises(UsageError, match="nor a preset"):
        find_config(f"../{tmp_path.name}/whole")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch):
    """Write several config files; ``presets/`` beside them is where presets are looked for."""

    def write(**files: str) -> Path:
        for name, text in files.items():
            path = tmp_path / (name.replace("__", "/") + ".yaml")
            path.parent.mkdir(exist_ok=True, parents=True)
            path.write_text(text)
        return tmp_path

    (tmp_path / "presets").mkdir()
    monkeypatch.setattr("wavelatent.common.config.PRESETS", tmp_path / "presets")
    return write


def test_a_file_holds_only_what_differs_from_its_base(folder):
    top = folder(
        presets__plain="{steps: 3, lr: 1e-2, model: {channels: 8, bottleneck: {kind: kl, weight: 0.5}}, extra: [1, 2]}",
        inner__middle="{base: plain, steps: 4, extra: [3]}",
        top="{base: inner/middle.yaml, model: {bottleneck: {weight: 2.0}}}",
        other="{base: inner/middle.yaml, model: {bottleneck: {kind: bounded}}}",
        cleared="{base: plain, model: null}",
    )
    model = {"channels": 8, "bottleneck": {"kind": "kl", "weight": 2.0}}
    assert read_config(str(top / "top.yaml")) == {"steps": 4, "lr": 1e-2, "model": model, "extra": [3]}
    assert read_config(str(top / "other.yaml"))["model"] == {"channels": 8, "bottleneck": {"kind": "bounded"}}
    assert read_config(str(top / "cleared.yaml"))["model"] is None
    assert read_config("plain")["extra"] == [1, 2]


def test_a_section_may_have_a_base_of_its_own(folder):
    top = folder(
        presets__model="{channels: 8, bottleneck: {kind: bounded, bound: 2}}",
        presets__plain="{steps: 3, model: {channels: 5}}",
        top="{base: plain, model: {base: model, bottleneck: {bound: 4}}}",
        wrong="model: {base: model, bottleneck: {bond: 1}}",
    )
    config = load_config(Run, str(top / "top.yaml"))
    assert config == Run(steps=3, model=Model(channels=8, bottleneck=Bounded(bound=4)))
    with pytest.raises(UsageError, match=r"wrong\.yaml: unknown key 'model\.bottleneck\.bond'"):
        load_config(Run, str(top / "wrong.yaml"))


def test_a_resolved_config_has_no_base(folder):
    top = folder(presets__plain="model: {bottleneck: {kind: bounded, bound: 2}}", top="{base: plain, steps: 5}")
    config = load_config(Run, str(top / "top.yaml"), ["lr=2e-3"])
    assert config == Run(model=Model(bottleneck=Bounded(bound=2)), steps=5, lr=2e-3)
    assert "base" not in dump_yaml(config)


@pytest.mark.parametrize(
    ("files", "fragments"),
    [
        ({"top": "base: plane", "presets__plain": "{}"}, ["top.yaml: base: plane", "did you mean 'plain'"]),
        ({"top": "base: absent.yaml"}, ["top.yaml: base:", "absent.yaml: there is no such file"]),
        ({"top": "base: 3"}, ["top.yaml: base:", "got 3"]),
        ({"top": "base: top.yaml"}, ["top.yaml: base: top.yaml is this file"]),
        ({"top": "base: a.yaml", "a": "base: b.yaml", "b": "base: a.yaml"}, ["b.yaml: base: a.yaml is this file"]),
        ({"top": "base: a.yaml", "a": "- 1"}, ["a.yaml: expected keys"]),
        ({"top": "{base: a.yaml, lr: 1}", "a": "model: {chanels: 1}"}, ["a.yaml: unknown key 'model.chanels'"]),
        ({"top": "{base: a.yaml, stps: 1}", "a": "lr: 1"}, ["top.yaml: unknown key 'stps'"]),
    ],
)
def test_an_error_names_the_file_of_the_chain_that_it_is_in(folder, files, fragments):
    with pytest.raises(UsageError) as caught:
        load_config(Run, str(folder(**files) / "top.yaml"))
    message = str(caught.value)
    assert message.count("\n") == 0
    for fragment in fragments:
        assert fragment in message


def test_an_error_in_a_section_given_by_an_override_names_the_override(yaml_file):
    with pytest.raises(UsageError, match=r"override 'model=.*': unknown key 'model\.chanels'"):
        load_config(Run, yaml_file("model: {channels: 3}"), ["model={channels: 3, chanels: 4}"])
