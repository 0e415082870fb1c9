"""A checkpoint in the hub's cache, on a compute node without a network."""

import shutil
import socket
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from diffusers import FluxTransformer2DModel
from families import FAMILIES

from vipo.config.generator import GeneratorConfig
from vipo.conformance.subject import PROMPTS
from vipo.generators import load_generator
from vipo.generators.configured import resolve_class
from vipo.generators.flux import FluxGenerator

ROOT = Path(__file__).resolve().parents[2]
COMMIT = "0" * 40


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache's folder of ``owner/name``; whatever opens a connection fails."""

    def refuse(*_: object) -> None:
        raise AssertionError("a connection was opened")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    found = tmp_path / "models--owner--name"
    (found / "refs").mkdir(parents=True)
    (found / "refs/main").write_text(COMMIT)
    return found


def test_a_hub_id_in_the_cache_is_loaded_offline(cache: Path) -> None:
    """Its weights in several files, as large ones are: on a compute node without a network."""
    shipped, folder = ROOT / "data" / "demo-generator", cache / "snapshots" / COMMIT
    shutil.copytree(shipped, folder)
    network = FluxTransformer2DModel.from_pretrained(shipped, subfolder="transformer")
    shutil.rmtree(folder / "transformer")
    network.save_pretrained(folder / "transformer", max_shard_size="8MB")
    assert len(list((folder / "transformer").glob("*.safetensors"))) > 1
    config = GeneratorConfig(
        family="flux", path="owner/name", revision=COMMIT, height=64, width=64, max_sequence_length=16
    )
    found = load_generator(config, cache).network.state_dict()
    assert all(torch.equal(value, found[name]) for name, value in network.state_dict().items())
    assert FluxGenerator.encode_prompts(config, cache, PROMPTS)


@pytest.mark.parametrize("family", ["qwen_image_21", "flux2_dev", "ltx2", "sana", "wan"])
def test_prompts_are_encoded_from_the_hubs_cache_offline(family: str, cache: Path) -> None:
    """Of tokenizers and processors, transformers asks the hub for files that no repository has."""
    row = FAMILIES[family]
    row.write(cache / "snapshots" / COMMIT)
    config = row.config(Path("owner/name"), revision=COMMIT)
    adapter = resolve_class(config)
    adapter.check(config, cache)
    assert adapter.encode_prompts(config, cache, PROMPTS)
    assert adapter.text_attention is not None
    assert all(adapter.text_attention.words(config, cache, PROMPTS))
