"""Tokenizers and text encoders: loaded together, and what of a prompt they do not read is told."""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional

from vipo.config.generator import GeneratorConfig
from vipo.generators.base import NEGATIVE, GeneratorError
from vipo.generators.parts import fetched, load_part, snapshot

log = logging.getLogger(__name__)

# Tokens of CLIP's text encoders, which are padded to them.
_CLIP = 77
# Above it, tokenizer_config.json says that there is no limit.
_NO_LIMIT = 10**6
_SHOWN_CHARACTERS = 80


def clip_length(location: Path | str, config: GeneratorConfig) -> int:
    """How many tokens a checkpoint's first CLIP makes of any prompt; no more than its tokenizer's settings are read.

    Raises:
        GeneratorError: the tokenizer's settings cannot be read.
    """
    path = snapshot(location, config.revision) / "tokenizer" / "tokenizer_config.json"
    if not path.is_file():
        return _CLIP
    try:
        limit = json.loads(path.read_text(encoding="utf-8")).get("model_max_length", _CLIP)
    except (OSError, ValueError, RecursionError, AttributeError) as error:
        raise GeneratorError(f"{path}: cannot be read ({error}); copy or download the checkpoint again") from error
    return limit if isinstance(limit, int) and 0 < limit < _NO_LIMIT else _CLIP


def load_text_encoder(
    config: GeneratorConfig,
    location: Path | str,
    tokenizer: tuple[Any, str],
    encoder: tuple[Any, str],
    texts: Sequence[str],
    limit: int | None = None,
    template: Callable[[Any, str], str] = lambda _, text: text,
) -> tuple[Any, Any]:
    """A tokenizer and the text encoder that reads its tokens, which is in eval mode, on the device.

    Warns of prompts whose end the encoder does not see, and of those that transformers
    makes other tokens of than the tokenizer's file.

    Args:
        config: section `generator`.
        location: folder or hub id.
        tokenizer: class and subfolder.
        encoder: class and subfolder.
        texts: the prompts.
        limit: tokens that are read of each; None: the tokenizer's own limit.
        template: from the tokenizer and a prompt, the text that is read.

    Raises:
        GeneratorError: a part is missing or damaged, a token has no row in the encoder, or the limit is beyond the
            encoder's positions.
    """
    words = load_tokenizer(tokenizer[0], location, tokenizer[1], config)
    place = f"{location}/{tokenizer[1]}"
    dtype = torch.bfloat16 if config.encoders == "bf16" else torch.float32
    # Of a language model's head, which gives it words back, no prompt's states are made.
    head = ("lm_head.weight",)
    model = load_part(encoder[0].from_pretrained, location, encoder[1], config, dtype=dtype, unread=head)
    rows = model.get_input_embeddings().weight.shape[0]
    if without := sorted((row, token) for token, row in words.get_vocab().items() if row >= rows):
        raise GeneratorError(
            f"{place}: {len(without)} tokens have no row in {encoder[1]} ({rows} rows), first {without[0][1]!r} (row "
            f"{without[0][0]}); give the tokenizer that belongs to it, or resize the encoder's embeddings"
        )
    tokens = words.model_max_length if limit is None else limit
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and tokens > positions:
        key = "model_max_length of tokenizer_config.json" if limit is None else "generator.max_sequence_length"
        raise GeneratorError(f"{place}: {key} {tokens} exceeds the {positions} positions of {encoder[1]}; lower it")
    read = [template(words, text) for text in texts]
    ids = words(read).input_ids if read else []
    _warn_of_other_tokens(snapshot(location, config.revision) / tokenizer[1] / "tokenizer.json", read, ids, texts)
    if cut := [row for row, own in enumerate(ids) if len(own) > tokens]:
        remedy = "" if limit is None else ", or raise generator.max_sequence_length"
        log.warning(
            "%s reads %d tokens: the end of %d of %d prompts is cut off, first of %s (%d tokens); shorten them%s",
            place,
            tokens,
            len(cut),
            len(texts),
            shown(texts[cut[0]]),
            len(ids[cut[0]]),
            remedy,
        )
    found: nn.Module = model.to(config.device).eval()
    return words, found


def as_user(text: str) -> list[dict[str, Any]]:
    """A prompt as a conversation of one message."""
    return [{"role": "user", "content": text}]


def as_chat(
    conversation: Callable[[str], list[dict[str, Any]]] = as_user, **options: object
) -> Callable[[Any, str], str]:
    """A `template` of `load_text_encoder`: the prompt in the tokenizer's own chat template.

    Args:
        conversation: from a prompt, its messages.
        options: of the template.
    """

    def template(tokenizer: Any, text: str) -> str:
        try:
            return str(tokenizer.apply_chat_template(conversation(text), tokenize=False, **options))
        except Exception as error:
            raise GeneratorError(
                f"{tokenizer.name_or_path}: the tokenizer's chat template cannot be applied ({error}); copy or "
                "download generator.path again"
            ) from error

    return template


