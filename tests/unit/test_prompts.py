"""Cleaning, ids and the split: properties that hold for any text."""

import hashlib
import json
import re
import tempfile
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vipo.config.compose import load_config
from vipo.config.prompts import HeldOutSource, PromptsConfig
from vipo.prompts import Prompt, PromptError, clean_text, prepare_prompts, prompt_id, read_prompts
from vipo.prompts.needs import check_needs, told_split
from vipo.prompts.prompt import is_blank

# Lone surrogates too: JSON can spell them, UTF-8 cannot.
ANY_TEXT = st.text(st.characters(), max_size=40)
AWKWARD = st.text(
    st.sampled_from("aAe\u0301\u0327\u1100\u1161 \t\n\r\x00\x1c\x85\u00a0\u2000\u2028\u200d\u202e\ufeff\ud800👩"),
    max_size=12,
)


@given(ANY_TEXT | AWKWARD)
def test_cleaning_is_idempotent_nfc_and_one_line(text: str) -> None:
    clean = clean_text(text)
    assert clean_text(clean) == clean
    assert unicodedata.is_normalized("NFC", clean)
    assert not any(unicodedata.category(c) in ("Cc", "Cs") for c in clean)
    assert clean.split() == ([] if not clean else clean.split(" "))
    clean.encode()


@given(
    st.lists(st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Zs", "Zl", "Zp")), min_size=1, max_size=8))
)
def test_cleaning_keeps_every_printed_character(words: list[str]) -> None:
    assert clean_text("\n".join(words)) == unicodedata.normalize("NFC", " ".join(words))


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("cafe\u0301", "café"),
        ("e\x00\u0301", "é"),
        ("  a\tred\r\n\r\ncircle\u00a0here ", "a red circle here"),
        ("a\x07b", "ab"),
        ("<script>alert('x')</script> & \"q\"", "<script>alert('x')</script> & \"q\""),
        ("👩\u200d🚀 \u202bשלום\u202c", "👩\u200d🚀 \u202bשלום\u202c"),
        ("\ud83d", ""),
    ],
)
def test_cleaning_examples(text: str, clean: str) -> None:
    assert clean_text(text) == clean


@pytest.mark.parametrize(
    "text",
    [
        "",
        " \t\n",
        "\u200b\u200d",
        "\u2060 \ufeff",
        "\u00ad",
        "\u3164\u115f\uffa0",
        "\u2800",
        "\u2065\ufff3\U000e0080",
        "\ufe0f",
        "\U000e0100",
        "\U000e0041",
        "\u202e",
        "\x07\ud800",
    ],
)
def test_what_cannot_be_seen_is_blank(text: str) -> None:
    assert is_blank(text)
    assert is_blank(clean_text(text))
    assert not is_blank(clean_text(f"{text}é"))


@pytest.mark.parametrize("text", ["é", "\u0301", "🎨", "…", "-", "\u05e9", "❤\ufe0f", "\ue000"])
def test_what_can_be_seen_is_not_blank(text: str) -> None:
    assert not is_blank(text)


@given(ANY_TEXT.map(clean_text))
def test_ids_are_the_text_s_hash_and_safe_file_names(text: str) -> None:
    assert prompt_id(text) == hashlib.sha256(text.encode("utf-8")).hexdigest()[:16]
    assert re.fullmatch(r"[0-9a-f]{12,}", prompt_id(text))


