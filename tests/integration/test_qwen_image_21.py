"""Qwen-Image 2.1 by vipo's own forward pass: what it does otherwise than the stock one, and what is shown of it."""

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import edit_json, edit_tensors
from families import FAMILIES
from torch import Tensor
from transformers import Qwen3VLForConditionalGeneration

from vipo.check.hub import missing_files
from vipo.check.wanted import Wanted
from vipo.conformance.stock import sample_stock
from vipo.conformance.subject import PROMPTS, Subject, subject
from vipo.generators import GeneratorError, load_generator
from vipo.generators.embeddings import encoder_hashes
from vipo.generators.qwen_image_21 import QwenImage21Generator
from vipo.generators.tokens import token_counter
from vipo.handover.base import find_base

ROOT = Path(__file__).resolve().parents[2]
ROW = FAMILIES["qwen_image_21"]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Subject]:
    folder = ROW.write(tmp_path_factory.mktemp("qwen") / "qwen")
    return folder, subject(ROW.config(folder), ROOT, steps=ROW.steps)


def _apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


def test_a_prompt_has_its_picture_whatever_prompts_are_beside_it(
    drawn: tuple[Path, Subject], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stock pipeline puts all pictures of a call where the longest prompt ends: the shorter one's is another."""
    _, compared = drawn
    lengths = compared.conditioning["encoder_hidden_states_mask"].sum(dim=1)
    assert lengths[0] > lengths[1]
    monkeypatch.setattr(QwenImage21Generator, "stock_joins_prompts", True)
    stock = sample_stock(compared.stock(), compared.kind, compared.config, PROMPTS, compared.noise, compared.steps)
    assert _apart(stock.prediction[0], compared.sampled.prediction[0]) < 1e-5
    assert _apart(stock.prediction[1], compared.sampled.prediction[1]) > 1e-3
    generator, time = compared.load(), compared.sampled.times(compared.load())
    with torch.no_grad():
        both = generator.predict(compared.noise, time, compared.conditioning)
        alone = generator.predict(
            compared.noise[1:], time[1:], {name: value[1:] for name, value in compared.conditioning.items()}
        )
    assert _apart(both[1:], alone) < 1e-6


def test_what_fills_a_prompt_up_is_not_read(drawn: tuple[Path, Subject]) -> None:
    _, compared = drawn
    generator, time = compared.load(), compared.sampled.times(compared.load())
    mask = compared.conditioning["encoder_hidden_states_mask"]
    strange = {
        name: torch.where(mask[..., None] > 0, value, torch.tensor(7.0)) if name.endswith("states") else value
        for name, value in compared.conditioning.items()
    }
    longer = {
        name: torch.nn.functional.pad(value, (0, 0, 0, 9) if value.ndim == 3 else (0, 9))
        for name, value in compared.conditioning.items()
    }
    with torch.no_grad():
        found = [generator.predict(compared.noise, time, given) for given in (compared.conditioning, strange, longer)]
    assert _apart(found[0], found[1]) < 1e-6
    assert _apart(found[0], found[2]) < 1e-5


def test_noise_levels_are_not_rounded_to_bf16(drawn: tuple[Path, Subject]) -> None:
    """Where the stock network rounds them to the type of its activations, both are one level."""
    _, compared = drawn
    generator = compared.load(precision="bf16")
    levels = torch.tensor([0.7520, 0.7525])
    assert levels[0].bfloat16() == levels[1].bfloat16()
    noise = compared.noise[:1].expand(2, -1, -1, -1)
    given = {name: value[:1].expand(2, *value.shape[1:]) for name, value in compared.conditioning.items()}
    with torch.no_grad():
        one, other = generator.predict(noise, levels, given)
    assert not torch.equal(one, other)


def test_transparent_pictures_are_shown_on_white(drawn: tuple[Path, Subject], monkeypatch: pytest.MonkeyPatch) -> None:
    _, compared = drawn
    generator: Any = compared.load()
    decoded = torch.tensor([-1.0, 0.0, 1.0]).view(1, 3, 1, 1, 1).expand(3, 3, 1, 32, 64)
    alpha = torch.tensor([-1.0, 0.0, 1.0]).view(3, 1, 1, 1, 1).expand(3, 1, 1, 32, 64)
    monkeypatch.setattr(generator.vae, "decode", lambda *_, **__: (torch.cat([decoded, alpha], dim=1),))
    shown = generator.pictures(compared.noise[:1].expand(3, -1, -1, -1))[:, :, 0, 0]
    torch.testing.assert_close(shown, torch.tensor([[1, 1, 1], [0.5, 0.75, 1], [0, 0.5, 1]]))


def test_a_prompt_is_read_whole_or_refused(drawn: tuple[Path, Subject], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its words and the tokens around it: as many as are counted here are needed."""
    folder, compared = drawn
    needed = int(compared.conditioning["encoder_hidden_states_mask"][0].sum())
    encode = QwenImage21Generator.encode_prompts
    assert len(encode(ROW.config(folder, max_sequence_length=needed), ROOT, PROMPTS[:1])) == 1
    short, read = ROW.config(folder, max_sequence_length=needed - 1), []
    monkeypatch.setattr(Qwen3VLForConditionalGeneration, "from_pretrained", lambda *_, **__: read.append(1))
    told = rf"max_sequence_length {needed - 1}: prompt '{PROMPTS[0]}' has {needed} tokens with .*max_tokens"
    with pytest.raises(GeneratorError, match=told):
        encode(short, ROOT, PROMPTS[:1])
    negative = short.model_copy(update={"negative_prompt": "b" * needed})
    with pytest.raises(GeneratorError, match=r"generator\.negative_prompt 'bb.*; raise it, or shorten it"):
        encode(negative, ROOT, [])
    with pytest.raises(GeneratorError, match=r"prompt 'a <\|image_pad\|> fox': <\|image_pad\|> stands for a picture"):
        encode(ROW.config(folder), ROOT, ["a <|image_pad|> fox"])
    assert not read


@pytest.mark.parametrize("template", [None, "{% for message in %}"])
def test_a_processor_without_its_chat_template_is_named(template: str | None, tmp_path: Path) -> None:
    folder = ROW.write(tmp_path / "qwen")
    file = folder / "processor/chat_template.jinja"
    file.unlink()
    if template is not None:
        file.write_text(template, encoding="utf-8")
    with pytest.raises(GeneratorError, match="processor: its chat template cannot be applied"):
        QwenImage21Generator.encode_prompts(ROW.config(folder), ROOT, PROMPTS)


def test_a_text_encoder_needs_no_head(drawn: tuple[Path, Subject], tmp_path: Path) -> None:
    """Which nothing reads: a checkpoint may be saved without."""
    folder = shutil.copytree(drawn[0], tmp_path / "qwen")
    edit_json(folder / "text_encoder/config.json", tie_word_embeddings=False)
    edit_tensors(folder / "text_encoder", lambda tensors: tensors.pop("lm_head.weight", None))
    before, after = (
        QwenImage21Generator.encode_prompts(ROW.config(path), ROOT, PROMPTS) for path in (drawn[0], folder)
    )
    for one, other in zip(before, after, strict=True):
        assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_the_tokenizer_of_the_processor_counts_and_is_part_of_the_embeddings_origin(
    drawn: tuple[Path, Subject],
) -> None:
    folder, compared = drawn
    assert token_counter(compared.config, ROOT)("a fox") == 5
    before = encoder_hashes(compared.config, ROOT)
    assert sorted(before) == ["processor", "text_encoder"]
    template = folder / "processor/chat_template.jinja"
    text = template.read_text(encoding="utf-8")
    template.write_text(text + " ", encoding="utf-8")
    changed = encoder_hashes(compared.config, ROOT)
    template.write_text(text, encoding="utf-8")
    assert [name for name in before if before[name] != changed[name]] == ["processor"]


def test_levels_of_the_checkpoints_own_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = ROW.write(tmp_path / "qwen")
    edit_json(folder / "model_index.json", sample_sigmas=[1.0, 0.75, 0.5, 0.25])
    with caplog.at_level(logging.WARNING):
        load_generator(ROW.config(folder), ROOT)
    assert "sample_sigmas: the stock pipeline goes through these 4 noise levels" in caplog.text
    # It is compared over them, and they are no part to be copied or looked for.
    compared = subject(ROW.config(folder), ROOT, steps=3)
    assert len(compared.sampled.scheduler.timesteps) == 4
    edit_json(folder / "model_index.json", sample_sigmas=[1.0, 0.5])
    base = find_base(ROW.config(folder), ROOT, None, {"transformer"})
    assert sorted(base.parts) == ["processor", "scheduler", "text_encoder", "vae"]
    assert missing_files(Wanted("generator", "path", str(folder), "generator.path", None, None, None), folder) == []
    edit_json(folder / "model_index.json", sample_sigmas=[1.0, "x"])
    with pytest.raises(GeneratorError, match=r"sample_sigmas \[1\.0, 'x'\] is no list of noise levels"):
        load_generator(ROW.config(folder), ROOT)
