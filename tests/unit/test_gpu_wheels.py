"""What a GPU machine without vipo's environment is brought: wheels, and all that they need."""

import importlib.metadata
import re
from collections.abc import Iterable

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from vipo.config.compose import repository_root

# What such a machine is taken to have, and by them what they need.
THERE = ("torch", "torchvision", "transformers", "timm", "accelerate", "peft", "safetensors", "tensorboard", "typer")


def _needed(packages: Iterable[str]) -> set[str]:
    asked = [Requirement(line) for package in packages for line in importlib.metadata.requires(package) or []]
    return {canonicalize_name(each.name) for each in asked if each.marker is None or each.marker.evaluate()}


def test_all_that_the_wheels_need_is_among_them_or_comes_with_the_machine() -> None:
    """Else every step ends there at its first import."""
    script = (repository_root() / "benchmarks/gpu/wheels.sh").read_text(encoding="utf-8")
    listed = re.search(r"^packages=\((.*?)^\)", script, re.DOTALL | re.MULTILINE)
    assert listed is not None
    gathered = set(re.sub(r"#.*", "", listed[1]).split())
    assert {"diffusers", "hydra-core", "pydantic"} <= gathered
    there, new = set(THERE), set(THERE)
    while new := _needed(new) - there:
        there |= new
    assert _needed(gathered) - gathered - there == set()
