"""The experiment as an RO-Crate: what was run on what, by which code, and what came of it.

Follows RO-Crate 1.1 and the Process Run Crate profile 0.5 of the Workflow Run RO-Crate collection
(https://w3id.org/ro/wfrun/process/0.5): every recorded stage is a ``CreateAction`` with its inputs and
parameters (``object``), outputs (``result``) and software (``instrument``). All of it is taken from the
provenance records and configurations beside the results; nothing is looked up when the crate is written,
so the same results give the same bytes.
"""

import hashlib
import json
import os
import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from rocrate.model.contextentity import ContextEntity
from rocrate.model.dataset import Dataset
from rocrate.model.entity import Entity
from rocrate.model.file import File
from rocrate.rocrate import ROCrate

from vipo.provenance.files import atomic_file
from vipo.provenance.lineage import (
    PROVENANCE,
    ProvenanceError,
    absolute_path,
    entry_files,
    read_provenance,
    verify_outputs,
)

_PROFILE = "https://w3id.org/ro/wfrun/process/0.5"
_TERMS = "https://w3id.org/ro/terms/workflow-run"
_METADATA, _CONFIG, _CITATION = "ro-crate-metadata.json", "config.yaml", "CITATION.cff"
_LINKS = {"url": "url", "codeRepository": "repository-code"}  # RO-Crate's property: CITATION.cff's key
_MEDIA_TYPES = {
    ".csv": "text/csv",
    ".html": "text/html",
    ".json": "application/json",
    ".jsonl": "application/jsonl",
    ".parquet": "application/vnd.apache.parquet",
    ".png": "image/png",
    ".svg": "image/svg+xml",
    ".txt": "text/plain",
    ".yaml": "application/yaml",
}


def write_crate(experiment_dir: Path, output: Path, root: Path) -> Path:
    """Describe the experiment in ``<output>/ro-crate-metadata.json``.

    Files that a stage wrote are data entities, by reference: their ids are paths relative to `output` (which for
    a crate that can be moved as a whole is `experiment_dir` itself). Inputs that no stage wrote (prompt source,
    shipped checkpoint, configuration) are named with their SHA-256. People and licence come from ``CITATION.cff``.

    Args:
        experiment_dir: folder below which stages left their ``provenance.json`` and ``config.yaml``.
        output: folder of the crate's metadata; a record in it (of this very stage) is not described.
        root: repository root.

    Returns:
        The path of the metadata file.

    Raises:
        ProvenanceError: no stage was recorded, an output is not as recorded, a stage read other bytes than
            another wrote, or CITATION.cff cannot be used.
        StorageError: the metadata cannot be written.
    """
    paths = [path for path in _records(experiment_dir) if path.parent.resolve() != output.resolve()]
    if not paths:
        raise ProvenanceError(f"{experiment_dir}: holds no {PROVENANCE}; run the experiment's stages first")
    if problems := [problem for path in paths for problem in verify_outputs(path, root)]:
        raise ProvenanceError(
            "results are not as their stages wrote them; run these stages again:\n" + "\n".join(problems)
        )
    records = {path: read_provenance(path) for path in paths}
    writer = _Writer(experiment_dir, output, root, _written(records))
    for path, record in records.items():
        writer.add_stage(path, record)
    text = writer.finish()
    target = output / _METADATA
    with atomic_file(target) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return target


