"""What a checkpoint, its parts and its scheduler hold that an adapter does not: refused by name, before it is used."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import edit_json, edit_tensors, faulty, generator_config
from diffusers import CogVideoXDDIMScheduler, DDIMScheduler, PNDMScheduler, StableDiffusionPipeline
from families import FAMILIES
from safetensors.torch import load_file
from torch import Tensor

from vipo.config.compose import load_config
from vipo.config.generator import GeneratorConfig
from vipo.config.sampling import SamplingConfig
from vipo.config.training import LoraConfig
from vipo.generators import Generator, GeneratorError, load_generator
from vipo.generators.configured import resolve_class
from vipo.generators.lora import LORA_FILE, check_adapted
from vipo.generators.parts import load_part
from vipo.generators.schedules import flow_shift, noise_schedule
from vipo.sampling.chain import chain_remarks, sampling_chain
from vipo.training.distribution import Distribution
from vipo.training.setup import load_chain

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def folders(tiny_generator: Path, tiny_wan: Path, tiny_stable_diffusion: Path) -> dict[str, Path]:
    return {"flux": tiny_generator, "wan": tiny_wan, "sd": tiny_stable_diffusion}


def _load(family: str, folder: Path) -> Generator:
    return load_generator(generator_config(family, folder), ROOT)


def _encode(config: GeneratorConfig, root: Path) -> list[dict[str, Tensor]]:
    return resolve_class(config).encode_prompts(config, root, ["a fox"])


def test_names_and_counters_of_older_files_are_read(tiny_stable_diffusion: Path, tmp_path: Path) -> None:
    """Stable Diffusion 1.5's own files: a prefix, the positions, and the autoencoder's attention by its old names."""
    folder = shutil.copytree(tiny_stable_diffusion, tmp_path / "sd")
    expected = _encode(generator_config("sd", folder), ROOT)

    def older(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            tensors[f"text_model.{name}"] = tensors.pop(name)
        tensors["text_model.embeddings.position_ids"] = torch.arange(16)[None]

    edit_tensors(folder / "text_encoder", older)
    [found] = _encode(generator_config("sd", folder), ROOT)
    assert all(torch.equal(found[name], value) for name, value in expected[0].items())
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def attention(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if ".attentions." in name]:
            for new, before in old.items():
                if f".{new}." in name:
                    tensors[name.replace(f".{new}.", f".{before}.")] = tensors.pop(name)

    edit_tensors(folder / "vae", attention)
    assert _load("sd", folder).latent_shape == (4, 16, 16)


@pytest.mark.parametrize("family", ["hunyuan_video", "sana", "wan", "z_image"])
def test_a_text_encoder_saved_with_its_language_model_is_read_without(family: str, tmp_path: Path) -> None:
    """As the stock pipelines do, whether or not the configuration ties the head to the embeddings."""
    folder = FAMILIES[family].write(tmp_path / family)
    config = FAMILIES[family].config(folder)
    [expected] = _encode(config, ROOT)

    def whole(tensors: dict[str, Tensor]) -> None:
        if family == "wan":
            tensors["decoder.final_layer_norm.weight"] = torch.ones(32)
        else:
            for name in list(tensors):
                tensors[f"model.{name}"] = tensors.pop(name)
        tensors["lm_head.weight"] = torch.ones(8, 32)

    edit_tensors(folder / "text_encoder", whole)
    for tied in (True, False):
        edit_json(folder / "text_encoder/config.json", tie_word_embeddings=tied)
        [found] = _encode(config, ROOT)
        assert all(torch.equal(found[name], value) for name, value in expected.items())
    edit_tensors(folder / "text_encoder", lambda tensors: tensors.update({"head.weight": torch.ones(8)}))
    with pytest.raises(GeneratorError, match=r"extra: head\.weight; if"):
        _encode(config, ROOT)


@pytest.mark.parametrize("variant", ["fp16", "non_ema"])
def test_weights_that_are_there_as_a_variant_only_are_read(
    variant: str, tiny_stable_diffusion: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_stable_diffusion, tmp_path / "sd")
    for part in ("text_encoder", "unet", "vae"):
        [file] = (folder / part).glob("*.safetensors")
        file.rename(file.with_name(file.name.replace(".safetensors", f".{variant}.safetensors")))
    found, expected = _load("sd", folder).network, _load("sd", tiny_stable_diffusion).network
    assert all(torch.equal(a, b) for a, b in zip(found.parameters(), expected.parameters(), strict=True))
    _encode(generator_config("sd", folder), ROOT)
    [file] = (folder / "unet").glob("*.safetensors")
    for other in ("other", "another"):
        file.with_name(f"diffusion_pytorch_model.{other}.safetensors").write_bytes(file.read_bytes())
    if variant == "fp16":
        _load("sd", folder)
    else:
        with pytest.raises(GeneratorError, match=r"unet: its weights are there only as the variants another, non_ema"):
            _load("sd", folder)


def test_of_a_hub_id_that_has_variants_alone_the_way_round_is_told(tiny_stable_diffusion: Path) -> None:
    def absent(*_: object, **__: object) -> None:
        raise OSError("no file named diffusion_pytorch_model.safetensors")

    told = r"acme/big/vae: .* has variants only, such as \*\.fp16\.safetensors or \*\.bf16\.safetensors, download it"
    with pytest.raises(GeneratorError, match=told):
        load_part(absent, "acme/big", "vae", generator_config("sd", tiny_stable_diffusion))


@pytest.mark.parametrize("family", ["flux", "sd", "wan"])
def test_trained_weights_with_another_tensor_are_refused(family: str, folders: dict[str, Path], tmp_path: Path) -> None:
    generator = _load(family, folders[family])
    generator.save_network(tmp_path / "whole")
    edit_tensors(tmp_path / "whole" / generator.network_folder, faulty)
    with pytest.raises(GeneratorError, match=r"missing: .*extra: lora_A\.weight.*train the run again"):
        generator.load_network(tmp_path / "whole")


def _drop(tensors: dict[str, Tensor]) -> None:
    del tensors[next(name for name in sorted(tensors) if ".lora_B." in name)]


def _add(tensors: dict[str, Tensor]) -> None:
    tensors["transformer.nowhere.lora_A.weight"] = torch.ones(2, 2)


def _stray(tensors: dict[str, Tensor]) -> None:
    tensors["alpha"] = torch.ones(1)


def _reshape(tensors: dict[str, Tensor]) -> None:
    tensors[next(name for name in sorted(tensors) if ".lora_A." in name)] = torch.ones(2, 3)


def _round(tensors: dict[str, Tensor]) -> None:
    name = min(tensors)
    tensors[name] = tensors[name].to(torch.int32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_drop, r"missing: transformer\..*\.lora_B\.weight"),
        (_add, r"extra: transformer\.nowhere\.lora_A\.weight"),
        (_stray, "extra: alpha"),
        (_reshape, r"of another shape: transformer\..*lora_A\.weight \(2, 3\)"),
        (_round, r"not of floating point: transformer\..* \(I32\)"),
        (lambda tensors: tensors.clear(), "missing: every one"),
    ],
)
def test_lora_weights_with_another_tensor_are_refused(
    change: Callable[[dict[str, Tensor]], object], message: str, tiny_generator: Path, tmp_path: Path
) -> None:
    generator = _load("flux", tiny_generator)
    generator.add_lora(LoraConfig(rank=2), seed=0)
    tmp_path.joinpath("weights").mkdir()
    generator.save_network(tmp_path / "weights")
    generator.load_network(tmp_path / "weights")
    edit_tensors(tmp_path / "weights", change)
    with pytest.raises(GeneratorError, match=message):
        generator.load_network(tmp_path / "weights")


def test_lora_weights_without_a_module_that_was_trained_are_refused(tiny_generator: Path, tmp_path: Path) -> None:
    generator, lora = _load("flux", tiny_generator), LoraConfig(rank=2)
    generator.add_lora(lora, seed=0)
    tmp_path.joinpath("weights").mkdir()
    generator.save_network(tmp_path / "weights")
    generator.load_network(tmp_path / "weights")
    check_adapted(generator, lora.targets, tmp_path)
    [first] = {min(load_file(tmp_path / "weights" / LORA_FILE)).partition(".lora_")[0]}

    def lose(tensors: dict[str, Tensor]) -> None:
        for side in "AB":
            del tensors[f"{first}.lora_{side}.weight"]

    edit_tensors(tmp_path / "weights", lose)
    generator.load_network(tmp_path / "weights")
    with pytest.raises(GeneratorError, match=f"missing: {first.removeprefix('transformer.')}.lora_A.weight"):
        check_adapted(generator, lora.targets, tmp_path)


def test_a_lora_target_that_names_nothing_is_named(tiny_generator: Path) -> None:
    generator = _load("flux", tiny_generator)
    with pytest.raises(GeneratorError, match=r"targets \['to_qq'\]: matches no module of Flux.*did you mean 'to_q'"):
        generator.add_lora(LoraConfig(targets=("to_k", "to_qq")), seed=0)
    with pytest.raises(GeneratorError, match=r"targets \['to_out\.1x'\]: matches no module"):
        generator.add_lora(LoraConfig(targets=("to_out.0", "to_out.1x")), seed=0)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("offset", [0, 1])
def test_timesteps_are_the_stock_schedulers(
    spacing: str, offset: int, tiny_stable_diffusion: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "sd"
    shutil.copytree(tiny_stable_diffusion / "scheduler", folder / "scheduler")
    edit_json(folder / "scheduler/scheduler_config.json", timestep_spacing=spacing, steps_offset=offset)
    config = generator_config("sd", folder)
    for name, kind in (("DDIMScheduler", DDIMScheduler), ("PNDMScheduler", PNDMScheduler)):
        edit_json(folder / "scheduler/scheduler_config.json", _class_name=name, skip_prk_steps=True)
        schedule = noise_schedule(folder, {"scheduler": ["diffusers", name]}, config)
        alphas, timesteps = schedule.alphas_cumprod, schedule.timesteps
        stock = kind.from_pretrained(folder, subfolder="scheduler")
        for steps in (*range(2, 60), 100, 333, 500, 999, 1000):
            sampling = SamplingConfig(steps=steps, transition="ddim")
            if spacing == "leading" and offset == 1 and steps in (500 * 2, 333 * 3 + 1):
                with pytest.raises(
                    GeneratorError, match=r"timestep_spacing 'leading' with steps_offset 1 makes of 1000"
                ):
                    sampling_chain(sampling, "noise", alphas, timesteps)
                continue
            chain = sampling_chain(sampling, "noise", alphas, timesteps)
            stock.set_timesteps(steps)
            assert chain.times.tolist() == list(dict.fromkeys(stock.timesteps.tolist())), (name, steps)
            torch.testing.assert_close(chain.levels[:-1], stock.alphas_cumprod[chain.times.long()], atol=0, rtol=0)


def test_a_scheduler_that_visits_other_timesteps_is_named(tiny_stable_diffusion: Path, tmp_path: Path) -> None:
    folder = tmp_path / "sd"
    shutil.copytree(tiny_stable_diffusion / "scheduler", folder / "scheduler")
    config, index = generator_config("sd", folder), {"scheduler": ["diffusers", "EulerDiscreteScheduler"]}
    timesteps = noise_schedule(folder, index, config).timesteps
    assert timesteps(4).tolist() == [751, 501, 251, 1]
    edit_json(folder / "scheduler/scheduler_config.json", use_karras_sigmas=True)
    timesteps = noise_schedule(folder, index, config).timesteps
    with pytest.raises(GeneratorError, match=r"'EulerDiscreteScheduler' with use_karras_sigmas visits other timesteps"):
        timesteps(4)
    with pytest.raises(GeneratorError, match=r"scheduler class 'Nothing' is none of diffusers'"):
        noise_schedule(folder, {"scheduler": ["diffusers", "Nothing"]}, config)


def test_clipping_that_the_stock_pipeline_does_not_do_is_no_reason_to_refuse(
    tiny_stable_diffusion: Path, tmp_path: Path
) -> None:
    """A file that does not name it gives the class's own default, which the pipeline calls outdated and mends."""
    folder = shutil.copytree(tiny_stable_diffusion, tmp_path / "sd")
    path = folder / "scheduler/scheduler_config.json"
    settings = json.loads(path.read_text())
    del settings["clip_sample"]
    path.write_text(json.dumps(settings))
    assert DDIMScheduler.from_pretrained(folder, subfolder="scheduler").config.clip_sample
    options = {"safety_checker": None, "feature_extractor": None}
    assert not StableDiffusionPipeline.from_pretrained(folder, **options).scheduler.config.clip_sample
    _load("sd", folder)
    # The step of CogVideoX's makes the same of the same, whatever it says.
    stepped = []
    for cuts in (True, False):
        scheduler = CogVideoXDDIMScheduler(clip_sample=cuts)
        scheduler.set_timesteps(4)
        noisy = 9 * torch.ones(1, 4)
        stepped.append(scheduler.step(-noisy, int(scheduler.timesteps[0]), noisy, return_dict=False)[0])
    assert torch.equal(*stepped)
    CogVideoXDDIMScheduler(prediction_type="v_prediction").save_pretrained(tmp_path / "cogvideox/scheduler")
    index = {"_class_name": "CogVideoXPipeline", "scheduler": ["diffusers", "CogVideoXDDIMScheduler"]}
    config = generator_config("cogvideox", tmp_path / "cogvideox")
    noise_schedule(tmp_path / "cogvideox", index, config, CogVideoXDDIMScheduler)


