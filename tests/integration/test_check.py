"""`vipo check`: a line for each thing that a run needs; on fake caches, machines and a hub of our own."""

import json
import os
import shlex
import socket
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub.constants
import pytest
import yaml
from huggingface_hub.utils import filter_repo_objects

from vipo.check import Line, check_experiment
from vipo.check.asked import asked_lines
from vipo.check.hub import Told, fetch_command, missing_files
from vipo.check.line import found, ok
from vipo.check.machine import gpus, machine_lines
from vipo.check.pin import pin
from vipo.check.places import disk_line, folder_lines
from vipo.check.wanted import Wanted, wanted
from vipo.check.weights import _to_fetch, commits, weight_lines
from vipo.cli import app
from vipo.config.compose import load_config, repository_root
from vipo.config.run import Config
from vipo.config.validation import ConfigError
from vipo.prompts import PromptError
from vipo.rewards import RewardError
from vipo.stages import prepare_stage

ROOT = repository_root()
OLD, NEW = "1" * 40, "a" * 40
LOCAL = ["reward=redness", "evaluation.rewards=[redness]"]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub, no connection beside it."""
    folder = tmp_path / "hub"
    folder.mkdir()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder))
    return folder


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_arguments: object) -> None:
        raise AssertionError("a connection was opened")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)


def _cached(cache: Path, repository: str, commit: str, files: dict[str, str]) -> Path:
    folder = cache / f"models--{repository.replace('/', '--')}"
    for name, text in files.items():
        path = folder / "snapshots" / commit / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (folder / "refs").mkdir(exist_ok=True)
    (folder / "refs/main").write_text(commit)
    return folder / "snapshots" / commit


def _pipeline(**parts: str) -> dict[str, str]:
    index = {"_class_name": "P", "scheduler": ["diffusers", "S"], "safety_checker": [None, None]}
    index |= {name: ["diffusers", "N"] for name in parts}
    files = {"model_index.json": json.dumps(index), "scheduler/scheduler_config.json": "{}"}
    return files | {f"{name}/{file}": "" for name, file in parts.items()}


def _item(**changes: object) -> Wanted:
    values = {"what": "generator", "field": "path", "written": "acme/big", "override": "generator"}
    values |= {"revision": None, "revision_field": "revision", "repository": "acme/big"}
    return Wanted(**(values | changes))  # type: ignore[arg-type]


def _said(lines: Iterator[Line] | list[Line]) -> dict[str, tuple[str, str]]:
    return {line.subject: (line.verdict, line.said) for line in lines}


@pytest.mark.usefixtures("cache", "offline")
def test_what_runs_here_is_ok_without_a_connection(
    tiny_overrides: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "results"
    given = [*tiny_overrides, "distribution={strategy: fsdp, offload: true}"]
    app(["check", *given, "--results", str(results), "--json"], standalone_mode=False)
    lines = {line["subject"]: line for line in json.loads(capsys.readouterr().out)}
    assert {line["verdict"] for line in lines.values()} == {"ok"}
    assert {
        "main memory",
        "configuration",
        "prompts",
        "generator",
        "disk",
        "memory",
        "backbone efficientnet_lite0",
    } <= lines.keys()
    # base is not trained; grpo and vipo have two seeds.
    assert " 7 runs " in lines["disk"]["said"]
    assert not results.exists()


@pytest.mark.usefixtures("cache", "offline")
@pytest.mark.parametrize("source", ["set:parti", f"hub:acme/prompts@{NEW}/a.jsonl"])
def test_published_prompts_are_not_fetched_to_be_looked_at(
    source: str, tiny_overrides: list[str], tmp_path: Path
) -> None:
    config = load_config([*tiny_overrides, "arm=vipo", f"prompts.source='{source}'"])
    lines = _said(list(check_experiment({"vipo": config}, ROOT, tmp_path, whole=False)))
    assert lines["prompts"][0] == "open"
    assert {lines[subject][0] for subject in ("import paths", "memory", "disk")} == {"ok"}


@pytest.mark.usefixtures("cache", "offline")
def test_held_out_prompts_of_their_own_are_looked_at(tiny_overrides: list[str], tmp_path: Path) -> None:
    (tmp_path / "held.jsonl").write_text('{"text": "a fox"}\n')
    told = []
    for source in ("nowhere.txt", tmp_path / "held.jsonl"):
        config = load_config([*tiny_overrides, "arm=vipo", f"prompts.eval={{source: '{source}'}}"])
        told.append(_said(list(check_experiment({"vipo": config}, ROOT, tmp_path, whole=False)))["prompts.eval"])
    assert [verdict for verdict, _ in told] == ["to do", "to do"]
    assert "nowhere.txt" in told[0][1]
    assert "set prompts.eval.text_key" in told[1][1]


@pytest.mark.usefixtures("cache", "offline")
def test_how_many_prompts_are_held_out_is_told_as_prepare_splits_them(
    tiny_overrides: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "some.txt").write_text("".join(f"a cube, number {i}\n" for i in range(40)))
    given = [*tiny_overrides, "arm=vipo", *LOCAL, f"prompts.source={tmp_path / 'some.txt'}", "evaluation.prompts=30"]

    def line(*more: str) -> tuple[str, str]:
        config = load_config([*given, *more])
        lines = check_experiment({"vipo": config}, ROOT, tmp_path, whole=False)
        return next((line.verdict, line.said) for line in lines if line.subject == "held out")

    config = load_config(given)
    with caplog.at_level("INFO"):
        prepare_stage(config, ROOT, tmp_path / "results")
    counts = json.loads((tmp_path / "results/demo/prompts/manifest.json").read_text())["counts"]
    told = f"{counts['train']} prompts to train on, {counts['eval']} held out; evaluation.prompts 30 asks for more"
    assert 1 < counts["eval"] < 30
    assert line() == ("ok", f"{told}: all of these are used")
    assert told in caplog.text
    # What would stop `prepare` is told here.
    assert line("prompts.eval_share=0.999") == ("to do", _refused(given, tmp_path))
    assert line("evaluation.rewards=[scene_shape]")[0] == "to do"
    assert line("prompts.filters={max_tokens: 5}")[0] == "open"


def _refused(given: list[str], folder: Path) -> str:
    with pytest.raises(PromptError) as raised:
        prepare_stage(load_config([*given, "prompts.eval_share=0.999"]), ROOT, folder / "refused")
    return str(raised.value)


@pytest.mark.usefixtures("cache", "offline")
def test_what_is_missing_is_a_line_each_and_status_1(
    tiny_overrides: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [*tiny_overrides, "arm=vipo", "generator.path='acme/big\x1b[31m'", "prompts.source=nowhere.txt"]
    given += ["perception={backbone: 'hf-hub:acme/eyes', layer: null}", "generator.device=cuda"]
    given += ["reward.terms=[{name: hpsv2, options: {path: acme/taste}}, {name: 'my_absent:reward'}]"]
    given += ["evaluation.rewards=[{name: aesthetic, options: {head: no/head.pth}}]"]
    assert app(["check", *given, "--results", str(tmp_path)], standalone_mode=False) == 1
    shown = capsys.readouterr().out
    for told in (
        "nowhere.txt: cannot be read",
        "No module named 'my_absent'",
        "path 'acme/big\\x1b[31m': no such file or folder",
        "hf download acme/taste --include 'HPS_v2.1_compressed.*'",
        "head 'no/head.pth': no such file or folder",
        "no commit of acme/eyes is named: vipo check ... --online --pin FILE writes perception.revision",
        "no commit of acme/taste is named",
    ):
        assert told in shown, told
    assert "Traceback" not in shown
    assert "\x1b" not in shown


def test_a_cached_checkpoint_is_whole_or_told_what_it_lacks(cache: Path) -> None:
    whole = _pipeline(transformer="a.safetensors", vae="b.safetensors", tokenizer="vocab.json")
    place = _cached(cache, "acme/big", OLD, whole)
    item = _item(revision=OLD)
    assert _said(weight_lines([item], ROOT, False)) == {"generator": ("ok", f"acme/big in the cache: {place}")}
    shards = {"weight_map": {"x": "m-1.safetensors", "y": "m-2.safetensors"}}
    (place / "transformer/m.safetensors.index.json").write_text(json.dumps(shards))
    (place / "transformer/m-1.safetensors").touch()
    (place / "vae/b.safetensors").unlink()
    assert missing_files(item, place) == ["transformer/m-2.safetensors", "vae/"]
    [line] = weight_lines([item], ROOT, False)
    assert line.verdict == "to do"
    assert f"hf download acme/big --revision {OLD}" in line.said
    assert commits([_item()], ROOT, "main", False) == ({("path", "acme/big"): OLD}, [])
    [line] = commits([_item()], ROOT, "other", False)[1]
    assert "its branch 'other' was never fetched here; add --online" in line.said
    # Another commit than the cached one.
    [line] = weight_lines([_item(revision=NEW)], ROOT, False)
    assert "is not in the cache" in line.said
    (place / "model_index.json").write_text("{")
    [line] = found("generator", lambda: weight_lines([item], ROOT, False))
    assert (line.verdict, "could not be checked (JSONDecodeError" in line.said) == ("to do", True)


def _sharded(part: Path, index: str, *shards: str) -> None:
    (part / index).write_text(json.dumps({"weight_map": dict(enumerate(shards))}))
    (part / shards[-1]).touch()


def test_variants_are_read_from_a_folder_and_not_of_a_hub_id(cache: Path) -> None:
    """As the loader does: of a hub id each machine reads the same files of a commit."""
    name = "diffusion_pytorch_model.bf16.safetensors"
    files = _pipeline(text_encoder="model.fp16.safetensors", transformer=name, vae="model.safetensors")
    place = _cached(cache, "acme/big", OLD, files)
    assert missing_files(_item(), place) == []
    absent = ["text_encoder/*.safetensors", "transformer/*.safetensors"]
    assert missing_files(_item(), place, cached=True) == absent
    [line] = weight_lines([_item(revision=OLD)], ROOT, False)
    assert line.verdict == "to do"
    assert "lacks text_encoder/*.safetensors, transformer/*.safetensors in the cache" in line.said
    # Of the shards of a variant, or without their index.
    (place / "transformer" / name).unlink()
    shards = [f"diffusion_pytorch_model.bf16-0000{number}-of-00002.safetensors" for number in (1, 2)]
    _sharded(place / "transformer", "diffusion_pytorch_model.safetensors.index.bf16.json", *shards)
    assert missing_files(_item(), place) == [f"transformer/{shards[0]}"]
    (place / "transformer/diffusion_pytorch_model.safetensors.index.bf16.json").unlink()
    assert missing_files(_item(), place) == ["transformer/*.bf16.safetensors"]
    # Beside variants, the plain files count.
    _sharded(place / "transformer", "m.safetensors.index.json", "m-1.safetensors", "model-2-of-2.safetensors")
    assert missing_files(_item(), place) == ["transformer/m-1.safetensors"]


def test_what_is_there_twice_is_not_fetched_and_variants_alone_are_told() -> None:
    plain = ["model_index.json", "vae/config.json", "vae/model.safetensors", "text_encoder/model-1-of-2.safetensors"]
    variants = [
        "text_encoder/model.fp16-1-of-2.safetensors",
        "text_encoder/model.safetensors.index.bf16.json",
        "transformer/diffusion_pytorch_model.int4.safetensors",
        "unet/diffusion_pytorch_model.non_ema.safetensors",
    ]
    told = Told(NEW, False, dict.fromkeys([*plain, *variants], 1))
    assert told.size(_item()) == len(plain)
    fetched = shlex.split(fetch_command(_item(), NEW))
    excluded = [fetched[row + 1] for row, word in enumerate(fetched) if word == "--exclude"]
    left = list(
        filter_repo_objects([*plain, *variants], allow_patterns=["model_index.json", "*/*"], ignore_patterns=excluded)
    )
    assert left == plain
    assert told.parts_of_variants(_item(replaced=("unet",))) == ["transformer"]
    said = _to_fetch(_item(), NEW, None, told)
    assert "weights of transformer, unet are variants, which are read from a folder alone: hf download acme/" in said


def test_what_a_network_is_read_from_instead_is_looked_at(demo: Config, tmp_path: Path) -> None:
    """The folder's own network need not be there; a guider of the pipeline has no weights."""
    (tmp_path / "base/guider").mkdir(parents=True)
    files = _pipeline(
        transformer="config.json", transformer_2="config.json", vae="w.safetensors", guider="guider_config.json"
    )
    for name, text in files.items():
        (tmp_path / "base" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "base" / name).write_text(text)
    (tmp_path / "run").mkdir()
    (tmp_path / "net.safetensors").write_bytes(b"")

    def said(**changes: object) -> dict[str, tuple[str, str]]:
        generator = demo.generator.model_copy(update={"path": str(tmp_path / "base"), **changes})
        return _said(weight_lines(wanted(demo.model_copy(update={"generator": generator}), ROOT), ROOT, False))

    assert said()["generator"][1].endswith(
        "lacks transformer/*.safetensors, transformer_2/*.safetensors; copy it again, or name another folder"
    )
    found = said(file=str(tmp_path / "net.safetensors"), start=str(tmp_path / "run"))
    assert (found["generator"][0], found["generator: file"][0]) == ("ok", "ok")
    assert "run lacks weights or transformer or" in found["generator: start"][1]
    (tmp_path / "run/weights").mkdir()
    assert said(start=str(tmp_path / "run"))["generator: start"][0] == "ok"
    for key in ("file", "file_2"):
        assert "no such file or folder" in said(**{key: str(tmp_path / "gone.safetensors")})[f"generator: {key}"][1]
    fetched = fetch_command(_item(replaced=("transformer", "unet")), NEW)
    assert "--exclude 'transformer/*.safetensors'" in fetched


