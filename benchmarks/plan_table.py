"""Memory and operations of an update, of each generator at its real size: computed by `vipo plan`, nothing is measured.

    python -m benchmarks.plan_table FILE.json [NAME...]     # counts the named generators (all), keeps the other rows
    python -m benchmarks.plan_table FILE.json --table       # prints what docs/generators.md shows

Configurations alone decide, and no checkpoint is at hand: settings of network and autoencoder are those that the
checkpoints' authors published, as far as their class's defaults are not these already. The number of parameters in each
row says whether they are.
"""

import json
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.gpu.sizes import REAL
from vipo.config.compose import load_config, load_generator_sections, repository_root, write_if_changed
from vipo.generators.configured import resolve_class
from vipo.generators.outline import outline
from vipo.training.plan import plan

_TRANSFORMER = REAL["flux"].parts["transformer"]
_FLUX_VAE, _SD35 = REAL["flux"].parts["vae"], REAL["sd3_lora"].parts
_SD_VAE = {**_FLUX_VAE, "latent_channels": 4, "use_quant_conv": True, "use_post_quant_conv": True, "shift_factor": None}
_FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
_DYNAMIC = {**_FLOW, "use_dynamic_shifting": True}
_NOISE = {
    "_class_name": "DDIMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "clip_sample": False,
}
_DC_BLOCKS = ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3
_DC_SCALES: list[list[int]] = [[], [], [], [5], [5], [5]]


@dataclass(frozen=True)
class Published:
    """A checkpoint's settings beside its classes' defaults.

    Attributes:
        network, vae: of both.
        others: of parts that are looked at and not counted, by subfolder.
        scheduler: with its class.
        index: of ``model_index.json``.
    """

    network: Mapping[str, Any] = field(default_factory=dict)
    vae: Mapping[str, Any] = field(default_factory=dict)
    scheduler: Mapping[str, Any] = field(default_factory=lambda: _FLOW)
    index: Mapping[str, Any] = field(default_factory=dict)
    others: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


GENERATORS: Mapping[str, Published] = {
    "stable_diffusion": Published({"cross_attention_dim": 768}, _SD_VAE, _NOISE),
    "sdxl": Published(
        {
            "sample_size": 128,
            "block_out_channels": [320, 640, 1280],
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            "attention_head_dim": [5, 10, 20],
            "cross_attention_dim": 2048,
            "transformer_layers_per_block": [1, 2, 10],
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
            "use_linear_projection": True,
        },
        _SD_VAE,
        _NOISE,
    ),
    "sd35_medium": Published(_SD35["transformer"], _SD35["vae"]),
    "sd35_large": Published(
        {
            **_SD35["transformer"],
            "num_layers": 38,
            "num_attention_heads": 38,
            "caption_projection_dim": 2432,
            "pos_embed_max_size": 192,
            "dual_attention_layers": [],
        },
        _SD35["vae"],
    ),
    "flux_dev": Published(_TRANSFORMER, _FLUX_VAE, _DYNAMIC),
    "flux2_klein": Published(
        {
            "num_layers": 5,
            "num_single_layers": 20,
            "num_attention_heads": 24,
            "joint_attention_dim": 7680,
            "guidance_embeds": False,
        },
        scheduler=_DYNAMIC,
    ),
    "flux2_dev": Published(scheduler=_DYNAMIC),
    "qwen_image": Published(scheduler=_DYNAMIC),
    "qwen_image_21": Published(scheduler=_DYNAMIC),
    "z_image": Published(vae=_FLUX_VAE),
    "sana": Published(
        vae={
            "encoder_block_types": _DC_BLOCKS,
            "decoder_block_types": _DC_BLOCKS,
            "encoder_block_out_channels": [128, 256, 512, 512, 1024, 1024],
            "decoder_block_out_channels": [128, 256, 512, 512, 1024, 1024],
            "encoder_layers_per_block": [2, 2, 2, 3, 3, 3],
            "decoder_layers_per_block": [3, 3, 3, 3, 3, 3],
            "encoder_qkv_multiscales": _DC_SCALES,
            "decoder_qkv_multiscales": _DC_SCALES,
            "upsample_block_type": "interpolate",
            "downsample_block_type": "Conv",
        }
    ),
    "wan": Published(REAL["wan"].parts["transformer"]),
    "wan22_ti2v": Published(
        {
            "num_attention_heads": 24,
            "num_layers": 30,
            "ffn_dim": 14336,
            "in_channels": 48,
            "out_channels": 48,
        },
        {
            "base_dim": 160,
            "decoder_base_dim": 256,
            "z_dim": 48,
            "is_residual": True,
            "in_channels": 12,
            "out_channels": 12,
            "patch_size": 2,
            "scale_factor_spatial": 16,
            "latents_mean": [0.0] * 48,
            "latents_std": [1.0] * 48,
        },
        index={"expand_timesteps": True},
    ),
    "wan22_a14b": Published(index={"boundary_ratio": 0.875}),
    "hunyuan_video": Published(),
    "ltx2": Published(
        {"rope_type": "split"},
        {"decoder_causal": False, "spatial_compression_ratio": 32, "temporal_compression_ratio": 8},
        _DYNAMIC,
        others={"connectors": {}},
    ),
    "cogvideox": Published(
        scheduler={
            "_class_name": "CogVideoXDDIMScheduler",
            "prediction_type": "v_prediction",
            "timestep_spacing": "trailing",
            "rescale_betas_zero_snr": True,
        }
    ),
}

