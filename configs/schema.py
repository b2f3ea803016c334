"""Configuration: dataclass defaults < YAML files, left to right < ``key=value`` overrides.

A schema is a frozen, keyword-only dataclass whose fields are ``bool``, ``int``, ``float``, ``str``,
``Literal``, ``tuple``, ``dict`` and other such dataclasses, each optionally ``| None``. A field without a
default must be given by a source. Rates are written as strings ("24000/1001"), never as floats.

Every mistake in a source is a `UserError` of one line that names the source, the key and the remedy.
"""

from __future__ import annotations

import difflib
import functools
import io
import os
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from kinoflow.configs.errors import UserError, os_error_line
from kinoflow.configs.files import write_text

__all__ = ["UserError", "dump", "from_dict", "load", "to_dict"]

T = TypeVar("T")
_HERE = Path(__file__).parent


def load(schema: type[T], sources: Sequence[str]) -> T:
    """Build ``schema`` from its defaults and ``sources``, the later ones winning.

    Each source is a YAML file (``configs/models/dit_mini.yaml``) or an override (``optimizer.lr=1e-4``). A
    YAML file may start from others, ``base: [other.yaml]``, relative to itself, merged before it. Mappings
    merge key by key; lists replace. A ``configs/…`` that is not below the working folder is taken from the
    installed package, ``configs/NAME.yaml`` from whichever of its folders has it.

    Raises:
        UserError: an unknown key, a value of the wrong type, a missing value or file, malformed YAML, a
            cycle of bases, or a value that the schema's own ``__post_init__`` refuses.
    """
    layers: list[tuple[str, dict[str, Any]]] = []
    for source in sources:
        key, equals, _ = str(source).partition("=")
        if equals and "/" not in key:  # a path such as runs/lr=3/config.yaml is a file
            layers.append(("", _parse_override(schema, str(source))))
        elif str(source).endswith((".yaml", ".yml")):
            layers.extend(_read_layers(Path(source), chain=()))
        else:
            raise UserError(f'"{source}" is neither a YAML file (*.yaml) nor an override (key=value)')
    return _merge(schema, layers)


def from_dict(schema: type[T], mapping: Mapping[str, Any]) -> T:
    """Build ``schema`` from its defaults and a nested mapping; the inverse of `to_dict`.

    Raises:
        UserError: as `load`, without a source's name in front.
    """
    return _merge(schema, [("", dict(mapping))])


def to_dict(config: Any) -> dict[str, Any]:
    """The config as plain JSON types: tuples become lists, `Fraction` and `Path` become strings."""
    if not is_dataclass(config) or isinstance(config, type):
        raise TypeError(f"to_dict wants a dataclass instance, got {config!r}")
    return {field.name: _plain(getattr(config, field.name)) for field in fields(config)}


def dump(config: Any, path: str | os.PathLike[str]) -> None:
    """Write the config as YAML that `load` reads back to an equal one; the file appears whole or not at all.

    Raises:
        UserError: the file cannot be written.
    """
    path = Path(path)
    text = OmegaConf.to_yaml(OmegaConf.create(to_dict(config)))
    try:
        write_text(path, text)
    except OSError as error:
        raise UserError(os_error_line(path, error)) from None


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return to_dict(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Fraction | os.PathLike) else value


# ---------------------------------------------------------------------------------------------- sources


def _read_layers(path: Path, chain: tuple[Path, ...]) -> list[tuple[str, dict[str, Any]]]:
    """A YAML file and its bases as (name, mapping), in the order in which they merge."""
    path = path if path.exists() else _packaged(path)
    resolved = path.resolve()
    if resolved in chain:
        names = " -> ".join(link.name for link in (*chain, resolved))
        raise UserError(f"{path}: base: the files include each other in a circle: {names}")
    mapping = _read_yaml(path)
    bases = mapping.pop("base", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise UserError(f'{path}: base: {_show(bases)} is not a list of YAML files, such as ["other.yaml"]')
    layers = [layer for base in bases for layer in _read_layers(path.parent / base, (*chain, resolved))]
    return [*layers, (str(path), mapping)]


def _packaged(path: Path) -> Path:
    """configs/… as the package brings it, or configs/NAME.yaml in whichever folder it lies there."""
    if path.parts[:1] == ("configs",):
        beside = _HERE.joinpath(*path.parts[1:])
        found = [beside] if beside.exists() else [*_HERE.rglob(path.name)] if len(path.parts) == 2 else []
        return found[0] if len(found) == 1 else path
    return path


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file{_nearest_file(path)}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not UTF-8 text") from None
    try:
        content = OmegaConf.to_container(OmegaConf.load(io.StringIO(text)))
    except yaml.YAMLError as error:
        raise UserError(f"{path}: {_yaml_problem(error)}") from None
    except (OSError, OmegaConfBaseException) as error:  # OmegaConf's word for "a lone number or string"
        raise UserError(f"{path}: is not a mapping of keys to values: {_first_line(error)}") from None
    if not isinstance(content, dict):
        raise UserError(f'{path}: holds a list, not "key: value" lines')
    return {str(key): value for key, value in content.items()}


def _parse_override(schema: type, source: str) -> dict[str, Any]:
    key, _, text = source.partition("=")
    names = key.split(".")
    if not all(names):
        raise UserError(f'"{source}": an override is written key=value, such as optimizer.lr=1e-4')
    try:
        value = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))["value"]  # type: ignore[index,call-overload]
    except yaml.YAMLError as error:
        raise UserError(f'"{source}": malformed value: {_yaml_reason(error)}') from None
    except OmegaConfBaseException as error:
        raise UserError(f'"{source}": {_first_line(error)}') from None
    expected = _type_at(schema, names)
    if str in _alternatives(expected) and not isinstance(value, str) and text not in ("null", "~"):
        value = text  # run=007 stays "007", run= is the empty string
    return _nest(names, value)


