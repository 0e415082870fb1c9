"""Our own evaluation set: distinct, in categories, and its facts are those of its texts."""

import collections
import json
import re
from typing import Any

import pytest

from vipo.config.compose import repository_root
from vipo.prompts import clean_text, prompt_id
from vipo.prompts.geneval import COLORS, OBJECTS, geneval_fault
from vipo.prompts.needs import drawn_text

PATH = repository_root() / "data/prompts/evaluation.jsonl"
ROWS: list[dict[str, Any]] = [json.loads(line) for line in PATH.read_text(encoding="utf-8").splitlines()]
COUNTS = {2: "two", 3: "three", 4: "four", 5: "five", 6: "six", 7: "seven", 8: "eight", 9: "nine"}
# What a text may call a class of the detector.
WORDS = {
    "couch": "couch|sofa", "dining table": "dining table|table", "person": "person|rider", "computer mouse": "mouse",
    "computer keyboard": "keyboard", "bus": "bus|buses",
}  # fmt: skip


def _said(name: str, text: str) -> bool:
    return re.search(rf"\b(?:{WORDS.get(name, re.escape(name))})(?:s|es)?\b", text) is not None


def test_it_is_large_distinct_and_clean() -> None:
    texts = [row["prompt"] for row in ROWS]
    assert len(texts) >= 400
    assert len({text.casefold() for text in texts}) == len({prompt_id(text) for text in texts}) == len(texts)
    assert all(clean_text(text) == text for text in texts)
    assert max(map(len, texts)) < 400


def test_every_category_has_its_prompts_and_every_prompt_its_challenge() -> None:
    found = collections.Counter(row["category"] for row in ROWS)
    assert len(found) >= 12
    assert min(found.values()) >= 18
    assert all(row["challenge"] for row in ROWS)
    keys = {"prompt", "category", "challenge", "include", "exclude", "text"}
    assert all(row.keys() <= keys for row in ROWS)


@pytest.mark.parametrize("row", [row for row in ROWS if "include" in row], ids=lambda row: row["prompt"])
def test_what_it_claims_of_objects_is_in_the_text(row: dict[str, Any]) -> None:
    text = row["prompt"].lower()
    assert geneval_fault(row) is None
    for claim in row["include"]:
        assert claim["class"] in OBJECTS
        assert _said(claim["class"], text)
        assert claim["count"] == 1 or COUNTS[claim["count"]] in text.split()
        assert claim.get("color", COLORS[0]) in COLORS
        assert claim.get("color", "") in text
        if "position" in claim:
            relation, other = claim["position"]
            first, last = text.split(relation, 1)
            assert _said(claim["class"], first)
            assert _said(row["include"][other]["class"], last)
    for claim in row.get("exclude", []):
        assert claim["class"] in OBJECTS
        assert re.search(rf"\b(?:no|without(?: a single| any)?) (?:{re.escape(claim['class'])})s?\b", text)


def test_texts_to_render_stand_in_quotes_as_the_reward_reads_them() -> None:
    rows = [row for row in ROWS if "text" in row]
    assert len(rows) >= 40
    for row in rows:
        assert f'"{row["text"]}"' in row["prompt"]
        assert drawn_text(row["prompt"], {}, "text") == drawn_text(row["prompt"], row, "text") == row["text"]


def test_most_facts_can_be_checked() -> None:
    assert sum("include" in row or "text" in row for row in ROWS) >= 200
