"""The worked example of docs/generators.md, run against the stock pipeline on a random checkpoint."""

import re
from pathlib import Path

import pytest
import torch
from checkpoints import picture_autoencoder, t5_tokenizer
from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel, FlowMatchEulerDiscreteScheduler
from omegaconf import OmegaConf
from transformers import UMT5Config, UMT5EncoderModel

from vipo.config.generator import GeneratorConfig
from vipo.generators import load_generator
from vipo.generators.base import resolve_class
from vipo.sampling.chain import Chain
from vipo.sampling.noise import keyed_normal
from vipo.sampling.rollout import sample_ode
from vipo.sampling.transitions import dance_transition

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "generators.md").read_text(encoding="utf-8")


def _checkpoint(folder: Path) -> Path:
    torch.manual_seed(0)
    AuraFlowPipeline(
        transformer=AuraFlowTransformer2DModel(
            sample_size=16,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_mmdit_layers=1,
            num_single_dit_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            caption_projection_dim=32,
            pos_embed_max_size=256,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73),
        vae=picture_autoencoder(),
        text_encoder=UMT5EncoderModel(
            UMT5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=4)
        ),
        tokenizer=t5_tokenizer(),
    ).save_pretrained(folder)
    return folder


def test_the_example_equals_the_stock_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [(name, code)] = re.findall(r"Save this as\s+`(\w+)\.py`.*?```python\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    [text] = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    settings = OmegaConf.to_container(OmegaConf.create(text))
    assert isinstance(settings, dict)
    folder = _checkpoint(tmp_path / "checkpoint")
    config = GeneratorConfig.model_validate(
        settings["generator"] | {"path": str(folder), "height": 32, "width": 32, "max_sequence_length": 12}
    )
    generator = load_generator(config, tmp_path)
    [row] = resolve_class(config).encode_prompts(config, tmp_path, ["a fox"])
    conditioning = {key: value[None] for key, value in row.items()}
    noise = keyed_normal([(0, "test")], generator.latent_shape)
    pipeline = AuraFlowPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    stock = pipeline(
        "a fox",
        latents=noise,
        height=32,
        width=32,
        num_inference_steps=3,
        guidance_scale=config.guidance_scale,
        max_sequence_length=12,
        output_type="pt",
    ).images
    levels = pipeline.scheduler.sigmas
    clean = sample_ode(generator, conditioning, Chain(levels[:-1], levels, dance_transition, 0.3, "velocity"), noise)
    torch.testing.assert_close(generator.decode(clean), stock, atol=1e-5, rtol=0)
