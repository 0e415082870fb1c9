"""`prepare` on files of every format, good and bad."""

import csv
import datetime
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vipo.config.compose import load_config
from vipo.config.prompts import PromptsConfig
from vipo.demo.captions import write_demo_prompts
from vipo.demo.scenes import one_object_captions
from vipo.prompts import Prompt, PromptError, prepare_prompts, read_prompts, sources
from vipo.provenance.files import StorageError
from vipo.stages import prepare_stage

REPOSITORY = Path(__file__).resolve().parents[2]

TEXTS = [
    "a red circle",
    "two lines\nof \"quoted\", 'text'",
    "<script>alert(1)</script>",
    "emoji 👩‍🚀🎨 here",
    "مرحبا بالعالم",
    "=SUM(A1), ../../etc/passwd; $(rm -rf /)",
    "x" * 102_400,
]
CLEAN = {text.replace("\n", " ") for text in TEXTS}


def _txt(path: Path, texts: list[str]) -> None:
    path.write_text("".join(text.replace("\n", " ") + "\n" for text in texts), encoding="utf-8")


def _jsonl(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"prompt": t, "n": i, "tags": ["a"]}) + "\n" for i, t in enumerate(texts)))


def _csv(path: Path, texts: list[str]) -> None:
    with path.open("w", encoding="utf-8", newline="") as stream:
        csv.writer(stream).writerows([("n", "prompt"), *enumerate(texts)])


def _parquet(path: Path, texts: list[str]) -> None:
    pq.write_table(pa.table({"prompt": texts, "n": list(range(len(texts)))}), path)


WRITERS: Mapping[str, Callable[[Path, list[str]], None]] = {
    "txt": _txt,
    "jsonl": _jsonl,
    "csv": _csv,
    "parquet": _parquet,
}


def _prepare(folder: Path, source: str, **options: Any) -> tuple[dict[str, Any], list[Prompt]]:
    config = PromptsConfig(source=source, **{"eval_share": 0.5, "max_characters": 200_000, **options})
    manifest = prepare_prompts(config, folder, folder / "out")
    return manifest, read_prompts(folder / "out" / "train.jsonl") + read_prompts(folder / "out" / "eval.jsonl")


@pytest.mark.parametrize("suffix", WRITERS)
def test_every_format_gives_the_same_prompts(tmp_path: Path, suffix: str) -> None:
    WRITERS[suffix](tmp_path / f"p.{suffix}", TEXTS)
    manifest, prompts = _prepare(tmp_path, f"p.{suffix}")
    assert {prompt.text for prompt in prompts} == CLEAN
    numbers = {prompt.text: prompt.metadata.get("n") for prompt in prompts}
    for number, text in enumerate(TEXTS):
        expected = {"txt": None, "csv": str(number)}.get(suffix, number)
        assert numbers[text.replace("\n", " ")] == expected
    assert manifest["source_sha256"] == hashlib.sha256((tmp_path / f"p.{suffix}").read_bytes()).hexdigest()
    assert manifest["source"] == f"p.{suffix}"
    assert manifest["config"]["max_characters"] == 200_000


@pytest.mark.parametrize("suffix", WRITERS)
def test_long_prompts_are_dropped_and_counted(tmp_path: Path, suffix: str) -> None:
    WRITERS[suffix](tmp_path / f"p.{suffix}", [*TEXTS, "y" * 1_000_000])
    manifest, prompts = _prepare(tmp_path, f"p.{suffix}", max_characters=2000)
    assert {prompt.text for prompt in prompts} == {text for text in CLEAN if len(text) < 2000}
    assert len(manifest["dropped"]["too_long"]) == 2


