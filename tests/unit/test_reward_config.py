"""Rewards with arguments in the configuration: own sections, labels, one spelling for training and evaluation."""

import contextlib
import os
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from vipo.config.compose import dump_config, load_config, load_config_file
from vipo.config.experiment import check_run
from vipo.config.reward import RewardTerm
from vipo.config.run import Config
from vipo.config.validation import ConfigError
from vipo.provenance.reward_files import local_files
from vipo.rewards import RewardError
from vipo.rewards.beside import _read
from vipo.rewards.weights import fill, local_path, located

DEMO = "experiment=demo"
TERMS = (
    "reward.terms=[{name: pickscore, options: {path: here, dtype: bf16}}, {name: clipscore, label: long, "
    'options: {template: "a photo of {}"}}, {name: clipscore, label: short, weight: -0.5}]'
)


def test_a_reward_without_arguments_is_written_as_before() -> None:
    data = load_config([DEMO]).model_dump(mode="json")
    assert data["reward"] == {"terms": [{"name": "object_redness", "weight": 1.0}]}
    assert data["evaluation"]["rewards"] == ["object_redness", "redness", "scene_shape", "scene_background", "scene"]


def test_a_term_s_arguments_are_complete_and_read_back(tmp_path: Path) -> None:
    config = load_config([DEMO, TERMS, "evaluation.rewards=[redness, short]"])
    first, long, short = config.reward.terms
    assert first.options == {
        "path": "here", "revision": None, "dtype": "bf16", "batch": 16, "resident": "keep",
        "tokenizer": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "tokenizer_revision": None,
    }  # fmt: skip
    assert long.options["template"] == "a photo of {}"
    assert [term.label for term in config.reward.terms] == ["pickscore", "long", "short"]
    assert [term.title for term in config.reward.terms] == ["pickscore", "long (clipscore)", "short (clipscore)"]
    # A label stands for the term, with its arguments; terms that are not named are added.
    assert [reward.label for reward in config.evaluation.rewards] == ["redness", "short", "pickscore", "long"]
    assert config.evaluation.rewards[1] == short.spec
    (tmp_path / "c.yaml").write_text(dump_config(config))
    again = load_config_file(tmp_path / "c.yaml")
    assert again == config
    assert dump_config(again) == dump_config(config)
    jsonschema.validate(config.model_dump(mode="json"), Config.model_json_schema())


def test_arguments_decide_both_identities() -> None:
    one, two, three = (
        load_config([DEMO, f"reward.terms=[{{name: clipscore, options: {text}}}]"])
        for text in ("{}", "{batch: 16}", "{batch: 8}")
    )
    assert one.training_identity() == two.training_identity() != three.training_identity()
    assert one.evaluation_identity() == two.evaluation_identity() != three.evaluation_identity()
    measured = load_config([DEMO, "evaluation.rewards=[{name: clipscore, label: clip, options: {batch: 8}}]"])
    assert measured.training_identity() == load_config([DEMO]).training_identity()
    assert measured.evaluation.rewards[0].options["batch"] == 8


