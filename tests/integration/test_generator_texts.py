"""Prompts, tokenizers, text encoders and the embeddings that they make: what is not read, or changed since, is told."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import edit_json, edit_tensors, generator_config
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, normalizers
from tokenizers.models import Unigram
from torch import Tensor

from vipo.config.compose import load_config
from vipo.config.generator import GeneratorConfig
from vipo.generators import GeneratorError, load_generator
from vipo.generators.configured import resolve_class
from vipo.generators.embeddings import check_embeddings, encoder_hashes, load_embeddings
from vipo.generators.encoding import encode_prompt_file
from vipo.prompts import Prompt
from vipo.prompts.prompt import prompt_id
from vipo.stages import encode_stage, evaluate_stage, prepare_stage, train_stage

ROOT = Path(__file__).resolve().parents[2]
IDENTITY = {"family": "any"}


def _encode(config: GeneratorConfig, folder: Path, *texts: str) -> tuple[Path, Path, list[Prompt]]:
    """The embeddings file, the prompts' and the prompts."""
    prompts = [Prompt(prompt_id(text), text, {}) for text in texts]
    source, output = folder / "train.jsonl", folder / "train.safetensors"
    source.write_text("".join(json.dumps(vars(prompt)) + "\n" for prompt in prompts))
    encode_prompt_file(config, ROOT, source, output, IDENTITY)
    return output, source, prompts


def _warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name.startswith("vipo.")]


@pytest.mark.parametrize(
    ("family", "part"),
    [("wan", "tokenizer"), ("wan", "text_encoder"), ("sd", "text_encoder"), ("flux", "tokenizer_2")],
)
def test_embeddings_of_other_text_encoders_are_refused(
    family: str,
    part: str,
    tiny_generator: Path,
    tiny_wan: Path,
    tiny_stable_diffusion: Path,
    tmp_path: Path,
) -> None:
    original = {"flux": tiny_generator, "wan": tiny_wan, "sd": tiny_stable_diffusion}[family]
    folder = shutil.copytree(original, tmp_path / "checkpoint")
    config = generator_config(family, folder)
    output, source, _ = _encode(config, tmp_path, "a fox")
    check_embeddings(output, source, IDENTITY, encoder_hashes(config, ROOT))
    # Only what encodes counts.
    (folder / "README.md").write_text("changed")
    check_embeddings(output, source, IDENTITY, encoder_hashes(config, ROOT))
    if part.startswith("tokenizer"):
        edit_json(folder / part / "tokenizer_config.json", note="changed")
    else:
        edit_tensors(folder / part, lambda tensors: tensors[min(tensors)].add_(1))
    with pytest.raises(
        GeneratorError, match=rf"made by other text encoders .*\({part} changed since\).*'encode' again"
    ):
        check_embeddings(output, source, IDENTITY, encoder_hashes(config, ROOT))


def test_embeddings_that_name_no_encoder_or_do_not_fit_are_refused(tiny_wan: Path, tmp_path: Path) -> None:
    config = generator_config("wan", tiny_wan)
    output, source, prompts = _encode(config, tmp_path, "a fox", "two owls")
    widths = resolve_class(config).conditioning_widths(config, ROOT)
    assert widths == {"encoder_hidden_states": 32}
    load_embeddings(output, prompts, widths=widths)
    with safe_open(output, framework="pt") as stream:
        origin = json.loads(stream.metadata()["origin"])
    assert origin["encoders"].keys() == {"text_encoder", "tokenizer"}
    tensors, name = load_file(output), f"{prompts[0].id}/encoder_hidden_states"

    def told(changes: dict[str, Tensor]) -> str:
        save_file(tensors | changes, output)
        with pytest.raises(GeneratorError) as error:
            load_embeddings(output, prompts, widths=widths)
        return str(error.value)

    assert "encoder_hidden_states: shape (16, 32) of one prompt, (12, 32) of another" in told(
        {name: torch.zeros(12, 32)}
    )
    wide = {key: torch.zeros(16, 48) for key in tensors}
    assert "width 48, but the network of generator.path takes 32; run the encode stage again" in told(wide)
    assert "not finite float32" in told({name: torch.full((16, 32), float("nan"))})
    assert "not finite float32 (I32)" in told({name: torch.zeros(16, 32, dtype=torch.int32)})
    assert "tensors" in told({f"{prompts[0].id}/other": torch.zeros(1)})
    del origin["encoders"]
    save_file(tensors, output, metadata={"origin": json.dumps(origin)})
    with pytest.raises(GeneratorError, match="does not name the text encoders"):
        check_embeddings(output, source, IDENTITY, encoder_hashes(config, ROOT))