def test_rewards_and_tokenizers_want_their_own_files(cache: Path) -> None:
    given = ["reward.terms=[{name: imagereward, options: {path: acme/blip, tokenizer: acme/words}}]"]
    config = load_config(["experiment=demo", "arm=grpo", *given, "evaluation.rewards=[]"])
    items = [item for item in wanted(config, ROOT) if item.what != "generator"]
    assert [(item.what, item.repository) for item in items][:2] == [
        ("reward imagereward", "acme/blip"),
        ("reward imagereward: tokenizer", "acme/words"),
    ]
    network, words = items[:2]
    place = _cached(cache, "acme/blip", OLD, {"ImageReward.pt": ""})
    assert missing_files(network, place) == ["med_config.json"]
    (place / "med_config.json").touch()
    assert missing_files(network, place) == []
    assert "--include 'ImageReward.*'" in fetch_command(network, None)
    assert missing_files(words, _cached(cache, "acme/words", OLD, {"vocab.txt": ""})) == []


def test_texts_that_a_reward_is_asked_by_are_no_files_and_what_asks_elsewhere_is_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def config_of(*rewards: str) -> Config:
        return load_config(
            ["experiment=demo", "arm=grpo", "reward=redness", f"evaluation.rewards=[{', '.join(rewards)}]"]
        )

    judge = '{name: judge, options: {url: "http://h:1/v1", model: vlm, token_env: JUDGE_KEY}}'
    far = f"{{name: process, label: far, options: {{reward: 'a:b', environment: {sys.executable}}}}}"
    nowhere = "{name: process, options: {reward: 'a:b', environment: envs/none}}"
    config = config_of(judge, "{name: clipscore, options: {path: acme/clip}}", far)
    items = [item.what for item in wanted(config, tmp_path) if item.what != "generator"]
    assert items == ["reward clipscore"]
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    assert _said(asked_lines([config], tmp_path)) == {
        "reward judge": ("to do", "the environment has no JUDGE_KEY; put the token there"),
        "reward far (process)": ("ok", f"{sys.executable} starts it"),
    }
    monkeypatch.setenv("JUDGE_KEY", "sesame")
    assert _said(asked_lines([config], tmp_path))["reward judge"] == (
        "open",
        "http://h:1/v1 is asked when a stage starts",
    )
    with pytest.raises(RewardError, match=r"'envs/none': there is no .*; make it as docs/reward_process\.md says"):
        list(asked_lines([config_of(nowhere)], tmp_path))
    # Of two arms, both: one label may be of two environments.
    with pytest.raises(RewardError, match="'envs/none': there is no"):
        list(asked_lines([config_of(nowhere.replace("process,", "process, label: far,")), config], tmp_path))


