"""VBench's dimensions are measured on its own prompts for them, and nowhere else."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor

from vipo.config.compose import load_config, repository_root
from vipo.config.reward import RewardSpec
from vipo.evaluation import measures
from vipo.evaluation.held_out import HeldOut
from vipo.evaluation.score import _tell_left_out
from vipo.prompts import Prompt, PromptError
from vipo.prompts.needs import check_needs

PROMPTS = [
    Prompt("0" * 16, "a red bench", {"dimension": ["color", "object_class"]}),
    Prompt("1" * 16, "a park", {"dimension": ["scene"]}),
    Prompt("2" * 16, "of another set", {}),
]


@pytest.mark.parametrize(
    ("label", "asked"),
    [("vbench_color", [0, 2]), ("vbench_scene", [1, 2]), ("vbench_temporal_style", [2]), ("redness", [0, 1, 2])],
)
def test_a_dimension_is_asked_of_its_own_prompts(label: str, asked: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    original, calls = measures.score, []

    def counted(name: str, reward: Any, images: Tensor, prompts: Any, metadata: Any) -> Tensor:
        calls.append(list(prompts))
        return original(name, reward, images, prompts, metadata)

    monkeypatch.setattr(measures, "score", counted)
    images = torch.zeros(3, 3, 8, 8)
    images[:, 0] = torch.tensor([0.25, 0.5, 1.0]).view(3, 1, 1)
    batch = measures.Batch(0, [HeldOut(prompt, 0) for prompt in PROMPTS], images, images)
    spec = RewardSpec.model_validate({"name": "redness", "label": label})
    with measures._reward(spec, load_config(["experiment=demo"])) as measure:
        (found,) = measure(batch).values()
        whole = original(label, measures.load_spec(spec), images, [""] * 3, [{}] * 3)
        assert found[asked].equal(whole[asked])
        assert found.isnan().sum() == 3 - len(asked)
        # A batch without any of them costs no call.
        calls.clear()
        (none,) = measure(measures.Batch(0, batch.samples[:1], images[:1], images[:1])).values()
        assert bool(none.isnan()) == (0 not in asked)
        assert len(calls) == (0 in asked)


def test_a_dimension_that_no_held_out_prompt_names_is_refused_before_anything_is_drawn() -> None:
    prompts = [Prompt(p.id, p.text, {"dimension": ["scene"], **p.metadata}) for p in PROMPTS]
    chosen = ["experiment=demo", "arm=base"]

    def check(label: str, count: int) -> None:
        rewards = f"evaluation.rewards=[{{name: redness, label: {label}}}]"
        check_needs(load_config([*chosen, rewards, f"evaluation.prompts={count}"]), [], prompts)

    check("vbench_scene", 3)
    with pytest.raises(PromptError, match=r"'vbench_color' .* which 1 of the 3 that evaluation\.prompts takes do, and"):
        check("vbench_color", 3)
    # The order of the evaluation is by id, whatever the file's.
    prompts.reverse()
    with pytest.raises(PromptError, match=r"'vbench_scene' .* which 1 of the 2 .* need 2; leave it out, or "):
        check("vbench_scene", 2)


def test_a_dimension_is_tried_on_a_prompt_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    structuring = SimpleNamespace(preflight=lambda size: None, backbone=SimpleNamespace(source=None))
    monkeypatch.setattr(measures, "load_backbone", lambda *_: None)
    monkeypatch.setattr(measures, "PerceptualStructuring", lambda *_: structuring)
    texts: list[str] = []
    monkeypatch.setattr(measures, "score", lambda label, reward, images, prompts, metadata: texts.extend(prompts))
    rewards = "[{name: redness, label: vbench_scene}, redness]"
    config = load_config(["experiment=demo", f"evaluation.rewards={rewards}"])
    measures.tried(config, repository_root(), [HeldOut(prompt, 0) for prompt in PROMPTS])
    # The trained reward is measured, too.
    assert texts == ["a park", "a red bench", "a red bench"]


def test_a_prompt_that_is_not_asked_about_is_no_missing_score(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    config = load_config(["experiment=demo"])
    batches = [[HeldOut(prompt, 0) for prompt in PROMPTS]]
    measure = SimpleNamespace(parts=[(0, 0)], holds=lambda *_: {"reward/vbench_scene": 3})
    scores = pd.DataFrame({"prompt_id": [prompt.id for prompt in PROMPTS], "sample": 0})
    for values, told in (([math.nan, 0.5, 0.5], 0), ([math.nan, math.nan, 0.5], 1)):
        caplog.clear()
        _tell_left_out(config, scores.assign(**{"reward/vbench_scene": values}), batches, [measure], tmp_path)  # type: ignore[list-item, arg-type]
        assert len(caplog.messages) == told
        assert all("1 of 2 samples have no score" in message for message in caplog.messages)
