"""Work that processes share which know nothing of each other: each piece is done by whoever holds its lock."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from filelock import FileLock, Timeout
from tqdm import tqdm

T = TypeVar("T")

POLL_SECONDS = 2.0


@contextmanager
def try_lock(path: Path) -> Iterator[bool]:
    """Give the block whether it holds the lock of the file ``path``, whose folder is created.

    Another thread may end the block. Raises OSError or NotImplementedError where there can be no lock.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path, timeout=0, thread_local=False)
    try:
        lock.acquire()
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def claim(
    pieces: Iterable[T],
    lock: Callable[[T], Path],
    check: Callable[[], None],
    needs: Callable[[T], Sequence[T]] = lambda piece: (),
) -> Generator[T, None, None]:
    """Yield every piece once, holding its lock until the next: processes that claim the same pieces share the work.

    A piece that another process holds, or that needs another one, is left for the end, and then waited for: whoever
    gets it then is to see for itself what is left of it to be done. That it waits it says once, on stderr. What a piece
    needs is yielded again where it was undone since.

    Args:
        pieces: in the order in which they are wanted.
        lock: the file that is locked for a piece. Locks end with their process.
        check: called before every piece and while waiting, to raise what is to end the work.
        needs: pieces that have to be finished before this one can be begun, and are not.
    """
    waiting, said = list(pieces), False
    while waiting:
        left = []
        for piece in waiting:
            check()
            if needs(piece):
                left.append(piece)
                continue
            with try_lock(lock(piece)) as locked:
                if locked:
                    yield piece
                else:
                    left.append(piece)
        undone: dict[Path, T] = {}
        if len(left) == len(waiting):
            there = {lock(piece) for piece in left}
            undone = {lock(found): found for piece in left for found in needs(piece) if lock(found) not in there}
            if not undone:
                if not said:
                    tqdm.write("waiting for another process, which is at work on what is left", file=sys.stderr)
                    said = True
                time.sleep(POLL_SECONDS)
        waiting = [*undone.values(), *left]
