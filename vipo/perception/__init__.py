"""The Perceptual Structuring Module (PSM): a frozen backbone and the allocation maps drawn from its features."""

from vipo.perception.allocator import AllocationMaps, allocate
from vipo.perception.backbone import Backbone
from vipo.perception.components import PrincipalComponents, principal_components
from vipo.perception.errors import PerceptionError
from vipo.perception.loading import load_backbone
from vipo.perception.orientation import orient
from vipo.perception.structuring import PerceptualStructuring
from vipo.perception.temporal import consecutive_correlation

__all__ = [
    "AllocationMaps",
    "Backbone",
    "PerceptionError",
    "PerceptualStructuring",
    "PrincipalComponents",
    "allocate",
    "consecutive_correlation",
    "load_backbone",
    "orient",
    "principal_components",
]
