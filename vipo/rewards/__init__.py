"""Rewards: one file each, addressed by name or import path. A reward is a callable."""

from vipo.config.registries import REWARDS
from vipo.rewards.registry import Reward, RewardError, find_reward, load_reward, score

__all__ = ["REWARDS", "Reward", "RewardError", "find_reward", "load_reward", "score"]
