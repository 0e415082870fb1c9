"""The model card of an exported run: metadata as the Hub reads it, and a page in Markdown."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from vipo.config.run import Config
from vipo.errors import VipoError
from vipo.evaluation.statistics import Better, Interval, decimals, wording
from vipo.handover.comfyui import ComfyFiles
from vipo.handover.usage import usage_example
from vipo.provenance import package_sha256
from vipo.reporting.wording import describe, label
from vipo.text import visible

LICENCE_IDENTIFIER = re.compile(r"[a-z0-9][a-z0-9.+-]*\Z")

# What Markdown, HTML, and the Hub's formulas and mentions read inside a line; an underscore inside a word is none.
_READ = re.compile(r"[!#$&*:<>@\[\\\]^`{|}~]|(?<![a-zA-Z0-9])_|_(?![a-zA-Z0-9])|(?<=www)\.")


class CardError(VipoError):
    """A model card that would not say what it was given; the message names the value."""


@dataclass(frozen=True)
class Licence:
    """Under which terms a model may be passed on.

    Attributes:
        chosen: identifier that the exporting person named; None: the base's.
        stated: identifier in the base's own card; None where it names none.
        name, link: of a base's licence that has no identifier (`stated` is "other").
        files: the base's licence files that go along.
    """

    chosen: str | None
    stated: str | None
    name: str | None
    link: str | None
    files: tuple[str, ...]

    def metadata(self) -> dict[str, str | None]:
        """The Hub's metadata keys."""
        if self.chosen is not None:
            return {"license": self.chosen}
        return {"license": self.stated, "license_name": self.name, "license_link": self.link}

    @property
    def of_the_base(self) -> str | None:
        """The words for the base's own licence."""
        return self.name if self.stated == "other" else self.stated


@dataclass(frozen=True)
class ScoreRow:
    """A score's mean over held-out samples of the base and of the model, and the interval of their difference."""

    column: str
    base: float
    mean: float
    interval: Interval
    better: Better | None
    left_out: int = 0

    @property
    def label(self) -> str:
        """The words for the column, and how many samples without a score it is not over."""
        return label(self.column) + (f" (samples left out: {self.left_out})" if self.left_out else "")

    @property
    def digits(self) -> int:
        """Decimal places for the difference and its limits."""
        return decimals(self.interval.estimate, self.interval.low, self.interval.high)

    @property
    def verdict(self) -> str:
        """What the interval shows, in words."""
        return wording(self.interval, self.better)

    def as_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        interval = self.interval
        found = {"score": self.column, "trained": self.better is not None, "base": self.base, "model": self.mean}
        found |= {"left_out": self.left_out} if self.left_out else {}
        return found | {"difference": interval.estimate, "low": interval.low, "high": interval.high}


@dataclass(frozen=True)
class CardSample:
    """One prompt's pictures: their places in the exported folder and the files they come from."""

    text: str
    base: str
    mine: str
    base_file: Path
    file: Path


def model_card(
    config: Config,
    training: Mapping[str, Any],
    scores: Sequence[ScoreRow],
    samples: Sequence[CardSample],
    licence: Licence,
    *,
    counts: tuple[int, int],
    pipeline_class: str,
    hub_id: str | None,
    revision: str | None,
    loras: Sequence[str],
    comfyui: ComfyFiles | None = None,
) -> ModelCard:
    """The card of a run. Every text of the configuration or of a prompt is escaped.

    Args:
        config: of the run.
        training: provenance of its train stage.
        scores: trained ones first.
        samples: what is shown; the first prompt is the one of the example.
        licence: its own and the base's.
        counts: held-out prompts, and samples of each.
        pipeline_class: name in diffusers.
        hub_id: of the base; None: it is known by its folder alone.
        revision: of `hub_id`.
        loras: names of the LoRA files that are handed over for diffusers; of all weights none is read.
        comfyui: the file under original names, where the weights are handed over so.

    Raises:
        CardError: the metadata does not survive being written and read.
    """
    base = hub_id or config.generator.path
    data = _metadata(config, scores, samples, licence, counts, hub_id, comfyui is not None)
    environment = Environment(
        loader=PackageLoader("vipo.handover"),
        finalize=escape_markdown,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"number": _number, "signed": _signed, "plain": Markup}
    one = {"package_sha256": training["package_sha256"], **training["git"]}
    generator = [entry for entry in training["inputs"] if "model_index.json" in entry.get("files", {})]
    content = environment.get_template("model_card.md.j2").render(
        metadata=Markup(data.to_yaml()),
        title=data.model_name,
        base=base if revision is None else f"{base} at revision {revision}",
        method=describe(config),
        rewards=[term.title for term in config.reward.terms],
        question=config.experiment.question,
        base_sha256=generator[0]["sha256"] if generator else None,
        config=config,
        flow=config.sampling.transition != "ddim",
        comfyui=comfyui,
        code=None if comfyui else Markup(usage_example(config, samples[0].text, pipeline_class, base, revision, loras)),
        counts=counts,
        confidence=f"{config.evaluation.confidence:.0%}",
        scores=scores,
        worse=[row.label for row in scores if row.column.startswith("reward/") and _worse(row)],
        samples=samples,
        facts=_facts(config),
        licence=licence,
        training=training,
        made_by=training.get("updates_made_by", [one]),
        exporter=package_sha256(),
    )
    card = ModelCard(content)
    if card.data.to_dict() != data.to_dict():
        raise CardError(f"{data.model_name}: the card's metadata reads back differently; a prompt or name breaks YAML")
    return card


