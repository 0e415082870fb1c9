"""What an audit says of rewards that another process computed."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vipo.audit.examination import Examination
from vipo.audit.processes import check_processes
from vipo.config.reward import RewardTerm

TOLD = {"reward": "a:b", "arguments": {}, "packages": {"x": "1"}, "code": {}, "weights": {}}


def examined(tmp_path: Path, train: dict[str, Any], evaluate: dict[str, Any]) -> list[str]:
    examination = Examination(tmp_path, tmp_path)
    term = RewardTerm(name="process", label="r", options={"reward": "a:b", "url": "http://h"})
    config: Any = SimpleNamespace(
        reward=SimpleNamespace(terms=[term]),
        evaluation=SimpleNamespace(rewards=[term.spec, RewardTerm(name="redness")]),
    )
    examination.trained = {"grpo-s0": config}
    examination.records = {"runs/grpo-s0": train, "evaluation/grpo-s0": evaluate}
    check_processes(examination)
    return [f"{finding.artifact}: {finding.message}" for finding in examination.findings]


@pytest.mark.parametrize(
    ("train", "evaluate", "told"),
    [
        ({"reward_processes": {"r": TOLD}}, {"reward_processes": {"r": TOLD}}, []),
        ({}, {"reward_processes": {"r": TOLD}}, ["runs/grpo-s0: its record does not say what scored 'r'"]),
        ({"reward_processes": {"r": TOLD}}, {}, ["evaluation/grpo-s0: its record does not say what scored 'r'"]),
        ({"reward_processes": 5}, {"reward_processes": {"r": TOLD}}, ["runs/grpo-s0: its record names no reward"]),
        (
            {"reward_processes": {"r": {**TOLD, "packages": {"x": "2"}}}},
            {"reward_processes": {"r": TOLD}},
            ["evaluation/grpo-s0: reward 'r': is not the process that runs/grpo-s0/"],
        ),
    ],
)
def test_records_name_the_same_process(
    tmp_path: Path, train: dict[str, Any], evaluate: dict[str, Any], told: list[str]
) -> None:
    found = examined(tmp_path, train, evaluate)
    assert len(found) == len(told)
    assert all(line.startswith(start) for line, start in zip(found, told, strict=True))


def test_all_runs_are_measured_by_one_process_and_credit_tells_its_own(tmp_path: Path) -> None:
    examination = Examination(tmp_path, tmp_path)
    other = {**TOLD, "packages": {"x": "2"}}
    arms = {"grpo": {"reward": {"terms": [{"name": "process", "label": "r", "options": {}}, "redness"]}}}
    examination.records = {
        "evaluation/base-s0": {"reward_processes": {"r": TOLD}},
        "evaluation/grpo-s0": {"reward_processes": {"r": TOLD}},
        "evaluation/vipo-s0": {"reward_processes": {"r": other}},
        "credit/base": {"config": {"arms": arms}, "reward_processes": {"r": other}},
        "credit/grpo-s0": {"config": {"arms": arms}},
        "credit/vipo-s0": {"config": 5},
    }
    check_processes(examination)
    assert [f"{finding.artifact}: {finding.message}" for finding in examination.findings] == [
        "evaluation/vipo-s0: another process scored 'r' here than in evaluation/base-s0",
        "credit/grpo-s0: its record does not say what scored 'r'",
        "credit/vipo-s0: its record names no reward",
    ]
