"""The Perceptual Structuring Module (PSM): a frozen backbone and the allocation maps drawn from its features."""

from vipo.perception.allocator import AllocationMaps, allocate, orient, principal_components
from vipo.perception.backbones import Backbone, PerceptionError, load_backbone
from vipo.perception.structuring import PerceptualStructuring

__all__ = [
    "AllocationMaps",
    "Backbone",
    "PerceptionError",
    "PerceptualStructuring",
    "allocate",
    "load_backbone",
    "orient",
    "principal_components",
]
