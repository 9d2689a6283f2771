"""The variants of a study: what each design makes, what is refused, and which of them differ in one thing only."""

import itertools
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from wavelatent.common.config import load_config, preset_names
from wavelatent.common.errors import UsageError
from wavelatent.common.randomness import generator
from wavelatent.pipelines.study_config import StudyConfig
from wavelatent.pipelines.study_design import Variant, make_variants, pairs
from wavelatent.pipelines.train_diffusion import build_model
from wavelatent.stage1_autoencoder.autoencoder import Autoencoder
from wavelatent.stage2_diffusion.model import LatentDiffusion

FACTORS: dict[str, Any] = {
    "bottleneck": {
        "kl": {},
        "plain": {"autoencoder.model.bottleneck": {"kind": "plain"}},
        "bounded": {"autoencoder.model.bottleneck": {"kind": "bounded"}},
    },
    "targets": {"unit": {}, "none": {"autoencoder.model.bottleneck.variance_weight": 0}},
    "channels": {4: {}, 16: {"autoencoder.model.channels": 16}},
}
STUDIES = [n for n in preset_names() if n.startswith("study-") and n not in ("study-ae", "study-unet")]


def study(**sections: Any) -> StudyConfig:
    return StudyConfig.model_validate({"title": "t", "factors": FACTORS, **sections})


def named(**variants: dict[str, Any]) -> dict[str, Any]:
    return {"kind": "named", "variants": variants}


def names(config: StudyConfig) -> list[str]:
    return [variant.name for variant in make_variants(config)]


def claim(**comparison: Any) -> dict[str, Any]:
    return {"c": {"statement": "s", "comparisons": [comparison]}}


def test_one_at_a_time_has_the_base_and_every_other_level_alone():
    factors = {name: FACTORS[name] for name in ("bottleneck", "channels")}
    base, plain, bounded, wide = make_variants(study(factors=factors))
    assert [v.name for v in (base, plain, bounded, wide)] == [
        "base",
        "bottleneck: plain",
        "bottleneck: bounded",
        "channels: 16",
    ]
    assert base.levels == {"bottleneck": "kl", "channels": "4"}
    assert bounded.levels == {"bottleneck": "bounded", "channels": "4"}
    assert wide.levels == {"bottleneck": "kl", "channels": "16"}
    assert base.recipe.autoencoder.model.bottleneck.kind == "kl"
    assert (bounded.recipe.autoencoder.model.bottleneck.kind, bounded.recipe.autoencoder.model.channels) == (
        "bounded",
        4,
    )
    assert wide.recipe.autoencoder.model.channels == 16


def test_a_factorial_has_every_combination_but_those_that_are_excluded():
    exclude = [{"bottleneck": "kl", "targets": "none"}, {"bottleneck": "plain", "targets": "none"}, {"channels": 16}]
    whole = {"factors": {name: FACTORS[name] for name in ("bottleneck", "channels")}}
    assert len(names(study(design={"kind": "factorial"}, **whole))) == 6
    assert names(study(design={"kind": "factorial", "exclude": exclude})) == [
        "kl, unit, 4",
        "plain, unit, 4",
        "bounded, unit, 4",
        "bounded, none, 4",
    ]


def test_a_named_design_keeps_its_order_and_fills_in_first_levels():
    config = study(design=named(wide={"channels": 16}, bounded={"bottleneck": "bounded", "targets": "none"}))
    wide, bounded = make_variants(config)
    assert (wide.name, wide.levels) == ("wide", {"bottleneck": "kl", "targets": "unit", "channels": "16"})
    assert bounded.levels == {"bottleneck": "bounded", "targets": "none", "channels": "4"}
    assert bounded.recipe.autoencoder.model.bottleneck.variance_weight == 0


def test_the_shared_recipe_stays_where_no_level_changes_it():
    config = study(
        autoencoder={"train": {"steps": 30}, "model": {"bottleneck": {"kind": "kl", "kl_weight": 0.5}}},
        diffusion={"train": {"steps": 7}, "whitening": "scalar"},
        design=named(kl={}, bounded={"bottleneck": "bounded"}),
    )
    for variant in make_variants(config):
        assert variant.recipe.autoencoder.train.steps == 30
        assert (variant.recipe.diffusion.train.steps, variant.recipe.diffusion.whitening) == (7, "scalar")
    kl, bounded = make_variants(config)
    assert kl.recipe.autoencoder.model.bottleneck.kl_weight == 0.5
    assert "kl_weight" not in bounded.recipe.autoencoder.model.bottleneck.model_dump()  # another kind: nothing stays