def test_a_run_refuses_embeddings_of_text_encoders_that_changed(tiny_generator: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_generator, tmp_path / "generator")
    source = tmp_path / "prompts.txt"
    source.write_text("".join(f"a fox and {count} owls\n" for count in range(40)))
    overrides = [
        f"generator.path={folder}",
        f"prompts.source={source}",
        "reward=redness",
        "evaluation.rewards=[redness]",
        "training.prompts_per_update=2",
        "training.micro_batch=4",
        "evaluation.rewards=[]",
    ]
    config = load_config(["experiment=demo", "training.group_size=4", "arm=grpo", *overrides])
    results = tmp_path / "results"
    prepare_stage(config, ROOT, results)
    encode_stage(config, ROOT, results)
    edit_tensors(folder / "text_encoder_2", lambda tensors: tensors[min(tensors)].add_(1))
    for stage in (train_stage, evaluate_stage):
        with pytest.raises(GeneratorError, match=r"\(text_encoder_2 changed since\)"):
            stage(config, ROOT, results)
    encode_stage(config, ROOT, results)
    experiment = results / "demo"
    encoders = encoder_hashes(config.generator, ROOT)
    for split in ("train", "eval"):
        embeddings, prompts = experiment / f"embeddings/{split}.safetensors", experiment / f"prompts/{split}.jsonl"
        check_embeddings(embeddings, prompts, config.embeddings_identity(), encoders)


def test_encoders_of_another_width_than_the_networks_are_refused(tiny_stable_diffusion: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_stable_diffusion, tmp_path / "sd")
    edit_json(folder / "unet/config.json", cross_attention_dim=768)
    with pytest.raises(GeneratorError, match=r"encoder_hidden_states: width 32, but the network .* takes 768"):
        _encode(generator_config("sd", folder), tmp_path, "a fox")


