"""Work that processes share: what needs other work waits for it, and asks for it again where it was undone."""

from itertools import count
from pathlib import Path

import pytest

from wavelatent.common import claims


def test_what_a_piece_needs_is_yielded_again_where_it_was_undone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(claims, "POLL_SECONDS", 0)
    done: set[str] = set()
    seen: list[str] = []

    def needs(piece: str) -> list[str]:
        return [] if piece == "first" or "first" in done else ["first"]

    def check() -> None:
        assert next(rounds) < 50, "waited for itself"

    rounds = count()
    pieces = ["second", "first", "third", "fourth"]
    for piece in claims.claim(pieces, lambda name: tmp_path / f"{name}.lock", check, needs):
        seen.append(piece)
        done.add(piece)
        if seen == ["first", "third"]:
            done.remove("first")
    assert seen == ["first", "third", "first", "second", "fourth"]
    assert capsys.readouterr().err == "", "there is no other process"
