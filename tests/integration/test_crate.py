"""The crate says what the records say, points at files that are there, and has the same bytes every time."""

import json
import math
import os
import shutil
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import requests
import yaml
from audit_fixture import EXPERIMENT
from rocrate.rocrate import ROCrate

import vipo
from vipo.provenance import ProvenanceError, file_sha256, record_stage
from vipo.provenance.crate import write_crate, zip_crate

_REPOSITORY = Path(__file__).resolve().parents[2]


def _config(arm: str, learning_rate: float) -> str:
    config = {
        "experiment": {"name": "demo", "title": "Red <objects>", "question": "Does the map help?", "arms": {arm: {}}},
        "arm": arm,
        "optimizer": {"learning_rate": learning_rate, "betas": [0.9, 0.999]},
        "training": {"lora": None, "threads": 1},
    }
    return yaml.safe_dump(config)


def _train(root: Path, arm: str, learning_rate: float) -> None:
    folder = root / "results" / "demo" / "runs" / f"{arm}-s0"
    inputs = [root / "results" / "demo" / "prompts" / "train.jsonl", root / "generator"]
    outputs = [folder / "config.yaml", folder / "metrics.jsonl", folder / "weights"]
    with record_stage("train", folder, inputs=inputs, outputs=outputs, config={"arm": arm}, seeds=[0], root=root):
        (folder / "weights").mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(_config(arm, learning_rate))
        (folder / "metrics.jsonl").write_text("{}\n")
        (folder / "weights" / "a b.safetensors").write_bytes(arm.encode())


