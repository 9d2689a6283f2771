"""``ablate``: shared cells, going on after a stop, the arithmetic of its tables and the rule of its verdicts."""

import json
import math
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from filelock import FileLock
from scipy import stats
from torch import Tensor

from wavelatent.common import claims, reference_cache
from wavelatent.common.config import load_config, preset_names
from wavelatent.common.errors import Diverged, Stopped, UsageError
from wavelatent.common.evaluation import Result
from wavelatent.common.metric_weights import MissingWeightsError
from wavelatent.common.runtime import RuntimeOptions, StopRequest
from wavelatent.pipelines import ablate as ablate_module
from wavelatent.pipelines import evaluate, evaluation_inputs
from wavelatent.pipelines.ablate import ablate, describe
from wavelatent.pipelines.ablate_config import AblationConfig
from wavelatent.pipelines.ablate_statistics import Difference, Spread, t_quantile
from wavelatent.pipelines.ablate_tables import Run, make_table, markdown
from wavelatent.pipelines.cells import Cell, make_cells, take_shard, variant_configs, work_through
from wavelatent.pipelines.run_config import AutoencoderRunConfig

CPU = RuntimeOptions(device="cpu")
TRAIN, VAL = "synthetic:9", "synthetic:6"
STEPS = 3


def config(**changes: object) -> AblationConfig:
    plain = {
        "title": "Learning rates, of three",
        "question": "Does the learning rate matter?",
        "autoencoder": {
            "model": {
                "encoder": {"kind": "litevae", "size": "s", "levels": 2, "num_res_blocks": 1},
                "decoder": {"width": "tiny", "num_res_blocks": 1},
            },
            "objective": {"lpips": {"weight": 0}},
            "train": {"steps": STEPS, "batch_size": 4, "log_every": 1, "sample_every": 0, "checkpoint_every": 1},
        },
        "variants": {"slow": {}, "fast": {"train.learning_rate.peak": 1e-2}},
        "seeds": [0, 1],
        "num_images": 5,
    }
    return AblationConfig.model_validate(plain | changes)


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path) -> None:
    """Images of 32 px, six numbers in place of Inception's features, no LPIPS."""

    class TinyInception:
        name, dim, weights_sha256 = "inception-v3-2015-12-05", 6, "of the stand-in"

        def __init__(self, device: object = "cpu") -> None:
            self.device = device

        def __call__(self, images: Tensor) -> Tensor:
            return F.adaptive_avg_pool2d(images.float() / 255, (2, 1)).flatten(1).cpu()

    def no_lpips(*_: object) -> None:
        raise MissingWeightsError("LPIPS is not here")

    open_data = ablate_module.open_data

    def open_small(spec: str, **options: object):
        return open_data(spec, **{**options, "size": 32})

    monkeypatch.setattr(evaluate, "InceptionFeatures", TinyInception)
    monkeypatch.setattr(evaluate, "PerceptualDistance", no_lpips)
    monkeypatch.setattr(evaluation_inputs, "open_data", open_small)
    monkeypatch.setattr(ablate_module, "open_data", open_small)
    monkeypatch.setattr(reference_cache, "cache_folder", lambda: tmp_path / "cache")


@pytest.fixture
def trained(monkeypatch) -> list[str]:
    """The cells that are trained from here on, one entry per call."""
    train, calls = ablate_module.train_autoencoder, []

    def record(cell_config, *, out, **options):
        calls.append(out.name)
        return train(cell_config, out=out, **options)

    monkeypatch.setattr(ablate_module, "train_autoencoder", record)
    return calls


def run(ablation: AblationConfig, out: Path, **options: object):
    return ablate(ablation, data=TRAIN, eval_data=VAL, out=out, **{"options": CPU, **options})


