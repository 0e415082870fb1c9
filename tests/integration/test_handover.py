"""An exported run: the stock pipeline loads it, its card says what was measured, and nothing doubtful leaves."""

import json
import re
import shlex
import shutil
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from checkpoints import write_wan22_a14b
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard, constants
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import OTHER_FAMILY
from video_checkpoints import write_ltx2

from vipo.cli import app
from vipo.config.compose import load_config, load_config_file, repository_root
from vipo.errors import VipoError
from vipo.evaluation.side_by_side import side_by_side
from vipo.evaluation.statistics import compare_arms
from vipo.generators import GeneratorError
from vipo.generators.packing import pack_latents
from vipo.handover.comfyui import check_comfyui, write_comfyui
from vipo.handover.export import export_run
from vipo.provenance import file_sha256, read_provenance
from vipo.sampling.noise import keyed_normal
from vipo.stages import encode_stage, evaluate_stage, prepare_stage, train_stage

ROOT = repository_root()
LORA = "training.lora={rank: 2, alpha: 4.0}"
SETTINGS = [
    "experiment=demo",
    "sampling.steps=4",
    "optimizer.learning_rate=1e-2",
    "training.prompts_per_update=2",
    "training.group_size=4",
    "training.micro_batch=4",
    "training.trained_transitions=2",
    "evaluation.prompts=4",
    "evaluation.steps=4",
    "evaluation.bootstrap=200",
    "evaluation.shown_prompts=2",
    "training.updates=1",
    "training.save_at=[]",
]
STATED = "---\nlicense: {}\n---\n# A base\n"


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_arguments: object) -> None:
        raise AssertionError("a connection was opened")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)


@pytest.fixture(scope="module")
def base(tiny_generator: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny generator with a card and licence, and with files that a checkout of it may hold beside its parts."""
    folder = shutil.copytree(tiny_generator, tmp_path_factory.mktemp("base") / "generator")
    (folder / "README.md").write_text(STATED.format("openrail++"))
    (folder / "LICENSE.md").write_text("Terms of use.\n")
    (folder / "everything.safetensors").write_bytes(b"all parts in one file")
    (folder / "text_encoder" / "pytorch_model.bin").write_bytes(b"a pickle")
    (folder / "text_encoder" / "model.fp16.safetensors").write_bytes(b"once more")
    (folder / "vae" / "code.py").write_text("raise SystemExit\n")
    return folder


def _train(overrides: list[str], results: Path) -> Path:
    config = load_config(overrides)
    train_stage(config, ROOT, results)
    evaluate_stage(config, ROOT, results)
    return results / "demo" / "runs" / config.run_name


@pytest.fixture(scope="module")
def demo(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An experiment with the base, a run of all weights (vipo-s0) and one of LoRA (vipo-s1)."""
    results = tmp_path_factory.mktemp("handover")
    overrides = [*SETTINGS, f"generator.path={base}"]
    _train([*overrides, "arm=vipo"], results)
    _train([*overrides, "arm=vipo", "seed=1", LORA], results)
    evaluate_stage(load_config([*overrides, "arm=base"]), ROOT, results)
    return results / "demo"


@pytest.mark.parametrize("run", ["vipo-s0", "vipo-s1"])
def test_a_held_out_prompt_is_drawn_as_it_was_evaluated(run: str, demo: Path, tmp_path: Path) -> None:
    """`vipo sample`, for all weights and LoRA: base above, trained below, the very pixels of the evaluation's files."""
    scores = pd.read_parquet(demo / "evaluation" / run / "scores.parquet")
    text, unseen = scores["prompt"].iloc[0], "a quokka on a raft " * 12
    identity, count = scores["prompt_id"].iloc[0], scores["sample"].nunique()
    output = tmp_path / "drawn.png"
    command = ["sample", str(demo / "runs" / run), unseen, f" {text}\n", text, "--samples", str(count)]
    app([*command, "--output", str(output)], standalone_mode=False)
    sheet = torch.from_numpy(np.array(Image.open(output)))
    side = 192
    assert sheet.shape == (2 * (20 + 2 * (side + 8) + 8) + 8, 72 + count * (side + 8) + 8, 3)
    for row, (drawn_by, update) in enumerate((("base-s0", 0), (run, 1))):
        for number in range(count):
            file = demo / "samples" / drawn_by / "pictures" / f"u{update}-{identity}-{number}.png"
            stored = torch.from_numpy(np.array(Image.open(file)))
            top, left = 8 + (20 + 2 * (side + 8) + 8) + 20 + row * (side + 8), 72 + 8 + number * (side + 8)
            scale = side // stored.shape[0]
            assert torch.equal(sheet[top : top + side : scale, left : left + side : scale], stored), (row, number)
    assert int(sheet[8:28].min()) < 100, "the prompt's text"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["runs/vipo-s7", "a fox"], "runs/vipo-s7/config.yaml"),
        (["runs/vipo-s0", " \u200b "], "a prompt is blank"),
        (["runs/vipo-s0", "a fox", "--output", "fox.jpg"], "must end in .png"),
    ],
)
def test_samples_that_cannot_be_drawn_are_refused(arguments: list[str], told: str, demo: Path) -> None:
    with pytest.raises(VipoError, match=re.escape(told)):
        app(["sample", str(demo / arguments[0]), *arguments[1:]], standalone_mode=False)


