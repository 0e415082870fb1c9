"""Code of others: whatever it raises is one error that names it, whatever it changes is put back."""

import contextlib
import gc
import io
import locale
import logging
import logging.config
import os
import random
import resource
import signal
import socket
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile
from torch import Tensor, nn

from vipo.config.generator import GeneratorConfig
from vipo.config.perception import PerceptionConfig
from vipo.errors import Preempted, VipoError
from vipo.foreign import foreign, resolve
from vipo.foreign.settings import SETTINGS
from vipo.generators.base import Generator, GeneratorError
from vipo.generators.configured import load_generator, resolve_class
from vipo.perception import Backbone, PerceptionError, load_backbone
from vipo.prompts import PromptError
from vipo.prompts.sources import read_source
from vipo.rewards import RewardError, load_reward, score

IMAGES = torch.linspace(0, 1, 2 * 3 * 4 * 4).reshape(2, 3, 4, 4)


class Unprintable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no message")


class Strange(BaseException):
    pass


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (SystemExit(0), "SystemExit: 0"),
        (SystemExit("bye"), "SystemExit: bye"),
        (GeneratorExit(), "GeneratorExit"),
        (Strange("x"), "Strange: x"),
        (StopIteration(), "StopIteration"),
        (Unprintable(), "Unprintable: (its message cannot be shown)"),
        (Preempted("try again"), "Preempted: try again"),
        (PromptError("not mine"), "PromptError: not mine"),
        (ValueError("one\nerror: \x1b[2Jtwo"), "ValueError: one\\nerror: \\x1b[2Jtwo"),
    ],
)
def test_whatever_is_raised_is_one_error_that_names_the_part(error: BaseException, told: str) -> None:
    with pytest.raises(RewardError) as caught, foreign(RewardError, "reward 'mine'", "mine"):
        raise error
    assert str(caught.value) == f"reward 'mine' raised {told}" or str(caught.value).startswith(
        f"reward 'mine' raised {told}"
    )
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is error
    assert caught.value.foreign is not isinstance(error, VipoError)


def test_long_messages_are_shortened_in_their_middle() -> None:
    told = r"begins .* characters left out\) .* ends"
    with pytest.raises(RewardError, match=told) as caught, foreign(RewardError, "reward 'mine'", "mine"):
        raise ValueError("begins " + "x" * 5000 + " ends")
    assert len(str(caught.value)) < 500


def test_an_interrupt_is_nobody_s_error() -> None:
    with pytest.raises(KeyboardInterrupt), foreign(RewardError, "reward 'mine'", "mine"):
        raise KeyboardInterrupt


def meddle() -> None:
    """Changes every setting that is put back."""
    gc.disable()
    os.environ["VIPO_MEDDLED"] = "1"
    os.environ.pop("HOME", None)
    os.chdir("/")
    sys.path.insert(0, "/meddled")
    sys.argv.append("meddled")
    sys.stdout = sys.stderr = io.StringIO()
    sys.excepthook = lambda *_: None
    sys.setrecursionlimit(sys.getrecursionlimit() + 7)
    locale.setlocale(locale.LC_ALL, "C.UTF-8" if locale.setlocale(locale.LC_ALL) == "C" else "C")
    warnings.simplefilter("error")
    logging.disable(logging.CRITICAL)
    logging.getLogger().handlers.clear()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    random.seed(1)
    np.random.seed(1)
    np.seterr(all="raise")
    torch.manual_seed(1)
    torch.set_num_threads(torch.get_num_threads() + 1)
    torch.use_deterministic_algorithms(not torch.are_deterministic_algorithms_enabled(), warn_only=True)
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    torch.set_flush_denormal(True)
    torch.set_float32_matmul_precision("medium")
    os.umask(0o777)
    signal.setitimer(signal.ITIMER_REAL, 1000)
    logging.config.dictConfig({"version": 1})
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.enabled = False
    torch.backends.cudnn.allow_tf32 = not torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.mkldnn.enabled = False  # type: ignore[assignment]
    torch.backends.mkldnn.deterministic = True  # type: ignore[assignment]
    Image.MAX_IMAGE_PIXELS = None
    ImageFile.LOAD_TRUNCATED_IMAGES = True
    torch.nn.modules.module.register_module_forward_hook(lambda module, given, made: made * 2)
    warnings.showwarning = print
    socket.setdefaulttimeout(0.5)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**40, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    torch.backends.cuda.matmul.allow_fp16_accumulation = True
    torch.autograd.set_detect_anomaly(True, False)
    torch.autocast("cpu", torch.float16).__enter__()
    torch.set_grad_enabled(not torch.is_grad_enabled())


