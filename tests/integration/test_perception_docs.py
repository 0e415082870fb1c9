"""The worked example of docs/perception.md runs as it stands."""

import re
from pathlib import Path

import numpy as np
import torch

from vipo.config.perception import PerceptionConfig
from vipo.demo.scenes import draw, object_mask, sample_scene
from vipo.maps.scoring import score_orientations
from vipo.perception import PerceptualStructuring, load_backbone


def test_the_example_is_a_backbone(tmp_path, monkeypatch):
    page = (Path(__file__).parents[2] / "docs" / "perception.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    (tmp_path / "my_backbone.py").write_text(example)
    monkeypatch.syspath_prepend(str(tmp_path))
    options = dict(re.findall(r"perception\.(\w+)=(\S+)", page.split("## Adding a backbone")[1]))
    config = PerceptionConfig(backbone=options["backbone"], components=int(options["components"]))
    backbone = load_backbone(config)
    PerceptualStructuring(backbone, config).preflight((64, 64))
    rng = np.random.default_rng(0)
    scenes = [sample_scene(rng, two_objects=0.0) for _ in range(20)]
    images = torch.from_numpy(np.stack([draw(scene) for scene in scenes]))
    masks = torch.from_numpy(np.stack([object_mask(scene.objects[0]) for scene in scenes])).float()
    scores = score_orientations(backbone, config, images, masks, (16, 16))
    assert float(scores["border"].mean()) > 0.8
