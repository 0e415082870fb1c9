"""Samples and scores as stages: the base once, shares of any number, gone on with in the middle, flat memory."""

import gc
import itertools
import json
import math
import re
import shutil
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from nursery import Nurseries
from safetensors.torch import save_file
from torch import Tensor

from vipo.config.compose import load_config, repository_root
from vipo.config.meter import MeterConfig
from vipo.config.run import Config
from vipo.config.validation import ConfigError
from vipo.evaluation import measures, sample, score
from vipo.evaluation.compare import TABLES, compare_runs, write_tables
from vipo.evaluation.held_out import EvaluationError
from vipo.evaluation.shares import Share, ShareError
from vipo.generators.lora import LORA_FILE
from vipo.prompts import read_prompts
from vipo.provenance.parts import load_tensors, save_tensors
from vipo.stages import compare_stage, credit_stage, evaluate_stage, evaluation, sample_stage, score_stage, train_stage

ROOT = repository_root()
VIPO = Path(sys.executable).with_name("vipo")
BATCH, PROMPTS, PER_PROMPT = 3, 4, 2
BATCHES = -(-PROMPTS * PER_PROMPT // BATCH)
SETTINGS = (
    *(f"evaluation.{key}={value}" for key, value in (("prompts", PROMPTS), ("samples_per_prompt", PER_PROMPT))),
    *(f"evaluation.{key}={value}" for key, value in (("batch", BATCH), ("steps", 2), ("rewards", "[redness]"))),
    "sampling.steps=4",
    *(f"training.{key}={value}" for key, value in (("updates", 2), ("save_at", [1]), ("prompts_per_update", 2))),
    *(f"training.{key}={value}" for key, value in (("group_size", 2), ("micro_batch", 2), ("trained_transitions", 2))),
)


@pytest.fixture(scope="module")
def trained(prepared: Path, tiny_generator: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """Results with one trained run that kept two sets of weights, and the overrides that made it."""
    results = tmp_path_factory.mktemp("stages") / "results"
    shutil.copytree(prepared, results)
    overrides = ["experiment=demo", f"generator.path={tiny_generator}", *SETTINGS]
    train_stage(load_config([*overrides, "arm=vipo"]), ROOT, results)
    return results, overrides


def _files(results: Path) -> dict[str, bytes]:
    found = (path for name in ("samples", "evaluation") for path in sorted((results / "demo" / name).rglob("*")))
    return {
        path.relative_to(results).as_posix(): path.read_bytes()
        for path in found
        if path.is_file() and not path.name.startswith((".lock", "provenance"))
    }


def _counted(monkeypatch: pytest.MonkeyPatch, fail_at: int | None = None) -> list[int]:
    """Sizes of the batches that the network draws from now on; the one numbered `fail_at` is not drawn."""
    calls: list[int] = []
    original = sample.draw

    def draw(*arguments: Any) -> Tensor:
        if len(calls) == fail_at:
            raise KeyboardInterrupt
        images = original(*arguments)
        calls.append(len(images))
        return images

    monkeypatch.setattr(sample, "draw", draw)
    return calls


def test_killed_shared_and_undisturbed_give_the_same_bytes_and_the_base_is_drawn_once(
    trained: tuple[Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    results, overrides = trained
    config = load_config([*overrides, "arm=vipo"])
    whole = shutil.copytree(results, tmp_path / "whole")
    with monkeypatch.context() as patched:
        calls = _counted(patched)
        evaluate_stage(config, ROOT, whole)
        # Two sets of weights and the base.
        assert len(calls) == 3 * BATCHES
        evaluate_stage(config.as_base(), ROOT, whole)
        evaluate_stage(config, ROOT, whole)
        assert len(calls) == 3 * BATCHES
    wanted = _files(whole)
    pictures = [name for name in wanted if name.endswith(".png")]
    assert len(pictures) == 3 * PROMPTS * PER_PROMPT
    assert not [name for name in wanted if "partial" in name]

    _check_other_weights_and_tables(config, whole)

    other = shutil.copytree(results, tmp_path / "other")
    with monkeypatch.context() as patched:
        drawn = _counted(patched, fail_at=2)
        with pytest.raises(KeyboardInterrupt):
            sample_stage(config, ROOT, other)
    assert len(drawn) == 2
    assert not (other / "demo/samples/vipo-s0/samples.json").exists()
    with monkeypatch.context() as patched:
        drawn = _counted(patched)
        for number in (3, 1, 2):
            sample_stage(config, ROOT, other, share=f"{number}/3")
        # Together what was missing, and what is put together draws nothing.
        assert len(drawn) == 2 * BATCHES - 2
        # A part that a disk cut off is drawn again, its batch alone; so is one of which a bit changed in its middle.
        damaged = [_cut_off(other / "demo/samples", "*.png"), _changed(other / "demo/samples", "*.png")]
        # What tells of the samples, too.
        damaged.append(_changed(other / "demo/samples", "samples.json"))
        sample_stage(config, ROOT, other)
        assert len(drawn) == 2 * BATCHES
        sample_stage(config.as_base(), ROOT, other)
    with monkeypatch.context() as patched:
        _failing_score(patched, after=3)
        with pytest.raises(KeyboardInterrupt):
            score_stage(config, ROOT, other)
    for number in range(4, 0, -1):
        score_stage(config, ROOT, other, share=f"{number}/4")
    damaged.append(_cut_off(other / "demo/evaluation", "reward*.safetensors"))
    damaged.append(_changed(other / "demo/evaluation", "change-1-*.safetensors"))
    # Whole files that hold something else, or what no measure gives.
    for measure in ("change", "maps", "reward0"):
        path = max((other / "demo/evaluation").glob(f".vipo-s0.*.partial/parts/{measure}-*.safetensors"))
        values = load_tensors(path)
        wrong = (
            {"x": torch.zeros(1)}
            if measure == "change"
            else {k: torch.full_like(v, math.inf) for k, v in values.items()}
        )
        save_tensors(wrong, path)
        damaged.append(path)
    score_stage(config, ROOT, other)
    told = [message for message in caplog.messages if "is damaged" in message]
    assert sorted(message.split(": is damaged")[0] for message in told) == sorted(map(str, damaged))
    score_stage(config.as_base(), ROOT, other)
    assert _files(other) == wanted


def _cut_off(folder: Path, pattern: str) -> Path:
    path = min(folder.glob(f".vipo-s0.*.partial/parts/{pattern}"))
    path.write_bytes(path.read_bytes()[:-5])
    return path


def _changed(folder: Path, pattern: str) -> Path:
    """The last of the parts, with one bit of its content changed that leaves a file that can be read."""
    path = max(folder.glob(f".vipo-s0.*.partial/parts/{pattern}"))
    content = bytearray(path.read_bytes())
    if path.suffix == ".json":
        place = content.index(b"8")
        content[place] ^= 1
    else:
        content[-20] ^= 1
    path.write_bytes(content)
    return path


def _check_other_weights_and_tables(config: Config, results: Path) -> None:
    """A kept update, named by its folder, has the scores that it has in its run; and the tables are written."""
    experiment = results / "demo"
    evaluate_stage(config, ROOT, results, weights=experiment / "runs/vipo-s0/updates/000001")
    (place,) = experiment.glob("evaluation/vipo_s0_u1_*-s0")
    found = pd.read_parquet(place / "scores.parquet")
    within = pd.read_parquet(experiment / "evaluation/vipo-s0/scores.parquet")
    within = within[within["update"] == 1].reset_index(drop=True)
    columns = [name for name in within.columns if "/" in name]
    assert columns
    assert found[columns].equals(within[columns])
    # A run of its own beside the others.
    beside = compare_runs(config, experiment, ["base-s0", "vipo-s0", place.name])["metrics"]
    assert beside["arm"].unique().tolist() == ["vipo", place.name.removesuffix("-s0")]
    tables = compare_runs(config, experiment, ["base-s0", "vipo-s0"])
    assert list(tables) == list(TABLES)
    paths = write_tables(tables, experiment / "comparison")
    assert [path.read_text().count("\n") for path in paths[1:]] == [1 + len(config.evaluation.rewards)] * 2 + [5, 3]


def test_a_sample_without_a_score_ends_no_evaluation(
    trained: tuple[Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    results = shutil.copytree(trained[0], tmp_path / "results")
    config, experiment = load_config([*trained[1], "arm=vipo"]), results / "demo"
    prompt = next(iter(read_prompts(experiment / "prompts/eval.jsonl")))
    original, lacking = measures.score, {prompt.text}

    def score_some(name: str, reward: Any, images: Tensor, prompts: Any, metadata: Any) -> Tensor:
        lacks = torch.tensor([name == "redness" and text in lacking for text in prompts])
        # Whatever is not finite is no score.
        return original(name, reward, images, prompts, metadata).masked_fill(lacks, math.inf)

    evaluate_stage(config.as_base(), ROOT, results)
    monkeypatch.setattr(measures, "score", score_some)
    evaluate_stage(config, ROOT, results)
    scores = pd.read_parquet(experiment / "evaluation/vipo-s0/scores.parquet")
    assert (scores["reward/redness"].isna() == (scores["prompt_id"] == prompt.id)).all()
    told = json.loads((experiment / "evaluation/vipo-s0/summary.json").read_text())
    assert told["left_out"] == {"reward/redness": PER_PROMPT}
    assert told["reward/redness"] == pytest.approx(scores[scores["final"]]["reward/redness"].mean())
    note = f"{PER_PROMPT} of {PROMPTS * PER_PROMPT} samples have no score and are left out"
    assert f"vipo-s0: reward/redness: {note}" in caplog.messages
    tables = compare_runs(config, experiment, ["base-s0", "vipo-s0"])
    for name in ("win_rates", "metrics"):
        own = tables[name].set_index("column")["note"].str.contains(note)
        assert own.to_dict() == {"reward/redness": True, "reward/object_redness": False}
    assert tables["win_rates"].set_index("column").loc["reward/redness", "samples"] == (PROMPTS - 1) * PER_PROMPT
    # A reward that scores nothing at all is refused, and measured again once it is mended.
    other = config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"batch": 2})})
    lacking |= set(scores["prompt"])
    for _ in range(2):
        with pytest.raises(EvaluationError, match=r"'redness' is not finite for any of the 16 .*evaluation\.rewards"):
            evaluate_stage(other, ROOT, results)
    lacking.clear()
    evaluate_stage(other, ROOT, results)
    assert pd.read_parquet(experiment / "evaluation/vipo-s0/scores.parquet")["reward/redness"].notna().all()


def test_other_weights_take_no_run_s_place_and_no_other_s_of_their_name(tmp_path: Path) -> None:
    config, names = load_config(["experiment=demo", "arm=vipo"]), []
    for number, place in enumerate(("a/vipo", "b/vipo", "c/base", "d")):
        (tmp_path / place).mkdir(parents=True)
        save_file({"x": torch.full((1,), float(number % 3))}, tmp_path / place / LORA_FILE)
        names.append(evaluation._of_weights(config, tmp_path / place).run_name)
    assert all(
        re.fullmatch(rf"{name}_[0-9a-f]{{8}}-s0", own)
        for name, own in zip(["vipo", "vipo", "base", "d"], names, strict=True)
    )
    assert len(set(names)) == 4
    # The same bytes in a folder of the same name are the same weights.
    assert evaluation._of_weights(config, shutil.copytree(tmp_path / "a", tmp_path / "e") / "vipo").run_name == names[0]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="holds no safetensors"):
        evaluation._of_weights(config, tmp_path / "empty")
    # A LoRA under other names is read by the stock pipeline alone.
    (tmp_path / "d" / LORA_FILE).rename(tmp_path / "d" / "adapter.safetensors")
    told = rf"--weights .*d: holds neither {LORA_FILE} nor transformer/, .* arm=base generator\.start=FILE"
    with pytest.raises(ConfigError, match=told):
        evaluation._of_weights(config, tmp_path / "d")
    with pytest.raises(ConfigError, match=told):
        credit_stage({"vipo": config}, MeterConfig(), ROOT, tmp_path, weights=tmp_path / "d")
    for name in ("vipo_00000000-s0", "../runs/vipo-s0"):
        with pytest.raises(ConfigError, match=r"--also .*: is not evaluated in .*demo; there are: "):
            compare_stage(config, ROOT, tmp_path, also=[name])


def _failing_score(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    original, calls = score.read_samples, itertools.count()

    def read(*arguments: Any, **options: Any) -> Tensor:
        if next(calls) == after:
            raise KeyboardInterrupt
        return original(*arguments, **options)

    monkeypatch.setattr(score, "read_samples", read)


def test_several_processes_give_the_bytes_of_one(
    trained: tuple[Path, list[str]], tmp_path: Path, forks: Nurseries
) -> None:
    results, overrides = trained
    found = []
    for processes in (1, 2):
        place = shutil.copytree(results, tmp_path / str(processes))
        chosen = [*overrides, "arm=base", f"distribution.processes={processes}"]
        status, _, said = forks.run(VIPO, "evaluate", *chosen, "--results", place, cwd=ROOT, forked_ranks=True)
        assert status == 0, said
        found.append({name: data for name, data in _files(place).items() if not name.endswith("config.yaml")})
    assert found[0] == found[1]


def test_memory_does_not_grow_with_prompts_and_one_network_is_there_at_a_time(
    trained: tuple[Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By counting what is alive: one batch of pictures while sampling, two while scoring, and one network."""
    results, overrides = trained
    place = shutil.copytree(results, tmp_path / "results")
    alive, most, networks = [0], [0], [0]

    def kept(value: Any, counter: list[int], size: int) -> Any:
        counter[0] += size
        weakref.finalize(value, lambda: counter.__setitem__(0, counter[0] - size))
        return value

    def pictures(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*arguments: Any, **options: Any) -> Tensor:
            images = original(*arguments, **options)
            kept(images, alive, len(images))
            most[0] = max(most[0], alive[0])
            return images

        return call

    def network(original: Callable[..., Any], of: Callable[[Any], Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            gc.collect()
            assert networks[0] == 0
            found = original(*arguments, **options)
            kept(of(found), networks, 1)
            return found

        return call

    monkeypatch.setattr(sample, "draw", pictures(sample.draw))
    monkeypatch.setattr(score, "read_samples", pictures(score.read_samples))
    monkeypatch.setattr(sample, "load_generator", network(sample.load_generator, lambda generator: generator))
    monkeypatch.setattr(measures, "load_backbone", network(measures.load_backbone, lambda backbone: backbone))
    peaks = []
    for prompts in (3, 12):
        config = load_config([*overrides, "arm=vipo", f"evaluation.prompts={prompts}"])
        most[0] = 0
        sample_stage(config, ROOT, place)
        sample_stage(config.as_base(), ROOT, place)
        assert most[0] <= BATCH * 2
        gc.collect()
        assert networks[0] == 0
        score_stage(config, ROOT, place)
        peaks.append(most[0])
    assert peaks[0] == peaks[1] <= 2 * BATCH * 2


def test_an_arm_that_draws_otherwise_is_refused(trained: tuple[Path, list[str]], tmp_path: Path) -> None:
    results, overrides = trained
    place = shutil.copytree(results, tmp_path / "results")
    config = load_config([*overrides, "arm=vipo"])
    with pytest.raises(
        EvaluationError, match=r"no samples that can be read.*run 'vipo evaluate --only sample' of vipo-s0 first"
    ):
        score_stage(config, ROOT, place)
    sample_stage(config, ROOT, place)
    sample_stage(load_config([*overrides, "arm=base", "evaluation.steps=3"]), ROOT, place)
    with pytest.raises(EvaluationError, match=r"base-s0: drawn with another .* \(evaluation changed\).*once"):
        score_stage(config, ROOT, place)


def test_samples_of_other_weights_are_not_scored(tmp_path: Path) -> None:
    chosen = ["experiment=demo", "arm=vipo", "training.ema_decay=0.9"]
    kept, mean = (load_config([*chosen, f"evaluation.weights={name}"]) for name in ("trained", "ema"))
    facts = {"sampling": kept.sampling_identity(), "updates": [1], "grid": [8, 8], "frame_groups": None}
    place = tmp_path / "samples/vipo-s0/samples.json"
    place.parent.mkdir(parents=True)
    for drawn, asked in ((kept, mean), (mean, kept)):
        place.write_text(json.dumps({**facts, "sampling": drawn.sampling_identity()}))
        with pytest.raises(EvaluationError, match=r"vipo-s0: drawn with another configuration \(evaluation changed\)"):
            score.score_run(asked, ROOT, tmp_path)


@pytest.mark.parametrize("count", [1, 2, 5, 9])
def test_shares_are_all_parts_once(count: int) -> None:
    parts = list(range(7))
    found = [list(Share(number, count).of(parts)) for number in range(1, count + 1)]
    assert sorted(itertools.chain(*found)) == parts
    assert max(map(len, found)) - min(map(len, found)) <= 1
    nested = [Share(number, count).split(rank, 3).of(parts) for number in range(1, count + 1) for rank in range(3)]
    assert sorted(itertools.chain(*nested)) == parts


@pytest.mark.parametrize("text", ["", "0/2", "3/2", "1", "a/b", "1/2/3", "-1/2"])
def test_a_share_that_is_none(text: str) -> None:
    with pytest.raises(ShareError, match="NUMBER/COUNT"):
        Share.parse(text)
