"""What an experiment's crate says of its files, stages, people and software: the entities of RO-Crate.

Follows RO-Crate 1.1 and the Workflow Run Crate profile 0.5 of the Workflow Run RO-Crate collection
(https://w3id.org/ro/wfrun/workflow/0.5). The experiment's folder is the crate's root. Its main entity is the
Snakefile; one ``CreateAction`` is the whole experiment as a run of that workflow, and every recorded stage is one
more, with its inputs and parameters (``object``), outputs (``result``) and software (``instrument``).
"""

import fnmatch
import hashlib
import json
import os
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vipo.config.resolved import read_mapping
from vipo.config.values import flattened
from vipo.provenance.files import file_sha256
from vipo.provenance.records import PROVENANCE, ProvenanceError, absolute_path, entry_files

if TYPE_CHECKING:
    from rocrate.model.entity import Entity

#: Where the crate has its copies of the workflow's files.
COPIES = "crate"
_TERMS = "https://w3id.org/ro/terms/workflow-run"
#: The profiles that the crate follows, by the name in their address; a Workflow Run Crate is a Process Run Crate.
_PROFILES = {"process": "Process Run Crate", "workflow": "Workflow Run Crate"}
#: Terms of the Workflow Run collection, which RO-Crate's own context lacks: in the file, so that nothing is fetched.
_CONTEXT = {name: f"{_TERMS}#{name}" for name in ("ContainerImage", "containerImage", "environment", "sha256")}
_BIOSCHEMAS = "https://bioschemas.org/profiles"
_CONFIG = "config.yaml"
#: The workflow's outputs by name: which files they are, and what they are.
_OUTPUTS = {
    "report": ("report/index.html", "The experiment's report for people"),
    "numbers": ("report/data/report.json", "Every number of the report"),
    "scores": ("evaluation/*/scores.parquet", "Rewards of every evaluated sample"),
    "weights": ("runs/*/weights/*", "Trained weights"),
}
_LINKS = {"url": "url", "codeRepository": "repository-code"}  # RO-Crate's property: CITATION.cff's key
_MEDIA_TYPES = {
    ".csv": "text/csv",
    ".diff": "text/x-diff",
    ".html": "text/html",
    ".json": "application/json",
    ".jsonl": "application/jsonl",
    ".log": "text/plain",
    ".parquet": "application/vnd.apache.parquet",
    ".png": "image/png",
    ".svg": "image/svg+xml",
    ".txt": "text/plain",
    ".yaml": "application/yaml",
}


