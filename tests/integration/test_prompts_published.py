"""Published prompt sets from a server of this test: pinned at the first fetch, held to it afterwards; filters."""

import dataclasses
import hashlib
import io
import json
import shutil
import threading
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vipo.config.compose import repository_root
from vipo.config.prompts import PromptsConfig
from vipo.prompts import PromptError, categories_of, prepare_prompts, published, read_prompts
from vipo.prompts.needs import drawn_text
from vipo.prompts.published import LOCK, SETS

COMMIT = "ab" * 20
ROOT = repository_root()
CATEGORIES = {"parti": "Animals", "geneval": "counting", "geneval2": "3", "vbench": "color"}
TEXTS = [f"a photo of {count} cats" for count in ("one", "two", "three", "four", "five")]


def _parquet() -> bytes:
    stream = io.BytesIO()
    pq.write_table(pa.table({"Prompts": TEXTS, "Category": ["Counting"] * len(TEXTS)}), stream)
    return stream.getvalue()


def _address(name: str) -> str:
    known = SETS[name]
    return f"/{known.repository}/{known.commit}/{known.files[0]}"


@pytest.fixture
def pages() -> dict[str, bytes]:
    """What the server answers, by path."""
    geneval = "".join(json.dumps({"prompt": text, "tag": "counting", "include": []}) + "\n" for text in TEXTS)
    vbench = json.dumps([{"prompt_en": text, "dimension": ["color"]} for text in TEXTS])
    parti = "Prompt\tCategory\tChallenge\tNote\n" + "".join(f"{text}\tAnimals\tBasic\t\n" for text in TEXTS)
    geneval2 = "".join(json.dumps({"prompt": text, "atom_count": 3, "skills": ["count"]}) + "\n" for text in TEXTS)
    found = {"geneval": geneval, "vbench": vbench, "parti": parti, "geneval2": geneval2}
    return {_address(name): text.encode() for name, text in found.items()}


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
    assert {categories_of(prompt.metadata) for prompt in found} == {(CATEGORIES[name],)}
    path, data = _address(name), pages[_address(name)]
    lock = json.loads((tmp_path / LOCK).read_text())[f"set:{name}"]
    assert lock["commit"] == SETS[name].commit
    assert lock["files"] == {SETS[name].files[0]: hashlib.sha256(data).hexdigest()}
    assert _prepare(tmp_path, source=f"set:{name}", eval_share=0.5) == made

    pages[path] = data.replace(b"five cats", b"five dogs")
    with pytest.raises(PromptError, match=rf"set:{name}: .* is not what was fetched first .*{LOCK}"):
        _prepare(tmp_path, source=f"set:{name}", eval_share=0.5)
    del pages[path]
    with pytest.raises(PromptError, match=r"cannot be fetched .*404"):
        _prepare(tmp_path, source=f"set:{name}", eval_share=0.5)


def test_quotes_of_a_tsv_are_characters(server: str, pages: dict[str, bytes], tmp_path: Path) -> None:
    """PartiPrompts has prompts that begin with a quote, and TSV quotes nothing."""
    text = '"G I G G L E" painted in thick "colors" on a wall'
    pages[_address("parti")] += f'{text}\tArts\tBasic\t"a note\n'.encode()
    made = _prepare(tmp_path, source="set:parti", eval_share=0)
    assert made["counts"]["kept"] == len(TEXTS) + 1
    (found,) = [prompt for prompt in read_prompts(tmp_path / "prompts/train.jsonl") if prompt.text == text]
    assert found.metadata == {"Category": "Arts", "Challenge": "Basic", "Note": '"a note', "category": "Arts"}
    pages[_address("parti")] += b'"a\tb"\tArts\tBasic\t\n'
    (tmp_path / LOCK).unlink()
    with pytest.raises(PromptError, match=r"PartiPrompts\.tsv: line 8: has 5 fields, .* a tab ends a field"):
        _prepare(tmp_path, source="set:parti")


def test_a_prompt_that_vbench_names_twice_is_of_both_dimensions(
    server: str, pages: dict[str, bytes], tmp_path: Path
) -> None:
    rows = [{"prompt_en": TEXTS[0], "dimension": ["appearance_style"], "auxiliary_info": {"a": 1}}]
    rows += [{"prompt_en": TEXTS[1], "dimension": ["scene"]}]
    rows += [{"prompt_en": TEXTS[0], "dimension": ["aesthetic_quality", "imaging_quality"]}]
    pages[_address("vbench")] = json.dumps(rows).encode()
    made = _prepare(tmp_path, source="set:vbench", eval_share=0)
    assert (made["counts"]["rows"], made["dropped"]["exact_duplicate"]) == (3, [3])
    found = {prompt.text: prompt.metadata for prompt in read_prompts(tmp_path / "prompts/train.jsonl")}
    dimensions = ["appearance_style", "aesthetic_quality", "imaging_quality"]
    assert found[TEXTS[0]] == {"dimension": dimensions, "auxiliary_info": {"a": 1}, "category": dimensions}
    (tmp_path / "a.txt").write_text("a dog")
    _prepare(tmp_path, source="a.txt", eval={"source": "set:vbench", "categories": ["imaging_quality"]})
    (only,) = read_prompts(tmp_path / "prompts/eval.jsonl")
    assert (only.text, categories_of(only.metadata)) == (TEXTS[0], tuple(dimensions))


