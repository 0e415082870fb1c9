"""What `snakemake --config` hands over: lists as they were meant, whatever brackets they hold."""

from typing import Any

import pytest
import yaml

from vipo.config.validation import ConfigError
from vipo.config.workflow import read_workflow_config


def _handed(text: str) -> Any:
    """As Snakemake hands a value over: YAML where it is, else the text."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("[training.updates=8,eta=1]", ["training.updates=8", "eta=1"]),
        ("[training.save_at=[2,4],eta=1]", ["training.save_at=[2,4]", "eta=1"]),
        ("[reward.terms=[{name: a, weight: 2}], x=[[1,2]]]", ["reward.terms=[{name: a, weight: 2}]", "x=[[1,2]]"]),
        ('["training.save_at=[2,4]","eta=1"]', ["training.save_at=[2,4]", "eta=1"]),
        ('["training.save_at=[2,4]",training.lora={rank: 4}]', ["training.save_at=[2,4]", "training.lora={rank: 4}"]),
        ("[prompts.source='a,b.txt',x=[]]", ["prompts.source='a,b.txt'", "x=[]"]),
        ("training.updates=8", ["training.updates=8"]),
        ("training.save_at=[2,4]", ["training.save_at=[2,4]"]),
        ("[]", []),
    ],
)  # fmt: skip
def test_overrides_are_read_as_they_are_meant(written: str, meant: list[str]) -> None:
    assert read_workflow_config({"experiment": "flux", "overrides": _handed(written)}) == ("flux", meant)


def test_the_demo_without_overrides_is_the_default() -> None:
    assert read_workflow_config({}) == ("demo", [])


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"overides": ["seed=1"]}, "overides: unknown key; did you mean 'overrides'"),
        ({"overrides": "[a=[1,2]"}, r"'\]' is missing"),
        ({"overrides": "[a=[1,2}]"}, "closes nothing"),
        ({"overrides": "[a='b]"}, '"?\'"? is missing'),
        ({"overrides": [["seed=1"]]}, "is no text key=value"),
        ({"overrides": [{"reward": 1}]}, "is no text key=value"),
        ({"overrides": {"seed": 1}}, "is no list"),
        ({"overrides": 8}, "is no list"),
        ({"overrides": "[training.updates=8,seed=1]"}, "'seed=1': has no effect.*experiment.arms.ARM.seeds"),
        ({"overrides": ["+arm=vipo"]}, "'\\+arm=vipo': has no effect"),
    ],
)
def test_anything_else_is_refused_by_name(given: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        read_workflow_config(given)
