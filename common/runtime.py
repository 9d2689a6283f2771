"""What every training run has: options, an accelerator, a run folder, a clock and a way to be stopped.

The run folder is the contract with users and other programs: ``config.yaml``, ``environment.json``, ``metrics.jsonl``,
``tensorboard/``, ``checkpoints/``, ``samples/``, ``model/`` and ``status.json``.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import BaseModel

from .checkpoints import latest_checkpoint, replace_folder, write_json
from .config import dump_yaml, parse_yaml
from .errors import UsageError

if TYPE_CHECKING:
    from accelerate import Accelerator
    from huggingface_hub import PyTorchModelHubMixin

MixedPrecision = Literal["no", "bf16", "fp16"]

PACKAGES = ("wavelatent", "torch", "torchvision", "accelerate", "ptwt", "lpips", "torch-fidelity", "datasets", "numpy")

MAY_CHANGE = {"train.steps", "train.log_every", "train.checkpoint_every", "train.sample_every", "train.keep"}
"""Settings that a resumed run may be given anew: how long it goes on and how often it writes."""


@dataclass(frozen=True)
class RuntimeOptions:
    """How a command runs, as opposed to what it computes."""

    device: str = "auto"
    mixed_precision: MixedPrecision = "no"
    max_minutes: float | None = None
    overwrite: bool = False


def resolve_device(name: str) -> torch.device:
    """Return the device ``name`` (``auto``: the first GPU, else the CPU). Raises :class:`UsageError`."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"--device {name}: unknown device; use auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            f"--device {name}: this machine (or this build of PyTorch) has no CUDA device; use --device cpu"
        )
    return device


def check_precision(device: torch.device, mixed_precision: MixedPrecision) -> None:
    """Refuse fp16 on a CPU, where it is many times slower than float32. Raises :class:`UsageError`."""
    if device.type == "cpu" and mixed_precision == "fp16":
        raise UsageError("--mixed-precision fp16 is slower than no on a CPU, many times over; use bf16 or no")


@contextmanager
def autocast(device: torch.device, mixed_precision: MixedPrecision) -> Iterator[None]:
    """Run the block under autocast in the named precision."""
    check_precision(device, mixed_precision)
    dtype = torch.float16 if mixed_precision == "fp16" else torch.bfloat16
    with torch.autocast(device.type, dtype=dtype, enabled=mixed_precision != "no"):
        yield


