"""`sample`: an image depends on its seed alone; folders are resumed and not mixed; what is made of the images."""

import errno
import json
import os
import shutil
import signal
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forked_commands import ForkedCommands
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_diffusion_run import H, W, random_model, write_autoencoder, write_run

from wavelatent.common.errors import Stopped, UsageError, WavelatentError
from wavelatent.common.power_ema import SNAPSHOT_FOLDER, PowerEMA, PowerEMAConfig, save_snapshot
from wavelatent.common.run_folder import save_model_folder
from wavelatent.pipelines.comparison import protocol_differences
from wavelatent.pipelines.sample import Extras, sample
from wavelatent.pipelines.sample_folder import SampleWriter
from wavelatent.pipelines.sample_images import ImageSampler, SampleOptions, ema_choice, weights_sha256
from wavelatent.pipelines.sample_sources import RunSamples, SampleFolder
from wavelatent.stage2_diffusion.generation import draw_labels, generate_latents
from wavelatent.stage2_diffusion.model import LatentDiffusion
from wavelatent.stage2_diffusion.samplers import SAMPLERS
from wavelatent.stage2_diffusion.sampling import Sampling

CLASSES = 2
SHORT = Sampling("euler", 2)
OPTIONS = SampleOptions(SHORT, pass_rows=4)


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_autoencoder(tmp_path_factory.mktemp("autoencoder") / "ae")


@pytest.fixture(scope="module")
def run(autoencoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "run", autoencoder)


@pytest.fixture(scope="module")
def with_classes(autoencoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "classes", autoencoder, num_classes=CLASSES)


def images(run: Path, seeds: list[int], options: SampleOptions = OPTIONS, **more: object) -> torch.Tensor:
    return ImageSampler(run, options, device="cpu", **more).draw(seeds)  # type: ignore[arg-type]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.png")}


