"""The sections of a run, and what each stage depends on of them."""

from typing import Annotated, Any, Self

from pydantic import AfterValidator, Field

from vipo.config.advantages import AdvantagesConfig
from vipo.config.alarms import AlarmsConfig
from vipo.config.arms import ExperimentConfig, check_arm_name
from vipo.config.credit import CreditConfig
from vipo.config.evaluation import INSTEAD, REPORTED, EvaluationConfig
from vipo.config.generator import GeneratorConfig
from vipo.config.later import without_later_choices
from vipo.config.objective import ObjectiveConfig, SurrogateConfig
from vipo.config.optimizer import AdamWConfig, OptimizerConfig
from vipo.config.perception import PerceptionConfig
from vipo.config.pretrain import PretrainConfig
from vipo.config.prompts import PromptsConfig
from vipo.config.protocol import ProtocolConfig
from vipo.config.resources import ClusterConfig
from vipo.config.reward import RewardConfig
from vipo.config.sampling import SamplingConfig
from vipo.config.section import Section, Seed
from vipo.config.tracking import TrackingConfig
from vipo.config.training import DistributionConfig, TrainingConfig


class Sections(Section):
    """Everything one run needs, section by section."""

    experiment: ExperimentConfig
    arm: Annotated[str, AfterValidator(check_arm_name)]
    seed: Seed = 0
    generator: GeneratorConfig
    prompts: PromptsConfig
    reward: RewardConfig
    perception: PerceptionConfig
    sampling: SamplingConfig
    credit: CreditConfig = CreditConfig()
    advantages: AdvantagesConfig = AdvantagesConfig()
    objective: ObjectiveConfig = SurrogateConfig()
    optimizer: OptimizerConfig = AdamWConfig()
    training: TrainingConfig
    distribution: DistributionConfig = DistributionConfig()
    evaluation: EvaluationConfig
    protocol: ProtocolConfig | None = Field(None, description="The pinned evaluation that this is; null: one's own.")
    cluster: ClusterConfig = ClusterConfig()
    tracking: TrackingConfig = TrackingConfig()
    alarms: AlarmsConfig = AlarmsConfig()
    pretrain: PretrainConfig | None = Field(None, description="How the generator was built, where it was built here.")

    @property
    def run_name(self) -> str:
        """Folder name of the run: ``<arm>-s<seed>``."""
        return f"{self.arm}-s{self.seed}"

    @property
    def evaluated(self) -> GeneratorConfig:
        """Section `generator` at the size, and with the guidance, that is evaluated."""
        return self.evaluation.generator_of(self.generator)

    @property
    def protocol_title(self) -> str | None:
        """The protocol's title, with how the generator is called."""
        if self.protocol is None:
            return None
        generator, sampling = self.evaluated, self.evaluation.sampling_of(self.sampling)
        called = {
            "guidance_scale": generator.guidance_scale,
            "guidance_scale_2": generator.guidance_scale_2,
            "negative_prompt": generator.negative_prompt,
            "max_sequence_length": generator.max_sequence_length,
            "decoding": generator.decoding,
            # Where noise is predicted there is none.
            "shift": None if sampling.transition == "ddim" else sampling.shift,
        }
        return self.protocol.title(called)

    @property
    def is_base(self) -> bool:
        """Whether this arm is the untrained generator."""
        return self.arm == "base"

    def training_identity(self) -> dict[str, Any]:
        """The sections that decide a training run's result; a checkpoint belongs to exactly one such value.

        Checkpoint frequency and how many are kept change nothing in the result and are left out, and so are trackers
        and the processes: a run goes on with others of them.
        """
        data = self.model_dump(
            mode="json",
            exclude={
                "experiment",
                "distribution",
                "evaluation",
                "protocol",
                "cluster",
                "tracking",
                "alarms",
                "pretrain",
            },
        )
        for volatile in ("checkpoint_every", "keep_checkpoints"):
            del data["training"][volatile]
        data["reward"]["terms"] = [term.deciding for term in self.reward.terms]
        if [term.weight for term in self.reward.terms] == [1]:
            # Of one reward its advantage is that of the sum.
            data["advantages"]["combine"] = "advantages"
        return without_later_choices(data)

    def prompts_identity(self) -> dict[str, Any]:
        """What decides the prepared prompts."""
        found = self.prompts.identity()
        if self.prompts.filters.max_tokens is not None:
            found["tokenizer"] = [self.generator.path, self.generator.revision]
        return found

    def embeddings_identity(self) -> dict[str, Any]:
        """What decides the embeddings, beside the prompts."""
        generator = self.generator.model_dump(
            mode="json", include={"family", "path", "revision", "device", "max_sequence_length", "negative_prompt"}
        )
        # What was encoded before there was a choice keeps its identity.
        choices = {"encoders": self.generator.encoders, "encoder_batch": self.generator.encoder_batch}
        chosen = {name: value for name, value in choices.items() if value not in ("fp32", 1)}
        return {**generator, **chosen, "threads": self.training.threads}

    def evaluation_identity(self) -> dict[str, Any]:
        """What decides an evaluation's samples and scores, beside the trained weights."""
        kept = {} if self.is_base else self.training.model_dump(mode="json", include={"updates", "save_at"})
        found = {
            "generator": self.evaluated.model_dump(mode="json"),
            "perception": self.perception.model_dump(mode="json"),
            "evaluation": {
                **self.evaluation.model_dump(mode="json", exclude=set(REPORTED | INSTEAD)),
                "rewards": [reward.deciding for reward in self.evaluation.rewards],
            },
            "shift": self.evaluation.sampling_of(self.sampling).shift,
            "threads": self.training.threads,
            "kept": kept,
            **({} if self.protocol is None else {"protocol": self.protocol_title}),
        }
        return without_later_choices(found)

    def sampling_identity(self) -> dict[str, Any]:
        """What decides an evaluation's samples, beside the trained weights."""
        identity = self.evaluation_identity()
        drawn = ("prompts", "samples_per_prompt", "steps", "batch", "seed")
        evaluation = {key: identity["evaluation"][key] for key in drawn}
        # The base has no other weights, and what was drawn before there was a choice keeps its identity.
        if not self.is_base and self.evaluation.weights != "trained":
            evaluation["weights"] = self.evaluation.weights
        return {
            **{key: value for key, value in identity.items() if key not in ("perception", "protocol")},
            "evaluation": evaluation,
        }

    def as_base(self) -> Self:
        """The experiment's base with this run's settings: what every arm is compared with, drawn once for all."""
        base = self.experiment.arms["base"]
        return self if self.is_base else self.model_copy(update={"arm": "base", "seed": base.seeds[0]})

    def report_identity(self) -> dict[str, Any]:
        """What the report reads beside the results."""
        found = self.model_dump(mode="json", include={"experiment", "reward", "evaluation"})
        return found if self.protocol is None else {**found, "protocol": self.protocol_title}
