"""The worked examples of docs/rewards.md, run as they stand."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from vipo.config.compose import load_config
from vipo.config.prompts import PromptsConfig
from vipo.config.reward import RewardConfig
from vipo.config.reward_options import REWARD_OPTIONS
from vipo.config.reward_process import ASKED
from vipo.prompts import prepare_prompts, read_prompts
from vipo.rewards import REWARDS, load_reward, score

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "rewards.md").read_text(encoding="utf-8")


@pytest.fixture
def examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on the import path with the page's modules under the names that the page gives them."""
    blocks = re.findall(r"Save this as `(\w+)\.py`:\n\n```python\n(.*?)```", PAGE, re.DOTALL)
    assert [name for name, _ in blocks] == ["my_rewards", "my_prompts"]
    for name, code in blocks:
        (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def _yaml_blocks() -> dict[str, Any]:
    blocks = [text for text in re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL) if not re.search("hpsv2|alarms", text)]
    merged = OmegaConf.merge(*(OmegaConf.create(text) for text in blocks))
    plain = OmegaConf.to_container(merged)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


@pytest.mark.usefixtures("examples")
def test_reward_examples_load_and_score() -> None:
    images = torch.stack([torch.ones(3, 4, 4), torch.zeros(3, 4, 4)])
    images[1, 2] = 1.0
    expected = {"my_rewards:brightness": [1.0, 1 / 3], "my_rewards:CloseToColor": [-2.0, 0.0]}
    config = RewardConfig.model_validate(_yaml_blocks()["reward"])
    assert [term.name for term in config.terms] == list(expected)
    for term in config.terms:
        scores = score(
            term.name,
            load_reward(term.name, options=term.options),
            images,
            ["", ""],
            [{"color": "red"}, {"color": "blue"}],
        )
        assert scores.tolist() == pytest.approx(expected[term.name])


def test_prompt_source_example_is_prepared(examples: Path) -> None:
    config = PromptsConfig.model_validate(_yaml_blocks()["prompts"])
    manifest = prepare_prompts(config, examples, examples / "out")
    prompts = read_prompts(examples / "out" / "train.jsonl") + read_prompts(examples / "out" / "eval.jsonl")
    assert manifest["counts"]["kept"] == len(prompts) == 16
    assert all(prompt.metadata["color"] in prompt.text.split() for prompt in prompts)


def test_the_page_lists_every_registered_reward() -> None:
    # To its first blank line: what follows one is no row.
    table = PAGE.split("| name | score |")[1].split("\n\n")[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    assert set(re.findall(r"`(\w+)`", " ".join(rows))) == set(REWARDS)


def test_the_page_lists_every_option_with_its_default() -> None:
    table = PAGE.split("| option | of |")[1].split("### ")[0]
    rows = {}
    for line in table.splitlines():
        if line.startswith("| `"):
            names, _, default, _ = line.strip("| ").split(" | ")
            rows |= {name: default.strip("`") for name in re.findall(r"`(\w+)`", names)}
    own = [model for name, model in REWARD_OPTIONS.items() if name not in ASKED]
    fields = {name: field for model in own for name, field in model.model_fields.items()}
    assert rows.keys() == fields.keys()
    for name, field in fields.items():
        hub = name.split("_")[0] in ("path", "tokenizer", "detector", "base", "instruction")
        assert hub or rows[name] == ("null" if field.default is None else str(field.default)), name


def test_the_arguments_of_the_page_are_those_of_the_rewards() -> None:
    (block,) = (text for text in re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL) if "hpsv2" in text)
    data = OmegaConf.to_container(OmegaConf.create(block))
    config = RewardConfig.model_validate(data["reward"])
    assert [term.label for term in config.terms] == ["hpsv2", "depicts", "plain"]
    commands = [shlex.split(line) for line in re.findall(r"^vipo config .*reward.*$", PAGE, re.MULTILINE)]
    first, second = (load_config(command[2:]) for command in commands)
    assert first.reward.terms[0].options["template"] == "A photo depicts {}"
    assert [reward.label for reward in second.evaluation.rewards] == ["pickscore", "redness", "hpsv2"]
    assert second.evaluation.rewards[0].options["path"] == "weights/pickscore"
