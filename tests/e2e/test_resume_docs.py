"""docs/resume.md as it stands: its commands are run in miniature, and what it says decides a run and what does not."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from bad_rewards import standing
from nursery import Nurseries
from waits import eventually

from vipo.config.compose import load_config, repository_root
from vipo.config.training import TrainingConfig
from vipo.training.checkpoints import list_checkpoints

ROOT = repository_root()
PAGE = (ROOT / "docs/resume.md").read_text(encoding="utf-8")
FIRST, CHANGES, LONGER, BACK = (
    [shlex.split(line, comments=True) for line in block.strip().splitlines()]
    for block in re.findall(r"^```\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
)
CHOSEN = ["experiment=demo", "arm=vipo"]


def test_its_commands_do_what_it_says(
    prepared: Path, tiny_overrides: list[str], tmp_path: Path, forks: Nurseries
) -> None:
    shutil.copytree(prepared, tmp_path / "results")
    run, armed = tmp_path / "results/demo/runs/vipo-s0", tmp_path / "armed"
    armed.touch()
    # It stands still in the third update.
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent), "STAND": str(armed), "STAND_AT": "6"}
    smaller = [*tiny_overrides[1:], "training.save_at=[]", "reward.terms=[{name: 'bad_rewards:Stands'}]"]

    def small(command: list[str]) -> list[str]:
        vipo, stage, *overrides = command
        assert (vipo, stage, overrides[:2]) == ("vipo", "train", CHOSEN)
        return [str(Path(sys.executable).with_name(vipo)), stage, *CHOSEN, *smaller, *overrides[2:]]

    def said(command: list[str]) -> str:
        if command[0] != "vipo":
            # By a shell, for its patterns.
            return subprocess.check_output(["sh", "-c", " ".join(command)], cwd=tmp_path, text=True)
        status, _, told = forks.run(*small(command), cwd=tmp_path, env=environment)
        assert status == 0, told
        return told

    killed, again, other_rhythm, other_rate, seen = FIRST
    assert killed == again
    process = forks.start(*small(killed), cwd=tmp_path, env=environment)
    eventually("training stands still", standing(armed).exists, lambda: None if process.poll() is None else "it ended")
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert [path.name for path in list_checkpoints(run / "checkpoints")] == ["000002", "000001"]
    assert "resumed after update 2 of 4" in said(again)
    finished = {path: path.read_bytes() for path in run.rglob("*.safetensors")}
    assert "is finished, nothing is left to do" in said(other_rhythm)
    assert "made by another configuration or other inputs: set aside" in said(other_rate)
    assert said(seen).strip().endswith("/runs/vipo-s0")
    assert {path: path.read_bytes() for path in run.rglob("*.safetensors")} != finished
    *moved, last = BACK
    for command in moved:
        said(command)
    assert "is finished, nothing is left to do" in said(last)
    assert {path: path.read_bytes() for path in run.rglob("*.safetensors")} == finished


def test_what_it_says_decides_nothing_decides_nothing() -> None:
    plain = load_config(CHOSEN).training_identity()
    for _, _, *overrides in CHANGES:
        assert load_config(overrides).training_identity() == plain, overrides
    [(_, _, *longer)] = LONGER
    for overrides in (longer, [*CHOSEN, "training.updates=31"]):
        assert load_config(overrides).training_identity() != plain, overrides
    # And the page names every section of which this is true.
    whole = set(load_config(CHOSEN).model_dump()) - set(plain)
    named = {override.partition(".")[0].partition("=")[0] for _, _, *overrides in CHANGES for override in overrides}
    assert whole - named == {"protocol", "pretrain"}


def test_its_defaults_are_the_defaults() -> None:
    told = re.findall(r"`training\.(checkpoint_every|keep_checkpoints)`[^(;.]*\((\d+)[;)]", PAGE)
    fields = TrainingConfig.model_fields
    assert told == [(name, str(fields[name].default)) for name in ("checkpoint_every", "keep_checkpoints")]


def test_messages_that_it_explains_are_said() -> None:
    told = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "vipo").rglob("*.py"))
    table = PAGE.partition("## When it does not go on")[2]
    messages = re.findall(r"^\| `(.*?)`", table, re.MULTILINE)
    assert len(messages) == 5
    for message in messages:
        for part in re.split(r"\d+|: ", message):
            assert part.strip() in told, message
