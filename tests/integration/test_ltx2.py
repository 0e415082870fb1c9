"""LTX-2 is drawn without its sound: what that leaves out, and what it is not."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import edit_tensors
from families import FAMILIES
from safetensors.torch import save_file

from vipo.config.training import LoraConfig
from vipo.conformance.subject import Subject, subject
from vipo.generators import GeneratorError, load_generator
from vipo.generators.embeddings import encoder_hashes
from vipo.generators.ltx2 import LTX2Generator
from vipo.generators.original import original_state
from vipo.generators.original_names import NAMES

ROOT = Path(__file__).resolve().parents[2]
ROW = FAMILIES["ltx2"]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Subject]:
    folder = ROW.write(tmp_path_factory.mktemp("ltx2") / "ltx2")
    return folder, subject(ROW.config(folder), ROOT, steps=ROW.steps)


def test_with_sound_the_stock_pipeline_draws_another_video(
    drawn: tuple[Path, Subject], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And without it, whatever the sound's noise: it is drawn by the global generator."""
    _, compared = drawn
    torch.manual_seed(7)
    assert torch.equal(compared.sample(compared.stock()).pictures, compared.sampled.pictures)
    monkeypatch.setattr(LTX2Generator, "stock_forced", {})
    both = compared.sample(compared.stock())
    assert float((both.prediction - compared.sampled.prediction).abs().max()) > 1e-3


def test_nothing_of_the_sound_reaches_the_video(drawn: tuple[Path, Subject], tmp_path: Path) -> None:
    """Nor is its autoencoder or its vocoder read."""
    folder, compared = drawn
    silent = shutil.copytree(folder, tmp_path / "silent", ignore=shutil.ignore_patterns("audio_vae", "vocoder"))
    generator: Any = load_generator(ROW.config(silent), ROOT)
    generator.train_weights()
    time, found = compared.sampled.times(generator), []
    for _ in range(2):
        with torch.no_grad():
            found.append(generator.predict(compared.noise, time, compared.conditioning))
            for value in generator.network.parameters():
                value.add_(0 if value.requires_grad else torch.randn_like(value))
    assert torch.equal(*found)
    frozen = {name for name, value in generator.network.named_parameters() if not value.requires_grad}
    # 2 blocks: 4 attentions that have to do with sound, its MLP and its tables; embeddings and projections beside them.
    assert len(frozen) > 2 * 4 * 10
    assert not [name for name in frozen if not any(part in name for part in ("audio", "av_cross", "a2v"))]


def test_embeddings_belong_to_the_connectors_too(drawn: tuple[Path, Subject], tmp_path: Path) -> None:
    folder, _ = drawn
    other = shutil.copytree(folder, tmp_path / "other")
    edit_tensors(other / "connectors", lambda tensors: tensors["text_proj_in.weight"].mul_(2))
    before, after = (encoder_hashes(ROW.config(each), ROOT) for each in (folder, other))
    assert [name for name, value in after.items() if value != before[name]] == ["connectors"]
    assert after.keys() == before.keys()


def test_lora_adapts_no_module_of_the_sound(drawn: tuple[Path, Subject]) -> None:
    _, compared = drawn
    adapted = {
        name.partition(".lora_")[0] for name, _ in compared.load("lora").network.named_parameters() if "lora_" in name
    }
    assert adapted == {
        f"transformer_blocks.{block}.{attention}.{target}"
        for block in range(2)
        for attention in ("attn1", "attn2")
        for target in LoraConfig().targets
    }
    with pytest.raises(GeneratorError, match=r"targets \['audio_attn1.to_q'\]: matches no module"):
        compared.load().add_lora(LoraConfig(targets=("to_q", "audio_attn1.to_q")), seed=0)


def test_a_whole_file_of_lightricks_is_the_folder(drawn: tuple[Path, Subject], tmp_path: Path) -> None:
    """With the connectors among the network's names, and other parts beside it."""
    _, compared = drawn
    whole: Any = compared.load().network
    named = original_state(whole.state_dict(), NAMES["LTX2VideoTransformer3DModel"](whole.config))
    beside = {"video_embeddings_connector.learnable_registers": torch.ones(1)}
    tensors = {f"model.diffusion_model.{name}": value for name, value in (named | beside).items()}
    save_file(tensors | {"vae.decoder.conv_in.bias": torch.ones(1)}, tmp_path / "ltx2.safetensors")
    found = compared.load(file=str(tmp_path / "ltx2.safetensors")).network.state_dict()
    assert found.keys() == whole.state_dict().keys()
    assert all(torch.equal(value, found[name]) for name, value in whole.state_dict().items())
