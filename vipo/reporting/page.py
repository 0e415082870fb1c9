"""The page as HTML: sections one below another, one style and one script, both inside it."""

import base64
import hashlib
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from vipo.reporting.drawing import ARM_COLORS
from vipo.reporting.sections import SECTIONS
from vipo.reporting.sections.context import Page, Section
from vipo.reporting.wording import number, signed
from vipo.text import one_line

_TEMPLATES = Path(__file__).parent / "templates"


def render_page(page: Page) -> str:
    """The whole page. Every text is escaped; only the drawn figures, the style and the script are trusted."""
    environment = _environment(page)
    found = (make(page) for make in SECTIONS)
    sections = [section for section in found if section is not None]
    script = _joined("js", ".js")
    return environment.get_template("page.html.j2").render(
        experiment=page.experiment.config.experiment,
        sections=[(section, _body(environment, section)) for section in sections],
        style=Markup(_joined("css", ".css")),
        script=Markup(script),
        policy=_policy(script, beside=bool(page.gallery.files)),
        live=page.live,
    )


def _environment(page: Page) -> Environment:
    environment = Environment(
        loader=PackageLoader("vipo.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"signed": signed, "number": number, "words": _against, "one_line": one_line}
    environment.globals["arm_index"] = {arm: index for index, arm in enumerate(page.experiment.coloured)}
    environment.globals["arm_colors"] = len(ARM_COLORS)
    environment.globals["percent"] = f"{100 * page.summary.confidence:g}"
    return environment


def _body(environment: Environment, section: Section) -> Markup:
    values: dict[str, Any] = dict(section.values)
    return Markup(environment.get_template(f"sections/{section.anchor}.html.j2").render(values))


def _joined(folder: str, suffix: str) -> str:
    parts = sorted((_TEMPLATES / folder).glob(f"*{suffix}"))
    return "\n".join(part.read_text(encoding="utf-8") for part in parts)


def _policy(script: str, *, beside: bool) -> str:
    """What the page may load: itself, and the pictures beside it; of scripts, its own alone, by hash."""
    digest = base64.b64encode(hashlib.sha256(f"\n{script}\n".encode()).digest()).decode("ascii")
    source = "'self' data:" if beside else "data:"
    return (
        f"default-src 'none'; img-src {source}; media-src {source}; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    )


def _against(verdict: str, reference: str) -> str:
    """A verdict with its reference: "better by 0.1 than base", "no difference shown against base"."""
    return f"{verdict} {'than' if ' by ' in verdict else 'against'} {reference}"
