"""Pinned evaluations: each composes, and nothing of it can be changed under its name."""

import re

import pytest

from vipo.config.compose import load_config, repository_root
from vipo.config.run import Config
from vipo.config.validation import ConfigError
from vipo.imports import check_imports

JUDGES = {"geneval": "evaluation.rewards=[geneval]", "hpd": "evaluation.rewards=[hpsv2]"}
NAMES = sorted(path.stem for path in (repository_root() / "configs/protocol").glob("*.yaml"))


def _load(name: str, *overrides: str) -> Config:
    return load_config(["experiment=demo", f"protocol={name}", JUDGES.get(name, "seed=0"), *overrides])


def test_all_that_are_named_are_there() -> None:
    assert NAMES == ["drawbench", "geneval", "geneval2", "hpd", "parti", "vbench"]


@pytest.mark.parametrize("name", NAMES)
def test_a_protocol_pins_what_its_numbers_depend_on(name: str) -> None:
    config = _load(name)
    assert config.protocol is not None
    assert re.fullmatch(rf"{name} v\d+ \([0-9a-f]{{12}}\)", config.protocol.title)
    assert config.prompts.eval is not None
    assert config.prompts.eval.source == f"set:{name}"
    assert {"steps", "seed", "prompts", "samples_per_prompt"} <= config.protocol.pins["evaluation"].keys()
    assert config.evaluation_identity()["protocol"] == config.report_identity()["protocol"] == config.protocol.title
    assert "protocol" not in config.sampling_identity()
    # The set's name has the form of an import path, and is none.
    check_imports(config)
    with pytest.raises(ConfigError, match=rf"{name}.* pins evaluation\.steps {config.evaluation.steps}, is 7"):
        _load(name, "evaluation.steps=7")


def test_a_judge_that_is_not_asked_is_named() -> None:
    with pytest.raises(ConfigError, match=r"pins evaluation\.rewards 'geneval', are \["):
        load_config(["experiment=demo", "protocol=geneval"])


def test_the_hash_is_of_everything_that_is_pinned() -> None:
    protocol = _load("geneval2").protocol
    assert protocol is not None
    other = protocol.model_copy(update={"pins": {**protocol.pins, "evaluation": {"steps": 41}}})
    later = protocol.model_copy(update={"version": protocol.version + 1})
    assert len({protocol.sha256, other.sha256, later.sha256}) == 3


def test_without_one_nothing_is_named() -> None:
    config = load_config(["experiment=demo"])
    assert config.protocol is None
    assert "protocol" not in config.evaluation_identity()
    assert "protocol" not in config.training_identity()
