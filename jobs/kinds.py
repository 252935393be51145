"""Does a plain value fit an annotation? A setting of another kind is named before anything is built or read."""

import inspect
from collections.abc import Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", Path: "a path",
         NoneType: "null"}  # fmt: skip


def hints(code: Any) -> dict[str, Any]:
    """The annotations of what a `_target_` names, as far as they can be resolved; {} for code of others."""
    if not str(getattr(code, "__module__", "")).startswith(("dreamgen.", "idm.")):
        return {}
    try:
        return get_type_hints(code.__init__ if inspect.isclass(code) else code)
    except NameError:  # imported for type checkers alone
        return {}


def settings(code: Any) -> set[str]:
    """Names of all that what a `_target_` names can be given; of a class also what it hands on to its bases."""
    made = [base.__init__ for base in code.__mro__ if "__init__" in vars(base)] if inspect.isclass(code) else [code]
    found = [argument for each in made for argument in inspect.signature(each).parameters.values()]
    return {argument.name for argument in found if argument.kind not in (argument.VAR_POSITIONAL, argument.VAR_KEYWORD)}


def expected(value: Any, hint: Any) -> str:
    """What an annotation asks for in place of a plain `value`, in words; "" where it fits or nobody can tell."""
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    if any(_fits(value, kind) for kind in kinds) or isinstance(value, float) and {int, str} <= set(kinds):  # a rate
        return ""
    return " or ".join(dict.fromkeys(_word(kind) for kind in kinds))


def _fits(value: Any, kind: Any) -> bool:
    origin = get_origin(kind) or kind
    if origin is Literal:
        return value in get_args(kind)
    if not inspect.isclass(origin) or origin in (object, Any):
        return True
    if value is None:
        return origin is NoneType
    if isinstance(value, dict):
        return "_target_" in value or origin not in WORDS and issubclass(origin, Mapping)
    if isinstance(value, list):
        return origin not in WORDS and not issubclass(origin, Mapping) and hasattr(origin, "__iter__")
    if isinstance(value, str):
        return origin in (str, Path)
    return isinstance(value, bool) == (origin is bool) and (origin in (type(value), float) or isinstance(value, origin))


def _word(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return ", ".join(map(str, get_args(kind)))
    origin = get_origin(kind) or kind
    if origin in WORDS:
        return WORDS[origin]
    if issubclass(origin, Mapping):
        return "{name: value}"
    if hasattr(origin, "__iter__") and origin.__module__ != "dreamgen.core.protocols" and get_args(kind):
        return "[a list]"
    ours = origin.__module__.startswith(("dreamgen.", "idm.")) and not getattr(origin, "_is_protocol", False)
    made = f"{origin.__module__}.{origin.__qualname__}" if ours else "..."
    return f"the {origin.__name__} that a `_target_: {made}` makes"