def test_the_generator_gives_its_checkpoints_timesteps(tiny_stable_diffusion: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_stable_diffusion, tmp_path / "sd")
    edit_json(folder / "scheduler/scheduler_config.json", timestep_spacing="trailing")
    generator = _load("sd", folder)
    assert generator.timesteps is not None
    assert generator.timesteps(4).tolist() == [999, 749, 499, 249]


def test_a_shift_that_is_not_the_checkpoints_is_told(tiny_generator: Path, tiny_wan: Path, tmp_path: Path) -> None:
    def told(shift: float, given: float | Callable[[int], float] | None) -> list[str]:
        sampling = SamplingConfig(shift=shift)
        return chain_remarks(sampling_chain(sampling, "velocity"), sampling, given, None)

    assert _load("wan", tiny_wan).flow_shift == 3.0
    own = _load("flux", tiny_generator).flow_shift
    assert own == json.loads((tiny_generator / "scheduler/scheduler_config.json").read_text())["shift"]
    assert told(3.0, 3.0) == told(3.0, None) == []
    assert told(3.0, lambda steps: 5.0 if steps == 10 else 3.0)[0].endswith(
        "shifts by 5 at this size in 10 steps. Set it to that unless another one is meant"
    )
    assert told(3.0, 5.0)[0].startswith("sampling.shift 3 is not the checkpoint's: its scheduler shifts by 5 ")
    folder = tmp_path / "scheduler"
    shutil.copytree(tiny_generator / "scheduler", folder)
    edit_json(folder / "scheduler_config.json", use_dynamic_shifting=True)
    # exp(0.5) at 256 tokens and exp(1.15) at 4096, as in the stock pipeline.
    config = generator_config("flux", tmp_path)
    assert flow_shift(tmp_path, config, 256) == pytest.approx(1.6487, abs=1e-4)
    assert flow_shift(tmp_path, config, 4096) == pytest.approx(3.1582, abs=1e-4)
    edit_json(folder / "scheduler_config.json", use_dynamic_shifting=False, _class_name="UniPCMultistepScheduler")
    edit_json(folder / "scheduler_config.json", use_flow_sigmas=True, flow_shift=5.0)
    assert flow_shift(tmp_path, config) == 5.0


