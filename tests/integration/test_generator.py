"""The adapter against the stock FluxPipeline, on the shipped checkpoint and on tiny ones of the same class."""

import gc
import json
import shutil
import weakref
from pathlib import Path
from typing import Literal

import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

from vipo.config.generator import GeneratorConfig
from vipo.config.sampling import SamplingConfig
from vipo.config.training import LoraConfig
from vipo.generators import GeneratorError, load_generator
from vipo.generators.flux import FluxGenerator, image_ids
from vipo.generators.packing import pack_latents, unpack_latents
from vipo.generators.sharded import load_to_shard
from vipo.sampling.chain import Chain, sampling_chain
from vipo.sampling.noise import keyed_normal
from vipo.sampling.rollout import rollout, sample_ode

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = ["a red circle on a white background", "a small square on the left on a black background"]


def _config(path: Path, **changes: object) -> GeneratorConfig:
    values = {
        "family": "flux",
        "path": str(path),
        "height": 64,
        "width": 64,
        "max_sequence_length": 16,
        "device": "cpu",
    }
    return GeneratorConfig.model_validate(values | changes)


def _chain(steps: int, shift: float) -> Chain:
    return sampling_chain(SamplingConfig(steps=steps, shift=shift, eta=0.7), "velocity")


def _conditioning(config: GeneratorConfig, prompts: list[str]) -> dict[str, torch.Tensor]:
    rows = FluxGenerator.encode_prompts(config, ROOT, prompts)
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def test_shipped_checkpoint_equals_the_stock_pipeline() -> None:
    config = _config(ROOT / "data" / "demo-generator")
    generator = load_generator(config, ROOT)
    pipeline = FluxPipeline.from_pretrained(ROOT / "data" / "demo-generator")
    pipeline.set_progress_bar_config(disable=True)
    conditioning = _conditioning(config, PROMPTS)
    embeds, pooled, _ = pipeline.encode_prompt(PROMPTS, max_sequence_length=16)
    torch.testing.assert_close(conditioning["encoder_hidden_states"], embeds, atol=1e-5, rtol=0)
    torch.testing.assert_close(conditioning["pooled_projections"], pooled, atol=1e-5, rtol=0)

    noise = keyed_normal([(0, "test", 0), (0, "test", 1)], generator.latent_shape)
    steps, shift = 8, pipeline.scheduler.config.shift
    first: list[torch.Tensor] = []
    hook = pipeline.transformer.register_forward_hook(lambda _m, _a, output: first.append(output[0]))
    arguments = {
        "height": 64,
        "width": 64,
        "num_inference_steps": steps,
        "max_sequence_length": 16,
        "guidance_scale": 0.0,
    }
    stock = pipeline(PROMPTS, latents=pack_latents(noise), output_type="pt", **arguments).images
    hook.remove()
    with torch.no_grad():
        ours = generator.predict(noise, torch.ones(2), conditioning)
    torch.testing.assert_close(pack_latents(ours), first[0], atol=1e-5, rtol=0)
    images = generator.decode(sample_ode(generator, conditioning, _chain(steps, shift), noise))
    torch.testing.assert_close(images, stock, atol=1e-5, rtol=0)


def test_guidance_and_autoencoder_kl(tmp_path: Path, tiny_generator: Path) -> None:
    """A guidance-distilled transformer with the big models' autoencoder class: same first prediction and image."""
    folder = tmp_path / "guided"
    shutil.copytree(tiny_generator, folder)
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        scaling_factor=0.36,
        shift_factor=0.12,
    )
    for part in ("transformer", "vae"):
        shutil.rmtree(folder / part)
    transformer.save_pretrained(folder / "transformer")
    vae.save_pretrained(folder / "vae")
    index = json.loads((folder / "model_index.json").read_text())
    index["vae"] = ["diffusers", "AutoencoderKL"]
    (folder / "model_index.json").write_text(json.dumps(index))
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(folder / "scheduler")

    config = _config(folder, height=32, width=48, guidance_scale=3.5)
    generator = load_generator(config, ROOT)
    assert generator.latent_shape == (4, 16, 24)
    pipeline = FluxPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    noise = keyed_normal([(0, "test")], generator.latent_shape)
    stock = pipeline(
        PROMPTS[:1],
        latents=pack_latents(noise),
        height=32,
        width=48,
        num_inference_steps=3,
        guidance_scale=3.5,
        max_sequence_length=16,
        output_type="pt",
    ).images
    conditioning = _conditioning(config, PROMPTS[:1])
    ours = generator.decode(sample_ode(generator, conditioning, _chain(3, 3.0), noise))
    torch.testing.assert_close(ours, stock, atol=1e-5, rtol=0)


