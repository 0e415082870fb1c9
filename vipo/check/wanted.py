"""What an experiment reads that is not in the repository: weights and tokenizers, in folders, files or on the hub."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from vipo.config.perception import PACKAGED
from vipo.config.reward import RewardSpec
from vipo.config.reward_options import places
from vipo.config.run import Config
from vipo.foreign import is_import_path

WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth")
TOKENIZER = ("tokenizer.json", "vocab.*", "spiece.model", "sentencepiece.*")
# Of repositories that hold other weights beside those that are read.
_FILES = {
    ("hpsv2", "path"): ("HPS_v2.1_compressed.*",),
    ("imagereward", "path"): ("ImageReward.*", "med_config.json"),
}
_EACH = frozenset({("imagereward", "path")})
# As the hub has them.
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]*\w", re.ASCII)
_NETWORKS = ("transformer", "transformer_2", "unet")
_FILE = ("*.safetensors",)
# A finished run, one of its weights, or a LoRA's folder.
_STARTS = ("weights", *_NETWORKS, "*.safetensors")
_HUB = "hf-hub:"


@dataclass(frozen=True)
class Wanted:
    """Something that is read from a place which the configuration names.

    Attributes:
        what: for people, such as ``reward hpsv2``.
        field: the key that names the place, such as ``path``.
        written: what the configuration says there.
        override: that key in full, for the message; "" where it is one item of a list.
        revision: the commit; None where none is named.
        revision_field: the key that may name it; None where nothing can.
        repository: the hub id that is meant where there is no such file or folder here; None: it can only be here.
        files: patterns of names of which one must be there; of a diffusers pipeline none: its index names its parts.
        each: all of `files` must be there.
        replaced: of a pipeline, the subfolders whose weights are not read, for they come from elsewhere.
    """

    what: str
    field: str
    written: str
    override: str
    revision: str | None
    revision_field: str | None
    repository: str | None
    files: Sequence[str] = ()
    each: bool = False
    replaced: Sequence[str] = ()

    @property
    def is_pipeline(self) -> bool:
        """Whether it is a diffusers checkpoint."""
        return not self.files

    def local(self, root: Path) -> Path | None:
        """The file or folder of this machine that is meant; None where there is none."""
        place = root / self.written
        return place if place.exists() else None


def wanted(config: Config, root: Path) -> Iterator[Wanted]:
    """What a run and its evaluation read; the same thing may come twice.

    Parts behind an import path find their own: nothing is known of those.
    """
    generator = config.generator
    yield Wanted(
        "generator",
        "path",
        generator.path,
        "generator",
        generator.revision,
        "revision",
        _repository(generator.path),
        replaced=() if generator.file is None else _NETWORKS,
    )
    for field, files in (("file", _FILE), ("file_2", _FILE), ("start", _STARTS)):
        if (written := getattr(generator, field)) is not None:
            yield Wanted(f"generator: {field}", field, written, "generator", None, None, None, files)
    for reward in (*config.reward.terms, *config.evaluation.rewards):
        yield from _of_reward(reward)
    if not config.is_base and config.credit.reads_backbone:
        yield from _of_backbone(config, root)


def packaged_backbone(config: Config) -> bool:
    """Whether maps are made by the backbone whose weights a Python package brings."""
    own = config.perception
    return config.credit.reads_backbone and own.backbone == PACKAGED and own.weights is None


def _of_reward(reward: RewardSpec) -> Iterator[Wanted]:
    for name, revision in places(reward.name).items():
        written = str(reward.options[name])
        commit = None if revision is None else reward.options[revision]
        yield Wanted(
            f"reward {reward.title}" + ("" if name == "path" else f": {name}"),
            name,
            written,
            "",
            None if commit is None else str(commit),
            revision,
            None if revision is None else _repository(written),
            TOKENIZER if name == "tokenizer" else _FILES.get((reward.name, name), WEIGHTS),
            (reward.name, name) in _EACH,
        )


def _of_backbone(config: Config, root: Path) -> Iterator[Wanted]:
    own = config.perception
    if is_import_path(own.backbone) or packaged_backbone(config):
        return
    what = f"backbone {own.backbone}"
    if own.weights is not None:
        yield Wanted(what, "weights", own.weights, "perception", None, None, None, WEIGHTS)
        return
    repository, revision, file = own.backbone.removeprefix(_HUB), own.revision, "model.safetensors"
    if not own.backbone.startswith(_HUB):
        # Only here, for it loads torch.
        from vipo.perception.weights import published_metadata

        metadata = published_metadata(own.backbone)
        repository, _, pinned = (metadata["hf_hub_id"] or "").partition("@")
        revision, file = revision or pinned or None, metadata["hf_hub_filename"] or file
    yield Wanted(what, "backbone", own.backbone, "perception", revision, "revision", repository or None, (file,))


def _repository(path: str) -> str | None:
    """`path` as a hub id, ``owner/name``; None where it cannot be one."""
    return path if _REPOSITORY.fullmatch(path) else None
