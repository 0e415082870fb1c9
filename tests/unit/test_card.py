"""The model card: whatever a prompt holds, the page shows exactly it and the metadata reads back."""

import dataclasses
import html.parser
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from vipo.config.compose import load_config
from vipo.config.run import Config
from vipo.config.training import LoraConfig
from vipo.evaluation.statistics import Interval
from vipo.generators.lora import LORA_FILE
from vipo.handover.card import CardSample, Licence, ScoreRow, escape_markdown, model_card
from vipo.handover.comfyui import ComfyFiles
from vipo.prompts.prompt import clean_text
from vipo.text import visible

CONFIG = load_config(["experiment=demo", "arm=vipo"])
RECORD = {
    "inputs": [],
    "versions": {"vipo": "0.1.0"},
    "package_sha256": "ab" * 32,
    "git": {"commit": "cd" * 20, "dirty": False},
}
HOSTILE = [
    "<script>alert(1)</script> & \"quoted\" 'single' {{ 7 * 7 }} {% raw %}",
    "a | b || c \\| d",
    "`code` **bold** _em_ ~~gone~~ $x$ [link](http://x.y) ![i](a.png) <b>",
    "--- # heading - item 1. item > quote www.example.org a@b.c :smile: @user #12",
    "‮right to left‬ مربع كبير 🎨",
    "&lt;b&gt; &#91; \\u202e",
    "\x1b[2Jcleared\x07",
    "key: value, 'yaml' \"too\" - [x] {y: z} !!python/object:os.system %TAG *a &b",
    "averylongwordwithoutanybreak" * 30,
]
APACHE = Licence(None, "apache-2.0", None, None, ())
TEXTS = st.text(min_size=1, max_size=60).map(clean_text).filter(bool)


