"""JSON Schemas for editors: of the files under `configs/`, each of which holds parts of sections for Hydra to compose.

They are made from the models and differ from `Config.model_json_schema` in four ways. What is composed of several
files may be absent from any of them; an interpolation or Hydra's ``???`` may stand for any value; null may stand for a
part that a file before has chosen; and Hydra's own keys are known.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vipo.config.compose import write_if_changed
from vipo.config.run import Config

WHOLE = "config"
"""Name of the schema of ``config.yaml`` and of files in the package ``_global_``, which hold parts of all sections."""

_DIALECT = "https://json-schema.org/draft/2020-12/schema"
_LATER = {"type": "string", "pattern": r"\$\{.+\}|^\?\?\?$", "description": "An interpolation, or ??? for: missing."}
_CHOICE = {
    "type": "object",
    "minProperties": 1,
    "maxProperties": 1,
    "propertyNames": {"pattern": r"^(optional +|override +)*/?[\w/.-]+(@[\w.:]+)?$"},
    "additionalProperties": {"anyOf": [{"type": ["string", "null"]}, {"type": "array", "items": {"type": "string"}}]},
}
_DEFAULTS = {
    "type": "array",
    "description": "Hydra's defaults list: files that this one is composed with, in order; _self_ is this file.",
    "items": {"anyOf": [{"type": "string"}, _CHOICE]},
}
# What is said of a value, beside what it may be.
_SAID = ("description", "default")


def editor_schemas() -> dict[str, dict[str, Any]]:
    """One schema for each section, by its name, for files that hold it; and `WHOLE`, for parts of several."""
    complete = Config.model_json_schema()
    whole = _part(complete, complete["$defs"], composed=True)
    schemas = {WHOLE: whole} | {name: value for name, value in whole["properties"].items() if _sections(value)}
    return {name: _of_a_file(name, schema) for name, schema in schemas.items()}


def write_editor_schemas(folder: Path) -> list[Path]:
    """Write ``<name>.json`` for each of `editor_schemas` into a folder, where it is not current; gives all of them."""
    found = {folder / f"{name}.json": schema for name, schema in editor_schemas().items()}
    for path, schema in found.items():
        write_if_changed(path, json.dumps(schema, indent=1, ensure_ascii=False) + "\n")
    return list(found)


def _part(node: Mapping[str, Any], definitions: Mapping[str, Any], *, composed: bool) -> dict[str, Any]:
    """A schema without references, whose values may be interpolations.

    Args:
        node: of pydantic.
        definitions: what its references name.
        composed: whether Hydra merges such a value from several files, as it does mappings, but not a list's items.
    """
    if "$ref" in node:
        siblings = {key: value for key, value in node.items() if key != "$ref"}
        return _part({**definitions[node["$ref"].rpartition("/")[2]], **siblings}, definitions, composed=composed)
    # A section that takes any key is told from others by what it requires.
    closed = node.get("additionalProperties") is False
    left_out = {"$defs", "title", "discriminator", *(("required",) if composed and closed else ())}
    made = {key: value for key, value in node.items() if key not in left_out}
    # A section's defaults stand at its own keys.
    if isinstance(made.get("default"), dict):
        del made["default"]
    # Without the key that tells them apart, which another file may hold, several may fit.
    branches = made.pop("oneOf", made.get("anyOf"))
    if branches is not None:
        made["anyOf"] = [_part(item, definitions, composed=composed) for item in branches]
        if composed and len(_sections(made)) > 1:
            # Another part's options, of a file before, are let go of.
            made["anyOf"].append({"type": "null"})
    if "properties" in made:
        properties = made["properties"].items()
        made["properties"] = {key: _value(_part(item, definitions, composed=composed)) for key, item in properties}
    if isinstance(made.get("additionalProperties"), dict):
        made["additionalProperties"] = _value(_part(made["additionalProperties"], definitions, composed=composed))
    if "items" in made:
        made["items"] = _value(_part(made["items"], definitions, composed=False))
    if "prefixItems" in made:
        made["prefixItems"] = [_value(_part(item, definitions, composed=False)) for item in made["prefixItems"]]
    return made


def _value(schema: dict[str, Any]) -> dict[str, Any]:
    """What may stand at a key: a value, or an interpolation in its place."""
    said = {key: schema[key] for key in _SAID if key in schema}
    body = {key: value for key, value in schema.items() if key not in said}
    if body == {"type": "string"} or not body:
        return schema
    return {**said, "anyOf": [*(body["anyOf"] if body.keys() == {"anyOf"} else [body]), {"$ref": "#/$defs/later"}]}


def _sections(schema: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What a value may be that is a section: several for a section whose own key tells which it is."""
    if "properties" in schema:
        return [dict(schema)]
    return [section for item in schema.get("anyOf", ()) for section in _sections(item)]


def _of_a_file(name: str, schema: Mapping[str, Any]) -> dict[str, Any]:
    own: dict[str, Any] = {"defaults": _DEFAULTS}
    if name == WHOLE:
        own["hydra"] = {"type": "object", "description": "Hydra's own settings."}
    sections = [item | {"properties": item["properties"] | own} for item in _sections(schema)]
    body = sections[0] if len(sections) == 1 else {"anyOf": sections}
    return {"$schema": _DIALECT, "title": f"vipo: {name}", **body, "$defs": {"later": _LATER}}
