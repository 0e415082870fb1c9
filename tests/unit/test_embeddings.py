"""Embeddings in files: the same bytes however they came about, and no more of them in memory than are asked for."""

import contextlib
import hashlib
import json
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from vipo.config.compose import load_config
from vipo.config.generator import GeneratorConfig
from vipo.generators import Generator, GeneratorError
from vipo.generators.embeddings import Embeddings, check_embeddings, load_embeddings, stack_conditioning
from vipo.generators.encoding import encode_prompt_file
from vipo.prompts import Prompt
from vipo.prompts.prompt import prompt_id
from vipo.stages import inputs


class Reader(Generator):
    """Its text encoder draws a prompt's tensors by the text's hash; it counts how many of them are alive."""

    network_folder = "none"
    latent_shape = (2, 4, 4)
    rounds: ClassVar[bool] = False
    calls: ClassVar[list[int]] = []
    stop_at: ClassVar[int] = 0
    alive: ClassVar[int] = 0
    most: ClassVar[int] = 0

    def __init__(self, config: GeneratorConfig) -> None:
        self.config, self.device = config, torch.device("cpu")

    @classmethod
    def load(cls, config: GeneratorConfig, root: Path) -> "Reader":
        return cls(config)

    @classmethod
    def encode_prompts(cls, config: GeneratorConfig, root: Path, texts: Sequence[str]) -> list[dict[str, Tensor]]:
        cls.calls.append(len(texts))
        if config.negative_prompt in texts:
            raise RuntimeError("unreadable")
        if len(cls.calls) == cls.stop_at:
            raise KeyboardInterrupt
        return [cls._row(text) for text in texts]

    @classmethod
    def _row(cls, text: str) -> dict[str, Tensor]:
        draw = torch.Generator().manual_seed(int(hashlib.sha256(text.encode()).hexdigest()[:8], 16))
        tokens = torch.randn(3, 4, generator=draw)
        tokens = tokens.bfloat16().float() if cls.rounds else tokens
        Reader.alive += 1
        Reader.most = max(Reader.most, Reader.alive)
        weakref.finalize(tokens, Reader._gone)
        return {"tokens": tokens, "negative_tokens": torch.full((3, 4), 0.1)}

    @staticmethod
    def _gone() -> None:
        Reader.alive -= 1

    def _absent(self, *_: object, **__: object) -> None:
        raise NotImplementedError

    _predict = decode = add_lora = save_network = load_network = _absent


def _expected(prompt: Prompt) -> Tensor:
    return Reader._row(prompt.text)["tokens"]


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("rounds", False), ("calls", []), ("stop_at", 0), ("most", 0)):
        monkeypatch.setattr(Reader, name, value)


def _source(folder: Path, count: int) -> tuple[Path, list[Prompt]]:
    texts = [f"scene {number}" for number in range(count)]
    prompts = [Prompt(prompt_id(text), text, {}) for text in texts]
    folder.mkdir(exist_ok=True)
    (folder / "nowhere").mkdir(exist_ok=True)
    (folder / "nowhere/model_index.json").write_text("{}")
    source = folder / "train.jsonl"
    rows = [json.dumps({"id": prompt.id, "text": prompt.text, "metadata": {}}) for prompt in prompts]
    source.write_text("".join(f"{row}\n" for row in rows))
    return source, prompts


def _encode(folder: Path, count: int, **options: Any) -> tuple[list[Path], list[Prompt]]:
    source, prompts = _source(folder, count)
    config = GeneratorConfig(
        family="test_embeddings:Reader",
        path="nowhere",
        height=8,
        width=8,
        encoders=options.pop("encoders", "fp32"),
        negative_prompt=options.pop("bad", ""),
    )
    return encode_prompt_file(config, folder, source, folder / "train.safetensors", {"a": 1}, **options), prompts


def _bytes(files: Sequence[Path]) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in files}


