"""Parts by name: a mistyped one is found before anything heavy is imported."""

import difflib
from collections.abc import Iterable, Mapping
from types import MappingProxyType

from vipo.foreign import is_import_path

FAMILIES: Mapping[str, str] = MappingProxyType(
    {
        "flux": "vipo.generators.flux:FluxGenerator",
        "sd": "vipo.generators.stable_diffusion:StableDiffusionGenerator",
        "cogvideox": "vipo.generators.cogvideox:CogVideoXGenerator",
        "flux2_dev": "vipo.generators.flux2:Flux2DevGenerator",
        "flux2_klein": "vipo.generators.flux2:Flux2KleinGenerator",
        "hunyuan_video": "vipo.generators.hunyuan_video:HunyuanVideo15Generator",
        "ltx2": "vipo.generators.ltx2:LTX2Generator",
        "qwen_image": "vipo.generators.qwen_image:QwenImageGenerator",
        "qwen_image_21": "vipo.generators.qwen_image_21:QwenImage21Generator",
        "z_image": "vipo.generators.z_image:ZImageGenerator",
        "sana": "vipo.generators.sana:SanaGenerator",
        "sdxl": "vipo.generators.stable_diffusion_xl:StableDiffusionXLGenerator",
        "sd3": "vipo.generators.stable_diffusion_3:StableDiffusion3Generator",
        "wan": "vipo.generators.wan:WanGenerator",
        "wan22_a14b": "vipo.generators.wan:Wan22PairGenerator",
        "wan22_ti2v": "vipo.generators.wan:Wan22TextImageGenerator",
    }
)
"""Generator adapters by name: one line each; an import path needs none."""

REWARDS: Mapping[str, str] = MappingProxyType(
    {
        "redness": "vipo.rewards.redness:redness",
        "object_redness": "vipo.rewards.object_redness:object_redness",
        "late_redness": "vipo.rewards.late_redness:late_redness",
        "scene": "vipo.rewards.scene:scene",
        "scene_shape": "vipo.rewards.scene:scene_shape",
        "scene_background": "vipo.rewards.scene:scene_background",
        "scene_count": "vipo.rewards.scene:scene_count",
        "clipscore": "vipo.rewards.clipscore:ClipScore",
        "pickscore": "vipo.rewards.pickscore:PickScore",
        "hpsv2": "vipo.rewards.hpsv2:HPSv2",
        "aesthetic": "vipo.rewards.aesthetic:Aesthetic",
        "imagereward": "vipo.rewards.imagereward:ImageReward",
        "ocr": "vipo.rewards.ocr:Ocr",
        "geneval": "vipo.rewards.geneval:GenEval",
        "flicker": "vipo.rewards.flicker:flicker",
        "motion": "vipo.rewards.motion:Motion",
        "videoalign": "vipo.rewards.videoalign:VideoAlign",
        "hpsv3": "vipo.rewards.hpsv3:HPSv3",
        "process": "vipo.rewards.process:Process",
        "judge": "vipo.rewards.judge:Judge",
    }
)
"""Import paths of the rewards that ship, by name: a mistyped name is found before anything heavy is imported."""

TRACKERS: Mapping[str, str] = MappingProxyType(
    {
        "tensorboard": "vipo.tracking.tensorboard:TensorBoard",
        "wandb": "vipo.tracking.wandb:WeightsAndBiases",
        "mlflow": "vipo.tracking.mlflow:MLflow",
    }
)
"""Trackers by name, each with the import path of what makes it; one line each, an import path needs none."""

CREDIT_SOURCES: Mapping[str, str] = MappingProxyType(
    {
        "backbone": "vipo.credit.backbone:BackboneCredit",
        "uniform": "vipo.credit.uniform:UniformCredit",
        "oracle": "vipo.credit.oracle:OracleCredit",
        "contrast": "vipo.credit.contrast:ContrastCredit",
        "reward": "vipo.credit.reward:RewardCredit",
        "attention": "vipo.credit.attention:AttentionCredit",
    }
)
"""Credit sources by name; the options of each are a section of `vipo.config.credit`."""

OBJECTIVES: Mapping[str, str] = MappingProxyType(
    {
        "surrogate": "vipo.objectives.surrogate:Surrogate",
        "nft": "vipo.objectives.nft:Nft",
        "awm": "vipo.objectives.awm:Awm",
    }
)
"""Objectives by name; the options of each are a section of `vipo.config.objective`."""

GATES: Mapping[str, str] = MappingProxyType(
    {
        "ppo": "vipo.objectives.gates:PpoGate",
        "symmetric": "vipo.objectives.gates:SymmetricGate",
        "divergence": "vipo.objectives.divergence:DivergenceGate",
        "none": "vipo.objectives.gates:NoGate",
    }
)
"""Gates by name; the options of each are a section of `vipo.config.objective`."""

PICTURE_REWARDS = frozenset(
    {"object_redness", "clipscore", "pickscore", "hpsv2", "aesthetic", "imagereward", "ocr", "geneval", "hpsv3"}
)
"""Rewards that take pictures of any size, and no videos."""

CLIP_REWARDS = frozenset({"flicker", "motion", "videoalign", "late_redness"})
"""Rewards that take videos, and no pictures."""

SCENE_REWARDS = frozenset({"scene", "scene_shape", "scene_background", "scene_count"})
"""Rewards that compare a picture of 64 pixels a side with its prompt's metadata ``objects`` and ``background``."""


def registered(value: str, known: Iterable[str], what: str) -> str:
    """Give back the name of a part: a known one, or an import path.

    Raises:
        ValueError: it is neither; `what` says in the message what it should name.
    """
    if value in known or is_import_path(value):
        return value
    close = difflib.get_close_matches(value, known, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise ValueError(
        f"{value!r} is no {what}: {hint}choose one of {', '.join(known)}, or an import path 'package.module:object'"
    )
