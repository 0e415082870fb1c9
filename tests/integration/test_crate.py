"""The crate says what the records say, points at files that are there, and has the same bytes every time."""

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import yaml
from rocrate.rocrate import ROCrate

import vipo
from vipo.provenance import ProvenanceError, file_sha256, record_stage, write_crate

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
    root = tmp_path / "repository"
    (root / "generator").mkdir(parents=True)
    (root / "generator" / "model_index.json").write_text("{}")
    (root / "prompts.txt").write_text("a cat\n")
    shutil.copy(_REPOSITORY / "CITATION.cff", root)
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


@pytest.mark.parametrize("place", [".", "crate"])
def test_every_data_entity_is_a_file_with_these_bytes(root: Path, place: str) -> None:
    experiment = root / "results" / "demo"
    path = write_crate(experiment, experiment / place, root)
    assert path == experiment / place / "ro-crate-metadata.json"
    entities = _entities(path)
    files = [entity for entity in entities.values() if entity["@type"] == "File"]
    found = {os.path.normpath(path.parent / unquote(entity["@id"])) for entity in files}
    written = {str(file) for file in experiment.rglob("*") if file.is_file() and file != path}
    assert found == written
    for entity in files:
        target = path.parent / unquote(entity["@id"])
        if target.name != "provenance.json":
            assert entity["sha256"] == file_sha256(target)
            assert int(entity["contentSize"]) == target.stat().st_size
    parts = _ids(entities["./"]["hasPart"])
    assert {entity["@id"] for entity in entities.values() if entity["@type"] in ("File", "Dataset")} - {"./"} == set(
        parts
    )


def test_rocrate_reads_it_and_nothing_dangles(root: Path) -> None:
    experiment = root / "results" / "demo"
    path = write_crate(experiment, experiment, root)
    crate = ROCrate(experiment)
    assert crate.name == "Red <objects>"
    assert {str(entity.source) for entity in crate.data_entities if entity.type == "File"} == {
        str(file) for file in experiment.rglob("*") if file.is_file() and file != path
    }
    entities = _entities(path)

    def references(value: Any) -> list[str]:
        if isinstance(value, dict):
            return [value["@id"]] if set(value) == {"@id"} else [i for v in value.values() for i in references(v)]
        return [i for v in value for i in references(v)] if isinstance(value, list) else []

    elsewhere = ("http://schema.org/", "https://w3id.org/ro/crate/1.1", "https://w3id.org/ro/terms/")
    for entity in entities.values():
        for target in references([value for key, value in entity.items() if key != "@id"]):
            assert target in entities or target.startswith(elsewhere), target


def test_runs_are_actions_with_inputs_parameters_outputs_and_software(root: Path) -> None:
    experiment = root / "results" / "demo"
    entities = _entities(write_crate(experiment, experiment, root))
    assert _ids(entities["./"]["mentions"]) == [
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


def test_root_follows_the_profile(root: Path) -> None:
    experiment = root / "results" / "demo"
    path = write_crate(experiment, experiment, root)
    entities = _entities(path)
    dataset = entities["./"]
    assert json.loads(path.read_text())["@context"] == [
        "https://w3id.org/ro/crate/1.1/context",
        "https://w3id.org/ro/terms/workflow-run/context",
    ]
    assert dataset["conformsTo"] == {"@id": "https://w3id.org/ro/wfrun/process/0.5"}
    assert entities["https://w3id.org/ro/wfrun/process/0.5"]["version"] == "0.5"
    assert dataset["description"] == "Does the map help?"
    assert dataset["license"] == {"@id": "https://spdx.org/licenses/Apache-2.0"}
    assert [entities[identifier]["name"] for identifier in _ids(dataset["author"])] == ["The vipo authors"]
    records = [json.loads(file.read_text()) for file in experiment.rglob("provenance.json")]
    assert dataset["datePublished"] == max(record["ended"] for record in records)


def test_same_results_give_the_same_bytes(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = root / "results" / "demo"
    first = write_crate(experiment, experiment, root).read_bytes()
    time.sleep(1.1)
    assert write_crate(experiment, experiment, root).read_bytes() == first
    moved = root.rename(root.with_name("moved"))
    monkeypatch.chdir(moved)
    relative = Path("results") / "demo"
    assert write_crate(relative, relative, Path()).read_bytes() == first
    assert str(root.parent).encode() not in first


def test_its_own_record_and_hidden_folders_are_left_out(root: Path) -> None:
    experiment = root / "results" / "demo"
    before = write_crate(experiment, experiment / "crate", root).read_bytes()
    shutil.copytree(experiment / "runs" / "vipo-s0", experiment / "runs" / ".superseded" / "vipo-s0")
    crate = experiment / "crate"
    for _ in range(2):
        with record_stage(
            "crate", crate, inputs=[], outputs=[crate / "ro-crate-metadata.json"], config=None, root=root
        ):
            write_crate(experiment, crate, root)
        assert (crate / "ro-crate-metadata.json").read_bytes() == before
    assert write_crate(experiment, crate, root).read_bytes() == before


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
    path = write_crate(experiment, experiment, root)
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
        write_crate(experiment, experiment, root)
    assert not (experiment / "ro-crate-metadata.json").exists()


def test_lineage_that_does_not_join_is_refused(root: Path) -> None:
    folder = root / "results" / "demo" / "prompts"
    with record_stage("prepare", folder, inputs=[], outputs=[folder / "train.jsonl"], config=None, root=root):
        (folder / "train.jsonl").write_text('{"new": 1}\n')
    with pytest.raises(ProvenanceError, match=r"prompts/train\.jsonl: written with SHA-256 .*, read with .* again"):
        write_crate(root / "results" / "demo", root / "results" / "demo", root)


def test_a_configuration_that_changed_for_later_stages_is_named_twice(root: Path) -> None:
    experiment = root / "results" / "demo"
    config = experiment / "configs" / "vipo-s0.yaml"
    config.parent.mkdir()
    for stage in ("evaluate", "report"):
        config.write_text(f"for: {stage}\n")
        with record_stage(stage, experiment / stage, inputs=[config], outputs=[], config=None, root=root):
            (experiment / stage).mkdir()
    entities = _entities(write_crate(experiment, experiment, root))
    read = [
        entities[_ids(entities[f"#action/{stage}/{stage}"]["object"])[0]]["sha256"] for stage in ("evaluate", "report")
    ]
    assert [file_sha256(config) == value for value in read] == [False, True]


def test_nothing_to_describe_is_an_error(root: Path, tmp_path: Path) -> None:
    with pytest.raises(ProvenanceError, match=r"holds no provenance\.json"):
        write_crate(tmp_path / "empty", tmp_path / "empty", root)
    (root / "CITATION.cff").write_text("title: x\n")
    with pytest.raises(ProvenanceError, match=r"CITATION\.cff: needs the keys 'authors' and 'license'"):
        write_crate(root / "results" / "demo", root / "results" / "demo", root)


def test_citation_agrees_with_the_package() -> None:
    citation = yaml.safe_load((_REPOSITORY / "CITATION.cff").read_text())
    assert citation["version"] == vipo.__version__
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= citation.keys()