def test_clips_are_drawn_frame_by_frame() -> None:
    clips = torch.rand(2, 2, 3, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    sheet = side_by_side(["a fox"], ("base", "vipo-s0"), clips)
    scale, height, width = 48, 192, 288
    assert sheet.shape == (3, 3, 8 + 20 + 2 * (height + 8) + 8, 72 + 2 * (width + 8) + 8)
    cell = sheet[1, :, 28 + height + 8 :, 80 + width + 8 :][:, :height:scale, :width:scale]
    assert torch.equal((cell * 255).round(), (clips[1, 1, 1] * 255).round())


@pytest.fixture
def copied(demo: Path, tmp_path: Path) -> Path:
    """The experiment's folder to damage: records name the original, so the copy takes its place while a test runs."""
    kept = shutil.copytree(demo, tmp_path / "kept")
    yield demo
    shutil.rmtree(demo)
    shutil.copytree(kept, demo)


def _run_card(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Execute the card's example as a reader would, in the exported folder."""
    [code] = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {}
    exec(code, names)
    return names


def _drawn(pipeline: Any, prompt: str, prompt_id: str) -> np.ndarray:
    """The evaluation's first sample of a prompt, by the stock pipeline from the evaluation's noise."""
    noise = keyed_normal([(1234, "evaluation", prompt_id, 0)], (4, 16, 16))
    settings = {"height": 64, "width": 64, "num_inference_steps": 4, "guidance_scale": 0.0, "max_sequence_length": 16}
    return np.asarray(pipeline(prompt, latents=pack_latents(noise), **settings).images[0], dtype=int)


@pytest.mark.parametrize("run", ["vipo-s0", "vipo-s1"], ids=["full", "lora"])
def test_the_stock_pipeline_draws_the_evaluations_pictures(
    demo: Path, tmp_path: Path, run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = export_run(demo / "runs" / run, tmp_path / "export", ROOT)
    pipeline = _run_card(folder, monkeypatch)["pipeline"]
    with Image.open(folder / "sample.png") as picture:
        assert picture.size == (64, 64)
    shown = ModelCard.load(folder / "README.md").data["widget"]
    assert len(shown) == 2
    for row in shown:
        place = Path(row["output"]["url"])
        found = _drawn(pipeline, row["text"], place.stem.removesuffix("-0"))
        stored, before = (
            np.asarray(Image.open(folder / name), dtype=int) for name in (place, place.with_name(f"base-{place.name}"))
        )
        # A LoRA branch adds its numbers in another order than the merged or trained network.
        assert np.abs(found - stored).max() <= 1
        assert np.abs(found - before).max() > 1


def test_what_is_in_the_folder(demo: Path, base: Path, tmp_path: Path) -> None:
    # What no stage recorded stays where it is.
    (demo / "runs/vipo-s0/weights/transformer/added.bin").write_bytes(b"a pickle")
    folder = export_run(demo / "runs" / "vipo-s0", tmp_path / "export", ROOT)
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert {"README.md", "LICENSE.md", "SHA256SUMS", "model_index.json", "provenance/config.yaml"} <= files
    # No second precision, no pickle, no code, nothing that the pipeline does not name.
    assert not [name for name in files if name.endswith((".bin", ".py")) or "fp16" in name or "everything" in name]
    assert (folder / "vae/config.json").read_bytes() == (base / "vae/config.json").read_bytes()
    trained = demo / "runs/vipo-s0/weights/transformer/diffusion_pytorch_model.safetensors"
    assert (folder / "transformer/diffusion_pytorch_model.safetensors").read_bytes() == trained.read_bytes()
    records = {"train": "runs/vipo-s0", "score": "evaluation/vipo-s0", "score-base": "evaluation/base-s0"}
    records |= {"sample": "samples/vipo-s0", "sample-base": "samples/base-s0"}
    for copy, place in records.items():
        assert read_provenance(folder / f"provenance/{copy}.json") == read_provenance(demo / place / "provenance.json")
    listed = {line.split("  ", 1)[1] for line in (folder / "SHA256SUMS").read_text().splitlines()}
    assert listed == files - {"SHA256SUMS"}
    subprocess.run(["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"], cwd=folder, check=True)

    again = export_run(demo / "runs" / "vipo-s0", tmp_path / "again", ROOT)
    assert (again / "SHA256SUMS").read_bytes() == (folder / "SHA256SUMS").read_bytes()

    lora = export_run(demo / "runs" / "vipo-s1", None, ROOT)
    assert lora == demo / "export" / "vipo-s1"
    assert {path.name for path in lora.glob("*.*")} == {"README.md", "LICENSE.md", "pytorch_lora_weights.safetensors"}
    shutil.rmtree(demo / "export")


def test_the_card_says_what_was_measured(demo: Path, base: Path, tmp_path: Path) -> None:
    folder = export_run(demo / "runs" / "vipo-s0", tmp_path / "export", ROOT, base_model="acme/tiny-base")
    # Parsing with errors not ignored is huggingface_hub's own check of metadata, model-index and results.
    card = ModelCard.load(folder / "README.md", ignore_metadata_errors=False)
    data = card.data
    assert (data.license, data.library_name, data.pipeline_tag) == ("openrail++", "diffusers", "text-to-image")
    assert (data.base_model, data["base_model_relation"]) == ("acme/tiny-base", "finetune")
    assert {"vipo", "diffusers", "text-to-image"} <= set(data.tags)
    assert "lora" not in data.tags

    runs = [pd.read_parquet(demo / "evaluation" / run / "scores.parquet") for run in ("base-s0", "vipo-s0")]
    scores = pd.concat(runs)
    columns = [name for name in scores if name.startswith("reward/")]
    expected = compare_arms(scores, columns, references=["base"], resamples=200, seed=1234).set_index("column")
    results = {result.metric_type: result for result in data.eval_results}
    assert set(results) == {name.removeprefix("reward/") for name in columns}
    saved = {row["score"]: row for row in json.loads((folder / "provenance/scores.json").read_text())}
    for column, row in expected.iterrows():
        result = results[str(column).removeprefix("reward/")]
        assert result.metric_value == pytest.approx(row["mean"], abs=1e-6)
        assert result.task_type == "text-to-image"
        assert saved[str(column)]["difference"] == row["difference"]
        assert (saved[str(column)]["low"], saved[str(column)]["high"]) == (row["low"], row["high"])
    assert saved["reward/object_redness"]["trained"]
    assert not saved["reward/scene_shape"]["trained"]
    for said in ("object_redness (trained)", "openrail", "LICENSE.md", "conditional on these seeds", "4 held-out"):
        assert said in card.text, said
    for name in re.findall(r"\]\(([\w./-]+)\)", card.text):
        assert (folder / name).is_file(), name

    [lora] = [export_run(demo / "runs" / "vipo-s1", tmp_path / "lora", ROOT, license_id="apache-2.0")]
    card = ModelCard.load(lora / "README.md")
    # A folder of this machine is no id on the Hub.
    assert card.data.base_model is None
    assert card.data.license == "apache-2.0"
    assert "lora" in card.data.tags
    assert "Whoever exported this model named apache-2.0" in card.text
    assert "openrail" in card.text
    assert "load_lora_weights" in card.text


def _refused(run: Path, output: Path, message: str, **options: Any) -> None:
    with pytest.raises(VipoError, match=message):
        export_run(run, output, ROOT, **options)
    assert not output.exists() or (output / "mine").is_file()
    assert not list(output.parent.glob(".*partial"))


def test_a_licence_is_never_invented(demo: Path, base: Path, tmp_path: Path) -> None:
    run, output, card = demo / "runs" / "vipo-s0", tmp_path / "export", base / "README.md"
    kept = card.read_text()
    try:
        for text, message in (
            ("# No metadata\n", "states no licence of the base; .*--license"),
            (STATED.format("unknown"), "states no licence"),
            (STATED.format("other"), "states no licence"),
            (
                STATED.format("other\nlicense_name: acme\nlicense_link: TERMS.md"),
                r"license_link 'TERMS\.md' is no file",
            ),
            (STATED.format("other\nlicense_name: acme\nlicense_link: ../generator/LICENSE.md"), "is no file beside it"),
            ("---\nlicense: [\n---\n", "metadata cannot be read"),
        ):
            card.write_text(text)
            _refused(run, output, message)
        card.write_text(STATED.format("other\nlicense_name: acme-terms\nlicense_link: LICENSE.md"))
        data = ModelCard.load(export_run(run, output, ROOT) / "README.md").data
        assert (data.license, data.license_name, data.license_link) == ("other", "acme-terms", "LICENSE.md")
    finally:
        card.write_text(kept)
    for name in ("other", "unknown", "Apache License 2.0", ""):
        _refused(run, tmp_path / "no", "--license", license_id=name)
    _refused(run, tmp_path / "no", "--base-model 'a/b/c'", base_model="a/b/c")


def test_a_changed_base_is_refused(demo: Path, base: Path, tmp_path: Path) -> None:
    config = base / "vae" / "config.json"
    kept = config.read_bytes()
    try:
        config.write_bytes(kept + b"\n")
        _refused(demo / "runs" / "vipo-s0", tmp_path / "export", r"vae/config\.json: changed since vipo-s0 was trained")
    finally:
        config.write_bytes(kept)


def _append(name: str) -> Callable[[Path], None]:
    def damage(experiment: Path) -> None:
        with (experiment / name).open("ab") as stream:
            stream.write(b" ")

    return damage


def _remove(name: str) -> Callable[[Path], None]:
    return lambda experiment: shutil.rmtree(experiment / name)


def _as_pulled(name: str) -> Callable[[Path], None]:
    return lambda experiment: (experiment / name / "provenance.json").unlink()


def _retrained(experiment: Path) -> None:
    record = experiment / "runs/vipo-s0/provenance.json"
    values = json.loads(record.read_text())
    [weights] = [entry for entry in values["outputs"] if entry["path"].endswith(".safetensors")]
    weights["sha256"] = "0" * 64
    record.write_text(json.dumps(values))


def _other_settings(experiment: Path) -> None:
    path = experiment / "evaluation/vipo-s0/config.yaml"
    text = path.read_text()
    path.write_text(text.replace("samples_per_prompt: 2", "samples_per_prompt: 1"))
    shutil.copy(path, experiment / "runs/vipo-s0/config.yaml")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_append("runs/vipo-s0/weights/transformer/config.json"), r"weights/transformer/config\.json: changed"),
        (_append("evaluation/vipo-s0/scores.parquet"), r"evaluation/vipo-s0/scores\.parquet: changed"),
        (_append("evaluation/base-s0/scores.parquet"), r"evaluation/base-s0/scores\.parquet: changed"),
        (_remove("samples/vipo-s0/pictures"), r"pictures/.*: missing"),
        (_as_pulled("runs/vipo-s0"), r"runs/vipo-s0/provenance\.json: not here, .* copy them from where"),
        (_as_pulled("evaluation/vipo-s0"), r"evaluation/vipo-s0/provenance\.json: not here, .* copy them from where"),
        (_as_pulled("evaluation/base-s0"), r"evaluation/base-s0/provenance\.json: not here, .* copy them from where"),
        (_remove("evaluation/vipo-s0"), r"vipo-s0 has no scores; run vipo evaluate"),
        (_remove("evaluation/base-s0"), r"base was not evaluated in this experiment.*arm=base"),
        (_retrained, r"made with other weights than vipo-s0 has now; evaluate it again"),
        (_other_settings, r"made with another configuration; evaluate vipo-s0 again"),
    ],
)
def test_what_is_not_as_recorded_is_refused(
    copied: Path, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(copied)
    _refused(copied / "runs" / "vipo-s0", tmp_path / "export", message)


def test_runs_and_folders_that_cannot_be_used(copied: Path, tmp_path: Path) -> None:
    _refused(copied / "runs" / "base-s0", tmp_path / "export", "the base is the generator as it was")
    config = copied / "runs/vipo-s1/config.yaml"
    before = config.read_text()
    config.write_text(before.replace("start: null", "start: lora.safetensors"))
    _refused(copied / "runs" / "vipo-s1", tmp_path / "export", r"a LoRA, trained on what generator\.start made")
    config.write_text(before)
    for wrong in (copied / "runs" / "vipo-s7", copied / "evaluation" / "vipo-s0", copied, Path("/")):
        _refused(wrong, tmp_path / "export", "no run is there")
    (copied / "runs/vipo-s0/provenance.json").unlink()
    shutil.rmtree(copied / "runs/vipo-s0/weights")
    _refused(copied / "runs" / "vipo-s0", tmp_path / "export", "has no final weights; run vipo train")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "mine").write_text("important")
    _refused(copied / "runs" / "vipo-s0", tmp_path / "used", "exists; remove it or choose another")
    assert (tmp_path / "used" / "mine").read_text() == "important"


