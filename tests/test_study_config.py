"""The configuration of a study: names as people write them, and errors that name the key."""

from typing import Any

import pytest
import yaml

from wavelatent.common.config import dump_yaml, load_config
from wavelatent.common.errors import UsageError
from wavelatent.pipelines.study_config import StudyConfig

SMALL: dict[str, Any] = {
    "title": "Small",
    "factors": {
        "bottleneck": {"kl": {}, "bounded": {"autoencoder.model.bottleneck": {"kind": "bounded"}}},
        "channels": {4: {}, 16: {"autoencoder.model.channels": 16}},
    },
    "claims": {
        "wide": {"statement": "Wider is better.", "comparisons": [{"factor": "channels", "level": 16, "against": 4}]}
    },
}


@pytest.fixture
def study(tmp_path):
    """Load a configuration from YAML: the text, or SMALL with these sections over its own."""

    def load(text: str = "", *overrides: str, **sections: Any) -> StudyConfig:
        path = tmp_path / "study.yaml"
        path.write_text(text or yaml.safe_dump({**SMALL, **sections}, sort_keys=False), encoding="utf-8")
        return load_config(StudyConfig, str(path), overrides)

    return load


def claim(**comparison: Any) -> dict[str, Any]:
    """A claim of one comparison, of the channels unless told otherwise."""
    return {"c": {"statement": "s", "comparisons": [{"factor": "channels", "level": 16, "against": 4, **comparison}]}}


def test_names_that_yaml_takes_for_numbers_are_names(study):
    config = study(
        """
        title: Numbers
        factors: {channels: {4: {}, 16: {autoencoder.model.channels: 16}}, 1: {0.5: {}, 1e-3: {diffusion.seed2: 1}}}
        design: {kind: named, variants: {1: {}, 2: {channels: 16, 1: 0.001}}}
        claims: {7: {statement: s, comparisons: [{factor: channels, level: 16, against: 4, at: {1: 1e-3}}]}}
        """
    )
    assert list(config.factors) == ["channels", "1"]
    assert list(config.factors["channels"]) == ["4", "16"]
    assert list(config.factors["1"]) == ["0.5", "0.001"]
    assert config.design.variants == {"1": {}, "2": {"channels": "16", "1": "0.001"}}
    (comparison,) = config.claims["7"].comparisons
    assert (comparison.level, comparison.against, comparison.at) == ("16", "4", {"1": "0.001"})


def test_what_is_written_out_reads_back_equal(study):
    config = study(design={"kind": "factorial", "exclude": [{"channels": 16, "bottleneck": "kl"}]})
    assert study(dump_yaml(config)) == config