def test_packing_is_the_pipelines() -> None:
    latents = torch.arange(2 * 3 * 4 * 6.0).reshape(2, 3, 4, 6)
    packed = pack_latents(latents)
    assert torch.equal(packed, FluxPipeline._pack_latents(latents, 2, 3, 4, 6))
    assert torch.equal(unpack_latents(packed, 4, 6), latents)
    assert torch.equal(image_ids(4, 6, "cpu"), FluxPipeline._prepare_latent_image_ids(2, 2, 3, "cpu", torch.float32))


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_rollout_noise_does_not_depend_on_the_batch(tiny_generator: Path, batch: int) -> None:
    config = _config(tiny_generator)
    generator = load_generator(config, ROOT)
    one = _conditioning(config, PROMPTS[:1])
    chain = _chain(4, 2.0)
    keys = [(0, "initial", 1, "p", index) for index in range(8)]
    steps = [(0, "step", 1, "p", index) for index in range(8)]
    states = []
    for start in range(0, 8, batch):
        part = slice(start, start + batch)
        conditioning = {name: value.expand(len(keys[part]), *value.shape[1:]) for name, value in one.items()}
        states.append(rollout(generator, conditioning, chain, chain.trainable, keys[part], steps[part]).latents)
    noise = torch.cat(states)[:, 0]
    assert torch.equal(noise, keyed_normal(keys, generator.latent_shape))
    whole = rollout(
        generator, {n: v.expand(8, *v.shape[1:]) for n, v in one.items()}, chain, chain.trainable, keys, steps
    )
    # The network's own sums may be ordered by the batch size: equal up to that, the noise exactly.
    torch.testing.assert_close(torch.cat(states), whole.latents, atol=1e-4, rtol=0)


def test_log_probabilities_are_those_of_the_rollout(tiny_generator: Path) -> None:
    config = _config(tiny_generator)
    generator = load_generator(config, ROOT)
    generator.network.requires_grad_(True)
    conditioning = _conditioning(config, PROMPTS)
    chain = _chain(5, 2.0)
    keys = [(0, "k", i) for i in range(2)]
    trajectory = rollout(generator, conditioning, chain, range(0, 3), keys, keys)
    assert torch.equal(trajectory.means[:, 3], trajectory.latents[:, 4])
    for steps in (torch.tensor([0, 2]), torch.tensor([2, 2])):
        latents, value, old_mean = trajectory.at(steps)
        mean, _ = chain.gaussian(latents, generator.predict(latents, chain.times[steps], conditioning), steps)
        assert mean.requires_grad
        assert float((mean.detach() - old_mean).abs().max()) < 1e-5
        assert torch.equal(value, trajectory.latents[torch.arange(2), steps + 1])
        assert torch.equal(old_mean, trajectory.means[torch.arange(2), steps])


def test_full_weights_load_into_the_stock_pipeline(tmp_path: Path, tiny_generator: Path) -> None:
    generator = load_generator(_config(tiny_generator), ROOT)
    with torch.no_grad():
        for value in generator.network.parameters():
            value.add_(0.01)
    generator.save_network(tmp_path / "weights")
    transformer = FluxTransformer2DModel.from_pretrained(tmp_path / "weights", subfolder="transformer")
    FluxPipeline.from_pretrained(tiny_generator, transformer=transformer)
    for name, value in generator.network.state_dict().items():
        assert torch.equal(transformer.state_dict()[name], value), name
    other = load_generator(_config(tiny_generator), ROOT)
    other.load_network(tmp_path / "weights")
    assert all(
        torch.equal(a, b) for a, b in zip(other.network.parameters(), generator.network.parameters(), strict=True)
    )


def test_saved_weights_do_not_say_where_this_machine_keeps_the_generator(tmp_path: Path, tiny_generator: Path) -> None:
    for place in ("here", "there"):
        shutil.copytree(tiny_generator, tmp_path / place / "generator")
        load_generator(_config(Path("generator")), tmp_path / place).save_network(tmp_path / f"{place}-weights")
    here, there = (tmp_path / f"{place}-weights/transformer/config.json" for place in ("here", "there"))
    assert json.loads(here.read_text())["_name_or_path"] == "generator"
    assert here.read_bytes() == there.read_bytes()