def test_two_ablations_share_their_cells_and_a_finished_one_is_left_alone(tmp_path, trained, monkeypatch):
    first = run(config(), tmp_path)
    assert first["complete"]
    assert sorted(trained) == sorted(path.name for path in (tmp_path / "cells").iterdir() if path.is_dir())
    assert len(trained) == 4
    trained.clear()
    # LPIPS is missing, so that a measurement is tried again; what is trained stays.
    changed = config(title="Decay", variants={"none": {}, "cosine": {"train": {"learning_rate": {"decay": "cosine"}}}})
    second = run(changed, tmp_path)
    folders = [{Path(cell["folder"]).name for cell in result["cells"]} for result in (first, second)]
    assert len(folders[0] & folders[1]) == 2, "the two seeds of the plain recipe"
    assert {path.stem for path in (tmp_path / "tables").iterdir()} == {"learning-rates-of-three", "decay"}
    assert first["table"]["variants"]["slow"]["metrics"] == second["table"]["variants"]["none"]["metrics"]
    fast = first["table"]["variants"]["fast"]
    assert fast["changes"] == {"train.learning_rate.peak": 1e-2}
    assert [(one["seed"], one["steps"], one["images"]) for one in fast["runs"]] == [(0, STEPS, 12), (1, STEPS, 12)]
    assert all(one["train_seconds"] > 0 for one in fast["runs"])
    assert set(fast["metrics"]) == {"rfid", "psnr", "ssim"}
    assert any("LPIPS is not here" in note for note in first["table"]["notes"])
    assert json.loads(Path(first["json"]).read_text()) == first["table"]
    assert Path(first["markdown"]).read_text() == markdown(first["table"])
    assert "5 held-out images" in markdown(first["table"])
    assert str(tmp_path) not in Path(first["json"]).read_text(), "a table names no paths of the machine"
    trained.clear()
    for path in (tmp_path / "cells").glob("*/evaluation-reconstruction/metrics.json"):
        result = Result.load(path)
        result.model_copy(update={"not_computed": {}}).save(path)
    monkeypatch.setattr(ablate_module, "evaluate_reconstruction", lambda *_, **__: pytest.fail("measured again"))
    assert run(changed, tmp_path)["complete"]
    assert trained == [], "a cell that is measured in full is not even opened"


def test_it_goes_on_after_a_stop(tmp_path, monkeypatch):
    from wavelatent.stage1_autoencoder.trainer import AutoencoderTrainer

    step, steps = AutoencoderTrainer._step, []

    def stop_in_the_second_cell(self, *arguments):
        step(self, *arguments)
        steps.append(self.step)
        if len(steps) == STEPS + 1:
            raise Stopped("stopped by a test at a step that is saved")

    monkeypatch.setattr(AutoencoderTrainer, "_step", stop_in_the_second_cell)
    ablation = config(seeds=[0])
    with pytest.raises(Stopped):
        run(ablation, tmp_path)
    assert [cell["state"] for cell in run(ablation, tmp_path, dry_run=True)["cells"]] == ["measured", "started"]
    assert not (tmp_path / "tables").exists()
    whole = run(ablation, tmp_path)
    assert steps == [1, 2, 3, 1, 1, 2, 3], "it stopped before its first checkpoint, and the finished cell stayed"
    assert whole["complete"]


def test_no_time_left_stops_before_the_first_cell(tmp_path):
    with pytest.raises(Stopped, match="run the same command again"):
        run(config(), tmp_path, options=RuntimeOptions(device="cpu", max_minutes=-1))


def test_a_dry_run_writes_nothing_and_shards_part_the_cells(tmp_path, trained):
    ablation = config(seeds=[0])
    listed = run(ablation, tmp_path / "out", dry_run=True)
    assert not (tmp_path / "out").exists()
    assert [cell["state"] for cell in listed["cells"]] == ["new", "new"]
    assert "2 of 2 cells are still to be" in describe(listed)
    half = run(ablation, tmp_path / "out", shard=(0, 2))
    assert not half["complete"]
    assert [cell["state"] for cell in half["cells"]] == ["measured", "new"]
    assert "table" not in half
    assert run(ablation, tmp_path / "out", shard=(1, 2))["complete"]
    assert len(trained) == 2
    assert [
        cell.seed for cell in take_shard(make_cells({"a": AutoencoderRunConfig()}, range(5), tmp_path, {}), (1, 2))
    ] == [1, 3]
    with pytest.raises(UsageError, match="--shard 2/2"):
        take_shard([], (2, 2))