def test_dropped_rows_are_named_by_reason(tmp_path: Path) -> None:
    lines = [*"abcdef", "", "A ", "a", "\t", "b", "z" * 30, " B", "f", " b ", "\u200b\u3164"]
    (tmp_path / "p.txt").write_bytes("\r\n".join(lines).encode("utf-8-sig"))
    manifest, prompts = _prepare(tmp_path, "p.txt", max_characters=20)
    assert sorted(prompt.text for prompt in prompts) == ["A", "B", *"abcdef"]
    assert manifest["dropped"] == {
        "blank": [7, 10, 16],
        "too_long": [12],
        "exact_duplicate": [9, 11, 14],
        "whitespace_duplicate": [15],
        "case_duplicate": [],
    }
    assert manifest["counts"]["rows"] == 16
    assert manifest["counts"]["kept"] == 8
    # The case of a text that is to be drawn is its meaning; where it is not, the first row is kept.
    manifest, prompts = _prepare(tmp_path, "p.txt", max_characters=20, ignore_case=True)
    assert sorted(prompt.text for prompt in prompts) == [*"abcdef"]
    assert manifest["dropped"]["case_duplicate"] == [8, 13]
    assert manifest["dropped"]["whitespace_duplicate"] == [15]


def test_written_files_are_the_manifest_s_and_bit_identical_on_a_rerun(tmp_path: Path) -> None:
    _jsonl(tmp_path / "p.jsonl", TEXTS)
    manifest, _ = _prepare(tmp_path, "p.jsonl")
    first = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert set(first) == {"train.jsonl", "eval.jsonl", "manifest.json"}
    assert json.loads(first["manifest.json"]) == manifest
    for name, digest in manifest["files"].items():
        assert hashlib.sha256(first[name]).hexdigest() == digest
    _prepare(tmp_path, "p.jsonl")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == first
    assert str(tmp_path).encode() not in b"".join(first.values())


def test_demo_prompts_are_what_the_code_writes_and_split_well(tmp_path: Path) -> None:
    for written in write_demo_prompts(tmp_path):
        assert written.read_bytes() == (REPOSITORY / "data" / "prompts" / written.name).read_bytes()
    manifest, prompts = _prepare(tmp_path, "colourless.jsonl", eval_share=0.25)
    assert {p.text: p.metadata for p in prompts} == dict(one_object_captions(named_color=False))
    assert manifest["counts"]["eval"] >= 40


def _called_source(root: Path) -> Iterable[dict[str, Any]]:
    return [{"prompt": text, "from": root.name} for text in TEXTS]


def _failing_source(root: Path) -> Iterable[dict[str, Any]]:
    yield {"prompt": "one"}
    raise RuntimeError("server is away")


def _listing_source(root: Path) -> Iterable[Any]:
    return ["a prompt without a mapping"]


def test_a_callable_is_a_source_too(tmp_path: Path) -> None:
    manifest, prompts = _prepare(tmp_path, f"{__name__}:_called_source")
    assert {prompt.text for prompt in prompts} == CLEAN
    assert {prompt.metadata["from"] for prompt in prompts} == {tmp_path.name}
    assert len(manifest["source_sha256"]) == 64
    assert manifest == _prepare(tmp_path, f"{__name__}:_called_source")[0]


