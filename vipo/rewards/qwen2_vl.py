"""Reward models on Qwen2-VL: pictures and a text to the vectors at special tokens, which a head turns into scores.

They were trained with plain positions, 0, 1, 2, ... for pictures' tokens as for the text's: their own forward hands
embeddings to the language model without Qwen2-VL's positions of three axes.
"""

import ast
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vipo.regular import read_regular
from vipo.rewards.errors import RewardError
from vipo.rewards.pixels import CLIP_MEAN, CLIP_STD
from vipo.rewards.weights import check_filled, fill, filled, matching

TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "chat_template.*")
CONFIGURATION = ("config.json",)

_SIDE = 28
"""Pixels of a token's side: 14 of a patch, two patches."""

# Of a file of texts.
_MOST_BYTES = 2**20

_LONGEST_RATIO = 200


class Vision(NamedTuple):
    """What the vision tower takes of one sample.

    Attributes:
        patches: ``(t * h * w, 3 * 2 * 14 * 14)`` float32.
        grid: t, h, w in patches.
    """

    patches: Tensor
    grid: tuple[int, int, int]


def smart_size(height: int, width: int, least: int, most: int) -> tuple[int, int]:
    """Sides that are multiples of 28 with `least` to `most` pixels, of about the same shape.

    Source: Qwen2-VL's `smart_resize`, as its authors' utilities have it.

    Raises:
        RewardError: one side is more than 200 times the other.
    """
    if max(height, width) > _LONGEST_RATIO * min(height, width):
        raise RewardError(f"takes no pictures of {height} x {width}: one side is more than 200 times the other")
    sizes = [max(_SIDE, round(side / _SIDE) * _SIDE) for side in (height, width)]
    if sizes[0] * sizes[1] > most:
        scale = math.sqrt(height * width / most)
        sizes = [math.floor(side / scale / _SIDE) * _SIDE for side in (height, width)]
    elif sizes[0] * sizes[1] < least:
        scale = math.sqrt(least / (height * width))
        sizes = [math.ceil(side * scale / _SIDE) * _SIDE for side in (height, width)]
    return sizes[0], sizes[1]


