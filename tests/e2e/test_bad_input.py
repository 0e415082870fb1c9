"""Bad input through the commands: a clear error, a status that is not 0, and nothing half-written taken for whole."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import threading
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
import pytest
from waits import SECONDS, eventually

from vipo.config.compose import dump_config, load_config, repository_root
from vipo.prompts.prompt import clean_text
from vipo.text import Formatter

if TYPE_CHECKING:
    from collections.abc import Iterator

    from command import Command

# Loaded as a plugin, its assertions explain themselves.
pytest_plugins = ["command"]

ROOT = repository_root()
HERE = Path(__file__).parent
RUN = "demo/runs/grpo-s0"


@pytest.fixture
def overrides(tiny_overrides: list[str]) -> list[str]:
    """Two updates of the arm that needs no backbone."""
    return [*tiny_overrides, "arm=grpo", "training.updates=2", "training.save_at=[]"]


@pytest.fixture
def results(prepared: Path, tmp_path: Path) -> Path:
    """A copy of `prepared` that a test may spoil."""
    return shutil.copytree(prepared, tmp_path / "results")


@pytest.fixture
def generator(tiny_generator: Path, tmp_path: Path) -> Path:
    """A copy of the tiny generator that a test may spoil."""
    return shutil.copytree(tiny_generator, tmp_path / "generator")


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def files(folder: Path) -> dict[str, bytes]:
    found = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith(".lock")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def assert_not_taken_for_whole(folder: Path) -> None:
    """No record of success, no remains of a write, no result where the next stage looks for it."""
    found = files(folder) if folder.is_dir() else {}
    assert not [name for name in found if name.endswith(("provenance.json", ".parquet")) or ".partial" in name]
    assert not (folder / "weights").exists()


# ---- prompts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("empty.txt", b"", ["empty.txt", "is empty", "write at least one prompt"]),
        ("blank.txt", b" \n\n \t\n", ["blank.txt", "is empty"]),
        ("noise.txt", bytes(range(256)) * 8, ["noise.txt", "binary", "UTF-8"]),
        ("latin.txt", "ein rotes Dreieck über Grün\n".encode("latin-1"), ["latin.txt", "line 1", "0xfc", "iconv"]),
        ("noise.parquet", b"PAR1" + bytes(100), ["noise.parquet", "not a Parquet file"]),
        ("cut.jsonl", b'{"prompt": "a"}\n{"prompt": "b', ["cut.jsonl", "line 2", "not JSON"]),
        ("other.jsonl", b'{"text": "a"}\n', ["other.jsonl", "prompts.text_key", "text"]),
        ("one.txt", b"a red circle\n", ["one.txt", "prompts.eval_share", "add prompts"]),
        ("prompts.xlsx", b"a red circle\n", ["prompts.xlsx", ".jsonl"]),
        ("absent.txt", None, ["absent.txt", "No such file", "existing file"]),
    ],
)
def test_prompt_files_that_cannot_be_used(
    vipo: Command, tmp_path: Path, name: str, content: bytes | None, told: list[str]
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    results = tmp_path / "results"
    vipo("prepare", "experiment=demo", f"prompts.source={tmp_path / name}", "--results", results).refuses(*told)
    assert not files(tmp_path / "results")


def test_a_failed_prepare_leaves_the_old_prompts_as_they_were(vipo: Command, tmp_path: Path) -> None:
    source, results = tmp_path / "prompts.txt", tmp_path / "results"
    source.write_text("".join(f"a circle, number {i}\n" for i in range(40)))
    command = ["prepare", "experiment=demo", f"prompts.source={source}", "--results", results]
    # The demo's held-out rewards read metadata that these prompts lack: known before anything is trained.
    vipo(*command).refuses("evaluation.rewards: reward 'scene_shape'", "scene metadata", "'a circle, number")
    assert not files(results)
    command.append("evaluation.rewards=[redness]")
    assert vipo(*command).code == 0
    before = files(results / "demo/prompts")
    source.write_bytes(b"\0\1\2")
    vipo(*command).refuses("prompts.txt", "binary")
    assert files(results / "demo/prompts") == before
    assert not list((results / "demo/.superseded").iterdir())


def test_a_prompt_of_100_kilobytes_is_dropped_and_counted(vipo: Command, tmp_path: Path) -> None:
    source, results = tmp_path / "prompts.txt", tmp_path / "results"
    good = [f"a circle, number {i}" for i in range(40)]
    source.write_text("\n".join([*good[:20], "x" * 100_000, *good[20:]]) + "\n")
    plain = [f"prompts.source={source}", "evaluation.rewards=[redness]"]
    assert vipo("prepare", "experiment=demo", *plain, "--results", results).code == 0
    manifest = json.loads((results / "demo/prompts/manifest.json").read_text())
    assert manifest["dropped"]["too_long"] == [21]
    assert manifest["counts"]["kept"] == 40
    kept = [
        json.loads(line)["text"]
        for half in ("train", "eval")
        for line in (results / f"demo/prompts/{half}.jsonl").read_text().splitlines()
    ]
    assert sorted(kept) == sorted(good)


HOSTILE = [
    '<script>alert("x")</script> & a circle',
    "it's a \"quoted\" `square` {{ seven * 7 }}",
    "two\nlines,\ttabs\r\nand\u00a0blanks",
    "a 🔴 beside a 👩‍🚀, é as e\u0301",
    "עיגול אדום \u200fעל רקע שחור",
    "دائرة حمراء \u202bعلى خلفية\u202c زرقاء",
    "../../../etc/passwd; rm -rf $(HOME) | %s %n {0}",
    "赤い丸\u3000と青い四角",
]  # fmt: skip


def test_hostile_prompts_go_all_the_way_undamaged(vipo: Command, overrides: list[str], tmp_path: Path) -> None:
    source, results = tmp_path / "prompts.jsonl", tmp_path / "results"
    source.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in HOSTILE), encoding="utf-8")
    arguments = [
        *overrides, f"prompts.source={source}", "prompts.eval_share=0.3", "reward.terms=[{name: redness}]",
        "evaluation.rewards=[redness]", "evaluation.prompts=8", "training.updates=1", "--results", results,
        "~experiment.arms.vipo", "~experiment.arms.product", "~experiment.arms.inverted",
        "experiment.arms.grpo.seeds=[0]",
    ]  # fmt: skip
    for command in (["prepare"], ["encode"], ["train"], ["evaluate"], ["evaluate", "arm=base"]):
        shown = vipo(command[0], *arguments, *command[1:])
        assert shown.code == 0, shown.err
    cleaned = {clean_text(text) for text in HOSTILE}
    halves = {
        half: [
            json.loads(line)["text"]
            for line in (results / f"demo/prompts/{half}.jsonl").read_text(encoding="utf-8").splitlines()
        ]
        for half in ("train", "eval")
    }
    assert set(halves["train"]) | set(halves["eval"]) == cleaned
    assert len(halves["train"]) >= 2
    assert halves["eval"]
    scores = pd.read_parquet(results / "demo/evaluation/grpo-s0/scores.parquet")
    assert set(scores["prompt"]) == set(halves["eval"])
    names = [path.name for path in (results / "demo/samples/grpo-s0/pictures").iterdir()]
    assert names
    assert all(set(name) <= set("0123456789abcdefu-.png") for name in names)
    shown = vipo("report", *arguments)
    assert shown.code == 0, shown.err
    page = (results / "demo/report/index.html").read_text(encoding="utf-8")
    assert "<script>alert" not in page
    assert not [path for path in tmp_path.rglob("*") if "passwd" in path.name]


# ---- the generator ---------------------------------------------------------------------------------


def test_missing_checkpoint_folder(vipo: Command, overrides: list[str], results: Path, tmp_path: Path) -> None:
    shutil.rmtree(results / "demo/embeddings")
    for stage in ("encode", "train"):
        shown = vipo(stage, *overrides, f"generator.path={tmp_path / 'absent'}", "--results", results)
        shown.refuses("generator.path", str(tmp_path / "absent"), "Give an existing folder")
    vipo("encode", *overrides, f"generator.path={ROOT / 'data'}", "--results", results).refuses(
        "model_index.json", "generator.path"
    )
    assert_not_taken_for_whole(results / "demo/embeddings")
    assert_not_taken_for_whole(results / RUN)


@pytest.mark.parametrize(
    "part", ["text_encoder/model.safetensors", "text_encoder_2/model.safetensors", "tokenizer/tokenizer.json"]
)
def test_truncated_text_encoder(vipo: Command, overrides: list[str], results: Path, generator: Path, part: str) -> None:
    before = files(results / "demo/embeddings")
    halve(generator / part)
    shown = vipo("encode", *overrides, f"generator.path={generator}", "--results", results)
    shown.refuses(str((generator / part).parent), "cannot be loaded", "copy or download generator.path again")
    # What was there is of the encoders that made it, and says so.
    assert files(results / "demo/embeddings") == before


@pytest.mark.parametrize("part", ["tokenizer", "tokenizer_2"])
def test_a_tokenizer_without_its_vocabulary_is_no_tokenizer(
    vipo: Command, overrides: list[str], results: Path, generator: Path, part: str
) -> None:
    """The library builds an empty one, and every prompt becomes the same row of unknown tokens."""
    before = files(results / "demo/embeddings")
    (generator / part / "tokenizer.json").unlink()
    shown = vipo("encode", *overrides, f"generator.path={generator}", "--results", results)
    shown.refuses(str(generator / part), "no vocabulary", "generator.path")
    # What was there is of the encoders that made it, and says so.
    assert files(results / "demo/embeddings") == before


@pytest.mark.parametrize(
    "part", ["transformer/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors"]
)
def test_truncated_network(vipo: Command, overrides: list[str], generator: Path, tmp_path: Path, part: str) -> None:
    path = f"generator.path={generator}"
    results = tmp_path / "results"
    assert vipo("prepare", *overrides, path, "--results", results).code == 0
    assert vipo("encode", *overrides, path, "--results", results).code == 0
    halve(generator / part)
    shown = vipo("train", *overrides, path, "--results", results)
    shown.refuses(str(generator / part), "cannot be loaded", "copy or download generator.path again")
    assert_not_taken_for_whole(results / RUN)


def test_absent_device(vipo: Command, overrides: list[str], results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    for stage in ("train", "encode"):
        vipo(stage, *overrides, "generator.device=cuda", "--results", results).refuses(
            "generator.device 'cuda'", "generator.device=cpu"
        )
    assert_not_taken_for_whole(results / RUN)


def test_what_the_network_does_not_take(vipo: Command, overrides: list[str], results: Path) -> None:
    for change, told in (
        ("generator.height=60", ["generator.height 60", "multiple of 8"]),
        ("training.lora={rank: 2, alpha: 2.0, targets: [nope]}", ["training.lora.targets ['nope']"]),
        ("training.prompts_per_update=2000", ["training.prompts_per_update 2000", "168 training prompts", "lower it"]),
    ):
        vipo("train", *overrides, change, "--results", results).refuses(*told)
    assert_not_taken_for_whole(results / RUN)


# ---- rewards and backbones -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("rednes", ["reward.terms.0.name", "'rednes'", "did you mean 'redness'"]),
        ("bad_rewards:absent", ["'bad_rewards:absent'", "no attribute 'absent'"]),
        ("no_such_module:reward", ["'no_such_module:reward'", "No module named"]),
        ("bad_rewards:Unloadable", ["'bad_rewards:Unloadable'", "judge.safetensors"]),
        ("bad_rewards:raises", ["'bad_rewards:raises'", "RuntimeError: the judge is asleep"]),
        ("bad_rewards:exits", ["reward 'bad_rewards:exits' raised SystemExit: 0"]),
        ("bad_rewards:ExitsAtLoad", ["reward 'bad_rewards:ExitsAtLoad' raised SystemExit: 0"]),
        ("bad_rewards:raises_on_batches", ["'bad_rewards:raises_on_batches'", "the judge is asleep"]),
        ("bad_rewards:wrong_shape", ["'bad_rewards:wrong_shape'", "expected shape (1,)", "(1, 3)"]),
        ("bad_rewards:no_tensor", ["'bad_rewards:no_tensor'", "expected a tensor", "list"]),
        ("bad_rewards:nan_always", ["update 1", "no sample has a finite reward", "bad_rewards:nan_always"]),
        ("scene", ["scene metadata", "'objects'"]),
    ],
)
def test_rewards_that_cannot_be_used(
    vipo: Command, overrides: list[str], results: Path, tmp_path: Path, name: str, told: list[str]
) -> None:
    if name == "scene":
        # Prompts without metadata, of which prompts and embeddings are made anew.
        plain = tmp_path / "plain.txt"
        plain.write_text("".join(f"a picture of {number} red circles\n" for number in range(60)))
        overrides = [*overrides, f"prompts.source={plain}"]
        for folder in ("prompts", "embeddings"):
            shutil.rmtree(results / "demo" / folder)
    vipo(
        "train",
        *overrides,
        f'reward.terms=[{{name: "{name}"}}]',
        f'evaluation.rewards=["{name}"]',
        "--results",
        results,
    ).refuses(*told)
    assert_not_taken_for_whole(results / RUN)
    metrics = results / RUN / "metrics.jsonl"
    assert not metrics.is_file() or metrics.read_bytes() == b""


def test_a_reward_that_meddles_changes_nothing_else(vipo: Command, overrides: list[str], results: Path) -> None:
    """The other reward's values, the maps, the weights: as beside a reward of the same values that behaves."""
    written = []
    for name in ("quiet", "meddles"):
        terms = f'reward.terms=[{{name: "bad_rewards:{name}", weight: 0.5}}, {{name: redness}}]'
        rewards = f'evaluation.rewards=[redness, "bad_rewards:{name}"]'
        own = results.parent / name
        shutil.copytree(results, own)
        arguments = [*overrides, "arm=vipo", "training.updates=1", terms, rewards, "--results", own]
        shown = vipo("train", *arguments)
        assert shown.code == 0, shown.err
        run = own / "demo/runs/vipo-s0"
        kept = [*sorted((run / "weights").rglob("*.safetensors")), run / "metrics.jsonl"]
        written.append([path.read_bytes().replace(name.encode(), b"") for path in kept])
    assert written[0] == written[1]


