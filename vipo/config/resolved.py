"""Resolved configurations as YAML text: plain data, never interpolated again.

Any string reads back as itself, ``${seed}`` too. What is read is bounded, because others write such files as well: a
regular file, no anchors (an alias stands for a copy, and copies of copies grow without end), no deep nesting.
"""

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from vipo.regular import read_regular
from vipo.text import shortened, visible

MOST_BYTES = 2**18
_MOST_LEVELS = 50
_FLOAT = "tag:yaml.org,2002:float"
_STRING = yaml.resolver.BaseResolver.DEFAULT_SCALAR_TAG
# To YAML 1.1, 1e-5 is text for want of a point, and 1.5e5 for want of a sign; to Hydra both are numbers.
_NUMBER = re.compile(r"[-+]?[0-9]+(_[0-9]+)*(\.[0-9_]*)?[eE][-+]?[0-9]+\Z")


class _Writer(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


class _Reader(yaml.SafeLoader):
    levels = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise self._refused("holds an alias: write out what it stands for")
        if self.levels == _MOST_LEVELS:
            raise self._refused(f"is nested more than {_MOST_LEVELS} levels deep")
        self.levels += 1
        node = super().compose_node(parent, index)
        self.levels -= 1
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep=deep)
        # What a file calls a number, a date or a truth value need not be one; PyYAML's readers fail in their own way.
        except (ValueError, KeyError, AttributeError, OverflowError) as error:
            what = node.tag.rpartition(":")[2]
            raise yaml.constructor.ConstructorError(
                None, None, f"holds no {what} that can be read ({shortened(str(error), 80)})", node.start_mark
            ) from error

    def _refused(self, why: str) -> yaml.YAMLError:
        return yaml.composer.ComposerError(None, None, why, self.get_mark())

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        names = set()
        for key, _ in node.value:
            if key.tag != _STRING:
                continue
            if key.value in names:
                raise yaml.constructor.ConstructorError(None, None, f"names {key.value!r} twice", key.start_mark)
            names.add(key.value)
        return super().construct_mapping(node, deep=deep)


def _text(writer: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    # PyYAML's single quotes lose a line's end that is not a newline, and double ones alone know escapes.
    style = '"' if visible(value) != value else "'" if _looks_like_a_value(value) else None
    return writer.represent_scalar(_STRING, value, style=style)


def _looks_like_a_value(text: str) -> bool:
    # The writer quotes what its own resolvers take for something else.
    try:
        float(text)
    except ValueError:
        return _NUMBER.match(text) is not None or text.lower() in ("y", "n")
    return True


_Writer.add_representer(str, _text)
_Reader.add_implicit_resolver(_FLOAT, _NUMBER, list("-+0123456789"))
# A date is text here: no key takes anything else.
_Reader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in found if tag != "tag:yaml.org,2002:timestamp"]
    for first, found in _Reader.yaml_implicit_resolvers.items()
}


def to_yaml(data: Any) -> str:
    """Plain data (mappings, lists, text, numbers, null) as YAML, in its order."""
    text = yaml.dump(data, Dumper=_Writer, default_flow_style=False, allow_unicode=True, sort_keys=False)
    # What a terminal obeys stands in double quotes, where YAML reads the same escapes.
    return visible(str(text))


def from_yaml(text: str | bytes) -> Any:
    """What `to_yaml` wrote, or another file of plain data.

    Raises:
        ValueError: it is no YAML, holds aliases, is nested deeply, names a key twice, or holds a number of thousands
            of digits; the message says where.
    """
    try:
        return yaml.load(text, Loader=_Reader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"is not valid YAML: {' '.join(str(error).split())}") from error


def read_mapping(path: Path) -> dict[str, Any]:
    """A file of `to_yaml` whose keys are text.

    Raises:
        ValueError: it cannot be read so; the message begins with the file's name.
    """
    try:
        data = from_yaml(read_regular(path, MOST_BYTES))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path}: holds no mapping of keys to values")
    return {str(key): value for key, value in data.items()}
