"""Section `advantages`."""

from typing import Literal

from pydantic import Field

from vipo.config.section import PositiveFloat, Section


class AdvantagesConfig(Section):
    """From the rewards of a group to its advantages, whatever the objective."""

    combine: Literal["advantages", "rewards"] = Field(
        "advantages",
        description="What is weighted and added of several rewards: the advantage of each (DanceGRPO, ViPO), whatever "
        "their scales; or the rewards themselves, as one (Flow-GRPO).",
    )
    std: Literal["group", "batch", "none"] = Field(
        "group",
        description="What an advantage is divided by: the standard deviation of the group (ddof 1) or of the whole "
        "update (ddof 0, Flow-GRPO), or nothing (Dr. GRPO).",
    )
    std_floor: PositiveFloat = Field(1e-4, description="Added to the standard deviation, where there is one.")
    clip: PositiveFloat = Field(5.0, description="The largest advantage of either sign, before credit.")
