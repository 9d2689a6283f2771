"""Checkpoints, the run folder, the average of weights, the learning rate: what a resume must find unchanged."""

import json
import math
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from wavelatent.common import run_folder
from wavelatent.common.checkpoints import Checkpoint, checkpoints, latest_checkpoint, save_checkpoint
from wavelatent.common.config import Config
from wavelatent.common.ema import EMA, EMAConfig
from wavelatent.common.errors import UsageError, WavelatentError
from wavelatent.common.run_folder import RunFolder
from wavelatent.common.runtime import StopRequest, check_precision, resolve_device
from wavelatent.common.training import (
    LearningRateConfig,
    batch_per_process,
    clip_gradients,
    due,
    first_non_finite,
    seed_step,
)


class Settings(Config):
    lr: float = 1e-3


def save(run, step: int, module: nn.Module, keep: int = 2, **counters):
    optimizer = torch.optim.Adam(module.parameters())
    module(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return save_checkpoint(
        run, step, modules={"net": module}, optimizers={"adam": optimizer}, counters=counters, keep=keep
    ), optimizer


def test_a_checkpoint_restores_modules_optimisers_and_counters(tmp_path):
    module = nn.Linear(3, 2)
    path, optimizer = save(tmp_path, 7, module, seconds=1.5)
    other = nn.Linear(3, 2)
    fresh = torch.optim.Adam(other.parameters())
    checkpoint = Checkpoint.open(path)
    checkpoint.restore({"net": other}, {"adam": fresh})
    assert (checkpoint.step, checkpoint.counters["seconds"]) == (7, 1.5)
    assert torch.equal(other.weight, module.weight)
    mine, theirs = (o.state_dict()["state"][0]["exp_avg"] for o in (fresh, optimizer))
    assert torch.equal(mine, theirs)


def test_the_newest_is_the_highest_step_and_only_that_many_stay(tmp_path):
    for step in (9, 10, 100):
        save(tmp_path, step, nn.Linear(3, 2))
    (tmp_path / "checkpoints" / "checkpoint-99999-old").mkdir()
    (tmp_path / "checkpoints" / ".checkpoint-5000.tmp").mkdir()  # left by a crash
    os.utime(tmp_path / "checkpoints" / "checkpoint-10")  # neither the date nor the alphabet decides
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-10", "checkpoint-100"]
    assert latest_checkpoint(tmp_path).name == "checkpoint-100"


def test_a_damaged_or_foreign_checkpoint_is_refused_by_name(tmp_path):
    path, _ = save(tmp_path, 1, nn.Linear(3, 2))
    with pytest.raises(WavelatentError, match="net does not fit"):
        Checkpoint.open(path).restore({"net": nn.Linear(3, 5)}, {})
    (path / "net.safetensors").write_bytes(b"torn")
    with pytest.raises(WavelatentError, match="delete this checkpoint"):
        Checkpoint.open(path).restore({"net": nn.Linear(3, 2)}, {})
    (path / "state.json").write_text("{")
    with pytest.raises(WavelatentError, match="not a complete checkpoint"):
        Checkpoint.open(path)


def test_ema_equals_the_closed_form():
    """A constant weight w after a start at 0 gives w (1 - prod(decay))."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    ema = EMA(model, EMAConfig(half_life_images=100, rampup_ratio=0.5))
    nn.init.constant_(model.weight, 2.0)
    kept = 1.0
    for step in range(1, 50):
        images = 10 * step
        kept *= 0.5 ** (10 / min(100, 0.5 * images))
        ema.update(model, images, 10)
    assert ema.model.weight.item() == pytest.approx(2 * (1 - kept), rel=1e-5)
    assert ema.decay(10**9, 100) == 0.5  # one half-life in one step
    assert not ema.model.weight.requires_grad


def test_the_learning_rate_warms_up_and_falls_as_a_cosine():
    rate = LearningRateConfig(peak=2.0, warmup_steps=4, decay="cosine")
    assert [rate.at(s, 14) for s in range(5)] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert rate.at(9, 14) == pytest.approx(1.0)
    assert rate.at(14, 14) == pytest.approx(0.0)
    assert LearningRateConfig(peak=2.0).at(10**6, 14) == 2.0


def test_the_batch_is_the_global_one():
    assert batch_per_process(24, 2, 3) == 4
    with pytest.raises(UsageError, match="use 24"):
        batch_per_process(25, 2, 3)


def test_step_seeds_depend_on_seed_rank_and_step():
    def draw(*key):
        seed_step(*key)
        return torch.rand(()).item()

    assert draw(0, 0, 5) == draw(0, 0, 5)
    assert len({draw(0, 0, 5), draw(1, 0, 5), draw(0, 1, 5), draw(0, 0, 6)}) == 4
    assert [due(s, 3) for s in range(5)] == [False, False, False, True, False]
    assert not due(4, 0)


def folder(path, lr: float = 1e-3, fingerprint: str = "a", kind: str = "test", **options) -> RunFolder:
    return RunFolder(path, Settings(lr=lr), {"kind": kind, "fingerprint": fingerprint}, **options)


def begin(*arguments, **options) -> None:
    with folder(*arguments, **options) as run:
        run.begin()


def test_nothing_is_written_or_deleted_before_begin_and_then_only_what_is_ours(tmp_path):
    path = tmp_path / "run"
    folder(path)
    assert not path.exists()
    begin(path)
    save(path, 3, nn.Linear(3, 2))
    (path / "thesis.tex").write_text("precious")
    folder(path, lr=1.0, overwrite=True)
    assert latest_checkpoint(path) is not None
    begin(path, lr=1.0, overwrite=True)
    assert latest_checkpoint(path) is None
    assert "lr: 1.0" in (path / "config.yaml").read_text()
    assert (path / "thesis.tex").read_text() == "precious"


def test_an_overwrite_that_was_cut_short_leaves_a_run_that_can_be_overwritten(tmp_path, monkeypatch):
    path = tmp_path / "run"
    for removed in range(1, len(run_folder.CONTENTS)):
        begin(path, overwrite=True)
        save(path, 3, nn.Linear(3, 2))
        with monkeypatch.context() as patch:
            patch.setattr(run_folder, "CONTENTS", run_folder.CONTENTS[:removed])
            folder(path, lr=1.0, overwrite=True)._remove_contents()
        assert latest_checkpoint(path) is None
        begin(path, lr=1.0)
        begin(path, lr=2.0, overwrite=True)


def test_a_resume_cuts_the_log_after_its_checkpoint_and_an_unstarted_run_may_change(tmp_path):
    begin(tmp_path)
    begin(tmp_path, lr=5.0, fingerprint="b")  # no checkpoint: nothing to contradict
    save(tmp_path, 3, nn.Linear(3, 2))
    with folder(tmp_path, lr=5.0, fingerprint="b") as run:
        for step in (2, 3, 4):
            run.log(step, step * 8, 0.1, {"loss/l1": math.nan if step == 2 else 1.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "ima')  # cut short by a crash
    begin(tmp_path, lr=5.0, fingerprint="b")
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 3]
    assert lines[0]["loss/l1"] is None  # JSON has no NaN
    assert len(json.loads((tmp_path / "environment.json").read_text())["resumed"]) == 2
    with pytest.raises(UsageError, match="another lr"):
        folder(tmp_path, fingerprint="b")
    with pytest.raises(UsageError, match="another fingerprint"):
        folder(tmp_path, lr=5.0, fingerprint="c")


def test_folders_that_are_not_this_kind_of_run_are_refused(tmp_path):
    (tmp_path / "config.yaml").write_text("mine: true")  # a folder of somebody's, with a file of that name
    with pytest.raises(UsageError, match="not a run folder"):
        folder(tmp_path, overwrite=True)
    begin(tmp_path / "run")
    with pytest.raises(UsageError, match="another stage"):
        folder(tmp_path / "run", kind="other", overwrite=True)


def test_two_processes_cannot_train_one_run_and_an_error_is_recorded(tmp_path):
    run = folder(tmp_path)

    def fail() -> None:
        with run:
            run.begin()
            with pytest.raises(UsageError, match="another process"):
                begin(tmp_path)
            run.set_status("running", 3, 9)
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        fail()
    assert (run.status["state"], run.status["step"], run.status["of"]) == ("failed", 3, 9)
    begin(tmp_path)  # the lock is free again


def test_fp16_gradients_of_one_optimiser_are_unscaled_without_touching_the_other():
    """accelerate's own clip would unscale both, and what the other accumulates next would be scaled again."""
    one, other = nn.Linear(2, 1, bias=False), nn.Linear(2, 1, bias=False)
    optimizers = [torch.optim.SGD(m.parameters(), 0.1) for m in (one, other)]
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)

    class Accelerator:
        def unscale_gradients(self, optimizer):
            scaler.unscale_(optimizer)

    for module in (one, other):
        scaler.scale(module(torch.ones(1, 2)).sum()).backward()
    norm = clip_gradients(Accelerator(), optimizers[0], one.parameters(), 100.0)
    assert norm.item() == pytest.approx(math.sqrt(2))
    assert torch.equal(one.weight.grad, torch.ones(1, 2))
    assert torch.equal(other.weight.grad, torch.full((1, 2), 8.0))


