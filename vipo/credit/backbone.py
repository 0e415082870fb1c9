"""The source `backbone`: the allocation map of a frozen vision backbone (ViPO)."""

import logging
from collections.abc import Mapping
from pathlib import Path

import torch

from vipo.credit.costs import Costs
from vipo.credit.source import Context, CreditSource, Samples, Weights
from vipo.perception import PerceptualStructuring, load_backbone
from vipo.perception.backbones import NOT_MEASURED

log = logging.getLogger(__name__)


class BackboneCredit(CreditSource):
    """Where the backbone's features say that the content is; section `perception` has its options.

    Source: ViPO, arXiv 2511.18719, section 3.
    """

    structuring: PerceptualStructuring

    def set_up(self, context: Context) -> None:
        """Load the backbone and try it on a picture of the generator's size.

        Raises:
            PerceptionError: its weights cannot be loaded, or it does not take such pictures.
        """
        perception, generator = context.perception, context.generator.config
        backbone = load_backbone(perception, generator.device, context.root)
        self.structuring = PerceptualStructuring(backbone, perception)
        self.structuring.preflight((generator.height, generator.width))
        if self.structuring.evidence == NOT_MEASURED and context.is_main:
            log.warning(
                "perception.orientation: whether %r finds the object with %r at this layer and size was not measured "
                "here; look at `vipo map` of pictures of your kind, or measure it with `vipo orientation`",
                self.structuring.orientation,
                perception.backbone,
            )

    @property
    def inputs(self) -> Mapping[str, Path]:
        """The backbone's weights, where they are not its package's own."""
        source = self.structuring.backbone.source
        return {} if source is None else {"perception": source}

    def __call__(self, samples: Samples) -> Weights:
        """The maps.

        Raises:
            VipoError: the features of a sample are not finite although its picture is.
        """
        found = [self.structuring(pictures, samples.grid, samples.frame_groups) for pictures in samples.pieces()]
        # After the last piece: on an accelerator, reading a flag waits for everything before it.
        for part in found:
            part.check()
        return Weights(
            torch.cat([part.maps for part in found]),
            torch.cat([part.constant for part in found]),
            torch.cat([part.converged for part in found]),
            mean_one=self.structuring.config.normalize == "mean",
            costs=Costs(backbone_calls=1 if samples.pictures.ndim == 4 else samples.pictures.shape[1]),
        )
