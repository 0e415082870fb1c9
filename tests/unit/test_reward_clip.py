"""Rewards on CLIP: random checkpoints in the published layouts, against Pillow, torchvision and written formulas."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from reward_checkpoints import clip_ids, open_clip_tensors, write_clip, write_hpsv2
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import functional as tv

from vipo.rewards import Reward, RewardError, in_use, load_reward, score, weight_files
from vipo.rewards.pixels import clip_pixels, grey_levels, pil_bicubic

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
PROMPTS = ["a red cat", "two dogs on the sign", "a red cat"]
# From the tallest to the widest, odd ones among them; and pictures that CLIP enlarges.
SHAPES = [(64, 64), (75, 40), (40, 75), (28, 91), (20, 20), (33, 34)]


def pictures(height: int, width: int, count: int = 3, seed: int = 0) -> Tensor:
    """Smooth and noisy pictures of whole grey levels."""
    made = np.random.default_rng(seed)
    noise = made.integers(0, 256, (count, height, width, 3), dtype=np.uint8)
    smooth = [np.array(Image.fromarray(x).resize((5, 4)).resize((width, height))) for x in noise]
    mixed = np.stack([noise[i] if i == 0 else smooth[i] for i in range(count)])
    return torch.from_numpy(mixed).permute(0, 3, 1, 2).float() / 255


def pil(image: Tensor) -> Image.Image:
    return Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy())


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clip") / "clip")


@pytest.fixture(scope="module")
def hpsv2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hpsv2(tmp_path_factory.mktemp("hps") / "hps")


def made(name: str, path: Path, **options: Any) -> Reward:
    return load_reward(name, "cpu", {"path": str(path), **options})


def scored(name: str, reward: Reward, images: Tensor, prompts: Sequence[str] = PROMPTS) -> Tensor:
    return score(name, reward, images, prompts, [{}] * len(prompts))


# --- Preprocessing


@pytest.mark.parametrize(("height", "width"), [(28, 28), (60, 90), (130, 31), (31, 130)])
@pytest.mark.parametrize("source", [(64, 64), (100, 77), (19, 23)])
def test_the_resize_is_pillow_s(source: tuple[int, int], height: int, width: int) -> None:
    images = pictures(*source)
    own = pil_bicubic(grey_levels(images), height, width).numpy()
    bicubic = Image.Resampling.BICUBIC
    # One direction at a time: which goes first is not the same in all of Pillow's releases.
    both = [pil(image).resize((width, image.shape[1]), bicubic).resize((width, height), bicubic) for image in images]
    other = np.stack([np.array(image).transpose(2, 0, 1) for image in both])
    apart = np.abs(own - other.astype(float))
    assert apart.max() <= 1
    # Only what lies halfway between two levels may fall on either.
    assert (apart > 0).mean() < 0.01


@pytest.mark.parametrize("shape", SHAPES)
def test_clip_s_pictures_are_those_of_the_published_transform(shape: tuple[int, int]) -> None:
    images = pictures(*shape)
    published = transforms.Compose(
        [
            transforms.Resize(28, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(28),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    expected = torch.stack([published(pil(image)) for image in images])
    own = clip_pixels(images, 28, nearest=True)
    assert own.dtype == torch.float32
    # A grey level is 1 / 255 / .26 = .015.
    assert (own - expected).abs().max() < 0.016
    assert ((own - expected).abs() > 1e-5).float().mean() < 0.01


def test_an_odd_rest_is_halved_as_each_library_does() -> None:
    from transformers import CLIPImageProcessorPil

    images = pictures(28, 31)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    theirs = processor([np.array(pil(image)) for image in images], return_tensors="pt").pixel_values
    torch.testing.assert_close(clip_pixels(images, 28, nearest=False), theirs, atol=1e-5, rtol=0)
    shifted = clip_pixels(images, 28, nearest=True)
    torch.testing.assert_close(shifted[..., :-1], theirs[..., 1:], atol=1e-5, rtol=0)


# --- CLIPScore and PickScore


def hf_features(folder: Path, images: Tensor, prompts: Sequence[str], *, template: str = "{}") -> tuple[Tensor, Tensor]:
    """Unit vectors by transformers itself, on pictures that Pillow made."""
    from transformers import CLIPModel

    model = CLIPModel.from_pretrained(folder).eval()
    published = transforms.Compose(
        [transforms.Resize(28, interpolation=transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(28)]
    )
    pixels = torch.stack([tv.normalize(tv.to_tensor(published(pil(image))), MEAN, STD) for image in images])
    ids = torch.tensor([clip_ids(template.replace("{}", prompt), 24) for prompt in prompts])
    with torch.no_grad():
        vision = model.vision_model(pixel_values=pixels).pooler_output @ model.visual_projection.weight.T
        text = model.text_model(input_ids=ids).pooler_output @ model.text_projection.weight.T
    return vision / vision.norm(dim=1, keepdim=True), text / text.norm(dim=1, keepdim=True)


def test_clipscore_is_the_cosine(clip: Path) -> None:
    images = pictures(64, 64)
    vision, text = hf_features(clip, images, PROMPTS)
    found = scored("clipscore", made("clipscore", clip), images)
    torch.testing.assert_close(found, (vision * text).sum(dim=1), atol=2e-4, rtol=0)
    assert found.std() > 1e-3
    depicted = made("clipscore", clip, template="a photo depicts {}")
    _, text = hf_features(clip, images, PROMPTS, template="a photo depicts {}")
    torch.testing.assert_close(scored("clipscore", depicted, images), (vision * text).sum(dim=1), atol=2e-4, rtol=0)


def test_pickscore_is_the_scaled_cosine_with_another_folder_s_tokenizer(clip: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    images = pictures(64, 64)
    vision, text = hf_features(clip, images, PROMPTS)
    scale = math.exp(float(load_file(clip / "model.safetensors")["logit_scale"]))
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((clip / name).read_bytes())
    reward = made("pickscore", bare, tokenizer=str(clip))
    torch.testing.assert_close(
        scored("pickscore", reward, images), scale * (vision * text).sum(dim=1), atol=5e-3, rtol=0
    )
    assert {path.name for path in weight_files(reward)} == {
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    with pytest.raises(RewardError, match="holds no tokenizer"):
        scored("pickscore", made("pickscore", clip, tokenizer=str(tmp_path)), images)


def test_a_bin_file_is_read_without_running_code_and_a_file_may_be_named(clip: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    images = pictures(64, 64)
    expected = scored("clipscore", made("clipscore", clip), images)
    for path in clip.iterdir():
        if path.suffix == ".json":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    torch.save(load_file(clip / "model.safetensors"), tmp_path / "pytorch_model.bin")
    assert torch.equal(scored("clipscore", made("clipscore", tmp_path), images), expected)
    assert torch.equal(scored("clipscore", made("clipscore", clip / "model.safetensors"), images), expected)


# --- HPSv2.1


def open_clip_features(tensors: dict[str, Tensor], pixels: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Both towers written out, head by head, in float64."""
    t = {name: value.double() for name, value in tensors.items()}

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(dim=-1, keepdim=True)
        scaled = centred / (centred.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt()
        return scaled * t[f"{name}.weight"] + t[f"{name}.bias"]

    def attend(x: Tensor, block: str, width: int, causal: bool) -> Tensor:
        q, k, v = (x @ t[f"{block}attn.in_proj_weight"].T + t[f"{block}attn.in_proj_bias"]).chunk(3, dim=-1)
        heads = []
        for start in range(0, x.shape[-1], width):
            part = slice(start, start + width)
            logits = q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(width)
            if causal:
                logits = logits.masked_fill(torch.ones_like(logits, dtype=torch.bool).triu(1), -math.inf)
            heads.append(logits.softmax(dim=-1) @ v[..., part])
        return torch.cat(heads, dim=-1) @ t[f"{block}attn.out_proj.weight"].T + t[f"{block}attn.out_proj.bias"]

    def tower(x: Tensor, prefix: str, width: int, causal: bool) -> Tensor:
        for number in range(2):
            block = f"{prefix}transformer.resblocks.{number}."
            x = x + attend(norm(x, f"{block}ln_1"), block, width, causal)
            inner = norm(x, f"{block}ln_2") @ t[f"{block}mlp.c_fc.weight"].T + t[f"{block}mlp.c_fc.bias"]
            inner = inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))
            x = x + inner @ t[f"{block}mlp.c_proj.weight"].T + t[f"{block}mlp.c_proj.bias"]
        return x

    patches = F.conv2d(pixels.double(), t["visual.conv1.weight"], stride=7).flatten(2).transpose(1, 2)
    first = t["visual.class_embedding"].expand(len(pixels), 1, -1)
    x = norm(torch.cat([first, patches], dim=1) + t["visual.positional_embedding"], "visual.ln_pre")
    vision = norm(tower(x, "visual.", 80, False)[:, 0], "visual.ln_post") @ t["visual.proj"]
    x = tower(t["token_embedding.weight"][ids] + t["positional_embedding"], "", 64, True)
    ends = ids.argmax(dim=1)
    text = norm(x, "ln_final")[torch.arange(len(ids)), ends] @ t["text_projection"]
    return F.normalize(vision, dim=1), F.normalize(text, dim=1)


