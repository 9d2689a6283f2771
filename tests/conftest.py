"""Registers the checkout as the namespace ``wavelatent`` before any test imports it."""

import gc
import os
import sys
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import pytest
import torch
from forked_commands import ForkedCommands

import cli  # noqa: F401

# One thread per test process: the tests are small, and run side by side.
torch.set_num_threads(1)

_modules_set_aside = 0


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Leave what has been imported out of every garbage collection to come.

    A training ends with full collections, so that its memory is free for the next one. To walk the objects of torch's
    modules and of what they import took a third of the time of a training that is a test's size.
    """
    global _modules_set_aside
    if len(sys.modules) > _modules_set_aside:
        gc.collect()
        gc.freeze()
        _modules_set_aside = len(sys.modules)


@pytest.fixture(scope="session", autouse=True)
def _no_waiting_for_the_disk() -> Iterator[None]:
    """Write without flushing: a training waits for the disk some twenty times. What must be flushed: test_files.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


@lru_cache
def _perceptual_distance(net: str):
    from wavelatent.common.lpips_metric import PerceptualDistance
    from wavelatent.common.metric_weights import MissingWeightsError

    try:
        return PerceptualDistance(net)
    except MissingWeightsError as error:
        return str(error)


@pytest.fixture
def perceptual_distance() -> Callable[[str], torch.nn.Module]:
    """Return LPIPS by its network's name; the test is skipped, with the reason, where its weights cannot be had."""

    def get(net: str) -> torch.nn.Module:
        found = _perceptual_distance(net)
        if isinstance(found, str):
            pytest.skip(found)
        return found

    return get


@pytest.fixture(scope="session")
def forked_commands() -> Iterator[ForkedCommands]:
    """Command lines in processes of their own, one or several."""
    commands = ForkedCommands()
    yield commands
    commands.close()
