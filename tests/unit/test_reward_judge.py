"""The judge, against an endpoint of this process that speaks as OpenAI's chat completions do."""

import base64
import contextlib
import io
import json
import math
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from vipo.config.reward import RewardSpec
from vipo.config.reward_judge import JudgeOptions
from vipo.rewards import RewardError, begin, identities, load_reward, score

MODELS = {"data": [{"id": "vlm", "root": "org/vlm", "created": 5}, {"id": "other"}]}


@contextlib.contextmanager
def endpoint(
    answer: Callable[[dict[str, Any]], Any], models: Any = MODELS
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Address of an endpoint, and what it was asked."""
    asked: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.say(models)

        def do_POST(self) -> None:
            assert self.path == "/v1/chat/completions"
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append(request | {"authorization": self.headers["Authorization"]})
            self.say(answer(request))

        def say(self, found: Any) -> None:
            body = json.dumps(found).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def judge(url: str, **options: Any) -> Any:
    return load_reward("judge", "cpu", {"url": url, "model": "vlm", "retries": 0, "timeout": 20.0, **options})


def likely(**words: float) -> dict[str, Any]:
    """A completion whose first word has these probabilities."""
    told = [{"token": word, "logprob": math.log(p)} for word, p in words.items()]
    return {"choices": [{"message": {"content": "Yes"}, "logprobs": {"content": [{"top_logprobs": told}]}}]}


def shown(request: dict[str, Any]) -> list[np.ndarray[Any, Any]]:
    parts = request["messages"][0]["content"]
    urls = [part["image_url"]["url"].partition(",")[2] for part in parts if part["type"] == "image_url"]
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(url)))) for url in urls]


def pictures(*shape: int) -> torch.Tensor:
    levels = np.random.default_rng(0).integers(0, 256, shape)
    return torch.from_numpy(levels).float() / 255


def test_the_score_is_the_likelihood_of_yes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "sesame")
    images = pictures(2, 3, 5, 4)
    with endpoint(lambda _: likely(Yes=0.5, yes=0.125, No=0.25)) as (url, asked):
        reward = judge(url, token_env="JUDGE_KEY", seed=7)
        found = score("judge", reward, images, ["a cat", 'a "dog"'], [{}, {}])
    assert found.tolist() == pytest.approx([0.625, 0.625])
    by_text = sorted(asked, key=lambda request: str(request["messages"][0]["content"][1]["text"]))
    assert by_text[1]["messages"][0]["content"][1]["text"] == (
        'Does this picture show "a cat"? Answer with one word, yes or no.'
    )
    (seen,) = shown(by_text[1])
    assert np.array_equal(seen, (images[0] * 255).round().byte().permute(1, 2, 0).numpy())
    settings = {name: by_text[0][name] for name in ("temperature", "top_p", "n", "seed", "max_tokens", "top_logprobs")}
    assert settings == {"temperature": 0.0, "top_p": 1.0, "n": 1, "seed": 7, "max_tokens": 1, "top_logprobs": 20}
    assert by_text[0]["authorization"] == "Bearer sesame"
    told = identities({"j": reward})["j"]
    assert told == {"reward": "judge", "model": {"id": "vlm", "root": "org/vlm"}}


@pytest.mark.parametrize(("combine", "wanted"), [("mean", (0.9 + 0.4) / 2), ("geometric", math.sqrt(0.9 * 0.4))])
def test_questions_of_the_prompt_are_combined(combine: str, wanted: float) -> None:
    def answer(request: dict[str, Any]) -> dict[str, Any]:
        text = request["messages"][0]["content"][-1]["text"]
        return likely(yes=0.9, no=0.1) if "red" in text else likely(**{"Two": 0.2, "2": 0.1, " two": 0.1, "one": 0.6})

    rows = [{"vqa": ["Is it red?", ["How many?", "two"]]}]
    with endpoint(answer) as (url, asked):
        reward = judge(url, key="vqa", combine=combine)
        begin(reward, pictures(1, 3, 4, 4), ["x"], rows)
        assert score("judge", reward, pictures(1, 3, 4, 4), ["x"], rows).tolist() == pytest.approx([wanted])
        assert len(asked) == 2
        assert sorted(request["messages"][0]["content"][-1]["text"] for request in asked) == [
            "How many? Answer in one word.",
            "Is it red? Answer in one word.",
        ]
        for row in ({}, {"vqa": []}, {"vqa": [1]}, {"vqa": [["a", "b", "c"]]}, {"vqa": "text"}):
            with pytest.raises(RewardError, match="metadata 'vqa' of 'x': expected a list of questions"):
                score("judge", reward, pictures(1, 3, 4, 4), ["x"], [row])


def test_a_written_score_is_read_and_a_clip_is_shown_by_frames() -> None:
    texts = ["Final Score: 3.5", "no idea"]
    clips = pictures(2, 5, 3, 4, 4)
    with endpoint(lambda _: {"choices": [{"message": {"content": texts.pop(0)}}]}) as (url, asked):
        reward = judge(url, reads="number", tokens=99, frames=3, concurrency=1)
        found = score("judge", reward, clips, ["a", "b"], [{}, {}])
    assert found[0] == 3.5
    assert math.isnan(found[1])
    assert "logprobs" not in asked[0]
    wanted = (clips[0, [0, 2, 4]] * 255).round().byte().permute(0, 2, 3, 1).numpy()
    assert np.array_equal(np.stack(shown(asked[0])), wanted)


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        ({}, "is no chat completion with logprobs"),
        ({"choices": []}, "is no chat completion with logprobs"),
        ({"choices": [{"message": {"content": "yes"}, "logprobs": None}]}, "is no chat completion with logprobs"),
        ({"choices": [{"logprobs": {"content": [{"top_logprobs": [{"token": 1, "logprob": 0}]}]}}]}, "is no chat"),
        ({"choices": [{"logprobs": {"content": [{"top_logprobs": [{"token": "yes", "logprob": 2}]}]}}]}, "no log-prob"),
        ({"choices": [{"logprobs": {"content": [{"top_logprobs": [{"token": "a", "logprob": "x"}]}]}}]}, "no log-prob"),
        ([], "is a list, not an object"),
    ],
)
def test_what_is_no_answer_is_told(answer: Any, told: str) -> None:
    with endpoint(lambda _: answer) as (url, _), pytest.raises(RewardError, match=rf"judge 'vlm' at http.*{told}"):
        score("judge", judge(url), pictures(1, 3, 4, 4), ["a"], [{}])


def test_another_model_is_refused() -> None:
    for models, told in ((MODELS, "it serves vlm, other"), ({}, "it serves none"), ({"data": [1]}, "it serves none")):
        with endpoint(lambda _: {}, models) as (url, _), pytest.raises(RewardError, match=told):
            judge(url, model="absent")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"question": "what?"}, "must hold"),
        ({"reads": "number"}, "raise tokens"),
        ({"reads": "number", "tokens": 9, "combine": "geometric"}, "take mean"),
        ({"url": "http://key@host/v1"}, "holds no user"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        JudgeOptions.model_validate({"url": "http://a/v1", "model": "m", **options})


def test_its_address_is_no_part_of_the_identity() -> None:
    first, second = (
        RewardSpec(name="judge", options={"url": url, "model": "m"}).deciding for url in ("http://a", "https://b/v1")
    )
    assert first == second
    assert first["options"]["seed"] == 0
