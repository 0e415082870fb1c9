"""Small random checkpoints in the file layouts of published rewards, made in a moment."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

WORDS = ("a", "cat", "red", "sign", "that", "says", "dogs", "two", "on", "the")


def clip_tokenizer(folder: Path) -> Path:
    """A byte-level CLIP tokenizer of 514 tokens, the last two of them start and end."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    letters = sorted(ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*letters, *(f"{letter}</w>" for letter in letters)])}
    vocabulary |= {"<|startoftext|>": len(vocabulary), "<|endoftext|>": len(vocabulary) + 1}
    CLIPTokenizer(vocab=vocabulary, merges=[]).save_pretrained(folder)
    return folder


def clip_ids(text: str, length: int) -> list[int]:
    """The tokens of a lower-case text of letters, digits and spaces, by that tokenizer, filled up with the end."""
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    ids = [512]
    for word in text.split():
        ids += [letters.index(letter) for letter in word[:-1]] + [256 + letters.index(word[-1])]
    return [*ids[: length - 1], *[513] * (length - len(ids[: length - 1]))]


def write_clip(folder: Path, *, image_size: int = 28, seed: int = 0, projection: int = 24) -> Path:
    """transformers' CLIPModel with its tokenizer."""
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(seed)
    common = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(
        projection_dim=projection,
        text_config={
            **common, "vocab_size": 514, "max_position_embeddings": 24, "eos_token_id": 513, "bos_token_id": 512,
            "pad_token_id": 513,
        },
        vision_config={**common, "image_size": image_size, "patch_size": 7},
    )  # fmt: skip
    CLIPModel(config).save_pretrained(folder)
    return clip_tokenizer(folder)


def open_clip_tensors(*, layers: int = 2, side: int = 4, patch: int = 7, seed: int = 0) -> dict[str, Tensor]:
    """A ViT-H-14 of open_clip, two heads wide in each tower: vision 80 a head, text 64."""
    made = torch.Generator().manual_seed(seed)
    wide, narrow, joint = 160, 128, 48

    def drawn(*shape: int, scale: float = 0.08) -> Tensor:
        return torch.randn(*shape, generator=made) * scale

    def tower(prefix: str, width: int) -> dict[str, Tensor]:
        tensors = {}
        for number in range(layers):
            block = f"{prefix}transformer.resblocks.{number}."
            for norm in ("ln_1", "ln_2"):
                tensors[f"{block}{norm}.weight"] = 1 + drawn(width)
                tensors[f"{block}{norm}.bias"] = drawn(width)
            tensors[f"{block}attn.in_proj_weight"] = drawn(3 * width, width)
            tensors[f"{block}attn.in_proj_bias"] = drawn(3 * width)
            for name, rows, columns in (
                ("attn.out_proj", width, width),
                ("mlp.c_fc", 2 * width, width),
                ("mlp.c_proj", width, 2 * width),
            ):
                tensors[f"{block}{name}.weight"] = drawn(rows, columns)
                tensors[f"{block}{name}.bias"] = drawn(rows)
        return tensors

    tensors = {
        **tower("visual.", wide),
        **tower("", narrow),
        "visual.class_embedding": drawn(wide),
        "visual.positional_embedding": drawn(side * side + 1, wide),
        "visual.conv1.weight": drawn(wide, 3, patch, patch),
        "visual.proj": drawn(wide, joint),
        "token_embedding.weight": drawn(514, narrow),
        "positional_embedding": drawn(24, narrow),
        "text_projection": drawn(narrow, joint),
        "logit_scale": torch.tensor(4.6),
    }
    for norm, width in (("visual.ln_pre", wide), ("visual.ln_post", wide), ("ln_final", narrow)):
        tensors |= {f"{norm}.weight": 1 + drawn(width), f"{norm}.bias": drawn(width)}
    return tensors


