"""Section `pretrain`."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from vipo.config.section import LARGEST_INT, MOST_CALLS, NonNegativeFloat, PositiveFloat, PositiveInt, Section, Seed

_Size = Annotated[int, Field(ge=1, le=2**12)]


class PretrainConfig(Section):
    """A demo generator's construction: scenes, autoencoder, transformer and training (`vipo base`)."""

    seed: Seed = 0
    threads: Annotated[int, Field(ge=1, le=1024)] = 2
    drawn: Literal["shapes", "words", "motion"] = Field(
        "shapes",
        description="What the scenes show: flat shapes (64 x 64 pixels), a short word (32 x 64), or, for a Wan, a "
        "shape that moves (9 frames of 32 x 32); the others are for a FLUX.",
    )
    scenes: Annotated[int, Field(ge=1, le=10**6)] = 32000
    two_objects: Annotated[float, Field(ge=0, le=1)] = Field(0.15, description="Share of the scenes; of shapes alone.")
    max_sequence_length: _Size = 16
    autoencoder_width: _Size = 32
    latent_channels: _Size = 8
    latent_noise: NonNegativeFloat = 0.05
    autoencoder_steps: PositiveInt = 6000
    autoencoder_batch_size: PositiveInt = 16
    autoencoder_learning_rate: PositiveFloat = 3e-3
    autoencoder_gradient_norm: PositiveFloat | None = Field(
        None, description="Length to which the gradient of the reconstruction is cut; null leaves it as it is."
    )
    decoder_steps: Annotated[int, Field(ge=0, le=LARGEST_INT)] = Field(
        0, description="Steps of the decoder alone, after all else; the latents stay as they are."
    )
    decoder_learning_rate: PositiveFloat = 1e-3
    text_width: Annotated[int, Field(ge=32, le=2**12, multiple_of=32)] = 96
    double_blocks: _Size = Field(2, description="Of a FLUX.")
    single_blocks: _Size = Field(3, description="Of a FLUX.")
    blocks: _Size = Field(5, description="Of a Wan.")
    heads: _Size = 3
    head_width: Annotated[int, Field(ge=16, le=2**12, multiple_of=16)] = 64
    steps: PositiveInt = 9000
    batch_size: PositiveInt = 48
    learning_rate: PositiveFloat = 1.5e-3
    weight_decay: NonNegativeFloat = 0.01
    warmup: Annotated[int, Field(ge=0, le=LARGEST_INT)] = 300
    average_decay: Annotated[float, Field(gt=0, lt=1)] = 0.9995
    shift: Annotated[float, Field(ge=0.01, le=100, allow_inf_nan=False)] = 2.0
    sampling_shift: Annotated[float, Field(ge=0.01, le=100, allow_inf_nan=False)] = 2.0

    @model_validator(mode="after")
    def _ends(self) -> Self:
        for steps, size in (
            ("steps", "batch_size"),
            ("autoencoder_steps", "autoencoder_batch_size"),
            ("decoder_steps", "autoencoder_batch_size"),
        ):
            count = getattr(self, steps) * getattr(self, size)
            if count > MOST_CALLS:
                raise ValueError(
                    f"{steps} {getattr(self, steps)} * {size} {getattr(self, size)} is {count} samples, more than the "
                    f"{MOST_CALLS} that end in reasonable time; lower one of them"
                )
        return self
