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
    "vbench": "evaluation.rewards=[{name: flicker, label: vbench_temporal_flickering}]",
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
    title = config.protocol_title
    assert title is not None
    assert re.fullmatch(rf"{name} v\d+ \([0-9a-f]{{12}}\): guidance \d, shift 2", title)
    assert config.prompts.eval is not None
    assert config.prompts.eval.source == f"set:{name}"
    assert {"steps", "seed", "prompts", "samples_per_prompt"} <= config.protocol.pins["evaluation"].keys()
    assert config.evaluation_identity()["protocol"] == config.report_identity()["protocol"] == title
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
        ("prompts.max_characters=1999", r"prompts\.max_characters 1999 leaves some out"),
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
        (
            "geneval2",
            f"judge, options: {{{SOFT}, combine: geometric, request: {{a: 1}}}}",
            "options.request of 'judge' {}",
        ),
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


@pytest.mark.parametrize(
    ("name", "judge", "told"),
    [
        ("hpd", "hpsv2, options: {path: weights/HPS_v2_compressed.pt}", "options.path of 'hpsv2' 'xswu/HPSv2' or a"),
        ("hpd", "hpsv2, options: {dtype: fp16}", "options.dtype of 'hpsv2' 'fp32', is 'fp16'"),
        ("geneval", "geneval, options: {detector: some/other}", "options.detector of 'geneval' 'facebook/mask2former"),
        (
            "geneval",
            "geneval, options: {path: other/clip}",
            "options.path of 'geneval' 'openai/clip-vit-large-patch14'",
        ),
        ("geneval", "geneval, options: {dtype: bf16}", "options.dtype of 'geneval' 'fp32', is 'bf16'"),
    ],
)
def test_a_judge_of_other_weights_is_another_protocol(name: str, judge: str, told: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(told)):
        _load(name, f"evaluation.rewards=[{{name: {judge}}}]")


@pytest.mark.parametrize(
    ("name", "judge"),
    [
        ("hpd", "hpsv2, options: {path: weights/HPS_v2.1_compressed.pt, batch: 4, resident: free}"),
        ("geneval", "geneval, options: {path: weights/clip-vit-large-patch14/}"),
    ],
)
def test_the_judge_s_weights_may_lie_here(name: str, judge: str) -> None:
    own = _load(name, f"evaluation.rewards=[{{name: {judge}}}]").protocol_title
    assert own == _load(name).protocol_title


def test_vbench_is_asked_for_a_dimension_of_it() -> None:
    with pytest.raises(ConfigError, match=r"one of the labels vbench_subject_consistency, .*; they are \['redness', "):
        _load("vbench", "evaluation.rewards=[redness]")


@pytest.mark.parametrize(
    ("called", "told"),
    [
        ("generator.guidance_scale=1.5", "guidance 1.5, shift 2"),
        ("generator.negative_prompt=ugly", "guidance 0, shift 2, a negative prompt"),
        ("evaluation.shift=10", "guidance 0, shift 10"),
        ("sampling.shift=4.5", "guidance 0, shift 4.5"),
        ("generator.max_sequence_length=17", "guidance 0, shift 2"),
        ("generator.decoding=tiled", "guidance 0, shift 2"),
    ],
)
def test_how_the_generator_is_called_stands_in_the_title(called: str, told: str) -> None:
    """What belongs to the generator is not pinned; two numbers of one title are called alike all the same."""
    other, own = _load("parti", called), _load("parti")
    assert other.protocol_title is not None
    assert other.protocol_title.endswith(f"): {told}")
    assert other.protocol_title != own.protocol_title
    assert other.evaluation_identity() != own.evaluation_identity()


def test_geneval2_pins_the_guidance_of_both_networks() -> None:
    for key in ("guidance_scale", "guidance_scale_2"):
        with pytest.raises(ConfigError, match=rf"pins generator\.{key} "):
            _load("geneval2", f"generator.{key}=7")


def test_where_noise_is_predicted_there_is_no_shift_to_tell() -> None:
    assert str(_load("parti", "sampling.transition=ddim").protocol_title).endswith("): guidance 0")


def test_the_hash_is_of_everything_that_is_pinned() -> None:
    config = _load("geneval2")
    protocol = config.protocol
    assert protocol is not None
    other = protocol.model_copy(update={"pins": {**protocol.pins, "evaluation": {"steps": 41}}})
    later = protocol.model_copy(update={"version": protocol.version + 1})
    titles = [config.model_copy(update={"protocol": each}).protocol_title for each in (protocol, other, later)]
    assert len(set(titles)) == 3


def test_one_that_there_is_not_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"Could not find 'protocol/geneval3' Available options .*geneval2"):
        load_config(["experiment=demo", "protocol=geneval3"])


def test_without_one_nothing_is_named() -> None:
    config = load_config(["experiment=demo"])
    assert config.protocol is None
    assert "protocol" not in config.evaluation_identity()
    assert "protocol" not in config.training_identity()