def test_a_chain_that_starts_far_from_noise_is_told(tiny_stable_diffusion: Path) -> None:
    generator = _load("sd", tiny_stable_diffusion)
    told = {}
    for steps, shift in ((4, 3.0), (10, 3.0), (10, 2.0)):
        sampling = SamplingConfig(transition="ddim", steps=steps, shift=shift)
        chain = sampling_chain(sampling, "noise", generator.alphas_cumprod, generator.timesteps)
        told[steps, shift] = chain_remarks(chain, sampling, None, 1000)
    assert told[10, 3.0] == []
    assert "4 steps start at timestep 751 of 1000" in told[4, 3.0][0]
    assert told[10, 2.0] == ["sampling.shift 2 has no effect on a generator that predicts noise"]


def test_an_evaluation_that_starts_far_from_noise_is_told_before_training(
    tiny_stable_diffusion: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = load_config(["experiment=demo", "sampling.transition=ddim", "sampling.shift=2", "evaluation.steps=4"])
    generator, alone = _load("sd", tiny_stable_diffusion), Distribution(config.distribution, "cpu")
    assert load_chain(config, ROOT, generator, alone).steps == config.sampling.steps
    assert [record.getMessage().partition(",")[0] for record in caplog.records] == [
        "sampling.shift 2 has no effect on a generator that predicts noise",
        "sampling: 4 steps start at timestep 751 of 1000",
    ]
    with pytest.raises(GeneratorError, match=r"steps_offset 1 makes of 1000 steps"):
        load_chain(
            load_config(["experiment=demo", "sampling.transition=ddim", "evaluation.steps=1000"]),
            ROOT,
            generator,
            alone,
        )


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("scheduler/scheduler_config.json", "[]"),
        ("transformer/config.json", "null"),
        ("vae/config.json", '"x"'),
        ("vae/config.json", {"z_dim": None}),
        ("vae/config.json", {"scale_factor_spatial": None}),
        ("vae/config.json", {"latents_mean": "x"}),
        ("model_index.json", {"transformer_2": 5}),
    ],
)
def test_configurations_of_another_kind_are_told(
    file: str, content: str | dict[str, object], tiny_wan: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_wan, tmp_path / "wan")
    if isinstance(content, str):
        (folder / file).write_text(content)
    else:
        edit_json(folder / file, **content)
    told = r"a setting .* is not of the kind .*\(Type"
    if isinstance(content, str):
        told = "its configuration holds no mapping"
    elif "latents_mean" in content:
        told = "latents_mean 'x' is no list of numbers"
    with pytest.raises(GeneratorError, match=f"{folder}.*: {told}"):
        load_generator(generator_config("wan", folder), ROOT)