def write_hpsv2(folder: Path, **sizes: Any) -> Path:
    """A folder as xswu/HPSv2 has it, and a CLIP tokenizer beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({"epoch": 1, "state_dict": open_clip_tensors(**sizes)}, folder / "HPS_v2.1_compressed.pt")
    return clip_tokenizer(folder)


def head_tensors(width: int, *, seed: int = 0) -> dict[str, Tensor]:
    """A linear head of the published layout: width-32-16-8-4-1 at the numbers 0, 2, 4, 6, 7."""
    made = torch.Generator().manual_seed(seed)
    widths = (width, 32, 16, 8, 4, 1)
    tensors = {}
    for number, before, after in zip((0, 2, 4, 6, 7), widths, widths[1:], strict=False):
        tensors[f"layers.{number}.weight"] = torch.randn(after, before, generator=made) / before**0.5
        tensors[f"layers.{number}.bias"] = torch.randn(after, generator=made) * 0.1
    return tensors


def write_image_reward(folder: Path, *, seed: int = 0) -> Path:
    """A folder as THUDM/ImageReward has it, two layers in each network, and a BERT tokenizer beside it."""
    from transformers import BertTokenizer

    made = torch.Generator().manual_seed(seed)
    vision, text, side, patch = 128, 64, 4, 7

    def drawn(*shape: int, scale: float = 0.08) -> Tensor:
        return torch.randn(*shape, generator=made) * scale

    def linear(name: str, rows: int, columns: int) -> dict[str, Tensor]:
        return {f"{name}.weight": drawn(rows, columns), f"{name}.bias": drawn(rows)}

    def norm(name: str, width: int) -> dict[str, Tensor]:
        return {f"{name}.weight": 1 + drawn(width), f"{name}.bias": drawn(width)}

    eye, reader = "blip.visual_encoder.", "blip.text_encoder."
    tensors = {
        f"{eye}cls_token": drawn(1, 1, vision),
        f"{eye}pos_embed": drawn(1, side * side + 1, vision),
        f"{eye}patch_embed.proj.weight": drawn(vision, 3, patch, patch),
        f"{eye}patch_embed.proj.bias": drawn(vision),
        **norm(f"{eye}norm", vision),
        f"{reader}embeddings.position_ids": torch.arange(40)[None],
        f"{reader}embeddings.word_embeddings.weight": drawn(len(VOCABULARY) + 2, text, scale=0.5),
        f"{reader}embeddings.position_embeddings.weight": drawn(40, text),
        **norm(f"{reader}embeddings.LayerNorm", text),
        **linear("blip.vision_proj", 16, vision),
        **linear("blip.text_proj", 16, text),
        **{f"mlp.{name}": value for name, value in head_tensors(text, seed=seed).items()},
    }
    for number in range(2):
        block = f"{eye}blocks.{number}."
        tensors |= norm(f"{block}norm1", vision) | norm(f"{block}norm2", vision)
        tensors |= linear(f"{block}attn.qkv", 3 * vision, vision) | linear(f"{block}attn.proj", vision, vision)
        tensors |= linear(f"{block}mlp.fc1", 2 * vision, vision) | linear(f"{block}mlp.fc2", vision, 2 * vision)
        layer = f"{reader}encoder.layer.{number}."
        for kind, width in (("attention", text), ("crossattention", vision)):
            tensors |= linear(f"{layer}{kind}.self.query", text, text)
            tensors |= linear(f"{layer}{kind}.self.key", text, width)
            tensors |= linear(f"{layer}{kind}.self.value", text, width)
            tensors |= linear(f"{layer}{kind}.output.dense", text, text)
            tensors |= norm(f"{layer}{kind}.output.LayerNorm", text)
        tensors |= linear(f"{layer}intermediate.dense", 96, text) | linear(f"{layer}output.dense", text, 96)
        tensors |= norm(f"{layer}output.LayerNorm", text)
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(tensors, folder / "ImageReward.pt")
    BertTokenizer(vocab={token: number for number, token in enumerate(VOCABULARY)}).save_pretrained(folder)
    return folder


VOCABULARY = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS)


def write_detector(folder: Path, *, seed: int = 0, kinds: int = 80) -> Path:
    """transformers' Mask2Former for instances of COCO, seven queries, with its processor."""
    from transformers import (
        Mask2FormerConfig,
        Mask2FormerForUniversalSegmentation,
        Mask2FormerImageProcessor,
        SwinConfig,
    )

    torch.manual_seed(seed)
    backbone = SwinConfig(
        image_size=64, embed_dim=16, depths=[1, 1, 1, 1], num_heads=[1, 2, 2, 2], window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = Mask2FormerConfig(
        backbone_config=backbone, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=32,
        dim_feedforward=32, encoder_layers=1, decoder_layers=2, num_attention_heads=2, num_queries=7, num_labels=kinds,
    )  # fmt: skip
    Mask2FormerForUniversalSegmentation(config).save_pretrained(folder)
    Mask2FormerImageProcessor(size={"shortest_edge": 64, "longest_edge": 107}, size_divisor=32).save_pretrained(folder)
    return folder
