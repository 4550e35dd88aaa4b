"""From a TOML file and command-line options to a checked `Config`: the file first, then options.

Nothing is converted on the way: a number in quotes or a fraction for a count is an error, as is
any field that is not known.
"""

import dataclasses
import difflib
import tomllib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import cattrs
import tyro
from cattrs.errors import ForbiddenExtraKeysError

from shardwise.cli.config import Config, ConfigError

_T = TypeVar("_T")


def read_config(path: Path) -> Config:
    """Read a TOML file; what it leaves out keeps its default.

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
    try:
        return _converter().structure(fields, Config)
    except (cattrs.BaseValidationError, ConfigError) as error:
        faults = cattrs.transform_error(error, format_exception=_explain)
        raise ConfigError(f"{path}: {'; '.join(map(_place_first, faults))}") from error


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
    default = start(read_config(Path(options[0])) if has_file else Config())
    arguments = list(options[has_file:])
    return tyro.cli(type(default), args=arguments, default=default, prog=prog, description=about)


def _converter() -> cattrs.Converter:
    converter = cattrs.Converter(forbid_extra_keys=True)
    for kind in (bool, int, float, str):
        converter.register_structure_hook(kind, _check_kind)
    hooks: dict[Any, Callable[[Any, Any], Any]] = {Literal: _check_choice, tuple: _check_list}
    for origin, hook in hooks.items():
        converter.register_structure_hook_func(partial(_is_made_from, origin), hook)
    converter.register_structure_hook_factory(dataclasses.is_dataclass, _section_reader)
    return converter


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
    return f"{', '.join(texts)}; known fields: {', '.join(known)}"


def _place_first(fault: str) -> str:
    """Turn cattrs' `text @ $.section.field` round; a `ConfigError` names its field itself."""
    text, _, path = fault.rpartition(" @ $")
    place = path.lstrip(".")
    if text.startswith("is "):
        return f"{place} {text}"
    return f"{place}: {text}" if place and text.startswith("unknown ") else text


def _fields_of(cls: type) -> list[str]:
    return [field.name for field in dataclasses.fields(cls)]