def test_levels_nested_and_dotted_come_to_the_same_and_a_later_factor_goes_over_an_earlier_one():
    factors = {
        "first": {"a": {}, "b": {"autoencoder": {"model": {"channels": 8}}, "diffusion.train.batch_size": 64}},
        "second": {"a": {}, "b": {"autoencoder.model.channels": 5}},
    }
    _, nested, both = make_variants(
        study(factors=factors, design=named(x={}, y={"first": "b"}, z={"first": "b", "second": "b"}))
    )
    assert nested.recipe.autoencoder.model.channels == 8
    assert (both.recipe.autoencoder.model.channels, both.recipe.diffusion.train.batch_size) == (5, 64)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"design": named(kl={}, x={"targets": "none"})},
            "variants.x: unknown key 'autoencoder.model.bottleneck.variance_weight'",
        ),
        ({"design": named(a={}, b={"bottleneck": "kl"})}, "'a' and 'b' come to the same configuration"),
        (  # they would be one cell under two names, which differ by nothing, and surely so
            {"factors": {"a": {"x": {}, "y": {"diffusion.train.log_every": 7}}}},
            "'base' and 'a: y' come to the same configuration",
        ),
        (
            {"factors": {"a": {"x": {}, "y": {"diffusion.model.chanels": 8}}}},
            "variants.a: y: unknown key 'diffusion.model.chanels'; did you mean 'channels'?",
        ),
        (
            {"factors": {"a": {"x": {}, "y": {"autoencoder": 3}}}},
            "variants.a: y: autoencoder:",
        ),
        (
            {"factors": {"a": {"x": {}, "y": {}}}, "design": {"kind": "factorial", "exclude": [{"a": "y"}]}},
            "design: a study compares at least two variants, and this one makes 1",
        ),
        (
            {"design": {"kind": "factorial", "exclude": [{"channels": 4}, {"channels": 16}]}},
            "design: a study compares at least two variants, and this one makes 0",
        ),
        (
            {"factors": {"a": {"x": {}, "y": {"autoencoder.train.batch_size": 8}}}},
            "all must see the same number of images in autoencoder.train: base 1,600,000, a: y 800,000",
        ),
        (
            {"factors": {"a": {"x": {}, "y": {"diffusion.train.steps": 10}}}},
            "all must see the same number of images in diffusion.train: base 6,400,000, a: y 640",
        ),
        (
            {
                "design": named(a={}, b={"bottleneck": "bounded", "channels": 16}),
                "claims": claim(factor="channels", level=16, against=4),
            },
            "claims.c: no two variants differ in nothing but channels '16' against '4'",
        ),
        (
            {
                "design": named(a={}, b={"channels": 16}),
                "claims": claim(factor="channels", level=16, against=4, at={"bottleneck": "bounded"}),
            },
            "differ in nothing but channels '16' at bottleneck bounded against '4'",
        ),
    ],
)
def test_what_does_not_go_together_is_one_line_that_names_the_key(sections, message):
    with pytest.raises(UsageError) as caught:
        make_variants(study(**sections))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_equal_images_in_another_number_of_steps_will_do():
    level = {"diffusion.train.batch_size": 128, "diffusion.train.steps": 50_000}
    assert len(names(study(factors={"batch": {64: {}, 128: level}}))) == 2


def test_pairs_are_alike_in_all_else():
    variants = make_variants(
        study(
            design=named(
                kl={},
                bounded={"bottleneck": "bounded"},
                wide={"bottleneck": "bounded", "channels": 16},
                wide_kl={"channels": 16},
                free={"bottleneck": "bounded", "targets": "none"},
                plain={"bottleneck": "plain"},
            )
        )
    )
    both = [("bounded", "kl"), ("wide", "wide_kl")]
    assert pairs(variants, "bottleneck", "bounded", "kl", {}) == both
    assert pairs(variants, "bottleneck", "kl", "bounded", {}) == [(b, a) for a, b in both]
    assert pairs(variants, "bottleneck", "bounded", "kl", {"channels": "16"}) == both[1:]
    assert pairs(variants, "bottleneck", "bounded", "plain", {}) == [("bounded", "plain")]
    assert pairs(variants, "targets", "none", "unit", {}) == [("free", "bounded")]
    assert pairs(variants, "bottleneck", "bounded", "plain", {"targets": "none"}) == []
    crossed = pairs(variants, "bottleneck", "bounded", "plain", {"targets": "none"}, {"targets": "unit"})
    assert crossed == [("free", "plain")]


# --- what a seed decides, as the report's protocol and docs/study.md have it


def denoiser(variant: Variant, channels: int) -> LatentDiffusion:
    stats = SimpleNamespace(mean=[0.0] * channels, std=[1.0] * channels)
    cache = SimpleNamespace(shape=(channels, 8, 8), manifest=SimpleNamespace(stats=stats), path="cache")
    return build_model(variant.recipe.diffusion, cache)  # type: ignore[arg-type]