BAD_BYTES: list[tuple[str, bytes | None, str]] = [
    ("p.txt", None, r"p\.txt: cannot be read \(No such file"),
    ("p.xml", b"<a/>", r"ends in \.txt, \.json, \.jsonl, \.csv, \.tsv, \.parquet, or an import path"),
    ("p.json", b"{}", "holds a dict; write a list of objects or of texts"),
    ("p.txt", b"", r"p\.txt: is empty"),
    ("p.txt", b" \n\n\t\n", r"p\.txt: is empty"),
    ("p.parquet", b"", r"p\.parquet: is empty"),
    ("p.txt", "\u200b\x07\n".encode()[3:], r"p\.txt: no prompt is left of 1 rows \(1 blank\)"),
    ("p.txt", b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR", r"p\.txt: holds NUL bytes, so it is binary"),
    ("p.jsonl", '{"prompt": "a"}'.encode("utf-16"), r"binary or UTF-16; save the prompts as UTF-8"),
    ("p.csv", "prompt\na\nun café\n".encode("latin-1"), r"p\.csv: line 3: byte 0xe9 is not UTF-8.*iconv"),
    ("p.jsonl", b'{"prompt": "a"}\n\n{"prompt": \n', r"p\.jsonl: line 3: is not JSON"),
    ("p.jsonl", b'{"prompt": "a", "x": NaN}\n', r"p\.jsonl: line 1: is not JSON \(NaN"),
    ("p.jsonl", b"[" * 100_000, r"p\.jsonl: line 1: is not JSON"),
    ("p.jsonl", b'{"prompt": "a"}\n["b"]\n', r"p\.jsonl: line 2: holds a list; write one JSON object"),
    ("p.jsonl", b'{"prompt": "a"}\n{"text": "b", "n": 1}\n', r"row 2: has no key 'prompt'.*text_key.*: text, n"),
    ("p.jsonl", b'{"prompt": ["a"]}\n', r"row 1: 'prompt' holds a list, a prompt is text"),
    ("p.jsonl", b'{"prompt": "a", "x": "\\ud800"}\n', r"row 1: cannot be kept as JSON"),
    ("p.csv", b"text,n\na,1\n", r"p\.csv: has no key 'prompt'.*one of: text, n"),
    ("p.csv", b"prompt,n\na,1\nb, c,2\n", r"p\.csv: line 3: has 3 fields, the first line names 2"),
    ("p.csv", b"prompt,n\na\n", r"p\.csv: line 2: has 1 fields"),
    ("p.csv", b'prompt\n"a"b\n', r"p\.csv: line 2: is not CSV"),
    ("p.csv", b"prompt,prompt\na,b\n", r"named twice in the first line: prompt, prompt"),
    ("p.jsonl", b'{"prompt": "a"}\n{"prompt": "b", "prompt": "c"}\n', r"line 2: .*a key is named twice: 'prompt'"),
    ("p.jsonl", b'{"prompt": "a", "x": {"y": 1, "y": 2}}\n', r"line 1: .*a key is named twice: 'y', 'y'"),
    ("p.csv", b"prompt\n", r"no prompt is left of 0 rows \(it has no rows\)"),
    ("p.parquet", b"PAR1 this is not one", r"p\.parquet: is not a Parquet file"),
]


@pytest.mark.parametrize(("name", "content", "told"), BAD_BYTES)
def test_bad_files_are_refused_and_nothing_is_written(
    tmp_path: Path, name: str, content: bytes | None, told: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(PromptError, match=told):
        _prepare(tmp_path, name)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("columns", "told"),
    [
        ({"text": ["a"], "n": [1]}, r"has no key 'prompt'.*one of: text, n"),
        ({"prompt": [3]}, r"row 1: 'prompt' holds a int"),
        ({"prompt": ["a"], "day": [datetime.date(2026, 1, 1)]}, r"row 1: cannot be kept as JSON.*date"),
        ({"prompt": ["a"], "x": [float("nan")]}, r"row 1: cannot be kept as JSON"),
    ],
)
def test_bad_parquet_is_refused(tmp_path: Path, columns: dict[str, list[Any]], told: str) -> None:
    pq.write_table(pa.table(columns), tmp_path / "p.parquet")
    with pytest.raises(PromptError, match=told):
        _prepare(tmp_path, "p.parquet")


def test_parquet_with_two_columns_of_one_name_is_refused(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["prompt", "prompt"])
    pq.write_table(table, tmp_path / "p.parquet")
    with pytest.raises(PromptError, match=r"p\.parquet: a column is named twice: prompt, prompt"):
        _prepare(tmp_path, "p.parquet")
    fields = pa.StructArray.from_arrays([pa.array([1]), pa.array([2])], names=["x", "x"])
    pq.write_table(pa.table({"prompt": ["a"], "fields": fields}), tmp_path / "p.parquet")
    with pytest.raises(PromptError, match=r"p\.parquet: .*duplicate"):
        _prepare(tmp_path, "p.parquet")


def test_a_source_is_a_regular_file_below_a_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "p.txt")
    (tmp_path / "p.jsonl").symlink_to("/dev/zero")
    (tmp_path / "p.csv").mkdir()
    for name, kind in (("p.txt", "a pipe"), ("p.jsonl", "a device"), ("p.csv", "a folder")):
        with pytest.raises(PromptError, match=f"{name}: cannot be read .*it is {kind}, a regular file is needed"):
            _prepare(tmp_path, name)
    with (tmp_path / "large.txt").open("wb") as stream:
        stream.truncate(sources.MOST_BYTES + 1)
    with pytest.raises(PromptError, match=r"large\.txt: cannot be read .*at most 536870912 \(512 MiB\)"):
        _prepare(tmp_path, "large.txt")
    # A small file that unpacks to any size: one text, a million times.
    pq.write_table(pa.table({"prompt": ["x" * 1000] * 10_000}), tmp_path / "small.parquet")
    assert (tmp_path / "small.parquet").stat().st_size < 10_000
    monkeypatch.setattr(sources, "MOST_BYTES", 10**6)
    with pytest.raises(PromptError, match=r"small\.parquet: unpacks to more than 1000000 bytes"):
        _prepare(tmp_path, "small.parquet")