# What this machine or this torch has one value of.
_FIXED = {"torch's CUDA device and random numbers", "opt_einsum.enabled", "opt_einsum.strategy"}
if len(os.sched_getaffinity(0)) == 1:
    _FIXED.add("the processors")
_LASTING = {"inference mode", "a mode of torch's functions", "a mode of torch's dispatch"}


@pytest.mark.parametrize("fails", [False, True])
def test_every_setting_is_put_back(fails: bool) -> None:
    before = {name: setting.read() for name, setting in SETTINGS.items()}
    changed: set[str] = set()
    failing = pytest.raises(RewardError, match="SystemExit") if fails else contextlib.nullcontext()
    with failing, foreign(RewardError, "reward 'mine'", "mine"):
        entered = {name: setting.read() for name, setting in SETTINGS.items()}
        meddle()
        changed = {name for name, setting in SETTINGS.items() if setting.read() != entered[name]}
        if fails:
            sys.exit(0)
    assert changed >= SETTINGS.keys() - _FIXED - _LASTING
    assert {name: setting.read() for name, setting in SETTINGS.items()} == before
    # Caches of what was cast, and the depth at which they are cleared.
    assert torch.autocast_increment_nesting() == 1
    torch.autocast_decrement_nesting()


@pytest.mark.skipif(not hasattr(torch._C, "_get_fp32_precision_getter"), reason="this torch has one interface alone")
@pytest.mark.parametrize(
    "change",
    [
        lambda: setattr(getattr(torch.backends.mkldnn, "matmul"), "fp32_precision", "bf16"),  # noqa: B009
        lambda: setattr(torch.backends, "fp32_precision", "tf32"),
        lambda: setattr(getattr(torch.backends.cudnn, "conv"), "fp32_precision", "ieee"),  # noqa: B009
        lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True),
    ],
)
def test_a_precision_of_float32_is_put_back_whichever_interface_wrote_it(change: Callable[[], None]) -> None:
    """After a mixture of both interfaces torch refuses to be read by the older one."""
    before = SETTINGS["torch's precision of float32"].read()
    for _ in range(2):
        with foreign(RewardError, "reward 'mine'", f"{__name__}:x"):
            change()
            assert SETTINGS["torch's precision of float32"].read() != before
        assert SETTINGS["torch's precision of float32"].read() == before
        assert torch.get_float32_matmul_precision() == before[0]
        assert torch.backends.cudnn.allow_tf32 == before[1]
    vars(sys.modules[__name__]).pop("__vipo_own__")


class Watching(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **kwargs or {})


@pytest.mark.parametrize(
    ("mode", "told"),
    [
        (lambda: torch.inference_mode(), "inference mode"),
        (lambda: Watching(), "a mode of torch's functions"),
    ],
)
def test_what_cannot_be_put_back_is_an_error(mode: Callable[[], Any], told: str) -> None:
    entered = mode()
    try:
        with (
            pytest.raises(RewardError, match=rf"reward 'mine' changed {told}"),
            foreign(RewardError, "reward 'mine'", "x"),
        ):
            entered.__enter__()
    finally:
        entered.__exit__(None, None, None)


Module = Callable[[str, str], ModuleType]


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], None]]:
    """``module(name, code)`` puts a module where it can be imported."""
    monkeypatch.syspath_prepend(tmp_path)
    names: list[str] = []

    def write(name: str, code: str) -> None:
        (tmp_path / f"{name}.py").write_text(code)
        names.append(name)

    yield write
    for name in names:
        sys.modules.pop(name, None)