class _Writer:
    """Adds stages to one crate; entities that stages share (files, parameters, software) are added once."""

    def __init__(self, experiment_dir: Path, output: Path, root: Path, written: Mapping[str, str]) -> None:
        self._experiment = absolute_path(experiment_dir)
        self._output = absolute_path(output)
        self._root = absolute_path(root)
        self._citation = _read_citation(root / _CITATION)
        self._crate = ROCrate(version="1.1")
        self._crate.metadata.extra_contexts.append(f"{_TERMS}/context")
        self._people = [self._person(author) for author in self._citation["authors"]]
        self._written = written
        self._actions: list[Entity] = []
        self._ended: list[str] = []
        self._experiments: list[Mapping[str, Any]] = []

    def add_stage(self, provenance: Path, record: Mapping[str, Any]) -> None:
        """One recorded stage as an action."""
        folder = absolute_path(provenance.parent)
        place = folder.relative_to(self._experiment).as_posix()
        inputs = [entity for entry in record["inputs"] for entity in self._data(entry)]
        results = [entity for entry in record["outputs"] for entity in self._data(entry)]
        config = _read_config(folder / _CONFIG)
        self._experiments += [config["experiment"]] if "experiment" in config else []
        settings = {name: value for name, value in _flat(config) if not name.startswith("experiment.")}
        settings |= {"seeds": record["seeds"], "config_sha256": record["config_sha256"]}
        action = self._context(
            f"#action/{record['stage']}/{place}",
            "CreateAction",
            name=f"{record['stage']} {place}",
            description=shlex.join(record["command"]),
            startTime=record["started"],
            endTime=record["ended"],
            actionStatus={"@id": "http://schema.org/CompletedActionStatus"},
            instrument=self._software(record),
            object=[*inputs, *(self._value("parameter", name, value) for name, value in settings.items())],
            result=results,
            environment=[self._value("hardware", name, value) for name, value in record["hardware"].items()],
        )
        if record["container_digest"] is not None:
            action["containerImage"] = self._container(record["container_digest"])
        self._file(provenance, {"about": action, "description": "Lineage record of this stage"})
        self._actions.append(action)
        self._ended.append(record["ended"])

    def finish(self) -> str:
        """The crate's metadata as JSON text."""
        experiment = self._experiments[0] if self._experiments else {"title": self._experiment.name}
        dataset = self._crate.root_dataset
        dataset["name"] = experiment["title"]
        dataset["description"] = experiment.get("question", f"Results of the experiment {self._experiment.name}")
        dataset["datePublished"] = max(self._ended)
        dataset["author"] = self._people
        dataset["license"] = self._license()
        dataset["conformsTo"] = self._context(_PROFILE, "CreativeWork", name="Process Run Crate", version="0.5")
        dataset["mentions"] = self._actions
        return json.dumps(self._crate.metadata.generate(), indent=1, sort_keys=True, ensure_ascii=False) + "\n"

    def _data(self, entry: Mapping[str, Any]) -> Iterator[Entity]:
        files = entry_files(entry)
        if not files.keys() <= self._written.keys():
            yield self._outside(entry)
        elif "files" not in entry:
            yield self._recorded(entry["path"], entry)
        else:
            path = self._root / entry["path"]
            parts = [self._recorded(name, file) for name, file in files.items()]
            yield self._crate.add(
                Dataset(self._crate, dest_path=self._relative(path), properties={"name": path.name, "hasPart": parts})
            )

    def _recorded(self, name: str, file: Mapping[str, Any]) -> Entity:
        if file["sha256"] != self._written[name]:
            raise ProvenanceError(
                f"{name}: written with SHA-256 {self._written[name][:12]}…, read with {file['sha256'][:12]}…; "
                "run the stages that read it again"
            )
        return self._file(self._root / name, {"contentSize": str(file["bytes"]), "sha256": file["sha256"]})

    def _file(self, path: Path, properties: Mapping[str, Any]) -> Entity:
        media = {"encodingFormat": _MEDIA_TYPES[path.suffix]} if path.suffix in _MEDIA_TYPES else {}
        return self._crate.add(
            File(self._crate, dest_path=self._relative(path), properties={"name": path.name, **media, **properties})
        )

    def _outside(self, entry: Mapping[str, Any]) -> Entity:
        path = Path(entry["path"])
        # An absolute path would tell of one machine; the hash identifies the data anywhere.
        name = path.name if path.is_absolute() else entry["path"]
        return self._context(
            f"#input/{_slug(name)}/{entry['sha256'][:12]}",
            "CreativeWork",
            name=name,
            contentSize=str(entry["bytes"]),
            sha256=entry["sha256"],
        )

    def _software(self, record: Mapping[str, Any]) -> Entity:
        git, libraries = record["git"], dict(record["versions"])
        version = libraries.pop("vipo")
        identity = {
            "git_commit": git["commit"],
            "git_dirty": git["dirty"],
            "git_diff_sha256": git["diff_sha256"],
            "package_sha256": record["package_sha256"],
            "requirements_lock_sha256": record["lock_sha256"],
        }
        requirements = [
            self._context(f"#software/{name}-{number}", "SoftwareApplication", name=name, softwareVersion=number)
            for name, number in libraries.items()
            if number is not None
        ]
        key = hashlib.sha256(json.dumps([identity, libraries], sort_keys=True).encode()).hexdigest()[:12]
        links = {link: self._citation[field] for link, field in _LINKS.items() if field in self._citation}
        return self._context(
            f"#software/vipo-{version}-{key}",
            "SoftwareApplication",
            name="vipo",
            softwareVersion=version,
            author=self._people,
            license=self._license(),
            softwareRequirements=requirements,
            additionalProperty=[self._value("code", name, value) for name, value in identity.items()],
            **links,
        )

    def _value(self, kind: str, name: str, value: Any) -> Entity:
        # schema.org values are text, numbers and booleans; lists and null become their JSON text.
        plain = value if isinstance(value, str | int | float) else json.dumps(value)
        key = hashlib.sha256(json.dumps(plain).encode()).hexdigest()[:12]
        return self._context(f"#{kind}/{name}/{key}", "PropertyValue", name=name, value=plain)

    def _container(self, digest: str) -> Entity:
        return self._context(
            f"#container/{digest}",
            "ContainerImage",
            additionalType={"@id": f"{_TERMS}#DockerImage"},
            sha256=digest.removeprefix("sha256:"),
        )

    def _person(self, author: Mapping[str, str]) -> Entity:
        if "family-names" in author:
            name = " ".join(author[key] for key in ("given-names", "family-names") if key in author)
            return self._context(author.get("orcid", f"#person/{_slug(name)}"), "Person", name=name)
        return self._context(
            author.get("website", f"#organization/{_slug(author['name'])}"), "Organization", name=author["name"]
        )

    def _license(self) -> Entity:
        name = self._citation["license"]
        return self._context(f"https://spdx.org/licenses/{name}", "CreativeWork", name=name, identifier=name)

    def _context(self, identifier: str, kind: str, /, **properties: Any) -> Entity:
        return self._crate.add(ContextEntity(self._crate, identifier, {"@type": kind, **properties}))

    def _relative(self, path: Path) -> str:
        return Path(os.path.relpath(absolute_path(path), self._output)).as_posix()


def _records(experiment_dir: Path) -> list[Path]:
    # Hidden folders hold what is not a result: runs that were set aside, writes that were cut short.
    paths = sorted(experiment_dir.rglob(PROVENANCE))
    return [path for path in paths if not any(part.startswith(".") for part in path.relative_to(experiment_dir).parts)]


def _written(records: Mapping[Path, Mapping[str, Any]]) -> dict[str, str]:
    entries = [entry for record in records.values() for entry in record["outputs"]]
    return {name: file["sha256"] for entry in entries for name, file in entry_files(entry).items()}


def _read_citation(path: Path) -> dict[str, Any]:
    try:
        citation = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ProvenanceError(
            f"{path}: cannot be read ({error}); the crate takes people and licence from it"
        ) from error
    if not isinstance(citation, dict) or not {"authors", "license"} <= citation.keys():
        raise ProvenanceError(
            f"{path}: needs the keys 'authors' and 'license'; the crate takes people and licence from it"
        )
    return citation


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    data = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    if not isinstance(data, dict):
        raise ProvenanceError(f"{path}: holds no mapping of keys to values")
    return {str(key): value for key, value in data.items()}


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
