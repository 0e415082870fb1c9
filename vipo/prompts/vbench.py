"""VBench measures a dimension on the prompts that its metadata names it for, and on no others."""

from collections.abc import Mapping
from typing import Any

#: Of the labels of rewards that are one of its dimensions.
VBENCH = "vbench_"


def has_dimensions(metadata: Mapping[str, Any]) -> bool:
    """Whether a prompt says which dimensions it is measured in: a list, `dimension`."""
    return isinstance(metadata.get("dimension"), list)


def is_measured(label: str, metadata: Mapping[str, Any]) -> bool:
    """Whether a reward of this label scores samples of a prompt: a dimension of VBench where the prompt names it, or
    names none at all; any other reward everywhere."""
    if not label.startswith(VBENCH) or not has_dimensions(metadata):
        return True
    return label.removeprefix(VBENCH) in metadata["dimension"]
