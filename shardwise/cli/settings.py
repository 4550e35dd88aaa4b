"""From a TOML file and command-line options to a checked `Config`: the file first, then options.

Nothing is converted on the way: a number in quotes or a fraction for a count is an error, as is
any field that is not known. Which fields a section has depends on its tag, `data.source` or
`model.kind`; so the tags are read before all else, and an option for one beats the file.
"""

import argparse
import dataclasses
import difflib
import tomllib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import cattrs
import tyro
from cattrs.errors import ForbiddenExtraKeysError

from shardwise.cli.checks import ConfigError
from shardwise.cli.config import Config
from shardwise.cli.data_config import DataConfig
from shardwise.cli.model_config import ModelConfig

_T = TypeVar("_T")

_UNIONS: dict[Any, tuple[str, str]] = {
    DataConfig: ("data", "source"),
    ModelConfig: ("model", "kind"),
}
"""The sections of several classes, and the field whose value tells the classes apart."""


def read_config(path: Path, tags: Mapping[tuple[str, str], str] | None = None) -> Config:
    """Read a TOML file; what it leaves out keeps its default.

    Args:
        path: The file.
        tags: Values of `("data", "source")` and `("model", "kind")` that replace the file's.

    Raises:
        ConfigError: There is no such file, it is not TOML, or a field is unknown, of a wrong type
            or out of range; the message names the file and every such field.
    """
    try:
        fields = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the config file: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: this is not TOML: {error}") from error
    return _structure(str(path), fields, tags or {})


def _structure(name: str, fields: dict[str, Any], tags: Mapping[tuple[str, str], str]) -> Config:
    """Check what a file says, its tags replaced; `name` is the file's."""
    for (section, tag), value in tags.items():
        if isinstance(inner := fields.setdefault(section, {}), dict):
            inner[tag] = value
    try:
        return _converter().structure(fields, Config)
    except (cattrs.BaseValidationError, ConfigError) as error:
        faults = cattrs.transform_error(error, format_exception=_explain)
        raise ConfigError(f"{name}: {'; '.join(map(_place_first, faults))}") from error


def read_options(
    command: str, options: Sequence[str], about: str, start: Callable[[Config], _T]
) -> _T:
    """Read the config file, which comes first, and the options over it.

    Args:
        command: The subcommand, for messages.
        options: What stands on the command line after it.
        about: What the command does.
        start: Makes what the options change, a dataclass, from the file's config. Its docstrings
            explain the options. Without a file, `--help` shows the defaults.

    Raises:
        ConfigError: No file is named, or the file is wrong.
        SystemExit: With 2 after an error in an option was printed, with 0 after help was.
    """
    prog = f"shardwise {command} CONFIG.toml"
    has_file = bool(options) and not options[0].startswith("-")
    if not has_file and not {"-h", "--help"} & set(options):
        raise ConfigError(f"the config file must come first: {prog} [options]")
    tags, arguments = _take_tags(prog, options[has_file:])
    name = options[0] if has_file else "the options"
    config = read_config(Path(name), tags) if has_file else _structure(name, {}, tags)
    default = start(config)
    return tyro.cli(
        type(default),
        args=arguments,
        default=default,
        prog=prog,
        description=about,
        # The class of a section is settled by its tag; the options are those of its fields.
        config=(tyro.conf.AvoidSubcommands,),
    )


def _take_tags(prog: str, options: Sequence[str]) -> tuple[dict[tuple[str, str], str], list[str]]:
    """Take the tags out of the options; give them, and the options that are left."""
    parser = argparse.ArgumentParser(prog, add_help=False, allow_abbrev=False)
    for union, (section, tag) in _UNIONS.items():
        parser.add_argument(f"--{section}.{tag}", choices=list(_choices(union, tag)))
    taken, left = parser.parse_known_args(options)
    given = vars(taken)
    tags = {place: given[".".join(place)] for place in _UNIONS.values()}
    return {place: value for place, value in tags.items() if value is not None}, left