def hps_pixels(images: Tensor, size: int = 28) -> Tensor:
    """As the package does it to each picture: a tensor, its longer side to `size`, zeros around, normalised."""
    prepared = []
    for image in images:
        scale = size / max(image.shape[1:])
        small = tv.resize(
            tv.to_tensor(pil(image)),
            [round(side * scale) for side in image.shape[1:]],
            transforms.InterpolationMode.BICUBIC,
            antialias=True,
        )
        down, right = size - small.shape[1], size - small.shape[2]
        padded = tv.pad(small, [right // 2, down // 2, right - right // 2, down - down // 2], fill=0)
        prepared.append(tv.normalize(padded, MEAN, STD))
    return torch.stack(prepared)


@pytest.mark.parametrize("shape", SHAPES)
def test_hpsv2_is_the_cosine_of_open_clip(hpsv2: Path, shape: tuple[int, int]) -> None:
    images = pictures(*shape)
    ids = torch.tensor([clip_ids(prompt, 24) for prompt in PROMPTS])
    vision, text = open_clip_features(open_clip_tensors(), hps_pixels(images), ids)
    found = scored("hpsv2", made("hpsv2", hpsv2, tokenizer=str(hpsv2)), images)
    torch.testing.assert_close(found, (vision * text).sum(dim=1).float(), atol=2e-6, rtol=0)
    assert found.std() > 1e-3


def test_hpsv2_cleans_texts_as_open_clip_does(hpsv2: Path) -> None:
    reward = made("hpsv2", hpsv2, tokenizer=str(hpsv2))
    images = pictures(64, 64, 2)[[1, 1]]
    # Curly quotes, escapes, blanks and letter case.
    same = scored("hpsv2", reward, images, ["the dog\u2019s  \tsign &amp;amp; a cat ", "The dog's sign & a CAT"])
    assert same[0] == same[1]


def test_safetensors_are_preferred_and_a_file_may_be_named(hpsv2: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    images = pictures(64, 64)
    old = scored("hpsv2", made("hpsv2", hpsv2 / "HPS_v2.1_compressed.pt", tokenizer=str(hpsv2)), images)
    write_hpsv2(tmp_path, seed=1)
    save_file(open_clip_tensors(), tmp_path / "HPS_v2.1_compressed.safetensors")
    reward = made("hpsv2", tmp_path, tokenizer=str(hpsv2))
    assert torch.equal(scored("hpsv2", reward, images), old)
    assert weight_files(reward)[0] == tmp_path / "HPS_v2.1_compressed.safetensors"


# --- What holds for all of them

ALL = ("clipscore", "pickscore", "hpsv2")


def loaded(name: str, clip: Path, hpsv2: Path, **options: Any) -> Reward:
    place = hpsv2 if name == "hpsv2" else clip
    return made(name, place, **({} if name == "clipscore" else {"tokenizer": str(place)}), **options)


@pytest.mark.parametrize("name", ALL)
def test_a_score_is_its_sample_s_own_and_the_same_again(name: str, clip: Path, hpsv2: Path) -> None:
    images = pictures(40, 56, 5)
    prompts = [*PROMPTS, "the sign says a", "on"]
    whole = scored(name, loaded(name, clip, hpsv2), images, prompts)
    assert torch.equal(scored(name, loaded(name, clip, hpsv2), images, prompts), whole)
    parts = scored(name, loaded(name, clip, hpsv2, batch=2), images, prompts)
    torch.testing.assert_close(parts, whole, atol=2e-5, rtol=1e-5)
    back = scored(name, loaded(name, clip, hpsv2), images.flip(0), prompts[::-1]).flip(0)
    torch.testing.assert_close(back, whole, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ALL)
def test_the_gradient_reaches_the_pictures_and_nothing_else(name: str, clip: Path, hpsv2: Path) -> None:
    reward = loaded(name, clip, hpsv2)
    images = pictures(28, 28, 2).requires_grad_()
    with in_use(reward) as network:
        found = reward(images, PROMPTS[:2], [{}, {}])
        assert isinstance(found, Tensor)
        (gradient,) = torch.autograd.grad(found.sum(), images)
        assert not any(value.requires_grad for value in network.parameters())
    assert gradient.isfinite().all()
    # Of a picture that no resize changes, by a whole grey level up and down along the gradient's own direction.
    step = gradient.sign() / 255
    inside = images.detach().clamp(1 / 255, 254 / 255)
    above, below = (
        scored(name, reward, (inside + way * step).contiguous(), PROMPTS[:2]).double().sum() for way in (1, -1)
    )
    expected = float((gradient.double() * step.double()).sum())
    assert (above - below).item() / 2 == pytest.approx(expected, rel=0.25)
    assert not scored(name, reward, images, PROMPTS[:2]).requires_grad


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_a_lower_precision_is_near(dtype: str, clip: Path, hpsv2: Path) -> None:
    images = pictures(64, 64)
    for name in ALL:
        full, low = (scored(name, loaded(name, clip, hpsv2, dtype=d), images) for d in ("fp32", dtype))
        assert 0 < (full - low).abs().max() < (0.5 if name == "pickscore" else 0.03)


@pytest.mark.parametrize("name", ALL)
def test_videos_are_refused(name: str, clip: Path, hpsv2: Path) -> None:
    with pytest.raises(RewardError, match=r"takes pictures \(B, 3, H, W\), not videos"):
        scored(name, loaded(name, clip, hpsv2), torch.zeros(3, 2, 3, 28, 28))


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        ("missing", r"missing: .*final_layer_norm"),
        ("shape", r"of another shape: .*final_layer_norm"),
        ("nan", r"not finite: .*final_layer_norm"),
        ("cut", r"cannot be read"),
        ("pickle", r"cannot be read"),
        ("foreign", r"is no checkpoint of open_clip's ViT-H-14"),
        ("empty", r"holds no HPS_v2.1_compressed.safetensors or HPS_v2.1_compressed.pt"),
    ],
)
def test_a_damaged_checkpoint_is_named(damage: str, told: str, hpsv2: Path, tmp_path: Path) -> None:
    tensors: dict[str, Any] = open_clip_tensors()
    path = tmp_path / "HPS_v2.1_compressed.pt"
    if damage == "missing":
        del tensors["ln_final.weight"]
    elif damage == "shape":
        tensors["ln_final.weight"] = torch.ones(3)
    elif damage == "nan":
        tensors["ln_final.weight"][0] = math.nan
    elif damage == "foreign":
        tensors = {"weight": torch.ones(2)}
    elif damage == "pickle":
        tensors = {"state_dict": Image.new("RGB", (1, 1))}
    if damage != "empty":
        torch.save(tensors, path)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(RewardError, match=told) as caught:
        scored("hpsv2", made("hpsv2", tmp_path, tokenizer=str(hpsv2)), pictures(28, 28))
    assert str(tmp_path) in str(caught.value)


def test_what_is_neither_here_nor_on_a_hub_is_told(clip: Path) -> None:
    with pytest.raises(RewardError, match=r"path 'no/where'.* as a hub id it is neither in the local cache nor"):
        made("clipscore", Path("no/where"))
    with pytest.raises(RewardError, match=r"is on this machine and has no revision"):
        made("clipscore", clip, revision="0" * 40)
