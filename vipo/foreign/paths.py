"""Import paths: ``package.module:object``."""

import pkgutil
import re
import sys
import sysconfig
from pathlib import Path
from typing import Any

from vipo.errors import VipoError
from vipo.foreign.boundary import foreign
from vipo.text import one_line

IMPORT_PATH = r"[A-Za-z_][\w.]*:[A-Za-z_]\w*"
"""``package.module:object``, as a pattern."""


def is_import_path(name: str) -> bool:
    """Whether `name` has the form ``package.module:object``."""
    return re.fullmatch(IMPORT_PATH, name) is not None


def resolve(path: str, kind: type[VipoError], what: str) -> Any:
    """The object that an import path names.

    Args:
        path: ``package.module:object``.
        kind, what: see `foreign`.

    Raises:
        VipoError: of type `kind`: `path` has another form, there is no such module (then the message says where it
            was looked for) or no such object in it, or the import raised something.
    """
    module = path.partition(":")[0]
    if not is_import_path(path):
        raise kind(f"{what}: {one_line(path)!r} is no import path 'package.module:object'")
    with foreign(kind, what, path):
        try:
            return pkgutil.resolve_name(path)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{module}.".startswith(f"{error.name}."):
                raise
            raise kind(f"{_failed(what, error)}; {_looked_in()}") from error
        except AttributeError as error:
            # Raised by the import itself, it tells of a fault in the module.
            if module not in sys.modules:
                raise
            raise kind(_failed(what, error)) from error


def _failed(what: str, error: Exception) -> str:
    return f"{what}: cannot be imported ({type(error).__name__}: {one_line(str(error), 300)})"


def _looked_in() -> str:
    here = Path.cwd()
    library = Path(sysconfig.get_path("stdlib"))
    entries = [Path(entry or here).absolute() for entry in sys.path]
    # Where Python keeps its own modules, nobody puts theirs; and some entries are no folders.
    shown = [entry for entry in entries if entry not in (library, library / "lib-dynload") and entry.is_dir()]
    told = f"looked in {', '.join(dict.fromkeys(map(str, shown))) or 'no folder'}"
    outside = "" if here in entries else f" (not in the working directory {here})"
    return f"{told}{outside}; install it, or put its folder on PYTHONPATH"