def _prepare(root: Path) -> None:
    folder = root / "results" / "demo" / "prompts"
    outputs = [folder / "train.jsonl"]
    with record_stage("prepare", folder, inputs=[root / "prompts.txt"], outputs=outputs, config=None, root=root):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "train.jsonl").write_text("{}\n")


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository in which an experiment of three stages was run."""
    monkeypatch.setattr("sys.argv", ["vipo", "train", "title=a b"])
    monkeypatch.setenv("VIPO_IMAGE_DIGEST", "sha256:0123")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    monkeypatch.setattr("vipo.provenance.environment.code_folder", lambda: None)
    root = tmp_path / "repository"
    (root / "generator").mkdir(parents=True)
    (root / "generator" / "model_index.json").write_text("{}")
    (root / "prompts.txt").write_text("a cat\n")
    for name in ("CITATION.cff", "Snakefile", "requirements.lock"):
        shutil.copy(_REPOSITORY / name, root)
    shutil.copytree(_REPOSITORY / "workflow" / "rules", root / "workflow" / "rules")
    _prepare(root)
    _train(root, "vipo", 1e-5)
    _train(root, "grpo", 2e-5)
    return root


def _entities(path: Path) -> dict[str, dict[str, Any]]:
    graph = json.loads(path.read_text())["@graph"]
    entities = {entity["@id"]: entity for entity in graph}
    assert len(entities) == len(graph)
    return entities


def _ids(value: Any) -> list[str]:
    return [item["@id"] for item in (value if isinstance(value, list) else [value])]


def test_every_data_entity_is_a_file_with_these_bytes(root: Path) -> None:
    experiment = root / "results" / "demo"
    path = write_crate(experiment, root)
    assert path == experiment / "ro-crate-metadata.json"
    entities = _entities(path)
    files = [entity for entity in entities.values() if "File" in entity["@type"]]
    found = {os.path.normpath(path.parent / unquote(entity["@id"])) for entity in files}
    written = {str(file) for file in experiment.rglob("*") if file.is_file() and file != path}
    assert found == written
    for entity in files:
        target = path.parent / unquote(entity["@id"])
        assert entity["sha256"] == file_sha256(target)
        assert int(entity["contentSize"]) == target.stat().st_size
    parts = _ids(entities["./"]["hasPart"])
    folders = {identifier for identifier, entity in entities.items() if entity["@type"] == "Dataset"}
    assert {entity["@id"] for entity in files} | folders - {"./"} == set(parts)


def test_rocrate_reads_it_and_nothing_dangles(root: Path) -> None:
    experiment = root / "results" / "demo"
    path = write_crate(experiment, root)
    crate = ROCrate(experiment)
    assert crate.name == "Red <objects>"
    assert {str(entity.source) for entity in crate.data_entities if "File" in entity.type} == {
        str(file) for file in experiment.rglob("*") if file.is_file() and file != path
    }
    entities = _entities(path)

    def references(value: Any) -> list[str]:
        if isinstance(value, dict):
            return [value["@id"]] if set(value) == {"@id"} else [i for v in value.values() for i in references(v)]
        return [i for v in value for i in references(v)] if isinstance(value, list) else []

    elsewhere = ("http://schema.org/", "https://w3id.org/ro/", "https://bioschemas.org/", "https://snakemake.")
    elsewhere += ("https://w3id.org/workflowhub/", "https://doi.org/")
    for entity in entities.values():
        for target in references([value for key, value in entity.items() if key != "@id"]):
            assert target in entities or target.startswith(elsewhere), target


def test_runs_are_actions_with_inputs_parameters_outputs_and_software(root: Path) -> None:
    experiment = root / "results" / "demo"
    entities = _entities(write_crate(experiment, root))
    assert _ids(entities["./"]["mentions"]) == [
        "#run",
        "#action/prepare/prompts",
        "#action/train/runs/grpo-s0",
        "#action/train/runs/vipo-s0",
    ]
    action = entities["#action/train/runs/vipo-s0"]
    record = json.loads((experiment / "runs" / "vipo-s0" / "provenance.json").read_text())
    assert action["@type"] == "CreateAction"
    assert (action["startTime"], action["endTime"]) == (record["started"], record["ended"])
    assert action["description"] == "vipo train 'title=a b'"
    assert _ids(action["result"]) == [
        "runs/vipo-s0/config.yaml",
        "runs/vipo-s0/metrics.jsonl",
        "runs/vipo-s0/weights/",
    ]
    assert _ids(entities["runs/vipo-s0/weights/"]["hasPart"]) == ["runs/vipo-s0/weights/a%20b.safetensors"]
    objects = [entities[identifier] for identifier in _ids(action["object"])]
    assert objects[0]["@id"] in _ids(entities["#action/prepare/prompts"]["result"])
    assert (objects[1]["@type"], objects[1]["name"]) == ("CreativeWork", "generator")
    assert objects[1]["sha256"] == record["inputs"][1]["sha256"]
    parameters = {entity["name"]: entity["value"] for entity in objects[2:]}
    assert parameters == {
        "arm": "vipo",
        "optimizer.learning_rate": 1e-5,
        "optimizer.betas": "[0.9, 0.999]",
        "training.lora": "null",
        "training.threads": 1,
        "seeds": "[0]",
        "config_sha256": record["config_sha256"],
    }
    software = entities[action["instrument"]["@id"]]
    assert (software["name"], software["softwareVersion"]) == ("vipo", vipo.__version__)
    identity = {entities[i]["name"]: entities[i]["value"] for i in _ids(software["additionalProperty"])}
    assert identity["package_sha256"] == record["package_sha256"]
    assert identity["git_commit"] == "null"
    requirements = {entities[i]["name"]: entities[i]["softwareVersion"] for i in _ids(software["softwareRequirements"])}
    assert requirements["torch"] == record["versions"]["torch"]
    assert entities[action["containerImage"]["@id"]]["sha256"] == "0123"
    assert entities[action["containerImage"]["@id"]]["additionalType"]["@id"].endswith("#DockerImage")


def test_apptainer_s_file_is_a_sif_image(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIPO_IMAGE_FILE", "containers/vipo.sif")
    monkeypatch.setenv("VIPO_IMAGE_DIGEST", "sha256:4567")
    _train(root, "vipo", 1e-5)
    entities = _entities(write_crate(root / "results" / "demo", root))
    images = [entity for entity in entities.values() if entity["@type"] == "ContainerImage"]
    told = {image["sha256"]: (image["additionalType"]["@id"].rpartition("#")[2], image["name"]) for image in images}
    assert told == {"0123": ("DockerImage", "sha256:0123"), "4567": ("SIFImage", "containers/vipo.sif")}


def test_the_experiment_is_a_run_of_its_workflow(root: Path) -> None:
    experiment = root / "results" / "demo"
    config = experiment / "configs" / "vipo-s0.yaml"
    config.parent.mkdir()
    config.write_text(_config("vipo", 1e-5))
    path = write_crate(experiment, root)
    entities = _entities(path)
    dataset = entities["./"]
    assert [item for item in json.loads(path.read_text())["@context"] if isinstance(item, str)] == [
        "https://w3id.org/ro/crate/1.1/context"
    ]
    profiles = ["https://w3id.org/ro/wfrun/process/0.5", "https://w3id.org/ro/wfrun/workflow/0.5"]
    assert _ids(dataset["conformsTo"]) == profiles
    assert [entities[profile]["version"] for profile in profiles] == ["0.5", "0.5"]
    assert _ids(entities["ro-crate-metadata.json"]["conformsTo"]) == [
        "https://w3id.org/ro/crate/1.1",
        "https://w3id.org/workflowhub/workflow-ro-crate/1.0",
    ]
    workflow = entities[dataset["mainEntity"]["@id"]]
    assert workflow["@id"] == "crate/Snakefile"
    assert set(workflow["@type"]) == {"File", "SoftwareSourceCode", "ComputationalWorkflow"}
    assert entities[workflow["programmingLanguage"]["@id"]]["name"] == "Snakemake"
    for name in ("Snakefile", "workflow/rules/runs.smk", "requirements.lock"):
        assert (experiment / "crate" / name).read_bytes() == (_REPOSITORY / name).read_bytes()
    run = entities["#run"]
    assert run["instrument"] == {"@id": "crate/Snakefile"}
    assert "configs/vipo-s0.yaml" in _ids(run["object"])
    assert "#input/prompts-txt/" in " ".join(_ids(run["object"]))
    assert _ids(entities["#formal-parameter/configurations"]["workExample"]) == ["configs/vipo-s0.yaml"]
    assert entities["configs/vipo-s0.yaml"]["exampleOfWork"] == {"@id": "#formal-parameter/configurations"}
    weights = ["runs/grpo-s0/weights/a%20b.safetensors", "runs/vipo-s0/weights/a%20b.safetensors"]
    assert _ids(run["result"]) == _ids(entities["#formal-parameter/weights"]["workExample"]) == weights
    assert dataset["description"] == "Does the map help?"
    assert dataset["license"] == {"@id": "https://spdx.org/licenses/Apache-2.0"}
    assert [entities[identifier]["name"] for identifier in _ids(dataset["author"])] == ["The vipo authors"]
    records = [json.loads(file.read_text()) for file in experiment.rglob("provenance.json")]
    assert dataset["datePublished"] == run["endTime"] == max(record["ended"] for record in records)


def test_same_results_give_the_same_bytes(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = root / "results" / "demo"
    first = write_crate(experiment, root).read_bytes()
    time.sleep(1.1)
    assert write_crate(experiment, root).read_bytes() == first
    moved = root.rename(root.with_name("moved"))
    monkeypatch.chdir(moved)
    relative = Path("results") / "demo"
    assert write_crate(relative, Path()).read_bytes() == first
    assert str(root.parent).encode() not in first


def test_what_is_no_result_is_left_out(root: Path) -> None:
    experiment = root / "results" / "demo"
    before = write_crate(experiment, root).read_bytes()
    shutil.copytree(experiment / "runs" / "vipo-s0", experiment / "runs" / ".superseded" / "vipo-s0")
    for name in ("runs/vipo-s0/.lock", "runs/vipo-s0/checkpoints/000002/tensors.safetensors", "logs/crate.log",
                 "export/vipo-s0/README.md", "SHA256SUMS"):  # fmt: skip
        (experiment / name).parent.mkdir(parents=True, exist_ok=True)
        (experiment / name).touch()
    # A copy of an earlier crate, of a rule that is no more.
    (experiment / "crate/workflow/gone.smk").write_text("rule gone:\n")
    assert write_crate(experiment, root).read_bytes() == before
    # What a checkpoint holds is named by its manifest, and that by the crate.
    (experiment / "runs/vipo-s0/checkpoints/000002/manifest.json").write_text("{}")
    (experiment / "logs/train.log").write_text("done")
    entities = _entities(write_crate(experiment, root))
    assert {"runs/vipo-s0/checkpoints/000002/manifest.json", "logs/train.log"} <= entities.keys()
    assert "runs/vipo-s0/checkpoints/000002/tensors.safetensors" not in entities


def test_the_archive_is_the_crate_and_the_same_every_time(root: Path, tmp_path: Path) -> None:
    experiment = root / "results" / "demo"
    with pytest.raises(ProvenanceError, match="run 'vipo crate' first"):
        zip_crate(experiment)
    metadata = write_crate(experiment, root)
    archive = zip_crate(experiment)
    assert archive == root / "results" / "demo.crate.zip"
    first = archive.read_bytes()
    os.utime(metadata, (0, 0))
    assert zip_crate(experiment).read_bytes() == first
    with zipfile.ZipFile(archive) as content:
        content.extractall(tmp_path / "unpacked")
    found = {path.relative_to(tmp_path / "unpacked").as_posix() for path in (tmp_path / "unpacked").rglob("*.*")}
    assert found >= {"ro-crate-metadata.json", "runs/vipo-s0/weights/a b.safetensors"}
    for entity in _entities(tmp_path / "unpacked" / "ro-crate-metadata.json").values():
        if "File" in entity["@type"]:
            assert file_sha256(tmp_path / "unpacked" / unquote(entity["@id"])) == entity["sha256"]


def test_people_links_and_inputs_from_elsewhere(root: Path, tmp_path: Path) -> None:
    (root / "CITATION.cff").write_text(
        "license: MIT\ndate-released: 2026-01-02\nurl: https://example.org/vipo\nauthors:\n"
        "  - {given-names: Ada, family-names: Lovelace, orcid: 'https://orcid.org/0000-0001-9842-9718'}\n"
        "  - {family-names: Noether}\n"
    )
    outside = tmp_path / "private place" / "Weights"
    outside.mkdir(parents=True)
    (outside / "a").write_text("a")
    folder = root / "results" / "demo" / "embeddings"
    with record_stage("encode", folder, inputs=[outside], outputs=[], config=None, root=root):
        folder.mkdir()
    experiment = root / "results" / "demo"
    path = write_crate(experiment, root)
    entities = _entities(path)
    people = [entities[identifier] for identifier in _ids(entities["./"]["author"])]
    assert [(person["@id"], person["@type"], person["name"]) for person in people] == [
        ("https://orcid.org/0000-0001-9842-9718", "Person", "Ada Lovelace"),
        ("#person/noether", "Person", "Noether"),
    ]
    action = entities["#action/encode/embeddings"]
    assert entities[_ids(action["object"])[0]]["name"] == "Weights"
    assert "private place" not in path.read_text()
    assert entities[action["instrument"]["@id"]]["url"] == "https://example.org/vipo"


def test_results_that_do_not_hold_are_refused(root: Path) -> None:
    experiment = root / "results" / "demo"
    (experiment / "runs" / "vipo-s0" / "metrics.jsonl").write_text("{ }\n")
    with pytest.raises(ProvenanceError, match=r"vipo-s0/metrics\.jsonl: changed"):
        write_crate(experiment, root)
    assert not (experiment / "ro-crate-metadata.json").exists()


@pytest.mark.parametrize(
    ("key", "value"),
    [("started", [1]), ("git", math.nan), ("hardware", "x"), ("command", [3]), ("outputs", [{"path": "a"}])],
)
def test_a_record_that_was_edited_is_named(root: Path, key: str, value: object) -> None:
    path = next((root / "results/demo").rglob("provenance.json"))
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {key: value}))
    with pytest.raises(
        ProvenanceError, match=r"provenance\.json: is not a (whole )?provenance record.*; run its stage"
    ):
        write_crate(root / "results/demo", root)


def test_lineage_that_does_not_join_is_refused(root: Path) -> None:
    folder = root / "results" / "demo" / "prompts"
    with record_stage("prepare", folder, inputs=[], outputs=[folder / "train.jsonl"], config=None, root=root):
        (folder / "train.jsonl").write_text('{"new": 1}\n')
    with pytest.raises(ProvenanceError, match=r"prompts/train\.jsonl: written with SHA-256 .*, read with .* again"):
        write_crate(root / "results" / "demo", root)


def test_a_configuration_that_changed_for_later_stages_is_named_twice(root: Path) -> None:
    experiment = root / "results" / "demo"
    config = experiment / "configs" / "vipo-s0.yaml"
    config.parent.mkdir()
    for stage in ("score", "report"):
        config.write_text(f"for: {stage}\n")
        with record_stage(stage, experiment / stage, inputs=[config], outputs=[], config=None, root=root):
            (experiment / stage).mkdir()
    entities = _entities(write_crate(experiment, root))
    read = [
        entities[_ids(entities[f"#action/{stage}/{stage}"]["object"])[0]]["sha256"] for stage in ("score", "report")
    ]
    assert [file_sha256(config) == value for value in read] == [False, True]


def test_nothing_to_describe_is_an_error(root: Path, tmp_path: Path) -> None:
    with pytest.raises(ProvenanceError, match=r"holds no provenance\.json"):
        write_crate(tmp_path / "empty", root)
    (root / "CITATION.cff").write_text("title: x\n")
    with pytest.raises(ProvenanceError, match=r"CITATION\.cff: needs the keys 'authors' and 'license'"):
        write_crate(root / "results" / "demo", root)


def test_citation_agrees_with_the_package() -> None:
    citation = yaml.safe_load((_REPOSITORY / "CITATION.cff").read_text())
    assert citation["version"] == vipo.__version__
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= citation.keys()


@pytest.fixture
def offline_validator(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], tuple[int, list[str]]]:
    """Number of checks made, and problems found, of the Workflow Run Crate profile in a folder; no network."""
    from rocrate import vocabs
    from rocrate_validator import services
    from rocrate_validator.models import Severity
    from rocrate_validator.utils.http import HttpRequester

    # The packaged context is RO-Crate 1.3's; what we use of it differs from 1.1's in Bioschemas' addresses alone.
    context = dict(vocabs.RO_CRATE["@context"])
    for term in ("ComputationalWorkflow", "FormalParameter"):
        context[term] = f"https://bioschemas.org/{term}"
    for term in ("input", "output"):
        context[term] = f"https://bioschemas.org/ComputationalWorkflow#{term}"
    asked: list[str] = []

    def get(self: object, url: str, **_: object) -> requests.Response:
        asked.append(url)
        answer = requests.Response()
        answer.status_code = 200
        answer.headers["Content-Type"] = "application/ld+json"
        answer._content = json.dumps({"@context": context}).encode()
        return answer

    def no_network(*_: object) -> None:
        raise AssertionError("the network was asked for")

    monkeypatch.setattr(HttpRequester, "get", get, raising=False)
    monkeypatch.setattr("socket.socket.connect", no_network)
    monkeypatch.setattr("socket.getaddrinfo", no_network)

    def validate(folder: Path) -> tuple[int, list[str]]:
        settings = services.ValidationSettings(
            rocrate_uri=str(folder),
            profile_identifier="workflow-run-crate",
            requirement_severity=Severity.REQUIRED,
            offline=True,
            cache_path=folder.parent / "cache",
        )
        result = services.validate(settings)
        assert set(asked) == {"https://w3id.org/ro/crate/1.1/context"}
        return len(result.executed_checks), [issue.message for issue in result.get_issues(Severity.REQUIRED)]

    return validate


def test_it_passes_the_required_checks_of_the_workflow_run_crate_profile(
    signed: Path, tmp_path: Path, offline_validator: Callable[[Path], tuple[int, list[str]]]
) -> None:
    # A real experiment's, as it is in its archive.
    with zipfile.ZipFile(zip_crate(Path(shutil.copytree(signed / EXPERIMENT, tmp_path / "demo")))) as archive:
        archive.extractall(tmp_path / "unpacked")
    checks, problems = offline_validator(tmp_path / "unpacked")
    assert problems == []
    assert checks == 63
    # The checks look: without a language the workflow is none.
    path = tmp_path / "unpacked" / "ro-crate-metadata.json"
    path.write_text(path.read_text().replace('"programmingLanguage"', '"description"'))
    told = offline_validator(tmp_path / "unpacked")[1]
    assert "The Main Workflow must refer to its language via programmingLanguage" in told