def test_a_training_that_diverges_is_named_and_the_others_go_on(tmp_path, monkeypatch):
    from wavelatent.stage1_autoencoder.trainer import AutoencoderTrainer

    step = AutoencoderTrainer._step

    def diverge(self, *arguments):
        step(self, *arguments)
        if self.config.learning_rate.peak == 1e-2 and self.seed == 1:
            raise Diverged("l1 is not finite")

    monkeypatch.setattr(AutoencoderTrainer, "_step", diverge)
    result = run(config(), tmp_path)
    assert [cell["state"] for cell in result["cells"]] == ["measured", "measured", "measured", "failed"]
    table = result["table"]
    assert "fast, seed 1: failed, and is left out" in table["notes"]
    assert table["variants"]["fast"]["metrics"]["psnr"]["std"] is None
    difference = table["variants"]["fast"]["differences"]["psnr"]
    assert (difference["seeds"], difference["verdict"]) == ([0], "one seed: no spread")


def test_reconstructions_that_are_not_finite_are_a_failure_too_and_are_not_tried_again(tmp_path, monkeypatch, capsys):
    measured = []

    def measure(folder, *arguments, **options):
        measured.append(folder)
        if len(measured) == 1:
            raise Diverged(f"a reconstruction of {folder} is not finite: train it again")
        return evaluate.evaluate_reconstruction(folder, *arguments, **options)

    monkeypatch.setattr(ablate_module, "evaluate_reconstruction", measure)
    result = run(config(seeds=[0]), tmp_path)
    assert [cell["state"] for cell in result["cells"]] == ["failed", "measured"]
    assert "slow, seed 0: failed, and is left out" in result["table"]["notes"]
    again = run(config(seeds=[0]), tmp_path)
    assert again["cells"] == result["cells"]
    assert len(set(measured)) == 2
    assert measured.count(measured[0]) == 1
    told = f"autoencoder, measuring: a reconstruction of {Path(measured[0]).name} is not finite"
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "fragments"),
    [
        (
            {"variants": {"a": {}, "b": {"train.learning_rat.peak": 1}}},
            ["variants.b", "'train.learning_rat'", "did you"],
        ),
        ({"variants": {"a": {}, "b": {"model": {"bottleneck": {"kind": "lk"}}}}}, ["variants.b", "did you mean 'kl'"]),
        ({"variants": {"a": {}, "b": {"train.steps": 4}}}, ["same number of steps", "a 3, b 4"]),
        ({"variants": {"a": {}, "b": {"train.batch_size": 8}}}, ["same number of images", "a 12, b 24"]),
        ({"variants": {"a": {}, "b": {"train.steps": STEPS}}}, ["'a' and 'b' come to the same configuration"]),
        ({"variants": {"a": {}, "b": {"train.log_every": 7}}}, ["'a' and 'b' come to the same configuration"]),
        ({"num_images": 7}, ["asked for 7 images of 6"]),
    ],
)
def test_errors_name_the_variant_and_the_key(tmp_path, changes, fragments):
    with pytest.raises(UsageError) as caught:
        run(config(**changes), tmp_path)
    for fragment in fragments:
        assert fragment in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_one_process_trains_a_cell(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="start it several times instead"):
        run(config(), tmp_path)


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        ("{title: t, variants: {a: {}}}", "at least 2"),
        ("{title: t, variants: {a: {}, b: {}}, seeds: [1, 1]}", "given twice"),
        ("{title: t, variants: {a: {}, b: {seed: 2}}}", "b changes the seed"),
        (
            "{title: t, variants: {a: {}, b: {}}, autoencoder: {base: ae-tiny, trian: {steps: 2}}}",
            "'autoencoder.trian'",
        ),
        ("{title: t, variants: {a: {}, b: {}}, lpips_nte: vgg}", "did you mean 'lpips_net'"),
    ],
)
def test_a_wrong_ablation_is_refused_by_name(tmp_path, text, fragment):
    file = tmp_path / "wrong.yaml"
    file.write_text(text)
    with pytest.raises(UsageError, match=fragment):
        load_config(AblationConfig, str(file))