@pytest.mark.parametrize("page", ["compare", "handover"])
def test_the_commands_of_the_documentation(
    demo: Path, tmp_path: Path, page: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "demo").symlink_to(demo)
    monkeypatch.chdir(tmp_path)
    commands = re.findall(r"^vipo (.*)$", (ROOT / "docs" / f"{page}.md").read_text(), re.MULTILINE)
    assert len(commands) >= 2
    for command in commands:
        app(shlex.split(command), standalone_mode=False)
        shown = capsys.readouterr().out
        if "--json" in command:
            assert json.loads(shown)["training"]["same_weights"] is False
        elif command.startswith("diff"):
            assert "## Evaluation: held-out scores" in shown
        elif command.startswith("sample"):
            assert Image.open(shown.strip()).format == "PNG"
        else:
            assert ModelCard.load(Path(shown.strip()) / "README.md").data.license
    shutil.rmtree(demo / "export", ignore_errors=True)


@pytest.mark.parametrize(
    ("family", "extra"),
    [
        ("wan", ["generator.frames=9", "generator.max_sequence_length=8", LORA]),
        (
            "wan22_a14b",
            ["generator.frames=9", "generator.max_sequence_length=8", "generator.experts=low_noise", LORA],
        ),
        ("sd", ["sampling.transition=ddim"]),
        ("ltx2", ["generator.frames=9", "generator.max_sequence_length=16", "generator.width=64", LORA]),
    ],
    ids=["wan-lora", "a14b-lora", "sd-full", "ltx2-lora"],
)
def test_other_families(
    family: str, extra: list[str], tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    if family == "ltx2":
        base = write_ltx2(tmp_path / "ltx2")
    elif family == "wan22_a14b":
        base = write_wan22_a14b(tmp_path / "pair")
    else:
        base = request.getfixturevalue({"wan": "tiny_wan", "sd": "tiny_stable_diffusion"}[family])
    (tmp_path / "prompts.txt").write_text("a fox\nan owl\na hen\na bee\nan elk\na cat\na dog\nrain\n")
    overrides = [
        *OTHER_FAMILY,
        f"generator={'stable_diffusion' if family == 'sd' else family}",
        f"generator.path={base}",
        "generator.negative_prompt=mud",
        f"prompts.source={tmp_path / 'prompts.txt'}",
        "optimizer.learning_rate=1e-2",
        "training.group_size=2",
        "training.micro_batch=2",
        "evaluation.steps=3",
        "training.updates=1",
        *extra,
    ]
    results = tmp_path / "results"
    config = load_config([*overrides, "arm=vipo"])
    prepare_stage(config, ROOT, results)
    encode_stage(config, ROOT, results)
    evaluate_stage(load_config([*overrides, "arm=base"]), ROOT, results)
    run = _train([*overrides, "arm=vipo"], results)
    _refused(run, tmp_path / "export", "states no licence of the base")
    folder = export_run(run, tmp_path / "export", ROOT, license_id="apache-2.0")
    names = _run_card(folder, monkeypatch)
    with Image.open(next(folder.glob("sample.*"))) as drawn:
        assert drawn.size == (config.generator.width, 32)
        assert getattr(drawn, "n_frames", 1) == (config.generator.frames or 1)
    part = {"sd": "unet", "wan22_a14b": "transformer_2"}.get(family, "transformer")
    network, stock = (getattr(of, part) for of in (names["pipeline"], DiffusionPipeline.from_pretrained(base)))
    # With the example's own line, and there alone, the network is called without its sound.
    assert len(network._forward_pre_hooks) == (family == "ltx2")
    if config.training.lora is not None:
        adapted = [name for name, of in names["pipeline"].components.items() if getattr(of, "peft_config", None)]
        assert adapted == [part]
    else:
        assert any(
            not torch.equal(value, other) for value, other in zip(network.parameters(), stock.parameters(), strict=True)
        )
    card = ModelCard.load(folder / "README.md")
    assert card.data.pipeline_tag == ("text-to-image" if family == "sd" else "text-to-video")
    assert "states no licence" in card.text


def test_a_base_of_the_hub(demo: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the cache alone: parts, licence and the pinned revision."""
    revision = "0123456789abcdef0123456789abcdef01234567"
    cache = tmp_path / "cache" / "models--acme--tiny"
    shutil.copytree(base, cache / "snapshots" / revision)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    overrides = [*SETTINGS, "generator.path=acme/tiny", f"generator.revision={revision}"]
    results = tmp_path / "results"
    shutil.copytree(demo / "prompts", results / "demo" / "prompts")
    for more in (["arm=vipo"], ["arm=vipo", "seed=1", LORA]):
        run = _train([*overrides, *more], results)
        if more == ["arm=vipo"]:
            evaluate_stage(load_config([*overrides, "arm=base"]), ROOT, results)
        folder = export_run(run, None, ROOT)
        data = ModelCard.load(folder / "README.md").data
        assert data.base_model == "acme/tiny"
        assert data.license == "openrail++"
        assert (folder / "LICENSE.md").is_file()
        assert ((folder / "vae").is_dir(), (folder / "model_index.json").is_file()) == (len(more) == 1,) * 2
        names = _run_card(folder, monkeypatch)
        monkeypatch.chdir(ROOT)
        assert names["pipeline"].transformer is not None
    assert f"revision='{revision}'" in (folder / "README.md").read_text()
    _refused(run, tmp_path / "other", "trained on 'acme/tiny'", base_model="acme/else")


def test_weights_without_numbers_are_not_handed_over(copied: Path, tmp_path: Path) -> None:
    """Although every record says that they are what the training wrote."""
    path = copied / "runs/vipo-s0/weights/transformer/diffusion_pytorch_model.safetensors"
    before = file_sha256(path)
    tensors = load_file(path)
    tensors[max(tensors)].view(-1)[0] = float("nan")
    save_file(tensors, path, {"format": "pt"})
    for record in copied.rglob("provenance.json"):
        record.write_text(record.read_text().replace(before, file_sha256(path)))
    with pytest.raises(GeneratorError, match="holds values that are not finite"):
        export_run(copied / "runs/vipo-s0", tmp_path / "out", ROOT)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("run", ["vipo-s0", "vipo-s1"], ids=["full", "lora"])
def test_for_comfyui_it_is_one_file_under_the_original_names(demo: Path, tmp_path: Path, run: str) -> None:
    """Nothing is left out; the names begin as ComfyUI asks; the card says how many layers, and shows no Python."""
    command = ["export", str(demo / "runs" / run), "--output", str(tmp_path / "export"), "--format", "comfyui"]
    app(command, standalone_mode=False)
    [file] = (tmp_path / "export").glob("*.safetensors")
    card = (tmp_path / "export" / "README.md").read_text()
    assert "```python" not in card
    assert ModelCard(card).data["library_name"] == "diffusion-single-file"
    tensors = load_file(file)
    if run == "vipo-s0":
        trained = load_file(demo / "runs" / run / "weights/transformer/diffusion_pytorch_model.safetensors")
        assert sum(value.numel() for value in tensors.values()) == sum(value.numel() for value in trained.values())
        qkv = [trained[f"transformer_blocks.0.attn.to_{part}.weight"] for part in "qkv"]
        assert torch.equal(tensors["double_blocks.0.img_attn.qkv.weight"], torch.cat(qkv))
        assert f"all {len(trained)} tensors" in card
        assert "models/diffusion_models" in card
        return
    layers = load_file(demo / "runs" / run / "weights/pytorch_lora_weights.safetensors")
    name = "transformer.transformer_blocks.0.attn.to_{}.lora_{}.weight"
    up, down = (tensors[f"diffusion_model.double_blocks.0.img_attn.qkv.lora_{side}.weight"] for side in "BA")
    whole = torch.cat([layers[name.format(part, "B")] @ layers[name.format(part, "A")] for part in "qkv"])
    assert torch.allclose(up @ down, whole, atol=1e-6)
    assert f"all {len(layers) // 2} layers that were adapted" in card
    assert "models/loras" in card


def test_a_family_without_original_names_is_refused_for_comfyui(demo: Path, tmp_path: Path) -> None:
    config = load_config_file(demo / "runs/vipo-s0/config.yaml")
    generator = config.generator.model_copy(update={"family": "sana"})
    with pytest.raises(VipoError, match=r"'sana' .*ComfyUI itself has no Sana"):
        check_comfyui(config.model_copy(update={"generator": generator}), ROOT)


def test_a_second_network_has_a_file_of_its_own(demo: Path, tmp_path: Path) -> None:
    """As Wan 2.2's pair has, whose second network's files end in _2."""
    run = demo / "runs/vipo-s1"
    config, weights = load_config_file(run / "config.yaml"), tmp_path / "weights"
    weights.mkdir()
    for name in ("pytorch_lora_weights", "pytorch_lora_weights_2"):
        shutil.copyfile(run / "weights/pytorch_lora_weights.safetensors", weights / f"{name}.safetensors")
    written = write_comfyui(config, weights, tmp_path, ROOT)
    assert written.names == ("demo-vipo-s1-transformer.safetensors", "demo-vipo-s1-transformer_2.safetensors")
    assert written.held == 2 * len(load_file(run / "weights/pytorch_lora_weights.safetensors")) // 2
    assert load_file(tmp_path / written.names[0]).keys() == load_file(tmp_path / written.names[1]).keys()
