"""HunyuanVideo 1.5 is guided by a part of its checkpoint: what that says, and what is trained with."""

from pathlib import Path
from typing import Any

import pytest
from checkpoints import edit_json
from families import FAMILIES

from vipo.conformance.stock import stock_pipeline
from vipo.generators.hunyuan_video import HunyuanVideo15Generator

ROOT = Path(__file__).resolve().parents[2]
ROW = FAMILIES["hunyuan_video"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ROW.write(tmp_path_factory.mktemp("hunyuan") / "hunyuan_video")


@pytest.mark.parametrize(
    ("guider", "scale", "told"),
    [
        ({"guidance_scale": 1.0}, 6.0, "guidance_scale 6.0 guides a checkpoint whose own guider does not (guidance_sc"),
        ({"enabled": False}, 6.0, "whose own guider does not (guidance_scale off)"),
        ({"guidance_scale": 1.0}, 1.0, ""),
        ({"guidance_scale": 6.0}, 2.0, ""),
    ],
)
def test_guidance_of_a_checkpoint_that_is_not_guided_is_told(
    guider: dict[str, Any], scale: float, told: str, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = folder / "guider/guider_config.json"
    before = file.read_text()
    edit_json(file, **guider)
    HunyuanVideo15Generator.check(ROW.config(folder, guidance_scale=scale, negative_prompt=""), ROOT)
    file.write_text(before)
    said = [record.getMessage() for record in caplog.records if record.name.startswith("vipo.")]
    assert len(said) == bool(told)
    assert told in " ".join(said)


@pytest.mark.parametrize(("scale", "guided"), [(0.5, 1.0), (1.0, 1.0), (2.0, 2.0)])
def test_the_stock_pipeline_is_guided_as_the_run_is(scale: float, guided: float, folder: Path) -> None:
    pipeline = stock_pipeline(HunyuanVideo15Generator, ROW.config(folder, guidance_scale=scale), ROOT)
    assert pipeline.guider.guidance_scale == guided
    # As below 1 there is none here.
    assert (pipeline.guider.num_conditions == 1) == (scale <= HunyuanVideo15Generator.neutral_guidance)
