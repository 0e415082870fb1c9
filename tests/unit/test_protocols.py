"""Pinned evaluations: each composes, and nothing of it can be changed under its name."""

import re

import pytest

from vipo.config.compose import load_config, repository_root
from vipo.config.run import Config
from vipo.config.validation import ConfigError
from vipo.imports import check_imports

SOFT = 'url: "http://127.0.0.1:8000/v1", model: Qwen/Qwen3-VL-8B-Instruct, key: vqa_list'
JUDGES = {
    "geneval": "evaluation.rewards=[geneval]",
    "geneval2": f"evaluation.rewards=[{{name: judge, options: {{{SOFT}, combine: geometric}}}}]",
    "hpd": "evaluation.rewards=[hpsv2]",
}
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


@pytest.mark.parametrize(
    ("chosen", "told"),
    [
        ("prompts.eval.categories=[Animals]", r"prompts\.eval\.categories \['Animals'\] leaves some out"),
        ("prompts.filters.max_tokens=7", r"prompts\.filters\.max_tokens 7 leaves some out"),
        ("prompts.ignore_case=true", r"prompts\.ignore_case True leaves some out"),
    ],
)
def test_a_part_of_its_prompts_is_not_the_protocol(chosen: str, told: str) -> None:
    with pytest.raises(ConfigError, match=rf"pins every prompt of its set, and {told}"):
        _load("parti", chosen)


def test_a_judge_that_is_not_asked_is_named() -> None:
    with pytest.raises(ConfigError, match=r"pins evaluation\.rewards 'geneval', are \["):
        load_config(["experiment=demo", "protocol=geneval"])


@pytest.mark.parametrize(
    ("name", "judge", "told"),
    [
        ("geneval2", f"judge, options: {{{SOFT}}}", "options.combine of 'judge' 'geometric', is 'mean'"),
        ("geneval2", f"judge, options: {{{SOFT.replace('8B', '4B')}, combine: geometric}}", "options.model of 'judge'"),
        ("geneval", "geneval, options: {score: claims}", "options.score of 'geneval' 'strict', is 'claims'"),
    ],
)
def test_a_judge_that_is_asked_otherwise_is_another_protocol(name: str, judge: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        _load(name, f"evaluation.rewards=[{{name: {judge}}}]")
    # Beside the one that is meant, it may be asked too.
    meant = JUDGES[name].removeprefix("evaluation.rewards=[").removesuffix("]")
    assert _load(name, f"evaluation.rewards=[{meant}, {{name: {judge}, label: other}}]").protocol is not None


def test_protocols_without_options_of_a_judge_keep_their_hashes() -> None:
    titles = {name: protocol.title for name in ("parti", "hpd") if (protocol := _load(name).protocol) is not None}
    assert titles == {"parti": "parti v1 (7bafc7e8fde8)", "hpd": "hpd v1 (6c93ec4fdbc6)"}


def test_the_hash_is_of_everything_that_is_pinned() -> None:
    protocol = _load("geneval2").protocol
    assert protocol is not None
    other = protocol.model_copy(update={"pins": {**protocol.pins, "evaluation": {"steps": 41}}})
    later = protocol.model_copy(update={"version": protocol.version + 1})
    assert len({protocol.sha256, other.sha256, later.sha256}) == 3


def test_one_that_there_is_not_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"Could not find 'protocol/geneval3' Available options .*geneval2"):
        load_config(["experiment=demo", "protocol=geneval3"])


def test_without_one_nothing_is_named() -> None:
    config = load_config(["experiment=demo"])
    assert config.protocol is None
    assert "protocol" not in config.evaluation_identity()
    assert "protocol" not in config.training_identity()
