"""The judge, against an endpoint of this process that speaks as OpenAI's chat completions do."""

import base64
import contextlib
import io
import json
import math
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from vipo.config.reward import RewardSpec
from vipo.config.reward_judge import JudgeOptions
from vipo.config.reward_process import WHERE_IT_RUNS
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
            found = answer(request)
            self.say(*(found if isinstance(found, tuple) else (found,)))

        def say(self, found: Any, status: int = 200) -> None:
            body = json.dumps(found).encode()
            self.send_response(status)
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


def lmdeploy(chosen: str, probability: float, **others: float) -> dict[str, Any]:
    """As LMDeploy answers: the chosen piece beside the others, all as the tokenizer writes them."""
    top = [{"token": piece, "bytes": [], "logprob": math.log(p)} for piece, p in others.items()]
    told = {"token": chosen, "bytes": [], "logprob": math.log(probability), "top_logprobs": top}
    message = {"role": "assistant", "content": "Yes", "reasoning_content": None}
    return {"choices": [{"finish_reason": "length", "message": message, "logprobs": {"content": [told]}}]}


def writes(text: str | None, finish: str = "stop", **beside: Any) -> dict[str, Any]:
    return {"choices": [{"finish_reason": finish, "message": {"content": text, **beside}}]}


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
    for models, told in (
        (MODELS, "it serves vlm, other"),
        ({}, "it serves none"),
        ({"data": [1]}, "it serves none"),
        (MODELS["data"], "vlm, other"),
    ):
        with endpoint(lambda _: {}, models) as (url, _), pytest.raises(RewardError, match=told):
            judge(url, model="absent")


def test_a_bare_list_of_models_is_one() -> None:
    with endpoint(lambda _: likely(Yes=0.9), MODELS["data"]) as (url, _):
        assert identities({"j": judge(url)})["j"]["model"] == {"id": "vlm", "root": "org/vlm"}


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"question": "what?"}, "must hold"),
        ({"reads": "number"}, "raise tokens"),
        ({"reads": "number", "tokens": 9, "combine": "geometric"}, "take mean"),
        ({"url": "http://key@host/v1"}, "holds no user"),
        ({"request": {"stream": True}}, "stream: is not for request to set"),
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


def test_what_is_asked_beside_is_asked_and_belongs_to_the_identity() -> None:
    asking = {"max_tokens": None, "max_completion_tokens": 64, "temperature": None, "kwargs": {"think": False}}
    with endpoint(lambda _: writes("7")) as (url, asked):
        reward = judge(url, reads="number", tokens=64, request=asking)
        score("judge", reward, pictures(1, 3, 4, 4), ["x"], [{}])
    assert not {"max_tokens", "temperature"} & asked[0].keys()
    assert (asked[0]["max_completion_tokens"], asked[0]["kwargs"], asked[0]["seed"]) == (64, {"think": False}, 0)
    where = {"url": "http://a", "model": "m"}
    plain, own = (RewardSpec(name="judge", options=where | more).deciding for more in ({}, {"request": {"a": 1}}))
    assert own["options"]["request"] == {"a": 1}
    # As before there was such an option.
    assert plain["options"].keys() == JudgeOptions.model_fields.keys() - WHERE_IT_RUNS - {"request"}


def asked_of(answer: Any, row: dict[str, Any] | None = None, samples: int = 1, **options: Any) -> list[float]:
    with endpoint(lambda _: answer) as (url, _):
        reward, images = judge(url, **options), pictures(samples, 3, 4, 4)
        return [float(score("judge", reward, image[None], ["x"], [row or {}])) for image in images]


@pytest.mark.parametrize(
    ("answer", "wanted"),
    [
        (lmdeploy("Yes", 0.9, No=0.09, yes=0.004), 0.904),
        (lmdeploy("No", 0.6, Yes=0.35), 0.35),
        (lmdeploy("\u0120Yes", 0.85, No=0.1), 0.85),
        (lmdeploy("No", 0.1, **{"\u2581yes": 0.5, "\u010aYes": 0.25}), 0.75),
        # As vLLM and OpenAI answer, the chosen one is among the others.
        (lmdeploy("Yes", 0.7, Yes=0.7, No=0.2), 0.7),
    ],
)
def test_the_chosen_word_counts_wherever_a_server_tells_it(answer: Any, wanted: float) -> None:
    assert asked_of(answer) == pytest.approx([wanted])


def test_a_server_without_alternatives_and_a_model_that_thinks_are_refused() -> None:
    with pytest.raises(RewardError, match=r"judge 'vlm' at http.*lists no alternatives"):
        asked_of(lmdeploy("Yes", 1.0))
    for key in ("reasoning", "reasoning_content"):
        answer = likely(The=0.9, Yes=0.1)
        answer["choices"][0]["message"] = {"content": None, key: "The"}
        with pytest.raises(RewardError, match="thinks before it answers"):
            asked_of(answer)