def make_accelerator(options: RuntimeOptions, gradient_accumulation_steps: int = 1) -> Accelerator:
    """Return an accelerator for the asked device and precision.

    A process may have several, one after the other: accelerate keeps the first one's precision for its whole life and
    refuses another, so that state is cleared.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()
    device = resolve_device(options.device)
    check_precision(device, options.mixed_precision)
    if device.index is not None:
        torch.cuda.set_device(device)
    return Accelerator(
        cpu=device.type == "cpu",
        mixed_precision=options.mixed_precision,
        gradient_accumulation_steps=gradient_accumulation_steps,
    )


def environment() -> dict[str, Any]:
    """Return versions, git commit, hardware and command line, for ``environment.json``."""
    versions: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    cuda = torch.cuda.is_available()
    return {
        "command_line": sys.argv,
        "versions": {"python": platform.python_version(), **versions},
        "git_commit": _git_commit(),
        "hardware": {
            "machine": platform.machine(),
            "cpus": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else [],
        },
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _git_commit() -> str | None:
    """Return the checkout's commit (``-dirty`` where files differ), or None outside a checkout."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def peak_memory_bytes() -> int:
    """Return the peak memory of the GPU in use, or of this process on a CPU."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class RunFolder:
    """One run on disk. Every process may hold one; only the main process writes.

    Building it checks that the folder is free, or holds the same run; nothing is written, and with ``overwrite``
    nothing deleted, before :meth:`begin`, so that what fails in between (a size that does not divide) leaves no trace.

    Args:
        path: the folder.
        config: the run's resolved configuration.
        identity: what names its inputs, for ``inputs.json``; keys that end in ``fingerprint`` must not change.
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
        _refuse_foreign(path)
        if self.checkpoint is not None:
            self._check_same()

    @property
    def checkpoint(self) -> Path | None:
        """The checkpoint to go on from, or None to start at the beginning."""
        return None if self.overwrite else latest_checkpoint(self.path)

    def begin(self) -> None:
        """Create the folder, record what runs, and cut from the log what came after the checkpoint."""
        if not self.is_main:
            return
        checkpoint = self.checkpoint
        if self.overwrite:
            shutil.rmtree(self.path, ignore_errors=True)
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(self.path / "inputs.json", self.identity)
        _write_text(self.path / "config.yaml", dump_yaml(self.config))
        self._record_environment()
        self._cut_metrics(int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0)

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

    def _record_environment(self) -> None:
        file = self.path / "environment.json"
        now = environment()
        if file.exists():
            first = json.loads(file.read_text(encoding="utf-8"))
            now = {**first, "resumed": [*first.get("resumed", []), now]}
        write_json(file, now)

    def _cut_metrics(self, step: int) -> None:
        """Drop logged steps after ``step``: they will be run, and logged, again."""
        file = self.path / "metrics.jsonl"
        if file.exists():
            lines = [line for line in file.read_text(encoding="utf-8").splitlines() if _is_up_to(line, step)]
            _write_text(file, "".join(line + "\n" for line in lines))

    @property
    def status(self) -> dict[str, Any]:
        """What ``status.json`` says, or an empty dict for a new run."""
        file = self.path / "status.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}

    def finished(self, steps: int) -> bool:
        """Return whether the run was done with ``steps`` steps or more, and its model is there."""
        status = {} if self.overwrite else self.status
        return status.get("state") == "done" and status["step"] >= steps and (self.path / "model").is_dir()

    def set_status(self, state: str, step: int, of: int, eta_seconds: float | None = None, **more: Any) -> None:
        """Write ``status.json``: ``state`` is one of running, stopped, done, failed."""
        if self.is_main:
            eta = None if eta_seconds is None else round(eta_seconds, 1)
            status = {"state": state, "step": step, "of": of, "eta_seconds": eta}
            write_json(self.path / "status.json", {**status, "peak_memory_bytes": peak_memory_bytes(), **more})

    def log(self, step: int, images: int, seconds: float, values: Mapping[str, float]) -> None:
        """Append one line to ``metrics.jsonl`` and the same scalars to TensorBoard."""
        if not self.is_main:
            return
        line = {"step": step, "images": images, "seconds": round(seconds, 3), **_jsonable(values)}
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self.path / "tensorboard"), purge_step=step)
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def sample_path(self, step: int) -> Path:
        """Return where the sample grid of ``step`` belongs."""
        folder = self.path / "samples"
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"step-{step}.png"

    def save_model(self, model: PyTorchModelHubMixin) -> None:
        """Replace ``model/`` by ``model`` as a ``from_pretrained`` folder."""
        if self.is_main:
            save_model_folder(model, self.path / "model")

    def close(self) -> None:
        """Flush TensorBoard."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def save_model_folder(model: PyTorchModelHubMixin, folder: Path) -> None:
    """Write config.json, model.safetensors and the model card, whole or not at all."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    replace_folder(temporary, folder)


def _write_text(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _refuse_foreign(path: Path) -> None:
    """Never write into, or delete, a folder that is not a run of ours."""
    if path.is_file():
        raise UsageError(f"{path} is a file; --out takes a folder")
    if path.is_dir() and any(path.iterdir()) and not (path / "config.yaml").exists():
        raise UsageError(f"{path} is not empty and not a run folder; give another --out")


def _is_up_to(line: str, step: int) -> bool:
    try:
        return int(json.loads(line)["step"]) <= step
    except (ValueError, KeyError):
        return False  # a line cut short by a crash


def _jsonable(values: Mapping[str, float]) -> dict[str, float | None]:
    return {name: (float(v) if abs(float(v)) < float("inf") else None) for name, v in values.items()}


def _differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """Return the dotted keys whose values differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*old, *(key for key in new if key not in old)]
        return [d for key in keys for d in _differences(old.get(key), new.get(key), f"{prefix}{key}.")]
    return [] if old == new else [prefix.rstrip(".")]


class StopRequest:
    """Turns SIGTERM, SIGINT and a deadline into a flag that a loop reads between steps.

    A second SIGINT interrupts at once. Use it as a context manager; the former handlers come back at its end.
    """

    def __init__(self, max_minutes: float | None = None) -> None:
        self._deadline = None if max_minutes is None else time.monotonic() + 60 * max_minutes
        self._signal: str | None = None
        self._former: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        try:
            for number in (signal.SIGTERM, signal.SIGINT):
                self._former[number] = signal.signal(number, self._on_signal)
        except ValueError:  # not the main thread: only the deadline can stop it
            self._former.clear()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._signal = signal.Signals(number).name

    @property
    def reason(self) -> str | None:
        """Why to stop (a signal's name or ``--max-minutes``), or None."""
        if self._signal:
            return self._signal
        return "--max-minutes" if self._deadline is not None and time.monotonic() > self._deadline else None

    def agreed(self, accelerator: Accelerator) -> str | None:
        """Return the reason where any process has one, so that all stop after the same step."""
        reason = self.reason
        if accelerator.num_processes == 1:
            return reason
        flag = torch.tensor([reason is not None], device=accelerator.device, dtype=torch.float32)
        return (reason or "another process") if accelerator.reduce(flag, "sum").item() > 0 else None