def vision_of(levels: Tensor, patch: int = 14, merge: int = 2, pair: int = 2) -> Vision:
    """Frames as the vision tower takes them: pairs of frames, patches in blocks of ``merge x merge``.

    Args:
        levels: ``(T, 3, H, W)``, grey levels of one sample, its sides multiples of ``patch * merge``. An odd last frame
            is its own pair.
    """
    mean, std = (torch.tensor(v, device=levels.device).view(1, 3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
    pixels = (levels.float() / 255 - mean) / std
    if over := -len(pixels) % pair:
        pixels = torch.cat([pixels, pixels[-1:].expand(over, -1, -1, -1)])
    t, h, w = len(pixels) // pair, pixels.shape[2] // patch, pixels.shape[3] // patch
    cut = pixels.view(t, pair, 3, h // merge, merge, patch, w // merge, merge, patch)
    return Vision(cut.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(t * h * w, -1), (t, h, w))


class Scorer:
    """Samples to vectors at special tokens.

    Args:
        place: folder of a Qwen2-VL checkpoint's configuration and tokenizer.
        special: tokens that are added to the tokenizer.
        kind: of what is seen, ``image`` or ``video``.
    """

    def __init__(self, place: Path, special: Sequence[str], kind: str) -> None:
        self._place, self._special, self._kind = place, list(special), kind
        self._tokenizer: Any = None

    @property
    def tokenizer(self) -> Any:
        """With the special tokens.

        Raises:
            RewardError: the folder holds none, or none with a chat template.
        """
        if self._tokenizer is None:
            from transformers import AutoTokenizer

            matching(self._place, ("tokenizer.json", "vocab.json"))
            tokenizer: Any = AutoTokenizer.from_pretrained(self._place, padding_side="right")
            if not tokenizer.chat_template:
                raise RewardError(f"{self._place}: its tokenizer has no chat template; fetch all of its files")
            tokenizer.add_special_tokens({"additional_special_tokens": self._special})
            self._tokenizer = tokenizer
        return self._tokenizer

    def network(self, tensors: Mapping[str, Tensor], source: object, dtype: str) -> Any:
        """A Qwen2VLModel with these tensors, in the names of any of transformers' releases.

        Raises:
            RewardError: they are not those of the configuration.
        """
        from transformers import Qwen2VLConfig, Qwen2VLModel

        config: Any = Qwen2VLConfig.from_pretrained(matching(self._place, CONFIGURATION)[0].parent)
        named = renamed(tensors)
        if (words := named.get("language_model.embed_tokens.weight")) is None or words.ndim != 2:
            raise RewardError(f"{source}: holds no embeddings of words (model.embed_tokens.weight); fetch it again")
        # The special tokens have made it another one than the configuration's.
        config.text_config.vocab_size = len(words)
        return filled(Qwen2VLModel, config, named, source, dtype)

    def vectors(self, network: Any, samples: Sequence[Vision], texts: Sequence[str]) -> Tensor:
        """The last layer's vectors ``(B, S, d)`` float32 at the S special tokens of each sample, in their order.

        Raises:
            RewardError: a text holds a special token, or lacks one.
        """
        device = network.device
        pad = f"<|{self._kind}_pad|>"
        merge = network.config.vision_config.spatial_merge_size
        counts = [math.prod(sample.grid) // merge**2 for sample in samples]
        written = [self._chat(text, pad, count) for text, count in zip(texts, counts, strict=True)]
        tokens = self.tokenizer(written, padding=True, return_tensors="pt").to(device)
        ids = tokens.input_ids
        special = torch.tensor([self._id(token) for token in self._special], device=device)
        seen, marks = ids == self._id(pad), torch.isin(ids, special)
        if seen.sum(dim=1).tolist() != counts or (marks.sum(dim=1) != len(self._special)).any():
            raise RewardError("a prompt holds what marks a picture or a score in these models' texts; leave it out")
        with torch.autocast(device.type, enabled=False):
            patches = torch.cat([sample.patches for sample in samples]).to(device, network.dtype)
            grids = torch.tensor([sample.grid for sample in samples], device=device)
            parts = network.get_image_features(patches, grids).pooler_output
            words = network.language_model.embed_tokens(ids)
            words = words.masked_scatter(seen[..., None].expand_as(words), torch.cat(list(parts)).to(words.dtype))
            hidden = network.language_model(
                inputs_embeds=words, attention_mask=tokens.attention_mask, use_cache=False
            ).last_hidden_state
        return hidden[marks].view(len(texts), len(self._special), -1).float()

    def _chat(self, text: str, pad: str, count: int) -> str:
        content = [{"type": self._kind, self._kind: ""}, {"type": "text", "text": text}]
        chat = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        return str(chat).replace(pad, pad * count, 1)

    def _id(self, token: str) -> int:
        return int(self.tokenizer.convert_tokens_to_ids(token))


def renamed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names of any of transformers' releases as its Qwen2VLModel has them; the model's head for words is left out."""
    found = {}
    for name, value in tensors.items():
        parts = name.removeprefix("base_model.model.").split(".")
        if parts[0] == "model" and parts[1] in ("visual", "language_model"):
            parts = parts[1:]
        elif parts[0] == "model":
            parts[0] = "language_model"
        if parts[0] in ("visual", "language_model"):
            found[".".join(parts)] = value
    return found


def merged(tensors: Mapping[str, Tensor], scale: float, source: object) -> dict[str, Tensor]:
    """Weights with their LoRA added: ``W + scale * B A``, in float32; other tensors as they are.

    Args:
        tensors: as peft saves an adapter beside its weights, its names too (``base_layer``, ``lora_A.default``).
        scale: alpha / r, or of rank-stabilised LoRA alpha / sqrt(r).
        source: where they are from, for messages.

    Raises:
        RewardError: half of a pair is missing, or a pair fits no weight.
    """
    plain: dict[str, Tensor] = {}
    downs: dict[str, Tensor] = {}
    ups: dict[str, Tensor] = {}
    for name, value in tensors.items():
        short = name.removeprefix("base_model.model.").replace(".default.", ".").replace(".base_layer.", ".")
        short = short.replace(".modules_to_save.", ".")
        if ".original_module." in short:
            continue
        kinds = {".lora_A.weight": downs, ".lora_B.weight": ups}
        kind = next((kind for kind in kinds if short.endswith(kind)), None)
        if kind is not None:
            kinds[kind][short.removesuffix(kind) + ".weight"] = value
        elif ".lora_" in short:
            raise RewardError(f"{source}: {name} is of no kind of adapter that can be read here")
        else:
            plain[short] = value
    for name in downs.keys() | ups.keys():
        fits = name in plain and name in downs and name in ups and downs[name].shape[0] == ups[name].shape[1]
        if not fits or (ups[name].shape[0], downs[name].shape[1]) != tuple(plain[name].shape):
            raise RewardError(f"{source}: its adapter of {name} does not fit, or a part is missing; fetch it again")
        weight = plain[name]
        plain[name] = (weight.float() + scale * (ups[name].float() @ downs[name].float())).to(weight.dtype)
    return plain


def head_of(tensors: Mapping[str, Tensor], width: int, source: object) -> nn.Module:
    """The head ``rm_head``: one linear layer, or several with ReLU between them; in float32.

    Raises:
        RewardError: there is none that takes vectors of `width` numbers.
    """
    own = {name.removeprefix("rm_head."): value for name, value in tensors.items() if name.startswith("rm_head.")}
    head = nn.Module()
    if "weight" in own and own["weight"].ndim == 2:
        linear = nn.Linear(width, len(own["weight"]), bias="bias" in own)
        head = fill(linear, {name: value.float() for name, value in own.items()}, source, "fp32")
    elif places := sorted({int(name.partition(".")[0]) for name in own if name.partition(".")[0].isdigit()}):
        layers: list[nn.Module] = []
        given: dict[str, Tensor] = {}
        before = width
        for place in places:
            weight = own.get(f"{place}.weight")
            if weight is None or weight.ndim != 2:
                break
            layers += [nn.ReLU()] if layers else []
            given |= {f"{len(layers)}.{kind}": own[f"{place}.{kind}"].float() for kind in ("weight", "bias")}
            layers.append(nn.Linear(before, len(weight)))
            before = len(weight)
        head = fill(nn.Sequential(*layers), given, source, "fp32")
    else:
        check_filled(head, {"missing": ["rm_head.weight"]}, source)
    return head


def published_texts(path: Path, names: Sequence[str]) -> list[str]:
    """Texts that a published Python file assigns to names; it is read, not run.

    Raises:
        RewardError: it is no such file.
    """
    try:
        tree = ast.parse(read_regular(path, _MOST_BYTES).decode())
    except (OSError, ValueError, SyntaxError, RecursionError) as error:
        raise RewardError(f"instruction {path}: is no Python file ({type(error).__name__}); fetch it again") from error
    found = {
        target.id: node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    if missing := [name for name in names if name not in found]:
        raise RewardError(f"instruction {path}: assigns no text to {', '.join(missing)}; name the published file")
    return [found[name] for name in names]


def with_prompt(template: str, prompt: str) -> str:
    """A template in which ``{text_prompt}`` is the prompt; other braces are doubled in it, as `str.format` has it."""
    return template.format(text_prompt=prompt)
