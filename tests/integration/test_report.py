"""The report's files: complete, deterministic, escaped, and honest about what the numbers carry."""

import base64
import hashlib
import json
import re
import shutil
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import av
import numpy as np
import pandas as pd
import pytest
from integration.report_fixture import HOSTILE, PROMPTS, SAMPLES, build_experiment, prompt_id, write_report
from omegaconf import OmegaConf
from PIL import Image

from vipo.config.compose import load_config_file
from vipo.config.published import PublishedConfig
from vipo.evaluation.means import ScoresError
from vipo.evaluation.statistics import paired_difference
from vipo.maps.veil import DIMMING
from vipo.provenance import read_provenance
from vipo.reporting import TIMES, ReportError, build_report, pictures
from vipo.reporting.gallery import NO_PICTURES
from vipo.reporting.inputs import read_experiment
from vipo.reporting.page import render_page
from vipo.reporting.sections.context import Page
from vipo.reporting.summary import summarize
from vipo.stages import report_stage, summarize_stage

Built = tuple[Path, list[str]]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    folder, runs = build_experiment(tmp_path_factory.mktemp("report"))
    write_report(folder, runs, folder / "report")
    return folder, runs


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Three runs: their report takes a part of the time."""
    folder, runs = build_experiment(tmp_path_factory.mktemp("small"), {"base": [0], "grpo": [0], "vipo": [0]})
    write_report(folder, runs, folder / "report")
    return folder, runs


class Collector(HTMLParser):
    """Tags, attributes and text of a page; fails on tags that do not close in order."""

    VOID = frozenset({"meta", "link", "img", "br", "input"})

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self._open: list[str] = []
        self.feed(page)
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_the_page_is_whole_self_contained_and_escaped(built: Built) -> None:
    page = (built[0] / "report" / "index.html").read_text(encoding="utf-8")
    found = Collector(page)
    names = {name for name, _ in found.tags}
    # Its own script, pinned by hash, and data that no browser runs.
    scripts = [attributes.get("type") for name, attributes in found.tags if name == "script"]
    assert scripts == ["application/json", None]
    policy = next(a["content"] for _, a in found.tags if a.get("http-equiv") == "Content-Security-Policy") or ""
    script = page[page.rindex("<script>") + len("<script>") : page.rindex("</script>")]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}';" in policy
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert not {"iframe", "object", "embed", "form"} & names
    for name, attributes in found.tags:
        for key in ("src", "href", "xlink:href"):
            value = attributes.get(key) or "data:,"
            assert value.startswith(("data:", "#")) or (name == "a" and not re.match(r"[a-z]+:|//", value)), value
        assert not any(key.startswith("on") for key in attributes)
    assert "@import" not in page
    assert re.search(r"url\((?!#)", page) is None
    assert HOSTILE in found.texts
    assert all(HOSTILE.startswith(text.removesuffix("...")) for text in found.texts if "<script>" in text)
    for text in PROMPTS[:5]:
        assert text in found.texts
    assert all("alt" in attributes for name, attributes in found.tags if name == "img")
    assert sum(name == "caption" for name, _ in found.tags) == sum(name == "table" for name, _ in found.tags)
    svgs = [attributes for name, attributes in found.tags if name == "svg"]
    assert len(svgs) > 10
    assert all(attributes["role"] == "img" and attributes["aria-label"] for attributes in svgs)
    ids = [attributes["id"] for _, attributes in found.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert "built-in" not in page


def test_files_that_claim_equality_are_equal_and_times_stay_out_of_them(built: Built, tmp_path: Path) -> None:
    folder, runs = tmp_path / "results" / "demo", built[1]
    shutil.copytree(built[0], folder, ignore=shutil.ignore_patterns("report"))
    for path in folder.glob("runs/*/timing.jsonl"):
        path.write_text(path.read_text().replace('"time/total": ', '"time/total": 1'))
    for path in folder.glob("runs/*/provenance.json"):
        path.write_text(json.dumps({**json.loads(path.read_text()), "started": "another day"}))
    write_report(folder, list(reversed(runs)), folder / "report")
    data = folder / "report" / "data"
    names = {path.relative_to(data).as_posix() for path in data.rglob("*") if path.is_file()}
    assert {"report.json", "tables/comparisons.csv", "figures/difference-0.svg"} <= names
    for name in names:
        assert (data / name).read_bytes() == (built[0] / "report" / "data" / name).read_bytes(), name
    assert not re.search(r"\btime\b", (data / "report.json").read_text())
    beside = {path.name for path in (folder / "report").iterdir()}
    assert beside == {"data", "index.html", *TIMES}
    assert (folder / "report" / "time.json").read_bytes() != (built[0] / "report" / "time.json").read_bytes()


def test_prompts_are_counted_by_lines_whatever_they_hold(small: Built, tmp_path: Path) -> None:
    folder, runs = Path(shutil.copytree(small[0], tmp_path / "demo")), small[1]
    config = load_config_file(folder / "evaluation" / "base-s0" / "config.yaml")
    for name, count in (("train", 2), ("eval", 0)):
        lines = '{"text": "a\u2028b\x85c\x0cd"}\n' * count
        (folder / "prompts" / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    assert read_experiment(folder, runs, config).prompt_counts == {"train": 2, "eval": 0}


def test_other_code_and_another_checkout_are_shown(small: Built, tmp_path: Path) -> None:
    folder, runs = Path(shutil.copytree(small[0], tmp_path / "demo")), small[1]
    path = folder / "runs" / "vipo-s0" / "provenance.json"
    record = json.loads(path.read_text())
    made_by = [{"package_sha256": digit * 64, "commit": digit * 40, "dirty": digit == "2"} for digit in "12"]
    checkout = {"commit": "3" * 40, "dirty": True}
    path.write_text(json.dumps(record | {"updates_made_by": made_by, "checkout": checkout}))
    page = write_report(folder, runs, folder / "report").read_text(encoding="utf-8")
    first, second = f"{'1' * 64} (commit {'1' * 40})", f"{'2' * 64} (commit {'2' * 40} with uncommitted changes)"
    assert f"{first}, then {second}" in page
    assert f"{'3' * 40} with uncommitted changes" in page
    assert "Runs were trained by 3 different versions of the vipo package." in page
    assert "The working tree had uncommitted changes." in page


def test_times_and_records_that_are_not_here_are_said_to_be_missing(small: Built, tmp_path: Path) -> None:
    """As after a pull, which brings neither."""
    folder, runs = tmp_path / "demo", small[1]
    shutil.copytree(small[0], folder)
    for run in runs[1:]:
        (folder / "runs" / run / "timing.jsonl").unlink()
        (folder / "runs" / run / "provenance.json").unlink()
    before = {path: path.read_bytes() for path in (folder / "report" / "data").rglob("*.*")}
    page = write_report(folder, runs, folder / "report").read_text(encoding="utf-8")
    assert {path: path.read_bytes() for path in before} == before
    assert {path.name for path in (folder / "report").iterdir()} == {"data", "index.html"}
    listed = ", ".join(run for run in runs if not run.startswith("base"))
    assert f"Not recorded here: {listed}." in page
    assert f"Records of the training are not here for {listed}" in page
    assert "not recorded" in page[page.index('id="provenance"') :]


def test_stages_record_the_seed_of_their_intervals(built: Built, tmp_path: Path) -> None:
    folder = tmp_path / "results" / "demo"
    shutil.copytree(built[0], folder, ignore=shutil.ignore_patterns("report"))
    config = load_config_file(folder / "evaluation" / "vipo-s0" / "config.yaml")
    for stage, place in ((summarize_stage, "report/data"), (report_stage, "report")):
        stage(config, tmp_path, tmp_path / "results")
        assert read_provenance(folder / place / "provenance.json")["seeds"] == [config.evaluation.seed]


def test_what_the_orientation_of_the_maps_rests_on_is_told(small: Built, tmp_path: Path) -> None:
    page = (small[0] / "report" / "index.html").read_text()
    assert re.search(r'aria-label="holds"></span><span>That the rule of orientation .*: measured: AUC \.978', page)
    folder = tmp_path / "demo"
    shutil.copytree(small[0], folder)
    file = folder / "evaluation" / "vipo-s0" / "config.yaml"
    file.write_text(file.read_text().replace("input_size: 96", "input_size: 64"))
    _write_hostile_title(folder / "evaluation" / "base-s0" / "config.yaml")
    page = write_report(folder, small[1], tmp_path / "report").read_text()
    assert re.search(r'aria-label="attention"></span><span>That the rule of orientation .*: not measured here\.', page)
    # Title and question cannot turn the page around.
    head = page[: page.index("<nav")]
    assert head.count("one\\ntwo\\u202egnp") == 2
    assert "\\x1b[2J?" in head
    assert not {"\u202e", "\x1b"} & set(head)


def _write_hostile_title(file: Path) -> None:
    config = OmegaConf.load(file)
    config.experiment.title, config.experiment.question = "one\ntwo\u202egnp", "\x1b[2J?"
    file.write_text(OmegaConf.to_yaml(config), encoding="utf-8")


def test_a_page_is_not_made_of_other_results_than_its_numbers(small: Built, tmp_path: Path) -> None:
    folder, runs = tmp_path / "demo", small[1]
    shutil.copytree(small[0], folder)
    config = load_config_file(folder / "evaluation" / "base-s0" / "config.yaml")
    path = folder / "report" / "data" / "report.json"
    text = path.read_text()
    assert build_report(folder, runs, config, folder / "report").is_file()
    path.write_text(re.sub(r"(\d\.\d{12})\d+", r"\1", text))
    assert path.read_text() != text
    assert build_report(folder, runs, config, folder / "report").is_file()
    scores = folder / "evaluation" / "vipo-s0" / "scores.parquet"
    rows = pd.read_parquet(scores)
    rows.assign(**{"reward/redness": rows["reward/redness"] + 0.01}).to_parquet(scores, index=False)
    with pytest.raises(ReportError, match=r"report\.json: was made from other results; run 'vipo summarize' again"):
        build_report(folder, runs, config, folder / "report")


def test_numbers_are_those_of_the_statistics_and_words_follow(built: Built) -> None:
    folder, runs = built
    report = json.loads((folder / "report" / "data" / "report.json").read_text())
    scores = pd.concat(pd.read_parquet(folder / "evaluation" / run / "scores.parquet") for run in runs)
    final = scores[scores["final"]]
    expected = paired_difference(
        final[final["arm"] == "vipo"], final[final["arm"] == "grpo"], "reward/object_redness",
        resamples=200, confidence=0.95, seed=1234,
    )  # fmt: skip
    first, headline = report["statements"]["headline"]
    assert (first["arm"], first["reference"]) == ("product", "grpo")
    assert (headline["arm"], headline["reference"]) == ("vipo", "grpo")
    assert [headline[key] for key in ("estimate", "low", "high")] == [expected.estimate, expected.low, expected.high]
    assert headline["verdict"] == "no difference shown"
    assert expected.includes_zero
    effects = {(item["arm"], item["column"]): item for item in report["statements"]["side_effects"]}
    assert effects["grpo", "reward/scene_shape"]["verdict"].startswith("lower by 0.1")
    base = {item["arm"]: item["tone"] for item in report["statements"]["against_base"]}
    assert base == {"grpo": "better", "vipo": "better", "product": "better", "inverted": "none"}
    assert any("conditional on these seeds" in text for text in report["caveats"])
    matched = {row["arm"]: row for row in report["tables"]["matched"] if row["seed"] is None}
    assert matched["inverted"]["reached"] is False
    assert matched["inverted"]["update"] is None
    page = (folder / "report" / "index.html").read_text(encoding="utf-8")
    assert "No difference shown: " in page
    assert "not reached" in page
    table = pd.read_csv(folder / "report" / "data" / "tables" / "comparisons.csv")
    assert set(table["update"]) == {8, 16, 24}
    assert set(table["reference"]) == {"base", "grpo", "inverted"}


def test_settings_that_differ_are_shown_and_shared_ones_are_not(built: Built) -> None:
    page = (built[0] / "report" / "index.html").read_text(encoding="utf-8")
    section = page[page.index('id="configuration"') : page.index('id="provenance"')]
    table = section[: section.index("</table>")]
    assert "credit.control" in table
    assert "learning_rate" not in table
    assert "<mark>  control: inverted</mark>" in section
    assert "<mark>  learning_rate" not in section


def test_figures_are_drawings_that_follow_the_readers_colours(built: Built) -> None:
    for path in sorted((built[0] / "report" / "data" / "figures").glob("*.svg")):
        text = path.read_text()
        ElementTree.fromstring(text)
        assert "currentColor" in text, path.name
        assert "prefers-color-scheme: dark" in text.replace("(prefers-color-scheme:dark)", "prefers-color-scheme: dark")
        assert "#010203" not in text, path.name
        assert "#000000" not in text, path.name
        assert "<dc:date>" not in text


def test_five_seeds_get_intervals_over_seeds(tmp_path: Path) -> None:
    folder, runs = build_experiment(tmp_path, {"base": [0], "vipo": [0, 1, 2, 3, 4]})
    write_report(folder, runs, tmp_path / "out")
    report = json.loads((tmp_path / "out" / "data" / "report.json").read_text())
    assert report["statements"]["headline"][0]["note"] == f"over 5 seeds and {len(PROMPTS)} prompts"
    assert not any("conditional" in text for text in report["caveats"])


def test_published_numbers_stand_beside_ours_and_what_was_not_run_says_so(small: Built) -> None:
    config = load_config_file(small[0] / "evaluation" / "base-s0" / "config.yaml")
    experiment = read_experiment(small[0], small[1], config)
    columns = [{"title": name, "metric": f"reward/{name}", "domain": "in"} for name in ("redness", "absent")]
    rows = {
        arm: {"title": f"Their {arm}", "values": [value, None]} for arm, value in (("vipo", 0.5), ("average", 0.309))
    }
    table = PublishedConfig.model_validate({"source": "A paper <b>", "columns": columns, "rows": rows})
    arms = experiment.config.experiment.arms
    more = {"vipo": arms["vipo"].model_copy(update={"seeds": (0, 1, 2)}), "average": arms["vipo"]}
    told = experiment.config.experiment.model_copy(update={"published": table, "arms": {**arms, **more}})
    runs = tuple(replace(run, config=run.config.model_copy(update={"experiment": told})) for run in experiment.runs)
    experiment = replace(experiment, runs=runs)
    summary = summarize(experiment)
    page = render_page(Page(experiment, summary, [], pd.DataFrame(), None, NO_PICTURES))
    section = page[page.index('id="published"') : page.index('id="matched"')]
    assert "A paper &lt;b&gt;" in section
    cells = re.findall(r'<td class="n">(.*?)</td>', section)
    ours = float(summary.arms.set_index("arm").loc["vipo", "reward/redness"])
    assert cells[0::2] == ["0.500", "not published", "0.309", "not published"]
    seeds = int(summary.arms.set_index("arm").loc["vipo", "seed_count"])
    assert cells[1] == f"{ours:.4f} ({seeds} of 3 seeds)"
    assert cells[3::2] == ["not measured", "not run", "not run"]


def test_videos_are_films_with_their_maps_over_time(tmp_path: Path) -> None:
    """Two latent frames of a causal codec, 1 + 4 pictures: each dimmed by the map of its own latent frame."""
    frames = [np.full((20, 30, 3), 40 * number + 40, np.uint8) for number in range(5)]
    heat = np.stack([np.zeros((4, 6)), np.ones((4, 6))]).astype(np.float32)
    heat[0, 0, 0] = heat[1, 0, 0] = 1
    store = pictures._Store()
    shown = pictures._encoded(frames, 8.0, heat, [[0, 1], [1, 5]], store)
    decoded = {}
    for name in ("film", "veiled_film"):
        path = tmp_path / f"{name}.webm"
        path.write_bytes(store._files[getattr(shown, name)])
        with av.open(str(path)) as film:
            assert film.streams.video[0].average_rate == 8
            decoded[name] = [frame.to_ndarray(format="rgb24") for frame in film.decode(video=0)]
    assert len(decoded["film"]) == len(decoded["veiled_film"]) == 5
    for number, (plain, veiled) in enumerate(zip(decoded["film"], decoded["veiled_film"], strict=True)):
        assert plain.mean() == pytest.approx(40 * number + 40, abs=4)
        middle = veiled[40:, 40:].mean()
        # The first latent frame's map is 0 there, the second one's 1.
        expected = (1 - DIMMING) * 40 if number == 0 else 40 * number + 40
        assert middle == pytest.approx(expected, abs=6)
    # What stands still until it plays is dimmed, too.
    poster = tmp_path / "poster.webp"
    poster.write_bytes(store._files[str(shown.veiled_picture)])
    with Image.open(poster) as still:
        assert np.asarray(still)[10:, 15:].mean() == pytest.approx((1 - DIMMING) * 40, abs=6)
    again = pictures._Store()
    assert pictures._encoded(frames, 8.0, heat, [[0, 1], [1, 5]], again) == shown


def _remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def _write(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text) and None


def _scores(change: Callable[[pd.DataFrame], pd.DataFrame]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / "evaluation" / "vipo-s0" / "scores.parquet"
        change(pd.read_parquet(path)).to_parquet(path, index=False)

    return apply


def test_samples_without_a_score_are_left_out_and_told(tmp_path: Path) -> None:
    folder, runs = build_experiment(tmp_path, {"base": [0], "grpo": [0], "vipo": [0]})
    path = folder / "evaluation/vipo-s0/scores.parquet"
    scores = pd.read_parquet(path)
    lacking = scores["final"] & (scores["prompt_id"] == prompt_id(PROMPTS[3])) & (scores["sample"] == 0)
    assert lacking.sum() == 1
    scores.assign(**{"reward/redness": scores["reward/redness"].where(~lacking)}).to_parquet(path)
    page = write_report(folder, runs, folder / "report").read_text()
    numbers = json.loads((folder / "report/data/report.json").read_text())
    assert numbers["labels"]["reward/redness"] == "redness (1 sample left out)"
    assert numbers["labels"]["reward/object_redness"] == "object redness"
    told = f"1 of {len(PROMPTS) * SAMPLES} samples have no score and are left out"
    assert any(told in caveat for caveat in numbers["caveats"])
    assert page.count("redness (1 sample left out)") > 5
    data = json.loads(page.split('id="page-data">')[1].split("</script>")[0])
    place = [column["key"] for column in data["columns"]].index("reward/redness")
    for run in runs:
        assert data["prompts"][prompt_id(PROMPTS[3])][run][-1]["s"][place] is None
        assert data["prompts"][prompt_id(PROMPTS[5])][run][-1]["s"][place] is not None
    # Of a metric that nothing is left of, the page says that it is not told.
    scores.assign(**{"reward/redness": float("nan")}).to_parquet(path)
    write_report(folder, runs, folder / "report")
    numbers = json.loads((folder / "report/data/report.json").read_text())
    assert "reward/redness" not in numbers["labels"]
    assert any(caveat.startswith("Redness is not told") for caveat in numbers["caveats"])
    scores.assign(**{"reward/object_redness": float("nan")}).to_parquet(path)
    with pytest.raises(ReportError, match=r"fewer than two prompts have a score of reward/object_redness"):
        write_report(folder, runs, folder / "report")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_remove("evaluation/vipo-s0/config.yaml"), r"vipo-s0/config\.yaml: cannot be read .* evaluate vipo-s0 first"),
        (_write("evaluation/vipo-s0/config.yaml", "vipo: ["), r"vipo-s0/config\.yaml: is not valid YAML"),
        (_remove("runs/vipo-s0/metrics.jsonl"), r"vipo-s0/metrics\.jsonl: cannot be read"),
        (_write("runs/vipo-s0/metrics.jsonl", '{"update": 1}\n{"upd'), r"metrics\.jsonl, line 2: is not JSON"),
        (_write("runs/vipo-s0/metrics.jsonl", ""), r"metrics\.jsonl: holds no update"),
        (_write("prompts/manifest.json", "[]"), r"manifest\.json: holds no JSON object"),
        (_remove("evaluation/vipo-s0/scores.parquet"), r"scores\.parquet: missing; evaluate vipo-s0 first"),
        (_write("evaluation/vipo-s0/scores.parquet", "PAR1"), r"scores\.parquet: cannot be read"),
        (_scores(lambda rows: rows.drop(columns="change/total")), r"no column change/total"),
        (_scores(lambda rows: rows.drop(columns="reward/redness")), r"columns .* are not those of base-s0"),
        (_scores(lambda rows: rows.drop(columns="reward/object_redness")), r"'object_redness' was not evaluated"),
        (_scores(lambda rows: rows.assign(**{"reward/redness": float("inf")})), r"reward/redness are not finite"),
        (_scores(lambda rows: rows.assign(**{"change/total": "x"})), r"change/total: no numbers"),
        (_scores(lambda rows: rows.assign(run="grpo-s0")), r"holds rows of \['grpo-s0'\], not of vipo-s0"),
        (_scores(lambda rows: rows[rows["prompt_id"] != prompt_id(PROMPTS[3])]), r"no row for \(.*cannot be paired"),
    ],
)
def test_a_missing_or_damaged_input_is_named_and_the_old_report_stays(
    built: Built, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    folder = tmp_path / "demo"
    shutil.copytree(built[0], folder)
    kept = [folder / "report" / name for name in ("data/report.json", "index.html")]
    before = [path.read_bytes() for path in kept]
    damage(folder)
    with pytest.raises((ReportError, ScoresError), match=message):
        write_report(folder, ["base-s0", "grpo-s0", "vipo-s0"], folder / "report")
    assert [path.read_bytes() for path in kept] == before


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_remove(f"samples/vipo-s0/pictures/u24-{prompt_id(HOSTILE)}-0.png"), r"\.png: cannot be read"),
        (_write("evaluation/vipo-s0/maps.safetensors", "x"), r"maps\.safetensors: cannot be read"),
        (_write("runs/vipo-s0/timing.jsonl", "{"), r"timing\.jsonl, line 1: is not JSON"),
    ],
)
def test_a_page_whose_pictures_or_times_are_damaged_leaves_the_old_one(
    small: Built, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    folder = tmp_path / "demo"
    shutil.copytree(small[0], folder)
    config = load_config_file(folder / "evaluation" / "base-s0" / "config.yaml")
    before = (folder / "report" / "index.html").read_bytes()
    damage(folder)
    with pytest.raises(ReportError, match=message):
        build_report(folder, small[1], config, folder / "report")
    assert (folder / "report" / "index.html").read_bytes() == before


def test_runs_must_be_named_and_comparable(built: Built) -> None:
    for runs, message in (
        (["base-s0", "../vipo-s0"], "not of the form"),
        (["vipo-s0"], "none is of arm 'base'"),
        (["base-s0"], "only the base"),
    ):
        with pytest.raises(ReportError, match=message):
            write_report(built[0], runs, built[0] / "elsewhere")
    assert not (built[0] / "elsewhere").exists()