def in_batches(
    encode: Callable[[list[str]], list[dict[str, Tensor]]], texts: Sequence[str], config: GeneratorConfig
) -> list[dict[str, Tensor]]:
    """Conditioning of each prompt, of which the encoders read `config.encoder_batch` in a call.

    Args:
        encode: from prompts to their conditioning; see `rows`.
        texts: prompts.
        config: section `generator`.
    """
    size = config.encoder_batch
    return [row for start in range(0, len(texts), size) for row in encode(list(texts[start : start + size]))]


def with_negative(
    encode: Callable[[list[str]], list[dict[str, Tensor]]], texts: Sequence[str], config: GeneratorConfig
) -> list[dict[str, Tensor]]:
    """As `in_batches`, and in each the negative prompt's conditioning, which is read by itself."""
    negative = negatives(encode([config.negative_prompt])[0])
    return [row | negative for row in in_batches(encode, texts, config)]


def rows(**batches: Tensor) -> list[dict[str, Tensor]]:
    """The conditioning of each prompt of a batch, float32 on the CPU; of each name its own memory."""
    names, values = batches.keys(), [batch.float().cpu() for batch in batches.values()]
    return [dict(zip(names, (value.clone() for value in row), strict=True)) for row in zip(*values, strict=True)]


def negatives(row: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The negative prompt's conditioning under its names."""
    return {NEGATIVE + name: value for name, value in row.items()}


def padded(sequence: Tensor, length: int, name: str) -> dict[str, Tensor]:
    """A prompt's sequence ``(L, D)`` as conditioning of one length for all, and which of it is the prompt.

    Returns:
        `name`, ``(length, D)`` float32 on the CPU, zeros after the prompt; ``<name>_mask``, ``(length,)``, 1 and 0.

    Raises:
        ValueError: it is longer.
    """
    if len(sequence) > length:
        raise ValueError(f"{name}: a prompt of {len(sequence)} tokens is longer than {length}")
    rest = (0, length - len(sequence))
    return {
        name: functional.pad(sequence.float().cpu(), (0, 0, *rest)),
        f"{name}_mask": functional.pad(torch.ones(len(sequence)), rest),
    }


def padded_rows(sequences: Tensor, mask: Tensor | None, length: int, name: str) -> list[dict[str, Tensor]]:
    """Of each prompt of a batch ``(B, L, D)``, as `padded`; without a mask, all are as long as the longest."""
    lengths = [sequences.shape[1]] * len(sequences) if mask is None else mask.sum(dim=1).tolist()
    return [padded(one[:own], length, name) for one, own in zip(sequences, lengths, strict=True)]


def token_ids(tokenizer: Any, texts: Sequence[str], limit: int, device: str) -> Tensor:
    """Tokens of prompts, cut or padded to `limit`: ``(B, limit)`` int64 on `device`."""
    read = tokenizer(list(texts), padding="max_length", max_length=limit, truncation=True, return_tensors="pt")
    ids: Tensor = read.input_ids.to(device)
    return ids


def load_tokenizer(kind: Any, location: Path | str, part: str, config: GeneratorConfig) -> Any:
    """A tokenizer of a checkpoint.

    Raises:
        GeneratorError: it is missing, damaged or without a vocabulary.
    """
    tokenizer = load_part(kind.from_pretrained, fetched(location, part, config), part, config, weights=False)
    # transformers makes an empty tokenizer of a folder without a vocabulary: all prompts would read alike.
    if tokenizer("a").input_ids == tokenizer("b").input_ids:
        raise GeneratorError(
            f"{location}/{part}: has no vocabulary (tokenizer.json, or the files it stands for); "
            "copy or download generator.path again"
        )
    return tokenizer


def shown(text: str) -> str:
    """A prompt as a message shows it: quoted, control characters escaped, its start only."""
    return ascii(text) if len(text) <= _SHOWN_CHARACTERS else ascii(text[:_SHOWN_CHARACTERS]) + "..."


def _warn_of_other_tokens(file: Path, read: Sequence[str], ids: Sequence[list[int]], texts: Sequence[str]) -> None:
    """Warn where transformers, which builds some tokenizers anew, has not made the tokens that the file makes.

    Args:
        file: ``tokenizer.json``; without one there is nothing to compare with.
        read: texts that were tokenized.
        ids: what transformers made of them.
        texts: the prompts in them, for the message.
    """
    if not read or not file.is_file():
        return
    written = Tokenizer.from_file(str(file))
    written.no_truncation()
    written.no_padding()
    made = written.encode_batch(list(read))
    other = [text for text, found, own in zip(texts, ids, made, strict=True) if found != own.ids]
    if other:
        log.warning(
            "%s: transformers makes other tokens (special ones counted) of %d of %d prompts than this file, first of "
            "%s; so does the stock pipeline beside it, but the encoder may have learnt the file's (another version of "
            "transformers may read it as it stands)",
            file,
            len(other),
            len(texts),
            shown(other[0]),
        )
