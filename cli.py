"""The command line: one command per pipeline, no logic. ``wavelatent --help`` lists them."""

import sys

if "wavelatent" not in sys.modules and __package__ in (None, ""):
    # Run as a file, or imported by the tests from a bare checkout: this folder is the namespace ``wavelatent``.
    from importlib.machinery import ModuleSpec
    from importlib.util import module_from_spec
    from pathlib import Path

    _spec = ModuleSpec("wavelatent", None, is_package=True)
    _spec.submodule_search_locations = [str(Path(__file__).resolve().parent)]
    sys.modules["wavelatent"] = module_from_spec(_spec)

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from wavelatent.common.errors import Stopped, UsageError, WavelatentError

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def _options(*options: Decorator) -> Decorator:
    """Combine several click options into one decorator."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


FOLDER = click.Path(path_type=Path, file_okay=False)
FILE = click.Path(path_type=Path, dir_okay=False)
MAX_SEEDS = 10_000_000
JSON = click.option("--json", "as_json", is_flag=True, help="Print the result on stdout as one JSON object.")
SEED = click.option("--seed", type=int, default=None, help="Seed of everything random.")
NO_SEED = click.option(
    "--seed", type=int, default=None, expose_value=False, help="Accepted everywhere; nothing is random here."
)
NO_NETWORKS = _options(
    NO_SEED,
    *(
        click.option(name, default=None, expose_value=False, hidden=True)  # accepted everywhere, of no use here
        for name in ("--device", "--mixed-precision", "--batch-size")
    ),
)
OUT = click.option("--out", type=FOLDER, required=True, help="Where to write.")
AE = click.option(
    "--ae", required=True, help="The autoencoder: a run folder, a saved model folder, or diffusers:FOLDER_OR_HUB_ID."
)
TILE = click.option(
    "--tile", type=click.IntRange(min=1), default=None,
    help="Work in tiles of so many pixels, for images that do not fit in memory.",
)  # fmt: skip
DATA = click.option(
    "--data", required=True, help="synthetic[:N], an image folder, a prepared folder, or hf:NAME[:SPLIT]."
)
SIZE = click.option("--size", type=click.IntRange(min=8), default=None, help="Image size; the data's own by default.")
BAD = click.option(
    "--max-bad-fraction", type=click.FloatRange(0, 1), default=0.01, show_default=True,
    help="Stop where more of the files than this cannot be used.",
)  # fmt: skip
MINUTES = click.option(
    "--max-minutes", type=click.FloatRange(min=0), default=None, help="Save and exit with code 75 after this long."
)
OVERWRITE = click.option("--overwrite", is_flag=True, help="Start again instead of going on.")
BATCH = click.option("--batch-size", type=click.IntRange(min=1), default=None, help="Images at a time.")
DEVICE = _options(
    click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N."),
    click.option(
        "--mixed-precision", type=click.Choice(["no", "bf16", "fp16"]), default="no", show_default=True,
        help="Autocast of the networks.",
    ),
)  # fmt: skip
TRUST = _options(
    click.option(
        "--intervals/--no-intervals", default=True, show_default=True,
        help="Give 95 % intervals, and the Fréchet distance without the bias of few images.",
    ),
    click.option(
        "--dinov2", default=None, metavar="FOLDER_OR_ID", help="Also measure with this DINOv2: facebook/dinov2-large."
    ),
)  # fmt: skip
SAMPLER = _options(
    click.option("--sampler", default=None, help="dpmpp_2m (default), dpmpp_2m_sde, heun, euler, ..."),
    click.option("--steps", type=click.IntRange(min=1), default=None, help="Noise levels (default 20)."),
    click.option("--grid", default=None, help="Their spacing: karras (default), exponential, uniform, shifted."),
    click.option("--rho", type=float, default=None, help="Exponent of the karras grid (7)."),
    click.option("--grid-shift", type=float, default=None, help="Factor on the levels of the shifted grid."),
    click.option("--eta", type=float, default=None, help="Share of noise that ddim and dpmpp_2m_sde draw anew."),
    click.option("--churn", type=float, default=None, help="S_churn of heun; 0 (default) draws no noise."),
    click.option("--churn-min", type=float, default=None, help="Lowest noise level with churn."),
    click.option("--churn-max", type=float, default=None, help="Highest noise level with churn."),
    click.option("--churn-noise", type=float, default=None, help="Scale of the noise of churn (1)."),
    click.option("--guidance", type=float, default=None, help="Weight of guidance; 1 (default) is none."),
    click.option(
        "--guidance-interval", type=float, nargs=2, default=None, metavar="LOW HIGH",
        help="Noise levels within which guidance acts; all by default.",
    ),
    click.option("--guide", type=FOLDER, default=None, help="Autoguidance by this weaker run."),
    click.option("--guide-ema", default=None, metavar="WIDTH|best", help="As --ema, of the weaker run."),
    click.option("--guide-step", type=click.IntRange(min=1), default=None, help="As --ema-step, of the weaker run."),
    click.option(
        "--ema", default=None, metavar="WIDTH|best",
        help="EMA width, or the best when measured in training; the last of the first width by default.",
    ),
    click.option(
        "--ema-step", type=click.IntRange(min=1), default=None,
        help="Training step of that average, from the snapshots in the run's ema/; the last by default.",
    ),
    click.option("--label", type=click.IntRange(min=0), default=None, help="The class of every image."),
    click.option(
        "--pass-rows", type=click.IntRange(min=1), default=None,
        help="Images per pass of the networks (16); part of what decides an image's last bits.",
    ),
    TILE,
)  # fmt: skip
TRAINING = _options(
    click.argument("config"),
    click.argument("overrides", nargs=-1, metavar="[key=value]..."),
    OUT,
    click.option("--max-steps", type=click.IntRange(min=1), default=None, help="Steps in all, over the config."),
    click.option("--checkpoint-every", type=click.IntRange(min=1), default=None, help="Steps, over the config."),
    click.option("--dry-run", is_flag=True, help="Print the resolved config and stop."),
    click.option("--batch-size", type=click.IntRange(min=1), default=None, help="Images per step, over the config."),
    MINUTES,
    OVERWRITE,
    SEED,
    DEVICE,
    JSON,
)
CELLS = _options(
    click.option(
        "--shard",
        default="0/1",
        show_default=True,
        help="Work on every n-th cell (of study: on the cells of every n-th autoencoder) from the i-th on: i/n.",
    ),
    MINUTES,
    BATCH,
    DEVICE,
    click.option("--seed", type=int, default=None, help="This one only, over the config's seeds."),
    JSON,
)


def _given(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments that were given, so that a function's own defaults hold for the others."""
    return {name: value for name, value in arguments.items() if value is not None}


