"""From msgspec's words to ours: the field by its path, what is wrong with it, and what is accepted there.

Pure. msgspec says where a value is wrong ("... - at `$.sites[0].role`") but not which values are right; those
are read from the types of the section's fields.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import msgspec
import yaml


def explain(error: msgspec.ValidationError, root: type[msgspec.Struct]) -> str:
    """Turn "Invalid enum value 'x' - at `$.a[0].b`" into "a[0].b: invalid enum value 'x'; accepted: y, z".

    Args:
        error: raised by `msgspec.convert(..., root)`.
        root: the type of the whole file.
    """
    found = re.fullmatch(r"(.*) - at `(?:key` in `)?\$\.?(.*)`", str(error), re.DOTALL)
    what, path = (found[1], found[2]) if found else (str(error), "")
    text = f"{path or 'fleet'}: {what[:1].lower()}{what[1:]}"
    names = accepted(type_at(root, path))
    if names and ("unknown field" in what or "enum value" in what):
        text += f"; accepted: {', '.join(names)}"
    return text


def type_at(root: Any, path: str) -> Any:
    """Return the declared type at a path such as `sites[0].workers[1].role`, None when there is none."""
    here = root
    for name, index in re.findall(r"([A-Za-z_]\w*)|(\[[^]]*\])", path):
        if index:
            here = get_args(here)[0] if get_origin(here) is list else None
        elif isinstance(here, type) and issubclass(here, msgspec.Struct):
            here = {field.name: field.type for field in msgspec.structs.fields(here)}.get(name)
        else:
            return None
    return here


def accepted(declared: Any) -> list[str]:
    """Return the keys of a section or the values of a choice, [] for any other type."""
    if isinstance(declared, type) and issubclass(declared, msgspec.Struct):
        return [field.name for field in msgspec.structs.fields(declared)]
    if isinstance(declared, UnionType) or get_origin(declared) is Union:
        return [
            value for part in get_args(declared) if get_origin(part) is Literal for value in accepted(part)
        ]
    return [str(value) for value in get_args(declared)] if get_origin(declared) is Literal else []


class StrictLoader(yaml.SafeLoader):
    """YAML without the trap of a key given twice, of which plain YAML keeps the last without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Build a mapping. Raises yaml.YAMLError for a repeated key."""
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.MarkedYAMLError(None, None, f"the key {key.value!r} is repeated", key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)