def escape_markdown(value: Any) -> Markup:
    """Text as Markdown that shows exactly it where it does not begin a line: character references, on one line.

    Characters that reorder text, in a table the other cells too, and controls are written as their escape; what is
    `Markup` already stays as it is.
    """
    if isinstance(value, Markup):
        return value
    text = visible(" ".join(str(value).split()))
    return Markup(_READ.sub(lambda found: f"&#{ord(found[0])};", text))


def _number(value: float) -> Markup:
    return Markup(f"{value:.4g}")


def _signed(value: float, digits: int) -> Markup:
    return Markup(f"{value:+.{digits}f}")


def _worse(row: ScoreRow) -> bool:
    return row.better is None and row.interval.high < 0


def _metadata(
    config: Config,
    scores: Sequence[ScoreRow],
    samples: Sequence[CardSample],
    licence: Licence,
    counts: tuple[int, int],
    hub_id: str | None,
    comfyui: bool,
) -> ModelCardData:
    task = "text-to-image" if config.generator.frames is None else "text-to-video"
    lora = config.training.lora is not None
    prompts, repeats = counts
    results = [
        EvalResult(
            task_type=task,
            dataset_type=f"{config.experiment.name}-held-out",
            dataset_name=f"{prompts} held-out prompts x {repeats} samples",
            metric_type=row.column.split("/", 1)[1],
            metric_name=f"{row.label}, mean (base: {row.base:.4g})",
            metric_value=round(row.mean, 6),
        )
        for row in scores
        if row.column.startswith("reward/")
    ]
    relation = {} if hub_id is None else {"base_model_relation": "adapter" if lora else "finetune"}
    return ModelCardData(
        **licence.metadata(),
        library_name="diffusion-single-file" if comfyui else "diffusers",
        pipeline_tag=task,
        base_model=hub_id,
        **relation,
        tags=[task, "comfyui" if comfyui else "diffusers", "diffusers-training", "vipo", *(["lora"] if lora else [])],
        model_name=f"{config.experiment.name}-{config.run_name}",
        eval_results=results,
        widget=[{"text": sample.text, "output": {"url": sample.mine}} for sample in samples],
    )


def _facts(config: Config) -> dict[str, str]:
    generator, training, terms = config.generator, config.training, config.reward.terms
    lora = training.lora
    mean = f", their mean with decay {training.ema_decay:g}" if config.evaluation.weights == "ema" else ""
    return {
        "Arm": f"{config.arm}, {describe(config)}",
        "Seed": str(config.seed),
        "Trained": ("all weights of the network" if lora is None else f"LoRA, rank {lora.rank}, alpha {lora.alpha:g}")
        + mean,
        **{
            name: str(value)
            for name, value in (
                ("Started from", generator.start),
                ("Network's file before", generator.file),
                ("Second network's file before", generator.file_2),
            )
            if value is not None
        },
        "Reward": " + ".join(term.title if len(terms) == 1 else f"{term.weight:g} {term.title}" for term in terms),
        "Updates": f"{training.updates}, each {training.prompts_per_update} prompts × {training.group_size} samples",
        "Optimizer": f"{config.optimizer.title}, learning rate {config.optimizer.learning_rate:g}",
        "Sampling chain": f"{config.sampling.steps} steps, {config.sampling.transition}, eta {config.sampling.eta:g}",
        "Map backbone": config.perception.backbone if config.credit.reads_backbone else "none",
        "Prompts": config.prompts.source,
        "Size": f"{config.generator.width} × {config.generator.height} pixels"
        + ("" if config.generator.frames is None else f", {config.generator.frames} frames"),
    }