def _halves(texts: list[str], share: float = 0.5) -> tuple[dict[str, Any], list[Prompt], list[Prompt]]:
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        (root / "p.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
        manifest = prepare_prompts(PromptsConfig(source="p.jsonl", eval_share=share), root, root / "out")
        return manifest, read_prompts(root / "out" / "train.jsonl"), read_prompts(root / "out" / "eval.jsonl")


# One of each half, so that neither is ever empty.
SEEDS = ["a red circle", "a blue square", "a green triangle", "a white circle", "a black square"]


@settings(max_examples=25, deadline=None)
@given(st.lists(ANY_TEXT, max_size=6), st.lists(ANY_TEXT | st.sampled_from(SEEDS).map(str.upper), max_size=6))
def test_adding_prompts_moves_no_other(some: list[str], more: list[str]) -> None:
    _, train, held_out = _halves(SEEDS + some)
    _, more_train, more_held_out = _halves(SEEDS + some + more)
    assert set(_texts(train)) <= set(_texts(more_train))
    assert set(_texts(held_out)) <= set(_texts(more_held_out))


@settings(max_examples=25, deadline=None)
@given(st.permutations(SEEDS))
def test_order_of_the_source_changes_nothing(texts: list[str]) -> None:
    assert _halves(texts)[1:] == _halves(SEEDS)[1:]


@settings(max_examples=25, deadline=None)
@given(st.lists(ANY_TEXT | AWKWARD, max_size=12))
def test_every_row_is_kept_once_or_counted_once(texts: list[str]) -> None:
    manifest, train, held_out = _halves(SEEDS + texts)
    dropped = [row for rows in manifest["dropped"].values() for row in rows]
    assert len(dropped) == len(set(dropped))
    counts = manifest["counts"]
    assert counts["rows"] == len(SEEDS) + len(texts) == counts["kept"] + len(dropped)
    assert (counts["train"], counts["eval"]) == (len(train), len(held_out))
    kept = _texts(train + held_out)
    assert len(set(kept)) == len(kept) == counts["kept"]
    assert set(kept) <= {clean_text(text) for text in SEEDS + texts}


def test_split_follows_the_share_and_grows_with_it() -> None:
    texts = [f"a picture of {number} things" for number in range(2000)]
    held: set[str] = set()
    for share in (0.1, 0.3, 0.6):
        _, train, held_out = _halves(texts, share)
        assert abs(len(held_out) / 2000 - share) < 4 * (share * (1 - share) / 2000) ** 0.5
        assert held < set(_texts(held_out))
        held = set(_texts(held_out))
        assert [p.id for p in train] == sorted(p.id for p in train)


def test_share_of_zero_holds_nothing_out() -> None:
    manifest, train, held_out = _halves(SEEDS, 0.0)
    assert len(train) == 5
    assert held_out == []
    assert manifest["counts"]["eval"] == 0


@pytest.mark.parametrize(
    ("texts", "share", "half"), [(SEEDS, 0.001, "eval"), (SEEDS, 0.999, "train"), (["one"], 0.5, "")]
)
def test_an_empty_half_is_refused(texts: list[str], share: float, half: str) -> None:
    with pytest.raises(
        PromptError, match=rf"eval_share {share} leaves no prompt for {half}.*; change it or add prompts"
    ):
        _halves(texts, share)


def _texts(prompts: list[Prompt]) -> list[str]:
    return [prompt.text for prompt in prompts]


def _prompts(count: int, **metadata: Any) -> list[Prompt]:
    return [Prompt(prompt_id(f"text {number}"), f"text {number}", metadata) for number in range(count)]


URL = 'url: "http://127.0.0.1:1"'
SCENE: dict[str, Any] = {"objects": [{"shape": "circle"}], "background": "white"}


@pytest.mark.parametrize(
    ("overrides", "train", "held_out", "told"),
    [
        ([], _prompts(2, **SCENE), _prompts(1, **SCENE), r"eval_share 0\.25 leaves 1 prompt for eval, .* need 2"),
        ([], _prompts(1, **SCENE), _prompts(2, **SCENE), "prompts_per_update 2 exceeds the 1 training prompts"),
        (
            ["arm=oracle", "evaluation.rewards=[]"],
            [*_prompts(5, **SCENE), Prompt("0", "plain", {})],
            _prompts(2),
            "credit source 'oracle' needs scene metadata with 'objects', .*'plain' has none",
        ),
        (
            ["reward.terms=[{name: scene_count}]"],
            _prompts(2, objects=SCENE["objects"]),
            _prompts(2, **SCENE),
            r"reward\.terms: reward 'scene_count' needs scene metadata with 'background'",
        ),
        *(
            ([], _prompts(2, **SCENE), _prompts(2, **SCENE | {"objects": objects}), "a list of mappings with a 'shape'")
            for objects in ([], "circle", [{"color": "red"}], [{"shape": "circle"}, "square"])
        ),
        (
            [f"evaluation.rewards=[{{name: process, label: there, options: {{reward: geneval, {URL}}}}}]"],
            _prompts(2, **SCENE),
            _prompts(2, **SCENE),
            r"evaluation\.rewards: reward 'process' needs GenEval's metadata",
        ),
        *(
            (
                [f"evaluation.rewards=[{{name: judge, options: {{{URL}, model: m, key: vqa_list}}}}]"],
                _prompts(2, **SCENE),
                _prompts(2, **SCENE, **more),
                r"evaluation\.rewards: reward 'judge' needs the prompt's own questions as metadata 'vqa_list'",
            )
            for more in ({}, {"vqa_list": []}, {"vqa_list": [["a?"]]}, {"vqa_list": "a?"})
        ),
        ([], _prompts(2), _prompts(2), r"evaluation\.rewards: reward 'scene_shape' needs .*'objects', 'background'"),
    ],
)
def test_prompts_that_a_run_could_not_use(
    overrides: list[str], train: list[Prompt], held_out: list[Prompt], told: str
) -> None:
    with pytest.raises(PromptError, match=told):
        check_needs(load_config(["experiment=demo", *overrides]), train, held_out)


@pytest.mark.parametrize(
    ("held_out", "told"),
    [
        (0, "9 prompts to train on, 0 held out"),
        (39, "39 held out; evaluation.prompts 40 asks for more: all of these are used"),
        (40, "9 prompts to train on, 40 held out"),
        (41, "41 held out, of which the evaluation takes evaluation.prompts 40"),
    ],
)
def test_how_many_are_held_out_is_told(held_out: int, told: str) -> None:
    assert told_split(load_config(["experiment=demo"]), 9, held_out).endswith(told)


def test_prompts_that_a_run_can_use() -> None:
    demo = load_config(["experiment=demo"])
    check_needs(demo, _prompts(2, **SCENE), _prompts(2, **SCENE))
    # Nothing of an untrained arm is trained; nothing need be held out where nothing is asked for.
    check_needs(load_config(["experiment=demo", "arm=base"]), _prompts(1), _prompts(2, **SCENE))
    check_needs(load_config(["experiment=demo", "prompts.eval_share=0", "evaluation.rewards=[]"]), _prompts(2), [])


@pytest.mark.parametrize("source", ["none.txt", "rows.bin", "set:none", "os:sep", "no_such_module:rows", "hub:short"])
def test_an_unusable_source_of_held_out_prompts_is_named_by_its_own_key(tmp_path: Path, source: str) -> None:
    (tmp_path / "some.txt").write_text("a cube\na ball\n")
    config = PromptsConfig(source="some.txt", eval=HeldOutSource(source=source))
    with pytest.raises(PromptError, match=f"^prompts.eval.source '?{source}"):
        prepare_prompts(config, tmp_path, tmp_path / "out")
    with pytest.raises(PromptError, match=f"^prompts.source '?{source}"):
        prepare_prompts(PromptsConfig(source=source), tmp_path, tmp_path / "out")


def test_the_key_of_held_out_prompts_is_named(tmp_path: Path) -> None:
    (tmp_path / "some.txt").write_text("a cube\na ball\n")
    (tmp_path / "held.csv").write_text("words\na cone\n")
    config = PromptsConfig(source="some.txt", eval=HeldOutSource(source="held.csv"))
    with pytest.raises(PromptError, match=r"held.csv: has no key 'prompt'; .*prompts.eval.text_key\) to one of: words"):
        prepare_prompts(config, tmp_path, tmp_path / "out")
