"""Copy the reports of `run.sh` here, without the machine's paths, and write tables.md. Usage: make_tables.py OUT."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
LABELS = {
    "kl4": "KL, 4 channels",
    "bounded16": "bounded, 16 channels",
    "random": "diffusers KL, random weights",
}
WORDS = {"fault": "fault", "note": "note", "ok": "in order"}
"""What a verdict's level is called, the worst first."""
PATH = re.compile(r"(?:^|[\s:'\"(])(?:~|/)[\w.]+/")
Record = dict[str, Any]


def main(out: Path) -> None:
    """Write a JSON file for each report that is there, and the tables."""
    records = {name: read(out / f"health-{name}" / "health.json", name) for name in LABELS}
    for name, record in records.items():
        (HERE / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    tables = [section_table(records), *(findings(name, record) for name, record in records.items())]
    (HERE / "tables.md").write_text("\n\n".join(tables) + "\n")


def read(path: Path, name: str) -> Record:
    """Return a report with a name in the place of each path; stops where it finds one elsewhere."""
    record = json.loads(path.read_text())
    record["protocol"]["autoencoder"]["path"] = name
    record["protocol"]["data"]["spec"] = "IMAGES"
    for text in strings(record):
        if PATH.search(text):
            raise SystemExit(f"{path} holds a path: {text}")
    return record


def strings(value: Any) -> Iterator[str]:
    """Yield every string in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield name
            yield from strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from strings(item)


def section_table(records: Mapping[str, Record]) -> str:
    """Return a row per section: of each autoencoder the verdicts that are not in order, the worst first."""
    names = list(dict.fromkeys(section for record in records.values() for section in known(record)))
    lines = [f"| | {' | '.join(LABELS[name] for name in records)} |", f"|{'---|' * (len(records) + 1)}"]
    for section in names:
        lines.append(f"| {section} | {' | '.join(verdicts(record, section) for record in records.values())} |")
    totals = [
        f"{count['fault']} faults, {count['note']} notes, {count['ok']} in order"
        for count in (record["summary"] for record in records.values())
    ]
    lines.append(f"| **all** | {' | '.join(totals)} |")
    lines.append(f"| minutes | {' | '.join(minutes(record) for record in records.values())} |")
    return "\n".join(lines)


def known(record: Record) -> list[str]:
    """Return the sections that a report speaks of, with those that could not be computed."""
    return [*record["sections"], *(name for name in record["protocol"]["sections"] if name in record["not_computed"])]


def verdicts(record: Record, section: str) -> str:
    """Return what a report says of a section, in a few words."""
    if section not in record["sections"]:
        return "not computed" if section in record["not_computed"] else ""
    found = record["sections"][section]["verdicts"]
    worse = [each for level in ("fault", "note") for each in found if each["level"] == level]
    named = [f"{WORDS[each['level']]}: `{each['name']}`" for each in worse]
    return ", ".join(dict.fromkeys(named)) or WORDS["ok"]


def minutes(record: Record) -> str:
    """Return how long the sections took, and of that the one that trains."""
    each = {name: section["seconds"] / 60 for name, section in record["sections"].items()}
    trained = f", {each['learnability']:.1f} of them `learnability`" if "learnability" in each else ""
    return f"{sum(each.values()):.1f}{trained}"


def findings(name: str, record: Record) -> str:
    """Return every verdict of a report in its own words, the worst first."""
    lines = [f"**{LABELS[name]}** ({record['protocol']['num_images']:,} images of {record['protocol']['size']} px)", ""]
    for level, word in WORDS.items():
        for section, content in record["sections"].items():
            lines += [f"- {word}, {section}: {each['text']}" for each in content["verdicts"] if each["level"] == level]
    lines += [f"- not computed, {what}: {why}" for what, why in record["not_computed"].items()]
    return "\n".join(lines)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
