"""The shipped generator meets its quality bar, and `vipo base` rebuilds one of its kind reproducibly."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline
from tiny import TINY_PRETRAIN

from vipo.config.compose import load_config, repository_root
from vipo.config.pretrain import PretrainConfig
from vipo.demo import scenes
from vipo.demo.seen import check, read_scenes
from vipo.generators import load_generator
from vipo.generators.embeddings import stack_conditioning
from vipo.generators.flux import FluxGenerator
from vipo.provenance import file_sha256, read_provenance, record_stage, verify_outputs
from vipo.provenance.files import StorageError
from vipo.sampling.chain import sampling_chain
from vipo.sampling.noise import keyed_normal
from vipo.sampling.rollout import sample_ode
from vipo.stages import base_stage
from vipo.training import pretrain, pretrain_autoencoder, pretrain_decoder, pretrain_parts
from vipo.training.checkpoints import load_newest

ROOT = repository_root()


def test_quality_on_held_out_captions() -> None:
    config = load_config(["experiment=demo"])
    generator = load_generator(config.generator, ROOT)
    captions = [pair for pair in scenes.one_object_captions(named_color=True) if scenes.is_held_out(pair[0])]
    assert len(captions) == 149
    samples = [(number, *captions[number % len(captions)]) for number in range(100)]
    encoded = dict(
        zip(
            [text for text, _ in captions],
            FluxGenerator.encode_prompts(config.generator, ROOT, [text for text, _ in captions]),
            strict=True,
        )
    )
    chain = sampling_chain(config.sampling, "velocity", steps=20)
    right = {"shape": 0, "color": 0, "background": 0, "all": 0}
    for start in range(0, len(samples), 40):
        part = samples[start : start + 40]
        noise = keyed_normal([(0, "quality", number) for number, _, _ in part], generator.latent_shape)
        conditioning = stack_conditioning(encoded, [text for _, text, _ in part])
        clean = sample_ode(generator, conditioning, chain, noise)
        for seen, (_, _, claim) in zip(read_scenes(generator.decode(clean)), part, strict=True):
            checks = check(seen, claim)
            for kind in ("shape", "color", "background"):
                right[kind] += checks[kind]
            right["all"] += checks["shape"] and checks["color"] and checks["background"]
    shares = {kind: count / len(samples) for kind, count in right.items()}
    assert min(shares.values()) >= 0.9, shares


@pytest.mark.parametrize(
    ("experiment", "most", "left"), [("demo", 20e6, 0.2), ("demo_text", 12e6, 0.3), ("demo_video", 12e6, 0.2)]
)
def test_ships_with_its_recipe_within_its_size(experiment: str, most: float, left: float) -> None:
    config = load_config([f"experiment={experiment}"])
    folder = ROOT / config.generator.path
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < most
    assert {path.suffix for path in files} <= {".json", ".jsonl", ".safetensors", ".md"}
    recorded = PretrainConfig.model_validate(json.loads((folder / "training_config.json").read_text()))
    assert recorded == config.pretrain
    log = [json.loads(line) for line in (folder / "training.jsonl").read_text().splitlines()]
    flow = [row["loss"] for row in log if row["part"] == "flow"]
    assert sum(flow[-20:]) < left * sum(flow[:20])
    assert max(row["psnr"] for row in log if row["part"] == "autoencoder") > 28
    assert len({row["part"] for row in log}) == 2 + (recorded.decoder_steps > 0)


def test_rebuild_is_reproducible_and_resumable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A small budget, once undisturbed and once killed in each part, a state damaged since: the same bytes."""
    config = PretrainConfig(**TINY_PRETRAIN, decoder_steps=15)
    monkeypatch.setattr(pretrain, "_CHECKPOINT_EVERY", 5)
    pretrain.train_base(config, tmp_path / "whole", tmp_path / "whole-work")

    class Killed(Exception):
        pass

    def dies_at_step_twelve(stock: Callable[..., Any]) -> Callable[..., Any]:
        steps: list[int] = []

        def call(*arguments: Any, **options: Any) -> Any:
            steps.append(1)
            if len(steps) == 12:
                raise Killed
            return stock(*arguments, **options)

        return call

    def dies(module: Any, name: str) -> None:
        monkeypatch.setattr(module, name, dies_at_step_twelve(getattr(module, name)))
        with pytest.raises(Killed):
            pretrain.train_base(config, tmp_path / "resumed", tmp_path / "work")

    for module, name in ((pretrain_autoencoder, "cosine"), (pretrain.F, "mse_loss")):
        dies(module, name)
    (first, second) = (tmp_path / "work").glob("*/reconstruction/*")
    assert {first.name, second.name} == {"000020", "000025"}
    assert not (tmp_path / "resumed" / "model_index.json").exists()
    (newest,) = (tmp_path / "work").glob("*/denoiser/000010")
    (newest / "state.json").write_text('{"log": 3}')
    manifest = json.loads((newest / "manifest.json").read_text())
    manifest["state.json"] = file_sha256(newest / "state.json")
    (newest / "manifest.json").write_text(json.dumps(manifest))
    dies(pretrain_decoder, "cosine")
    assert {path.name for path in (tmp_path / "work").glob("*/decoder/*")} == {"000005", "000010"}
    assert not (tmp_path / "resumed" / "model_index.json").exists()
    pretrain.train_base(config, tmp_path / "resumed", tmp_path / "work")
    assert "checkpoint 10: damaged (its state's 'log' is int, not list)" in caplog.text
    for path in (tmp_path / "whole").rglob("*"):
        if path.is_file():
            other = tmp_path / "resumed" / path.relative_to(tmp_path / "whole")
            assert other.read_bytes() == path.read_bytes(), path.name
    pipeline = FluxPipeline.from_pretrained(tmp_path / "resumed")
    # The decoder alone went on: the network's latents are those that it learned.
    (saved,) = (tmp_path / "work").glob("*/autoencoder")
    learned = load_newest(saved).tensors
    for key, value in pipeline.vae.state_dict().items():
        assert torch.equal(learned[key], value) == (not key.startswith("decoder")), key
    # An hour's work makes way for nothing else.
    other = config.model_copy(update={"seed": 1})
    for folder, held in ((tmp_path / "resumed", "a generator of other settings"), (tmp_path, "something else")):
        with pytest.raises(StorageError, match=f"holds {held}.*choose another folder with --output"):
            pretrain.train_base(other, folder, tmp_path / "work")
    assert (tmp_path / "resumed" / "model_index.json").is_file()