class _Text(html.parser.HTMLParser):
    """Text and tags of a rendered page."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.cells: list[str] = []
        self.tags: list[str] = []
        self._inside = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        if tag == "td":
            self.cells.append("")
            self._inside = True

    def handle_endtag(self, tag: str) -> None:
        self._inside = self._inside and tag != "td"

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.cells[-1] += data


def _cell(text: str) -> _Text:
    return _Text(MarkdownIt("gfm-like", {"linkify": False}).render(f"| a |\n|---|\n| {escape_markdown(text)} |\n"))


def _card(prompt: str, licence: Licence = APACHE, config: Config = CONFIG, **changes: Any) -> ModelCard:
    interval = Interval(0.1, 0.05, 0.2, "prompts", "conditional on these seeds")
    lower = dataclasses.replace(interval, estimate=-0.1, low=-0.2, high=-0.05)
    scores = [
        ScoreRow("reward/object_redness", 0.2, 0.3, interval, "higher"),
        ScoreRow("reward/scene_shape", 0.9, 0.8, lower, None),
        ScoreRow("change/total", 0.0, 0.1, interval, None),
    ]
    samples = [CardSample(prompt, "samples/base-0a-0.png", "samples/0a-0.png", Path(), Path())]
    arguments = {"counts": (40, 2), "pipeline_class": "FluxPipeline", "hub_id": None, "revision": None}
    arguments |= {"loras": (LORA_FILE,)}
    return model_card(config, RECORD, scores, samples, licence, **(arguments | changes))


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_texts_are_shown_as_they_are(text: str) -> None:
    shown = _cell(text)
    assert shown.tags == ["table", "thead", "tr", "th", "tbody", "tr", "td"]
    assert shown.cells == [visible(text)]


@pytest.mark.parametrize(
    ("family", "pipeline", "line"),
    [
        ("qwen_image", "QwenImagePipeline", "    true_cfg_scale=3.5,\n"),
        ("qwen_image_21", "QwenImage21Pipeline", "    true_cfg_scale=3.5,\n"),
        ("sana", "SanaPipeline", "    use_resolution_binning=False,\n"),
        (
            "hunyuan_video",
            "HunyuanVideo15Pipeline",
            'pipeline.transformer.load_lora_adapter(folder, weight_name="pytorch_lora_weights.safetensors", prefix="tr',
        ),
        (
            "hunyuan_video",
            "HunyuanVideo15Pipeline",
            "pipeline.guider = ClassifierFreeGuidance(guidance_scale=3.5)\n",
        ),
        ("ltx2", "LTX2Pipeline", "forced = {'isolate_modalities': True}  #"),
        ("ltx2", "LTX2Pipeline", "    modality_scale=1.0,\n"),
        ("flux2_dev", "Flux2Pipeline", "    prompt='a fox',\n"),
    ],
)
def test_the_stock_call_is_the_adapters(family: str, pipeline: str, line: str) -> None:
    generator = CONFIG.generator.model_copy(update={"family": family, "guidance_scale": 3.5})
    training = CONFIG.training.model_copy(update={"lora": LoraConfig(rank=2)})
    config = CONFIG.model_copy(update={"generator": generator, "training": training})
    assert line in str(_card("a fox", config=config, pipeline_class=pipeline))


@given(TEXTS)
def test_any_text_is_shown_as_it_is(text: str) -> None:
    assert escape_markdown(escape_markdown(text)) == escape_markdown(text)
    assert _cell(text).cells == [visible(text)]


@pytest.mark.parametrize("prompt", HOSTILE)
def test_a_hostile_prompt_changes_nothing_around_it(prompt: str) -> None:
    card = _card(prompt)
    assert card.data["widget"] == [{"text": prompt, "output": {"url": "samples/0a-0.png"}}]
    page = _Text(MarkdownIt("gfm-like", {"linkify": False}).render(card.text))
    plain = _Text(MarkdownIt("gfm-like", {"linkify": False}).render(_card("a fox").text))
    assert page.tags == plain.tags
    # The example is Python that draws exactly this prompt.
    code = card.text.split("```python\n")[1].split("\n```")[0]
    compile(code, "card", "exec")
    assert repr(prompt) in code


@given(TEXTS)
@settings(max_examples=50)
def test_metadata_reads_back(prompt: str) -> None:
    card = _card(prompt)
    again = ModelCard(str(card), ignore_metadata_errors=False)
    assert again.data.to_dict() == card.data.to_dict()
    assert again.data["widget"][0]["text"] == prompt
    assert [result.metric_type for result in again.data.eval_results] == ["object_redness", "scene_shape"]


def test_what_got_worse_is_said() -> None:
    text = _card("a fox").text
    assert "these are lower than the base's and their interval excludes zero: scene_shape." in text
    assert "| object_redness (trained) | 0.2 | 0.3 | +0.100 | +0.050 to +0.200 | better by 0.100 |" in text
    assert "commit " + "cd" * 20 in text


@pytest.mark.parametrize(
    ("licence", "metadata", "said"),
    [
        (Licence(None, "mit", None, None, ()), {"license": "mit"}, "states its licence: mit."),
        (
            Licence(None, "other", "acme-terms", "LICENSE.md", ("LICENSE.md",)),
            {"license": "other", "license_name": "acme-terms", "license_link": "LICENSE.md"},
            "states its licence: acme-terms.",
        ),
        (Licence("apache-2.0", None, None, None, ()), {"license": "apache-2.0"}, "states no licence."),
        (Licence("cc-by-4.0", "mit", None, None, ("NOTICE",)), {"license": "cc-by-4.0"}, "named cc-by-4.0 for it."),
    ],
)
def test_licence(licence: Licence, metadata: dict[str, str], said: str) -> None:
    card = _card("a fox", licence)
    found = card.data.to_dict()
    assert {key: value for key, value in found.items() if key.startswith("license")} == metadata
    assert said in card.text
    assert all(f"[{name}]({name})" in card.text for name in licence.files)


def test_every_code_that_trained_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "Trained by vipo 0.1.0, package abababababab, commit " + "cd" * 20 + "; exported" in _card("a fox").text
    unknown = {"package_sha256": None, "commit": None, "dirty": None}
    second = {"package_sha256": "12" * 32, "commit": "ef" * 20, "dirty": True}
    monkeypatch.setitem(RECORD, "updates_made_by", [unknown, second])
    told = "package not recorded, commit not recorded, then by package 121212121212, commit " + "ef" * 20
    assert f"0.1.0, {told} with uncommitted changes; exported" in _card("a fox").text


def test_a_base_of_the_hub_is_named_with_its_revision() -> None:
    card = _card("a fox", hub_id="acme/base", revision="0123abc")
    assert (card.data.base_model, card.data["base_model_relation"]) == ("acme/base", "finetune")
    assert "acme/base at revision 0123abc" in card.text


def test_for_comfyui_the_card_says_which_file_is_for_which_model() -> None:
    names, levels = ("a.safetensors", "b.safetensors"), ("high-noise", "low-noise")
    text = _card("a fox", comfyui=ComfyFiles(names, levels, "models/loras", 4, 4)).text
    assert "\n`a.safetensors` is for the high-noise model.\n`b.safetensors` is for the low-noise model.\n" in text
    assert "-noise model" not in _card("a fox", comfyui=ComfyFiles(names[:1], (), "models/loras", 4, 4)).text


def test_the_card_names_what_training_started_from() -> None:
    generator = CONFIG.generator.model_copy(update={"start": "results/a/runs/b-s0", "file": "one.safetensors"})
    text = _card("a fox", config=CONFIG.model_copy(update={"generator": generator})).text
    assert "| Started from | results/a/runs/b-s0 |\n| Network's file before | one.safetensors |\n| Reward" in text
    assert "and from this model.\nThe base is here what training started from, not " in text
    assert "Started" not in _card("a fox").text
    assert "training started from" not in _card("a fox").text