def test_a_module_finds_its_own_settings_again_and_others_do_not(module: Callable[[str, str], None]) -> None:
    code = (
        "import os, random, sys, torch\n"
        "os.environ['MY_KEY'] = 'secret'\n"
        "sys.path.append('/my/libraries')\n"
        "torch.set_default_dtype(torch.float64)\n"
        "random.seed(3)\n"
        "def reward(images, prompts, metadata):\n"
        "    assert os.environ['MY_KEY'] == 'secret' and '/my/libraries' in sys.path\n"
        "    assert torch.zeros(1).dtype is torch.float64\n"
        "    return torch.tensor([random.random(), random.random()])\n"
    )
    module("tidy", code)
    module(
        "other", "import os\ndef reward(images, prompts, metadata):\n    return images[:, 0, 0, 0] + len(os.environ)\n"
    )
    plain = len(os.environ)
    state = random.getstate()
    reward, other = load_reward("tidy:reward"), load_reward("other:reward")
    drawn = [score("tidy:reward", reward, IMAGES, ["", ""], [{}, {}]).tolist() for _ in range(2)]
    expected = random.Random(3)
    assert drawn == [pytest.approx([expected.random(), expected.random()]) for _ in range(2)]
    assert score("other:reward", other, IMAGES, ["", ""], [{}, {}])[0] == plain
    assert "MY_KEY" not in os.environ
    assert "/my/libraries" not in sys.path
    assert torch.get_default_dtype() is torch.float32
    assert random.getstate() == state


def spoil(images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
    """Writes into everything that it is given."""
    mean = images.mean(dim=(1, 2, 3))
    images.mul_(2)
    images.numpy()[:] = 7
    images.data.zero_()
    prompts.clear()  # type: ignore[attr-defined]
    metadata[0]["objects"].append("spoiled")
    return mean


def test_a_reward_writes_into_copies() -> None:
    images, prompts = IMAGES.clone(), ["a", "b"]
    metadata: list[dict[str, Any]] = [{"objects": ["one"]}, {"objects": []}]
    first = score("mine", spoil, images, prompts, metadata)
    torch.testing.assert_close(first, IMAGES.mean(dim=(1, 2, 3)))
    torch.testing.assert_close(images, IMAGES, rtol=0, atol=0)
    assert prompts == ["a", "b"]
    assert metadata == [{"objects": ["one"]}, {"objects": []}]
    assert torch.equal(score("mine", spoil, images, prompts, metadata), first)


def test_what_is_printed_stays_out_of_the_results(capsys: pytest.CaptureFixture[str]) -> None:
    def chatty(images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
        print("loading")
        return images.mean(dim=(1, 2, 3))

    score("mine", chatty, IMAGES, ["", ""], [{}, {}])
    assert capsys.readouterr() == ("", "loading\n")


# ---- imports ---------------------------------------------------------------------------------------


def _load(kind: str, path: str, root: Path) -> object:
    if kind == "reward":
        return load_reward(path)
    if kind == "backbone":
        return load_backbone(PerceptionConfig(backbone=path))
    if kind == "source":
        return read_source(path, "prompt", root)
    return resolve_class(GeneratorConfig(family=path, path="x", height=8, width=8))


KINDS = pytest.mark.parametrize(
    ("kind", "error", "named"),
    [
        ("reward", RewardError, "reward '{}'"),
        ("backbone", PerceptionError, "perception.backbone: '{}'"),
        ("source", PromptError, "prompts.source {}"),
        ("adapter", GeneratorError, "generator.family '{}'"),
    ],
)


@KINDS
def test_a_module_that_is_missing_or_fails_is_named(
    module: Callable[[str, str], None], tmp_path: Path, kind: str, error: type[VipoError], named: str
) -> None:
    module("leaves", "import sys, os\nos.environ['LEFT'] = '1'\nsys.exit(0)\n")
    module("lacks", "import no_such_dependency\n")
    module("empty", "x = 3\n")
    for path, told in (
        ("leaves:x", "raised SystemExit: 0"),
        ("lacks:x", "raised ModuleNotFoundError: No module named 'no_such_dependency'"),
        ("empty:y", "cannot be imported (AttributeError: module 'empty' has no attribute 'y')"),
        ("absent_module:x", "cannot be imported (ModuleNotFoundError: No module named 'absent_module')"),
        ("empty:x", " "),
    ):
        with pytest.raises(error) as caught:
            _load(kind, path, tmp_path)
        assert str(caught.value).startswith(named.format(path))
        assert told in str(caught.value)
        assert ("looked in" in str(caught.value)) is path.startswith("absent")
    assert "LEFT" not in os.environ


def test_a_missing_module_tells_where_it_was_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path / "mine"), *sys.path])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RewardError) as caught:
        resolve("absent_module:x", RewardError, "reward 'x'")
    for told in (f"looked in {tmp_path / 'mine'}, ", f"not in the working directory {tmp_path}", "PYTHONPATH"):
        assert told in str(caught.value)


