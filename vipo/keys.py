"""Seeds from keys: what every keyed draw starts from. Imports no torch."""

import hashlib
import json

Key = tuple[int | str, ...]


def keyed_seed(*key: int | str) -> int:
    """A 63-bit seed from a key of integers and strings (BLAKE2b of its canonical JSON).

    Raises:
        TypeError: a part of the key is neither an integer nor a string.
    """
    for part in key:
        if isinstance(part, bool) or not isinstance(part, int | str):
            raise TypeError(f"noise key {key!r}: part {part!r} is neither an integer nor a string")
    text = json.dumps(key, ensure_ascii=True, separators=(",", ":"))
    digest = hashlib.blake2b(text.encode("ascii"), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
