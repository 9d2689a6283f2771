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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from wavelatent.common.errors import WavelatentError

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def _options(*options: Decorator) -> Decorator:
    """Combine several click options into one decorator."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


FOLDER = click.Path(path_type=Path, file_okay=False)
JSON = click.option("--json", "as_json", is_flag=True, help="Print the result on stdout as one JSON object.")
SEED = click.option("--seed", type=int, default=None, help="Seed of everything random.")
OUT = click.option("--out", type=FOLDER, required=True, help="Where to write.")
DATA = click.option(
    "--data", required=True, help="synthetic[:N], an image folder, a prepared folder, or hf:NAME[:SPLIT]."
)
SIZE = click.option("--size", type=click.IntRange(min=8), default=None, help="Image size; the data's own by default.")
BAD = click.option(
    "--max-bad-fraction",
    type=click.FloatRange(0, 1),
    default=0.01,
    show_default=True,
    help="Stop where more of the files than this cannot be used.",
)
MINUTES = click.option("--max-minutes", type=float, default=None, help="Save and exit with code 75 after this long.")
OVERWRITE = click.option("--overwrite", is_flag=True, help="Start again instead of going on.")
BATCH = click.option("--batch-size", type=click.IntRange(min=1), default=None, help="Images at a time.")
DEVICE = _options(
    click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N."),
    click.option(
        "--mixed-precision", type=click.Choice(["no", "bf16", "fp16"]), default="no", show_default=True,
        help="Autocast of the networks.",
    ),
)  # fmt: skip
TRAINING = _options(
    click.argument("config"),
    click.argument("overrides", nargs=-1, metavar="[key=value]..."),
    OUT,
    click.option("--max-steps", type=click.IntRange(min=1), default=None, help="Steps in all, over the config."),
    click.option("--checkpoint-every", type=click.IntRange(min=1), default=None, help="Steps, over the config."),
    click.option("--dry-run", is_flag=True, help="Print the resolved config and stop."),
    MINUTES,
    OVERWRITE,
    BATCH,
    SEED,
    DEVICE,
    JSON,
)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("--debug", is_flag=True, help="Show the traceback of an error (put it before the command).")
def cli(debug: bool) -> None:
    """Latent diffusion with a swappable autoencoder: train one, cache its latents, train a denoiser, measure both."""


def _training_overrides(
    overrides: tuple[str, ...], *, max_steps: int | None, checkpoint_every: int | None, batch_size: int | None,
    seed: int | None,
) -> list[str]:  # fmt: skip
    """Return the config overrides with those that have an option of their own."""
    given = {
        "train.steps": max_steps,
        "train.checkpoint_every": checkpoint_every,
        "train.batch_size": batch_size,
        "seed": seed,
    }
    return [*overrides, *(f"{key}={value}" for key, value in given.items() if value is not None)]


def _emit(result: Any, as_json: bool, text: str) -> None:
    """Print ``result`` as JSON, or ``text``."""
    click.echo(json.dumps(result, indent=2) if as_json else text)


@cli.command("train-ae")
@TRAINING
@DATA
@SIZE
@BAD
def train_ae(
    config: str, overrides: tuple[str, ...], out: Path, max_steps: int | None, checkpoint_every: int | None,
    dry_run: bool, max_minutes: float | None, overwrite: bool, batch_size: int | None, seed: int | None, device: str,
    mixed_precision: Any, as_json: bool, data: str, size: int | None, max_bad_fraction: float,
) -> None:  # fmt: skip
    """Stage 1: train the autoencoder of CONFIG (a preset or a YAML file)."""
    from wavelatent.common.config import dump_yaml, load_config
    from wavelatent.common.images import open_data
    from wavelatent.common.runtime import RuntimeOptions
    from wavelatent.pipelines.run_config import AutoencoderRunConfig
    from wavelatent.pipelines.train_autoencoder import train_autoencoder

    all_overrides = _training_overrides(
        overrides, max_steps=max_steps, checkpoint_every=checkpoint_every, batch_size=batch_size, seed=seed
    )
    resolved = load_config(AutoencoderRunConfig, config, all_overrides)
    if dry_run:
        _emit(resolved.model_dump(mode="json"), as_json, dump_yaml(resolved).rstrip())
        return
    options = RuntimeOptions(device, mixed_precision, max_minutes, overwrite)
    images = open_data(data, size=size, max_bad_fraction=max_bad_fraction)
    trained = train_autoencoder(resolved, data=images, out=out, options=options)
    _emit_run(out, trained, as_json)


def _emit_run(out: Path, trained: bool, as_json: bool) -> None:
    status = json.loads((out / "status.json").read_text(encoding="utf-8"))
    text = (
        f"{out}: {'done' if trained else 'was finished already'} ({status['step']} steps); the model is in {out}/model"
    )
    _emit({"run": str(out), "already_finished": not trained, **status}, as_json, text)


def main() -> None:
    """Run the command line; an expected failure is one line on stderr and its exit code."""
    debug = "--debug" in sys.argv
    try:
        cli.main(args=[a for a in sys.argv[1:] if a != "--debug"], prog_name="wavelatent", standalone_mode=False)
    except click.exceptions.Exit as exit_:
        sys.exit(exit_.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except click.Abort:
        click.echo("aborted", err=True)
        sys.exit(1)
    except WavelatentError as error:
        if debug:
            raise
        click.echo(f"{'stopped' if error.exit_code == 75 else 'error'}: {error}", err=True)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
