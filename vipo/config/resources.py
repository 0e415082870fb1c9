"""Section `cluster`: what jobs ask a cluster for."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from vipo.config.section import LONGEST_NAME, PositiveInt, Section

# Handed to a scheduler's command line.
_Word = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.,@+-]*$", max_length=LONGEST_NAME)]


class StageResources(Section):
    """What one job of a stage asks a cluster for, on each of its nodes."""

    partition: _Word | None = Field(None, description="null: the cluster's default.")
    qos: _Word | None = Field(None, description="Quality of service; null: the cluster's default.")
    gpus: Annotated[int, Field(ge=0, le=1024)] | None = Field(
        None,
        description="null: on a generator.device 'cuda' one, for train and evaluate distribution.processes; else none.",
    )
    cpus: PositiveInt | None = Field(
        None, description="null: training.threads, for train and evaluate times distribution.processes."
    )
    memory_mb: PositiveInt = Field(8000, description="Main memory in MB.")
    runtime_minutes: PositiveInt = Field(60, description="Time limit; training goes on in the next job.")


class ClusterConfig(Section):
    """What the jobs of `snakemake --profile slurm` ask for; outside every identity. Of its keys, `shares` reruns."""

    account: _Word | None = Field(None, description="Charged for all jobs; null: none is named (no accounting).")
    stop_seconds: Annotated[int, Field(ge=0, le=65535)] = Field(
        300,
        description="How long before its time limit a training job is told to write a checkpoint and stop: more than "
        "an update takes. Slurm may do so a minute earlier. 0: not at all.",
    )
    shares: Annotated[int, Field(ge=1, le=1000)] = Field(
        1,
        description="Jobs that share the samples of one run, and then their scores. The results are the same, but the "
        "workflow plans finished ones again with another number (docs/cluster.md).",
    )
    prepare: StageResources = StageResources()
    encode: StageResources = StageResources()
    train: StageResources = StageResources()
    evaluate: StageResources = Field(StageResources(), description="Of sample, and of score.")
    report: StageResources = StageResources()
    crate: StageResources = StageResources()

    @model_validator(mode="after")
    def _trains_before_it_stops(self) -> Self:
        # Slurm checks limits now and then: the signal may come a minute earlier.
        if self.stop_seconds + 60 >= 60 * self.train.runtime_minutes and self.stop_seconds:
            raise ValueError(
                f"stop_seconds {self.stop_seconds} and the minute that Slurm may be early leave nothing of "
                f"train.runtime_minutes {self.train.runtime_minutes}: lower the one or raise the other"
            )
        return self
