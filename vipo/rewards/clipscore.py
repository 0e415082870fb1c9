"""CLIPScore: how well a picture fits its text, by CLIP alone."""

from vipo.config.reward_options import ClipScoreOptions
from vipo.rewards.clip import ClipReward


class ClipScore(ClipReward):
    """Cosine of picture and text, [-1, 1]; tables show it times 100.

    Source: Hessel et al., arXiv 2104.08718, equation 1 without its ``2.5 max(cosine, 0)``, which no group's
    normalisation sees where cosines are positive. The paper's template is ``A photo depicts {}``.
    """

    Options = ClipScoreOptions

    def __init__(self, device: str, options: ClipScoreOptions) -> None:
        super().__init__(device, options)
        self._template = options.template

    def _text(self, prompt: str) -> str:
        return self._template.replace("{}", prompt)