def _emit(result: Any, as_json: bool, text: str) -> None:
    """Print ``result`` as JSON, or ``text``; of several processes, the first."""
    if os.environ.get("RANK", "0") != "0":
        return
    click.echo(json.dumps(result, indent=2, default=str) if as_json else text)


def _resolve(model: Any, arguments: dict[str, Any]) -> Any:
    """Take CONFIG, its overrides and the options over it out of ``arguments``; return the resolved config."""
    from wavelatent.common.config import load_config

    over = {
        "train.steps": arguments.pop("max_steps"),
        "train.checkpoint_every": arguments.pop("checkpoint_every"),
        "train.batch_size": arguments.pop("batch_size"),
        "seed": arguments.pop("seed"),
    }
    overrides = [*arguments.pop("overrides"), *(f"{key}={value}" for key, value in _given(over).items())]
    return load_config(model, arguments.pop("config"), overrides)


def _dry_run(config: Any, as_json: bool) -> None:
    from wavelatent.common.config import dump_yaml

    _emit(config.model_dump(mode="json"), as_json, dump_yaml(config).rstrip())


def _runtime(arguments: dict[str, Any]) -> Any:
    from wavelatent.common.runtime import RuntimeOptions

    return RuntimeOptions(**{k: arguments.pop(k) for k in ("device", "mixed_precision", "max_minutes", "overwrite")})


def _emit_run(out: Path, trained: bool, as_json: bool) -> None:
    status = json.loads((out / "status.json").read_text(encoding="utf-8"))
    state = "done" if trained else "was finished already"
    text = f"{out}: {state} ({status['step']} steps); the model is in {out / 'model'}"
    _emit({"run": str(out), "already_finished": not trained, **status}, as_json, text)


