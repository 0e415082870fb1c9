"""The examples and tables of docs/reward_process.md, and the alarms of docs/rewards.md."""

import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from typer.testing import CliRunner

from vipo.cli import app
from vipo.config.alarms import AlarmsConfig
from vipo.config.compose import load_config, repository_root
from vipo.config.reward import RewardConfig
from vipo.config.reward_judge import JudgeOptions
from vipo.config.reward_process import WHERE_IT_RUNS, ProcessOptions
from vipo.rewards import load_rewards, score
from vipo.rewards.beside import ORIGINALS
from vipo.rewards.served import originals

DOCS = repository_root() / "docs"
PAGE = (DOCS / "reward_process.md").read_text(encoding="utf-8")


def blocks(page: str) -> list[dict[str, Any]]:
    texts = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    return [OmegaConf.to_container(OmegaConf.create(text)) for text in texts]  # type: ignore[misc]


def rows(head: str) -> dict[str, str]:
    """Defaults by option of the table under a heading."""
    found: dict[str, str] = {}
    for line in PAGE.split(head)[1].split("\n## ")[0].splitlines():
        if line.startswith("| `"):
            names, default, _ = line.strip("| ").split(" | ")
            own = re.findall(r"`(\w+)`", names)
            values = default.split(", ") if len(own) > 1 else [default]
            values *= len(own) // len(values)
            found |= dict(zip(own, (value.strip("`") for value in values), strict=True))
    return found


@pytest.mark.parametrize(("head", "model"), [("## Options", ProcessOptions), ("## A judge", JudgeOptions)])
def test_the_tables_have_every_option_with_its_default(head: str, model: Any) -> None:
    told = rows(head)
    assert told.keys() == model.model_fields.keys()
    for name, field in model.model_fields.items():
        default = field.get_default(call_default_factory=True)
        assert told[name] == ("required" if field.is_required() else "null" if default is None else str(default)), name


def test_the_page_says_what_decides() -> None:
    (line,) = re.findall(r"^Only (.*) are part of a run's identity", PAGE, re.MULTILINE)
    assert set(re.findall(r"`(\w+)`", line)) == ProcessOptions.model_fields.keys() - WHERE_IT_RUNS


def test_the_terms_of_the_page_are_terms() -> None:
    for block in blocks(PAGE):
        RewardConfig.model_validate(block["reward"])


def test_the_example_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ((name, code),) = re.findall(r"Save this as `(\w+)\.py`:\n\n```python\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (block,) = (found for found in blocks(PAGE) if "far_rewards" in str(found))
    block["reward"]["terms"][0]["options"]["environment"] = sys.executable
    config = RewardConfig.model_validate(block["reward"])
    (reward,) = load_rewards(config.terms).values()
    images = torch.stack([torch.zeros(3, 4, 4), torch.ones(3, 4, 4)])
    assert score("far", reward, images, ["", ""], [{}, {}]).tolist() == [0.0, 1.0]


def test_the_command_line_is_one() -> None:
    (line,) = re.findall(r"^PYTHONPATH=rewards (vipo train .*)$", PAGE, re.MULTILINE)
    config = load_config(shlex.split(line)[2:])
    assert [term.name for term in config.reward.terms] == ["my_rewards:brightness"]
    assert [reward.label for reward in config.evaluation.rewards] == ["my_rewards:brightness", "redness"]


def test_the_other_commands_are_there() -> None:
    commands = re.findall(
        r"^(?:VIPO_REWARD_TOKEN=\.\.\. )?(vipo (?:serve-reward|score-beside) .*)$", PAGE, re.MULTILINE
    )
    assert len(commands) == 2
    for line in commands:
        words = shlex.split(line)
        told = CliRunner().invoke(app, [words[1], "--help"], env={"COLUMNS": "200", "TERM": "dumb"}).output
        assert all(word in told for word in words if word.startswith("--")), line


def test_a_picture_is_scored_beside_or_the_reason_told(tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    arguments = ["score-beside", "hpsv2", str(tmp_path / "a.png"), "--prompt", "a cat", "--environment", str(tmp_path)]
    found = CliRunner().invoke(
        app, [*arguments, "--options", f'{{"path": "{tmp_path}/no", "tokenizer": "{tmp_path}"}}']
    )
    assert found.exit_code == 0
    assert found.output.startswith("skipped, nothing was scored: reward 'hpsv2'")


def test_originals_and_locks_are_those_of_the_page() -> None:
    named = re.findall(r"^\| `originals:(\w+)` \| [\w-]+ ([\d.]+) \| `(.*?)` \|", PAGE, re.MULTILINE)
    assert [name for name, _, _ in named] == ["HPSv2", "ImageReward", "HPSv3", "VBench"]
    for name, version, lock in named:
        assert isinstance(getattr(originals, name), type)
        pinned = (repository_root() / lock).read_text(encoding="utf-8")
        assert f"=={version} " in pinned
        assert f"\nIMPORTED_{Path(lock).stem} := " in (repository_root() / "Makefile").read_text(encoding="utf-8")
        assert "://" not in pinned
    assert {known.reward.partition(":")[2] for known in ORIGINALS.values()} <= {name for name, _, _ in named}


def test_the_alarms_of_the_page_are_alarms() -> None:
    page = (DOCS / "rewards.md").read_text(encoding="utf-8")
    (block,) = (found for found in blocks(page) if "alarms" in found)
    assert len(AlarmsConfig.model_validate(block["alarms"]).stop) == 3
    RewardConfig.model_validate(block["reward"])
