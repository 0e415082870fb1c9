"""docs/method.md: every function and every test that it names exists."""

import importlib
import re

import pytest

from vipo.config.compose import repository_root

ROOT = repository_root()
TEXT = (ROOT / "docs/method.md").read_text()
FUNCTIONS = sorted(set(re.findall(r"`(vipo(?:\.\w+)+)`", TEXT)))
TESTS = sorted(set(re.findall(r"`((?:\w+/)?\w+\.py)::(\w+)`", TEXT)))


@pytest.mark.parametrize("path", FUNCTIONS)
def test_functions_exist(path: str) -> None:
    module, _, name = path.rpartition(".")
    assert callable(getattr(importlib.import_module(module), name))


@pytest.mark.parametrize(("file", "name"), TESTS)
def test_tests_exist(file: str, name: str) -> None:
    path = ROOT / "tests" / (file if "/" in file else f"unit/{file}")
    assert f"def {name}(" in path.read_text()


def test_the_page_was_read() -> None:
    assert len(FUNCTIONS) > 20
    assert len(TESTS) > 25