def _choices(union: Any, tag: str) -> dict[str, type]:
    """Give the classes of a section by their tags."""
    return {getattr(cls, tag): cls for cls in get_args(union)}


def _converter() -> cattrs.Converter:
    converter = cattrs.Converter(forbid_extra_keys=True)
    for kind in (bool, int, float, str):
        converter.register_structure_hook(kind, _check_kind)
    hooks: dict[Any, Callable[[Any, Any], Any]] = {Literal: _check_choice, tuple: _check_list}
    for origin, hook in hooks.items():
        converter.register_structure_hook_func(partial(_is_made_from, origin), hook)
    converter.register_structure_hook_factory(dataclasses.is_dataclass, _section_reader)
    for union in _UNIONS:
        converter.register_structure_hook(union, partial(_read_tagged, converter))
    return converter


def _read_tagged(converter: cattrs.Converter, value: Any, union: Any) -> Any:
    """Read a section as the class that its tag names, by default the first."""
    section, tag = _UNIONS[union]
    choices = _choices(union, tag)
    given = value.get(tag, next(iter(choices))) if isinstance(value, dict) else next(iter(choices))
    if given not in list(choices):
        raise ConfigError(f"{section}.{tag} is {given!r}, wanted: one of {list(choices)}")
    return converter.structure(value, choices[given])


def _is_made_from(origin: Any, kind: Any) -> bool:
    return get_origin(kind) is origin


def _check_kind(value: Any, kind: type) -> Any:
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise TypeError(f"is {value!r}, wanted: {kind.__name__}")
    return value


def _check_choice(value: Any, kind: Any) -> Any:
    if value not in get_args(kind):
        raise TypeError(f"is {value!r}, wanted: one of {list(get_args(kind))}")
    return value


def _check_list(value: Any, kind: Any) -> tuple[Any, ...]:
    element = get_args(kind)[0]
    if type(value) is not list or any(type(item) is not element for item in value):
        raise TypeError(f"is {value!r}, wanted: a list of {element.__name__}")
    return tuple(value)


def _section_reader(cls: type, converter: cattrs.Converter) -> Callable[[Any, Any], Any]:
    """Read a section with cattrs, after checking that it is one."""
    read: Callable[[Any, Any], Any] = cattrs.gen.make_dict_structure_fn(
        cls, converter, _cattrs_forbid_extra_keys=True
    )

    def structure(value: Any, kind: Any) -> Any:
        if not isinstance(value, dict):
            raise TypeError(f"is {value!r}, wanted: a section with fields {_fields_of(cls)}")
        return read(value, kind)

    return structure


def _explain(error: BaseException, kind: Any) -> str:
    """Give the message of one fault, unknown fields with those that are known."""
    if not isinstance(error, ForbiddenExtraKeysError):
        return str(error)
    known = _fields_of(error.cl)
    texts = []
    for name in sorted(error.extra_fields):
        close = difflib.get_close_matches(name, known, 1)
        texts.append(f"unknown field {name!r}" + (f" (is it {close[0]!r}?)" if close else ""))
    tag = next((tag for _, tag in _UNIONS.values() if tag in known), "")
    of_tag = f" of {tag} {getattr(error.cl, tag)!r}" if tag else ""
    return f"{', '.join(texts)}; known fields{of_tag}: {', '.join(known)}"


def _place_first(fault: str) -> str:
    """Turn cattrs' `text @ $.section.field` round; a `ConfigError` names its field itself."""
    text, _, path = fault.rpartition(" @ $")
    place = path.lstrip(".")
    if text.startswith("is "):
        return f"{place} {text}"
    return f"{place}: {text}" if place and text.startswith("unknown ") else text


def _fields_of(cls: type) -> list[str]:
    return [field.name for field in dataclasses.fields(cls)]
