"""docs/method.md: every function and test that it names exists, every rule has its row, every figure is a table's."""

import json
import pkgutil
import re
from collections.abc import Iterator

import pandas as pd
import pytest

from vipo.config.compose import load_config, repository_root

ROOT = repository_root()
TEXT = (ROOT / "docs/method.md").read_text()
ROWS = [line for line in TEXT.splitlines() if line.startswith("| ")]
FUNCTIONS = sorted(set(re.findall(r"`(vipo(?:\.\w+)+)`", TEXT)))
TESTS = sorted(set(re.findall(r"`((?:\w+/)?\w+\.py)::(\w+)`", TEXT)))

# Rules beside the equations, by a word of their row and what computes them (of the page).
RULES = [
    ("squared_error", "vipo.sampling.transitions.position_log_prob"),
    ("classifier-free guidance", "vipo.generators.pipeline.PipelineGenerator.guided"),
    ("frames of one latent frame", "vipo.perception.temporal.average_groups"),
    ("from frame to frame", "vipo.perception.temporal.follow_components"),
    ("smoothing over latent frames", "vipo.perception.temporal.smooth_in_time"),
    ("min-max over all positions of all frames", "vipo.perception.structuring.PerceptualStructuring"),
    ("floor + (1 - floor) M^exponent", "vipo.perception.allocator.finish"),
    ("equal rewards", "vipo.objectives.advantages.group_advantages"),
    ("selectivity", "vipo.evaluation.study.compare_over_seeds"),
]


@pytest.mark.parametrize("path", FUNCTIONS)
def test_functions_exist(path: str) -> None:
    assert callable(pkgutil.resolve_name(path))


@pytest.mark.parametrize(("file", "name"), TESTS)
def test_tests_exist(file: str, name: str) -> None:
    path = ROOT / "tests" / (file if "/" in file else f"unit/{file}")
    assert f"def {name}(" in path.read_text()


@pytest.mark.parametrize(("words", "function"), RULES)
def test_rules_have_a_row_with_function_and_test(words: str, function: str) -> None:
    (row,) = [row for row in ROWS if words in row and f"`{function}`" in row]
    assert re.search(r"`\S+\.py::\w+`", row)


def test_the_example_says_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    code, told = re.findall(r"```(?:python)?\n(.*?)```", TEXT, re.DOTALL)[:2]
    exec(code, {})
    assert capsys.readouterr().out == told


def test_the_page_was_read() -> None:
    assert len(FUNCTIONS) > 20
    assert len(TESTS) > 25


NUMBER = r"[-+]?\d*\.?\d+(?:e-?\d+)?"
INTERVAL = rf"({NUMBER}) \[({NUMBER}), ({NUMBER})\]"


def _table(head: str) -> dict[str, list[str]]:
    """The cells of the page's one table whose first line begins with `head`, by the text of the first cell."""
    lines = TEXT.splitlines()
    (start,) = [number for number, line in enumerate(lines) if line.startswith(head)]
    rows: dict[str, list[str]] = {}
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        first, *rest = (cell.strip() for cell in line.strip("|").split("|"))
        assert first not in rows
        rows[first] = rest
    return rows


def _csv(path: str) -> pd.DataFrame:
    return pd.read_csv(ROOT / "docs" / path)


def _is_rounded(text: str, value: float) -> bool:
    """Whether `text` is `value` at the digits that `text` shows; the tables themselves hold six."""
    digits = len(text.partition(".")[2])
    return abs(float(text) - value) <= 0.5 * 10**-digits + 1e-6


def _matches(cell: str, row: pd.Series) -> bool:
    found = re.fullmatch(INTERVAL, cell)
    return found is not None and all(
        _is_rounded(text, row[name]) for text, name in zip(found.groups(), ("difference", "low", "high"), strict=True)
    )


def test_the_study_s_table_is_the_csv_rounded() -> None:
    rows = _csv("study/credit-compared.csv").set_index(["arm", "matched", "column"]).sort_index()
    shown = _table("| arm | seeds | reward at equal updates")
    assert {arm.strip("`") for arm in shown} == set(rows.index.get_level_values("arm"))
    columns = [
        ("updates", "reward/object_redness"),
        ("change", "reward/object_redness"),
        ("reward", "change/selectivity"),
    ]
    for arm, (seeds, *cells) in shown.items():
        for cell, column in zip(cells, columns, strict=True):
            row = rows.loc[(arm.strip("`"), *column)]
            assert int(seeds) == row["seeds"], arm
            assert _matches(cell, row), (arm, column, cell, row.to_dict())