class _Hub(BaseHTTPRequestHandler):
    """Of `acme/big` the branch main, of `acme/terms` nothing without a token."""

    def do_GET(self) -> None:
        status, told, headers = 404, {}, {"X-Error-Code": "RepoNotFound"}
        if "/acme/big/" in self.path:
            if self.path.split("?")[0].endswith(("/revision/main", f"/revision/{NEW}")):
                status, headers = 200, {}
                files = [
                    {"rfilename": "vae/x.safetensors", "size": 3 * 2**30},
                    {"rfilename": "x.safetensors", "size": 2**40},
                ]
                told = {"id": "acme/big", "sha": NEW, "gated": False, "siblings": files}
            else:
                headers = {"X-Error-Code": "RevisionNotFound"}
        if "/acme/terms/" in self.path:
            status, headers = 403, {"X-Error-Code": "GatedRepo"}
        body = json.dumps(told).encode()
        self.send_response(status)
        for name, value in (*headers.items(), ("Content-Length", str(len(body))), ("Content-Type", "application/json")):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *_arguments: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    yield
    server.shutdown()
    server.server_close()


@pytest.mark.usefixtures("cache", "hub")
def test_the_hub_tells_commit_size_and_access() -> None:
    said = _said(weight_lines([_item()], ROOT, True))
    assert f"hf download acme/big --revision {NEW}" in said["generator"][1]
    assert "(3.0 GiB)" in said["generator"][1]
    assert f"generator.revision={NEW}" in said["generator: revision"][1]
    found, lines = commits([_item(), _item(revision=OLD), _item(repository="acme/terms")], ROOT, "main", True)
    assert found == {("path", "acme/big"): NEW}
    assert [line.subject for line in lines] == ["generator: pinned"]
    for changes, told in (
        ({"repository": "acme/terms"}, "acme/terms is gated and this account may not read it: accept its terms"),
        ({"revision": OLD}, f"acme/big has no revision '{OLD}'"),
        ({"repository": "acme/none"}, "there is no such repository, or it is private"),
    ):
        lines = _said(weight_lines([_item(**changes)], ROOT, True))
        assert lines["generator"][0] == "to do"
        assert told in lines["generator"][1]