@pytest.mark.parametrize("alpha", [2.0, 7.0])
def test_lora_loads_into_the_stock_pipeline(tmp_path: Path, tiny_generator: Path, alpha: float) -> None:
    config = _config(tiny_generator)
    generator = load_generator(config, ROOT)
    generator.add_lora(LoraConfig(rank=2, alpha=alpha), seed=0)
    trained = [value for value in generator.network.parameters() if value.requires_grad]
    with torch.no_grad():
        for index, value in enumerate(trained):
            value.add_(0.02 * (index + 1))
    generator.save_network(tmp_path / "weights")
    noise, conditioning = keyed_normal([(0, "x")], generator.latent_shape), _conditioning(config, PROMPTS[:1])
    with torch.no_grad():
        ours = generator.predict(noise, torch.ones(1), conditioning)
    pipeline = FluxPipeline.from_pretrained(tiny_generator)
    pipeline.load_lora_weights(tmp_path / "weights")
    fresh = load_generator(config, ROOT)
    with torch.no_grad():
        base = fresh.predict(noise, torch.ones(1), conditioning)
        fresh.network = pipeline.transformer.eval()
        stock = fresh.predict(noise, torch.ones(1), conditioning)
    torch.testing.assert_close(stock, ours, atol=1e-5, rtol=0)
    assert float((stock - base).abs().max()) > 1e-3
    again = load_generator(config, ROOT)
    for _ in range(2):
        again.load_network(tmp_path / "weights")
        with torch.no_grad():
            torch.testing.assert_close(again.predict(noise, torch.ones(1), conditioning), ours, atol=1e-5, rtol=0)


def test_a_lora_begins_as_named_by_its_seed(tiny_generator: Path) -> None:
    def matrices(init: Literal["uniform", "gaussian"], seed: int) -> dict[str, list[torch.Tensor]]:
        generator = load_generator(_config(tiny_generator), ROOT)
        generator.add_lora(LoraConfig(rank=8, init=init), seed=seed)
        named = [(name, value.detach()) for name, value in generator.network.named_parameters() if ".lora_" in name]
        return {side: [value for name, value in named if f".lora_{side}." in name] for side in "AB"}

    drawn = matrices("gaussian", 0)
    assert all(not value.any() for value in drawn["B"])
    flat = torch.cat([value.flatten() for value in drawn["A"]])
    assert float(flat.std()) == pytest.approx(1 / 8, rel=0.05)
    assert float(flat.abs().max()) > 3 / 8
    for one, other in zip(drawn["A"], matrices("gaussian", 0)["A"], strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(drawn["A"][0], matrices("gaussian", 1)["A"][0])
    for value in matrices("uniform", 0)["A"]:
        assert float(value.abs().max()) <= value.shape[1] ** -0.5


def test_bad_checkpoints_are_named(tmp_path: Path, tiny_generator: Path) -> None:
    with pytest.raises(GeneratorError, match=r"there is no folder .*nowhere.*generator\.revision"):
        load_generator(_config(tmp_path / "nowhere"), ROOT)
    (tmp_path / "empty").mkdir()
    with pytest.raises(GeneratorError, match=r"no model_index\.json"):
        load_generator(_config(tmp_path / "empty"), ROOT)
    broken = tmp_path / "broken"
    shutil.copytree(tiny_generator, broken)
    weights = broken / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(GeneratorError, match="transformer: cannot be loaded"):
        load_generator(_config(broken), ROOT)
    with pytest.raises(GeneratorError, match=r"generator\.height 60 is not a multiple of 8"):
        load_generator(_config(tiny_generator, height=60), ROOT)
    if not torch.cuda.is_available():
        with pytest.raises(GeneratorError, match="0 CUDA devices"):
            load_generator(_config(tiny_generator, device="cuda"), ROOT)


def test_other_weights_are_loaded_after_the_first_were_let_go_of(
    tmp_path: Path, tiny_generator: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = load_generator(_config(tiny_generator), ROOT)
    generator.save_network(tmp_path)
    old, seen = weakref.ref(generator.network), []
    load = FluxTransformer2DModel.from_pretrained

    def loading(*arguments: object, **options: object) -> object:
        gc.collect()
        first = old()
        seen.append(first is None or all(value.is_meta for value in first.parameters()))
        return load(*arguments, **options)

    monkeypatch.setattr(FluxTransformer2DModel, "from_pretrained", loading)
    generator.load_network(tmp_path)
    assert seen == [True]
    assert all(not value.is_meta for value in generator.network.parameters())


def test_what_waits_for_its_rows_reads_no_weights(tiny_generator: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = _config(tiny_generator)
    whole = load_to_shard(config, ROOT, whole=True)
    assert isinstance(whole, FluxGenerator)
    monkeypatch.setattr(FluxTransformer2DModel, "from_pretrained", None)
    empty = load_to_shard(config, ROOT, whole=False)
    assert all(value.is_meta and value.dtype == torch.float32 for value in empty.network.parameters())
    shapes = [{name: value.shape for name, value in each.network.named_parameters()} for each in (whole, empty)]
    assert shapes[0] == shapes[1]
    assert not any(value.is_meta for value in (*empty.network.buffers(), *empty.vae.parameters()))
    assert empty.latent_shape == whole.latent_shape
    assert not empty.network.training
