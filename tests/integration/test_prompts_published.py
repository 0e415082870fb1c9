"""Published prompt sets from a server of this test: pinned at the first fetch, held to it afterwards; filters."""

import hashlib
import io
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vipo.config.compose import repository_root
from vipo.config.prompts import PromptsConfig
from vipo.prompts import PromptError, prepare_prompts, published, read_prompts
from vipo.prompts.needs import drawn_text
from vipo.prompts.published import LOCK, SETS

COMMIT = "ab" * 20
ROOT = repository_root()
TEXTS = [f"a photo of {count} cats" for count in ("one", "two", "three", "four", "five")]


def _parquet() -> bytes:
    stream = io.BytesIO()
    pq.write_table(pa.table({"Prompts": TEXTS, "Category": ["Counting"] * len(TEXTS)}), stream)
    return stream.getvalue()


@pytest.fixture
def pages() -> dict[str, bytes]:
    """What the server answers, by path."""
    geneval = "".join(json.dumps({"prompt": text, "tag": "counting", "include": []}) + "\n" for text in TEXTS)
    vbench = json.dumps([{"prompt_en": text, "dimension": ["color"]} for text in TEXTS])
    parti = "Prompt\tCategory\tChallenge\tNote\n" + "".join(f"{text}\tAnimals\tBasic\t\n" for text in TEXTS)
    found = {"geneval": geneval, "vbench": vbench, "parti": parti, "geneval2": geneval}
    return {f"/{SETS[name].repository}/{SETS[name].commit}/{SETS[name].files}": text.encode()
            for name, text in found.items()}  # fmt: skip


