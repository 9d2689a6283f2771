"""Configuration: pydantic models beside the classes they configure, YAML files, ``key=value`` overrides.

A file, or a section of one, may begin with ``base: NAME``, a preset or another YAML file, and then hold only what
differs from it.
Options that exclude each other are a union told apart by ``kind``. Every error names the key, where it was set (the
file or the override) and, for a mistyped key or kind, the nearest valid one.
"""

from __future__ import annotations

import difflib
import re
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from .errors import UsageError

PRESETS = Path(__file__).resolve().parent.parent / "pipelines" / "presets"


class Config(BaseModel):
    """Base of every configuration model: immutable, and a key it does not know is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


Seed = Annotated[int, Field(ge=0, lt=2**63)]
"""A seed that every generator takes."""


def _each_once(seeds: tuple[int, ...]) -> tuple[int, ...]:
    if len(set(seeds)) < len(seeds):
        raise ValueError("a seed is given twice")
    return seeds


Seeds = Annotated[tuple[Seed, ...], Field(min_length=1), AfterValidator(_each_once)]
"""The seeds of a comparison."""

C = TypeVar("C", bound=BaseModel)


class _Loader(yaml.SafeLoader):
    """YAML 1.1 as people write it: ``1e-4`` is a number, and a key given twice is an error, not a silent overwrite."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*(\.\d*)?|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def parse_yaml(text: str, where: str) -> Any:
    """Parse one YAML document; ``where`` names it in the :class:`UsageError` that broken YAML raises."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise UsageError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from error


def dump_yaml(config: BaseModel) -> str:
    """Return ``config`` as YAML that :func:`load_config` reads back to an equal object."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def preset_names() -> list[str]:
    """Return the names of the presets that ship with the package; one in a sub-folder is ``folder/name``."""
    return sorted(path.relative_to(PRESETS).with_suffix("").as_posix() for path in PRESETS.rglob("*.yaml"))


def find_config(source: str) -> Path:
    """Return the file that ``source`` means: a YAML file, or a preset's name. Raises :class:`UsageError`."""
    path = Path(source)
    if path.suffix in {".yaml", ".yml"}:
        if path.is_file():
            return path
        raise UsageError(f"{source}: there is no such file; a preset goes by its name{_nearest_preset(path.stem)}")
    if source in preset_names():
        return PRESETS / f"{source}.yaml"
    raise UsageError(f"{source}: neither a YAML file nor a preset{_nearest_preset(source)}")


def read_config(source: str) -> dict[str, Any]:
    """Return the keys and values of the preset or YAML file ``source``, merged over those of its bases.

    Mappings merge key by key, and one that changes the ``kind`` of an option drops what the base gave for the former
    kind; every other value, lists too, replaces the base's. A base may have a base. A base that is a file is looked for
    from the folder of the file that names it. Raises :class:`UsageError`.
    """
    return _read(find_config(source), source)[0]


def load_config(model: type[C], source: str, overrides: Sequence[str] = ()) -> C:
    """Read the preset or YAML file ``source``, apply ``key=value`` overrides in order and validate.

    What it returns has no ``base`` left: it is the same configuration written out.

    Overrides are dotted paths with YAML values (``train.steps=1000``). One that changes the ``kind`` of an option drops
    the settings the file gave for the former kind. Raises :class:`UsageError` with every error at once.
    """
    data, set_by = _read(find_config(source), source)
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise UsageError(f"{override!r}: an override has the form key=value, as in train.steps=1000")
        keys = tuple(key.split("."))
        _assign(data, keys, parse_yaml(value, f"override {override!r}"), override)
        set_by = {path: where for path, where in set_by.items() if path[: len(keys)] != keys}
        set_by[keys] = f"override {override!r}"
    return validate(model, data, source, set_by)


