"""What credit takes beyond what a run does in any case: counted, not timed."""

from dataclasses import astuple, dataclass, fields


@dataclass(frozen=True)
class Costs:
    """For each sample, beyond sampling, decoding and scoring it once.

    Attributes:
        backbone_calls: pictures or frames that a backbone reads.
        network_calls: evaluations of the generator's network.
        decodes: of latents, with or without a gradient.
        reward_calls: scores.
        bytes_kept: of what is kept from one step of the work to the next, other than the weights themselves.
    """

    backbone_calls: int = 0
    network_calls: int = 0
    decodes: int = 0
    reward_calls: int = 0
    bytes_kept: int = 0

    def __add__(self, other: "Costs") -> "Costs":
        """Of both."""
        return Costs(*(one + two for one, two in zip(astuple(self), astuple(other), strict=True)))

    @property
    def counted(self) -> dict[str, int]:
        """Those that are not 0, by name."""
        return {field.name: value for field in fields(self) if (value := getattr(self, field.name))}
