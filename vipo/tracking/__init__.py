"""What a run reports while it trains: JSON lines always, TensorBoard beside.

``metrics.jsonl`` holds deterministic values only and is part of the equality contract; ``timing.jsonl`` and
``tb/`` (times, memory) are volatile.
"""

from vipo.tracking.timer import Timer
from vipo.tracking.tracker import Tracker, TrackingError

__all__ = ["Timer", "Tracker", "TrackingError"]