@pytest.mark.parametrize(
    ("sections", "key"),
    [
        ("factors: {smc: {off: {}, on: {}}}", "factors.smc"),
        ("factors: {smc: {a: {}}, no: {a: {}}}", "factors"),
        ("factors: {smc: {null: {}}}", "factors.smc"),
        ("factors: {a: {x: {}}}\ndesign: {kind: named, variants: {v: {a: yes}, w: {}}}", "design.variants.v"),
        (
            "factors: {a: {x: {}}}\nclaims: {c: {statement: s, comparisons: [{factor: a, level: on, against: x}]}}",
            "claims.c.comparisons.0.level",
        ),
    ],
)
def test_words_that_yaml_takes_for_truth_values_are_to_be_quoted(study, sections, key):
    with pytest.raises(UsageError) as caught:
        study(f"title: t\n{sections}\n")
    assert f"study.yaml: {key}" in str(caught.value)
    assert "quote it" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"title": ""}, "title: String should have at least 1 character"),
        ({"factors": {}}, "factors: Dictionary should have at least 1 item"),
        ({"factors": {"a": {}}}, "factors.a: Dictionary should have at least 1 item"),
        (
            {"factors": {"a": {"x": {"model.channels": 4}}}},
            "a.x changes 'model.channels': keys begin with autoencoder.",
        ),
        ({"factors": {"a": {"x": {"autoencoder.seed": 4}}}}, "a.x changes the seed, which is what seeds are for"),
        ({"factors": {"a": {"x": {"diffusion": {"seed": 4}}}}}, "a.x changes the seed"),
        (
            {"factors": {"a": {"x": {}}}},
            "factors.a has one level, which varies nothing: give it another, or leave it out",
        ),
        ({"factors": {"noise": {"a": {}, "b": {}}, "nois": {"c": {}}}}, "varies nothing; did you mean 'noise'"),
        ({"factors": {"a": {"x": None}}}, "factors.a.x: Input should be a valid dictionary"),
        ({"seeds": []}, "seeds: Tuple should have at least 1 item"),
        ({"seeds": [1, 2, 1]}, "seeds: a seed is given twice"),
        ({"seeds": [-1]}, "seeds.0: Input should be greater than or equal to 0"),
        ({"design": {"kind": "fractional"}}, "design.kind: unknown kind 'fractional'; did you mean 'factorial'?"),
        ({"design": {"kind": "named", "variants": {"a": {}}}}, "design.variants: Dictionary should have at least 2"),
        ({"design": {"kind": "factorial", "variants": {}}}, "unknown key 'design.variants'; valid: exclude, kind"),
        (
            {"design": {"kind": "named", "variants": {"a": {}, "b": {"chanels": 4}}}},
            "design.variants.b: no factor 'chanels'; did you mean 'channels'?",
        ),
        (
            {"design": {"kind": "factorial", "exclude": [{"channels": 8}]}},
            "design.exclude.0: channels has no level '8'; valid: 4, 16",
        ),
        ({"evaluation": {"sampler": "dpmp_2m"}}, "evaluation.sampler: no sampler 'dpmp_2m'; did you mean 'dpmpp_2m'?"),
        ({"evaluation": {"health": ["scale", "colour"]}}, "evaluation.health: no section of the latent health report"),
        ({"evaluation": {"num_sample": 3}}, "unknown key 'evaluation.num_sample'; did you mean 'num_samples'?"),
        ({"rule": {"level": 0}}, "rule.level: Input should be greater than 0"),
        (
            {"claims": {"c": {"statement": "s", "comparisons": []}}},
            "claims.c.comparisons: Tuple should have at least 1 item",
        ),
        ({"claims": claim(factor="width")}, "claims.c.comparisons.0: no factor 'width'"),
        ({"claims": claim(level=32)}, "claims.c.comparisons.0: channels has no level '32'; valid: 4, 16"),
        ({"claims": claim(against=8)}, "claims.c.comparisons.0: channels has no level '8'"),
        (
            {"claims": claim(at={"bottleneck": "plain"})},
            "claims.c.comparisons.0.at: bottleneck has no level 'plain'; valid: kl, bounded",
        ),
        (
            {"claims": claim(at={"bottleneck": "kl"}, against_at={"bottleneck": "x"})},
            "claims.c.comparisons.0.against_at: bottleneck has no",
        ),
        ({"claims": claim(at={"channels": 4})}, "claims.c.comparisons.0: 'channels' is compared, so it cannot be held"),
        ({"claims": claim(against_at={"bottleneck": "kl"})}, "claims.c.comparisons.0: against_at holds bottleneck"),
        ({"claims": claim(against=16)}, "claims.c.comparisons.0: level and against are both '16'"),
        ({"claims": claim(metric="kid")}, "claims.c.comparisons.0.metric: Input should be 'kid_mean'"),
        ({"claims": claim(expect="no_worse")}, "claims.c.comparisons.0: margin belongs to expect: no_worse"),
        ({"claims": claim(margn=0.1)}, "unknown key 'claims.c.comparisons.0.margn'; did you mean 'margin'?"),
        (
            {"claims": {"c": {"statment": "s", "comparisons": []}}},
            "unknown key 'claims.c.statment'; did you mean 'statement'?",
        ),
        ({"claims": claim(margin=0.1)}, "claims.c.comparisons.0: margin belongs to expect: no_worse"),
    ],
)
def test_every_error_is_one_line_that_names_the_key(study, sections, message):
    with pytest.raises(UsageError) as caught:
        study(**{"claims": {}, **sections})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_override_reaches_a_level_and_a_recipe(study):
    config = study(
        "", "factors.bottleneck.bounded={autoencoder.model.bottleneck.kind: plain}", "autoencoder.train.steps=7"
    )
    assert config.factors["bottleneck"]["bounded"] == {"autoencoder.model.bottleneck.kind": "plain"}
    assert config.autoencoder.train.steps == 7


def test_the_defaults_are_the_papers_reference_protocol():
    config = StudyConfig(title="t", factors=SMALL["factors"])
    assert config.seeds == (0, 1, 2)
    assert (config.evaluation.sampler, config.evaluation.steps, config.evaluation.num_samples) == ("dpmpp_2m", 20, 2000)
    assert (config.rule.level, config.rule.spread, config.design.kind) == (0.05, "pooled", "one_at_a_time")
