"""A reward's network is as large as its files say, without a value being read."""

from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from reward_checkpoints import head_tensors, write_clip, write_detector, write_hpsv2, write_image_reward
from safetensors.torch import save_file
from torchvision.models.optical_flow import raft_large

from vipo.config.reward_options import REWARD_OPTIONS, NetworkOptions
from vipo.rewards import RewardError, load_reward
from vipo.rewards.networks import network_bytes
from vipo.rewards.weights import at_hand


def written(name: str, folder: Path) -> dict[str, Any]:
    """Options with small random weights."""
    if name in ("clipscore", "pickscore"):
        write_clip(folder)
        return {"path": str(folder)} | ({"tokenizer": str(folder)} if name == "pickscore" else {})
    if name == "hpsv2":
        write_hpsv2(folder)
        return {"path": str(folder), "tokenizer": str(folder)}
    if name == "imagereward":
        write_image_reward(folder)
        return {"path": str(folder), "tokenizer": str(folder)}
    if name == "aesthetic":
        write_clip(folder)
        save_file(head_tensors(24), folder / "head.safetensors")
        return {"path": str(folder), "head": str(folder / "head.safetensors")}
    if name == "geneval":
        write_detector(folder / "detector")
        write_clip(folder / "clip")
        return {"path": str(folder / "clip"), "detector": str(folder / "detector")}
    torch.save(raft_large(weights=None).state_dict(), folder / "raft.pth")
    return {"path": str(folder / "raft.pth")}


@pytest.mark.parametrize("name", ["clipscore", "pickscore", "hpsv2", "imagereward", "aesthetic", "geneval", "motion"])
def test_a_network_is_as_large_as_its_files_say(name: str, tmp_path: Path) -> None:
    given = written(name, tmp_path)
    for dtype in ("fp32", "bf16"):
        options = REWARD_OPTIONS[name].model_validate({**given, "dtype": dtype})
        assert isinstance(options, NetworkOptions)
        reward: Any = load_reward(name, "cpu", options.model_dump(mode="json"))
        counted = network_bytes(reward, options)
        with reward.resident as network:
            held = network.state_dict().values()
        size = 2 if dtype == "bf16" else 4
        loaded = sum(value.numel() for value in held if value.is_floating_point()) * size
        # BLIP's two projections, which nothing here reads, are in ImageReward's file.
        unread = size * (16 * 128 + 16 + 16 * 64 + 16) if name == "imagereward" else 0
        assert counted == loaded + unread


def test_nothing_is_fetched_for_a_count(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    def refuse(*_: Any, local_files_only: bool, **__: Any) -> str:
        asked.append(local_files_only)
        raise LocalEntryNotFoundError("not here")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with at_hand(), pytest.raises(RewardError, match="as a hub id it is neither in the local cache"):
        load_reward("clipscore", "cpu", {})
    with pytest.raises(RewardError):
        load_reward("clipscore", "cpu", {})
    assert asked == [True, False]