def test_its_record_is_no_part_of_it(tmp_path: Path) -> None:
    """What reads the generator records the folder that its record names."""
    config, folder, reader = PretrainConfig(**TINY_PRETRAIN), tmp_path / "generator", tmp_path / "reader"
    base_stage(config, ROOT, folder)
    record = read_provenance(folder / "provenance.json")
    assert (record["stage"], record["seeds"]) == ("base", [config.seed])
    assert record["config"] == json.loads((folder / "training_config.json").read_text())
    assert {"model_index.json", "training.jsonl"} <= record["outputs"][0]["files"].keys()
    with record_stage("encode", reader, inputs=[folder], outputs=[], config=None, root=ROOT):
        pass
    assert read_provenance(reader / "provenance.json")["inputs"] == record["outputs"]
    assert verify_outputs(folder / "provenance.json", ROOT) == []


def test_vocabulary_holds_every_scene_word_as_one_token() -> None:
    words = sorted({word for text, _ in scenes.one_object_captions(named_color=True) for word in text.split()})
    merges = pretrain_parts.byte_pair_merges(words)
    assert merges == pretrain_parts.byte_pair_merges(words)
    clip, t5 = pretrain_parts.build_tokenizers(PretrainConfig(**TINY_PRETRAIN), words)
    for word in words:
        assert clip.tokenize(word) == [f"{word}</w>"]
        assert t5.tokenize(word) == [f"▁{word}"]
    assert clip.tokenize("zebra")