def test_stage_two_begins_alike_where_latents_have_one_shape_and_meets_the_same_noise_levels_everywhere():
    small_reference = ["diffusion.objective={kind: flow, reference_size: 256}"]
    kl, bounded, wide, _ = make_variants(load_config(StudyConfig, "study-tiny", small_reference))
    models = [denoiser(kl, 4), denoiser(bounded, 4), denoiser(wide, 6)]
    first, same, other = ([p.detach() for p in model.network.parameters()] for model in models)
    assert all(map(torch.equal, first, same))
    assert not all(map(torch.equal, first[4:-4], other[4:-4])), "weights are drawn in order, also those inside"
    drawn = [
        model.draw_noise(torch.zeros(5, model.latent_shape[0], 8, 8), generator("noise", 0, 0, 3)) for model in models
    ]
    assert torch.equal(drawn[0][1], drawn[1][1])
    assert torch.equal(drawn[0][0], drawn[1][0])
    assert torch.allclose(drawn[2][0], math.sqrt(6 / 4) * drawn[0][0]), "but for the noise shift"


def test_stage_one_begins_alike_up_to_the_first_layer_of_another_shape():
    def begun(variant: Variant) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        return dict(Autoencoder(variant.recipe.autoencoder.model).named_parameters())

    kl, bounded, *_ = make_variants(load_config(StudyConfig, "study-tiny"))
    one, other = begun(kl), begun(bounded)
    places = [name for name in one if one[name].shape != other[name].shape]
    assert {name.rpartition(".")[0] for name in places} == {places[0].rpartition(".")[0]}
    before = list(one)[: list(one).index(places[0])]
    assert all(name.startswith("encoder.") for name in before)
    assert all(torch.equal(one[name], other[name]) for name in before)
    drawn = [name for name in one if name.startswith("decoder.") and one[name].std() > 0]
    assert drawn
    assert not any(torch.equal(one[name], other[name]) for name in drawn)


# --- the presets


@pytest.mark.parametrize("preset", STUDIES)
def test_the_variants_of_a_preset_can_be_made_and_every_claim_has_its_pairs(preset):
    config = load_config(StudyConfig, preset)
    variants = make_variants(config)
    assert config.claims
    assert variants[0].levels == {factor: next(iter(levels)) for factor, levels in config.factors.items()}
    assert variants[0].levels["bottleneck"] == "kl"
    for claim in config.claims.values():
        for c in claim.comparisons:
            for level, against in pairs(variants, c.factor, c.level, c.against, c.at, c.against_at):
                one, other = (next(v.levels for v in variants if v.name == name) for name in (level, against))
                assert {f for f in one if one[f] != other[f]} == {c.factor} | c.against_at.keys()


@pytest.mark.parametrize("preset", [name for name in STUDIES if name != "study-tiny"])
def test_no_comparison_of_a_claim_takes_unwhitened_latents_in_unless_it_is_about_them(preset):
    """Else what whitening does to the one bottleneck would count as what the bottleneck does."""
    config = load_config(StudyConfig, preset)
    variants = make_variants(config)
    for claim in config.claims.values():
        for c in claim.comparisons:
            found = pairs(variants, c.factor, c.level, c.against, c.at, c.against_at)
            assert c.factor == "whitening" or not any("unwhitened" in name for pair in found for name in pair)


SHARED = load_config(StudyConfig, "study-claims")


def planned(factors: list[str], kind: str) -> list[Variant]:
    sections = {
        "factors": {factor: SHARED.factors[factor] for factor in factors},
        "design": {"kind": kind},
        "claims": {},
    }
    return make_variants(StudyConfig.model_validate({**SHARED.model_dump(mode="json"), **sections}))


def test_every_level_of_the_shared_factors_makes_a_recipe():
    """Also those that no preset uses yet."""
    made = {variant.name: variant for variant in planned(list(SHARED.factors), "one_at_a_time")}
    assert len(made) == 1 + sum(len(levels) - 1 for levels in SHARED.factors.values())
    assert {"bottleneck: clamp-1", "channels: 32", "perturbations: all", "noise_shift: 1"} <= made.keys()
    free = made["bottleneck: bounded-free"].recipe.autoencoder.model.bottleneck
    bounded = made["bottleneck: bounded"].recipe.autoencoder.model.bottleneck
    assert (free.variance_weight, bounded.variance_weight) == (0, 0.1)
    assert free.model_dump(exclude={"variance_weight"}) == bounded.model_dump(exclude={"variance_weight"})


@pytest.mark.parametrize("factors", list(itertools.combinations(SHARED.factors, 2)))
def test_any_two_of_the_shared_factors_can_be_crossed(factors):
    """All of their levels go together: a study of one's own may take any two without leaving a combination out."""
    assert len(planned(list(factors), "factorial")) == math.prod(len(SHARED.factors[factor]) for factor in factors)