def read(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_the_files_are_equal_to_the_bit_for_any_batch_size_order_and_number_of_processes(
    run: Path, tmp_path: Path, precision: str, forked_commands: ForkedCommands
) -> None:
    options = SampleOptions(SHORT, mixed_precision=precision, pass_rows=4)  # type: ignore[arg-type]
    seeds = [*range(9), 1234567]
    sample(run, tmp_path / "all", seeds, options, device="cpu", batch_size=8)
    expected = files(tmp_path / "all")
    assert sorted(expected) == [*(f"{seed:06d}.png" for seed in seeds)]
    for size in (1, 3):
        sample(run, tmp_path / str(size), seeds[::-1], options, device="cpu", batch_size=size)
        assert files(tmp_path / str(size)) == expected
    command = [
        "sample", "--run", run, "--out", tmp_path / "two", "--seeds", "0-8,1234567", "--sampler", "euler", "--steps", 2,
        "--mixed-precision", precision, "--pass-rows", 4, "--device", "cpu", "--batch-size", 3,
        "--npz", tmp_path / "two.npz", "--json",
    ]  # fmt: skip
    said = tmp_path / "said"
    assert forked_commands.run(command, said, processes=2) == [0, 0], (said / "0.err").read_text()
    assert files(tmp_path / "two") == expected
    assert [json.loads((said / "0.out").read_text())["written"], (said / "1.out").read_text()] == [10, ""]
    records = [json.loads((tmp_path / name / "samples.json").read_text()) for name in ("all", "two")]
    assert records[0] == records[1]
    with np.load(tmp_path / "two.npz") as archive:
        assert np.array_equal(archive["arr_0"][-1], read(tmp_path / "all" / "1234567.png"))
    (tmp_path / "two" / "000002.png").write_bytes(b"cut off")
    assert forked_commands.run(command, said, processes=2) == [1, 1]  # what the main one alone makes fails in both
    assert "000002.png cannot be read" in (said / "1.err").read_text()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_images_beside_it_and_its_place_do_not_matter(run: Path, sampler: str) -> None:
    options = SampleOptions(Sampling(sampler, 3), pass_rows=4)
    seeds = [3, 1, 4, 159, 2]
    together = images(run, seeds, options)
    assert together.shape == (5, 3, 4 * H, 4 * W)
    assert torch.equal(images(run, seeds[::-1], options).flip(0), together)
    assert torch.equal(images(run, [159], options), together[3:4])
    assert (together[0].int() - together[1].int()).abs().max() > 5


def test_the_rows_of_a_pass_move_an_image_by_no_more_than_rounding(run: Path) -> None:
    one, other = (images(run, [5, 6], SampleOptions(SHORT, pass_rows=rows)) for rows in (1, 16))
    assert (one.int() - other.int()).abs().max() <= 1


def test_evaluate_draws_the_images_of_the_folder(run: Path, tmp_path: Path) -> None:
    sample(run, tmp_path, range(7), OPTIONS, device="cpu", extras=Extras(contact_sheet=tmp_path / "sheet.png"))
    source = RunSamples(run, range(7), OPTIONS, device="cpu")
    drawn = torch.cat([source.images(range(3)), source.images(range(3, 7))])
    assert torch.equal(drawn, SampleFolder(tmp_path, None).images(range(7)))
    in_memory, of_folder = source.protocol(), SampleFolder(tmp_path, None).protocol()
    assert of_folder.pop("samples")["path"] == str(tmp_path)
    assert in_memory == of_folder
    assert (in_memory["sampler"], in_memory["steps"], in_memory["seeds"], in_memory["ema"]) == ("euler", 2, "0-6", 0.1)


def test_sampling_resumes_and_refuses_to_mix(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "samples"
    assert sample(run, out, range(5), OPTIONS, device="cpu")["written"] == 5
    before = files(out)
    (out / "000003.png").unlink()
    assert sample(run, out, range(7), OPTIONS, device="cpu")["written"] == 3
    assert {name: content for name, content in files(out).items() if name in before} == before
    with pytest.raises(UsageError, match="another rho, pass_rows"):
        sample(run, out, [9], SampleOptions(Sampling("euler", 2, rho=3.0)), device="cpu")
    changed = SampleOptions(Sampling("euler", 3), pass_rows=4)
    (out / "metrics.json").write_text("{}")
    assert sample(run, out, range(2), changed, device="cpu", overwrite=True)["written"] == 2
    assert sorted(path.name for path in out.iterdir()) == ["000000.png", "000001.png", "samples.json"]


def test_commands_with_seeds_of_their_own_may_fill_one_folder(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_folder, others = SampleWriter.open, []

    def open_while_another_comes(writer: SampleWriter, overwrite: bool) -> None:
        (tmp_path / ".samples.json.1234.tmp").touch()  # what another one is writing
        if not others:
            others.append(0)
            others.append(sample(run, tmp_path, range(3), OPTIONS, device="cpu")["written"])
        open_folder(writer, overwrite)

    monkeypatch.setattr(SampleWriter, "open", open_while_another_comes)
    assert sample(run, tmp_path, range(2, 6), OPTIONS, device="cpu")["written"] == 3
    assert others == [0, 3]
    assert len(files(tmp_path)) == 6


def test_a_stop_keeps_what_is_there_and_the_same_command_goes_on(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = ImageSampler.draw

    def draw_then_signal(sampler: ImageSampler, seeds: list[int]) -> torch.Tensor:
        os.kill(os.getpid(), signal.SIGTERM)
        return draw(sampler, seeds)

    with monkeypatch.context() as patch:
        patch.setattr(ImageSampler, "draw", draw_then_signal)
        with pytest.raises(Stopped, match="SIGTERM with 4 of 6 images"):
            sample(run, tmp_path, range(6), OPTIONS, device="cpu", batch_size=1)
    with pytest.raises(Stopped, match="--max-minutes with 4 of 6 images"):
        sample(run, tmp_path / "minutes", range(6), OPTIONS, device="cpu", batch_size=1, max_minutes=0)
    assert sample(run, tmp_path, range(6), OPTIONS, device="cpu")["written"] == 2


def test_a_label_is_the_class_of_every_image(with_classes: Path) -> None:
    seeds = list(range(6))
    drawn = draw_labels(seeds, CLASSES).tolist()
    assert set(drawn) == {0, 1}
    of = [images(with_classes, seeds, SampleOptions(SHORT, label=label, pass_rows=4)) for label in (0, 1)]
    assert not torch.equal(of[0], of[1])
    expected = torch.stack([of[label][seed] for seed, label in enumerate(drawn)])
    assert torch.equal(images(with_classes, seeds), expected)


def test_guidance_acts_and_is_recorded(run: Path, with_classes: Path, autoencoder: Path, tmp_path: Path) -> None:
    plain = images(with_classes, [0, 1])
    sampling = Sampling("euler", 2, guidance=3.0, guidance_interval=(0.1, float("inf")))
    guided = ImageSampler(with_classes, SampleOptions(sampling, pass_rows=4), device="cpu")
    assert not torch.equal(guided.draw([0, 1]), plain)
    record = guided.protocol()
    assert (record["guidance"], record["guidance_interval"], record["guide"]) == (3.0, [0.1, None], None)
    assert record["evaluations"] == 3  # the second step is at the lowest level, outside the interval
    weaker = write_run(tmp_path / "weaker", autoencoder, seed=1)
    options = SampleOptions(Sampling("euler", 2, guidance=3.0), guide=weaker, pass_rows=4)
    auto = ImageSampler(run, options, device="cpu")
    assert not torch.equal(auto.draw([0, 1]), images(run, [0, 1]))
    assert auto.protocol()["guide_sha256"] == weights_sha256(random_model(1)) != auto.protocol()["model_sha256"]
    other = write_run(tmp_path / "other", autoencoder, seed=2)
    same = ImageSampler(run, replace(options, guide=other), device="cpu").protocol()
    assert protocol_differences(auto.protocol(), same, "fid") == [], "guided alike, by a weaker run of its own"
    differing = protocol_differences(auto.protocol(), {**record, "guidance_interval": None}, "fid")
    assert [line.partition(" (")[0] for line in differing] == ["guided_by", "label"]


def test_another_ema_width_is_other_weights(autoencoder: Path, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", autoencoder)
    averaged = random_model(7)
    save_snapshot(
        run / SNAPSHOT_FOLDER, 5, PowerEMA(averaged, PowerEMAConfig(widths=(0.15,), snapshot_dtype="float32"))
    )
    wide = ImageSampler(run, SampleOptions(SHORT, ema=0.15, pass_rows=4), device="cpu")
    assert wide.protocol()["ema"] == 0.15
    assert wide.protocol()["model_sha256"] == weights_sha256(averaged)
    assert not torch.equal(wide.draw([0]), images(run, [0]))


def snapshots_at(run: Path, steps: list[int]) -> dict[int, LatentDiffusion]:
    """Write the averages of every step, at the run's own first width, of random weights; return them."""
    kept = {step: random_model(step) for step in steps}
    for step, model in kept.items():
        config = PowerEMAConfig(widths=(0.1,), snapshot_dtype="float32")
        save_snapshot(run / SNAPSHOT_FOLDER, step, PowerEMA(model, config))
    return kept


def test_an_earlier_step_of_a_run_is_sampled_and_guides_and_both_are_recorded(
    autoencoder: Path, tmp_path: Path
) -> None:
    run = write_run(tmp_path / "run", autoencoder)
    kept = snapshots_at(run, [3, 7])
    early = ImageSampler(run, SampleOptions(SHORT, ema_step=3, pass_rows=4), device="cpu")
    record = early.protocol()
    assert record["model_sha256"] == weights_sha256(kept[3])
    assert (record["ema"], record["ema_step"], record["guide_ema"], record["guide_step"]) == (0.1, 3, None, None)
    options = SampleOptions(Sampling("euler", 2, guidance=2.0), guide=run, guide_step=3, pass_rows=4)
    sample(run, tmp_path / "out", [0], options, device="cpu")
    record = json.loads((tmp_path / "out" / "samples.json").read_text())
    assert record["guide_sha256"] == weights_sha256(kept[3]) != record["model_sha256"]
    assert (record["ema_step"], record["guide_ema"], record["guide_step"]) == (None, 0.1, 3)
    assert protocol_differences(record, {**record, "ema_step": 7, "model_sha256": "other"}, "fid") == []


@pytest.mark.parametrize(
    ("steps", "message"), [([], "no EMA snapshots; train with a snapshot_every"), ([3, 7], "give a step from 1 to 7")]
)
def test_a_step_that_is_not_to_be_had_is_one_line(
    autoencoder: Path, tmp_path: Path, steps: list[int], message: str
) -> None:
    run = write_run(tmp_path / "run", autoencoder)
    snapshots_at(run, steps)
    for options in (
        SampleOptions(SHORT, ema_step=8),
        SampleOptions(Sampling("euler", 2, guidance=2.0), guide=run, guide_step=8),
    ):
        with pytest.raises(WavelatentError, match=message) as caught:
            ImageSampler(run, options, device="cpu")
        assert "\n" not in str(caught.value)


def test_the_best_model_can_be_sampled(autoencoder: Path, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", autoencoder)
    with pytest.raises(WavelatentError, match="has no best model yet"):
        ImageSampler(run, SampleOptions(SHORT, ema="best"), device="cpu")
    save_model_folder(random_model(7), run / "best")
    best = ImageSampler(run, SampleOptions(SHORT, ema="best", pass_rows=4), device="cpu")
    assert best.protocol()["ema"] == "best"
    last = ImageSampler(run, SampleOptions(SHORT, pass_rows=4), device="cpu")
    assert not torch.equal(best.draw([0, 1]), last.draw([0, 1]))
    assert [ema_choice(text) for text in ("best", "0.05")] == ["best", 0.05]
    with pytest.raises(UsageError, match="--ema most: give a width"):
        ema_choice("most")


def test_guidance_by_an_output_that_was_never_trained_is_refused(run: Path, with_classes: Path, tmp_path: Path) -> None:
    untrained = tmp_path / "run"
    shutil.copytree(with_classes, untrained)
    config = untrained / "config.yaml"
    config.write_text(config.read_text().replace("label_dropout: 0.1", "label_dropout: 0.0"))
    with pytest.raises(UsageError, match=r"label_dropout 0 .*; give one without classes"):
        ImageSampler(run, SampleOptions(Sampling(guidance=2.0), guide=untrained), device="cpu")
    ImageSampler(run, SampleOptions(Sampling(guidance=2.0), guide=with_classes), device="cpu")
    with pytest.raises(UsageError, match="label_dropout 0"):
        ImageSampler(untrained, SampleOptions(Sampling("euler", 2, guidance=2.0)), device="cpu")


@pytest.mark.parametrize("labelled", [False, True])
def test_the_npz_is_numpys_own_in_the_order_asked_for(
    run: Path, with_classes: Path, tmp_path: Path, labelled: bool
) -> None:
    chosen = with_classes if labelled else run
    seeds = [5, 1, 3]
    sample(chosen, tmp_path, range(6), OPTIONS, device="cpu")
    sample(chosen, tmp_path, seeds, OPTIONS, device="cpu", extras=Extras(npz=tmp_path.parent / f"{labelled}.npz"))
    with np.load(tmp_path.parent / f"{labelled}.npz") as archive:
        assert set(archive) == ({"arr_0", "arr_1"} if labelled else {"arr_0"})
        assert archive["arr_0"].dtype == np.uint8
        assert np.array_equal(archive["arr_0"], np.stack([read(tmp_path / f"{seed:06d}.png") for seed in seeds]))
        if labelled:
            assert archive["arr_1"].tolist() == draw_labels(seeds, CLASSES).tolist()


def test_an_npz_is_written_whole_or_not_at_all(run: Path, tmp_path: Path) -> None:
    out, npz = tmp_path / "samples", tmp_path / "samples.npz"
    sample(run, out, range(3), OPTIONS, device="cpu")
    (out / "000002.png").write_bytes(b"cut off")
    with pytest.raises(WavelatentError, match=r"000002\.png cannot be read"):
        sample(run, out, range(3), OPTIONS, device="cpu", extras=Extras(npz=npz))
    assert [path.name for path in tmp_path.iterdir()] == ["samples"]


def test_contact_sheet_and_interpolation_lie_beside_the_samples(run: Path, tmp_path: Path) -> None:
    sheet = tmp_path / "contact-sheet.png"
    sample(run, tmp_path, range(5), OPTIONS, device="cpu", extras=Extras(contact_sheet=sheet))
    assert read(sheet).shape == (2 * 4 * H + 2, 3 * 4 * W + 4, 3)
    assert np.array_equal(read(sheet)[: 4 * H, 4 * W + 2 : 8 * W + 2], read(tmp_path / "000001.png"))
    for points in (6, 5):
        made = sample(run, tmp_path, [], OPTIONS, device="cpu", extras=Extras(interpolate=(1, 4), points=points))
        assert len(made["interpolation"]) == points + 1
    assert sorted(path.name for path in tmp_path.glob("inter*")) == sorted(made["interpolation"])
    path = [read(tmp_path / f"interpolate-1-4-{number}.png").astype(int) for number in range(5)]
    for end, seed in ((path[0], 1), (path[-1], 4)):
        assert np.abs(end - read(tmp_path / f"{seed:06d}.png")).max() <= 1
    assert all(np.abs(one - other).max() > 1 for one, other in pairwise(path))
    assert len(SampleFolder(tmp_path, None)) == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label": 2}, "classes 0 to 1"),
        ({"pass_rows": 0}, "at least 1 row"),
        ({"guide_ema": 0.1}, "--guide-ema .* --guide RUN"),
        ({"guide_step": 3}, "--guide-step .* --guide RUN"),
        ({"ema": "best", "ema_step": 3}, "--ema-step has no effect on --ema best"),
        ({"guide": Path("somewhere")}, "no effect at guidance 1"),
        ({"tile": 30}, "--tile 30"),
    ],
)
def test_wrong_options_are_usage_errors_that_leave_nothing(
    with_classes: Path, tmp_path: Path, options: dict[str, object], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        sample(with_classes, tmp_path / "out", [0], SampleOptions(**options), device="cpu")  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_guidance_without_classes_and_wrong_seeds_are_usage_errors(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="guidance 2 needs class labels or a weaker model"):
        sample(run, tmp_path / "out", [0], SampleOptions(Sampling(guidance=2.0)), device="cpu")
    with pytest.raises(UsageError, match="give --num N"):
        sample(run, tmp_path / "out", [], OPTIONS, device="cpu", extras=Extras(npz=tmp_path / "x", interpolate=(0, 1)))
    for seed in (-1, 2**63):
        with pytest.raises(UsageError, match=f"seed {seed}:"):
            sample(run, tmp_path / "out", [0, seed], OPTIONS, device="cpu")
    assert not (tmp_path / "out").exists()


def test_a_guide_of_other_latents_leaves_nothing(run: Path, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong"
    shutil.copytree(run, wrong)
    weights = load_file(wrong / "model" / "model.safetensors")
    weights["whitening.scale"] *= 2
    save_file(weights, wrong / "model" / "model.safetensors")
    with pytest.raises(UsageError, match="whitens its latents otherwise"):
        sample(run, tmp_path / "out", [0], SampleOptions(Sampling(guidance=2.0), guide=wrong), device="cpu")
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_said_in_one_line_with_the_file(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("wavelatent.pipelines.sample_folder.save_png", full)
    with pytest.raises(WavelatentError, match=r"00000\d\.png cannot be written \(No space left"):
        sample(run, tmp_path, range(3), OPTIONS, device="cpu")


def test_foreign_folders_are_left_alone(run: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(UsageError, match="not an empty folder"):
        sample(run, tmp_path, [0], OPTIONS, device="cpu", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_folder_that_is_no_run_and_another_autoencoder_are_refused(
    run: Path, autoencoder: Path, tmp_path: Path
) -> None:
    with pytest.raises(WavelatentError, match="not a run folder"):
        sample(tmp_path, tmp_path / "out", [0], device="cpu")
    inputs = json.loads((run / "inputs.json").read_text())
    other = write_run(tmp_path / "other", autoencoder)
    inputs["autoencoder"]["fingerprint"] = "b" * 64
    (other / "inputs.json").write_text(json.dumps(inputs))
    with pytest.raises(WavelatentError, match=r"not the autoencoder that made the latents.*bbbb"):
        sample(other, tmp_path / "out", [0], OPTIONS, device="cpu")


def test_running_out_of_memory_says_what_to_lower(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*arguments: object, **options: object) -> Iterator[None]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("wavelatent.pipelines.sample_images.generate_latents", no_memory)
    with pytest.raises(WavelatentError, match="lower --pass-rows 4"):
        images(run, [0])


def test_a_sample_that_is_not_finite_is_no_black_image(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def diverged(*arguments: Any, **options: Any) -> torch.Tensor:
        return torch.full_like(generate_latents(*arguments, **options), torch.nan)

    monkeypatch.setattr("wavelatent.pipelines.sample_images.generate_latents", diverged)
    with pytest.raises(WavelatentError, match="a sample is not finite"):
        images(run, [0])
