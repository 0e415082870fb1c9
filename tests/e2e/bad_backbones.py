"""Backbones that do not fit, by import path."""

import sys

from torch import nn

from vipo.config.perception import PerceptionConfig
from vipo.perception import Backbone


def narrow(config: PerceptionConfig) -> Backbone:
    """Two features a patch."""
    return Backbone(nn.Conv2d(3, 2, 8, stride=8), feature_width=2, orientation="border", input_size=64, stride=8)


def coarse(config: PerceptionConfig) -> Backbone:
    """One patch for the whole picture."""
    return Backbone(nn.Conv2d(3, 16, 64), feature_width=16, orientation="border", input_size=64, stride=64)


def no_backbone(config: PerceptionConfig) -> nn.Module:
    return nn.Conv2d(3, 16, 8)


def exits(config: PerceptionConfig) -> Backbone:
    sys.exit(0)