def _emit_metrics(result: Any, as_json: bool) -> None:
    from wavelatent.pipelines.evaluation_text import describe, paper_line

    _emit({**result.to_dict(), "paper_line": paper_line(result)}, as_json, describe(result))


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("--debug", is_flag=True, help="Show the traceback of an error; may stand anywhere.")
def cli(debug: bool) -> None:
    """Latent diffusion with a swappable autoencoder: train one, cache its latents, train a denoiser, measure both."""


@cli.command()
@DATA
@click.option("--size", type=click.IntRange(min=8), required=True, help="Side of the images in pixels.")
@OUT
@click.option("--filter", "resize_filter", default=None, help="Resampling: lanczos (default), bicubic, box, ...")
@click.option("--max-images", type=click.IntRange(min=1), default=None, help="Look at the first so many only.")
@click.option("--streaming", is_flag=True, help="Read an hf: data set as a stream.")
@click.option("--num-workers", type=click.IntRange(min=0), default=None, help="Processes that decode.")
@BAD
@OVERWRITE
@NO_NETWORKS
@JSON
def prepare(as_json: bool, **arguments: Any) -> None:
    """Decode, crop and resize a data set once, recording how."""
    from wavelatent.pipelines.prepare import prepare as run

    result = run(**_given(arguments))
    text = f"{result['out']}: {result['count']} images of {result['size']} px ({result['state']})"
    _emit(result, as_json, text)


@cli.command("train-ae")
@TRAINING
@DATA
@SIZE
@BAD
def train_ae(
    out: Path, dry_run: bool, as_json: bool, data: str, size: int | None, max_bad_fraction: float, **arguments: Any
) -> None:
    """Stage 1: train the autoencoder of CONFIG (a preset's name or a YAML file)."""
    from wavelatent.common.images import open_data
    from wavelatent.pipelines.run_config import AutoencoderRunConfig
    from wavelatent.pipelines.train_autoencoder import train_autoencoder

    config = _resolve(AutoencoderRunConfig, arguments)
    if dry_run:
        return _dry_run(config, as_json)
    images = open_data(data, size=size, max_bad_fraction=max_bad_fraction)
    trained = train_autoencoder(config, data=images, out=out, options=_runtime(arguments))
    return _emit_run(out, trained, as_json)


@cli.command()
@AE
@DATA
@OUT
@SIZE
@BAD
@click.option("--flips", is_flag=True, help="Cache the mirror images too, re-encoded.")
@click.option("--dtype", type=click.Choice(["float32", "float16"]), default=None, help="Of the cache.")
@click.option("--shard-size", type=click.IntRange(min=1), default=None, help="Images per shard.")
@TILE
@MINUTES
@OVERWRITE
@BATCH
@NO_SEED
@DEVICE
@JSON
def encode(as_json: bool, **arguments: Any) -> None:
    """Write the latents of a data set into a verified cache."""
    from wavelatent.pipelines.encode import encode as run

    result = run(**_given(arguments))
    state = "was complete already" if result["already_complete"] else "done"
    _emit(result, as_json, f"{result['cache']}: {result['count']} latents of shape {result['shape']} ({state})")


@cli.command("train-diffusion")
@TRAINING
@click.option("--latents", type=FOLDER, required=True, help="The latent cache that encode wrote.")
def train_diffusion(out: Path, dry_run: bool, as_json: bool, latents: Path, **arguments: Any) -> None:
    """Stage 2: train the denoiser of CONFIG (a preset's name or a YAML file) on cached latents."""
    from wavelatent.pipelines.diffusion_config import DiffusionRunConfig
    from wavelatent.pipelines.train_diffusion import train_diffusion as run

    config = _resolve(DiffusionRunConfig, arguments)
    if dry_run:
        return _dry_run(config, as_json)
    trained = run(config, latents=latents, out=out, options=_runtime(arguments))
    return _emit_run(out, trained, as_json)


