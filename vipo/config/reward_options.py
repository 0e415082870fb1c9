"""Arguments of the rewards that ship: a section each, by the reward's name."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Literal, get_args

from pydantic import Field

from vipo.config.reward_judge import JudgeOptions
from vipo.config.reward_process import ProcessOptions
from vipo.config.section import Commit, Section, UserPath, WithPrompt

Precision = Literal["fp32", "bf16", "fp16"]
Residency = Literal["keep", "offload", "free"]


class NetworkOptions(Section):
    """What every reward with a network takes."""

    path: UserPath = Field(description="Weights: a file; of those that a hub has, also a folder or a hub id.")
    dtype: Precision = Field("fp32", description="Type of the weights and of what the network computes.")
    batch: Annotated[int, Field(ge=1, le=2**16)] = Field(16, description="Pictures that go through at once, at most.")
    resident: Residency = Field(
        "keep",
        description="Where the network is between its uses. keep: on the device; offload: in the CPU's memory; free: "
        "nowhere, its files are read again for the next one.",
    )


class ModelOptions(NetworkOptions):
    """What those take whose weights a hub has."""

    revision: Commit | None = Field(
        None, description="Commit of the hub repository, all 40 digits; null: its newest state."
    )


class OtherTokenizerOptions(ModelOptions):
    """What those take whose tokenizer is not beside their weights."""

    tokenizer: UserPath = Field(description="Tokenizer: a folder or a hub id.")
    tokenizer_revision: Commit | None = Field(None, description="Commit of the tokenizer's hub repository.")


class ClipScoreOptions(ModelOptions):
    """Of `clipscore`."""

    path: UserPath = "openai/clip-vit-large-patch14"
    template: WithPrompt = Field("{}", description="The text that pictures are compared with; {} is the prompt.")


class PickScoreOptions(OtherTokenizerOptions):
    """Of `pickscore`."""

    path: UserPath = "yuvalkirstain/PickScore_v1"
    tokenizer: UserPath = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


class HPSv2Options(OtherTokenizerOptions):
    """Of `hpsv2`."""

    path: UserPath = "xswu/HPSv2"
    tokenizer: UserPath = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


class AestheticOptions(ModelOptions):
    """Of `aesthetic`."""

    path: UserPath = "openai/clip-vit-large-patch14"
    head: UserPath = Field(
        "weights/sac+logos+ava1-l14-linearMSE.pth",
        description="File of the published predictor's head, or safetensors of the same tensors.",
    )


class ImageRewardOptions(OtherTokenizerOptions):
    """Of `imagereward`."""

    path: UserPath = "THUDM/ImageReward"
    tokenizer: UserPath = "google-bert/bert-base-uncased"


class MotionOptions(NetworkOptions):
    """Of `motion`."""

    path: UserPath = "weights/raft_large_C_T_SKHT_V2-ff5fadd5.pth"


class OnQwenOptions(ModelOptions):
    """What those take that are a Qwen2-VL."""

    base: UserPath = Field(description="The Qwen2-VL it was trained from: configuration and tokenizer.")
    base_revision: Commit | None = Field(None, description="Commit of the base's hub repository.")
    instruction: UserPath = Field(
        description="The published Python file that holds the text which these models are asked with. It is read, not "
        "run."
    )


class VideoAlignOptions(OnQwenOptions):
    """Of `videoalign`."""

    path: UserPath = "KwaiVGI/VideoReward"
    base: UserPath = "Qwen/Qwen2-VL-2B-Instruct"
    instruction: UserPath = "weights/prompt_template.py"
    dimension: Literal["VQ", "MQ", "TA"] = Field(
        "VQ", description="VQ: visual quality; MQ: motion quality; TA: text alignment."
    )
    frame_rate: Annotated[float, Field(gt=0, le=1000)] = Field(16.0, description="Frames per second of the clips.")


class HPSv3Options(OnQwenOptions):
    """Of `hpsv3`."""

    path: UserPath = "MizzenAI/HPSv3"
    base: UserPath = "Qwen/Qwen2-VL-7B-Instruct"
    instruction: UserPath = "weights/data_collator_qwen.py"


class GenEvalOptions(ModelOptions):
    """Of `geneval`: `path` is the CLIP that tells colours."""

    path: UserPath = "openai/clip-vit-large-patch14"
    detector: UserPath = Field("facebook/mask2former-swin-small-coco-instance", description="Folder or hub id.")
    detector_revision: Commit | None = Field(None, description="Commit of the detector's hub repository.")
    threshold: Annotated[float, Field(ge=0, le=1)] = Field(0.3, description="Objects less sure do not count.")
    counting_threshold: Annotated[float, Field(ge=0, le=1)] = Field(0.9, description="Of the tag counting.")
    score: Literal["strict", "claims"] = Field(
        "strict", description="strict: 1 where all claims hold; claims: the share of those that do."
    )


class OcrOptions(Section):
    """Of `ocr`."""

    key: str = Field(
        "text",
        min_length=1,
        description="Of the prompt's metadata, the key whose value is the text to be drawn; without it, what the "
        'prompt holds between its first two ".',
    )
    side: Annotated[int, Field(ge=32, le=2**12)] = Field(
        736, description="Pictures whose shorter side has fewer pixels are enlarged to it before text is looked for."
    )
    confidence: Annotated[float, Field(ge=0, le=1)] = Field(0.5, description="Lines read with less are not counted.")


REWARD_OPTIONS: Mapping[str, type[Section]] = MappingProxyType(
    {
        "clipscore": ClipScoreOptions,
        "pickscore": PickScoreOptions,
        "hpsv2": HPSv2Options,
        "aesthetic": AestheticOptions,
        "imagereward": ImageRewardOptions,
        "ocr": OcrOptions,
        "geneval": GenEvalOptions,
        "motion": MotionOptions,
        "videoalign": VideoAlignOptions,
        "hpsv3": HPSv3Options,
        "process": ProcessOptions,
        "judge": JudgeOptions,
    }
)
"""Those of a registered reward, checked without its code being imported. A reward that is not here takes none."""


def places(reward: str) -> dict[str, str | None]:
    """Options of a registered reward that name a file, a folder or a hub repository, and the option of its commit.

    None: it is no hub repository.
    """
    section = REWARD_OPTIONS.get(reward)
    fields = {} if section is None else section.model_fields
    found = {}
    for name, field in fields.items():
        # Its annotation is gone: what tells a `UserPath` from other texts is its validator.
        if field.annotation is str and any(item in get_args(UserPath)[1:] for item in field.metadata):
            revision = "revision" if name == "path" else f"{name}_revision"
            found[name] = revision if revision in fields else None
    return found