def test_a_setting_that_a_call_reads_first_is_an_error_of_the_checkpoint(tiny_generator: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_generator, tmp_path / "flux")
    edit_json(folder / "transformer/config.json", axes_dims_rope=None)
    generator = _load("flux", folder)
    [text] = _encode(generator_config("flux", folder), ROOT)
    given = {name: value[None] for name, value in text.items()}
    told = rf"generator\.path {folder}: its network computes no prediction \(TypeError"
    with pytest.raises(GeneratorError, match=told) as caught:
        generator.predict(torch.zeros(1, *generator.latent_shape), torch.ones(1), given)
    assert caught.value.foreign


def test_an_autoencoder_that_cannot_decode_is_an_error_of_the_checkpoint(
    tiny_generator: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = _load("flux", tiny_generator)
    monkeypatch.setattr(generator.vae, "decode", None)
    with pytest.raises(GeneratorError, match=r"its autoencoder decodes no latents \(TypeError"):
        generator.pictures(torch.zeros(1, *generator.latent_shape))

    def lost(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("gone")

    # What tells of the device is nobody's setting.
    monkeypatch.setattr(generator.vae, "decode", lost)
    with pytest.raises(torch.OutOfMemoryError):
        generator.pictures(torch.zeros(1, *generator.latent_shape))


def test_weights_that_can_hold_code_are_named(tiny_wan: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_wan, tmp_path / "wan")
    [file] = (folder / "transformer").glob("*.safetensors")
    file.rename(file.with_suffix(".bin"))
    with pytest.raises(GeneratorError, match=r"transformer: cannot be loaded .* vipo reads no \*\.bin"):
        load_generator(generator_config("wan", folder), ROOT)
