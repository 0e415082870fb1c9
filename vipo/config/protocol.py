"""Section `protocol`: an evaluation pinned by name, so that two numbers of one protocol can be compared."""

from collections.abc import Mapping
from typing import Any, Self

from pydantic import Field, JsonValue, model_validator

from vipo.config.prompts import PromptsConfig
from vipo.config.section import LONGEST_NAME, PositiveInt, Section
from vipo.config.values import config_hash


class ProtocolConfig(Section):
    """What a named evaluation fixes; a configuration that says otherwise is an error, not another protocol."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_]*$", max_length=LONGEST_NAME)
    version: PositiveInt = Field(description="Counts up with every change of what is pinned.")
    pins: dict[str, JsonValue] = Field(description="Values by section and key that must hold.")
    judge: str | None = Field(None, description="The reward that must be among evaluation.rewards; null: any.")
    judge_options: dict[str, JsonValue] = Field(
        default_factory=dict, description="Of its options, those that its scores depend on, by name."
    )

    judge_weights: dict[str, list[str]] = Field(
        default_factory=dict,
        description="Of its options, those that name weights: a hub id, or a local file or folder whose name is a hub "
        "id's last part or one of these.",
    )
    labels: tuple[str, ...] = Field(
        (), strict=False, description="Of evaluation.rewards, one must have one of these labels; empty: any."
    )

    @model_validator(mode="after")
    def _of_a_judge(self) -> Self:
        for key in ("judge_options", "judge_weights"):
            if getattr(self, key) and self.judge is None:
                raise ValueError(f"{key} without judge: name the reward whose options they are")
        return self

    def title(self, called: Mapping[str, Any]) -> str:
        """As it stands in every table: ``parti v2 (0123456789ab): guidance 3.5, shift 3``.

        Args:
            called: how the generator is called, which belongs to it and moves scores as much as what is pinned:
                ``guidance_scale``, ``guidance_scale_2``, ``negative_prompt``, ``shift`` and what else decides its
                samples. It is in the hash, too.
        """
        sha256 = config_hash({**self.model_dump(mode="json"), "called": dict(called)})
        second, shift = called["guidance_scale_2"], called["shift"]
        told = [f"guidance {called['guidance_scale']:g}" + (f" and {second:g}" if second is not None else "")]
        told += [f"shift {shift:g}"] if shift is not None else []
        told += ["a negative prompt"] if called["negative_prompt"] else []
        return f"{self.name} v{self.version} ({sha256[:12]}): {', '.join(told)}"

    def broken(self, values: Mapping[str, Any]) -> list[str]:
        """What of a configuration, as JSON, is not as pinned: ``key wanted, is value``."""
        found = [f"{key} {wanted!r}, is {value!r}" for key, wanted, value in _differing("", self.pins, values)]
        found += _fewer(values["prompts"])
        # A reward without arguments is saved as its name alone.
        saved = values["evaluation"]["rewards"]
        rewards: list[Mapping[str, Any]] = [{"name": r} if isinstance(r, str) else r for r in saved]
        labels = [reward.get("label", reward["name"]) for reward in rewards]
        if self.labels and not set(self.labels) & set(labels):
            found.append(f"evaluation.rewards: one of the labels {', '.join(self.labels)}; they are {labels!r}")
        if self.judge is None:
            return found
        own = [self._asked_otherwise(r.get("options", {})) for r in rewards if r["name"] == self.judge]
        if not own:
            return [*found, f"evaluation.rewards {self.judge!r}, are {[reward['name'] for reward in rewards]!r}"]
        return found + own[0] if all(own) else found

    def _asked_otherwise(self, options: Mapping[str, Any]) -> list[str]:
        found = [(key, repr(wanted), value) for key, wanted, value in _differing("", self.judge_options, options)]
        # What a judge is asked beside what is pinned could undo it.
        if "request" not in self.judge_options and options.get("request"):
            found.append(("request", "{}", options["request"]))
        for key, names in self.judge_weights.items():
            known, name = {_last(each) for each in names}, options.get(key)
            if not isinstance(name, str) or _last(name) not in known:
                found.append((key, " or a local ".join(map(repr, dict.fromkeys((names[0], *sorted(known))))), name))
        return [f"options.{key} of {self.judge!r} {wanted}, is {value!r}" for key, wanted, value in found]


def _last(name: str) -> str:
    return name.rstrip("/").rsplit("/", 1)[-1]


def _fewer(prompts: Mapping[str, Any]) -> list[str]:
    """What leaves out prompts of a pinned set: what is measured on the rest is not that protocol."""
    own = prompts["eval"] or {}
    dropping = {f"prompts.filters.{name}": value for name, value in prompts["filters"].items() if value is not None}
    dropping |= {"prompts.eval.categories": own["categories"]} if own.get("categories") else {}
    if prompts["max_characters"] < PromptsConfig.model_fields["max_characters"].default:
        dropping["prompts.max_characters"] = prompts["max_characters"]
    dropping |= {"prompts.ignore_case": True} if prompts["ignore_case"] else {}
    return [f"every prompt of its set, and {key} {value!r} leaves some out" for key, value in dropping.items()]


def _differing(place: str, wanted: Mapping[str, Any], values: Any) -> list[tuple[str, Any, Any]]:
    found: list[tuple[str, Any, Any]] = []
    for name, value in wanted.items():
        key = f"{place}.{name}" if place else name
        own = values.get(name) if isinstance(values, Mapping) else None
        if isinstance(value, Mapping):
            found += _differing(key, value, own)
        elif own != value:
            found.append((key, value, own))
    return found
