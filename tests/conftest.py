"""Registers the checkout as the namespace ``wavelatent`` before any test imports it."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import cli  # noqa: F401