def test_changes_merge_over_the_recipe_and_a_changed_kind_drops_the_settings_of_the_former():
    base = AutoencoderRunConfig.model_validate({"model": {"bottleneck": {"kind": "kl", "kl_weight": 0.25}}})
    changes = {
        "same": {},
        "weight": {"model.bottleneck.kl_weight": 0.5, "model.channels": 7},
        "other": {"model": {"bottleneck": {"kind": "plain"}}},
    }
    configs = variant_configs(base, changes)
    assert configs["same"] == base
    assert (configs["weight"].model.bottleneck.kl_weight, configs["weight"].model.channels) == (0.5, 7)
    assert configs["other"].model.bottleneck.kind == "plain"


def test_a_cell_is_named_by_what_decides_its_result(tmp_path):
    def name(overrides: dict[str, object] | None = None, seed: int = 0, **context: object) -> str:
        configs = variant_configs(AutoencoderRunConfig(), {"any name": overrides or {}})
        return make_cells(configs, [seed], tmp_path, context)[0].folder.name

    assert name() == name({"train.log_every": 7, "train.num_workers": 2, "train.steps": 100_000})
    assert name(seed=3) == name().replace("-seed0", "-seed3")
    others = {name({"train.steps": 99_999}), name({"model.channels": 5}), name(data="x"), name(data="y")}
    assert len(others | {name()}) == 5


def test_cells_come_seed_by_seed_each_with_its_own_seed(tmp_path):
    configs = variant_configs(AutoencoderRunConfig(), {"a": {}, "b": {"model.channels": 5}})
    cells = make_cells(configs, [4, 2], tmp_path, {})
    assert [(c.variant, c.seed, c.config.seed, c.config.model.channels) for c in cells] == [
        ("a", 4, 4, 4),
        ("b", 4, 4, 5),
        ("a", 2, 2, 4),
        ("b", 2, 2, 5),
    ]


def test_a_cell_that_another_process_holds_is_left_for_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "POLL_SECONDS", 0.01)
    cells = [Cell(name, 0, AutoencoderRunConfig(), tmp_path / name) for name in "abc"]
    other, done = FileLock(tmp_path / ".a.lock", thread_local=False), []
    other.acquire()
    release = threading.Timer(0.2, other.release)
    release.start()
    with StopRequest() as stop:
        work_through(cells, lambda cell: done.append(cell.variant), stop)
    release.join()
    assert done == ["b", "c", "a"]
    begin = time.monotonic()
    with other, StopRequest(max_minutes=0.1 / 60) as stop, pytest.raises(Stopped):
        work_through(cells[:1], lambda cell: done.append(cell.variant), stop)
    assert time.monotonic() - begin >= 0.1


def test_spread_and_paired_interval_by_hand():
    spread = Spread.of([1.0, 2.0, 6.0])
    assert (spread.mean, spread.std) == (3.0, pytest.approx(math.sqrt(7)))  # (4 + 1 + 9) / 2
    difference = Difference.of([1.0, 2.0, 6.0], [0.0, 3.0, 3.0])  # 1, -1, 3: mean 1, deviation 2
    half = 4.302653 * 2 / math.sqrt(3)
    assert difference.spread.values == (1.0, -1.0, 3.0)
    assert difference.interval == pytest.approx((1 - half, 1 + half))
    assert Spread.of([2.0]).std is None


def test_the_quantiles_are_those_of_students_t():
    for degrees in range(1, 31):
        assert t_quantile(degrees) == pytest.approx(stats.t.ppf(0.975, degrees))
    assert t_quantile(10, 1 - 0.05 / 16) == pytest.approx(stats.t.ppf(0.996875, 10))
    assert t_quantile(2) == pytest.approx(4.303, abs=5e-4)  # NIST/SEMATECH e-Handbook, section 1.3.6.7.2


@pytest.mark.parametrize(
    ("variant", "higher_is_better", "verdict"),
    [
        ((20.0, 21.0, 22.0), False, "inside the spread"),  # the same
        ((20.5, 20.9, 22.3), False, "inside the spread"),
        ((10.0, 11.1, 12.0), False, "better"),
        ((10.0, 11.1, 12.0), True, "worse"),
        ((30.0, 31.1, 32.0), True, "better"),
    ],
)
def test_a_planted_effect_is_named_and_no_effect_is_not(variant, higher_is_better, verdict):
    difference = Difference.of(variant, (20.0, 21.0, 22.0))
    assert difference.verdict(higher_is_better=higher_is_better) == verdict


