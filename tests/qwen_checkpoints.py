"""Small random Qwen2-VL reward models in the file layouts of VideoAlign and HPSv3."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

VIDEO_TOKENS = ("<|VQ_reward|>", "<|MQ_reward|>", "<|TA_reward|>")
_BUILT_IN = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
    "<|video_pad|>",
)  # fmt: skip
_CHAT = (
    "{% for message in messages %}<|im_start|>system\nhelpful<|im_end|>\n<|im_start|>{{ message['role'] }}\n"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}<|vision_start|><|image_pad|>"
    "<|vision_end|>{% elif content['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>{% else %}"
    "{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)


def write_base(folder: Path) -> Path:
    """Configuration and tokenizer of a Qwen2-VL, two layers a tower."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2VLConfig

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({letter: number for number, letter in enumerate(letters)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(list(_BUILT_IN))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<|endoftext|>")
    tokenizer.chat_template = _CHAT
    tokenizer.save_pretrained(folder)
    ids = {name: 256 + number for number, name in enumerate(_BUILT_IN)}
    Qwen2VLConfig(
        text_config={
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "vocab_size": 400, "max_position_embeddings": 4096,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
        },
        vision_config={"embed_dim": 32, "depth": 2, "num_heads": 2, "hidden_size": 32, "mlp_ratio": 2},
        image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"],
    ).save_pretrained(folder)  # fmt: skip
    return folder


def stock(base: Path, words: int) -> Any:
    """transformers' own model, random, for so many words."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    torch.manual_seed(0)
    config = Qwen2VLConfig.from_pretrained(base)
    config.text_config.vocab_size = words
    model = Qwen2VLForConditionalGeneration(config).eval()
    with torch.no_grad():
        for value in model.parameters():
            value += 0.05 * torch.randn_like(value)
    return model


def old_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """As transformers 4.45 saved them."""
    return {
        name.replace("model.visual.", "visual.").replace("model.language_model.", "model."): value.clone()
        for name, value in tensors.items()
    }


def write_hpsv3(folder: Path, model: Any, head: dict[str, Tensor]) -> Path:
    """MizzenAI/HPSv3."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: value for name, value in old_names(model.state_dict()).items() if name != "lm_head.weight"}
    save_file(tensors | {f"rm_head.{name}": value for name, value in head.items()}, folder / "HPSv3.safetensors")
    return folder


def write_videoalign(folder: Path, adapted: Any, head: Tensor, *, whole: bool, base: Path, **changed: Any) -> Path:
    """KwaiVGI/VideoReward: all of a model with peft's adapter in it, or what was trained of it alone."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "data_config": {
            "max_frame_pixels": 200704, "num_frames": None, "fps": 2.0, "sample_type": "uniform", "eval_dim": ["VQ"],
            "prompt_template_type": "detailed_special", "meta_data": "", "data_dir": "",
        },
        "model_config": {"use_special_tokens": True, "output_dim": len(head), "reward_token": "special"},
        "peft_lora_config": {"lora_enable": True, "lora_r": 4, "lora_alpha": 12},
        "inference_config": {
            "VQ_mean": 3.6757, "VQ_std": 2.2476, "MQ_mean": 1.1646, "MQ_std": 1.3811, "TA_mean": 2.8105,
            "TA_std": 2.5121,
        },
    } | changed  # fmt: skip
    (folder / "model_config.json").write_text(json.dumps(settings))
    (folder / "checkpoint-9").mkdir(exist_ok=True)
    checkpoint = folder / "checkpoint-11352"
    checkpoint.mkdir(exist_ok=True)
    tensors = {
        name.replace("model.model.visual.", "model.visual.").replace("model.language_model.", "model."): value.clone()
        for name, value in adapted.state_dict().items()
    } | {"base_model.model.rm_head.weight": head}
    if whole:
        torch.save(tensors, checkpoint / "model.pth")
        return folder
    lora = {name: value for name, value in tensors.items() if ".lora_" in name}
    save_file(
        {name.replace(".default.", "."): value.contiguous() for name, value in lora.items()},
        checkpoint / "adapter_model.safetensors",
    )
    trained = ("base_model.model.rm_head.weight", "base_model.model.model.embed_tokens.weight")
    torch.save({name: tensors[name] for name in trained}, checkpoint / "non_lora_state_dict.pth")
    rest = {n.removeprefix("base_model.model.").replace(".base_layer.", "."): v for n, v in tensors.items()}
    own = {n: v.contiguous() for n, v in rest.items() if ".lora_" not in n and not n.startswith(("rm_head", "lm_head"))}
    own["model.embed_tokens.weight"] = own["model.embed_tokens.weight"][:256].contiguous()
    save_file(own, base / "model.safetensors")
    return folder