def test_files_on_this_machine_are_those_that_rewards_are_read_from(tmp_path: Path) -> None:
    for name in ("clip/model.safetensors", "clip/config.json", "clip/README.md", "head.pth", "env/bin/x.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    clip = [tmp_path / "clip/config.json", tmp_path / "clip/model.safetensors"]

    def found(*terms: dict[str, Any]) -> list[Path]:
        return local_files([RewardTerm.model_validate(term) for term in terms], tmp_path)

    served = {"reward": "aesthetic", "arguments": {"path": "clip", "head": "head.pth"}}
    # Of hub ids, of others' code and of another host there are none.
    assert found({"name": "clipscore"}, {"name": "redness"}, {"name": "a:B", "options": {"path": "clip"}}) == []
    assert found({"name": "process", "options": {**served, "url": "http://h"}}) == []
    assert found({"name": "process", "options": {**served, "environment": "env"}}) == [*clip, tmp_path / "head.pth"]
    twice = ({"name": "clipscore", "label": label, "options": {"path": "clip"}} for label in ("one", "two"))
    assert found(*twice) == clip


def test_an_import_path_s_arguments_are_kept_as_they_are() -> None:
    config = load_config([DEMO, 'reward.terms=[{name: "mine:Judge", label: own, options: {url: x, n: [1, {a: b}]}}]'])
    assert config.reward.terms[0].options == {"url": "x", "n": [1, {"a": "b"}]}


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (
            ["reward.terms=[{name: pickscore, options: {pth: x}}]"],
            ["reward.terms.0.options: pth: unknown key; did you mean 'path'?", "batch, dtype, path"],
        ),
        (
            ["reward.terms=[{name: hpsv2, options: {dtype: int8}}]"],
            ["reward.terms.0.options: dtype", "'fp32'", "'int8'"],
        ),
        (["reward.terms=[{name: hpsv2, options: {revision: main}}]"], ["options: revision", "no whole commit hash"]),
        (["reward.terms=[{name: hpsv2, options: {tokenizer_revision: v1}}]"], ["tokenizer_revision", "commit hash"]),
        (["reward.terms=[{name: clipscore, options: {template: no}}]"], ["template", "must hold '{}' once"]),
        (["reward.terms=[{name: redness, options: {path: x}}]"], ["options: path: reward 'redness' takes no options"]),
        (["reward.terms=[{name: redness, options: 3}]"], ["reward.terms.0.options", "dictionary"]),
        (['reward.terms=[{name: "a:b", options: {x: nan}}]'], ["reward.terms.0.options", "cannot be saved"]),
        (["reward.terms=[{name: redness, label: a/b}]"], ["reward.terms.0.label", "'a/b' is no label"]),
        (["reward.terms=[{name: redness, label: scene}]"], ["reward.terms.0.label", "name of another reward"]),
        (
            ["reward.terms=[{name: clipscore}, {name: clipscore, options: {batch: 2}}]"],
            ["reward.terms: a reward is named twice: clipscore, clipscore", "a label of its own"],
        ),
        (
            ["evaluation.rewards=[{name: clipscore}, {name: clipscore, options: {batch: 2}}]"],
            ["evaluation.rewards: a reward is named twice"],
        ),
        (
            ["evaluation.rewards=[{name: redness, lable: x}]"],
            ["evaluation.rewards.0.lable: unknown key; did you mean 'label'?", "allowed: frames, label, name, options"],
        ),
        (
            [TERMS, "evaluation.rewards=[{name: clipscore, label: long}]"],
            ["evaluation: rewards: 'long' is what a trained term is called", "another label"],
        ),
        ([TERMS, "evaluation.rewards=[shrt]"], ["evaluation.rewards", "'shrt' is no reward"]),
    ],
)
def test_what_is_wrong_is_told_by_its_key(overrides: list[str], told: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config([DEMO, *overrides])
    assert [text for text in told if text not in str(caught.value)] == []


def test_rewards_of_pictures_are_refused_for_videos() -> None:
    video: list[Any] = ["generator.frames=5", "reward.terms=[redness]"]
    check_run(load_config([DEMO, *video, "evaluation.rewards=[]"]))
    check_run(load_config([DEMO, "generator.frames=2", "reward=flicker", "evaluation.rewards=[]"]))
    with pytest.raises(ConfigError, match=r"reward.terms: reward 'flicker' takes videos of two frames or more"):
        check_run(load_config([DEMO, "reward=flicker", "evaluation.rewards=[]"]))
    with pytest.raises(ConfigError, match=r"evaluation.rewards: reward 'pickscore' takes pictures"):
        check_run(load_config([DEMO, *video, "evaluation.rewards=[pickscore]"]))


def test_weights_that_are_no_files_are_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(RewardError, match=rf"head '{path}': is neither a regular file nor a folder"):
            local_path("head", str(path))
        with pytest.raises(RewardError, match=rf"path '{path}': is neither a regular file nor a folder"):
            located("path", str(path), None, [])


def test_a_picture_to_be_scored_is_a_file_of_some_size(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "cut.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR")
    Image.new("1", (8000, 8000)).save(tmp_path / "huge.png")
    for name, told in (("pipe", "it is a pipe"), ("cut", "is no picture"), ("huge", "has 64000000 pixels, at most")):
        with pytest.raises(RewardError, match=rf"{name}\.png: .*{told}"):
            _read(tmp_path / f"{name}.png")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"0.weight": torch.ones(2, 3, dtype=torch.int8)}, r"not of floating point: 0\.weight"),
        ({"1.running_var": torch.full((2,), torch.nan)}, r"not finite: 1\.running_var"),
        ({"0.bias": torch.ones(3)}, r"of another shape: 0\.bias"),
        ({"1.num_batches_tracked": torch.tensor(7)}, None),
    ],
)
def test_weights_that_would_compute_something_else_are_refused(change: dict[str, Tensor], told: str | None) -> None:
    network = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    tensors = network.state_dict() | change
    with contextlib.nullcontext() if told is None else pytest.raises(RewardError, match=f"^here: .*{told}"):
        fill(network, tensors, "here", "fp32")
