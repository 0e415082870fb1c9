"""Code that is not vipo's: what a configuration names by import path. Imports no torch before such code is called."""

from vipo.foreign.boundary import foreign
from vipo.foreign.guarded import guarded_class
from vipo.foreign.paths import is_import_path, resolve

__all__ = ["foreign", "guarded_class", "is_import_path", "resolve"]