def validate(model: type[C], data: dict[str, Any], source: str, set_by: dict[tuple[str, ...], str] | None = None) -> C:
    """Validate plain ``data``; a :class:`UsageError` names ``source`` or the override in ``set_by`` that set a key."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        lines = [_explain(model, data, item, source, set_by or {}) for item in error.errors()]
        raise UsageError("; ".join(dict.fromkeys(lines))) from error


SetBy = dict[tuple[str, ...], str]
"""Which file or override set the key at a path."""


def _read(path: Path, source: str, above: tuple[Path, ...] = ()) -> tuple[dict[str, Any], SetBy]:
    """Return the content of ``path`` over its bases, and what set each key; ``above``: the files on the way to it."""
    try:
        data = parse_yaml(path.read_text(encoding="utf-8"), source)
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{source}: cannot be read as text: {error}") from error
    if not isinstance(data, dict):
        raise UsageError(f"{source}: expected keys and values, found {type(data).__name__}")
    return _with_bases(data, path, source, (*above, path.resolve()))


def _with_bases(
    section: dict[str, Any], path: Path, source: str, above: tuple[Path, ...]
) -> tuple[dict[str, Any], SetBy]:
    """Merge a section of the file ``path``, and the sections in it, over the bases they begin with."""
    own: dict[str, Any] = {}
    set_by: SetBy = {}
    for key, value in section.items():
        if key == "base":
            continue
        set_by[(str(key),)] = source
        if isinstance(value, dict):
            value, inner = _with_bases(value, path, source, above)
            set_by |= {(str(key), *keys): where for keys, where in inner.items()}
        own[key] = value
    if "base" not in section:
        return own, set_by
    base_data, base_set_by = _read_base(section["base"], path, source, above)
    merged = merge(base_data, own)
    return merged, {keys: set_by.get(keys) or base_set_by[keys] for keys in _key_paths(merged)}


def _read_base(base: Any, path: Path, source: str, above: tuple[Path, ...]) -> tuple[dict[str, Any], SetBy]:
    """Read what the file ``path`` names as ``base``; ``above`` are the files that have it among their bases."""
    if not isinstance(base, str):
        raise UsageError(f"{source}: base: expected the name of a preset or a YAML file, got {base!r}")
    name = str(path.parent / base) if Path(base).suffix in {".yaml", ".yml"} else base
    try:
        base_path = find_config(name)
    except UsageError as error:
        raise UsageError(f"{source}: base: {error}") from error
    if base_path.resolve() in above:
        raise UsageError(f"{source}: base: {base} is this file, or has this file among its own bases")
    return _read(base_path, name, above)


def merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return ``base`` with ``changes`` over it, as :func:`read_config` merges; neither is changed."""
    if "kind" in base and "kind" in changes and base["kind"] != changes["kind"]:
        return dict(changes)
    merged = dict(base)
    for key, value in changes.items():
        old = base.get(key)
        merged[key] = merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _key_paths(data: dict[str, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yield the path of every key, sections included."""
    for key, value in data.items():
        path = (*above, str(key))
        yield path
        if isinstance(value, dict):
            yield from _key_paths(value, path)


def _assign(data: dict[str, Any], keys: tuple[str, ...], value: Any, override: str) -> None:
    """Set the nested key, making the sections on the way; a changed ``kind`` resets its siblings."""
    *sections, last = keys
    for depth, section in enumerate(sections):
        inner = data.setdefault(section, {})
        if not isinstance(inner, dict):
            raise UsageError(f"override {override!r}: {'.'.join(keys[: depth + 1])} is a value, not a section")
        data = inner
    if last == "kind" and data.get("kind", value) != value:
        data.clear()
    data[last] = value


def _explain(model: type[BaseModel], data: Any, error: Any, source: str, set_by: dict[tuple[str, ...], str]) -> str:
    """Turn one pydantic error into ``where: key: what is wrong (nearest valid one)``."""
    path = _data_path(data, error["loc"])
    dotted = ".".join(path)
    prefixes = (path[:n] for n in range(len(path), 0, -1))
    where = next((set_by[p] for p in prefixes if p in set_by), source)
    if error["type"] == "extra_forbidden":
        valid = sorted(_keys_at(model, data, path[:-1]))
        return f"{where}: unknown key {dotted!r}{_nearest(path[-1], valid)}"
    if error["type"] == "union_tag_invalid":
        valid = re.findall(r"'([^']+)'", error["ctx"]["expected_tags"])
        return f"{where}: {dotted}.kind: unknown kind {error['ctx']['tag']!r}{_nearest(error['ctx']['tag'], valid)}"
    if error["type"] == "union_tag_not_found":
        kinds = [m.model_fields["kind"].default for m in _models_at(model, data, path) if "kind" in m.model_fields]
        return f"{where}: {dotted}: needs a kind: give {dotted}.kind too, one of {', '.join(kinds)}"
    if error["type"] == "missing":
        return f"{where}: {dotted}: is required"
    message = error["msg"].removeprefix("Value error, ")
    if not path:
        return f"{where}: {message}"
    given = "" if isinstance(error["input"], dict) else f", got {error['input']!r}"  # a whole section says nothing
    return f"{where}: {dotted}: {message}{given}"


def _data_path(data: Any, loc: tuple[int | str, ...]) -> tuple[str, ...]:
    """Strip from a pydantic location the union tags that are not keys of the data."""
    path: list[str] = []
    for position, part in enumerate(loc):
        last = position == len(loc) - 1
        if isinstance(data, dict) and isinstance(part, str) and part not in data and not last:
            continue  # a union's tag
        if isinstance(data, dict) and last and part not in data and data.get("kind") == part:
            continue
        if not isinstance(data, dict | list):
            break  # below a value there are only the names of the types that it might have had
        path.append(str(part))
        if isinstance(data, dict):
            data = data.get(part)
        elif isinstance(data, list) and isinstance(part, int) and part < len(data):
            data = data[part]
    return tuple(path)


def _keys_at(model: type[BaseModel], data: Any, path: tuple[str, ...]) -> set[str]:
    """Return the keys that are valid at ``path``, following the ``kind`` that the data chose."""
    return {name for m in _models_at(model, data, path) for name in m.model_fields}


def _models_at(model: type[BaseModel], data: Any, path: tuple[str, ...]) -> list[type[BaseModel]]:
    """Return what may stand at ``path``: the model of the ``kind`` that the data chose, or of every kind."""
    models: list[type[BaseModel]] = [model]
    for part in path:
        data = data.get(part) if isinstance(data, dict) else data[int(part)]
        if not any(part in outer.model_fields for outer in models):
            continue  # a number in a list, or a name in a mapping
        models = [
            inner
            for outer in models
            if part in outer.model_fields
            for inner in _models_in(outer.model_fields[part].annotation)
        ]
        kind = data.get("kind") if isinstance(data, dict) else None
        chosen = [m for m in models if "kind" in m.model_fields and m.model_fields["kind"].default == kind]
        models = chosen or models
    return models


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """Yield every model class inside an annotation (unions, lists, ``Annotated``)."""
    if get_origin(annotation) is Annotated:
        yield from _models_in(get_args(annotation)[0])
    elif get_origin(annotation) in (Union, types.UnionType, list, tuple, dict):
        for argument in get_args(annotation):
            yield from _models_in(argument)
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation


def _nearest_preset(word: str) -> str:
    """Return the nearest preset; where none is near, the list leaves out those in folders, which are many."""
    names = preset_names()
    near = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    return _nearest(word, near or [name for name in names if "/" not in name])


def _nearest(word: str, valid: Sequence[str]) -> str:
    """Return a hint: the nearest valid word, or all of them."""
    close = difflib.get_close_matches(str(word), valid, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; valid: {', '.join(valid) or 'none'}"
