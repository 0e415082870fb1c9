"""LAION's aesthetic predictor, ImageReward and OCR, against formulas written out here."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from reward_checkpoints import VOCABULARY, head_tensors, write_clip, write_image_reward
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import functional as tv

from vipo.config.compose import load_config
from vipo.prompts.needs import check_needs
from vipo.prompts.prompt import Prompt, PromptError
from vipo.rewards import Reward, RewardError, in_use, load_reward, score, score_where, weight_files
from vipo.rewards.ocr import closeness, levenshtein

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
PROMPTS = ["a red cat", "two dogs on the sign", "unheard of"]


def pictures(height: int, width: int, count: int = 3) -> Tensor:
    """Smooth pictures of whole grey levels."""
    made = np.random.default_rng(0)
    small = made.integers(0, 256, (count, 4, 5, 3), dtype=np.uint8)
    large = np.stack([np.array(Image.fromarray(x).resize((width, height))) for x in small])
    return torch.from_numpy(large).permute(0, 3, 1, 2).float() / 255


def published_pixels(images: Tensor) -> Tensor:
    bicubic = transforms.InterpolationMode.BICUBIC
    published = transforms.Compose([transforms.Resize(28, bicubic), transforms.CenterCrop(28), transforms.ToTensor()])
    files = [Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy()) for image in images]
    return torch.stack([tv.normalize(published(file), MEAN, STD) for file in files])


def head(tensors: dict[str, Tensor], x: Tensor) -> Tensor:
    for number in (0, 2, 4, 6, 7):
        x = x @ tensors[f"layers.{number}.weight"].to(x.dtype).T + tensors[f"layers.{number}.bias"].to(x.dtype)
    return x[:, 0]


def scored(name: str, reward: Reward, images: Tensor, prompts: list[str] = PROMPTS) -> Tensor:
    return score(name, reward, images, prompts, [{}] * len(prompts))


# --- The aesthetic predictor


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_clip(tmp_path_factory.mktemp("clip"))
    torch.save(head_tensors(24), folder / "linearMSE.pth")
    return folder


def aesthetic(clip: Path, **options: Any) -> Reward:
    return load_reward("aesthetic", "cpu", {"path": str(clip), "head": str(clip / "linearMSE.pth"), **options})


def test_the_aesthetic_score_is_the_head_s_of_the_unit_vector(clip: Path) -> None:
    from transformers import CLIPModel

    images, model = pictures(48, 64), CLIPModel.from_pretrained(clip).eval()
    with torch.no_grad():
        pooled = model.vision_model(pixel_values=published_pixels(images)).pooler_output
        seen = pooled @ model.visual_projection.weight.T
    expected = head(head_tensors(24), seen / seen.norm(dim=1, keepdim=True))
    reward = aesthetic(clip)
    found = scored("aesthetic", reward, images)
    torch.testing.assert_close(found, expected, atol=5e-4, rtol=0)
    assert found.std() > 1e-3
    # The text is not read, and no tokenizer is.
    assert torch.equal(scored("aesthetic", reward, images, ["x", "y", "z"]), found)
    assert [path.name for path in weight_files(reward)] == ["config.json", "model.safetensors", "linearMSE.pth"]
    with in_use(reward):
        pixels = images.clone().requires_grad_()
        reward(pixels, PROMPTS, [{}] * 3).sum().backward()  # type: ignore[union-attr]
    assert pixels.grad is not None
    assert pixels.grad.abs().sum() > 0


def test_a_head_that_does_not_fit_is_named(clip: Path, tmp_path: Path) -> None:
    for tensors, told in (
        (head_tensors(16), "takes vectors of 16 numbers, .* makes 24"),
        ({"layers.0.weight": torch.ones(2, 24)}, "holds no linear layers that end in one score"),
        ({"layers.0.weight": torch.ones(1, 24)}, r"missing: 0\.bias"),
        ({"w": torch.ones(1)}, r"layers\.N: none"),
    ):
        torch.save(tensors, tmp_path / "head.pth")
        with pytest.raises(RewardError, match=told):
            scored("aesthetic", aesthetic(clip, head=str(tmp_path / "head.pth")), pictures(28, 28))
    with pytest.raises(RewardError, match=r"head '.*absent': there is no such file"):
        aesthetic(clip, head=str(tmp_path / "absent"))


# --- ImageReward


@pytest.fixture(scope="module")
def blip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_image_reward(tmp_path_factory.mktemp("blip"))


def image_reward(blip: Path, **options: Any) -> Reward:
    return load_reward("imagereward", "cpu", {"path": str(blip), "tokenizer": str(blip), **options})


def blip_scores(tensors: dict[str, Tensor], pixels: Tensor, ids: Tensor, kept: Tensor) -> Tensor:
    """ImageReward written out in float64: a pre-norm ViT, then a post-norm BERT whose layers attend it too."""
    t = {name: value.double() for name, value in tensors.items()}

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ t[f"{name}.weight"].T + t[f"{name}.bias"]

    def norm(x: Tensor, name: str, eps: float) -> Tensor:
        centred = x - x.mean(dim=-1, keepdim=True)
        scaled = centred / (centred.square().mean(dim=-1, keepdim=True) + eps).sqrt()
        return scaled * t[f"{name}.weight"] + t[f"{name}.bias"]

    def gelu(x: Tensor) -> Tensor:
        return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))

    def attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None = None) -> Tensor:
        heads = []
        for start in range(0, q.shape[-1], 64):
            part = slice(start, start + 64)
            logits = q[..., part] @ k[..., part].transpose(1, 2) / 8
            if seen is not None:
                logits = logits.masked_fill(~seen[:, None, :], -math.inf)
            heads.append(logits.softmax(dim=-1) @ v[..., part])
        return torch.cat(heads, dim=-1)

    eye, reader = "blip.visual_encoder.", "blip.text_encoder."
    x = F.conv2d(pixels.double(), t[f"{eye}patch_embed.proj.weight"], t[f"{eye}patch_embed.proj.bias"], stride=7)
    x = torch.cat([t[f"{eye}cls_token"].expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)], dim=1)
    x = x + t[f"{eye}pos_embed"]
    for number in range(2):
        block = f"{eye}blocks.{number}."
        q, k, v = linear(norm(x, f"{block}norm1", 1e-6), f"{block}attn.qkv").chunk(3, dim=-1)
        x = x + linear(attend(q, k, v), f"{block}attn.proj")
        x = x + linear(gelu(linear(norm(x, f"{block}norm2", 1e-6), f"{block}mlp.fc1")), f"{block}mlp.fc2")
    picture = norm(x, f"{eye}norm", 1e-6)
    x = t[f"{reader}embeddings.word_embeddings.weight"][ids]
    x = x + t[f"{reader}embeddings.position_embeddings.weight"][: ids.shape[1]]
    x = norm(x, f"{reader}embeddings.LayerNorm", 1e-12)
    for number in range(2):
        layer = f"{reader}encoder.layer.{number}."
        for kind, other, seen in (("attention", None, kept), ("crossattention", picture, None)):
            source = x if other is None else other
            q, k, v = (
                linear(y, f"{layer}{kind}.self.{name}")
                for y, name in ((x, "query"), (source, "key"), (source, "value"))
            )
            out = linear(attend(q, k, v, seen), f"{layer}{kind}.output.dense")
            x = norm(out + x, f"{layer}{kind}.output.LayerNorm", 1e-12)
        out = linear(gelu(linear(x, f"{layer}intermediate.dense")), f"{layer}output.dense")
        x = norm(out + x, f"{layer}output.LayerNorm", 1e-12)
    mlp = {name.removeprefix("mlp."): value for name, value in t.items() if name.startswith("mlp.")}
    return (head(mlp, x[:, 0]) - 0.16717362830052426) / 1.0333394966054072


def bert_ids(prompt: str) -> list[int]:
    known = [VOCABULARY.index(word) if word in VOCABULARY else 1 for word in prompt.lower().split()]
    ids = [2, *known[:33], 3]
    return [*ids, *[0] * (35 - len(ids))]


@pytest.mark.parametrize("shape", [(28, 28), (28, 31), (56, 42)])
def test_image_reward_is_the_published_formula(blip: Path, shape: tuple[int, int]) -> None:
    images, prompts = pictures(*shape), [*PROMPTS[:2], "A Red cat " + "the " * 40]
    ids = torch.tensor([bert_ids(prompt) for prompt in prompts])
    tensors = torch.load(blip / "ImageReward.pt", weights_only=True)
    expected = blip_scores(tensors, published_pixels(images), ids, ids != 0)
    found = scored("imagereward", image_reward(blip), images, prompts)
    torch.testing.assert_close(found, expected.float(), atol=2e-5 if shape != (56, 42) else 1e-3, rtol=0)
    assert found.std() > 1e-2


def test_image_reward_s_batches_precision_and_gradient(blip: Path) -> None:
    images = pictures(28, 28)
    reward = image_reward(blip)
    whole = scored("imagereward", reward, images)
    assert torch.equal(scored("imagereward", image_reward(blip), images), whole)
    torch.testing.assert_close(scored("imagereward", image_reward(blip, batch=2), images), whole, atol=1e-5, rtol=0)
    assert 0 < (scored("imagereward", image_reward(blip, dtype="bf16"), images) - whole).abs().max() < 0.1
    with in_use(reward):
        pixels = images.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(reward(pixels, PROMPTS, [{}] * 3).sum(), pixels)  # type: ignore[union-attr]
    assert gradient.isfinite().all()
    assert gradient.flatten(1).abs().sum(dim=1).min() > 0
    assert [path.name for path in weight_files(reward)] == [
        "ImageReward.pt", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip


def test_another_checkpoint_is_no_image_reward(blip: Path, tmp_path: Path) -> None:
    tensors = torch.load(blip / "ImageReward.pt", weights_only=True)
    for gone, told in (
        ("blip.visual_encoder.pos_embed", "is no checkpoint of ImageReward"),
        ("blip.text_encoder.encoder.layer.1.output.dense.bias", r"missing: .*layer\.1\.output\.dense\.bias"),
        ("blip.visual_encoder.norm.bias", r"missing: norm\.bias"),
    ):
        torch.save({name: value for name, value in tensors.items() if name != gone}, tmp_path / "ImageReward.pt")
        with pytest.raises(RewardError, match=told):
            scored("imagereward", image_reward(blip, path=str(tmp_path)), pictures(28, 28))


# --- OCR


def sign(text: str, place: tuple[int, int] = (8, 40), size: tuple[int, int] = (128, 96)) -> Image.Image:
    image = Image.new("RGB", size, "white")
    ImageDraw.Draw(image).text(place, text, font=ImageFont.load_default(28), fill="navy")
    return image


def as_tensor(*images: Image.Image) -> Tensor:
    return torch.stack([tv.to_tensor(image) for image in images])


def test_ocr_reads_what_is_drawn_and_tells_where() -> None:
    reward = load_reward("ocr", "cpu", {"side": 320})
    images = as_tensor(sign("OPEN"), sign("OPEN", (8, 5)), sign("open 24"), sign(""))
    prompts = ['a sign that says "Open"', "a sign", "a sign", 'a sign that says "Open"']
    metadata = [{}, {"text": "OVEN"}, {"text": "open"}, {}]
    found = score_where("ocr", reward, images, prompts, metadata)
    assert found.scores.tolist() == [1.0, 0.75, 1.0, 0.0]
    assert found.where is not None
    assert found.where.shape == (4, 96, 128)
    assert set(found.where.unique().tolist()) == {0.0, 1.0}
    ink = (images < 0.5).any(dim=1)
    for number in range(3):
        # The box holds the letters, and little else.
        assert (found.where[number][ink[number]] == 1).float().mean() > 0.95
        assert found.where[number].sum() < 6 * ink[number].sum()
    assert found.where[3].sum() == 0
    again = score_where("ocr", load_reward("ocr", "cpu", {"side": 320}), images, prompts, metadata)
    assert again.where is not None
    assert torch.equal(again.scores, found.scores)
    assert torch.equal(again.where, found.where)
    apart = score_where("ocr", reward, images[1:2], prompts[1:2], metadata[1:2])
    assert apart.scores.tolist() == [0.75]
    strict = load_reward("ocr", "cpu", {"side": 320, "confidence": 1.0})
    assert score("ocr", strict, images[:1], prompts[:1], [{}]).tolist() == [0.0]


@pytest.mark.parametrize(
    ("first", "second", "edits"),
    [("", "", 0), ("", "abc", 3), ("kitten", "sitting", 3), ("flaw", "lawn", 2), ("abc", "abc", 0), ("ab", "ba", 2)],
)
def test_levenshtein(first: str, second: str, edits: int) -> None:
    assert levenshtein(first, second) == levenshtein(second, first) == edits


def test_closeness_ignores_blanks_and_case_and_is_never_negative() -> None:
    assert closeness("Grand  OPENING today", "opening") == 1.0
    assert closeness("xyz" * 20, "open") == 0.0
    assert closeness("opn", "open") == 0.75


@pytest.mark.parametrize(("prompt", "row"), [("a sign", {}), ('a "', {}), ('a " " sign', {}), ("a sign", {"text": 3})])
def test_ocr_needs_a_text(prompt: str, row: dict[str, Any]) -> None:
    with pytest.raises(RewardError, match=r"'ocr'.*sample 0: no text to be read"):
        score("ocr", load_reward("ocr"), torch.zeros(1, 3, 32, 32), [prompt], [row])
    config = load_config(["experiment=demo", "reward=ocr", "evaluation.rewards=[]", "arm=grpo"])
    prompts = [Prompt(id=f"{n:016x}", text=prompt, metadata=row) for n in range(2)]
    with pytest.raises(
        PromptError, match=r"reward\.terms: reward 'ocr' needs the text .* metadata 'text' or in double"
    ):
        check_needs(config, prompts, prompts)
