"""`vipo orientation` and the pictures it measures on."""

import json
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import get_args

import pytest
import torch

from vipo.maps import photographs
from vipo.maps.photographs import COMPOSITE_SIZE, composites, load_photographs, photographed
from vipo.maps.scoring import Kind, drawn_scenes
from vipo.perception import PerceptionError
from vipo.perception.orientation import Orientation

pytest_plugins = ["command"]
OUTLINES = Path(__file__).parents[2] / "data" / "masks" / "photographs.json"


@pytest.fixture(scope="module")
def taken():
    return load_photographs(OUTLINES)


def test_the_outlines_are_coco(taken):
    coco = json.loads(OUTLINES.read_text())
    images = {item["id"]: item for item in coco["images"]}
    assert {item["license"] for item in images.values()} <= {item["id"] for item in coco["licenses"]}
    for item in coco["annotations"]:
        x, y, width, height = item["bbox"]
        image = images[item["image_id"]]
        assert 0 <= x < x + width <= image["width"]
        assert 0 <= y < y + height <= image["height"]
    outlined = [item for item in coco["annotations"] if item["category_id"] != 6]
    covered = [float(mask.sum()) for photograph in taken for mask in photograph.objects]
    assert covered == pytest.approx([item["area"] for item in outlined], rel=0.06)
    assert set(photographed(taken)) == set(get_args(Kind))


def test_composites_are_what_their_kind_says(taken):
    found = composites(taken, 6, seed=3)
    again = composites(taken, 6, seed=3)
    middle = torch.linspace(-0.5, 0.5, COMPOSITE_SIZE)
    for kind, (batch,) in found.items():
        assert torch.equal(batch.images, again[kind][0].images)
        assert batch.images.shape == (6, 3, COMPOSITE_SIZE, COMPOSITE_SIZE)
        assert 0 <= float(batch.images.min()) <= float(batch.images.max()) <= 1
        share = batch.masks.mean(dim=(1, 2))
        across = (batch.masks.sum(dim=1) * middle).sum(dim=1) / batch.masks.sum(dim=(1, 2))
        down = (batch.masks.sum(dim=2) * middle).sum(dim=1) / batch.masks.sum(dim=(1, 2))
        away = torch.maximum(across.abs(), down.abs())
        if kind == "small":
            assert share.max() < 0.035
        if kind == "large":
            assert share.min() > 0.25
        if kind == "centred":
            assert away.max() < 0.1
        if kind == "off centre":
            assert away.min() > 0.15
    assert not torch.equal(found["small"][0].images, composites(taken, 6, seed=4)["small"][0].images)


def test_drawn_scenes_are_of_their_kind():
    found = drawn_scenes(5, seed=0)
    assert found["small"][0].masks.sum(dim=(1, 2)).max() < found["large"][0].masks.sum(dim=(1, 2)).min()


def test_absent_packages_and_other_photographs_are_named(tmp_path, monkeypatch):
    coco = json.loads(OUTLINES.read_text())
    coco["images"][0]["sha256"] = "0" * 64
    (tmp_path / "other.json").write_text(json.dumps(coco))
    with pytest.raises(PerceptionError, match=r"astronaut\.png is missing or not the photograph .* scikit-image"):
        load_photographs(tmp_path / "other.json")

    def absent(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(photographs, "distribution", absent)
    with pytest.raises(PerceptionError, match="install scikit-image"):
        load_photographs(OUTLINES)


def test_the_table(vipo):
    done = vipo("orientation", "--scenes", "4", "--photographs", "--layer", "2", "--input-size", "64")
    assert done.code == 0, done.err
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in done.out.splitlines()]
    assert rows[0][5:] == ["rule", *get_args(Kind), "all"]
    assert len({len(row) for row in rows}) == 1
    table = {(row[4], row[5]): row[6:] for row in rows[2:]}
    assert set(table) == {
        (source, rule) for source in ("drawn", "composite", "photograph") for rule in get_args(Orientation)
    }
    assert float(table["drawn", "norm"][-1].split()[0]) > 0.95
    # The two signs of a direction are each other's mirror image only where all directions flip: the means add to 1.
    pair = [float(table["drawn", rule][-1].split()[0]) for rule in ("none", "inverted_sklearn")]
    assert sum(pair) == pytest.approx(1, abs=0.01)


def test_a_rule_that_is_blind_on_the_grid_is_not_scored(vipo):
    done = vipo("orientation", "--scenes", "1", "--layer", "4", "--input-size", "64")
    assert done.code == 0, done.err
    cells = {line.split("|")[6].strip(): line.split("|")[-2].strip() for line in done.out.splitlines()[2:]}
    assert {rule for rule, cell in cells.items() if cell == "–"} == {"centre", "border"}


def test_too_few_positions_are_refused(vipo):
    vipo("orientation", "--scenes", "1", "--layer", "4", "--input-size", "32").refuses(
        "perception.components", "input_size"
    )
