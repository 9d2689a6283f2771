"""The run folder: the contract of a training run with users and other programs.

``config.yaml``, ``environment.json``, ``inputs.json``, ``metrics.jsonl``, ``events.jsonl`` (where there are any),
``tensorboard/``, ``checkpoints/``, ``samples/``, ``model/`` and ``status.json``; of stage two also ``best/`` (the model
folder of the best measurement so far) and ``ema/`` (snapshots of the averaged weights).
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout
from pydantic import BaseModel

from .checkpoints import latest_checkpoint, replace_folder, write_json
from .config import dump_yaml, parse_yaml
from .errors import Stopped, UsageError
from .files import write_atomically
from .runtime import environment, peak_memory_bytes

if TYPE_CHECKING:
    from huggingface_hub import PyTorchModelHubMixin

MAY_CHANGE = {
    "train.steps",
    "train.log_every",
    "train.checkpoint_every",
    "train.sample_every",
    "train.keep",
    "train.num_workers",
    "train.num_samples",
    "train.sample_steps",
    "train.gradient_checkpointing",
    "train.compile",
    "train.channels_last",
    "train.ema.snapshot_every",
    "train.quick_evaluation.every",
    "train.quick_evaluation.batch_size",
    "train.validation.every",
}
"""Settings that a resumed run may be given anew: how long it goes on, how it reads and computes, and when and what it
shows."""

CONTENTS = (
    "checkpoints",
    "environment.json",
    "metrics.jsonl",
    "events.jsonl",
    "status.json",
    "best",
    "ema",
    "evaluation-generation",
    "evaluation-reconstruction",
    "model",
    "samples",
    "tensorboard",
    "config.yaml",
    "inputs.json",
)
"""What ``--overwrite`` removes from a run folder, in this order; whatever else lies there is not ours.