def _nest(names: Sequence[str], value: Any) -> dict[str, Any]:
    """(a, b), value -> {a: {b: value}}."""
    for name in reversed(names[1:]):
        value = {name: value}
    return {names[0]: value}


def _yaml_problem(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    return f"{f'line {mark.line + 1}: ' if mark else ''}malformed YAML: {_yaml_reason(error)}"


def _yaml_reason(error: yaml.YAMLError) -> str:
    return getattr(error, "problem", None) or _first_line(error)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _nearest_file(path: Path) -> str:
    found = {*path.parent.glob("*.y*ml"), *_HERE.rglob("*.yaml")}
    by_name = {file.name: file for file in sorted(found, key=lambda file: file.parent == path.parent)}
    near = difflib.get_close_matches(path.name, by_name, n=1, cutoff=0.0)
    if not near:
        return ""
    file = by_name[near[0]]
    ours = Path("configs") / file.relative_to(_HERE) if file.is_relative_to(_HERE) else file
    return f"; did you mean {ours}?"


# ------------------------------------------------------------------------------------------------ merging


def _merge(schema: type[T], layers: Sequence[tuple[str, dict[str, Any]]]) -> T:
    config = OmegaConf.structured(schema)
    for source, mapping in layers:
        prefix = f"{source}: " if source else ""
        for key, _ in _leaves(schema, mapping):
            _check_key(schema, key, prefix)
        try:
            config = OmegaConf.merge(config, mapping)
        except (OmegaConfBaseException, ValueError, TypeError) as error:
            raise _blame(schema, config, mapping, prefix, error) from None
    try:
        plain = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as error:
        key = error.full_key or "?"
        expected = _describe(_type_at(schema, key.split(".")))
        raise UserError(f"{key} is not given; add {key}=... ({expected})") from None
    except OmegaConfBaseException as error:
        raise UserError(f"{error.full_key}: {_first_line(error)}") from None
    return _build(schema, plain, "")


def _check_key(schema: type, key: str, prefix: str) -> None:
    names = key.split(".")
    if _type_at(schema, names) is not None:
        return
    valid = list(_keys(schema))
    near = difflib.get_close_matches(key, valid, n=1)
    near = near or [known for known in valid if known.split(".")[-1] == names[-1]]  # another parent
    hint = f'did you mean "{near[0]}"?' if near else f"the keys are {', '.join(_hints(schema))}"
    raise UserError(f'{prefix}unknown key "{key}"; {hint}')


def _blame(schema: type, config: Any, mapping: dict[str, Any], prefix: str, error: Exception) -> UserError:
    """The error for the one leaf of ``mapping`` that cannot be merged; OmegaConf does not always name it."""
    for key, value in _leaves(schema, mapping):
        try:
            OmegaConf.merge(config, _nest(key.split("."), value))
        except (OmegaConfBaseException, ValueError, TypeError):
            expected = _describe(_type_at(schema, key.split(".")))
            return UserError(f"{prefix}{key}: {_show(value)} is not {expected}")
    return UserError(f"{prefix}{_first_line(error)}")


def _build(kind: Any, value: Any, key: str) -> Any:
    """Turn validated plain containers into the annotated type: dataclasses and tuples, at any depth."""
    if value is None:
        return None
    for option in _alternatives(kind):
        arguments = get_args(option)
        if is_dataclass(option) and isinstance(option, type) and isinstance(value, dict):
            return _build_dataclass(option, value, key)
        if get_origin(option) is tuple and isinstance(value, list | tuple):
            kinds = [arguments[0]] * len(value) if arguments[-1:] == (Ellipsis,) else list(arguments)
            if len(kinds) != len(value):
                raise UserError(f"{key}: {_show(value)} is not {_describe(option)}")
            pairs = enumerate(zip(kinds, value, strict=True))
            return tuple(_build(kind, item, f"{key}[{i}]") for i, (kind, item) in pairs)
        if get_origin(option) is dict and isinstance(value, dict):
            return {name: _build(arguments[1], item, f"{key}.{name}") for name, item in value.items()}
    if any(option in (Any, dict, list) or get_origin(option) is list for option in _alternatives(kind)):
        return value
    if isinstance(value, list | tuple | dict) or ("[" in key and not _fits(value, kind)):
        raise UserError(f"{key}: {_show(value)} is not {_describe(kind)}")
    return value


def _fits(value: Any, kind: Any) -> bool:
    """Whether a scalar belongs to the annotation; OmegaConf does not look into nested tuples."""
    options = _alternatives(kind)
    literals = [choice for option in options for choice in get_args(option) if get_origin(option) is Literal]
    return value in literals or type(value) in options or (float in options and type(value) is int)


def _build_dataclass(schema: Any, value: dict[str, Any], key: str) -> Any:
    hints = _hints(schema)
    inside = f"{key}." if key else ""
    if "[" in key:  # OmegaConf does not look into the dataclasses of a tuple
        unknown = sorted(set(value) - set(hints))
        if unknown:
            near = difflib.get_close_matches(unknown[0], hints, n=1, cutoff=0.0)[0]
            raise UserError(f'unknown key "{inside}{unknown[0]}"; did you mean "{inside}{near}"?')
        try:
            return from_dict(schema, value)
        except UserError as error:
            raise UserError(f"{inside}{error}") from None
    arguments = {name: _build(hints[name], item, f"{inside}{name}") for name, item in value.items()}
    try:
        return schema(**arguments)
    except UserError:
        raise
    except (ValueError, TypeError) as error:  # what the schema's own __post_init__ refuses
        section = "" if not key or key in str(error) else f"{key}: "
        raise UserError(f"{section}{_first_line(error)}") from error


# ------------------------------------------------------------------------------------------- schema lookups


@functools.cache
def _hints(schema: type) -> dict[str, Any]:
    hints = typing.get_type_hints(schema)
    return {field.name: hints[field.name] for field in fields(schema) if field.init}


def _alternatives(kind: Any) -> list[Any]:
    """The members of a union without None; the type itself when it is no union."""
    members = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
    return [member for member in members if member is not type(None)]


def _type_at(schema: Any, names: Sequence[str]) -> Any:
    """The annotation at a dotted key, ``Any`` inside a dict field, None where there is no such key."""
    kind: Any = schema
    for name in names:
        options = _alternatives(kind)
        nested = next((option for option in options if is_dataclass(option)), None)
        if nested is not None:
            kind = _hints(nested).get(name)  # type: ignore[arg-type]
        else:
            kind = Any if any(get_origin(option) is dict or option is dict for option in options) else None
        if kind is None:
            return None
        if kind is Any:
            return Any
    return kind


def _leaves(schema: type, mapping: Mapping[str, Any], parent: str = "") -> Iterator[tuple[str, Any]]:
    """Every (dotted key, value) of a nested mapping; what lies inside a dict field is one value."""
    for name, value in mapping.items():
        key = f"{parent}{name}"
        kind = _type_at(schema, key.split("."))
        opaque = kind is not None and not any(is_dataclass(option) for option in _alternatives(kind))
        if isinstance(value, Mapping) and value and not opaque:
            yield from _leaves(schema, value, f"{key}.")
        else:
            yield key, value


def _keys(schema: Any, parent: str = "") -> Iterator[str]:
    for name, kind in _hints(schema).items():
        yield f"{parent}{name}"
        for option in _alternatives(kind):
            if is_dataclass(option):
                yield from _keys(option, f"{parent}{name}.")


def _describe(kind: Any) -> str:
    """The annotation in words: "a float", "one of tae, dit", "a list of 2 values (float, float)"."""
    nullable = type(None) in get_args(kind)
    words = " or ".join(_describe_one(option) for option in _alternatives(kind))
    return f"{words} or null" if nullable else words


def _describe_one(kind: Any) -> str:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if origin is tuple:
        names = [getattr(argument, "__name__", str(argument)) for argument in arguments]
        if arguments[-1:] == (Ellipsis,):
            return f"a list of {names[0]}"
        return f"a list of {len(names)} values ({', '.join(names)})"
    if origin is dict or is_dataclass(kind):
        return f"a mapping with the keys {', '.join(_hints(kind))}" if is_dataclass(kind) else "a mapping"  # type: ignore[arg-type]
    name = getattr(kind, "__name__", str(kind))
    return f"an {name}" if name == "int" else f"a {name}"


def _show(value: Any) -> str:
    text = {None: "null", True: "true", False: "false"}.get(value) if isinstance(value, bool | None) else None
    text = text or (f'"{value}"' if isinstance(value, str) else str(value))
    return text if len(text) <= 60 else f"{text[:57]}..."
