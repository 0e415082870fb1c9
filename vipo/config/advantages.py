"""Section `advantages`."""

from typing import Literal

from pydantic import Field

from vipo.config.section import PositiveFloat, Section


class AdvantagesConfig(Section):
    """From the rewards of a group to its advantages, whatever the objective."""

    std: Literal["group", "batch"] = Field(
        "group", description="Standard deviation of the group (ddof 1) or of the whole update (ddof 0, Flow-GRPO)."
    )
    std_floor: PositiveFloat = Field(1e-4, description="Added to the standard deviation.")
    clip: PositiveFloat = Field(5.0, description="The largest advantage of either sign, before credit.")