@pytest.mark.usefixtures("cache")
def test_a_hub_that_does_not_answer_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{unused.getsockname()[1]}")
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        lines = _said(weight_lines([_item()], ROOT, True))
    assert "the hub could not be asked" in lines["generator"][1]


FILE = f"""\
# A recipe.
generator:
  path: acme/big  # the base
  height: 64
reward:
  terms:
    - {{name: hpsv2, options: {{path: acme/taste, tokenizer: acme/words, tokenizer_revision: null}}}}
    - name: pickscore
      options:
        path: acme/big
        revision:
        dtype: bf16
perception:
  backbone: eyes
other: {{path: acme/big, revision: "{OLD}"}}
"""


def test_commits_are_written_beside_what_names_them(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(FILE)
    digits = "12345678901234567890123456789012345678e1"
    given = {("path", "acme/big"): digits, ("path", "acme/taste"): OLD, ("tokenizer", "acme/words"): NEW}
    assert pin(file, {**given, ("backbone", "eyes"): NEW}) == 5
    text = file.read_text()
    assert "path: acme/big  # the base\n" in text
    read, before = yaml.safe_load(text), yaml.safe_load(FILE)
    before["generator"]["revision"] = before["reward"]["terms"][1]["options"]["revision"] = digits
    before["reward"]["terms"][0]["options"] |= {"revision": OLD, "tokenizer_revision": NEW}
    before["perception"]["revision"] = NEW
    assert read == before
    with pytest.raises(ConfigError, match="names no repository that lacks a commit"):
        pin(file, given)
    assert file.read_text() == text


@pytest.mark.usefixtures("hub")
def test_the_command_pins_and_then_looks(
    tiny_overrides: list[str], cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_config([*tiny_overrides, "arm=grpo", "generator.path=acme/big"])
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    command = ["check", "--config", str(file), "--online", "--pin", str(file), "--results", str(tmp_path)]
    assert app(command, standalone_mode=False) == 1
    shown = capsys.readouterr().out
    assert f"1 commits written into {file}" in shown
    assert "generator: revision" not in shown
    assert yaml.safe_load(file.read_text())["generator"]["revision"] == NEW


SMI = "#!/bin/sh\nprintf '%s\\n' \"$VIPO_TEST_GPUS\"\n"


@pytest.fixture
def on_gpus(demo: Config) -> Config:
    generator = demo.generator.model_copy(update={"device": "cuda"})
    spread = demo.distribution.model_copy(update={"processes": 2})
    return demo.model_copy(update={"generator": generator, "distribution": spread})


@pytest.fixture(scope="module")
def demo() -> Config:
    return load_config(["experiment=demo", "arm=vipo"])


def test_gpus_and_their_driver(on_gpus: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    smi = tmp_path / "nvidia-smi"
    smi.write_text(SMI)
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr("vipo.check.machine._built_with", lambda: "13.2")
    monkeypatch.setenv("VIPO_TEST_GPUS", "580.95.05, 81559, NVIDIA H100\n580.95.05, 81559, NVIDIA H100\nno gpu, x, y")
    assert [gpu.memory for gpu in gpus()] == [81559 * 2**20] * 2
    said = _said(machine_lines(on_gpus, gpus()))
    assert {said[key][0] for key in ("GPUs", "driver")} == {"ok"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    said = _said(machine_lines(on_gpus, gpus()))
    assert said["GPUs"][0] == "to do"
    assert "2 wanted on each node" in said["GPUs"][1]
    assert "1 here" in said["GPUs"][1]
    monkeypatch.setenv("VIPO_TEST_GPUS", "550.54.15, 24564, NVIDIA L4\n550.54.15, 24564, NVIDIA L4")
    said = _said(machine_lines(on_gpus, gpus()))
    assert said["driver"][0] == "to do"
    assert "550.54.15 is older than 580.65.06" in said["driver"][1]
    monkeypatch.setattr("vipo.check.machine._built_with", lambda: None)
    assert "has no CUDA" in _said(machine_lines(on_gpus, gpus()))["driver"][1]
    smi.write_text("#!/bin/sh\nexit 9\n")
    assert gpus() == []


def test_processes_need_nccl_shared_memory_and_a_network(on_gpus: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vipo.check.machine.importlib.metadata.distributions", lambda: [])
    monkeypatch.setattr("vipo.check.machine._LEAST_SHARED", 2**70)
    monkeypatch.setattr("vipo.check.machine._built_with", lambda: "13.2")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "absent0")
    nodes = on_gpus.model_copy(update={"distribution": on_gpus.distribution.model_copy(update={"nodes": 2})})
    said = _said(machine_lines(nodes, []))
    assert {said[key][0] for key in ("NCCL", "network", "shared memory")} == {"to do"}
    assert "--shm-size" in said["shared memory"][1]
    assert said["driver"][0] == "open"
    here = SimpleNamespace(name="nvidia-nccl-cu13")
    monkeypatch.setattr("vipo.check.machine.importlib.metadata.distributions", lambda: [here])
    monkeypatch.setattr("vipo.check.machine.importlib.metadata.version", lambda _: "2.1")
    assert _said(machine_lines(on_gpus, []))["NCCL"] == ("ok", "nvidia-nccl-cu13 2.1")


def test_folders_and_disk(tmp_path: Path) -> None:
    said = _said(folder_lines({"a": tmp_path, "b": tmp_path / "x/y", "c": Path("/proc/vipo")}))
    assert [said[key][0] for key in "abc"] == ["ok", "ok", "to do"]
    assert disk_line(tmp_path / "x", 3, 1).verdict == "ok"
    assert disk_line(tmp_path, 2, 2**60).verdict == "to do"


def test_no_subject_ends_in_a_traceback_and_no_text_moves_the_terminal(demo: Config, tmp_path: Path) -> None:
    def fails() -> Iterator[Line]:
        yield ok("first", "fine")
        raise ZeroDivisionError("\x1b[2J\nerror: all is well")

    lines = list(found("second", fails))
    assert [line.verdict for line in lines] == ["ok", "to do"]
    assert (
        lines[1].text(8) == "to do  second    could not be checked (ZeroDivisionError: \\x1b[2J\\nerror: all is well)"
    )
    broken = demo.model_copy(update={"generator": demo.generator.model_copy(update={"path": "\0"})})
    assert any(line.verdict == "to do" for line in check_experiment({"vipo": broken}, ROOT, tmp_path, whole=False))
