"""VideoAlign and HPSv3, against transformers' own model with peft's own adapter, sample by sample."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from qwen_checkpoints import VIDEO_TOKENS, stock, write_base, write_hpsv3, write_videoalign
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import resize

from vipo.config.reward import RewardSpec
from vipo.config.reward_options import HPSv3Options, NetworkOptions, VideoAlignOptions
from vipo.rewards import Reward, RewardError, load_reward, load_rewards, score, weight_files
from vipo.rewards.networks import network_bytes
from vipo.rewards.qwen2_vl import merged, published_texts, smart_size, vision_of
from vipo.rewards.videoalign import _chosen

PROMPTS = ["a cat", "two dogs that run {very} far", "ä"]
VIDEO_TEXT = "rate <|VQ_reward|> of\n<|MQ_reward|> {text_prompt} <|TA_reward|> end\n"
PICTURE_TEXTS = ("Look at {text_prompt}\n", "score: <|Reward|>\n")
MEAN, STD = (3.6757, 1.1646, 2.8105), (2.2476, 1.3811, 2.5121)


def frames(*shape: int) -> Tensor:
    """Smooth pictures of whole grey levels, ``(N, 3, h, w)``."""
    made = np.random.default_rng(0)
    small = made.integers(0, 256, (shape[0], 4, 5, 3), dtype=np.uint8)
    large = np.stack([np.array(Image.fromarray(x).resize(shape[:0:-1])) for x in small])
    return torch.from_numpy(large).permute(0, 3, 1, 2)


def check_count(reward: Any, options: NetworkOptions) -> None:
    """By its files, whatever else they hold, the network is as large as it is."""
    with reward.resident as network:
        assert network_bytes(reward, options) == 4 * sum(value.numel() for value in network.parameters())


def processed(levels: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Patches and grid by transformers' own processors, which resize nothing here."""
    if kind == "image":
        from transformers import Qwen2VLImageProcessor

        found = Qwen2VLImageProcessor(do_resize=False)(list(levels), return_tensors="pt")
        return found["pixel_values"], found["image_grid_thw"]
    from transformers import Qwen2VLVideoProcessor

    found = Qwen2VLVideoProcessor(do_resize=False, do_sample_frames=False)([levels], return_tensors="pt")
    return found["pixel_values_videos"], found["video_grid_thw"]