def test_two_that_prepare_at_once_lose_no_entry(
    server: str, pages: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched = published._fetched

    def meanwhile(name: str, commit: str | None, section: str) -> Any:
        found = fetched(name, commit, section)
        monkeypatch.setattr(published, "_fetched", fetched)
        for other in ("set:geneval", "set:parti"):
            _prepare(tmp_path, source=other)
        return found

    monkeypatch.setattr(published, "_fetched", meanwhile)
    _prepare(tmp_path, source="set:parti")
    assert json.loads((tmp_path / LOCK).read_text()).keys() == {"set:geneval", "set:parti"}
    # The one that was first pins it: what this one fetched before is held to that.
    (tmp_path / LOCK).unlink()
    other = {"PartiPrompts.tsv": b"Prompt\tCategory\nanother\tAnimals\n"}

    def overtaken(name: str, commit: str | None, section: str) -> Any:
        monkeypatch.setattr(published, "_fetched", fetched)
        _prepare(tmp_path, source="set:parti")
        return COMMIT, other

    monkeypatch.setattr(published, "_fetched", overtaken)
    with pytest.raises(PromptError, match=r"PartiPrompts\.tsv is not what was fetched first"):
        _prepare(tmp_path, source="set:parti")


@pytest.fixture
def hub(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server in place of the hub, too."""
    from huggingface_hub import HfApi, hf_hub_download

    def download(*arguments: Any, **options: Any) -> str:
        return hf_hub_download(*arguments, **options, endpoint=server, cache_dir=tmp_path / "cache")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(published, "HfApi", lambda: HfApi(endpoint=server))
    monkeypatch.setattr(published, "hf_hub_download", download)


def _publish(pages: dict[str, bytes], name: str, files: dict[str, bytes], others: Sequence[str] = ()) -> None:
    repository = SETS[name].repository
    info = {"id": repository, "sha": COMMIT, "siblings": [{"rfilename": path} for path in (*files, *others)]}
    for path in (f"/api/datasets/{repository}", f"/api/datasets/{repository}/revision/{COMMIT}"):
        pages[path] = json.dumps(info).encode()
    for path, data in files.items():
        pages[f"/datasets/{repository}/resolve/{COMMIT}/{path}"] = data


@pytest.mark.usefixtures("hub")
def test_hpd_is_its_four_styles_and_no_file_beside_them(pages: dict[str, bytes], tmp_path: Path) -> None:
    styles = ("anime", "concept-art", "paintings", "photo")
    files = {f"benchmark/{style}.json": [f"{style} {number}" for number in range(800)] for style in styles}
    others = ("benchmark/drawbench.json", "benchmark/benchmark_imgs/photo.json", "anime.json")
    _publish(pages, "hpd", {path: json.dumps(rows).encode() for path, rows in files.items()}, others)
    _prepare(tmp_path, source="set:hpd", eval_share=0)
    found = {prompt.text: prompt.metadata for prompt in read_prompts(tmp_path / "prompts/train.jsonl")}
    assert found == {f"{style} {number}": {"category": style} for style in styles for number in range(800)}

    (tmp_path / LOCK).unlink()
    files["benchmark/photo.json"] += ["one more"]
    pages.pop(f"/datasets/{SETS['hpd'].repository}/resolve/{COMMIT}/benchmark/photo.json")
    shutil.rmtree(tmp_path / "cache")
    _publish(pages, "hpd", {path: json.dumps(rows).encode() for path, rows in files.items()})
    with pytest.raises(PromptError, match=r"set:hpd: 3201 rows were fetched, and the set has 3200"):
        _prepare(tmp_path, source="set:hpd")
    (tmp_path / LOCK).unlink()
    _publish(pages, "hpd", {}, ("benchmark/anime.json", "benchmark/paintings.json", "benchmark/photo.json"))
    with pytest.raises(PromptError, match=r"zhwang/HPDv2 holds no benchmark/concept-art\.json"):
        _prepare(tmp_path, source="set:hpd")


@pytest.mark.usefixtures("hub")
def test_a_dataset_is_pinned_at_the_commit_of_its_first_fetch(
    pages: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known, data = dataclasses.replace(SETS["drawbench"], rows=len(TEXTS)), _parquet()
    monkeypatch.setattr(published, "SETS", {"drawbench": known})
    repository = known.repository
    _publish(pages, "drawbench", {"data/test-0.parquet": data}, ("a.md", "data/old/test.parquet", "b.parquet"))
    made = _prepare(tmp_path, source="set:drawbench", eval_share=0.5)
    assert made["counts"]["kept"] == len(TEXTS)
    (first, *_) = read_prompts(tmp_path / "prompts/train.jsonl")
    assert categories_of(first.metadata) == ("Counting",)
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


def test_a_tokenizer_that_reads_parts_of_prompts_alone_counts_nothing(tmp_path: Path) -> None:
    from language_checkpoints import qwen_tokenizer
    from transformers import ByT5Tokenizer

    from vipo.config.compose import load_config
    from vipo.generators.tokens import token_counter

    (tmp_path / "model_index.json").write_text("{}")
    qwen_tokenizer().save_pretrained(tmp_path / "tokenizer")
    ByT5Tokenizer().save_pretrained(tmp_path / "tokenizer_2")
    text, counts = "a large triangle on a white background", []
    for family in ("hunyuan_video", "flux"):
        given = ["experiment=demo", f"generator.path={tmp_path}", f"generator.family={family}"]
        counts.append(token_counter(load_config(given).generator, Path())(text))
    assert counts == [len(qwen_tokenizer()(text).input_ids), len(text) + 1]
    assert counts[0] < counts[1]


def test_tokens_are_the_generators_own(tiny_generator: Path) -> None:
    from transformers import AutoTokenizer

    from vipo.config.compose import load_config
    from vipo.generators.tokens import token_counter

    config = load_config(["experiment=demo", f"generator.path={tiny_generator}"]).generator
    text = "a large triangle on a white background"
    counts = [len(AutoTokenizer.from_pretrained(path)(text).input_ids) for path in tiny_generator.glob("tokenizer*")]
    assert token_counter(config, Path())(text) == max(counts)