# ---- backbones, sources, adapters ------------------------------------------------------------------


class Spoiling(Backbone):
    def forward(self, images: Tensor) -> Tensor:
        torch.set_default_dtype(torch.float64)
        found = super().forward(images.float())
        images.zero_()
        if len(images) == 3:
            raise SystemExit(0)
        return found


def spoiling(config: PerceptionConfig) -> Backbone:
    torch.set_num_threads(torch.get_num_threads() + 1)
    return Spoiling(nn.Conv2d(3, 8, 4, stride=4), feature_width=8, orientation="border", input_size=16, stride=4)


def test_a_backbone_of_others_runs_behind_the_boundary() -> None:
    threads = torch.get_num_threads()
    backbone = load_backbone(PerceptionConfig(backbone=f"{__name__}:spoiling"))
    images = IMAGES.clone()
    assert backbone(images).shape == (2, 8, 4, 4)
    assert torch.equal(images, IMAGES)
    assert torch.get_num_threads() == threads
    assert torch.get_default_dtype() is torch.float32
    with pytest.raises(PerceptionError, match=r"perception.backbone: '.*:spoiling' raised SystemExit: 0"):
        backbone(torch.zeros(3, 3, 4, 4))


class Final(Generator):
    def __init_subclass__(cls) -> None:
        raise TypeError("has no subclasses")


def test_an_adapter_that_refuses_a_subclass_is_named(tmp_path: Path) -> None:
    path = f"{__name__}:Final"
    with pytest.raises(GeneratorError, match=rf"generator.family '{path}' raised TypeError: has no subclasses"):
        _load("adapter", path, tmp_path)


def leaving_source(root: Path) -> Iterator[dict[str, str]]:
    os.environ["LEFT"] = "1"
    yield {"prompt": "a"}
    sys.exit(0)


