"""Configuration: Hydra composition, pydantic validation, JSON Schema. Imports no torch."""