@pytest.mark.parametrize(("family", "limit"), [("sd", 16), ("wan", 16), ("flux", 16)])
def test_prompts_that_are_cut_off_are_counted_and_named(
    family: str,
    limit: int,
    tiny_generator: Path,
    tiny_wan: Path,
    tiny_stable_diffusion: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = {"flux": tiny_generator, "wan": tiny_wan, "sd": tiny_stable_diffusion}[family]
    start = "red " * limit
    _encode(generator_config(family, folder), tmp_path, "a fox", start + "circle", start + "square")
    told = _warnings(caplog)
    cut = [text for text in told if "is cut off" in text]
    assert any(f"/tokenizer reads {limit} tokens: the end of 2 of " in text for text in cut) or family == "flux"
    assert any("tokenizer_2 reads 16 tokens: the end of 2 of 3 prompts" in text for text in cut) or family != "flux"
    assert all("circle" in text or "red red" in text for text in cut)
    if family != "flux":
        assert any("2 prompts are encoded exactly as another one" in text for text in told)
    caplog.clear()
    _encode(generator_config(family, folder), tmp_path, "a fox")
    assert _warnings(caplog) == []


def _add_token(folder: Path) -> None:
    tokens = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokens.add_tokens(["<mine>"])
    tokens.save(str(folder / "tokenizer.json"))


@pytest.mark.parametrize("family", ["sd", "flux"])
def test_a_token_without_a_row_in_the_encoder_is_named(
    family: str, tiny_generator: Path, tiny_stable_diffusion: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree({"flux": tiny_generator, "sd": tiny_stable_diffusion}[family], tmp_path / "checkpoint")
    _add_token(folder / "tokenizer")
    with pytest.raises(GeneratorError, match=r"tokenizer: 1 tokens have no row in text_encoder .*first '<mine>'"):
        _encode(generator_config(family, folder), tmp_path, "a fox")


def test_more_tokens_than_the_encoder_has_positions_are_refused(tiny_stable_diffusion: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_stable_diffusion, tmp_path / "sd")
    edit_json(folder / "tokenizer/tokenizer_config.json", model_max_length=77)
    with pytest.raises(GeneratorError, match=r"model_max_length of tokenizer_config\.json 77 exceeds the 16 positions"):
        _encode(generator_config("sd", folder), tmp_path, "a fox")


def _other_rules(tokens: Tokenizer) -> None:
    tokens.normalizer = normalizers.Sequence([normalizers.Replace("  ", " "), normalizers.Replace("fox", "owl")])


def _as_umt5(tokens: Tokenizer) -> None:
    """Its third piece begins a text, and what is unknown is the fourth."""
    pieces = ("<pad>", "</s>", "<s>", "<unk>", *sorted(tokens.get_vocab().keys() - {"<pad>", "</s>", "<unk>"}))
    tokens.model = Unigram([(piece, -float(row)) for row, piece in enumerate(pieces)], unk_id=3)


@pytest.mark.parametrize(
    ("change", "prompt", "count"),
    [(_other_rules, "a fox", 1), (_other_rules, "a cat", 0), (_as_umt5, "a red 猫", 1), (_as_umt5, "a red cat", 0)],
)
def test_tokens_that_transformers_makes_otherwise_than_the_file_are_told(
    change: Callable[[Tokenizer], None],
    prompt: str,
    count: int,
    tiny_wan: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = shutil.copytree(tiny_wan, tmp_path / "wan")
    file = folder / "tokenizer/tokenizer.json"
    tokens = Tokenizer.from_file(str(file))
    change(tokens)
    # A length that the file has been cut or filled to is no difference.
    tokens.enable_truncation(2)
    tokens.enable_padding(length=40)
    tokens.save(str(file))
    _encode(generator_config("wan", folder), tmp_path, prompt)
    # The negative prompt is one of them.
    told = f"other tokens (special ones counted) of {count} of 2 prompts than this file, first of {prompt!a}"
    assert len(_warnings(caplog)) == count
    assert all(told in text for text in _warnings(caplog))


def test_options_without_effect_are_told(
    tiny_generator: Path,
    tiny_wan: Path,
    tiny_stable_diffusion: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with pytest.raises(GeneratorError, match=r"generator\.negative_prompt: family 'flux' has no classifier-free"):
        load_generator(generator_config("flux", tiny_generator, negative_prompt="blurry"), ROOT)
    with pytest.raises(GeneratorError, match=r"generator\.max_sequence_length 513 is above 512"):
        load_generator(generator_config("flux", tiny_generator, max_sequence_length=513), ROOT)
    caplog.set_level(logging.WARNING)
    load_generator(generator_config("flux", tiny_generator, guidance_scale=3.5), ROOT)
    load_generator(generator_config("wan", tiny_wan, guidance_scale=1.0, negative_prompt="blurry"), ROOT)
    load_generator(generator_config("sd", tiny_stable_diffusion, max_sequence_length=77), ROOT)
    load_generator(generator_config("wan", tiny_wan, revision="0" * 40), ROOT)
    assert [text.split(" has no effect")[0] for text in _warnings(caplog)] == [
        "generator.guidance_scale 3.5",
        "generator.negative_prompt",
        "generator.max_sequence_length 77",
        f"generator.revision {'0' * 40}",
    ]
    caplog.clear()
    load_generator(generator_config("flux", tiny_generator), ROOT)
    load_generator(generator_config("wan", tiny_wan, negative_prompt="blurry"), ROOT)
    assert _warnings(caplog) == []
