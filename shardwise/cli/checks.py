"""The error of a setting that cannot be used, and the two checks that most settings need."""


class ConfigError(ValueError):
    """A setting that cannot be used; the message names it."""


def require(name: str, value: object, is_right: bool, wanted: str) -> None:
    """Raise `ConfigError` unless a value is right; `wanted` says what would be."""
    if not is_right:
        raise ConfigError(f"{name} is {value!r}, wanted: {wanted}")


def require_least(name: str, value: int, least: int) -> None:
    """Raise `ConfigError` unless a value is at least this."""
    require(name, value, value >= least, f"at least {least}")


def require_positive(name: str, value: float) -> None:
    """Raise `ConfigError` unless a value is over 0 and finite."""
    require(name, value, 0 < value < float("inf"), "over 0 and finite")
