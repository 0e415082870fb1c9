"""Rewards: one file each, addressed by name or import path. A reward is a callable."""

from vipo.rewards.registry import REWARDS, Reward, RewardError, load_reward, score

__all__ = ["REWARDS", "Reward", "RewardError", "load_reward", "score"]
