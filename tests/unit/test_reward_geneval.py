"""GenEval: its six tasks on drawn detections; detector and colours on random weights, against loops and CLIP."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from reward_checkpoints import clip_ids, write_clip, write_detector
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import functional as tv

from vipo.config.compose import load_config
from vipo.prompts.geneval import COLORS, OBJECTS, RELATIONS, geneval_fault
from vipo.prompts.needs import check_needs
from vipo.prompts.prompt import Prompt, PromptError
from vipo.rewards import RewardError, load_reward, score, score_where, weight_files
from vipo.rewards.detection import Detection, instances
from vipo.rewards.geneval import claims, kept, relations

# --- Claims


def thing(name: str, left: int, top: int, score: float = 0.95, side: int = 10) -> Detection:
    mask = torch.zeros(100, 100, dtype=torch.bool)
    mask[top : top + side, left : left + side] = True
    return Detection(OBJECTS.index(name), score, (left, top, left + side, top + side), mask)


def holds(found: Sequence[Detection], row: dict[str, Any], color: str = "red") -> list[bool]:
    sure = 0.9 if row.get("tag") == "counting" else 0.3
    return claims(kept(found, sure), row, lambda name, items: [color] * len(items))


CAT, DOG = thing("cat", 10, 40), thing("dog", 70, 42, 0.5)
ONE = {"tag": "single_object", "include": [{"class": "cat", "count": 1}]}
TWO = {"tag": "two_object", "include": [{"class": "cat", "count": 1}, {"class": "dog", "count": 1}]}
COUNT = {"tag": "counting", "include": [{"class": "cat", "count": 2}], "exclude": [{"class": "cat", "count": 3}]}
COLOR = {"tag": "colors", "include": [{"class": "cat", "count": 1, "color": "red"}]}
PLACE = {
    "tag": "position",
    "include": [{"class": "dog", "count": 1}, {"class": "cat", "count": 1, "position": ["left of", 0]}],
}
BOTH = {
    "tag": "color_attr",
    "include": [{"class": "cat", "count": 1, "color": "red"}, {"class": "dog", "count": 1, "color": "blue"}],
}


@pytest.mark.parametrize(
    ("found", "row", "held"),
    [
        ([CAT], ONE, [True]),
        ([DOG], ONE, [False]),
        ([thing("cat", 0, 0, 0.3)], ONE, [False]),
        ([CAT, DOG], TWO, [True, True]),
        ([CAT], TWO, [True, False]),
        ([CAT, thing("cat", 50, 5)], COUNT, [True, True]),
        ([CAT], COUNT, [False, True]),
        ([CAT, thing("cat", 50, 5), thing("cat", 80, 5)], COUNT, [True, False]),
        # Less sure than counting asks for.
        ([CAT, thing("cat", 50, 5, 0.8)], COUNT, [False, True]),
        ([CAT], COLOR, [True, True]),
        ([DOG], COLOR, [False, False]),
        ([CAT, DOG], PLACE, [True, True, True]),
        ([thing("cat", 85, 40), DOG], PLACE, [True, True, False]),
        ([CAT], PLACE, [False, True, False]),
        ([CAT, DOG], BOTH, [True, True, True, False]),
    ],
)
def test_each_task(found: list[Detection], row: dict[str, Any], held: list[bool]) -> None:
    assert holds(found, row) == held


def test_only_the_surest_are_asked_for_their_colour() -> None:
    asked: list[float] = []

    def colors(name: str, items: Sequence[Detection]) -> list[str]:
        asked.extend(item.score for item in items)
        return ["blue"] * len(items)

    assert claims(kept([thing("cat", 0, 0, 0.6), CAT], 0.3), COLOR, colors) == [True, False]
    assert asked == [0.95]
    assert len(kept([thing("cat", i, i, 0.5 + i / 100) for i in range(20)], 0.3)["cat"]) == 16


@pytest.mark.parametrize(
    ("place", "told"),
    [
        ((0, 45), {"left of"}), ((90, 45), {"right of"}), ((45, 0), {"above"}), ((45, 90), {"below"}),
        ((0, 0), {"left of", "above"}), ((90, 90), {"right of", "below"}), ((46, 46), set()), ((47, 45), set()),
        ((48, 45), set()), ((50, 45), {"right of"}),
    ],
)  # fmt: skip
def test_relations_are_of_centres_beyond_a_tenth_of_both_sides(place: tuple[int, int], told: set[str]) -> None:
    other = thing("dog", 45, 45)
    assert relations(thing("cat", *place), other) == told
    # Written out: boxes of side 10, so 2 pixels do not count.
    offset = np.array(place) - 45.0
    beyond = np.sign(offset) * np.maximum(np.abs(offset) - 2, 0)
    if np.abs(beyond).max() >= 1e-3:
        across, down = beyond / math.hypot(*offset)
        expected = [across < -0.5, across > 0.5, down < -0.5, down > 0.5]
        names = ["left of", "right of", "above", "below"]
        assert told == {name for name, holds in zip(names, expected, strict=True) if holds}


# --- The detector


def test_instances_are_read_as_mmdetection_does() -> None:
    made = torch.Generator().manual_seed(0)
    kinds, masks = torch.randn(5, 4, generator=made), torch.randn(5, 8, 8, generator=made) * 3
    found = instances(kinds, masks, (32, 32), (32, 24), (50, 40))
    assert len(found) == 15
    assert [item.score for item in found] == sorted((item.score for item in found), reverse=True)
    expected = {}
    for query in range(5):
        whole = F.interpolate(masks[None, query : query + 1], (32, 32), mode="bilinear")[..., :32, :24]
        own = F.interpolate(whole, (50, 40), mode="bilinear")[0, 0]
        inside = own > 0
        surety = own.sigmoid()[inside].mean()
        for kind in range(3):
            expected[kind, round(float(kinds[query].softmax(0)[kind] * surety), 5)] = inside
    for item in found:
        inside = expected[item.kind, round(item.score, 5)]
        assert torch.equal(item.mask, inside)
        rows, columns = np.nonzero(inside.numpy())
        assert item.box == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)


# --- The reward


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("geneval")
    return {"path": str(write_clip(folder / "clip")), "detector": str(write_detector(folder / "detector"))}


def pictures(count: int = 2) -> Tensor:
    made = np.random.default_rng(1)
    small = made.integers(0, 256, (count, 5, 4, 3), dtype=np.uint8)
    return torch.stack([tv.to_tensor(Image.fromarray(x).resize((80, 60))) for x in small])


def nearest_colour(clip: Any, file: Image.Image, item: Detection, name: str) -> str:
    """By the published evaluation: the object's crop on grey, against the mean of three texts for each colour."""
    grey = Image.new("RGB", file.size, "#999")
    alone = Image.composite(file, grey, Image.fromarray(item.mask.numpy())).crop(item.box)
    bicubic = transforms.InterpolationMode.BICUBIC
    published = transforms.Compose([transforms.Resize(28, bicubic), transforms.CenterCrop(28), transforms.ToTensor()])
    pixels = tv.normalize(published(alone), (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
    with torch.no_grad():
        seen = clip.get_image_features(pixel_values=pixels[None]).pooler_output[0]
        likeness = []
        for color in COLORS:
            texts = (
                f"a photo of a {color} {name}",
                f"a photo of a {color}-colored {name}",
                f"a photo of a {color} object",
            )
            read = clip.get_text_features(input_ids=torch.tensor([ids(text) for text in texts])).pooler_output
            likeness.append(float(F.cosine_similarity(seen, F.normalize(read, dim=1).mean(dim=0), dim=0)))
    return COLORS[int(np.argmax(likeness))]


def test_a_picture_s_score_is_that_of_its_detections_and_colours(places: dict[str, str]) -> None:
    from transformers import CLIPModel, Mask2FormerForUniversalSegmentation, Mask2FormerImageProcessor

    images = pictures()
    network = Mask2FormerForUniversalSegmentation.from_pretrained(places["detector"]).eval()
    processor = Mask2FormerImageProcessor.from_pretrained(places["detector"])
    clip = CLIPModel.from_pretrained(places["path"]).eval()
    rows, masks = [], []
    for image in images:
        file = tv.to_pil_image(image)
        with torch.no_grad():
            out = network(**processor(file, return_tensors="pt"))
        # The processor makes 64 x 96 of 60 x 80: both sides multiples of 32.
        found = instances(out.class_queries_logits[0], out.masks_queries_logits[0], (64, 96), (64, 96), (60, 80))
        name = OBJECTS[found[0].kind]
        own = [item for item in found if item.kind == found[0].kind]
        color = nearest_colour(clip, file, own[0], name)
        rows.append({"tag": "colors", "include": [{"class": name, "count": 1, "color": color}]})
        masks.append(torch.stack([item.mask for item in own[:16]]).any(dim=0).float())
    reward = load_reward("geneval", "cpu", {**places, "threshold": 0.0})
    found = score_where("geneval", reward, images, ["a", "b"], rows)
    assert found.scores.tolist() == [1.0, 1.0]
    assert found.where is not None
    torch.testing.assert_close(found.where, torch.stack(masks))
    claimed = [row["include"][0] for row in rows]
    other = [{"include": [{**own, "color": COLORS[COLORS.index(own["color"]) - 1]}]} for own in claimed]
    assert score("geneval", reward, images, ["a", "b"], other).tolist() == [0.0, 0.0]
    share = load_reward("geneval", "cpu", {**places, "threshold": 0.0, "score": "claims", "batch": 1})
    assert score("geneval", share, images, ["a", "b"], other).tolist() == [0.5, 0.5]
    # At the published threshold, random weights are sure of nothing.
    strict = load_reward("geneval", "cpu", places)
    assert score("geneval", strict, images, ["a", "b"], rows).tolist() == [0.0, 0.0]
    names = [path.name for path in weight_files(reward)]
    assert sorted(set(names)) == [
        "config.json", "model.safetensors", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    assert names.count("model.safetensors") == 2


def ids(text: str) -> list[int]:
    """A hyphen is a word of its own."""
    return clip_ids(text.replace("-", " - "), 24)


def test_a_detector_s_bin_file_is_recorded_and_a_file_is_refused(places: dict[str, str], tmp_path: Path) -> None:
    from safetensors.torch import load_file

    stored = Path(places["detector"])
    for name in ("config.json", "preprocessor_config.json"):
        (tmp_path / name).write_bytes((stored / name).read_bytes())
    torch.save(load_file(stored / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "notes.json").write_text("{}")
    reward = load_reward("geneval", "cpu", {**places, "detector": str(tmp_path)})
    assert [path.name for path in weight_files(reward) if path.parent == tmp_path] == [
        "config.json", "preprocessor_config.json", "pytorch_model.bin",
    ]  # fmt: skip
    assert score("geneval", reward, pictures(1), ["a"], [ONE]).tolist() == [0.0]
    for key, file in (("detector", stored / "model.safetensors"), ("path", Path(places["path"]) / "model.safetensors")):
        with pytest.raises(RewardError, match=rf"{key} '.*model.safetensors': is a file; name its folder"):
            load_reward("geneval", "cpu", {**places, key: str(file)})


def test_another_detector_is_refused(places: dict[str, str], tmp_path: Path) -> None:
    options = {**places, "detector": str(write_detector(tmp_path, kinds=3))}
    with pytest.raises(RewardError, match=r"knows 3 classes, not COCO's 80"):
        score("geneval", load_reward("geneval", "cpu", options), pictures(1), ["a"], [ONE])


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({}, "'include' is no list of claims"),
        ({"include": []}, "'include' is no list of claims"),
        ({"include": [{"class": "cat"}]}, "claim 0 has no 'class' or no 'count'"),
        ({"include": [{"class": "cat", "count": 0}]}, "claim 0 has no 'class' or no 'count'"),
        ({"include": [{"class": "cat", "count": True}]}, "claim 0 has no 'class' or no 'count'"),
        ({"include": [{"class": "cat", "count": 1, "position": ["left of", 0]}]}, "no relation to a claim before it"),
        ({"include": [{"class": "cat", "count": 1}], "exclude": 3}, "'exclude' is no list of claims"),
        ({"include": [{"class": "unicorn", "count": 1}]}, "claim 0 is of 'unicorn', none of COCO's 80 objects"),
        ({**ONE, "exclude": [{"class": "sofa", "count": 1}]}, "claim 1 is of 'sofa', none of COCO's 80 objects"),
        ({"include": [{"class": "cat", "count": 1, "color": "teal"}]}, "has the colour 'teal', none of red, orange,"),
        (
            {"include": [*ONE["include"], {"class": "dog", "count": 1, "position": ["behind", 0]}]},
            "claim 1 has the relation 'behind', none of left of, right of, above, below",
        ),
        # Would be "no cat", of any colour.
        (
            {**ONE, "exclude": [{"class": "cat", "count": 2, "color": "red"}]},
            "claim 1 says color, which is not read of",
        ),
        ({"include": [{"class": "cat", "count": 1, "size": "large"}]}, "claim 0 says size, which is not read"),
    ],
)
def test_metadata_is_checked_before_and_at_the_call(row: dict[str, Any], told: str, places: dict[str, str]) -> None:
    with pytest.raises(RewardError, match=rf"metadata of sample 0: .*{told}"):
        score("geneval", load_reward("geneval", "cpu", places), pictures(1), ["a"], [row])
    config = load_config(["experiment=demo", "reward=geneval", "evaluation.rewards=[]", "arm=grpo"])
    prompts = [Prompt(id=f"{n:016x}", text="a cat", metadata=row) for n in range(2)]
    with pytest.raises(PromptError, match=rf"reward\.terms: reward 'geneval' needs GenEval's metadata.*{told}"):
        check_needs(config, prompts, prompts)


def test_what_is_null_is_not_claimed() -> None:
    """As a Parquet file has rows of which one names a colour."""
    row = {"include": [{"class": "cat", "count": 1, "color": None, "position": None}], "exclude": None}
    assert geneval_fault(row) is None
    assert holds([CAT], row) == [True]
    assert len(OBJECTS) == len(set(OBJECTS)) == 80


def test_the_relations_are_those_that_are_told() -> None:
    places = ((0, 45), (90, 45), (45, 0), (45, 90))
    assert tuple(next(iter(relations(thing("cat", *place), thing("dog", 45, 45)))) for place in places) == RELATIONS
