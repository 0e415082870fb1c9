"""Of each family, where its network attends to the prompt, and which of the text's rows are the prompt's own words.

A word is a token of the prompt's own text: no padding, no special token, nothing of a template around it.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers import HunyuanVideo15Pipeline, SanaPipeline
from diffusers.pipelines.hunyuan_video1_5.pipeline_hunyuan_video1_5 import extract_glyph_texts
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from transformers import (
    AutoTokenizer,
    ByT5Tokenizer,
    CLIPTokenizer,
    Qwen2Tokenizer,
    T5TokenizerFast,
)

from vipo.config.generator import GeneratorConfig
from vipo.generators import templates
from vipo.generators.attention import TextAttention, Words
from vipo.generators.base import GeneratorError, checkpoint_location
from vipo.generators.parts import model_index
from vipo.generators.templates import Template
from vipo.generators.texts import load_tokenizer

# Stands for a prompt where only what is around it matters: a character of no text.
_MARK = "\ue000"


@dataclass(frozen=True)
class _Read:
    """Rows of the prompt's words in what a tokenizer gives, and which rows are no padding."""

    rows: list[int]
    valid: list[int]

    def among_valid(self, start: int) -> list[int]:
        """Places of the words once padding and the first `start` of the other rows are left out."""
        return [place for row in self.rows if (place := sum(self.valid[:row]) - start) >= 0]


def _as_it_is(_: Any, text: str) -> str:
    return text


def _read(tokenizer: Any, text: str, limit: int, template: Template = _as_it_is, *, special: bool = True) -> _Read:
    read = template(tokenizer, text)
    start = template(tokenizer, _MARK).index(_MARK)
    if not read.startswith(text, start):
        raise GeneratorError(
            f"{tokenizer.name_or_path}: its template changes the prompt {text!r}, so its words are lost"
        )
    found = tokenizer(
        read,
        padding="max_length",
        max_length=limit,
        truncation=True,
        add_special_tokens=special,
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
        return_attention_mask=True,
    )
    rows = [
        row
        for row, ((begin, end), is_special) in enumerate(
            zip(found.offset_mapping, found.special_tokens_mask, strict=True)
        )
        if not is_special and begin < end and begin < start + len(text) and end > start
    ]
    return _Read(rows, list(found.attention_mask))


def _tokens(
    kind: Any,
    part: str = "tokenizer",
    template: Template = _as_it_is,
    *,
    clean: Callable[[str], str] = lambda text: text,
    own_limit: bool = False,
    special: bool = True,
) -> Words:
    """Of a text encoder whose rows are the text's, padding and template among them."""

    def words(config: GeneratorConfig, root: Path, texts: Sequence[str]) -> list[list[int]]:
        tokenizer = load_tokenizer(kind, checkpoint_location(config, root), part, config)
        limit = tokenizer.model_max_length if own_limit else config.max_sequence_length
        return [_read(tokenizer, clean(text), limit, template, special=special).rows for text in texts]

    return words


def _sd3_words(config: GeneratorConfig, root: Path, texts: Sequence[str]) -> list[list[int]]:
    location = checkpoint_location(config, root)
    clip = load_tokenizer(CLIPTokenizer, location, "tokenizer", config)
    found = [_read(clip, text, clip.model_max_length).rows for text in texts]
    if any(model_index(location, config.revision).get("text_encoder_3") or ()):
        after = _tokens(T5TokenizerFast, "tokenizer_3")(config, root, texts)
        found = [
            [*first, *(clip.model_max_length + row for row in rows)] for first, rows in zip(found, after, strict=True)
        ]
    return found


def _qwen_image_words(config: GeneratorConfig, root: Path, texts: Sequence[str]) -> list[list[int]]:
    tokenizer = load_tokenizer(Qwen2Tokenizer, checkpoint_location(config, root), "tokenizer", config)
    template, dropped = templates.qwen_image()
    limit = config.max_sequence_length + dropped
    return [_read(tokenizer, text, limit, template).among_valid(dropped) for text in texts]


def _qwen_image_21_words(config: GeneratorConfig, root: Path, texts: Sequence[str]) -> list[list[int]]:
    processor, template, dropped = templates.qwen_image_21(checkpoint_location(config, root), config)
    limit = config.max_sequence_length + dropped
    return [_read(processor.tokenizer, text, limit, template).among_valid(dropped) for text in texts]


