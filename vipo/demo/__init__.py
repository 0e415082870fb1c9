"""Procedural scenes and the small text-to-image generator that is trained on them."""
