"""How the worker processes of a `DataLoader` end: when the process that started them wants it, and no sooner."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader

CONTEXT = "fork" if sys.platform == "linux" else None
"""How workers start, a ``multiprocessing_context`` for a loader that has any.

A forked one has the data already, and its parent is the process that trains. Python 3.14 starts others.
"""


def started(loader: DataLoader[Any]) -> Iterator[Any]:
    """Return ``iter(loader)``, whose workers are born deaf to SIGTERM and SIGINT.

    A worker inherits the signals that are blocked. Without it, one that comes before the worker has set up
    :func:`leave_signals_to_parent` would kill it. What comes for this process meanwhile waits until they are there.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    try:
        return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_signals_to_parent(worker: int) -> None:
    """Make this worker deaf to SIGTERM and SIGINT from anywhere but its parent; a ``worker_init_fn`` for `started`.

    A request to stop often goes to a whole process group (Ctrl-C, GNU timeout, Slurm). Workers that die of it make
    PyTorch raise an error in the parent, which was about to save everything. Without it they end when the parent closes
    its loader, and within seconds of the parent's death.

    The parent's own SIGTERM is obeyed, as by PyTorch's handler, which this replaces: `multiprocessing` sends it at the
    parent's end to the workers that are still there, and then waits for them.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    if not hasattr(signal, "sigwaitinfo"):  # macOS cannot tell who sent a signal
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_obey, args=(os.getppid(),), daemon=True).start()


def _obey(parent: int) -> None:
    """End this process at a SIGTERM from ``parent``. Needs SIGTERM blocked in every thread."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)  # success: anything else would be an error to PyTorch
