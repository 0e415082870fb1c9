"""What a run reports while it trains: rows of numbers always, and trackers, which are plug-ins.

``metrics.jsonl`` holds deterministic values only and is part of the equality contract; ``timing.jsonl``, ``sheets/``
and what trackers write (``tb/``, ``trackers/``) are volatile. Libraries are imported where a tracker is made.
"""
