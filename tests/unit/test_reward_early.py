"""A reward that is loaded after all training is looked for before it, without its weights being read."""

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from pydantic import TypeAdapter

from vipo.config.reward import RewardSpec
from vipo.rewards import RewardError, registry
from vipo.rewards.early import check_found

SPEC: TypeAdapter[RewardSpec] = TypeAdapter(RewardSpec)


def _spec(name: str, **options: Any) -> RewardSpec:
    return SPEC.validate_python({"name": name, "options": options})


@pytest.fixture(autouse=True)
def nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def loaded(*_: Any, **__: Any) -> None:
        raise AssertionError("a reward was loaded")

    monkeypatch.setattr(registry, "load_reward", loaded)


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("pickscore", {"path": "no/such-model"}, "path 'no/such-model'.*neither in the local cache"),
        ("geneval", {"path": ".", "detector": "no/such-detector"}, "detector 'no/such-detector'.*neither in"),
        ("aesthetic", {"path": ".", "head": "no_such.pth"}, "head 'no_such.pth': there is no such file"),
        ("process", {"reward": "a:b", "environment": "no/such/env"}, "environment 'no/such/env': there is no"),
        ("process", {"reward": "a:b", "url": "http://127.0.0.1:1", "token_env": "NO_TOKEN_HERE"}, "NO_TOKEN_HERE"),
        ("no_such_module:reward", {}, "no_such_module"),
    ],
)
def test_what_is_not_here_is_told(name: str, options: dict[str, Any], told: str, monkeypatch: Any) -> None:
    def refuses(*_: Any, **__: Any) -> None:
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", refuses)
    with pytest.raises(RewardError, match=told):
        check_found(_spec(name, **options))


def test_what_is_here_or_can_be_fetched_is_not_asked_further(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_found(_spec("redness"))
    check_found(_spec("pickscore", path=str(tmp_path), tokenizer=str(tmp_path)))
    check_found(_spec("process", reward="a:b", url="http://127.0.0.1:1"))
    asked = []
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *given, **_: asked.append(given[1]))
    check_found(_spec("pickscore", path="no/such-model", tokenizer=str(tmp_path)))
    assert asked == ["no/such-model"]
