"""Wan and Stable Diffusion against their stock pipelines, on random checkpoints of the same classes."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import edit_json
from diffusers import StableDiffusionPipeline, WanPipeline
from torch import Tensor

from vipo.config.generator import GeneratorConfig
from vipo.config.sampling import SamplingConfig
from vipo.config.training import LoraConfig
from vipo.generators import Generator, GeneratorError, load_generator
from vipo.generators.base import resolve_class
from vipo.generators.embeddings import encode_prompt_file, load_embeddings, stack_conditioning
from vipo.prompts import Prompt
from vipo.prompts.prompt import prompt_id
from vipo.sampling.chain import Chain, sampling_chain
from vipo.sampling.noise import keyed_normal
from vipo.sampling.rollout import sample_ode
from vipo.sampling.transitions import dance_transition

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = ["a red fox runs", "two owls"]
NEGATIVE = "blurry"
FAMILIES = pytest.mark.parametrize("family", ["wan", "sd"])


@pytest.fixture
def folders(tiny_wan: Path, tiny_stable_diffusion: Path) -> dict[str, Path]:
    return {"wan": tiny_wan, "sd": tiny_stable_diffusion}


def _config(family: str, path: Path, **changes: object) -> GeneratorConfig:
    values: dict[str, object] = {
        "family": family,
        "path": str(path),
        "height": 32,
        "width": 48,
        "frames": 9 if family == "wan" else None,
        "max_sequence_length": 12,
        "guidance_scale": 4.0,
        "negative_prompt": NEGATIVE,
    }
    return GeneratorConfig.model_validate(values | changes)


def _conditioning(config: GeneratorConfig, prompts: list[str] = PROMPTS) -> dict[str, Tensor]:
    rows = resolve_class(config).encode_prompts(config, ROOT, prompts)
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def _stock(kind: Any, folder: Path) -> Any:
    pipeline = kind.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _noise(generator: Generator, count: int = 2) -> Tensor:
    return keyed_normal([(0, "test", i) for i in range(count)], generator.latent_shape)


def _first_step(pipeline: Any, network: Any, **arguments: object) -> tuple[Tensor, float]:
    """What the stock pipeline's first scheduler step is given: the guided prediction and the time."""
    seen: list[tuple[Tensor, float]] = []
    step = pipeline.scheduler.step

    def record(prediction: Tensor, time: Tensor, *args: object, **options: object) -> Any:
        seen.append((prediction.clone(), float(time)))
        return step(prediction, time, *args, **options)

    pipeline.scheduler.step = record
    pipeline(PROMPTS, negative_prompt=[NEGATIVE] * 2, **arguments)
    pipeline.scheduler.step = step
    return seen[0]


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_wan_equals_the_stock_pipeline(tiny_wan: Path, scale: float) -> None:
    config = _config("wan", tiny_wan, guidance_scale=scale)
    generator = load_generator(config, ROOT)
    assert generator.latent_shape == (16, 3, 4, 6)
    assert generator.grid == (4, 6)
    assert generator.frame_groups == (range(1), range(1, 5), range(5, 9))
    pipeline = _stock(WanPipeline, tiny_wan)
    noise, conditioning = _noise(generator), _conditioning(config)
    arguments = {
        "latents": noise,
        "height": 32,
        "width": 48,
        "num_frames": 9,
        "num_inference_steps": 3,
        "guidance_scale": scale,
        "max_sequence_length": 12,
    }
    expected, time = _first_step(pipeline, pipeline.transformer, output_type="latent", **arguments)
    assert time == 1000
    with torch.no_grad():
        found = generator.predict(noise, torch.ones(2), conditioning)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    stock = pipeline(PROMPTS, negative_prompt=[NEGATIVE] * 2, output_type="pt", **arguments).frames
    # The stock scheduler spaces its levels between its own largest and smallest one, so they are taken from it.
    levels = pipeline.scheduler.sigmas
    chain = Chain(levels[:-1], levels, dance_transition, 0.3, "velocity")
    videos = generator.decode(sample_ode(generator, conditioning, chain, noise))
    assert videos.shape == (2, 9, 3, 32, 48)
    torch.testing.assert_close(videos, stock, atol=1e-5, rtol=0)