@pytest.mark.parametrize(
    ("answer", "row", "told"),
    [
        (likely(**{"<think>": 0.99, "Yes": 0.001}), {"q": ["Is it?"]}, "'<think>', neither yes nor no"),
        (likely(gir=0.98, dog=0.01), {"q": [["What?", "giraffe"]]}, "first token is 'gir': the answer takes several"),
        (likely(**{"1": 0.98}), {"q": [["How many?", "10"]]}, "first token is '1': the answer takes several"),
    ],
)
def test_an_answer_that_cannot_be_read_is_no_score_and_a_judge_without_any_is_an_error(
    answer: Any, row: Any, told: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert all(map(math.isnan, asked_of(answer, row, 7, key="q", combine="geometric")))
    assert [told in record.getMessage() for record in caplog.records] == [True]
    with pytest.raises(RewardError, match=f"none of 8 answers could be read as .*{told}"):
        asked_of(answer, row, 8, key="q")


@pytest.mark.parametrize("heard", [None, "yes", "dog"])
def test_a_judge_that_can_be_read_of_no_word_among_many_is_an_error(heard: str | None) -> None:
    words = [f"word{number}" for number in range(64)]
    questions: list[Any] = [["What?", word] for word in ([] if heard is None else [heard]) + words]

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        return likely(**{heard: 0.9}) if heard is not None and len(asked) == 1 else likely(word=0.9)

    with endpoint(answer) as (url, asked):
        reward = judge(url, key="q", concurrency=1)
        if heard == "dog":
            assert score("judge", reward, pictures(1, 3, 4, 4), ["x"], [{"q": questions}]).isnan().all()
            return
        told = (
            "none of 64 answers could be read as any of 64 words, of the last one, 'word63': the first token is 'word'"
        )
        with pytest.raises(RewardError, match=told):
            score("judge", reward, pictures(1, 3, 4, 4), ["x"], [{"q": questions}])
        fewer = [{"q": [["What?", word] for word in words[:-1]]}]
        assert score("judge", judge(url, key="q"), pictures(1, 3, 4, 4), ["x"], fewer).isnan().all()


def test_another_spelling_far_behind_is_no_answer_and_a_refusal_is_none() -> None:
    row = {"q": [["What?", "giraffe"]]}
    assert math.isnan(asked_of(likely(gir=0.99, giraffe=0.001), row, key="q")[0])
    assert math.isnan(asked_of(writes(None, refusal="I can't"), key=None)[0])


def test_one_odd_answer_leaves_out_its_sample_alone() -> None:
    answers = [likely(Yes=0.75, No=0.2), *[likely(Maybe=0.9)] * 10, likely(No=0.9, Yes=0.0625)]
    with endpoint(lambda _: answers.pop(0)) as (url, _):
        reward = judge(url, concurrency=1)
        found = score("judge", reward, pictures(12, 3, 4, 4), ["x"] * 12, [{}] * 12)
    assert found[[0, 11]].tolist() == pytest.approx([0.75, 0.0625])
    assert found[1:11].isnan().all()


def test_a_question_without_an_answer_leaves_no_score_of_the_prompt_whatever_the_others_say() -> None:
    row = {"q": [["What?", "cat"], "Is it?"]}
    for combine in ("mean", "geometric"):
        for questions in (row["q"], row["q"][::-1]):
            assert math.isnan(asked_of(likely(Maybe=0.9), {"q": questions}, key="q", combine=combine)[0])


def test_another_word_is_worth_nothing() -> None:
    # The figure of "one" begins "10", the word does not begin "ten".
    for word, wanted in (("dog", "giraffe"), ("one", "ten"), ("giraffes", "giraffe")):
        assert asked_of(likely(**{word: 0.9}), {"q": [["What?", wanted]]}, key="q") == [0.0]


@pytest.mark.parametrize(
    ("answer", "wanted"),
    [
        (writes("Final Score: 4/5"), 4.0),
        (writes("Score: 8 out of 10."), 8.0),
        (writes("3.5 of 5"), 3.5),
        (writes("4, on a scale of 1-5"), 4.0),
        (writes("On a scale of 1-5: I cannot say"), None),
        (writes("1\u20135: I cannot say"), None),
        (writes("7-8/10"), None),
        (writes("Score: -2.5"), -2.5),
        (writes("Scores:\n- 4\n- 5"), 5.0),
        (writes("Score 1: 3\n- 2"), 2.0),
        (writes("**4**/5"), 4.0),
        (writes("4 (out of 5)"), 4.0),
        (writes("GPT-4"), 4.0),
        (writes("<think>1024 wide, maybe 7</think>Score: 3"), 3.0),
        (writes("1024 wide, maybe 7</think>Score: 3"), 3.0),
        (writes("<think>1024 wide, maybe 7"), None),
        (writes("<think>The picture is 1024 wide, I count 7", "length"), None),
        (writes("It is 1024 wide, I count 7", "length"), None),
        (writes(None, "length", reasoning="The picture"), None),
        (writes(None, refusal="I can't"), None),
        (writes("3", reasoning_content="7 of them"), 3.0),
    ],
)
def test_the_number_of_what_is_written(answer: Any, wanted: float | None) -> None:
    (found,) = asked_of(answer, reads="number", tokens=64)
    assert math.isnan(found) if wanted is None else found == wanted


def test_an_error_of_the_service_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr("vipo.rewards.wire.time", SimpleNamespace(sleep=pauses.append, monotonic=time.monotonic))
    answers = [({"error": {"message": "The server had an error"}}, 500), likely(Yes=0.9)]
    with endpoint(lambda _: answers.pop(0)) as (url, _):
        found = score("judge", judge(url, retries=1), pictures(1, 3, 4, 4), ["x"], [{}])
    assert found.tolist() == pytest.approx([0.9])
    assert pauses == [0.5]