def test_a_device_is_free_again_when_prompts_are_encoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For the first of the ranks that this process is going to launch beside itself."""
    alive: list[weakref.ref[Tensor]] = []
    freed: list[bool] = []

    def encode(*_: Any) -> list[Path]:
        held = [torch.ones(1)]
        # As the modules of a network hold each other.
        held.append(held)  # type: ignore[arg-type]
        alive.append(weakref.ref(held[0]))
        return []

    monkeypatch.setattr("vipo.generators.encoding.encode_prompt_file", encode)
    monkeypatch.setattr("vipo.generators.starting.checkpoint_inputs", lambda *_: [])
    monkeypatch.setattr(inputs, "record_stage", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: freed.append(all(each() is None for each in alive)))
    inputs.encode_stage(load_config(["experiment=demo", "generator.device=cuda"]), tmp_path, tmp_path)
    assert len(alive) == 2
    assert freed
    assert all(freed)


@pytest.mark.usefixtures("fresh")
def test_several_files_hold_what_one_does(tmp_path: Path) -> None:
    (one,), prompts = _encode(tmp_path / "one", 10)
    several, _ = _encode(tmp_path / "several", 10, per_file=4)
    assert [file.name for file in several[1:]] == [f"train-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    found = [load_embeddings(file, prompts) for file in (one, several[0])]
    for prompt in prompts:
        for embeddings in found:
            assert list(embeddings[prompt.id]) == ["negative_tokens", "tokens"]
            assert torch.equal(embeddings[prompt.id]["tokens"], _expected(prompt))
    ids = [prompts[7].id, prompts[2].id, prompts[7].id]
    first, second = (stack_conditioning(embeddings, ids) for embeddings in found)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert first["tokens"].shape == (3, 3, 4)
    # In the one file, the negative prompt stands once.
    assert load_file(one).keys() == {"negative_tokens", *(f"{prompt.id}/tokens" for prompt in prompts)}


@pytest.mark.usefixtures("fresh")
def test_a_killed_encoding_goes_on_and_ends_with_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    whole = _bytes(_encode(tmp_path / "whole", 10, per_file=3)[0])
    assert Reader.calls == [3, 3, 3, 1]
    monkeypatch.setattr(Reader, "calls", [])
    monkeypatch.setattr(Reader, "stop_at", 3)
    with pytest.raises(KeyboardInterrupt):
        _encode(tmp_path / "cut", 10, per_file=3)
    assert not (tmp_path / "cut/train.safetensors").exists()
    # Half a file, as a crash of the machine may leave it, and one of another encoding.
    (tmp_path / "cut/train-00004-of-00004.safetensors").write_bytes(whole["train-00004-of-00004.safetensors"][:50])
    # A whole one, of which a bit changed.
    changed = bytearray(whole["train-00001-of-00004.safetensors"])
    changed[-2] ^= 1
    (tmp_path / "cut/train-00001-of-00004.safetensors").write_bytes(changed)
    (tmp_path / "cut/train-00009-of-00009.safetensors").write_bytes(b"old")
    monkeypatch.setattr(Reader, "calls", [])
    monkeypatch.setattr(Reader, "stop_at", 0)
    assert _bytes(_encode(tmp_path / "cut", 10, per_file=3)[0]) == whole
    told = [message.split("/train-")[1][:5] for message in caplog.messages if "is damaged" in message]
    assert (Reader.calls, told) == ([3, 3, 1], ["00001", "00004"])
    assert {file.name for file in (tmp_path / "cut").glob("*.safetensors")} == whole.keys()
    # Other prompts: nothing of it is taken.
    monkeypatch.setattr(Reader, "calls", [])
    _encode(tmp_path / "cut", 11, per_file=3)
    assert Reader.calls == [3, 3, 3, 2]


@pytest.mark.usefixtures("fresh")
def test_embeddings_of_an_older_vipo_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They hold no hash, and runs were made of them."""
    (_, *files), _ = _encode(tmp_path, 4, per_file=2)
    for file in files:
        with safe_open(file, "pt") as stream:
            told = {key: value for key, value in json.loads(stream.metadata()["origin"]).items() if key != "sha256"}
        save_file(load_file(file), file, {"origin": json.dumps(told, sort_keys=True)})
    before = _bytes(_encode(tmp_path, 4, per_file=2)[0])
    monkeypatch.setattr(Reader, "calls", [])
    assert _bytes(_encode(tmp_path, 4, per_file=2)[0]) == before
    assert Reader.calls == []
    assert "sha256" not in json.loads(safe_open(files[0], "pt").metadata()["origin"])


@pytest.mark.usefixtures("fresh")
def test_processes_share_the_files(tmp_path: Path) -> None:
    alone = _bytes(_encode(tmp_path / "alone", 10, per_file=4)[0])
    Reader.calls.clear()
    assert _bytes(_encode(tmp_path / "shared", 10, per_file=4, processes=2)[0]) == alone
    assert Reader.calls == []
    # Their error is one line, and nobody waits for the others.
    with pytest.raises(GeneratorError, match="raised RuntimeError: unreadable"):
        _encode(tmp_path / "failing", 10, per_file=4, processes=2, bad="scene 9")