MODES: Mapping[str, tuple[int, tuple[str, ...]]] = {
    "LoRA 16, bf16": (1, ("training.lora={rank: 16, alpha: 16}", "generator.weights=bf16")),
    "all weights": (8, ("distribution.strategy=fsdp", "distribution.processes=8")),
}
"""What is trained, by how many GPUs."""

# One update: 8 prompts x 8 samples, 10 steps of which 4 are trained.
_UPDATE = (
    "experiment=demo",
    "arm=grpo",
    "prompts=file",
    "prompts.source=prompts.txt",
    "reward=redness",
    "evaluation.rewards=[redness]",
    "evaluation.batch=1",
    "training.prompts_per_update=8",
    "training.group_size=8",
    "training.optimizer_steps_per_update=2",
    "training.trained_transitions=4",
    "training.micro_batch=1",
    "training.gradient_checkpointing=true",
    "training.save_at=[]",
    "sampling.steps=10",
    "generator.precision=bf16",
)
# Of an H100's 989 in bf16.
_TFLOPS = 400


def write_checkpoint(name: str, folder: Path) -> None:
    """A checkpoint's configurations, without weights.

    Args:
        name: of `configs/generator/`.
        folder: exists.
    """
    published = GENERATORS[name]
    generator, _ = load_generator_sections([f"generator={name}"])
    kind: Any = resolve_class(generator)
    autoencoder = next(iter(kind.autoencoders))
    parts = {kind.network_folder: (kind.network_class.__name__, published.network), "vae": (autoencoder, published.vae)}
    if kind.second_folder is not None:
        parts[kind.second_folder] = (kind.network_class.__name__, published.network)
    index: dict[str, Any] = {"_class_name": kind.pipeline_class.__name__, **published.index}
    for part, (class_name, settings) in parts.items():
        index[part] = ["diffusers", class_name]
        (folder / part).mkdir()
        (folder / part / "config.json").write_text(json.dumps({"_class_name": class_name, **settings}))
    for part, settings in published.others.items():
        (folder / part).mkdir()
        (folder / part / "config.json").write_text(json.dumps(settings))
    index["scheduler"] = ["diffusers", published.scheduler["_class_name"]]
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(dict(published.scheduler)))
    (folder / "model_index.json").write_text(json.dumps(index))


def row(name: str, mode: str) -> dict[str, Any]:
    """One generator's cells in one mode."""
    gpus, training = MODES[mode]
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(name, Path(folder))
        overrides = [*_UPDATE, *training, f"generator={name}", f"generator.path={folder}"]
        if "DDIM" in GENERATORS[name].scheduler["_class_name"]:
            overrides.append("sampling.transition=ddim")
        config = load_config(overrides)
        found = plan(config, repository_root(), prompts=config.training.prompts_per_update)
        shapes = FakeTensorMode(allow_non_fake_inputs=True)
        network = outline(config.generator, repository_root(), shapes, None).network
    generator = config.generator
    size = f"{generator.height} x {generator.width}" + (f" x {generator.frames}" if generator.frames else "")
    return {
        "generator": name,
        "parameters": sum(value.numel() for value in network.parameters()),
        "size": size,
        "mode": mode,
        "gpus": gpus,
        "bytes": found.peak,
        "evaluation": found.evaluation,
        "flops": found.flops,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """As docs/generators.md shows it."""
    lines = [
        "| generator | parameters | sample | trained | GPUs | GiB a GPU (computed) | GiB of an evaluation (computed) "
        "| PFLOP an update (computed) | seconds an update (computed) |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for each in rows:
        seconds = each["flops"] / each["gpus"] / _TFLOPS / 1e12
        lines.append(
            f"| `{each['generator']}` | {each['parameters'] / 1e9:.1f} B | {each['size']} | {each['mode']} | "
            f"{each['gpus']} | {each['bytes'] / 2**30:.0f} | {each['evaluation'] / 2**30:.0f} "
            f"| {each['flops'] / 1e15:,.0f} | {seconds:,.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """See above."""
    recount(sys.argv[1:], "generator", dict.fromkeys(GENERATORS, MODES), row, table)


def recount(
    arguments: Sequence[str],
    key: str,
    cells: Mapping[str, Iterable[str]],
    count: Callable[[str, str], dict[str, Any]],
    show: Callable[[list[dict[str, Any]]], str],
) -> None:
    """Count the named rows of a file of figures, and keep the others; or print what the page shows of all.

    Args:
        arguments: the file, then the names, or `--table`.
        key: of an entry, under which its row's name stands.
        cells: what is counted of each row, in the order of the page.
        count: an entry.
        show: what the page shows of entries.
    """
    path, names = Path(arguments[0]), list(arguments[1:])
    known: list[dict[str, Any]] = json.loads(path.read_text()) if path.is_file() else []
    if names == ["--table"]:
        print(show(known))
        return
    for name in names or cells:
        known = [each for each in known if each[key] != name] + [count(name, cell) for cell in cells[name]]
        known.sort(key=lambda each: list(cells).index(each[key]))
        write_if_changed(path, json.dumps(known, indent=1) + "\n")
        print(name, flush=True)


if __name__ == "__main__":
    main()