def test_prompts_that_no_run_could_use_are_not_written(tmp_path: Path) -> None:
    _jsonl(tmp_path / "p.jsonl", TEXTS)
    overrides = [f"prompts.source={tmp_path}/p.jsonl", "evaluation.rewards=[]", "training.micro_batch=4"]
    overrides += ["training.prompts_per_update=1"]
    config = load_config(["experiment=demo", "prompts.eval_share=0.5", *overrides])
    oracle = load_config(["experiment=demo", "prompts.eval_share=0.5", *overrides, "arm=oracle"])
    with pytest.raises(PromptError, match="credit source 'oracle' needs scene metadata"):
        prepare_stage(config, tmp_path, tmp_path / "results", readers=[oracle])
    assert not (tmp_path / "results/demo/prompts/manifest.json").exists()
    prepare_stage(config, tmp_path, tmp_path / "results")
    assert (tmp_path / "results/demo/prompts/manifest.json").is_file()


def test_a_null_prompt_counts_as_blank(tmp_path: Path) -> None:
    pq.write_table(pa.table({"prompt": ["a", None, *TEXTS]}), tmp_path / "p.parquet")
    assert _prepare(tmp_path, "p.parquet")[0]["dropped"]["blank"] == [2]


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("_failing_source", "RuntimeError: server is away"),
        ("_listing_source", "row 1: is a str; a prompt source gives mappings"),
        ("absent", "AttributeError"),
        ("TEXTS", "not callable"),
    ],
)
def test_bad_callables_are_named(tmp_path: Path, name: str, told: str) -> None:
    with pytest.raises(PromptError, match=told) as caught:
        _prepare(tmp_path, f"{__name__}:{name}")
    assert name in str(caught.value)


def test_an_unwritable_folder_is_one_clear_error(tmp_path: Path) -> None:
    _txt(tmp_path / "p.txt", TEXTS)
    (tmp_path / "out").write_text("a file stands where the folder should be")
    with pytest.raises(StorageError, match="cannot be written"):
        _prepare(tmp_path, "p.txt")
    assert (tmp_path / "out").read_text() == "a file stands where the folder should be"


def test_a_failed_write_leaves_the_old_files_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _txt(tmp_path / "p.txt", TEXTS)
    _prepare(tmp_path, "p.txt")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    written = Path.write_bytes

    def full_disk(self: Path, data: bytes) -> int:
        if "train.jsonl" in self.name:
            written(self, data[: len(data) // 2])
            raise OSError(28, "No space left on device")
        return written(self, data)

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    _txt(tmp_path / "p.txt", TEXTS[:-1])
    with pytest.raises(StorageError, match="No space left"):
        _prepare(tmp_path, "p.txt")
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def _line(**changes: Any) -> str:
    row = {"id": hashlib.sha256(b"a").hexdigest()[:16], "text": "a", "metadata": {}, **changes}
    return json.dumps(row) + "\n"


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "cannot be read.*run 'vipo prepare' first"),
        (_line().rstrip("\n"), "last line is cut off"),
        (_line() + '{"id"\n', "line 2: is not JSON"),
        ('{"prompt": "a"}\n', "line 1: is not a prepared prompt"),
        ("[1]\n", "line 1: is not a prepared prompt"),
        (_line(metadata=[]), "metadata an object"),
        (_line(text=3), "text must be a string"),
        (_line(text="b"), "line 1: id .* is not that of its text"),
        (_line(id="../x"), "line 1: id '../x' is not that of its text"),
        (_line() * 2, "a prompt occurs twice"),
    ],
)
def test_prepared_files_are_validated(tmp_path: Path, content: str | None, told: str) -> None:
    path = tmp_path / "train.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(PromptError, match=told):
        read_prompts(path)