@pytest.mark.usefixtures("fresh")
def test_memory_holds_one_file_while_it_encodes_and_nothing_after(tmp_path: Path) -> None:
    for count in (8, 40):
        Reader.most = 0
        files, prompts = _encode(tmp_path / str(count), count, per_file=4)
        assert Reader.most == 4, count
        assert Reader.alive == 0
        embeddings = load_embeddings(files[0], prompts)
        read = [weakref.ref(embeddings[prompt.id]["tokens"]) for prompt in prompts]
        assert len(read) == count
        assert all(tensor() is None for tensor in read)


@pytest.mark.usefixtures("fresh")
def test_what_came_of_bf16_is_held_in_bf16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Reader, "rounds", True)
    sizes = {}
    for encoders in ("fp32", "bf16"):
        (file,), prompts = _encode(tmp_path / encoders, 3, encoders=encoders)
        with safe_open(file, "pt") as stream:
            kinds = {name: stream.get_slice(name).get_dtype() for name in stream.keys()}  # noqa: SIM118
        sizes[encoders] = {name.rpartition("/")[2]: kind for name, kind in kinds.items()}
        embeddings = load_embeddings(file, prompts)
        for prompt in prompts:
            assert embeddings[prompt.id]["tokens"].dtype == torch.float32
            assert torch.equal(embeddings[prompt.id]["tokens"], _expected(prompt))
    # 0.1 is no number of bf16.
    assert sizes["fp32"] == {"tokens": "F32", "negative_tokens": "F32"}
    assert sizes["bf16"] == {"tokens": "BF16", "negative_tokens": "F32"}


@pytest.mark.usefixtures("fresh")
def test_two_splits_are_read_together_and_a_file_stays_what_it_was(tmp_path: Path) -> None:
    (_, *files), prompts = _encode(tmp_path / "a", 4, per_file=2)
    (other,), more = _encode(tmp_path / "b", 6)
    both = load_embeddings(tmp_path / "a/train.safetensors", prompts) | load_embeddings(other, more[4:])
    assert isinstance(both, Embeddings)
    assert list(both) == [prompt.id for prompt in more]
    replacement = tmp_path / "replacement"
    save_file({f"{prompt.id}/tokens": torch.zeros(3, 4) for prompt in prompts[:2]}, replacement)
    replacement.replace(files[0])
    for prompt in more:
        assert torch.equal(both[prompt.id]["tokens"], _expected(prompt))


@pytest.mark.usefixtures("fresh")
def test_a_file_that_is_missing_damaged_or_not_finite_is_named(tmp_path: Path) -> None:
    (head, first, second), prompts = _encode(tmp_path / "a", 4, per_file=2)
    source, whole = tmp_path / "a/train.jsonl", second.read_bytes()
    check_embeddings(head, source, {"a": 1}, {})
    second.unlink()
    with pytest.raises(GeneratorError, match=r"train-00002-of-00002.safetensors: missing; run the stage"):
        check_embeddings(head, source, {"a": 1}, {})
    with pytest.raises(GeneratorError, match="embeddings cannot be read"):
        load_embeddings(head, prompts)
    second.write_bytes(whole[:100])
    with pytest.raises(GeneratorError, match="embeddings cannot be read"):
        load_embeddings(head, prompts)
    second.write_bytes(first.read_bytes())
    with pytest.raises(GeneratorError, match="lacks 2 prompts, first 'scene 2'"):
        load_embeddings(head, prompts)
    tensors = {f"{prompt.id}/tokens": torch.full((3, 4), torch.nan) for prompt in prompts[2:]}
    save_file(tensors, second)
    embeddings = load_embeddings(head, prompts)
    assert torch.equal(embeddings[prompts[0].id]["tokens"], _expected(prompts[0]))
    with pytest.raises(GeneratorError, match=f"prompt {prompts[2].id}: tokens is not finite"):
        embeddings[prompts[2].id]
    save_file({name: torch.zeros(3, 5) for name in tensors}, second)
    with pytest.raises(GeneratorError, match=r"tokens: shape \(3, 5\) of one prompt, \(3, 4\) of another"):
        load_embeddings(head, prompts)
