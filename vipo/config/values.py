"""Plain configuration values: their hash, their flat form, and what messages offer."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any


def config_hash(value: Any) -> str:
    """SHA-256 of a JSON-serialisable value in canonical form."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def flattened(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested mappings as pairs of a dotted key (``section.key``) and its value."""
    for key, item in value.items():
        if isinstance(item, Mapping):
            yield from flattened(item, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", item


def divisors(number: int) -> str:
    """The divisors of a number from 1 to `MOST_SAMPLES`, as text."""
    return ", ".join(str(item) for item in range(1, number + 1) if number % item == 0)
