"""The worked example of docs/generators.md, run against the stock pipeline on a random checkpoint."""

import json
import re
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from checkpoints import picture_autoencoder, t5_tokenizer
from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel, FlowMatchEulerDiscreteScheduler
from omegaconf import OmegaConf
from transformers import UMT5Config, UMT5EncoderModel
from typer.testing import CliRunner

from vipo.cli import app
from vipo.conformance.table import CHECKS, run_checks
from vipo.generators import GeneratorError

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


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Overrides for the page's adapter and settings, on a checkpoint of its family."""
    [(name, code)] = re.findall(r"Save this as\s+`(\w+)\.py`.*?```python\n(.*?)```", PAGE, re.DOTALL)
    wrong = """

class Wrong(AuraFlowGenerator):
    def _predict(self, latents, time, conditioning):
        return super()._predict(latents, time, conditioning) * (1.01 if torch.is_grad_enabled() else 1.001)
"""
    (tmp_path / f"{name}.py").write_text(code + wrong)
    monkeypatch.syspath_prepend(tmp_path)
    [text] = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    settings = OmegaConf.to_container(OmegaConf.create(text))
    assert isinstance(settings, dict)
    values = settings["generator"] | {"path": str(_checkpoint(tmp_path / "checkpoint")), "max_sequence_length": 12}
    return [f"generator.{key}={json.dumps(value)}" for key, value in values.items()]


def _command(*arguments: str) -> tuple[int, list[list[str]]]:
    """Status and findings of the page's command, each as name, result and note."""
    [line] = re.findall(r"^vipo (check-generator) .*$", PAGE, re.MULTILINE)
    ran = CliRunner().invoke(app, [line, *arguments, "--height", "32", "--width", "32", "--json"])
    assert ran.exit_code in (0, 1), ran.output
    return ran.exit_code, [[found["name"], found["result"], found["note"]] for found in json.loads(ran.stdout)]


def test_the_example_equals_the_stock_pipeline(example: list[str]) -> None:
    status, found = _command(*example, "generator.device=cpu")
    assert [each for each in found if each[1] != "ok"] == []
    assert len(found) == 18
    assert status == 0


def test_an_adapter_that_is_wrong_fails(example: list[str]) -> None:
    wrong = [text.replace(":AuraFlowGenerator", ":Wrong") for text in example]
    skipped = [name for name in CHECKS if name not in ("prediction", "update_lora", "bf16")]
    status, found = _command(*wrong, "generator.device=cpu", *(f"--without={name}" for name in skipped))
    results = {name: (result, note) for name, result, note in found}
    assert results["first prediction"][0] == "fails"
    assert results["max |log rho|, lora"][0] == "fails"
    assert results["what an update changes, lora"][0] == "ok"
    assert results["bf16, relative to fp32"] == ("fails", "with gradients its bits are others")
    assert results["sample"] == ("does not apply", "left out by --without")
    assert status == 1


def test_a_check_that_is_none_is_named() -> None:
    with pytest.raises(GeneratorError, match="--without pictures: is none of the checks prediction, sample"):
        list(run_checks(cast("Any", None), ["pictures"]))