@torch.no_grad()
def hidden_at(model: Any, tokenizer: Any, levels: Tensor, kind: str, text: str, marks: list[str]) -> Tensor:
    """The last layer's vectors at marks, of one sample."""
    patches, grid = processed(levels, kind)
    content = [{"type": kind}, {"type": "text", "text": text}]
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    pad = f"<|{kind}_pad|>"
    ids = tokenizer(chat.replace(pad, pad * int(grid.prod() // 4)), return_tensors="pt").input_ids
    seen = model.visual(patches, grid_thw=grid).pooler_output
    words = model.language_model.embed_tokens(ids)
    words[ids == tokenizer.convert_tokens_to_ids(pad)] = seen
    positions = torch.arange(ids.shape[1])[None, None].expand(3, 1, -1)
    last = model.language_model(inputs_embeds=words, position_ids=positions).last_hidden_state[0]
    return torch.stack([last[ids[0].tolist().index(tokenizer.convert_tokens_to_ids(mark))] for mark in marks])


def tokenizer_of(base: Path, special: list[str]) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    return tokenizer


# --- HPSv3


@pytest.fixture(scope="module")
def hpsv3(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, dict[str, Tensor]]:
    folder = write_base(tmp_path_factory.mktemp("hpsv3"))
    made = torch.Generator().manual_seed(1)
    head: dict[str, Tensor] = {}
    for place, before, after in ((0, 32, 24), (3, 24, 6), (5, 6, 2)):
        head[f"{place}.weight"] = torch.randn(after, before, generator=made) / before**0.5
        head[f"{place}.bias"] = torch.randn(after, generator=made)
    model = stock(folder, 264)
    write_hpsv3(folder, model, head)
    (folder / "texts.py").write_text(
        f"import nowhere\nINSTRUCTION = {PICTURE_TEXTS[0]!r}\nprompt_with_special_token = {PICTURE_TEXTS[1]!r}\n"
    )
    return folder, model, head


def load_hpsv3(folder: Path, **options: Any) -> Reward:
    places = {"path": str(folder), "base": str(folder), "instruction": str(folder / "texts.py")}
    return load_reward("hpsv3", "cpu", {**places, **options})


@pytest.mark.parametrize("shape", [(448, 448), (100, 230)])
def test_hpsv3_is_the_published_formula(hpsv3: tuple[Path, Any, dict[str, Tensor]], shape: tuple[int, int]) -> None:
    folder, model, head = hpsv3
    levels, tokenizer = frames(3, *shape), tokenizer_of(folder, ["<|Reward|>"])
    height, width = (448, 448) if shape == (448, 448) else (308, 700)
    expected = []
    for picture, prompt in zip(levels, PROMPTS, strict=True):
        small = Image.fromarray(picture.permute(1, 2, 0).numpy()).resize((width, height), Image.Resampling.BICUBIC)
        text = PICTURE_TEXTS[0].format(text_prompt=prompt) + PICTURE_TEXTS[1]
        pixels = torch.from_numpy(np.array(small)).permute(2, 0, 1)[None]
        x = hidden_at(model.model, tokenizer, pixels, "image", text, ["<|Reward|>"])[0]
        for place in (0, 3, 5):
            x = (x if place == 0 else x.relu()) @ head[f"{place}.weight"].T + head[f"{place}.bias"]
        expected.append(float(x[0]))
    reward = load_hpsv3(folder, batch=2)
    found = score("hpsv3", reward, levels.float() / 255, PROMPTS, [{}] * 3)
    torch.testing.assert_close(found, torch.tensor(expected), atol=2e-4, rtol=0)
    assert found.std() > 1e-2
    places = {"path": str(folder), "base": str(folder), "instruction": str(folder / "texts.py")}
    check_count(reward, HPSv3Options.model_validate(places))
    assert [path.name for path in weight_files(reward)] == [
        "HPSv3.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
        "texts.py",
    ]  # fmt: skip


def test_hpsv3_s_gradient_and_its_refusals(hpsv3: tuple[Path, Any, dict[str, Tensor]], tmp_path: Path) -> None:
    folder, _, _ = hpsv3
    reward, pixels = load_hpsv3(folder), (frames(1, 448, 448).float() / 255).requires_grad_()
    (gradient,) = torch.autograd.grad(reward(pixels, ["a"], [{}]).sum(), pixels)  # type: ignore[union-attr]
    assert gradient.abs().sum() > 0
    with pytest.raises(RewardError, match="a prompt holds what marks"):
        score("hpsv3", reward, torch.zeros(1, 3, 448, 448), ["a <|Reward|>"], [{}])
    (tmp_path / "other.py").write_text("INSTRUCTION = 5")
    with pytest.raises(RewardError, match="assigns no text to INSTRUCTION, prompt_with_special_token"):
        load_hpsv3(folder, instruction=str(tmp_path / "other.py"))
    with pytest.raises(RewardError, match="takes pictures"):
        score("hpsv3", reward, torch.zeros(1, 2, 3, 448, 448), ["a"], [{}])


# --- VideoAlign


@pytest.fixture(scope="module")
def videoalign(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    from peft import LoraConfig, get_peft_model

    folder = write_base(tmp_path_factory.mktemp("videoalign"))
    config = LoraConfig(
        r=4, lora_alpha=12, target_modules=["q_proj", "v_proj", "down_proj", "qkv"], init_lora_weights=False
    )
    adapted = get_peft_model(stock(folder, 266), config).eval()
    (folder / "prompt_template.py").write_text(f"DETAILED_PROMPT_WITH_SPECIAL_TOKEN = '''{VIDEO_TEXT}'''\n")
    return folder, adapted


def head_rows(count: int) -> Tensor:
    return torch.randn(count, 32, generator=torch.Generator().manual_seed(2)) / 4


def options_of(folder: Path, path: Path, **options: Any) -> dict[str, Any]:
    places = {"path": str(path), "base": str(folder), "instruction": str(folder / "prompt_template.py")}
    return {**places, "frame_rate": 4.0, **options}


@pytest.mark.parametrize(("whole", "outputs"), [(True, 1), (False, 3)])
def test_videoalign_is_the_published_formula(
    videoalign: tuple[Path, Any], tmp_path: Path, whole: bool, outputs: int
) -> None:
    folder, adapted = videoalign
    head = head_rows(outputs)
    path = write_videoalign(tmp_path / "reward", adapted, head, whole=whole, base=folder)
    clips = frames(3 * 11, 60, 90).view(3, 11, 3, 60, 90)
    tokenizer = tokenizer_of(folder, list(VIDEO_TOKENS))
    expected = []
    for clip, prompt in zip(clips, PROMPTS, strict=True):
        # Eleven frames at four a second, two a second looked at: 5.5, and so six.
        shown = clip[[0, 2, 4, 6, 8, 10]]
        shown = resize(shown, [280, 392], InterpolationMode.BICUBIC, antialias=True)
        text = VIDEO_TEXT.format(text_prompt=prompt)
        x = hidden_at(adapted.base_model.model.model, tokenizer, shown, "video", text, list(VIDEO_TOKENS))
        raw = [float(x[i] @ head[i if outputs == 3 else 0]) for i in range(3)]
        expected.append([(value - mean) / std for value, mean, std in zip(raw, MEAN, STD, strict=True)])
    specs = [
        RewardSpec(name="videoalign", label=name, options=options_of(folder, path, dimension=name, batch=2))
        for name in ("VQ", "MQ", "TA")
    ]
    rewards = load_rewards(specs)
    images = clips.float() / 255
    found = {name: score(name, reward, images, PROMPTS, [{}] * 3) for name, reward in rewards.items()}
    wanted = torch.tensor(expected)
    for place, values in enumerate(found.values()):
        torch.testing.assert_close(values, wanted[:, place], atol=5e-4, rtol=0)
        assert values.std() > 1e-3
    check_count(rewards["VQ"], VideoAlignOptions.model_validate(specs[0].options))
    # One network for all, and one pass.
    shared = {id(reward.resident) for reward in rewards.values()}  # type: ignore[attr-defined]
    assert len(shared) == 1
    other = RewardSpec(name="videoalign", label="x", options=options_of(folder, path, batch=3))
    assert load_rewards([*specs, other])["x"].resident is not rewards["VQ"].resident  # type: ignore[attr-defined]
    names = [file.name for file in weight_files(rewards["VQ"])]
    assert ("model.pth" in names) == whole
    assert names[0] == "model_config.json"
    if not whole:
        assert {"adapter_model.safetensors", "non_lora_state_dict.pth", "model.safetensors"} <= set(names)


def test_videoalign_refuses_what_it_does_not_read(videoalign: tuple[Path, Any], tmp_path: Path) -> None:
    folder, adapted = videoalign
    settings = {
        "max_frame_pixels": 200704, "fps": 2.0, "sample_type": "multi_pts", "prompt_template_type": "detailed_special",
    }  # fmt: skip
    path = write_videoalign(tmp_path / "a", adapted, head_rows(1), whole=True, base=folder, data_config=settings)
    with pytest.raises(RewardError, match="sample_type 'multi_pts' is not read here"):
        load_reward("videoalign", "cpu", options_of(folder, path))
    (path / "model_config.json").write_text("{}")
    with pytest.raises(RewardError, match="is no configuration of VideoAlign"):
        load_reward("videoalign", "cpu", options_of(folder, path))
    path = write_videoalign(tmp_path / "b", adapted, head_rows(1), whole=True, base=folder)
    tensors = torch.load(path / "checkpoint-11352/model.pth", weights_only=True)
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.default.weight"
    del tensors[name]
    torch.save(tensors, path / "checkpoint-11352/model.pth")
    with pytest.raises(RewardError, match=r"its adapter of model\.layers\.1\.self_attn\.q_proj\.weight does not fit"):
        score(
            "v", load_reward("videoalign", "cpu", options_of(folder, path)), torch.zeros(1, 4, 3, 60, 60), ["a"], [{}]
        )


# --- Parts


@pytest.mark.parametrize(
    ("total", "rate", "data", "count"),
    [
        (81, 16.0, {"num_frames": None, "fps": 2.0}, 10),
        (81, 24.0, {"num_frames": None, "fps": 2.0}, 6),
        (5, 16.0, {"num_frames": None, "fps": 2.0}, 4),
        (3, 16.0, {"num_frames": None, "fps": 2.0}, 2),
        (33, 16.0, {"num_frames": 9, "fps": 2.0}, 8),
        (2, 16.0, {"num_frames": 8, "fps": 2.0}, 2),
    ],
)
def test_frames_are_chosen_as_published(total: int, rate: float, data: dict[str, Any], count: int) -> None:
    chosen = _chosen(total, rate, data)
    assert chosen == [round(x) for x in np.linspace(0, total - 1, count, dtype=np.float32)]


@pytest.mark.parametrize(
    ("size", "bounds", "wanted"),
    [
        ((512, 512), (200704, 200704), (448, 448)),
        ((480, 832), (100352, 200704), (336, 588)),
        ((60, 90), (100352, 200704), (280, 392)),
        ((300, 400), (100352, 200704), (308, 392)),
    ],
)
def test_sizes_are_as_published(size: tuple[int, int], bounds: tuple[int, int], wanted: tuple[int, int]) -> None:
    assert smart_size(*size, *bounds) == wanted
    with pytest.raises(RewardError, match="more than 200 times"):
        smart_size(1, 201, 1, 100)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_patches_are_as_transformers_cuts_them(count: int) -> None:
    levels = frames(count, 56, 84)
    own = vision_of(levels.double())
    patches, grid = processed(levels, "image" if count == 1 else "video")
    assert own.grid == tuple(grid[0].tolist())
    torch.testing.assert_close(own.patches, patches, atol=1e-5, rtol=0)


def test_an_adapter_is_merged_by_hand() -> None:
    made = torch.Generator().manual_seed(0)
    w, a, b = (torch.randn(*shape, generator=made) for shape in ((5, 4), (2, 4), (5, 2)))
    found = merged({"x.base_layer.weight": w, "x.lora_A.default.weight": a, "x.lora_B.weight": b, "y": w}, 3.0, "here")
    loops = [[float(w[i, j]) + 3 * sum(float(b[i, k] * a[k, j]) for k in range(2)) for j in range(4)] for i in range(5)]
    torch.testing.assert_close(found["x.weight"], torch.tensor(loops))
    assert found["y"] is w
    assert math.isclose(found["x.weight"].sum().item(), sum(map(sum, loops)), rel_tol=1e-5)
    with pytest.raises(RewardError, match="is of no kind of adapter"):
        merged({"x.lora_magnitude_vector": w}, 1.0, "here")


def test_a_published_file_is_read_and_not_run(tmp_path: Path) -> None:
    path = tmp_path / "texts.py"
    path.write_text("import absent\nA = '''a\nb'''\nB = f'{A}'\nraise SystemExit\n")
    assert published_texts(path, ["A"]) == ["a\nb"]
    with pytest.raises(RewardError, match="assigns no text to B"):
        published_texts(path, ["B"])
    path.write_text("A = (")
    with pytest.raises(RewardError, match="is no Python file"):
        published_texts(path, ["A"])
    with pytest.raises(RewardError, match="is no Python file"):
        published_texts(Path("/dev/zero"), ["A"])