def _z_image_words(config: GeneratorConfig, root: Path, texts: Sequence[str]) -> list[list[int]]:
    tokenizer = load_tokenizer(Qwen2Tokenizer, checkpoint_location(config, root), "tokenizer", config)
    limit = config.max_sequence_length
    return [_read(tokenizer, text, limit, templates.Z_IMAGE).among_valid(0) for text in texts]


def _sana_words(config: GeneratorConfig, root: Path, texts: Sequence[str]) -> list[list[int]]:
    tokenizer = load_tokenizer(AutoTokenizer, checkpoint_location(config, root), "tokenizer", config)
    tokenizer.padding_side = "right"
    lines = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
    instruction, length = "\n".join(lines), config.max_sequence_length
    whole = len(tokenizer.encode(instruction)) + length - 2
    # The first row, and the last but one of as many as are asked for: most of the instruction is dropped.
    dropped = whole - length
    return [
        [
            row - dropped
            for row in _read(tokenizer, text.lower().strip(), whole, lambda _, own: instruction + own).rows
            if row > dropped
        ]
        for text in texts
    ]


def _hunyuan_words(config: GeneratorConfig, root: Path, texts: Sequence[str]) -> list[list[int]]:
    location = checkpoint_location(config, root)
    tokenizer = load_tokenizer(Qwen2Tokenizer, location, "tokenizer", config)
    glyphs = load_tokenizer(ByT5Tokenizer, location, "tokenizer_2", config)
    template, dropped = templates.hunyuan_video()
    longest = (
        inspect.signature(HunyuanVideo15Pipeline._get_byt5_prompt_embeds).parameters["tokenizer_max_length"].default
    )
    found = []
    for text in texts:
        # The network puts the quoted words, read once more by ByT5, before the prompt.
        quoted = extract_glyph_texts(text)
        before = 0 if quoted is None else len(glyphs(quoted, max_length=longest, truncation=True).input_ids)
        read = _read(tokenizer, text, config.max_sequence_length + dropped, template)
        found.append([before + place for place in read.among_valid(sum(read.valid[:dropped]))])
    return found


def _ltx2_words(config: GeneratorConfig, root: Path, texts: Sequence[str]) -> list[list[int]]:
    tokenizer = load_tokenizer(AutoTokenizer, checkpoint_location(config, root), "tokenizer", config)
    # The connectors put what is no padding first, wherever the tokenizer has it.
    return [_read(tokenizer, text.strip(), config.max_sequence_length).among_valid(0) for text in texts]


_UNET = (r"down_blocks\..*\.attn2", r"mid_block\..*\.attn2", r"up_blocks\..*\.attn2")
_BLOCKS = (r"transformer_blocks\.\d+\.attn",)
_STREAMS = (*_BLOCKS, r"single_transformer_blocks\.\d+\.attn")

FLUX = TextAttention(_STREAMS, "first", _tokens(T5TokenizerFast, "tokenizer_2"), patch=2)
FLUX2_DEV = TextAttention(
    _STREAMS, "first", _tokens(AutoTokenizer, template=templates.FLUX2_DEV, special=False), patch=2
)
FLUX2_KLEIN = TextAttention(_STREAMS, "first", _tokens(Qwen2Tokenizer, template=templates.FLUX2_KLEIN), patch=2)
QWEN_IMAGE = TextAttention(_BLOCKS, "first", _qwen_image_words, patch=2)
QWEN_IMAGE_21 = TextAttention(_BLOCKS, "first", _qwen_image_21_words)
COGVIDEOX = TextAttention((r"transformer_blocks\.\d+\.attn1",), "first", _tokens(T5TokenizerFast), patch=2)
SD3 = TextAttention(_BLOCKS, "last", _sd3_words, patch=2)
Z_IMAGE = TextAttention((r"layers\.\d+\.attention",), "last", _z_image_words, patch=2, multiple=32)
HUNYUAN_VIDEO = TextAttention(_BLOCKS, "last", _hunyuan_words)
SD = TextAttention(_UNET, "cross", _tokens(CLIPTokenizer, own_limit=True))
WAN = TextAttention((r"blocks\.\d+\.attn2",), "cross", _tokens(T5TokenizerFast, clean=prompt_clean))
LTX2 = TextAttention((r"transformer_blocks\.\d+\.attn2",), "cross", _ltx2_words)
SANA = TextAttention((r"transformer_blocks\.\d+\.attn2",), "cross", _sana_words)
