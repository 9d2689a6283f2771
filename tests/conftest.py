"""Registers the checkout as the namespace ``wavelatent`` before any test imports it."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch

import cli  # noqa: F401

# One thread per test process: the tests are small, and run side by side.
torch.set_num_threads(1)
