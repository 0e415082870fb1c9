"""Commits written into a file of `configs/`, beside what names their repositories; the rest of it stays as it is."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import yaml

from vipo.config.resolved import MOST_BYTES, from_yaml
from vipo.config.validation import ConfigError
from vipo.provenance.files import atomic_file
from vipo.regular import read_regular

_COMMIT = re.compile(r"[0-9a-f]{40}")
_NULL = "tag:yaml.org,2002:null"

Commits = Mapping[tuple[str, str], str]
"""By a key and its text, such as ``("path", "owner/name")``."""


def pin(file: Path, commits: Commits) -> int:
    """Write commits into a YAML file.

    Beside each key and text of `commits` the key ``revision`` (of ``path`` and ``backbone``) or ``<key>_revision`` is
    set, where it is null or not there. Comments and layout stay.

    Args:
        file: of `configs/`, or a resolved configuration.
        commits: whole hashes.

    Returns:
        How many were written.

    Raises:
        ConfigError: the file cannot be read, or names none of them.
        StorageError: it cannot be written.
    """
    try:
        text = read_regular(file, MOST_BYTES).decode()
        # Refuses aliases and depths before PyYAML's own composer meets them.
        from_yaml(text)
        edits = sorted(_edits(yaml.compose(text, Loader=yaml.SafeLoader), text, commits), reverse=True)
    except OSError as error:
        raise ConfigError(f"--pin {file}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise ConfigError(f"--pin {file}: {error}") from error
    if not edits:
        wanted = ", ".join(f"{key}: {text}" for key, text in commits)
        raise ConfigError(f"--pin {file}: names no repository that lacks a commit ({wanted}); name the file that does")
    for start, end, written in edits:
        text = text[:start] + written + text[end:]
    with atomic_file(file) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return len(edits)


def _edits(node: yaml.Node | None, text: str, commits: Commits) -> Iterator[tuple[int, int, str]]:
    """Pieces of `text` by start and end, and what takes their place."""
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _edits(item, text, commits)
    if not isinstance(node, yaml.MappingNode):
        return
    keys = {key.value: value for key, value in node.value if isinstance(key, yaml.ScalarNode)}
    for key, value in node.value:
        yield from _edits(value, text, commits)
        if not (isinstance(key, yaml.ScalarNode) and isinstance(value, yaml.ScalarNode)):
            continue
        commit = commits.get((key.value, value.value))
        if commit is None or not _COMMIT.fullmatch(commit):
            continue
        name = "revision" if key.value in ("path", "backbone") else f"{key.value}_revision"
        held = keys.get(name)
        if held is None:
            yield _added(node, key, value, f'{name}: "{commit}"', text)
        elif held.tag == _NULL:
            start, end = held.start_mark.index, held.end_mark.index
            # Quoted: of digits alone, or with one e among them, it would be a number. A null may be written as nothing.
            yield start, end, f'"{commit}"' if end > start else f' "{commit}"'


def _added(
    node: yaml.MappingNode, key: yaml.ScalarNode, value: yaml.ScalarNode, line: str, text: str
) -> tuple[int, int, str]:
    if node.flow_style:
        place = value.end_mark.index
        return place, place, f", {line}"
    end = text.find("\n", value.end_mark.index)
    place = len(text) if end < 0 else end
    return place, place, f"\n{' ' * key.start_mark.column}{line}"