def test_stable_diffusion_equals_the_stock_pipeline(tiny_stable_diffusion: Path) -> None:
    config = _config("sd", tiny_stable_diffusion)
    generator = load_generator(config, ROOT)
    assert generator.prediction == "noise"
    assert generator.latent_shape == (4, 16, 24)
    pipeline = _stock(StableDiffusionPipeline, tiny_stable_diffusion)
    noise, conditioning = _noise(generator), _conditioning(config)
    arguments = {"latents": noise, "height": 32, "width": 48, "num_inference_steps": 4, "guidance_scale": 4.0}
    expected, time = _first_step(pipeline, pipeline.unet, output_type="latent", **arguments)
    with torch.no_grad():
        found = generator.predict(noise, torch.full((2,), time), conditioning)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    stock = pipeline(PROMPTS, negative_prompt=[NEGATIVE] * 2, output_type="pt", **arguments).images
    # The stock scheduler ends at the first training level; vipo's chain ends in data.
    times = pipeline.scheduler.timesteps
    chain = sampling_chain(SamplingConfig(steps=4, transition="ddim"), "noise", generator.alphas_cumprod)
    assert torch.equal(chain.times, times.float())
    chain.levels[-1] = generator.alphas_cumprod[0]
    torch.testing.assert_close(
        generator.decode(sample_ode(generator, conditioning, chain, noise)), stock, atol=1e-5, rtol=0
    )


@FAMILIES
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_prediction_is_the_same_with_and_without_gradients(
    family: str, folders: dict[str, Path], precision: str
) -> None:
    """What the ratio before an update's first step rests on; and both branches carry a gradient."""
    config = _config(family, folders[family], precision=precision)
    generator = load_generator(config, ROOT)
    noise, conditioning, time = _noise(generator), _conditioning(config), torch.full((2,), 0.7)
    with torch.no_grad():
        sampled = generator.predict(noise, time, conditioning)
    generator.network.requires_grad_(True)
    learned = generator.predict(noise, time, conditioning)
    assert torch.equal(sampled, learned.detach())
    assert learned.dtype == torch.float32
    learned.square().mean().backward()
    gradients = [value.grad for value in generator.network.parameters()]
    assert sum(float(value.abs().sum()) for value in gradients if value is not None) > 0


