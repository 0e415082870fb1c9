"""Rewards: one file each, addressed by name or import path. A reward is a callable."""

from vipo.config.registries import REWARDS
from vipo.rewards.errors import RewardError
from vipo.rewards.registry import (
    begin,
    check_identities,
    find_reward,
    identities,
    load_reward,
    load_rewards,
    load_spec,
    score,
    score_where,
    weight_files,
)
from vipo.rewards.resident import by_network, in_use
from vipo.rewards.scored import Reward, Scored

__all__ = [
    "REWARDS",
    "Reward",
    "RewardError",
    "Scored",
    "begin",
    "by_network",
    "check_identities",
    "find_reward",
    "identities",
    "in_use",
    "load_reward",
    "load_rewards",
    "load_spec",
    "score",
    "score_where",
    "weight_files",
]