@pytest.fixture
def server(pages: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Its address, in place of the publishers'."""

    class Answer(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def _answer(self, body: bool) -> None:
            data = pages.get(self.path)
            self.send_response(404 if data is None else 200)
            self.send_header("Content-Length", str(len(data or b"")))
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", f'"{hashlib.sha256(data or b"").hexdigest()}"')
            self.end_headers()
            if body and data is not None:
                self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{running.server_port}"
        monkeypatch.setattr(published, "RAW", address)
        yield address
        running.shutdown()


def _prepare(root: Path, **settings: Any) -> dict[str, Any]:
    return prepare_prompts(PromptsConfig(**settings), root, root / "prompts")


@pytest.mark.parametrize("name", ["parti", "geneval", "geneval2", "vbench"])
def test_a_set_is_read_and_pinned_by_what_came_first(
    name: str, server: str, pages: dict[str, bytes], tmp_path: Path
) -> None:
    made = _prepare(tmp_path, source=f"set:{name}", eval_share=0.5)
    assert made["counts"]["kept"] == len(TEXTS)
    found = [prompt for half in ("train", "eval") for prompt in read_prompts(tmp_path / f"prompts/{half}.jsonl")]
    assert {prompt.text for prompt in found} == set(TEXTS)
    assert all(prompt.metadata for prompt in found)
    ((path, data),) = [(path, data) for path, data in pages.items() if path.startswith(f"/{SETS[name].repository}/")]
    lock = json.loads((tmp_path / LOCK).read_text())[f"set:{name}"]
    assert lock["commit"] == SETS[name].commit
    assert lock["files"] == {SETS[name].files: hashlib.sha256(data).hexdigest()}
    assert _prepare(tmp_path, source=f"set:{name}", eval_share=0.5) == made

    pages[path] = data.replace(b"five cats", b"five dogs")
    with pytest.raises(PromptError, match=rf"set:{name}: .* is not what was fetched first .*{LOCK}"):
        _prepare(tmp_path, source=f"set:{name}", eval_share=0.5)
    del pages[path]
    with pytest.raises(PromptError, match=r"cannot be fetched .*404"):
        _prepare(tmp_path, source=f"set:{name}", eval_share=0.5)


def test_a_dataset_is_pinned_at_the_commit_of_its_first_fetch(
    server: str, pages: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import HfApi, hf_hub_download

    def download(*arguments: Any, **options: Any) -> str:
        return hf_hub_download(*arguments, **options, endpoint=server, cache_dir=tmp_path / "cache")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(published, "HfApi", lambda: HfApi(endpoint=server))
    monkeypatch.setattr(published, "hf_hub_download", download)
    repository, data = SETS["drawbench"].repository, _parquet()
    info = {"id": repository, "sha": COMMIT, "siblings": [{"rfilename": "data/test-0.parquet"}, {"rfilename": "a.md"}]}
    for path in (f"/api/datasets/{repository}", f"/api/datasets/{repository}/revision/{COMMIT}"):
        pages[path] = json.dumps(info).encode()
    pages[f"/datasets/{repository}/resolve/{COMMIT}/data/test-0.parquet"] = data
    made = _prepare(tmp_path, source="set:drawbench", eval_share=0.5)
    assert made["counts"]["kept"] == len(TEXTS)
    lock = json.loads((tmp_path / LOCK).read_text())["set:drawbench"]
    assert (lock["commit"], lock["files"]) == (COMMIT, {"data/test-0.parquet": hashlib.sha256(data).hexdigest()})
    # Asked for at that commit from now on: the newest one is another.
    del pages[f"/api/datasets/{repository}"]
    assert _prepare(tmp_path, source="set:drawbench", eval_share=0.5) == made
    own = f"hub:{repository}@{COMMIT}/data/test-0.parquet"
    assert _prepare(tmp_path, source=own, text_key="Prompts", eval_share=0.5)["counts"] == made["counts"]


@pytest.mark.parametrize("text", ["{", "[]", '{"set:parti": 5}', '{"set:parti": {"commit": "a"}}'])
def test_a_damaged_lock_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / LOCK).parent.mkdir(parents=True)
    (tmp_path / LOCK).write_text(text)
    with pytest.raises(PromptError, match=rf"{LOCK}: cannot be read .*; restore it from git"):
        _prepare(tmp_path, source="set:parti")


def test_names_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match="no such set; one of set:parti, "):
        _prepare(tmp_path, source="set:imagenet")
    with pytest.raises(PromptError, match="the commit whole"):
        _prepare(tmp_path, source="hub:owner/name@main/file.csv")


def test_a_source_of_its_own_for_the_held_out_prompts_leaves_none_of_them_in_training(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("a cat\na dog\na bird\n")
    (tmp_path / "eval.jsonl").write_text('{"text": "a  dog", "n": 1}\n{"text": "a fish"}\n{"text": ""}\n')
    made = _prepare(tmp_path, source="train.txt", eval={"source": "eval.jsonl", "text_key": "text"})
    train, held_out = (read_prompts(tmp_path / f"prompts/{half}.jsonl") for half in ("train", "eval"))
    assert {prompt.text for prompt in train} == {"a cat", "a bird"}
    assert {prompt.text: prompt.metadata for prompt in held_out} == {"a dog": {"n": 1}, "a fish": {}}
    assert made["counts"] == {"rows": 3, "kept": 2, "train": 2, "eval": 2}
    assert made["eval"]["dropped"]["blank"] == [3]
    assert len(made["eval"]["left_out_of_train"]) == 1
    own = {"source": str(ROOT / "data/prompts/evaluation.jsonl"), "categories": ["text"]}
    made = _prepare(tmp_path, source="train.txt", eval=own)
    held_out = read_prompts(tmp_path / "prompts/eval.jsonl")
    assert len(held_out) == made["counts"]["eval"] == 40
    assert all(drawn_text(prompt.text, prompt.metadata, "text") for prompt in held_out)
    assert len(made["eval"]["dropped"]["other_category"]) == made["eval"]["rows"] - 40
    with pytest.raises(ValueError, match="leave eval out"):
        PromptsConfig(source="a.txt", eval={"source": "a.txt"})


def test_filters_are_counted(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a red cat\nкрасный кот\nthe Bad Word here\nbadword is none\na b c d e f\n")
    (tmp_path / "blocked.txt").write_text("bad  WORD\n\n")
    filters = {"max_tokens": 5, "script": "LATIN", "blocklist": "blocked.txt"}
    config = PromptsConfig(source="p.txt", eval_share=0, filters=filters)
    made = prepare_prompts(config, tmp_path, tmp_path / "prompts", tokens=lambda text: len(text.split()))
    dropped = {reason: rows for reason, rows in made["dropped"].items() if rows}
    assert dropped == {"other_script": [2], "blocked": [3], "too_many_tokens": [5]}
    assert made["counts"]["kept"] == 2
    assert made["config"]["filters"]["max_tokens"] == 5
    # What drops nothing is not named: the bytes of before.
    assert "filters" not in PromptsConfig(source="p.txt").identity()


def test_tokens_are_the_generators_own(tiny_generator: Path) -> None:
    from transformers import AutoTokenizer

    from vipo.config.compose import load_config
    from vipo.generators.tokens import token_counter

    config = load_config(["experiment=demo", f"generator.path={tiny_generator}"]).generator
    text = "a large triangle on a white background"
    counts = [len(AutoTokenizer.from_pretrained(path)(text).input_ids) for path in tiny_generator.glob("tokenizer*")]
    assert token_counter(config, Path())(text) == max(counts)