@FAMILIES
def test_frozen_weights_in_bf16_predict_the_same_bits_under_lora(
    family: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    """Autocast rounds them at every call in any case; the adapter stays fp32, when it is made and when it is loaded."""
    found, made_at_first = [], []
    for weights in ("bf16", "fp32"):
        config = _config(family, folders[family], precision="bf16", weights=weights)
        generator = load_generator(config, ROOT)
        generator.add_lora(LoraConfig(rank=2, alpha=4.0), seed=0)
        adapter = {n: v for n, v in generator.network.named_parameters() if ".lora_" in n}
        assert adapter
        held = {v.dtype for n, v in generator.network.named_parameters() if v.ndim == 2 and n not in adapter}
        assert (torch.bfloat16 in held) == (weights == "bf16")
        assert {value.dtype for value in adapter.values()} == {torch.float32}
        made_at_first.append({name: value.detach().clone() for name, value in adapter.items()})
        if weights == "bf16":
            with torch.no_grad():
                for number, value in enumerate(adapter.values()):
                    value.copy_(torch.randn(value.shape, generator=torch.Generator().manual_seed(number)) / 10)
            generator.save_network(tmp_path)
        other = load_generator(config, ROOT)
        other.load_network(tmp_path)
        for made in (generator, other) if weights == "bf16" else (other,):
            with torch.no_grad():
                found.append(made.predict(_noise(made), torch.full((2,), 0.7), _conditioning(config)))
    before = load_generator(_config(family, folders[family], precision="bf16"), ROOT)
    with torch.no_grad():
        assert not torch.equal(
            before.predict(_noise(before), torch.full((2,), 0.7), _conditioning(before.config)), found[0]
        )
    # Loaded, the scale is in B.
    torch.testing.assert_close(found[1], found[0], atol=1e-3, rtol=0)
    assert torch.equal(found[1], found[2])
    bf16, fp32 = made_at_first
    assert all(torch.equal(value, fp32[name].bfloat16().float()) for name, value in bf16.items())


@FAMILIES
def test_full_weights_load_into_the_stock_pipeline(family: str, folders: dict[str, Path], tmp_path: Path) -> None:
    config = _config(family, folders[family])
    generator = load_generator(config, ROOT)
    with torch.no_grad():
        for value in generator.network.parameters():
            value.add_(0.01)
    generator.save_network(tmp_path)
    part, kind = generator.network_folder, type(generator.network)
    stock = kind.from_pretrained(tmp_path, subfolder=part).state_dict()
    assert all(torch.equal(stock[name], value) for name, value in generator.network.state_dict().items())
    other = load_generator(config, ROOT)
    other.load_network(tmp_path)
    noise, conditioning, time = _noise(generator), _conditioning(config), torch.full((2,), 0.7)
    with torch.no_grad():
        assert torch.equal(other.predict(noise, time, conditioning), generator.predict(noise, time, conditioning))


@FAMILIES
def test_lora_loads_into_the_stock_pipeline(family: str, folders: dict[str, Path], tmp_path: Path) -> None:
    config = _config(family, folders[family])
    generator = load_generator(config, ROOT)
    noise, conditioning, time = _noise(generator), _conditioning(config), torch.full((2,), 0.7)
    with torch.no_grad():
        base = generator.predict(noise, time, conditioning)
    generator.add_lora(LoraConfig(rank=2, alpha=7.0), seed=0)
    with torch.no_grad():
        for index, value in enumerate(value for value in generator.network.parameters() if value.requires_grad):
            value.add_(0.02 * (index % 5 + 1))
        ours = generator.predict(noise, time, conditioning)
    generator.save_network(tmp_path)
    assert float((ours - base).abs().max()) > 1e-3
    pipeline = _stock({"wan": WanPipeline, "sd": StableDiffusionPipeline}[family], folders[family])
    pipeline.load_lora_weights(tmp_path)
    fresh = load_generator(config, ROOT)
    fresh.network = getattr(pipeline, generator.network_folder).eval()
    again = load_generator(config, ROOT)
    again.load_network(tmp_path)
    again.load_network(tmp_path)
    for found in (fresh, again):
        with torch.no_grad():
            torch.testing.assert_close(found.predict(noise, time, conditioning), ours, atol=1e-5, rtol=0)


@FAMILIES
def test_the_negative_prompt_is_stored_once(family: str, folders: dict[str, Path], tmp_path: Path) -> None:
    config = _config(family, folders[family])
    prompts = [Prompt(prompt_id(text), text, {}) for text in PROMPTS]
    source = tmp_path / "eval.jsonl"
    source.write_text("".join(json.dumps(vars(prompt)) + "\n" for prompt in prompts))
    encode_prompt_file(config, ROOT, source, tmp_path / "eval.safetensors", {})
    expected = _conditioning(config)
    found = stack_conditioning(
        load_embeddings(tmp_path / "eval.safetensors", prompts), [prompt.id for prompt in prompts]
    )
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert not torch.equal(found["encoder_hidden_states"][0], found["encoder_hidden_states"][1])


def _index(**changes: object) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "model_index.json", **changes)


@pytest.mark.parametrize(
    ("family", "damage", "changes", "message"),
    [
        ("wan", _index(boundary_ratio=0.9), {}, r"two transformers \(Wan 2\.2\)"),
        ("wan", _index(transformer_2=["diffusers", "WanTransformer3DModel"]), {}, r"two transformers"),
        ("wan", _index(expand_timesteps=True), {}, r"its own timestep"),
        ("wan", _index(vae=["diffusers", "AutoencoderKL"]), {}, r"vae class 'AutoencoderKL' is not one of Autoencoder"),
        ("wan", _index(transformer=[None, None]), {}, r"transformer class 'None' is not one of WanTransformer3DModel"),
        ("wan", None, {"frames": None}, r"generator\.frames None: .*makes videos: set"),
        ("wan", None, {"frames": 8}, r"generator\.frames 8 is not of the form 1 \+ 4 k"),
        ("wan", None, {"height": 40}, r"generator\.height 40 is not a multiple of 16"),
        ("sd", None, {"width": 33}, r"generator\.width 33 is not a multiple of 2"),
        ("sd", None, {"frames": 5}, r"generator\.frames 5: .*makes pictures"),
        (
            "sd",
            lambda folder: edit_json(folder / "scheduler/scheduler_config.json", prediction_type="v_prediction"),
            {},
            r"prediction_type 'v_prediction'",
        ),
    ],
)
def test_what_an_adapter_does_not_hold_is_named(
    family: str,
    damage: Callable[[Path], None] | None,
    changes: dict[str, object],
    message: str,
    folders: dict[str, Path],
    tmp_path: Path,
) -> None:
    folder = folders[family]
    if damage is not None:
        folder = shutil.copytree(folder, tmp_path / "changed")
        damage(folder)
    with pytest.raises(GeneratorError, match=message):
        load_generator(_config(family, folder, **changes), ROOT)
