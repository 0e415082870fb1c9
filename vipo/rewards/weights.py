"""Where a reward's weights come from: a file, a folder, or the hub; and a network filled with them, every tensor of it.

Safetensors, or what `torch.load` reads with ``weights_only=True``, which runs no code.
"""

import contextlib
import pickle
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vipo.config.compose import repository_root
from vipo.rewards.errors import RewardError
from vipo.text import listed, one_line

DTYPES: Mapping[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")
"""Names of a checkpoint's weights in transformers' layout, the better first."""

_NAMED = 3


_fetches = ContextVar("fetches", default=True)


@contextlib.contextmanager
def at_hand() -> Iterator[None]:
    """Within it nothing is fetched: what a hub has is found in the local cache, or not at all."""
    token = _fetches.set(False)
    try:
        yield
    finally:
        _fetches.reset(token)


def local_path(key: str, path: str) -> Path:
    """A file or folder of this machine; a relative one starts at the repository.

    Raises:
        RewardError: there is none.
    """
    found = repository_root() / path
    if not found.exists():
        raise RewardError(f"{key} {path!r}: there is no such file or folder; mend the path")
    _check_kind(key, path, found)
    return found


def located(key: str, path: str, revision: str | None, patterns: Sequence[str]) -> Path:
    """A local file or folder, or the cached folder of a hub repository.

    Args:
        key: the option that holds `path`, for messages.
        path: relative to the repository, absolute, or a hub id ``owner/name``.
        revision: commit of the hub repository.
        patterns: names of the files that are fetched, as `fnmatch` reads them.

    Raises:
        RewardError: it is neither here nor could it be fetched.
    """
    local = repository_root() / path
    if local.exists():
        if revision is not None:
            raise RewardError(f"{key} {path!r} is on this machine and has no revision; leave the revision out")
        _check_kind(key, path, local)
        return local
    from huggingface_hub import snapshot_download

    try:
        cached = not _fetches.get()
        return Path(snapshot_download(path, revision=revision, allow_patterns=list(patterns), local_files_only=cached))
    except Exception as error:
        raise RewardError(
            f"{key} {path!r}: there is no {local}, and as a hub id it is neither in the local cache nor could it be "
            f"fetched ({type(error).__name__}); fetch it where there is a network, or name a local folder"
        ) from error


def _check_kind(key: str, path: str, found: Path) -> None:
    # A pipe would hang, and a device never end.
    if not (found.is_file() or found.is_dir()):
        raise RewardError(f"{key} {path!r}: is neither a regular file nor a folder; mend the path")


def matching(place: Path, patterns: Sequence[str]) -> list[Path]:
    """`place` itself if it is a file; of a folder the files of the first pattern that has any.

    Raises:
        RewardError: none has.
    """
    if place.is_file():
        return [place]
    for pattern in patterns:
        if found := sorted(path for path in place.iterdir() if fnmatchcase(path.name, pattern)):
            return found
    raise RewardError(f"{place}: holds no {' or '.join(patterns)}; fetch it again, or name another folder")


def read_tensors(paths: Sequence[Path], device: str = "cpu") -> dict[str, Tensor]:
    """All tensors of some files; of a training checkpoint those below ``state_dict``.

    Args:
        paths: the files; of two tensors of one name the later counts.
        device: ``cpu``, or ``meta``: shapes alone.

    Raises:
        RewardError: a file cannot be read, or holds anything else.
    """
    tensors: dict[str, Tensor] = {}
    for path in paths:
        content = _read(path, device)
        content = content.get("state_dict", content) if isinstance(content, Mapping) else content
        if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
            raise RewardError(f"{path}: holds no tensors by name; fetch it again, or name another file")
        tensors |= {str(name): value for name, value in content.items()}
    return tensors


def _read(path: Path, device: str) -> Any:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return {name: value.to(device) for name, value in load_file(path).items()}
        # Mapped, no data is read for shapes alone; a file of PyTorch's older format cannot be.
        mapped = device == "meta" and zipfile.is_zipfile(path)
        return torch.load(path, map_location=device, weights_only=True, mmap=mapped)
    except (SafetensorError, OSError, RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError) as error:
        raise RewardError(f"{path}: cannot be read ({one_line(str(error), 300)}); fetch or convert it again") from error


def below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def layers(prefix: str, tensors: Mapping[str, Tensor]) -> int:
    """How many layers there are whose tensors' names begin with `prefix` and a number from 0.

    Raises:
        ValueError: none, or what follows is no number.
    """
    return 1 + max(int(name.partition(".")[0]) for name in below(prefix, tensors))


def filled(kind: Any, config: Any, tensors: Mapping[str, Tensor], source: object, dtype: str, **options: Any) -> Any:
    """A network of transformers with these tensors.

    Args:
        kind: its class.
        config: its configuration.
        source: where the tensors are from, for messages.
        dtype: a key of `DTYPES`.
        options: further arguments of the class.

    Raises:
        RewardError: a tensor of the network is missing, of another shape, or not finite.
    """
    with _quiet():
        network, told = kind.from_pretrained(
            None,
            config=config,
            state_dict=dict(tensors),
            dtype=DTYPES[dtype],
            output_loading_info=True,
            # Told below, by name.
            ignore_mismatched_sizes=True,
            **options,
        )
    other = [str(found[0]) for found in told["mismatched_keys"]]
    faults = {"missing": sorted(told["missing_keys"]), "of another shape": sorted(other)}
    check_filled(network, faults | _not_floating(network, tensors), source)
    return network


def fill(network: nn.Module, tensors: Mapping[str, Tensor], source: object, dtype: str) -> nn.Module:
    """Fill a network that is not transformers', every tensor of it; tensors of other names are left.

    Raises:
        RewardError: as `filled`.
    """
    wanted = network.state_dict()
    faults = {
        "missing": sorted(wanted.keys() - tensors.keys()),
        "of another shape": [name for name in wanted if name in tensors and tensors[name].shape != wanted[name].shape],
    }
    faults |= _not_floating(network, {name: tensors[name] for name in wanted if name in tensors})
    if not any(faults.values()):
        network.load_state_dict({name: tensors[name] for name in wanted})
    network = network.to(DTYPES[dtype])
    check_filled(network, faults, source)
    return network


def check_filled(network: nn.Module, faults: Mapping[str, Sequence[str]], source: object) -> None:
    """Refuse a network with such faults, or with tensors that are not finite."""
    # What is computed with and no parameter, such as the means of a batch norm, stands in a file too.
    broken = [name for name, value in network.state_dict().items() if not bool(value.isfinite().all())]
    told = [f"{kind}: {listed(names, _NAMED)}" for kind, names in {**faults, "not finite": broken}.items() if names]
    if told:
        raise RewardError(
            f"{source}: does not hold what {type(network).__name__} takes: {'; '.join(told)}; fetch it again, or name "
            "another"
        )


def _not_floating(network: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, list[str]]:
    # Loading would take quantised integers for the weights themselves; counters and positions are integers.
    counters = {name.split(".")[-1] for name, value in network.named_buffers() if not value.is_floating_point()}
    whole = [n for n, value in tensors.items() if not value.is_floating_point() and n.split(".")[-1] not in counters]
    return {"not of floating point": sorted(whole)}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' loading bar and its report of what is missing, which is our error."""
    from transformers.utils import logging

    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()