Where that is cut short, what is left has no checkpoint to go on from, and is known as a run to the end.
"""


class RunFolder:
    """One run on disk. Every process may hold one; only the main process writes.

    Building it checks that the folder is free, or holds the same run; nothing is written, and with ``overwrite``
    nothing deleted, before :meth:`begin`, so that what fails in between (a size that does not divide) leaves no trace.

    Args:
        path: the folder.
        config: the run's resolved configuration.
        identity: what names its inputs, for ``inputs.json``: its ``kind`` (the stage), and keys that end in
            ``fingerprint``, which must not change.
        overwrite: start again, whatever run of ours is there.
        is_main: whether this process writes.

    Raises :class:`UsageError` where the folder holds something else, naming the setting that differs.
    """

    def __init__(
        self,
        path: Path,
        config: BaseModel,
        identity: Mapping[str, Any],
        *,
        overwrite: bool = False,
        is_main: bool = True,
    ) -> None:
        self.path, self.config, self.identity = path, config, identity
        self.overwrite, self.is_main = overwrite, is_main
        self._writer: Any = None
        self._lock = FileLock(path / ".lock", timeout=0)
        self._state: dict[str, Any] = {}
        self._refuse_foreign()
        if self.checkpoint is not None:
            self._check_same()

    @property
    def checkpoint(self) -> Path | None:
        """The checkpoint to go on from, or None to start at the beginning."""
        return None if self.overwrite else latest_checkpoint(self.path)

    def begin(self, **session: Any) -> None:
        """Create the folder, record what runs, and cut from the log what came after the checkpoint.

        ``session`` is what else ``environment.json`` is to say of this session: settings that the configuration does
        not hold and that another session may have otherwise, such as the precision.

        Raises :class:`UsageError` where another process is training this run.
        """
        if not self.is_main:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire()
        except Timeout as error:
            raise UsageError(f"{self.path}: another process is training this run; wait for it, or stop it") from error
        checkpoint = self.checkpoint
        if self.overwrite:
            self._remove_contents()
        write_json(self.path / "inputs.json", self.identity)
        write_atomically(self.path / "config.yaml", dump_yaml(self.config))
        self._record_environment(session)
        step = int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0
        for log in ("metrics.jsonl", "events.jsonl"):
            self._cut_log(self.path / log, step)
        if self._best().get("step", 0) > step:  # it will be measured, and kept, again
            shutil.rmtree(self.path / "best")

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """Close; a run that an error ended, other than a request to stop, says so in its status."""
        if kind is not None and not issubclass(kind, Stopped) and self._state:
            self.set_status("failed", self._state["step"], self._state["of"])
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        self._lock.release()

    def _refuse_foreign(self) -> None:
        """Never write into, or delete from, a folder that is not a run of this kind."""
        path = self.path
        if path.is_file():
            raise UsageError(f"{path} is a file; --out takes a folder")
        if not path.is_dir() or not any(child.name != ".lock" for child in path.iterdir()):
            return
        try:
            kind = json.loads((path / "inputs.json").read_text(encoding="utf-8"))["kind"]
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise UsageError(f"{path} is not empty and not a run folder; give another --out") from error
        if kind != self.identity["kind"]:
            raise UsageError(f"{path} holds a run of another stage ({kind}); give another --out")

    def _remove_contents(self) -> None:
        for name in CONTENTS:
            target = self.path / name
            if target.is_dir() and not target.is_symlink():
                shutil.rmtree(target)
            else:
                target.unlink(missing_ok=True)

    def _check_same(self) -> None:
        old = parse_yaml((self.path / "config.yaml").read_text(encoding="utf-8"), str(self.path / "config.yaml"))
        new = self.config.model_dump(mode="json")
        old_inputs = json.loads((self.path / "inputs.json").read_text(encoding="utf-8"))
        differing = [key for key in _differences(old, new) if key not in MAY_CHANGE]
        differing += [key for key in _differences(old_inputs, dict(self.identity)) if key.endswith("fingerprint")]
        if differing:
            raise UsageError(
                f"{self.path} holds a run with another {', '.join(differing)}; "
                "give another --out, or --overwrite to start again"
            )

    def _record_environment(self, session: Mapping[str, Any]) -> None:
        file = self.path / "environment.json"
        now = {**environment(), **session}
        if file.exists():
            first = json.loads(file.read_text(encoding="utf-8"))
            now = {**first, "resumed": [*first.get("resumed", []), now]}
        write_json(file, now)

    def _cut_log(self, file: Path, step: int) -> None:
        """Drop what was logged of steps after ``step``: they will be run, and logged, again."""
        if file.exists():
            lines = [line for line in file.read_text(encoding="utf-8").splitlines() if _is_up_to(line, step)]
            write_atomically(file, "".join(line + "\n" for line in lines))

    @property
    def status(self) -> dict[str, Any]:
        """What ``status.json`` says, or an empty dict for a new run."""
        file = self.path / "status.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}

    def finished(self, steps: int) -> bool:
        """Return whether the run was done with ``steps`` steps or more, and its model is there."""
        status = {} if self.overwrite else self.status
        return status.get("state") == "done" and status["step"] >= steps and (self.path / "model").is_dir()

    def set_status(self, state: str, step: int, of: int, eta_seconds: float | None = None) -> None:
        """Write ``status.json``: ``state`` is one of running, stopped, done, failed."""
        if self.is_main:
            eta = None if eta_seconds is None else round(eta_seconds, 1)
            status = {"state": state, "step": step, "of": of, "eta_seconds": eta}
            self._state = status
            write_json(self.path / "status.json", {**status, "peak_memory_bytes": peak_memory_bytes()})

    def log(self, step: int, images: int, seconds: float, values: Mapping[str, float]) -> None:
        """Append one line to ``metrics.jsonl`` and the same scalars to TensorBoard."""
        if not self.is_main:
            return
        line = {"step": step, "images": images, "seconds": round(seconds, 3), **_jsonable(values)}
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self.path / "tensorboard"), purge_step=step)
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def log_event(self, step: int, event: str, message: str) -> None:
        """Append what happened at ``step`` to ``events.jsonl``: the event's name, and a line for people."""
        if self.is_main:
            with (self.path / "events.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, "event": event, "message": message}) + "\n")

    def sample_path(self, step: int) -> Path:
        """Return where the sample grid of ``step`` belongs."""
        folder = self.path / "samples"
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"step-{step}.png"

    def save_model(self, model: PyTorchModelHubMixin) -> None:
        """Replace ``model/`` by ``model`` as a ``from_pretrained`` folder."""
        if self.is_main:
            save_model_folder(model, self.path / "model")

    def save_best(
        self, model: PyTorchModelHubMixin, step: int, figures: Mapping[str, float], by: Sequence[str]
    ) -> None:
        """Replace ``best/`` by ``model`` where its ``figures`` are better than those that ``best/`` was kept for.

        ``by`` names what decides, the most telling first; lower is better. A figure is compared with itself only, and
        takes the place of any less telling one. Figures that are not finite say nothing of a model and do not count.
        """
        figures = _finite(figures)
        ranks = [rank for rank, name in enumerate(by) if name in figures]
        if not self.is_main or not ranks:
            return
        rank, name = ranks[0], by[ranks[0]]
        old = _finite(self._best())
        old_rank = next((i for i, known in enumerate(by) if known in old), len(by))
        if rank < old_rank or (rank == old_rank and figures[name] < old[name]):
            save_model_folder(model, self.path / "best", {"best.json": {"step": step, name: figures[name]}})

    def _best(self) -> dict[str, Any]:
        file = self.path / "best" / "best.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}

    def logged(self, step: int) -> bool:
        """Return whether ``metrics.jsonl`` ends with ``step``."""
        file = self.path / "metrics.jsonl"
        lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
        return bool(lines) and json.loads(lines[-1])["step"] == step


def save_model_folder(model: PyTorchModelHubMixin, folder: Path, records: Mapping[str, Any] | None = None) -> None:
    """Write config.json, model.safetensors, the model card and JSON ``records`` by name, whole or not at all."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    for name, record in (records or {}).items():
        write_json(temporary / name, record)
    replace_folder(temporary, folder)


def _is_up_to(line: str, step: int) -> bool:
    try:
        return int(json.loads(line)["step"]) <= step
    except (ValueError, KeyError):
        return False  # a line cut short by a crash


def _finite(figures: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in figures.items() if math.isfinite(value)}


def _jsonable(values: Mapping[str, float]) -> dict[str, float | None]:
    return {name: (float(v) if abs(float(v)) < float("inf") else None) for name, v in values.items()}


def _differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """Return the dotted keys whose values differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*old, *(key for key in new if key not in old)]
        return [d for key in keys for d in _differences(old.get(key), new.get(key), f"{prefix}{key}.")]
    return [] if old == new else [prefix.rstrip(".")]
