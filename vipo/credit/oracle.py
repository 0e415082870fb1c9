"""The source `oracle`: the object's own pixels, on drawn scenes."""

import torch

from vipo.config.credit import OracleCreditConfig
from vipo.credit.source import Context, CreditError, CreditSource, Samples, Weights
from vipo.demo.seen import object_coverage
from vipo.perception.allocator import finish


class OracleCredit(CreditSource):
    """What a reward that reads the object's pixels looks at: an upper bound for maps."""

    options: OracleCreditConfig

    def set_up(self, context: Context) -> None:
        """Check that the samples are drawn scenes.

        Raises:
            CreditError: the generator makes videos, or a prompt names no objects.
        """
        without = [prompt.text for prompt in context.prompts if "objects" not in prompt.metadata]
        if without or context.generator.frame_groups is not None:
            lacks = f"{without[0]!r} has none" if without else "this generator makes videos"
            raise CreditError(
                "credit source 'oracle' needs drawn pictures and prompts with scene metadata ('objects'): " + lacks
            )

    def __call__(self, samples: Samples) -> Weights:
        """The share of each cell that the object covers; a picture without an object has nothing to say."""
        found = []
        for pictures in samples.pieces():
            coverage = object_coverage(pictures, samples.grid)
            constant = coverage.amax(dim=(1, 2)) == 0
            weights = finish(
                coverage,
                constant,
                torch.ones_like(constant),
                normalize=self.options.normalize,
                exponent=self.options.exponent,
                floor=self.options.floor,
            )
            found.append((weights, constant))
        weights, constant = (torch.cat(part) for part in zip(*found, strict=True))
        return Weights(weights, constant, mean_one=self.options.normalize == "mean")