def _seeds(text: str) -> list[int]:
    """Parse ``0-49999`` or ``1,5,7-9``."""
    try:
        parts = [part.partition("-") for part in text.split(",")]
        ranges = [range(int(low), int(high if dash else low) + 1) for low, dash, high in parts]
    except ValueError as error:
        raise UsageError(f"--seeds {text}: give a range as in 0-49999, or a list as in 1,5,7-9") from error
    if (count := sum(max(0, part.stop - part.start) for part in ranges)) > MAX_SEEDS:
        raise UsageError(f"--seeds {text}: these are {count:,}; give at most {MAX_SEEDS:,} at a time")
    seeds = [seed for part in ranges for seed in part]
    if not seeds or len(set(seeds)) < len(seeds):
        raise UsageError(f"--seeds {text}: the range is empty or names a seed twice")
    return seeds


@cli.command()
@click.option("--run", type=FOLDER, required=True, help="Run folder of train-diffusion.")
@OUT
@click.option(
    "--num", type=click.IntRange(1, MAX_SEEDS), default=None, help="How many images, with seeds from --seed on."
)
@click.option("--seeds", default=None, help="Their seeds: 0-49999 or 1,5,7-9.")
@SAMPLER
@click.option("--npz", type=FILE, default=None, help="Write them as one .npz, as ADM's evaluation reads it.")
@click.option(
    "--contact-sheet",
    is_flag=False,
    flag_value="",
    default=None,
    metavar="[FILE]",
    help="Write the first 64 as one PNG; contact-sheet.png by default.",
)
@click.option(
    "--interpolate", type=click.IntRange(min=0), nargs=2, default=None, metavar="A B", help="From seed A to B."
)
@click.option("--points", type=click.IntRange(min=2), default=None, help="Images of the interpolation (8).")
@click.option("--ae", "autoencoder", default=None, help="The recorded autoencoder, where it has moved.")
@MINUTES
@OVERWRITE
@click.option("--batch-size", type=click.IntRange(min=1), default=None, help="Images between two writes.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="The first seed of --num.")
@DEVICE
@JSON
def sample(
    as_json: bool, num: int | None, seeds: str | None, seed: int, contact_sheet: str | None, **arguments: Any
) -> None:
    """Draw latents, decode them and write <seed>.png."""
    from wavelatent.pipelines.sample import Extras
    from wavelatent.pipelines.sample import sample as run
    from wavelatent.pipelines.sample_images import take_options

    interpolate = arguments.pop("interpolate")
    if (num is None) == (seeds is None) and not (interpolate and num is None):
        raise UsageError("give either --num N or --seeds A-B")
    chosen = _seeds(seeds) if seeds is not None else list(range(seed, seed + (num or 0)))
    options = take_options(arguments)
    extras = {name: arguments.pop(name) for name in ("npz", "points")}
    if contact_sheet is not None:
        extras["contact_sheet"] = Path(contact_sheet or arguments["out"] / "contact-sheet.png")
    result = run(
        seeds=chosen, options=options, extras=Extras(interpolate=interpolate, **_given(extras)), **_given(arguments)
    )
    lines = [f"{result['samples']}: {result['count']} samples ({result['written']} new)"]
    lines += [f"{name}: {result[name]}" for name in ("npz", "contact_sheet") if name in result]
    lines += [f"interpolation: {len(result['interpolation']) - 1} images"] if interpolate else []
    _emit(result, as_json, "\n".join(lines))


@cli.group()
def evaluate() -> None:
    """Measure an autoencoder's reconstructions, or generated images."""


@evaluate.command()
@AE
@DATA
@SIZE
@BAD
@click.option("--out", type=click.Path(path_type=Path), default=None, help="Folder for metrics.json.")
@click.option("--num-images", type=click.IntRange(min=1), default=None, help="How many images; all by default.")
@click.option("--lpips-net", type=click.Choice(["alex", "vgg"]), default=None, help="alex by default.")
@TRUST
@TILE
@OVERWRITE
@BATCH
@SEED
@DEVICE
@JSON
def reconstruction(as_json: bool, **arguments: Any) -> None:
    """RFID, PSNR, SSIM and LPIPS of an autoencoder on a data set, with intervals, for each image, and the worst."""
    from wavelatent.pipelines.evaluate import evaluate_reconstruction

    _emit_metrics(evaluate_reconstruction(**_given(arguments)), as_json)


@evaluate.command()
@click.option("--samples", type=click.Path(path_type=Path), default=None, help="A folder of samples, or an .npz.")
@click.option("--run", type=FOLDER, default=None, help="A run of train-diffusion, sampled in memory.")
@click.option("--num", type=click.IntRange(min=1), default=None, help="How many samples.")
@click.option(
    "--data", required=True, help="As elsewhere, or an .npz of ADM's evaluation: images, or their mu and sigma."
)
@SIZE
@BAD
@SAMPLER
@click.option("--ae", "autoencoder", default=None, help="The recorded autoencoder, where it has moved.")
@click.option("--num-reference", type=click.IntRange(min=1), default=None, help="Reference images; all by default.")
@click.option("--reference-seed", type=int, default=None, help="Draws the order of the reference images (0).")
@TRUST
@click.option("--out", type=click.Path(path_type=Path), default=None, help="Folder for metrics.json.")
@OVERWRITE
@BATCH
@click.option("--seed", type=int, default=None, help="The first seed that a run is sampled with (0).")
@DEVICE
@JSON
def generation(as_json: bool, **arguments: Any) -> None:
    """FID, KID, precision, recall, density and coverage of samples against a data set, with intervals."""
    from wavelatent.pipelines.evaluate import evaluate_generation
    from wavelatent.pipelines.sample_images import take_options

    options = take_options(arguments)
    _emit_metrics(evaluate_generation(options=options, **_given(arguments)), as_json)


@cli.command()
@AE
@DATA
@OUT
@SIZE
@BAD
@click.option("--num-images", type=click.IntRange(min=1), default=None, help="How many images; 2,000 by default.")
@click.option("--skip", multiple=True, metavar="SECTION", help="Leave this section out; may be given again.")
@click.option("--only", multiple=True, metavar="SECTION", help="Compute this section only; may be given again.")
@OVERWRITE
@BATCH
@SEED
@DEVICE
@JSON
def diagnose(as_json: bool, **arguments: Any) -> None:
    """Write the latent health report: whether these latents are fit for diffusion.

    The sections are scale, posterior, gaussianity, correlation, spectrum, equivariance, robustness, locality, geometry,
    reconstruction and learnability. The last trains a small denoiser and takes a minute or more; --skip learnability
    leaves it out.
    """
    from wavelatent.pipelines.diagnose import diagnose as run
    from wavelatent.pipelines.diagnose import summary_lines

    result = run(**_given(arguments))
    _emit(result, as_json, "\n".join(summary_lines(result)))


def _shard(text: str) -> tuple[int, int]:
    """Parse ``i/n``."""
    try:
        index, count = (int(part) for part in text.split("/"))
    except ValueError as error:
        raise UsageError(f"--shard {text}: give which of how many, as in 0/4") from error
    return index, count


@cli.command()
@click.argument("config")
@click.argument("overrides", nargs=-1, metavar="[key=value]...")
@DATA
@click.option("--eval-data", required=True, help="The images that are reconstructed and measured.")
@OUT
@click.option("--dry-run", is_flag=True, help="List the cells and stop.")
@CELLS
def ablate(
    config: str, overrides: tuple[str, ...], shard: str, out: Path, seed: int | None, as_json: bool, **arguments: Any
) -> None:
    """Train variants x seeds of stage 1 under one recipe (a preset ablation-* or a YAML file) and tabulate them."""
    from wavelatent.common.config import load_config
    from wavelatent.pipelines.ablate import ablate as run
    from wavelatent.pipelines.ablate import describe
    from wavelatent.pipelines.ablate_config import AblationConfig

    ablation = load_config(AblationConfig, config, [*overrides, *([] if seed is None else [f"seeds=[{seed}]"])])
    arguments["overwrite"] = False
    options = _runtime(arguments)
    result = run(ablation, out=out, options=options, shard=_shard(shard), **_given(arguments))
    _emit(result, as_json, describe(result))


@cli.command()
@click.argument("config")
@click.argument("overrides", nargs=-1, metavar="[key=value]...")
@OUT
@click.option("--data", default=None, help="The images to train on, over the config's data.train.")
@click.option("--eval-data", default=None, help="The images to measure on, over the config's data.validation.")
@click.option("--dry-run", is_flag=True, help="List the cells with the time and the disk they will take, and stop.")
@click.option("--report-only", is_flag=True, help="Train nothing; report what is finished.")
@click.option(
    "--photographs/--no-photographs",
    default=True,
    show_default=True,
    help="Show reconstructions beside the images themselves in the report.",
)
@CELLS
def study(
    config: str,
    overrides: tuple[str, ...],
    data: str | None,
    eval_data: str | None,
    seed: int | None,
    shard: str,
    as_json: bool,
    **arguments: Any,
) -> None:
    """Train variants x seeds through both stages (a preset study-* or a YAML file), compare and report them.

    Run it again to go on; a second process with the same --out shares the work.
    """
    from wavelatent.common.config import load_config
    from wavelatent.pipelines.study import describe
    from wavelatent.pipelines.study import study as run
    from wavelatent.pipelines.study_config import StudyConfig

    over = _given({"data.train": data, "data.validation": eval_data, "seeds": None if seed is None else [seed]})
    given = [f"{key}={json.dumps(value)}" for key, value in over.items()]  # JSON is YAML, whatever is in a path
    study_config = load_config(StudyConfig, config, [*overrides, *given])
    arguments["overwrite"] = False
    result = run(study_config, options=_runtime(arguments), shard=_shard(shard), **_given(arguments))
    _emit(result, as_json, describe(result))


@cli.command()
@AE
@OUT
@click.option("--latents", type=FOLDER, default=None, help="A latent cache of it, for the model's normalisation.")
@OVERWRITE
@NO_NETWORKS
@JSON
def export(as_json: bool, **arguments: Any) -> None:
    """Write an autoencoder as a diffusers model folder."""
    from wavelatent.pipelines.export import export as run

    result = run(**_given(arguments))
    _emit(result, as_json, f"{result['model']}: {result['class']} of {result['parameters']:,} parameters")


def _run_bench(bench: Any, describe: Any, precision: str | None, as_json: bool, arguments: dict[str, Any]) -> None:
    given = {name: value for name, value in _given(arguments).items() if value != ()}
    if precision is not None:
        given["precisions"] = ["fp32" if precision == "no" else precision]
    result = bench(**given)
    _emit(result, as_json, describe(result))


@cli.group()
def bench() -> None:
    """Measure speed and memory side by side with the peers."""


@bench.command("autoencoder")
@click.option("--size", type=click.IntRange(min=32), default=None, help="Side of the images in pixels (256).")
@click.option(
    "--model", "models", multiple=True, help="Only this one, and the peer; may be given again. All by default."
)
@click.option(
    "--mixed-precision", "precision", type=click.Choice(["no", "bf16"]), default=None, help="One only; both by default."
)
@click.option("--repeats", type=click.IntRange(min=1), default=None, help="Rounds over all models.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), default=None, help="File for the JSON.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@BATCH
@NO_SEED
@JSON
def bench_autoencoder(precision: str | None, as_json: bool, **arguments: Any) -> None:
    """Measure encoding and decoding, speed and memory, beside diffusers' AutoencoderKL, in one run."""
    from wavelatent.pipelines.bench import bench_autoencoder as run
    from wavelatent.pipelines.bench import describe

    _run_bench(run, describe, precision, as_json, arguments)


@bench.command("diffusion")
@click.option("--size", type=click.IntRange(min=1), default=None, help="Side of the latents (16 for unet-tiny, or 32).")
@click.option("--model", "models", multiple=True, help="Preset; may be given again. unet-tiny and unet-s by default.")
@click.option("--num-steps", type=click.IntRange(min=1), default=None, help="Heun steps of a sample (4).")
@click.option(
    "--mixed-precision", "precision", type=click.Choice(["no", "bf16"]), default=None, help="One only; both by default."
)
@click.option("--repeats", type=click.IntRange(min=1), default=None, help="Rounds over all networks.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), default=None, help="File for the JSON.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@BATCH
@NO_SEED
@JSON
def bench_diffusion(precision: str | None, as_json: bool, **arguments: Any) -> None:
    """Measure training steps and sampling, speed and memory, beside diffusers' UNet2DModel, in one run."""
    from wavelatent.pipelines.bench_diffusion import bench_diffusion as run
    from wavelatent.pipelines.bench_diffusion import describe

    _run_bench(run, describe, precision, as_json, arguments)


@cli.command()
@click.option("--fetch", is_flag=True, help="Get the metric weights that are missing.")
@NO_NETWORKS
@JSON
def doctor(as_json: bool, fetch: bool) -> None:
    """Versions, devices, and which metric weights are present."""
    from wavelatent.pipelines.doctor import describe
    from wavelatent.pipelines.doctor import doctor as run

    result = run(fetch=fetch)
    _emit(result, as_json, describe(result))


@cli.command()
@click.argument("runs", nargs=-1, required=True, type=FOLDER)
@OUT
@click.option("--data", default=None, help="Reconstruct images of this data set instead of showing saved grids.")
@BAD
@click.option("--title", default=None, help="Heading of the page.")
@NO_NETWORKS
@JSON
def report(as_json: bool, **arguments: Any) -> None:
    """Write a comparison page of any finished runs, and of folders of samples beside the runs they were drawn from."""
    from wavelatent.pipelines.report import report as run

    page = run(**_given(arguments))
    _emit({"report": str(page)}, as_json, f"report: {page}")


@cli.command()
@click.argument("source", metavar="CONFIG|RUN")
@click.argument("overrides", nargs=-1, metavar="[key=value]...")
@SIZE
@click.option("--latent-shape", type=int, nargs=3, default=None, metavar="C H W", help="For a stage-2 config.")
@NO_NETWORKS
@JSON
def info(as_json: bool, **arguments: Any) -> None:
    """Count parameters per part, the latent shape and FLOPs per image."""
    from wavelatent.pipelines.info import info as run

    result = run(**_given(arguments))
    _emit(result, as_json, "\n".join(_lines(result)))


def _lines(result: dict[str, Any], prefix: str = "") -> list[str]:
    """Return ``dotted.key: value`` for every value of nested dictionaries."""
    lines = []
    for key, value in result.items():
        inner = isinstance(value, dict)
        lines += _lines(value, f"{prefix}{key}.") if inner else [f"{prefix}{key}: {_number(value)}"]
    return lines


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


@cli.command()
@click.option("--out", type=FOLDER, default=Path("demo"), show_default=True, help="Where to write.")
@NO_NETWORKS
@JSON
def demo(out: Path, as_json: bool) -> None:
    """Run the whole pipeline on the built-in synthetic faces, on a CPU, in minutes; ends with a report."""
    from wavelatent.pipelines.demo import demo as run

    page = run(out)
    _emit({"report": str(page)}, as_json, f"report: {page}")


def main() -> None:
    """Run the command line; an expected failure is one line on stderr and its exit code."""
    debug = "--debug" in sys.argv
    signal.signal(signal.SIGTERM, _interrupt)  # until a command can save what it does and takes the signal itself
    try:
        cli.main(args=[a for a in sys.argv[1:] if a != "--debug"], prog_name="wavelatent", standalone_mode=False)
    except click.exceptions.Exit as exit_:
        sys.exit(exit_.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("stopped: nothing unsaved was under way; run the same command again", err=True)
        sys.exit(Stopped.exit_code)
    except Exception as error:
        if debug:
            raise
        text = _in_one_line(error)
        says_so = isinstance(error, Stopped) and text.startswith("stopped")
        click.echo(text if says_so else f"{'stopped' if isinstance(error, Stopped) else 'error'}: {text}", err=True)
        sys.exit(getattr(error, "exit_code", 1))


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _in_one_line(error: Exception) -> str:
    """Say what went wrong, and what to do about it, in one line."""
    text = " ".join(str(error).split())
    if isinstance(error, WavelatentError):
        return text
    if type(error).__name__ == "OutOfMemoryError":
        return f"out of memory: lower --batch-size, or raise train.gradient_accumulation ({text})"
    if isinstance(error, OSError):
        return text
    return f"{type(error).__name__}: {text} (unexpected: put --debug before the command for the traceback)"


if __name__ == "__main__":
    main()