def test_a_source_that_never_ends_is_named(module: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    module("endless", "def rows(root):\n    while True:\n        yield {}\ndef texts(root):\n    return rows(root)\n")
    monkeypatch.setattr("vipo.prompts.sources.MOST_BYTES", 2**20)
    with pytest.raises(PromptError, match=r"^prompts\.source endless:texts: has not ended after 16385 rows, and 1 MiB"):
        read_source("endless:texts", "prompt", Path())


def test_a_source_that_ends_the_process_between_two_rows(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match=r"prompts.source .*:leaving_source raised SystemExit: 0"):
        read_source(f"{__name__}:leaving_source", "prompt", tmp_path)
    assert "LEFT" not in os.environ


class Adapter(Generator):
    """Its own class in `load`, as adapters do that know of no subclass."""

    latent_shape = (4, 2, 2)
    network_folder = "transformer"

    def __init__(self, config: GeneratorConfig) -> None:
        self.config, self.device, self.network = config, torch.device("cpu"), nn.Linear(1, 1)
        self.timesteps = self.visited

    def visited(self, steps: int) -> Any:
        torch.set_num_threads(torch.get_num_threads() + 1)
        return list(range(steps - 1, -1, -1)) if steps < 10 else 1 / 0

    @classmethod
    def load(cls, config: GeneratorConfig, root: Path) -> "Adapter":
        torch.manual_seed(3)
        return Adapter(config)

    @classmethod
    def encode_prompts(cls, config: GeneratorConfig, root: Path, texts: Sequence[str]) -> list[dict[str, Tensor]]:
        sys.exit(0)

    def _predict(self, latents: Tensor, time: Tensor, conditioning: Mapping[str, Tensor]) -> Tensor:
        torch.set_grad_enabled(False)
        assert torch.is_autocast_enabled("cpu") is (self.config.precision == "bf16")
        if len(time) == 3:
            raise RuntimeError("three are too many")
        if len(time) == 4:
            latents[0].mul_(2)
        if len(time) == 5:
            conditioning["weight"].data.add_(1)
            conditioning["weight"].detach().zero_()
        return self.decode(latents) * conditioning["weight"]

    def decode(self, latents: Tensor) -> Tensor:
        torch.set_num_threads(torch.get_num_threads() + 1)
        return latents.zero_() if len(latents) == 6 else latents

    def add_lora(self, config: Any, seed: int) -> None:
        raise GeneratorError("training.lora: this family takes none")

    def save_network(self, folder: Path, state: Mapping[str, Tensor] | None = None) -> None:
        raise OSError("disk on fire")

    load_network = save_network


def test_an_adapter_of_others_runs_behind_the_boundary(tmp_path: Path) -> None:
    config = GeneratorConfig(family=f"{__name__}:Adapter", path="x", height=8, width=8, precision="bf16")
    found = resolve_class(config)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    generator = found.load(config, tmp_path)
    assert isinstance(generator, Adapter)
    assert torch.equal(torch.get_rng_state(), state)
    weight = torch.ones(1, requires_grad=True)
    conditioning = {"weight": weight}
    generator.predict(torch.ones(2, 4, 2, 2), torch.ones(2), conditioning)
    assert torch.is_grad_enabled()
    assert torch.get_num_threads() == threads
    visited = load_generator(config, tmp_path).timesteps
    assert visited is not None
    named = rf"generator.family '{__name__}:Adapter' raised "
    for call, told in (
        (lambda: found.encode_prompts(config, tmp_path, ["a"]), "SystemExit: 0"),
        (lambda: generator.predict(torch.ones(3, 4, 2, 2), torch.ones(3), conditioning), "RuntimeError: three are too"),
        (lambda: generator.predict(torch.ones(2, 4, 2, 1), torch.ones(2), conditioning), "ValueError: latents: expect"),
        (lambda: visited(10), "ZeroDivisionError"),
        (lambda: generator.add_lora(None, 0), "GeneratorError: training.lora: this family takes none"),
        (lambda: generator.save_network(tmp_path), "OSError: disk on fire"),
    ):
        with pytest.raises(GeneratorError, match=named + told):
            call()
    assert visited(3).tolist() == [2, 1, 0]
    assert torch.get_num_threads() == threads


def test_an_adapter_that_writes_into_what_it_is_given_is_named(tmp_path: Path) -> None:
    """The stored trajectory would be another one than the network saw, or every later prompt's embedding."""
    config = GeneratorConfig(family=f"{__name__}:Adapter", path="x", height=8, width=8, precision="bf16")
    generator = load_generator(config, tmp_path)
    for batch, told in ((4, "prediction writes into the latents"), (5, "prediction writes into the weight")):
        with pytest.raises(GeneratorError, match=told):
            generator.predict(torch.ones(batch, 4, 2, 2), torch.ones(batch), {"weight": torch.ones(1)})
    with pytest.raises(GeneratorError, match="decode writes into the latents"):
        generator.pictures(torch.ones(6, 4, 2, 2))