def test_the_clip_s_table_is_the_csv_rounded() -> None:
    gates = _csv("study/credit_clip-gates.csv")
    lines = [line for line in TEXT.splitlines() if re.match(r"\| (none|sample, |position, )", line)]
    assert len(lines) == 6
    for line in lines:
        gate, width, clipped, change, reward = (cell.strip() for cell in line.strip("|").split("|"))
        scope, _, side = gate.rpartition(", ")
        chosen = gates[(gates["gate"] == side) & ((gates["scope"] == scope) | (side == "none"))]
        if side != "none":
            chosen = chosen[chosen["range"] == float(width)]
        (row,) = chosen.to_dict("records")
        share = clipped.removesuffix(" %")
        assert abs(float(share) - 100 * row["clipped"]) <= 0.05 + 1e-6, line
        for cell, name in ((change, "change/total"), (reward, "reward/object_redness")):
            mean, spread = cell.split(" ± ")
            assert _is_rounded(mean, row[name]), line
            assert _is_rounded(spread, row[f"{name}_std"]), line


def test_the_ablation_s_table_is_the_csv_rounded() -> None:
    arms = _csv("ablation/arms.csv").set_index("arm")
    shown = set()
    for names, cells in _table("| arm | reward | right shape").items():
        same = re.findall(r"`([\w.]+)`", names)
        shown |= set(same)
        for arm in same:
            for cell, name in zip(cells, ("reward/object_redness", "reward/scene_shape", "change/total"), strict=True):
                assert _is_rounded(cell, arms.loc[arm, name]), (arm, name, cell)
    assert shown == set(arms.index) - {"base"}


def _intervals() -> Iterator[pd.Series]:
    """Every difference with its interval that the study wrote."""
    for path in (ROOT / "docs/study").glob("*-compared.csv"):
        yield from (row for _, row in pd.read_csv(path).iterrows())
    decision = json.loads((ROOT / "docs/study/decision.json").read_text())
    for item in (*decision["choosing"].values(), decision["confirmed"]):
        yield pd.Series({"difference": item["estimate"], "low": item["low"], "high": item["high"]})


def test_every_interval_of_the_text_is_the_study_s() -> None:
    told = {found[0] for found in re.finditer(INTERVAL, TEXT)}
    assert len(told) > 30
    known = list(_intervals())
    assert [text for text in sorted(told) if not any(_matches(text, row) for row in known)] == []


def test_what_the_pages_say_of_registered_studies_is_their_result() -> None:
    """README, the table of docs/index.md, and those beside the questions."""
    names = ("credit2", "credit2_normalised", "objectives", "objectives_scene")
    known = {
        (name, test["arm"], test["measure"]): pd.Series(test)
        for name in names
        for test in json.loads((ROOT / f"docs/registered/{name}.json").read_text())["tests"]
    }
    sections = {}
    for each in _plain("docs/registered.md").split("\n## "):
        asked, *results = re.split(r"^Result of (?=`)", each, flags=re.MULTILINE)
        # Two experiments of one question have a result each.
        sections |= {part.split("`")[1]: part for part in results or [asked] if part[0] == "`"}
    for name, text in (("credit2", _plain("docs/index.md")), *((name, sections[name]) for name in names)):
        rows = re.findall(rf"^\| `(\w+)`.*?({INTERVAL}) \|.*?({INTERVAL}) \|.*$", text, re.MULTILINE)
        decided = {arm for (one, arm, _), test in known.items() if one == name and test["role"] != "told"}
        assert sorted(row[0] for row in rows) == sorted(decided), name
        for row in rows:
            assert _matches(row[1], known[name, row[0], "area at equal updates"]), (name, row)
            assert _matches(row[5], known[name, row[0], "area at equal change"]), (name, row)
    (told,) = (part for part in _plain("README.md").split("\n\n") if part.startswith("Twenty fresh seeds"))
    cells = [found[0] for found in re.finditer(INTERVAL, told)]
    places = [("credit2", arm) for arm in ("product", "contrast", "vipo", "shuffled_contrast")] + [
        ("credit2_normalised", "vipo")
    ]
    for place, cell in zip(places, cells, strict=True):
        assert _matches(cell, known[*place, "area at equal change"]), (place, cell)


def _plain(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8").replace("**", "")


def test_the_default_gate_is_told_to_be_unconfirmed() -> None:
    """What three seeds suggest is no decision: the page says so wherever it names the default."""
    assert load_config(["experiment=demo"]).objective.gate.scope == "sample"
    assert "Hence `scope: sample`" not in TEXT
    told = [text for text in TEXT.split("\n\n") if "`scope: sample`" in text and "default" in text]
    assert len(told) == 2
    assert all("confirmed" in text for text in told)
