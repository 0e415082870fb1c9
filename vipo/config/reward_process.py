"""Options of the reward `process`: what is scored elsewhere, and where that is."""

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, JsonValue, field_validator, model_validator

from vipo.config.registries import REWARDS, registered
from vipo.config.section import PositiveInt, Section, UserPath, check_saved
from vipo.config.validation import ConfigError, validate_section

_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,99}")

Seconds = Annotated[float, Field(gt=0, le=86400, allow_inf_nan=False)]


def checked_url(value: str) -> str:
    """An address ``http(s)://host[:port][/path]``; what would put a secret into the records is refused.

    Raises:
        ValueError: it is none.
    """
    try:
        parts = urlsplit(value)
        port = parts.port
    except ValueError as error:
        raise ValueError(f"{value!r} is no address ({error})") from error
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise ValueError(
            "an address holds no user, password, query or fragment: they would be in every record. Put the token into "
            "an environment variable and name that in token_env"
        )
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0 or not value.isprintable():
        raise ValueError(f"{value!r} is no address such as http://127.0.0.1:8123")
    return value.rstrip("/")


class RemoteOptions(Section):
    """How something over HTTP is asked."""

    timeout: Seconds = Field(300.0, description="Seconds that one request may take, all of it.")
    retries: Annotated[int, Field(ge=0, le=20)] = Field(
        3,
        description="Further tries of a request whose connection failed, or that the server puts off, after 0.5, 1, 2, "
        "... seconds or as many as it asks for.",
    )
    concurrency: Annotated[int, Field(ge=1, le=256)] = Field(2, description="Requests under way at once, at most.")
    token_env: str | None = Field(
        None, description="Environment variable that holds the token sent with each request; null: none is sent."
    )

    @field_validator("token_env")
    @classmethod
    def _variable(cls, value: str | None) -> str | None:
        if value is not None and not _VARIABLE.fullmatch(value):
            # The value is not repeated, for it may be the secret itself.
            raise ValueError("is no name of an environment variable; name the variable, never the token itself")
        return value


class ProcessOptions(RemoteOptions):
    """Of `process`: a reward in another environment, on another GPU or host."""

    reward: str = Field(description="What is scored there: a registered reward, or an import path 'module:object'.")
    arguments: dict[str, JsonValue] = Field(default_factory=dict, description="That reward's own options.")
    takes: Literal["pillow", "tensors"] = Field(
        "pillow",
        description="pillow: lists of Pillow pictures, and where it runs needs Python and Pillow alone; tensors: it is "
        "a reward as vipo's are, and vipo is installed there. A registered one is of tensors.",
    )
    environment: UserPath | None = Field(
        None, description="Virtual environment (its folder or its python) in which vipo starts it."
    )
    url: str | None = Field(None, description="Address of one that runs already, in place of an environment.")
    device: str | None = Field(
        None, description="Where a started one computes; null: the generator's device. What runs already has its own."
    )
    start_timeout: Seconds = Field(600.0, description="Seconds until a started one must have loaded.")
    batch: PositiveInt = Field(16, description="Samples of one request, at most.")
    format: Literal["png", "webp"] = Field("png", description="How pictures travel; both lose nothing.")

    @model_validator(mode="before")
    @classmethod
    def _tensors(cls, value: Any) -> Any:
        reward = value.get("reward") if isinstance(value, Mapping) else None
        return {"takes": "tensors", **value} if isinstance(reward, str) and reward in REWARDS else value

    @field_validator("reward")
    @classmethod
    def _known(cls, value: str) -> str:
        if value == "process":
            raise ValueError("'process' is what asks another process; name the reward that is scored there")
        return registered(value, REWARDS, "reward")

    @field_validator("arguments")
    @classmethod
    def _saved(cls, value: dict[str, Any]) -> dict[str, Any]:
        check_saved(value)
        return value

    @field_validator("url")
    @classmethod
    def _address(cls, value: str | None) -> str | None:
        return None if value is None else checked_url(value)

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if (self.environment is None) == (self.url is None):
            raise ValueError("give one of environment (vipo starts it there) and url (it runs already)")
        if self.url is not None and self.device is not None:
            raise ValueError("device is of a process that vipo starts; one at an address has its own")
        if self.environment is not None and self.token_env is not None:
            raise ValueError("token_env is of one at an address; one that vipo starts gets a token of its own")
        _check_arguments(self.reward, self.arguments)
        if self.reward in REWARDS and self.takes != "tensors":
            raise ValueError(f"takes {self.takes!r}: {self.reward!r} is a reward of vipo's and takes tensors")
        return self


def _check_arguments(reward: str, arguments: Mapping[str, Any]) -> None:
    if reward not in REWARDS:
        return
    # It holds this module's section.
    from vipo.config.reward_options import REWARD_OPTIONS

    section = REWARD_OPTIONS.get(reward)
    if section is not None:
        try:
            validate_section(section, dict(arguments), "arguments.")
        except ConfigError as error:
            raise ValueError("; ".join(str(error).splitlines())) from error
    elif arguments:
        raise ValueError(f"arguments: {', '.join(arguments)}: {reward!r} takes none")


ASKED = frozenset({"process", "judge"})
"""Rewards that are asked over HTTP."""

WHERE_IT_RUNS = frozenset({"environment", "url", "device", "start_timeout", *RemoteOptions.model_fields})
"""Options of what is asked over HTTP that decide no score: a run goes on with others of them."""


def deciding(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of such options that decide a score.

    Without a judge's empty `request`, which it had not before: what was scored then keeps its identity.
    """
    found = {name: value for name, value in options.items() if name not in WHERE_IT_RUNS}
    return found if found.get("request") != {} else {name: found[name] for name in found if name != "request"}