@pytest.mark.parametrize(
    "key",
    [
        *("prompts.source", "prompts.eval.source", "generator.family", "perception.backbone", "reward", "evaluation"),
        *("credit", "objective", "objective.gate.name", "tracker"),
    ],
)
@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("no_such_module:thing", ["No module named 'no_such_module'", "looked in", "PYTHONPATH"]),
        ("bad_exit:thing", ["raised SystemExit: 0"]),
    ],
)
def test_import_paths_are_tried_with_the_configuration(
    vipo: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, path: str, told: list[str]
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    change = {
        "reward": [f'reward.terms=[{{name: redness}}, {{name: "{path}"}}]', f'evaluation.rewards=[redness, "{path}"]'],
        "evaluation": [f'evaluation.rewards=[object_redness, "{path}"]'],
        "credit": ["arm=vipo", f'credit.sources=[{{name: "{path}"}}]'],
        "objective": [f'objective={{name: "{path}"}}'],
        "tracker": [f'tracking.trackers=[tensorboard, "{path}"]'],
    }.get(key, [f'{key}="{path}"'])
    for command in (["config"], ["prepare", "--results", tmp_path / "results"]):
        vipo(command[0], "experiment=demo", *change, *command[1:]).refuses(path, *told)
    assert not (tmp_path / "results/demo").exists()
    assert "BAD_EXIT" not in os.environ


def test_the_import_paths_of_every_arm_are_tried_before_prompts_are_prepared(vipo: Command, tmp_path: Path) -> None:
    base, other = load_config(["experiment=demo", "arm=base"]), load_config(["experiment=demo", "arm=vipo"])
    broken = other.perception.model_copy(update={"backbone": "no_such_module:thing"})
    for config in (base, other.model_copy(update={"perception": broken})):
        (tmp_path / f"{config.run_name}.yaml").write_text(dump_config(config))
    results = tmp_path / "results"
    vipo("prepare", "--config", tmp_path / "base-s0.yaml", "--results", results).refuses("no_such_module", "looked in")
    assert not (results / "demo").exists()


def test_what_others_say_is_one_line_that_forges_nothing(vipo: Command, tmp_path: Path) -> None:
    results = tmp_path / "results"
    arguments = ["prepare", "experiment=demo", 'prompts.source="bad_sources:forges"', "--results", results]
    shown = vipo(*arguments)
    shown.refuses("prompts.source bad_sources:forges raised RuntimeError: gone\\nerror: forged\\n\\x1b[2Jverdict")
    assert "\x1b" not in shown.err
    [log] = (results / ".logs").iterdir()
    assert "in forges" in log.read_text()
    assert "\x1b" not in log.read_text()
    vipo("config", "experiment=demo", "\x1b[31mkey\nerror: x=1").refuses("\\x1b[31mkey")
    vipo("prepare", "experiment=demo", 'prompts.source="bad_sources:exits"', "--results", results).refuses(
        "prompts.source bad_sources:exits raised SystemExit: 0"
    )


def test_warnings_are_records_of_the_log(
    vipo: Command, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("vipo.stages.prepare_stage", lambda *_: warnings.warn("gone\nerror: \x1b[2J", stacklevel=1))
    assert vipo("prepare", "experiment=demo").code == 0
    [record] = [record for record in caplog.records if record.name == "py.warnings"]
    shown = Formatter("%(levelname)s %(message)s").format(record).splitlines()
    assert shown[1] == "  error: \\x1b[2J"
    assert all(line.startswith("  ") for line in shown[1:])


@pytest.mark.parametrize(
    ("raised", "code", "told"),
    [
        (SystemExit(0), 1, "error: internal: SystemExit: 0 ("),
        (KeyError("a\nerror: b"), 1, "error: internal: KeyError: 'a\\nerror: b' ("),
        (GeneratorExit(), 1, "error: internal: GeneratorExit"),
        (KeyboardInterrupt(), 130, "error: interrupted; start the same command again"),
        (OSError("disk on fire"), 1, "error: disk on fire; check that"),
    ],
)
def test_every_end_that_is_no_success_is_a_status_and_a_message(
    vipo: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raised: BaseException, code: int, told: str
) -> None:
    def ends(*_: object) -> None:
        raise raised

    monkeypatch.setattr("vipo.stages.prepare_stage", ends)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    # Where the results cannot hold the traceback, the folder for temporary files does.
    (tmp_path / "results").write_text("no folder")
    shown = vipo("prepare", "experiment=demo", "--results", tmp_path / "results")
    assert shown.code == code
    assert shown.err.splitlines()[-1].startswith(told)
    logs = list(tmp_path.rglob("*.log"))
    assert len(logs) == ("internal" in told)
    assert all(str(log) in shown.err and "Traceback" in log.read_text() for log in logs)


def test_nan_for_some_samples_leaves_them_out(
    vipo: Command, overrides: list[str], results: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        shown = vipo(
            "train",
            *overrides,
            'reward.terms=[{name: "bad_rewards:nan_sometimes"}]',
            'evaluation.rewards=["bad_rewards:nan_sometimes"]',
            "--results",
            results,
        )
    assert shown.code == 0, shown.err
    rows = [json.loads(line) for line in (results / RUN / "metrics.jsonl").read_text().splitlines()]
    # Two micro-batches an update, two bad samples in each.
    assert [row["samples/invalid"] for row in rows] == [4, 4]
    assert all(row["grad/norm"] > 0 for row in rows)
    assert caplog.text.count("left out, its reward is not finite") == 8


@pytest.mark.parametrize(
    ("backbone", "told"),
    [
        ("bad_backbones:narrow", ["perception.components: 3", "feature width 2", "lower it"]),
        ("bad_backbones:coarse", ["perception.components: 3", "1x1 grid", "perception.input_size"]),
        ("bad_backbones:no_backbone", ["perception.backbone", "Conv2d", "vipo.perception.Backbone"]),
        ("bad_backbones:exits", ["perception.backbone: 'bad_backbones:exits' raised SystemExit: 0"]),
        ("bad_backbones:absent", ["perception.backbone", "cannot be imported"]),
        ("efficientnet_lite", ["perception.backbone", "is not a timm model", "efficientnet_lite0"]),
    ],
)
def test_backbones_that_do_not_fit_stop_before_the_first_update(
    vipo: Command, overrides: list[str], results: Path, backbone: str, told: list[str]
) -> None:
    vipo("train", *overrides, "arm=vipo", f'perception.backbone="{backbone}"', "--results", results).refuses(*told)
    assert not (results / "demo/runs").exists() or not files(results / "demo/runs")


# ---- stages in the wrong order or on other data ----------------------------------------------------


def test_the_base_arm_is_not_trained(vipo: Command, overrides: list[str], results: Path) -> None:
    vipo("train", *overrides, "arm=base", "--results", results).refuses("arm 'base'", "nothing to train")
    assert not (results / "demo/runs").exists()


def test_stages_name_the_one_before(vipo: Command, overrides: list[str], results: Path, tmp_path: Path) -> None:
    vipo("encode", *overrides, "--results", tmp_path / "none").refuses(
        "train.jsonl", "run the stage that writes it first"
    )
    vipo("evaluate", *overrides, "--results", tmp_path / "none").refuses("prompts/manifest.json", "vipo prepare")
    vipo("report", *overrides, "--results", tmp_path / "none").refuses("demo/", "run the stage that writes it first")
    vipo("evaluate", *overrides, "--results", results).refuses("grpo-s0", "no finished run", "train stage")
    # As a killed prepare or encode leaves it: one half of it is another one's.
    train, eval_ = (results / f"demo/embeddings/{half}.safetensors" for half in ("train", "eval"))
    eval_.write_bytes(train.read_bytes())
    vipo("evaluate", *overrides, "--results", results).refuses(str(eval_), "of other prompts", "'encode' again")
    eval_.unlink()
    vipo("evaluate", *overrides, "--results", results).refuses(str(eval_), "cannot be read", "encode stage again")
    prompts = results / "demo/prompts/eval.jsonl"
    prompts.write_text("")
    vipo("evaluate", *overrides, "--results", results).refuses(str(prompts), "manifest.json", "vipo prepare")
    assert not files(tmp_path / "none")


def test_results_without_records_are_used(vipo: Command, overrides: list[str], results: Path, tmp_path: Path) -> None:
    """As they come from a pull, which brings neither records nor checkpoints."""
    kept, pulled = [*overrides, "training.save_at=[1]"], tmp_path / "pulled"
    assert vipo("train", *kept, "--results", results).code == 0
    shutil.copytree(results, pulled, ignore=shutil.ignore_patterns("provenance.json", "checkpoints", "tb"))
    scores = [folder / "demo/evaluation/grpo-s0/scores.parquet" for folder in (results, pulled)]
    for folder in (results, pulled):
        assert vipo("evaluate", *kept, "--results", folder).code == 0
    assert scores[0].read_bytes() == scores[1].read_bytes()
    shutil.rmtree(pulled / RUN / "updates/000001")
    vipo("evaluate", *kept, "--results", pulled).refuses("updates/000001", "missing", "train grpo-s0 again")
    # A fresh run of another configuration starts without what the pulled one kept.
    assert vipo("train", *overrides, "optimizer.learning_rate=1e-4", "--results", pulled).code == 0
    assert not list((pulled / RUN / "updates").iterdir())
    vipo("evaluate", *kept, "--results", pulled).refuses("grpo-s0", "another configuration")


def test_prompts_and_embeddings_of_another_configuration(
    vipo: Command, overrides: list[str], results: Path, generator: Path
) -> None:
    before = files(results)
    for stage in ("train", "evaluate"):
        vipo(stage, *overrides, "prompts.eval_share=0.5", "--results", results).refuses(
            "demo/prompts", "another configuration", "eval_share=0.5", "'prepare'"
        )
        vipo(stage, *overrides, f"generator.path={generator}", "--results", results).refuses(
            "demo/embeddings", "another configuration", str(generator), "'encode'"
        )
    assert files(results) == before


def test_truncated_embeddings(vipo: Command, overrides: list[str], results: Path) -> None:
    path = results / "demo/embeddings/train.safetensors"
    halve(path)
    vipo("train", *overrides, "--results", results).refuses(str(path), "encode stage again")
    assert_not_taken_for_whole(results / RUN)


def test_evaluation_refuses_what_is_not_the_trained_run(vipo: Command, overrides: list[str], results: Path) -> None:
    assert vipo("train", *overrides, "--results", results).code == 0
    evaluation = results / "demo/evaluation/grpo-s0"
    for arguments, told in (
        (["optimizer.learning_rate=0.5"], ["grpo-s0", "another configuration", "train it again"]),
        (["seed=1"], ["grpo-s1", "no finished run"]),
        (
            ['evaluation.rewards=[object_redness, "bad_rewards:nan_always"]'],
            ["bad_rewards:nan_always", "not finite", "evaluation.rewards"],
        ),
        (['evaluation.rewards=[object_redness, "bad_rewards:raises"]'], ["bad_rewards:raises", "the judge is asleep"]),
    ):
        vipo("evaluate", *overrides, *arguments, "--results", results).refuses(*told)
        assert_not_taken_for_whole(evaluation)
    weights = results / RUN / "weights/transformer/diffusion_pytorch_model.safetensors"
    content = weights.read_bytes()
    for changed in (content[:-1] + bytes([content[-1] ^ 1]), content[:-100]):
        weights.write_bytes(changed)
        vipo("evaluate", *overrides, "--results", results).refuses(weights.name, "changed", "train it again")
        assert_not_taken_for_whole(evaluation)
    assert vipo("train", *overrides, "--results", results).code == 0
    assert weights.read_bytes() == content
    assert vipo("evaluate", *overrides, "--results", results).code == 0
    # A failed second evaluation leaves the first as it was.
    before = files(evaluation)
    vipo(
        "evaluate", *overrides, 'evaluation.rewards=[object_redness, "bad_rewards:nan_always"]', "--results", results
    ).refuses()
    assert files(evaluation) == before


@contextmanager
def held(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process holds the folder's lock until a line is written to it."""
    script = (
        "import sys, pathlib; from vipo.provenance.locks import run_lock\n"
        "with run_lock(pathlib.Path(sys.argv[1])): print('held', flush=True); sys.stdin.readline()"
    )
    command = [sys.executable, "-c", script, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        yield holder


def test_a_locked_run_is_left_alone(vipo: Command, overrides: list[str], results: Path) -> None:
    assert vipo("train", *overrides, "--results", results).code == 0
    # With its record, it would be told as finished, which needs no lock.
    (results / RUN / "provenance.json").unlink()
    before = files(results / RUN)
    with held(results / RUN) as holder:
        vipo("train", *overrides, "--results", results).refuses(RUN, f"process {holder.pid}", "wait for it or stop it")
        assert files(results / RUN) == before
    assert vipo("train", *overrides, "--results", results).code == 0


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--share", "1/2"], ["--share 1/2", "--only sample or --only score"]),
        (["--only", "sample", "--weights", "weights"], ["--weights weights", "leave out --only"]),
    ],
)
def test_one_stage_of_an_evaluation_takes_what_is_its_own(vipo: Command, arguments: list[str], told: list[str]) -> None:
    vipo("evaluate", "experiment=demo", *arguments).refuses(*told)


@pytest.mark.parametrize(
    ("stage", "folder"),
    [
        ("prepare", "prompts"),
        ("encode", "embeddings"),
        ("evaluate --only sample", "samples/base-s0"),
        ("summarize", "report"),
        ("report", "report"),
        ("crate", "crate"),
    ],
)
def test_every_stage_leaves_a_locked_folder_alone(
    vipo: Command, overrides: list[str], results: Path, stage: str, folder: str
) -> None:
    (results / "demo" / folder).mkdir(parents=True, exist_ok=True)
    if stage == "report":
        # Numbers that are there are not made first.
        (results / "demo/report/data").mkdir()
        (results / "demo/report/data/report.json").write_text("{}")
    before = files(results)
    arguments = [*stage.split(), *overrides, "arm=base", "--results", results]
    with held(results / "demo" / folder):
        vipo(*arguments).refuses(f"demo/{folder}", "another process writes it")
        vipo(*arguments, "--wait", "0.2").refuses(f"demo/{folder}", "another process writes it")
    assert files(results) == before


def test_a_stage_waits_and_then_ends_with_the_same_bytes(
    vipo: Command,
    overrides: list[str],
    results: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert vipo("train", *overrides, "--results", results).code == 0
    # With its record, it would be told as finished, which needs no lock.
    (results / RUN / "provenance.json").unlink()
    before = files(results / RUN)
    monkeypatch.setenv("VIPO_WAIT", str(SECONDS))
    with held(results / RUN) as holder, caplog.at_level(logging.INFO, logger="vipo"):

        def let_go() -> None:
            eventually("the stage waits", lambda: "waiting for it" in caplog.text)
            assert holder.stdin is not None
            holder.stdin.write("\n")
            holder.stdin.flush()

        threading.Thread(target=let_go, daemon=True).start()
        assert vipo("train", *overrides, "--results", results).code == 0
        assert holder.wait(SECONDS) == 0
    after = files(results / RUN)
    same = [name for name in before if name.startswith(("weights/", "updates/")) or name == "metrics.jsonl"]
    assert len(same) >= 2
    assert {name: after[name] for name in same} == {name: before[name] for name in same}


# ---- the same through the installed command --------------------------------------------------------


def test_installed_command_with_a_reward_that_raises(overrides: list[str], results: Path) -> None:
    arguments = [*overrides, 'reward.terms=[{name: "bad_rewards:raises_on_batches"}]']
    arguments += ['evaluation.rewards=["bad_rewards:raises_on_batches"]', "--results", str(results)]
    finished = subprocess.run(
        [Path(sys.executable).with_name("vipo"), "train", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={"PATH": "", "HOME": str(results), "PYTHONPATH": str(HERE), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    assert finished.returncode == 1
    assert finished.stdout == ""
    assert "Traceback" not in finished.stderr
    assert finished.stderr.splitlines()[-1] == (
        "error: reward 'bad_rewards:raises_on_batches' raised RuntimeError: the judge is asleep"
    )
    assert_not_taken_for_whole(results / RUN)