class CrateDescription:
    """Adds stages to one crate; entities that stages share (files, parameters, software) are added once."""

    def __init__(
        self,
        experiment_dir: Path,
        root: Path,
        citation: Mapping[str, Any],
        files: Sequence[str],
        written: Mapping[str, str],
    ) -> None:
        """Begin with people and with all `files`; those that are `written` have their SHA-256 by recorded path."""
        self._experiment = absolute_path(experiment_dir)
        self._root = absolute_path(root)
        self._citation = citation
        from rocrate.rocrate import ROCrate

        self._crate = ROCrate(version="1.1")
        self._crate.metadata.extra_terms.update(_CONTEXT)
        self._people = [self._person(author) for author in self._citation["authors"]]
        self._written = written
        hashes = {self._place(name): sha256 for name, sha256 in written.items()}
        self._files = {name: self._file(name, hashes.get(name)) for name in files}
        self._actions: list[Entity] = []
        self._times: list[str] = []
        self._inputs: dict[str, Entity] = {}
        self._experiments: list[Mapping[str, Any]] = []

    def add_stage(self, folder: Path, record: Mapping[str, Any]) -> None:
        """The stage that was recorded in `folder` as an action."""
        folder = absolute_path(folder)
        place = folder.relative_to(self._experiment).as_posix()
        inputs = [entity for entry in record["inputs"] for entity in self._data(entry)]
        results = [entity for entry in record["outputs"] for entity in self._data(entry)]
        config = _read_config(folder / _CONFIG) or record["config"] or {}
        self._experiments += [config["experiment"]] if "experiment" in config else []
        settings = {name: value for name, value in flattened(config) if not name.startswith("experiment.")}
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
            action["containerImage"] = self._container(record["container_digest"], record.get("container_file"))
        self._files[f"{place}/{PROVENANCE}"]["about"] = action
        self._inputs |= {entity.id: entity for entity in inputs if entity.type == "CreativeWork"}
        self._actions.append(action)
        self._times += [record["started"], record["ended"]]

    def finish(self) -> str:
        """The crate's metadata as JSON text."""
        experiment = self._experiments[0] if self._experiments else {"title": self._experiment.name}
        dataset = self._crate.root_dataset
        dataset["name"] = experiment["title"]
        dataset["description"] = experiment.get("question", f"Results of the experiment {self._experiment.name}")
        dataset["datePublished"] = max(self._times)
        dataset["author"] = self._people
        dataset["license"] = self._license()
        run = self._run()
        # Adding a main workflow made the root a Workflow RO-Crate; a run of it is described by two profiles more.
        for profile, name in _PROFILES.items():
            address = f"https://w3id.org/ro/wfrun/{profile}/0.5"
            dataset.append_to("conformsTo", self._context(address, "CreativeWork", name=name, version="0.5"))
        dataset["mentions"] = [run, *self._actions]
        return json.dumps(self._crate.metadata.generate(), indent=1, sort_keys=True, ensure_ascii=False) + "\n"

    def _run(self) -> "Entity":
        """The whole experiment as one run of its workflow."""
        configs = self._matching("configs/*.yaml")
        outputs = {name: self._matching(pattern) for name, (pattern, _) in _OUTPUTS.items()}
        given = [self._formal(name, about, outputs[name]) for name, (_, about) in _OUTPUTS.items()]
        taken = [self._formal("configurations", "The resolved configuration of every run", configs)]
        place = f"{COPIES}/Snakefile"
        described = {key: value for key, value in self._files[place].properties().items() if not key.startswith("@")}
        described |= {"conformsTo": {"@id": f"{_BIOSCHEMAS}/ComputationalWorkflow/1.0-RELEASE"}}
        workflow = self._crate.add_workflow(
            dest_path=place, main=True, lang="snakemake", properties={**described, "input": taken, "output": given}
        )
        return self._context(
            "#run",
            "CreateAction",
            name=f"The experiment {self._experiment.name}",
            description="All recorded stages as one run of the workflow",
            startTime=min(self._times),
            endTime=max(self._times),
            actionStatus={"@id": "http://schema.org/CompletedActionStatus"},
            instrument=workflow,
            object=[*configs, *self._inputs.values()],
            result=[entity for entities in outputs.values() for entity in entities],
        )

    def _data(self, entry: Mapping[str, Any]) -> "Iterator[Entity]":
        recorded = entry_files(entry)
        if not recorded.keys() <= self._written.keys():
            beside = self._files.get(self._place(entry["path"]))
            yield beside if beside is not None and beside["sha256"] == entry["sha256"] else self._outside(entry)
            return
        for name, file in recorded.items():
            if file["sha256"] != self._written[name]:
                raise ProvenanceError(
                    f"{name}: written with SHA-256 {self._written[name][:12]}…, read with {file['sha256'][:12]}…; "
                    "run the stages that read it again"
                )
        parts = [self._files[self._place(name)] for name in recorded]
        if "files" not in entry:
            yield from parts
        else:
            properties = {"name": Path(entry["path"]).name, "hasPart": parts}
            from rocrate.model.dataset import Dataset

            yield self._crate.add(Dataset(self._crate, dest_path=self._place(entry["path"]), properties=properties))

    def _place(self, recorded: str) -> str:
        """A recorded path, relative to the crate's root."""
        return Path(os.path.relpath(absolute_path(self._root / recorded), self._experiment)).as_posix()

    def _file(self, name: str, sha256: str | None) -> "Entity":
        path = self._experiment / name
        properties = {
            "name": path.name,
            "contentSize": str(path.stat().st_size),
            "sha256": sha256 or file_sha256(path),
            **({"encodingFormat": _MEDIA_TYPES[path.suffix]} if path.suffix in _MEDIA_TYPES else {}),
        }
        from rocrate.model.file import File

        return self._crate.add(File(self._crate, dest_path=name, properties=properties))

    def _matching(self, pattern: str) -> "list[Entity]":
        return [entity for name, entity in self._files.items() if fnmatch.fnmatch(name, pattern)]

    def _formal(self, name: str, description: str, examples: "list[Entity]") -> "Entity":
        parameter = self._context(
            f"#formal-parameter/{name}",
            "FormalParameter",
            name=name,
            description=description,
            additionalType="File",
            conformsTo={"@id": f"{_BIOSCHEMAS}/FormalParameter/1.0-RELEASE"},
            workExample=examples,
        )
        for entity in examples:
            entity["exampleOfWork"] = parameter
        return parameter

    def _outside(self, entry: Mapping[str, Any]) -> "Entity":
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

    def _software(self, record: Mapping[str, Any]) -> "Entity":
        git, libraries = record["git"], dict(record["versions"])
        version = libraries.pop("vipo")
        identity = {
            "git_commit": git["commit"],
            "git_dirty": git["dirty"],
            "git_diff_sha256": git["diff_sha256"],
            "package_sha256": record["package_sha256"],
            "requirements_lock_sha256": record["lock_sha256"],
            # Records of an earlier vipo lack it.
            "installed_sha256": record.get("installed_sha256"),
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

    def _value(self, kind: str, name: str, value: Any) -> "Entity":
        # schema.org values are text, numbers and booleans; lists and null become their JSON text.
        plain = value if isinstance(value, str | int | float) else json.dumps(value)
        key = hashlib.sha256(json.dumps(plain).encode()).hexdigest()[:12]
        return self._context(f"#{kind}/{name}/{key}", "PropertyValue", name=name, value=plain)

    def _container(self, digest: str, file: str | None) -> "Entity":
        return self._context(
            f"#container/{digest}",
            "ContainerImage",
            additionalType={"@id": f"{_TERMS}#{'DockerImage' if file is None else 'SIFImage'}"},
            name=digest if file is None else file,
            sha256=digest.removeprefix("sha256:"),
        )

    def _person(self, author: Mapping[str, str]) -> "Entity":
        if "family-names" in author:
            name = " ".join(author[key] for key in ("given-names", "family-names") if key in author)
            return self._context(author.get("orcid", f"#person/{_slug(name)}"), "Person", name=name)
        return self._context(
            author.get("website", f"#organization/{_slug(author['name'])}"), "Organization", name=author["name"]
        )

    def _license(self) -> "Entity":
        name = self._citation["license"]
        return self._context(f"https://spdx.org/licenses/{name}", "CreativeWork", name=name, identifier=name)

    def _context(self, identifier: str, kind: str, /, **properties: Any) -> "Entity":
        from rocrate.model.contextentity import ContextEntity

        return self._crate.add(ContextEntity(self._crate, identifier, {"@type": kind, **properties}))


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return read_mapping(path)
    except ValueError as error:
        raise ProvenanceError(str(error)) from error


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