def test_the_first_term_that_is_not_finite_is_named():
    good, bad = torch.tensor([1.0, 2.0]), torch.tensor([1.0, math.nan])
    assert first_non_finite({"a": good, "b": torch.tensor(0.0)}) is None
    assert first_non_finite({"a": good, "b": bad, "c": torch.tensor(math.inf)}) == "b"


def test_a_stop_request_hears_signals_and_gives_the_handlers_back():
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest() as stop:
        assert stop.reason is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.reason == "SIGTERM"
    assert signal.getsignal(signal.SIGTERM) is before
    with StopRequest(max_minutes=0.0) as stop:
        assert stop.reason == "--max-minutes"
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.reason == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_devices_and_precisions_that_cannot_be_are_refused():
    assert resolve_device("cpu").type == "cpu"
    with pytest.raises(UsageError, match="unknown device"):
        resolve_device("gpu")
    with pytest.raises(UsageError, match="not supported"):
        resolve_device("mps")
    with pytest.raises(UsageError, match="use bf16 or no"):
        check_precision(torch.device("cpu"), "fp16")
    if not torch.cuda.is_available():
        with pytest.raises(UsageError, match="0 CUDA devices"):
            resolve_device("cuda:1")


def test_a_signal_that_reaches_a_part_is_heard_by_the_whole():
    """The part may end without looking: then the work that it is a part of must stop."""
    with StopRequest() as whole:
        with StopRequest():
            os.kill(os.getpid(), signal.SIGTERM)
        assert whole.reason == "SIGTERM"
    with StopRequest() as whole:
        with StopRequest(max_minutes=0.0) as part:
            assert part.reason == "--max-minutes"
        assert whole.reason is None  # a part's deadline is its own


def test_a_part_has_no_more_time_than_the_whole():
    with StopRequest(max_minutes=-1), StopRequest(max_minutes=5) as part:
        assert part.reason == "--max-minutes"


def test_a_part_in_another_thread_hears_what_the_whole_hears():
    """Signals come to the main thread alone, and by_main works in another one."""

    def part() -> tuple[str | None, str | None]:
        with StopRequest() as stop:
            before = stop.reason
            os.kill(os.getpid(), signal.SIGTERM)
            done.wait(10)
            return before, stop.reason

    with StopRequest() as whole, ThreadPoolExecutor(1) as pool:
        done = threading.Event()
        work = pool.submit(part)
        while whole.reason is None:
            time.sleep(0.001)
        done.set()
        assert work.result() == (None, "SIGTERM")
    with StopRequest(max_minutes=-1), ThreadPoolExecutor(1) as pool:
        done.set()
        assert pool.submit(lambda: StopRequest().__enter__().reason).result() == "--max-minutes"
