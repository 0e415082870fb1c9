"""vipo: post-train image and video generators with Visual Preference Policy Optimization."""

__version__ = "0.1.0"
