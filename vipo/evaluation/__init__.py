"""Held-out evaluation: sampling with fixed noise, scoring, statistics."""
