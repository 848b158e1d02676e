"""Validated, frozen settings: sections of a recipe, read from plain data and `a.b=c` overrides.

A setting that affects speed, location or presentation only is declared with `NOT_CONTENT`
(`save_steps: Annotated[int, NOT_CONTENT] = 20`): it is not part of a fingerprint, so changing it recomputes nothing.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import PydanticUndefined

from cotree.base.errors import UsageError

NOT_CONTENT: Final = "not content"
_NAME = re.compile(r"[^\W_][\w.+-]*")
LONGEST_NAME: Final = 200  # of the 255 bytes of a file name; drafts need some
S = TypeVar("S", bound="Section")


class Section(BaseModel):
    """Base class of a recipe's sections: frozen; unknown keys are errors that suggest the nearest known key."""

    # Errors never show the given value: it may be an API key in the wrong place.
    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, populate_by_name=True, hide_input_in_errors=True
    )

    @model_validator(mode="before")
    @classmethod
    def _keys_known(cls, given: Any) -> Any:
        if isinstance(given, dict):
            require_known("unknown key", given, [field.alias or name for name, field in cls.model_fields.items()])
        return given


def hashed_settings(section: Section) -> dict[str, Any]:
    """The settings of a section for its fingerprint, as plain data, without `NOT_CONTENT` and default values.

    Defaults are left out so that adding a setting whose default keeps the old behaviour changes no fingerprint.
    """
    found = {}
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        default = field.get_default(call_default_factory=True)
        if NOT_CONTENT not in field.metadata and (value != default or default is PydanticUndefined):
            found[field.alias or name] = _plain(value)
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, Section):
        return hashed_settings(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def nearest(name: object, known: Iterable[object]) -> str:
    """A hint for an unknown name: "did you mean `sft`?", or the list of known names."""
    names = [*map(str, known)]
    near = difflib.get_close_matches(str(name), names, n=1)
    return f"did you mean `{near[0]}`?" if near else f"known: {', '.join(names) or 'none'}"


def require_known(fault: str, names: Iterable[object], known: Sequence[str]) -> None:
    """Raise ValueError for the first unknown name: the fault, the name and the nearest known name."""
    for name in names:
        if name not in known:
            raise ValueError(f"{fault} `{name}`; {nearest(name, known)}")


def require_name(name: str, where: str) -> str:
    """Check that a name is also a valid folder name, and return it.

    Raises:
        UsageError: it is not, or could leave its parent folder.
    """
    if _NAME.fullmatch(name) and len(name.encode()) <= LONGEST_NAME:
        return name
    fault = f"`{name[:40]}{'...' * (len(name) > 40)}` is no name"
    form = f"a letter or digit, then letters, digits, `.`, `_`, `+` and `-`, at most {LONGEST_NAME} bytes"
    raise UsageError(f"{where}: {fault}; give {form}")


def parse_section(kind: type[S], raw: Any, where: str) -> S:
    """Validate plain data as a section; `where` names it in errors ("students.dpo").

    Raises:
        UsageError: one line with every invalid key, its fault and the fix.
    """
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        raise UsageError("; ".join(_explain(where, problem) for problem in error.errors())) from None


def apply_override(raw: dict[str, Any], override: str, example: str) -> None:
    """Apply an override to nested plain data: `a.b=c` sets `raw["a"]["b"]` to the YAML value c, creating sections.

    Errors never show the value: it may be an API key.

    Raises:
        UsageError: not an override (the message shows the `example`), invalid YAML, or a part of the path is a value.
    """
    key, equals, text = override.partition("=")
    if not equals or not key:
        start = f"`{override}`" if len(override) <= 16 else f"a word that begins with `{override[:8]}`"
        raise UsageError(f"{start} is no setting; write it as key=value, e.g. {example}")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise UsageError(f"`{key}`: the value is not YAML; quote it") from None
    set_value(raw, key, value, f"`{key}`")


def set_value(place: dict[str, Any], key: str, value: Any, where: str) -> None:
    """Set `place["a"]["b"]` for the key `a.b`, creating missing sections.

    Args:
        where: names the place in errors.

    Raises:
        UsageError: a part of the key's path is a value.
    """
    *sections, last = key.split(".")
    for section in sections:
        if place.get(section) is None:
            place[section] = {}
        place = place[section]
        if not isinstance(place, dict):
            raise UsageError(f"{where}: `{section}` is a value, not a section")
    place[last] = value


# {pydantic's error type: a plainer message}
_PLAIN = (
    ("^Value error, ", ""),
    ("^[A-Z][a-z]+ should ", "must "),
    (" after validation, .*|, unable to .*|, got .*| or instance of .*", ""),
    ("a valid dictionary", "a section of keys, like {}"),
    ("a valid integer", "a whole number"),
    ("a valid boolean", "true or false"),
    ("a valid (tuple|list)", "a list"),
    ("a valid ", "a "),
)


def _explain(where: str, problem: Any) -> str:
    """Format a pydantic error as `a.b: fault`."""
    key = ".".join(part for part in (where, *map(str, problem["loc"])) if part)
    if problem["type"] == "missing":
        return f"`{key}` is missing"
    message = problem["msg"]
    for pattern, plain in _PLAIN:
        message = re.sub(pattern, plain, message)
    return f"`{key}`: {message}" if key else message
