"""An adapter is anyone's code: whatever it raises or gives back is one error that names it."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vipo.config.generator import GeneratorConfig
from vipo.errors import VipoError
from vipo.generators import Conditioning, Generator, GeneratorError, load_generator
from vipo.generators.configured import resolve_class
from vipo.generators.encoding import encode_prompt_file
from vipo.memory import OutOfMemory, memory_errors
from vipo.prompts.prompt import prompt_id

NAME = r"generator\.family 'test_adapter_errors:Adapter'"


class Adapter(Generator):
    """Raises or gives `behaviour`."""

    network_folder = "none"
    latent_shape = (2, 4, 4)
    behaviour: Any = None

    def __init__(self, config: GeneratorConfig) -> None:
        self.config, self.device = config, torch.device("cpu")

    @classmethod
    def load(cls, config: GeneratorConfig, root: Path) -> "Adapter":
        cls._behave()
        return cls(config)

    @classmethod
    def encode_prompts(cls, config: GeneratorConfig, root: Path, texts: Sequence[str]) -> list[dict[str, Tensor]]:
        found: list[dict[str, Tensor]] = cls._behave()
        return found

    def _predict(self, latents: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        found: Tensor = self._behave()
        return found

    def decode(self, latents: Tensor) -> Tensor:
        found: Tensor = self._behave()
        return found

    @classmethod
    def _behave(cls) -> Any:
        if isinstance(cls.behaviour, BaseException):
            raise cls.behaviour
        return cls.behaviour

    def _absent(self, *_: object, **__: object) -> None:
        raise NotImplementedError

    add_lora = save_network = load_network = _absent


@pytest.fixture
def adapter(monkeypatch: pytest.MonkeyPatch) -> Adapter:
    monkeypatch.setattr(Adapter, "behaviour", None)
    made: Any = resolve_class(_config())
    return made(_config())


def _config(family: str = "test_adapter_errors:Adapter") -> GeneratorConfig:
    return GeneratorConfig(family=family, path="nowhere", height=8, width=8)


def _calls(adapter: Adapter, folder: Path) -> dict[str, Any]:
    prompts = folder / "train.jsonl"
    prompts.write_text(f'{{"id": "{prompt_id("a")}", "text": "a", "metadata": {{}}}}\n')
    (folder / "nowhere").mkdir(exist_ok=True)
    (folder / "nowhere/model_index.json").write_text("{}")
    return {
        "load": lambda: load_generator(adapter.config, folder),
        "encode_prompts": lambda: encode_prompt_file(adapter.config, folder, prompts, folder / "out.safetensors", {}),
        "predict": lambda: adapter.predict(torch.zeros(1, 2, 4, 4), torch.ones(1), {}),
        "decode": lambda: adapter.pictures(torch.zeros(1, 2, 4, 4)),
    }


@pytest.mark.parametrize("call", ["load", "encode_prompts", "predict", "decode"])
def test_what_an_adapter_raises_is_one_error_that_names_it(
    call: str, adapter: Adapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = _calls(adapter, tmp_path)[call]
    for raised, told in (
        (KeyError("colour\nerror: all is well"), "KeyError: 'colour"),
        (RuntimeError("two\n  lines"), "RuntimeError: two"),
        (SystemExit(0), "SystemExit: 0"),
        (AssertionError(), "AssertionError"),
    ):
        monkeypatch.setattr(Adapter, "behaviour", raised)
        with pytest.raises(GeneratorError, match=rf"^{NAME} raised {told}") as caught:
            made()
        assert "\n" not in str(caught.value)
    # What it says with vipo's own errors is told too; memory that ran out and the user's interrupt stay what they are.
    monkeypatch.setattr(Adapter, "behaviour", VipoError("named already"))
    with pytest.raises(VipoError, match="named already"):
        made()
    monkeypatch.setattr(Adapter, "behaviour", MemoryError("no more"))
    with pytest.raises(OutOfMemory, match="no more"), memory_errors("work", "remedy"):
        made()
    monkeypatch.setattr(Adapter, "behaviour", KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        made()


def test_what_an_adapter_gives_is_checked(adapter: Adapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = _calls(adapter, tmp_path)
    for call, given, told in (
        ("predict", torch.zeros(1, 3, 4, 4), r"prediction: expected shape \(1, 2, 4, 4\), got shape \(1, 3, 4, 4\)"),
        ("predict", None, r"prediction: expected shape \(1, 2, 4, 4\), got a NoneType"),
        ("decode", torch.zeros(1, 3, 8, 9), r"decode: expected shape \(1, 3, 8, 8\), got shape \(1, 3, 8, 9\)"),
        ("decode", (torch.zeros(1, 3, 8, 8),), r"decode: expected shape .*, got a tuple"),
        ("encode_prompts", [], "0 encodings of 1 prompts"),
        ("encode_prompts", [{"x": torch.zeros(2, dtype=torch.bfloat16)}], "x: not finite float32"),
    ):
        monkeypatch.setattr(Adapter, "behaviour", given)
        with pytest.raises(GeneratorError, match=told):
            made[call]()


@pytest.mark.parametrize("code", ["raise SystemExit(0)", "1 / 0", "def", "Adapter = 3"])
def test_a_module_that_cannot_be_imported_is_named(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "faulty_adapter.py").write_text(code + "\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "faulty_adapter", raising=False)
    with pytest.raises(
        GeneratorError,
        match=r"generator\.family 'faulty_adapter:Adapter' (raised (SystemExit|ZeroDivisionError|SyntaxError)|is no)",
    ):
        resolve_class(_config("faulty_adapter:Adapter"))
