"""MkDocs hooks: the pages that are made from the code, and links to files that no page is."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
_ROOT_PAGES = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
_LINK = re.compile(r"\[([^\]]*)\]\((?!\w+:)([^)\s]+)\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the reference, from the models and the commands, and the pages that lie at the repository's root."""
    made = {
        "reference/configuration.md": configuration_page(),
        "reference/commands.md": commands_page(),
        **{page: (ROOT / name).read_text(encoding="utf-8") for name, page in _ROOT_PAGES.items()},
    }
    for path, content in made.items():
        files.append(File.generated(config, path, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point at the site's own pages; a file of the repository that is none is named instead."""
    from_root = page.file.src_uri in _ROOT_PAGES.values()
    folder = Path("docs", page.file.src_uri).parent

    def replaced(found: re.Match[str]) -> str:
        text, target = found.groups()
        path, _, anchor = target.partition("#")
        if not path or path.startswith("/"):
            return found[0]
        named = _normal(Path(path) if from_root else folder / path)
        if named in _ROOT_PAGES:
            own = _ROOT_PAGES[named]
        elif named.startswith("docs/"):
            own = named.removeprefix("docs/")
        elif (ROOT / named).exists():
            return f"{text} (`{named}`)" if named not in text else text
        else:
            # Not there: MkDocs says so, and strictly.
            return found[0]
        if not from_root and named not in _ROOT_PAGES:
            return found[0]
        up = "../" * page.file.src_uri.count("/")
        return f"[{text}]({up}{own}{'#' + anchor if anchor else ''})"

    return _LINK.sub(replaced, markdown)


def commands_page() -> str:
    """The command line's own help, as a page."""
    import typer
    from typer.cli import get_docs_for_click

    from vipo.cli import app

    command = typer.main.get_command(app)
    context = typer.Context(command, info_name="vipo")
    return get_docs_for_click(obj=command, ctx=context, name="vipo", title="Commands")


def configuration_page() -> str:
    """Every key of every section: what it may be, its default, what it means. From the models that validate it."""
    from vipo.config.run import Config

    schema = Config.model_json_schema()
    definitions: Mapping[str, Any] = schema["$defs"]
    lines = [
        "# Configuration",
        "",
        "`vipo config experiment=demo arm=vipo` prints a whole one. An unknown key is an error that names the known.",
        "",
    ]
    sections: dict[str, Mapping[str, Any]] = {"Top level": schema}
    # Grows while it is walked: a section's keys name others.
    for title in (titles := list(sections)):
        section = sections[title]
        lines += [f"## {title}", "", str(section.get("description", "")), ""]
        lines += ["| key | value | default | |", "|---|---|---|---|"]
        required = set(section.get("required", ()))
        for key, value in section["properties"].items():
            default = "required" if key in required else _default(value)
            said = _cell(value.get("description", ""))
            lines.append(f"| `{key}` | {_kind(value, definitions)} | {default} | {said} |")
            for name, found in _sections(value, definitions):
                if name not in sections:
                    sections[name] = found
                    titles.append(name)
        lines.append("")
    return "\n".join(lines)


def _normal(path: Path) -> str:
    parts: list[str] = []
    for part in path.parts:
        if part == "..":
            parts.pop()
        else:
            parts.append(part)
    return "/".join(parts)


def _sections(node: Any, definitions: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Title and schema of each section that a value may be, or hold."""
    if isinstance(node, Mapping):
        node = _resolved(node, definitions)
        if "properties" in node:
            yield _title(node), node
        else:
            for key in ("anyOf", "oneOf", "items", "prefixItems", "additionalProperties"):
                yield from _sections(node.get(key), definitions)
    elif isinstance(node, list):
        for item in node:
            yield from _sections(item, definitions)


def _resolved(node: Mapping[str, Any], definitions: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a reference names."""
    name = str(node.get("$ref", "")).rpartition("/")[2]
    return {"title": name, **definitions[name]} if name else node


def _title(section: Mapping[str, Any]) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", str(section["title"]).removesuffix("Config"))


def _kind(node: Mapping[str, Any], definitions: Mapping[str, Any]) -> str:
    node = _resolved(node, definitions)
    if "properties" in node:
        title = _title(node)
        return f"[{title}](#{title.lower().replace(' ', '-')})"
    if "enum" in node:
        return " \\| ".join(f"`{_shown(item)}`" for item in node["enum"])
    if "const" in node:
        return f"`{_shown(node['const'])}`"
    for branch in ("anyOf", "oneOf"):
        if branch in node:
            return ", or ".join(dict.fromkeys(_kind(item, definitions) for item in node[branch]))
    kind = str(node.get("type", "any"))
    if kind == "array":
        return f"list of {_kind(node['items'], definitions)}" if node.get("items") else "list"
    if kind == "object":
        values = node.get("additionalProperties")
        return f"mapping to {_kind(values, definitions)}" if isinstance(values, Mapping) else "mapping"
    limits = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    held = [f"{sign} {node[key]:g}" for key, sign in limits.items() if key in node and abs(node[key]) < 2**31]
    return f"{kind} {', '.join(held)}".strip()


def _default(node: Mapping[str, Any]) -> str:
    default = node.get("default")
    return "" if isinstance(default, Mapping) else f"`{_shown(default)}`"


def _shown(value: object) -> str:
    return _cell("null" if value is None else str(value).lower() if isinstance(value, bool) else str(value))


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