def test_equal_variants_are_called_different_one_time_in_twenty():
    noise = torch.randn(4000, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    verdicts = [Difference.of(*pair.tolist()).verdict(higher_is_better=True) for pair in noise]
    named = sum(verdict != "inside the spread" for verdict in verdicts) / len(verdicts)
    assert named == pytest.approx(0.05, abs=0.01)


def _table(values: dict[str, list[float]]) -> dict:
    runs = [
        Run(
            variant=name,
            seed=seed,
            cell=f"{name}-seed{seed}",
            result=Result(metrics={"rfid": value, "psnr": value / 2}, protocol={}, seconds=1.0),
            train_seconds=10.0 + seed,
            steps=STEPS,
            images=12,
        )
        for name, of_seeds in values.items()
        for seed, value in enumerate(of_seeds)
    ]
    setting = {
        "steps": STEPS,
        "images": 12,
        "mixed_precision": "bf16",
        "train": {"count": 14907, "size": 64},
        "evaluation": {"num_images": 1000, "lpips_net": "alex", "are_training_images": False},
    }
    return make_table(config(seeds=[0, 1, 2]), runs, setting)


def test_a_table_says_what_the_numbers_say():
    table = _table({"slow": [20.0, 21.0, 22.0], "fast": [10.0, 11.1, 12.0]})
    fast = table["variants"]["fast"]
    assert fast["metrics"]["rfid"] == {
        "mean": pytest.approx(33.1 / 3),
        "std": pytest.approx(1.0017, abs=1e-4),
        "values": [10.0, 11.1, 12.0],
    }
    assert fast["differences"]["rfid"]["values"] == pytest.approx([-10, -9.9, -10])
    assert [fast["differences"][name]["verdict"] for name in ("rfid", "psnr")] == ["better", "worse"]
    assert table["variants"]["slow"]["differences"] == {}
    text = markdown(table)
    assert (
        "| fast | 11.03 ± 1.00 (10.00, 11.10, 12.00) | 5.52 ± 0.50 (5.00, 5.55, 6.00) | 11 ± 1 (10, 11, 12) | 3 |"
        in text
    )
    assert "| fast | −9.97 [−10.11, −9.82] **better** | −4.98 [−5.06, −4.91] **worse** |" in text
    assert "1,000 held-out images" in text
    assert "LPIPS with alex" in text
    assert "4.303" in text
    assert "makes 2 comparisons" in text
    assert "inside the spread |" not in text
    same = markdown(_table({"slow": [20.0, 21.0, 22.0], "fast": [20.0, 21.0, 22.0]}))
    assert "| fast | +0.00 [+0.00, +0.00] inside the spread |" in same


def test_litevae_b_is_trained_at_128_px_and_then_at_256():
    plain, phased = (load_config(AutoencoderRunConfig, name) for name in ("litevae-b", "litevae-b-128-256"))
    assert [(p.size, p.start, p.steps) for p in phased.train.resolved_phases()] == [
        (128, 0, 100_000),
        (256, 100_000, 50_000),
    ]
    assert (phased.model, phased.objective) == (plain.model, plain.objective)


@pytest.mark.parametrize("preset", [name for name in preset_names() if name.startswith("ablation-")])
def test_every_preset_is_fair_and_its_networks_can_be_built(preset):
    from wavelatent.stage1_autoencoder.autoencoder import Autoencoder
    from wavelatent.stage1_autoencoder.discriminators import DISCRIMINATORS

    if preset == "ablation-ae":
        configs = {"recipe": load_config(AutoencoderRunConfig, preset)}
    else:
        ablation = load_config(AblationConfig, preset)
        configs = variant_configs(ablation.autoencoder, ablation.variants)
        assert ablation.autoencoder == load_config(AutoencoderRunConfig, "ablation-ae")
        assert len({str(variant) for variant in configs.values()}) == len(configs), "no two variants are the same"
    for variant in configs.values():
        assert variant.train.images_at(variant.train.steps) == variant.train.steps * variant.train.batch_size
        discriminator = variant.objective.adversarial.discriminator
        with torch.device("meta"):
            Autoencoder(variant.model)
            DISCRIMINATORS[discriminator.kind](discriminator)
