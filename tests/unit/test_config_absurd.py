"""Absurd values of every key of the configuration: refused with its name, or accepted and as it was when read again."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from vipo.cli import _COMMANDS
from vipo.config.compose import dump_config, load_config, load_config_file, validate_config
from vipo.config.protocol import ProtocolConfig
from vipo.config.resolved import to_yaml
from vipo.config.reward_options import REWARD_OPTIONS
from vipo.config.run import Config
from vipo.config.section import MOST_RUNS, Section
from vipo.config.validation import ConfigError, validate_section
from vipo.text import message

_SERVED = {"reward": "redness", "url": "http://127.0.0.1:1"}
_REWARDS = [
    {"name": name, "options": {"process": _SERVED, "judge": {"url": "http://127.0.0.1:1", "model": "m"}}.get(name, {})}
    for name in REWARD_OPTIONS
]
# What these leave null or out, others give: together they hold every key of every section.
CONFIGURATIONS: dict[str, list[str]] = {
    "demo": [
        "experiment=demo",
        "training.lora={}",
        "training.best_of=4",
        "training.micro_batch=4",
        "training.ema_decay=0.9",
        "sampling.window={size: 5}",
        "alarms.stop=[{metric: alarm/dark_share, above: 0.5, below: 0.1}]",
        "credit.sources=[{name: contrast}, {name: reward}, {name: attention}, {name: oracle}, {name: 'a.b:c', x: [1]}]",
        "credit.mixture=[1, 1, 1, 1, 1]",
        "objective.gate={name: divergence}",
        "distribution={strategy: fsdp, processes: 2}",
    ],
    "forward": ["experiment=demo", "arm=grpo", "objective={name: nft}", "optimizer=sgd"],
    "studied": ["experiment=credit2"],
    "registered": ["experiment=objectives"],
    "published": ["experiment=paper_flux", "prompts.source=/prompts.txt"],
    "protocol": ["experiment=sd35_pickscore", "protocol=drawbench", "prompts.source=/prompts.txt"],
}
ABSURD: list[Any] = [
    *(float("inf"), float("nan"), 1e300, -1, 0, 2**31 - 1, 2**63, 10**5000),
    *("", "\0", "x" * 5000, "\ud800", "\x1b[2J", "1e400", "a:b", "~nosuch/x"),
    *(None, [], {}, [[[1]]], [None], ["\ud800"], {"a": ["\ud800"]}, {"\ud800": 1}, {"name": [{"a": 1}]}, b"x", 1j),
]


@pytest.fixture(scope="module")
def composed() -> dict[str, Any]:
    found = {name: load_config(overrides).model_dump(mode="json") for name, overrides in CONFIGURATIONS.items()}
    found["demo"]["evaluation"]["rewards"] += _REWARDS
    return found


def places(value: Any, *at: str | int) -> Iterator[tuple[str | int, ...]]:
    """Of every key below, and of the first items of every list."""
    yield at
    entries = value.items() if isinstance(value, dict) else enumerate(value[:1]) if isinstance(value, list) else ()
    # Each has options of its own.
    if at in (("rewards",), ("sources",)):
        entries = enumerate(value)
    for key, item in entries:
        yield from places(item, *at, key)


def put(data: Any, at: tuple[str | int, ...], value: Any) -> Any:
    """A copy in which one place holds another value."""
    if not at:
        return value
    changed = dict(data) if isinstance(data, dict) else list(data)
    changed[at[0]] = put(data[at[0]], at[1:], value)
    return changed


def test_an_absurd_value_of_any_key_is_refused_or_kept(composed: dict[str, Any]) -> None:
    sections: dict[str, Any] = {key: field.annotation for key, field in Config.model_fields.items()}
    sections["protocol"] = ProtocolConfig
    seen, tried, refused = set(), 0, 0
    for whole in composed.values():
        for section, data in whole.items():
            kind = sections[section]
            own = kind if isinstance(kind, type) and issubclass(kind, Section) else None
            for at in places(data):
                # Arms are alike, and so are the items of a list, but for rewards and credit sources.
                named = at[:1] == ("rewards",) or at[:1] == ("sources",)
                key = (section, *("*" if isinstance(part, int) and not named else part for part in at))
                key = (*key[:2], "*", *key[3:]) if key[:2] == ("experiment", "arms") else key
                if key in seen:
                    continue
                seen.add(key)
                for value in ABSURD:
                    tried += 1
                    changed = put(data, at, value)
                    try:
                        # What holds between sections costs ten times as much: it is tried with values that pass alone.
                        if own is None or value in (2**31 - 1, "a:b"):
                            validate_config(whole | {section: changed})
                        else:
                            validate_section(own, changed, f"{section}.")
                    except ConfigError as error:
                        refused += 1
                        told = message(str(error))
                        assert told.strip(), (key, value)
                        assert len(told) < 20_000
                        assert "\ud800" not in told
    assert refused > tried / 2


@pytest.mark.parametrize("key", ["experiment.title", "generator.negative_prompt"])
def test_what_would_not_be_read_again_is_refused(key: str, composed: dict[str, Any], tmp_path: Path) -> None:
    at = tuple(key.split("."))
    for text in ("'\u00e4'\n\x1b" * 3_000, "x" * 100_000):
        config = validate_config(put(composed["demo"], at, text))
        path = tmp_path / "config.yaml"
        path.write_text(dump_config(config), encoding="utf-8")
        assert load_config_file(path) == config
    with pytest.raises(ConfigError, match=rf"^{key}: has 300000 characters, .* shorten it"):
        validate_config(put(composed["demo"], at, "x" * 300_000))


def test_more_runs_than_could_be_composed_are_refused(composed: dict[str, Any]) -> None:
    at = ("experiment", "arms", "vipo", "seeds")
    others = sum(len(arm["seeds"]) for arm in composed["demo"]["experiment"]["arms"].values()) - len(
        composed["demo"]["experiment"]["arms"]["vipo"]["seeds"]
    )
    validate_config(put(composed["demo"], at, list(range(MOST_RUNS - others))))
    with pytest.raises(ConfigError, match=r"^experiment\.arms: 5 arms with their seeds are 4097 runs, more than"):
        validate_config(put(composed["demo"], at, list(range(MOST_RUNS + 1 - others))))


def test_every_number_of_an_option_of_a_reward_has_both_bounds() -> None:
    for name, kind in REWARD_OPTIONS.items():
        for key, field in kind.model_json_schema()["properties"].items():
            for node in field.get("anyOf", [field]):
                if node.get("type") in ("integer", "number"):
                    assert {"minimum", "exclusiveMinimum"} & node.keys(), (name, key)
                    assert {"maximum", "exclusiveMaximum"} & node.keys(), (name, key)


def test_yaml_is_at_most_sixteen_times_as_long_as_json(composed: dict[str, Any]) -> None:
    """The worst are items of lists within lists of one sign each; a configuration nests no deeper."""
    for data in (*composed.values(), put(composed["demo"], ("experiment", "arms", "vipo", "seeds"), [0] * 5000)):
        assert len(to_yaml(data).encode()) < 16 * len(json.dumps(data, separators=(",", ":"), ensure_ascii=False))


def test_every_number_of_a_command_has_both_bounds() -> None:
    """NaN lies within none, and typer says so; what is unbounded overflows where it is used, or never ends."""
    unbounded = {
        key
        for command in _COMMANDS
        for key, hint in get_type_hints(command, include_extras=True).items()
        for option in getattr(hint, "__metadata__", ())
        if {int, float} & {hint.__origin__, *get_args(hint.__origin__)} and None in (option.min, option.max)
    }
    # Checked as the section of the configuration that they are; and one waits as long as one says.
    checked = {"components", "smoothing", "height", "width", "frames"}
    assert unbounded == checked | {"wait"}
