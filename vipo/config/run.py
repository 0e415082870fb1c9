"""The configuration of one run, and what holds between its sections."""

from collections.abc import Mapping
from typing import Any, Self

from pydantic import ValidationInfo, field_validator, model_validator

from vipo.config.evaluation import EvaluationConfig
from vipo.config.forward import AwmConfig, NftConfig
from vipo.config.objective import SurrogateConfig
from vipo.config.optimizer import AdamW8bitConfig
from vipo.config.reward import RewardSpec, referred
from vipo.config.section import MOST_CALLS
from vipo.config.sections import Sections


class Config(Sections):
    """Everything one run needs, composed from `configs/` and the overrides."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        forward = isinstance(self.objective, NftConfig | AwmConfig)
        window = None if forward else self.sampling.window
        dense = self.sampling.steps - 1 if window is None else window.size
        if self.training.trained_transitions > dense:
            raise ValueError(
                f"training.trained_transitions {self.training.trained_transitions} exceeds the {dense} transitions "
                f"with a density of sampling.steps {self.sampling.steps} (the last step is deterministic"
                f"{'' if window is None else ', and so is all outside sampling.window'})"
            )
        if isinstance(self.objective, SurrogateConfig):
            self._fits(self.objective)
        elif forward and self.sampling.transition == "ddim":
            raise ValueError(
                f"objective.name {self.objective.name!r} needs a generator that predicts flow matching's velocity; "
                "sampling.transition 'ddim' is for those that predict noise; use objective.name=surrogate"
            )
        if isinstance(self.objective, AwmConfig) and self.credit.sources and self.credit.multiplies == "reward":
            raise ValueError(
                "objective.name 'awm' places credit in a sample's likelihood, and needs one advantage a sample: use "
                "credit.multiplies=advantage"
            )
        if self.credit.steps != "none" and (forward or self.sampling.ode is not None):
            raise ValueError(
                f"credit.steps {self.credit.steps!r} gives transitions advantages of their own, and "
                + (f"objective.name {self.objective.name!r}" if forward else f"sampling.ode {self.sampling.ode!r}")
                + " has none to train; set credit.steps=none"
            )
        study = self.experiment.study
        if study is not None:
            changes = {f"change/{part}" for part in ("total", "foreground", "background")}
            known = {f"reward/{reward.label}" for reward in self.evaluation.rewards} | changes
            for key, value in (("metric", study.metric), ("matched_on", study.matched_on)):
                if value not in known:
                    raise ValueError(
                        f"experiment.study.{key} {value!r} is not measured; one of {', '.join(sorted(known))}"
                    )
        for name, size in (("generator", self.generator), ("evaluation", self.evaluation)):
            for key in ("height", "width"):
                if (getattr(size, key) or 0) % 2:
                    raise ValueError(f"{name}.{key} {getattr(size, key)} must be even")
        return self

    @model_validator(mode="after")
    def _keeps_to_its_protocol(self) -> Self:
        values = {**self.model_dump(mode="json"), "generator": self.evaluated.model_dump(mode="json")}
        if self.protocol is not None and (broken := self.protocol.broken(values)):
            raise ValueError(
                f"protocol {self.protocol.name!r} v{self.protocol.version} pins {'; '.join(broken)}; leave that as it "
                "is, or the protocol out"
            )
        return self

    @model_validator(mode="after")
    def _has_the_bounded_metrics(self) -> Self:
        labels = [term.label for term in self.reward.terms]
        if told := self.alarms.unknown(labels, base_distance=self.training.base_distance):
            raise ValueError(f"alarms.stop: {told}")
        return self

    @model_validator(mode="after")
    def _watches(self) -> Self:
        if self.generator.compile != "none" and "attention" in self.credit.names:
            raise ValueError(
                f"generator.compile {self.generator.compile} and credit source 'attention': it listens to calls inside "
                "the network, which compiled blocks do not make; set generator.compile=none, or take another source"
            )
        own = self.training
        if "attention" in self.credit.names and (own.rollout_batch or own.micro_batch) > own.micro_batch:
            raise ValueError(
                f"training.rollout_batch {own.rollout_batch} and credit source 'attention': it watches the rollout of "
                "each micro-batch; set training.rollout_batch=null, or take another source"
            )
        window = self.sampling.window
        if "attention" in self.credit.names and window is not None and window.shared_start:
            raise ValueError(
                "sampling.window.shared_start true and credit source 'attention': it watches the rollout of each "
                "micro-batch; set it to false, or take another source"
            )
        return self

    @model_validator(mode="after")
    def _trains_in_fp32(self) -> Self:
        if self.generator.weights == "bf16" and not self.is_base:
            if self.training.lora is None:
                raise ValueError(
                    "generator.weights bf16 needs training.lora: a step on bf16 weights rounds small updates away; set "
                    "training.lora={} or generator.weights=fp32"
                )
            if self.distribution.strategy == "fsdp":
                raise ValueError(
                    "generator.weights bf16 and distribution.strategy fsdp: shards hold one precision; set "
                    "generator.weights=fp32 (gathered in bf16), or distribution.strategy=ddp"
                )
        return self

    @model_validator(mode="after")
    def _shards(self) -> Self:
        if isinstance(self.optimizer, AdamW8bitConfig) and self.distribution.strategy == "fsdp":
            raise ValueError(
                "optimizer.name adamw_8bit and distribution.strategy fsdp: its blocks of 256 values do not end where a "
                "process's rows do; use optimizer=adamw, whose state is sharded, or distribution.strategy=ddp"
            )
        return self

    @model_validator(mode="after")
    def _reaches(self) -> Self:
        warmup, updates = self.optimizer.warmup_updates, self.training.updates
        if warmup >= updates:
            raise ValueError(
                f"optimizer.warmup_updates {warmup} leaves none of the {updates} updates of training.updates at the "
                "whole rate; lower it"
            )
        if self.evaluation.weights == "ema" and self.training.ema_decay is None:
            raise ValueError("evaluation.weights ema needs training.ema_decay, such as 0.99, which keeps that mean")
        return self

    def _fits(self, objective: SurrogateConfig) -> None:
        if self.sampling.ode is not None:
            raise ValueError(
                f"sampling.ode {self.sampling.ode!r} gives transitions without a density, which objective.name "
                "'surrogate' needs; use sampling.ode=null, or another objective, such as nft or awm"
            )
        if objective.ratio_norm == "guard" and self.sampling.transition not in ("dance", "flow"):
            raise ValueError(
                "objective.ratio_norm 'guard' weights steps by 1 / dt, which fits the transitions dance and flow alone"
            )
        if objective.ratio == "sample" and self.credit.sources and self.credit.control != "mean":
            raise ValueError(
                f"objective.ratio 'sample' cannot carry credit.sources ({', '.join(self.credit.names)}): the layout "
                "would not reach the gradient; use objective.ratio=position, credit.sources=[], or credit.control=mean "
                "(each sample's mean weight)"
            )
        if objective.ratio == "position" and not self.credit.sources:
            raise ValueError(
                "objective.ratio 'position' needs one of credit.sources, such as {name: backbone} or {name: uniform}"
            )

    @field_validator("evaluation", mode="before")
    @classmethod
    def _with_named_terms(cls, value: Any, info: ValidationInfo) -> Any:
        if not isinstance(value, Mapping) or "rewards" not in value:
            return value
        reward = info.data.get("reward")
        return {**value, "rewards": referred(value["rewards"], None if reward is None else reward.terms)}

    @field_validator("evaluation")
    @classmethod
    def _with_trained_rewards(cls, value: EvaluationConfig, info: ValidationInfo) -> EvaluationConfig:
        # Arms are compared on what they were trained for. Without `reward`, which did not validate, nothing is known.
        reward = info.data.get("reward")
        named = {spec.label: spec for spec in value.rewards}
        added: tuple[RewardSpec, ...] = ()
        for term in () if reward is None else reward.terms:
            if (other := named.get(term.label)) is None:
                added += (term.spec,)
            elif other.identity != term.spec.identity:
                raise ValueError(
                    f"rewards: {term.label!r} is what a trained term is called, which has other arguments; name it "
                    "alone to measure that term, or give this reward another label"
                )
        return value.model_copy(update={"rewards": value.rewards + added}) if added else value

    @model_validator(mode="after")
    def _ends(self) -> Self:
        training, evaluation = self.training, self.evaluation
        weights = 1 + len(training.save_at)
        for what, count in (
            (
                "training.updates * prompts_per_update * group_size * sampling.steps",
                training.updates * training.prompts_per_update * training.group_size * self.sampling.steps,
            ),
            (
                f"evaluation.prompts * samples_per_prompt * steps, for {weights} sets of weights,",
                evaluation.prompts * evaluation.samples_per_prompt * evaluation.steps * weights,
            ),
        ):
            if count > MOST_CALLS:
                raise ValueError(
                    f"{what} is {count} evaluations of the network, more than the {MOST_CALLS} that end in reasonable "
                    "time; lower one of them"
                )
        return self
