"""The meter on a generator of 40 weights: what it must rank, what it must count, and that it resumes."""

import json
import math
import re
import shutil
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from torch import Tensor
from toy_generator import ToyGenerator, left_redness

from vipo.config.compose import load_config
from vipo.config.meter import MeterConfig, check_checkpoints, measured_weights, measurement_label
from vipo.config.sampling import SamplingConfig
from vipo.config.validation import ConfigError
from vipo.credit.meter.directions import Change, Directions, moved_by
from vipo.credit.meter.gradients import MeterError
from vipo.credit.meter.held_out import HeldOut
from vipo.credit.meter.measure import measure_reference, measure_updates
from vipo.credit.meter.plan import Plan, Record
from vipo.credit.meter.result import summarise
from vipo.credit.meter.space import CountSketch, Whole
from vipo.credit.meter.stored import read_stored
from vipo.credit.meter.subject import Group, Subject, chain_rewards, drawn_prompts, sample_chains
from vipo.credit.meter.table import table
from vipo.evaluation.meter import write_result
from vipo.provenance.parts import load_json, save_json, save_tensors
from vipo.reporting.credit import draw_credit
from vipo.reporting.measured import credit_section, measurement_files
from vipo.sampling.chain import sampling_chain
from vipo.stages import checkpoint_label

PROMPTS = [SimpleNamespace(id=f"p{i}", text=f"prompt {i}", metadata={}) for i in range(5)]
HELD_OUT = [SimpleNamespace(id=f"h{i}", text=f"held-out {i}", metadata={}) for i in range(4)]
NAMES = ["grpo", "oracle", "inverted"]
PLAN = Plan(
    update_groups=2, updates=6, reference_batches=6, blocks=3, stepped=2, held_out=3, held_out_samples=2, size="kl",
    change=None,
)  # fmt: skip


def _subject() -> Subject:
    generator = ToyGenerator()
    chain = sampling_chain(SamplingConfig(steps=5, shift=2.0, transition="flow", eta=0.7), "velocity")
    return Subject(
        generator,
        dict(generator.network.named_parameters()),
        chain,
        range(4),
        {prompt.id: {"shift": torch.tensor(0.1 * i)} for i, prompt in enumerate([*PROMPTS, *HELD_OUT])},
        {"left": left_redness},
        {"left": 1.0},
        seed=0,
        group_size=4,
        micro_batch=2,
    )


def _placed(subject: Subject, groups: Sequence[Group]) -> dict[str, Tensor]:
    """GRPO; all on the half that the reward reads; all on the other half."""
    own = []
    for group in groups:
        reward = chain_rewards(subject, group.batches)["left"]
        own.append((reward - reward.mean()) / (reward.std() + 1e-4))
    advantages = torch.cat(own).reshape(-1, 1, 1, 1)
    left = torch.tensor([1.0, 1.0, 0.0, 0.0]).expand(1, 1, 4, 4)
    return {
        "grpo": advantages.expand(-1, 1, 4, 4),
        "oracle": advantages * left,
        "inverted": advantages * (1 - left),
    }


def _directions(subject: Subject, kinds: Sequence[str] = ("sgd", "sign", "optimizer")) -> Directions:
    optimizer = torch.optim.AdamW(subject.parameters.values(), lr=1e-3)
    return Directions(kinds, subject.parameters, optimizer, 1.0)


def _measure(folder: Path, plan: Plan = PLAN, stop_after: int | None = None) -> tuple[list[Record], object]:
    subject, space = _subject(), Whole(40)
    assert subject.size == 40

    def advance(records: Sequence[Record]) -> None:
        if stop_after is not None and len(records) == stop_after:
            raise KeyboardInterrupt

    reference = (
        measure_reference(subject, HELD_OUT, plan, space, folder, lambda: None) if plan.reference_batches else None
    )
    records = measure_updates(
        subject,
        PROMPTS,
        HELD_OUT,
        NAMES,
        lambda groups: _placed(subject, groups),
        _directions(subject),
        plan,
        space,
        reference,
        folder,
        advance,
    )
    return records, reference


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("meter")


@pytest.fixture(scope="module")
def measured(whole: Path) -> tuple[list[Record], object]:
    return _measure(whole)


def test_the_oracle_beats_grpo_and_the_inverted_map_loses(tmp_path: Path) -> None:
    """The reward reads the left half alone: what the right half adds is noise."""
    plan = Plan(2, 30, 24, 6, 0, 1, 1, "kl", None)
    result = summarise(*_measure(tmp_path, plan))
    found = {(along.source, along.kind): along for along in result.pathwise}
    for kind in ("sgd", "sign", "optimizer"):
        assert found["inverted", kind].ratio.value < 1 < found["oracle", kind].ratio.value, kind
        itself = found["grpo", kind].ratio
        assert (itself.value, itself.error) == (1.0, 0.0)
    assert found["inverted", "sgd"].ratio.high < 1 < found["oracle", "sgd"].ratio.low
    assert found["oracle", "sgd"].difference.low > 0
    assert found["grpo", "sgd"].value.tells_sign
    assert 0 < found["grpo", "sgd"].value.value < 1
    assert result.reliability > 0.5
    assert result.directional == []
    assert sum(at.share.value for at in result.steps if at.source == "grpo") == pytest.approx(1.0)
    # A ratio to within what is known already takes what was measured; half of it takes four times as much.
    half = summarise(*_measure(tmp_path, plan), width=result.needed.width / 2).needed
    assert half.updates == pytest.approx(4 * result.needed.updates, abs=4)


def test_cosines_are_those_of_the_vectors(measured: tuple[list[Record], object]) -> None:
    records, reference = measured
    result = summarise(records, reference)
    mean = reference.means.double().mean(dim=0)
    gram = reference.means.double() @ reference.means.double().T
    length = math.sqrt(float(gram.sum() - gram.trace()) / 6)
    assert result.reference_length == pytest.approx(length)
    subject = _subject()
    from vipo.credit.meter.gradients import flat, update_gradients
    from vipo.credit.meter.subject import sample_group

    cosines = []
    for number in range(6):
        groups = [
            sample_group(subject, "update", 2 * number + place, prompt)
            for place, prompt in enumerate(drawn_prompts(PROMPTS, 0, "update", 2 * number, 2))
        ]
        whole, advantages = torch.zeros(40, dtype=torch.float64), _placed(subject, groups)["oracle"][:, 0]
        for step in range(4):
            for place, group in enumerate(groups):
                for batch in group.batches:
                    here = {"oracle": advantages[[4 * place + row for row in batch.rows]]}
                    parameters = list(subject.parameters.values())
                    ((_, own),) = update_gradients(subject.generator, batch, subject.chain, step, parameters, here)
                    whole += flat(own).double()
        cosines.append(float(whole @ mean / whole.norm()) / length)
    (found,) = [along for along in result.pathwise if (along.source, along.kind) == ("oracle", "sgd")]
    assert found.value.value == pytest.approx(sum(cosines) / 6, rel=1e-4)


def test_a_step_gains_what_the_gradient_predicts(tmp_path: Path) -> None:
    """Both estimators of one truth: on the held-out samples' own gradient, small steps gain what it says."""
    subject, plan = _subject(), Plan(2, 1, 0, 1, 1, 4, 4, "weights", 1e-3)
    tested = HeldOut(subject, HELD_OUT, plan)
    chosen = drawn_prompts(HELD_OUT, 0, "held-out", 0, 4)
    batches = sample_chains(subject, "held-out", 0, [(prompt, index) for prompt in chosen for index in range(4)])
    from vipo.credit.meter.gradients import flat, pathwise_gradients, total_gradient

    gradient = torch.zeros(40)
    for batch in batches:
        given = total_gradient(subject.generator, batch, subject.rewards, subject.weights)
        for _, own in pathwise_gradients(
            subject.generator,
            batch,
            subject.chain,
            subject.stochastic,
            list(subject.parameters.values()),
            given,
        ):
            gradient += flat(own) * len(batch.rows) / 16
    for direction in (gradient, torch.randn(40, generator=torch.Generator().manual_seed(0))):
        step, change = tested.change.scaled(direction, 1e-2)
        assert change == pytest.approx(1e-2, rel=0.01)
        gained = sum(tested.gains(step)) / 4
        assert gained == pytest.approx(float(step @ gradient), rel=0.1, abs=1e-4)


def test_every_step_changes_the_policy_by_as_much(measured: tuple[list[Record], object]) -> None:
    records, _ = measured
    kinds = [
        kind for record in records[:2] for source in record["sources"].values() for kind in source["kinds"].values()
    ]
    assert len(kinds) == 18
    assert all(kind["step"]["change"] == pytest.approx(records[0]["change"], rel=0.011) for kind in kinds)
    assert all(len(kind["step"]["gains"]) == 3 for kind in kinds)
    assert "step" not in records[2]["sources"]["grpo"]["kinds"]["sgd"]


def test_the_change_is_the_kl_divergence_of_the_transitions() -> None:
    subject = _subject()
    batches = sample_chains(subject, "probe", 0, [(prompt, index) for prompt in PROMPTS for index in range(2)])
    step = 1e-2 * torch.randn(40, generator=torch.Generator().manual_seed(1))
    squares, count = 0.0, 0
    for batch in batches:
        for place, row in enumerate(batch.rows):
            t = row % 4
            latents = batch.trajectory.latents[place : place + 1, t]
            shift = {"shift": batch.conditioning["shift"][place : place + 1]}
            means = []
            for moved in (torch.zeros(40), step):
                with moved_by(list(subject.parameters.values()), moved), torch.no_grad():
                    velocity = subject.generator.predict(latents, subject.chain.times[t : t + 1], shift)
                means.append(subject.chain.gaussian(latents, velocity, torch.tensor([t])))
            normal = [torch.distributions.Normal(mean, std) for mean, std in means]
            divergence = torch.distributions.kl_divergence(normal[1], normal[0])
            squares, count = squares + float(divergence.sum()), count + divergence.numel()
    assert Change(subject, "kl", batches).of(step) == pytest.approx(math.sqrt(squares / count), rel=1e-4)
    assert Change(subject, "weights", batches).of(step) == pytest.approx(float(step.norm()))


def test_a_step_leaves_weights_and_optimizer_as_they_were() -> None:
    subject = _subject()
    before = torch.nn.utils.parameters_to_vector(subject.parameters.values()).clone()
    directions, gradient = _directions(subject), torch.linspace(-1, 1, 40)
    moved = directions("optimizer", gradient)
    assert torch.equal(torch.nn.utils.parameters_to_vector(subject.parameters.values()), before)
    assert torch.equal(directions("optimizer", gradient), moved)
    assert all(value.grad is None for value in subject.parameters.values())
    # AdamW's first step has the size of its rate whatever the gradient, upwards, beside the decay of the weights.
    torch.testing.assert_close(moved + 1e-5 * before, 1e-3 * gradient.sign(), atol=1e-6, rtol=1e-3)
    with pytest.raises(MeterError, match="before its first step"):
        Directions(("optimizer",), subject.parameters)("optimizer", gradient)


def test_a_killed_measurement_resumes_to_the_same_numbers(
    measured: tuple[list[Record], object], tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        _measure(tmp_path, stop_after=1)
    # Also in the middle of the reference: two of six batches are lost.
    (tmp_path / "reference-1.safetensors").unlink()
    records, reference = _measure(tmp_path)
    assert json.dumps(records) == json.dumps(measured[0])
    assert torch.equal(reference.means, measured[1].means)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("update-0.json", lambda told: told["sources"].update(grpo=3)),
        ("update-0.json", lambda told: told.pop("change")),
        ("update-0.json", lambda told: told["sources"].pop("grpo")),
        ("update-0.json", lambda told: told["sources"].pop("oracle")),
        ("update-0.json", lambda told: [own["kinds"].pop("sign") for own in told["sources"].values()]),
        ("update-0.json", lambda told: [own["steps"].popitem() for own in told["sources"].values()]),
        ("update-1.json", lambda told: told["sources"].pop("oracle")),
        ("update-1.json", lambda told: told["sources"]["grpo"]["kinds"]["sgd"]["step"]["gains"].pop()),
        ("update-2.json", lambda told: told["sources"]["grpo"]["kinds"]["sign"]["products"].append(0.0)),
        ("update-2.json", lambda told: told["sources"]["oracle"]["steps"]["0"].update(norm="x")),
        ("update-3.json", lambda told: told["sources"]["grpo"].update(norm="x")),
        ("reference-0.safetensors", {"sum": torch.zeros(39), "batches": torch.tensor(1)}),
        ("reference-0.safetensors", {"sum": torch.full((40,), math.inf), "batches": torch.tensor(1)}),
        ("reference-1.safetensors", {"sum": torch.zeros(40), "batches": torch.tensor(9)}),
        ("reference-2.safetensors", {"sum": torch.zeros(40), "batches": torch.tensor([1, 1])}),
    ],
)
def test_a_part_of_damaged_content_is_named_and_measured_again(
    measured: tuple[list[Record], object], whole: Path, tmp_path: Path, name: str, damage: Any,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    if callable(damage):
        told = load_json(tmp_path / name)
        damage(told)
        save_json(told, tmp_path / name)
    else:
        save_tensors(damage, tmp_path / name)
    records, reference = _measure(tmp_path)
    assert json.dumps(records) == json.dumps(measured[0])
    assert torch.equal(reference.means, measured[1].means)
    (message,) = (message for message in caplog.messages if "is damaged" in message)
    assert name in message


def _of_two_updates(folder: Path, share: Callable[[int], float]) -> list[Record]:
    """Of GRPO's advantages times what the number of the update gives."""
    subject = _subject()
    return measure_updates(
        subject,
        PROMPTS,
        HELD_OUT,
        ["grpo"],
        lambda groups: {"grpo": _placed(subject, groups)["grpo"] * share(groups[0].number // 2)},
        _directions(subject),
        Plan(2, 2, 0, 1, 2, 2, 1, "kl", None),
        Whole(40),
        None,
        folder,
        lambda records: None,
    )


def test_an_update_of_equal_rewards_takes_no_step_where_another_does(tmp_path: Path) -> None:
    """Not even the optimizer's, whose weight decay would."""
    other, empty = (
        record["sources"]["grpo"]["kinds"] for record in _of_two_updates(tmp_path, lambda number: 1 - number)
    )
    for kind in ("sgd", "sign", "optimizer"):
        assert other[kind]["step"]["length"] > 0
        assert (empty[kind]["length"], empty[kind]["step"]["length"]) == (0, 0)
        assert empty[kind]["step"]["gains"] == [0, 0]


def test_equal_rewards_push_nowhere(tmp_path: Path) -> None:
    records = _of_two_updates(tmp_path, lambda number: 0)
    assert all(record["change"] is None for record in records)
    result = summarise(records, None)
    assert all(along.value.value == 0 for along in result.directional)
    assert "cannot be told from zero" in table(result, "kl")
    draw_credit(result)


def test_a_sketch_takes_no_steps(tmp_path: Path) -> None:
    subject = _subject()
    with pytest.raises(MeterError, match="memory_mb"):
        measure_updates(
            subject, PROMPTS, HELD_OUT, NAMES, lambda groups: _placed(subject, groups), _directions(subject), PLAN,
            CountSketch(40, 16, 0), None, tmp_path, lambda records: None,
        )  # fmt: skip


def test_the_table_and_the_json_say_what_was_found(measured: tuple[list[Record], object]) -> None:
    result = summarise(*measured)
    text = table(result, "kl")
    assert "6 updates, 6 reference batches" in text
    assert "oracle" in text
    assert "Over 18 steps" in text
    assert "For a ratio to within 0.3" in text
    assert "± is half of the 95 % interval" in text
    assert "± is half of the 68 % interval" in table(result, "kl", 0.68)
    drawn = draw_credit(result, 0.68)
    assert "bars are 68 % intervals" in drawn.caption
    assert "oracle sgd" in drawn.alternative
    assert ElementTree.fromstring(drawn.svg).tag.endswith("svg")
    read = json.loads(json.dumps(result.as_json(), allow_nan=False))
    assert read["pathwise"][1]["source"] == "oracle"
    assert read["pathwise"][1]["ratio"]["value"] == result.pathwise[1].ratio.value


def test_what_is_needed_is_told_of_rewards_without_gradient_too(measured: tuple[list[Record], object]) -> None:
    result = summarise(measured[0], None, width=0.01)
    assert result.needed is not None
    assert result.needed.of == "held-out prompts"
    errors = {(along.source, along.kind): along.ratio.error for along in result.directional if along.source != "grpo"}
    assert max(errors, key=errors.get) == (result.needed.source, result.needed.kind)
    updates = (1.959964 * max(errors.values()) / 0.01) ** 2 * 2
    assert result.needed.updates == pytest.approx(updates, rel=1e-5)


def test_costs_are_told_by_source_where_there_are_any(measured: tuple[list[Record], object]) -> None:
    result = summarise(*measured)
    assert "cost of each sample" not in table(result, "kl")
    costed = replace(result, costs={"grpo": {}, "oracle": {"backbone_calls": 1, "bytes_kept": 2048}})
    lines = table(costed, "kl").splitlines()
    place = next(n for n, line in enumerate(lines) if line.startswith("cost of each sample"))
    assert lines[place + 1].split() == ["source", "backbone", "calls", "bytes", "kept"]
    assert [line.split() for line in lines[place + 2 : place + 4]] == [["grpo", "0", "0"], ["oracle", "1", "2048"]]


def test_the_pages_section_has_what_the_file_has(measured: tuple[list[Record], object], tmp_path: Path) -> None:
    result = replace(summarise(*measured), costs={"grpo": {}, "oracle": {"decodes": 1}})
    meter = MeterConfig(checkpoints=["base", "grpo-s0@12"], arms=["grpo"])
    folder = tmp_path / "credit/base"
    folder.mkdir(parents=True)
    write_result(result, {"grpo": load_config(["experiment=demo", "arm=grpo"])}, meter, folder / "credit.json")
    assert read_stored(folder / "credit.json").result.as_json() == result.as_json()
    assert measurement_files(tmp_path, meter) == [folder / "credit.json"]
    section = credit_section(tmp_path, meter)
    environment = Environment(loader=PackageLoader("vipo.reporting"), autoescape=True, undefined=StrictUndefined)
    page = environment.get_template("sections/credit.html.j2").render(credit=section)
    found = next(a for a in result.pathwise if (a.source, a.kind) == ("oracle", "sgd"))
    value, ratio = f"{found.value.value:.4f} ±", f"{found.ratio.value:.2f} ±"
    assert re.search(rf"oracle</th><td>sgd</td><td class=\"n\">{value}.*?</td><td class=\"n\">\(?{ratio}", page)
    assert "<svg" in page
    assert "Share of the gain by transition" in page
    assert "Not measured yet: grpo-s0@12." in page
    assert re.search(r"oracle</th>\s*<td class=\"n\">1</td>", page)
    assert credit_section(tmp_path, None) is None
    told = json.loads((folder / "credit.json").read_text())
    for damage in _DAMAGES:
        damaged = json.loads(json.dumps(told))
        damage(damaged)
        (folder / "credit.json").write_text(json.dumps(damaged))
        with pytest.raises(MeterError, match=r"credit\.json: no measurement that this vipo reads"):
            credit_section(tmp_path, meter)


_DAMAGES: Sequence[Callable[[dict[str, Any]], object]] = (
    dict.clear,
    lambda told: told["meter"].pop("size"),
    lambda told: told["result"]["pathwise"][1].update(source="x"),
    lambda told: told["result"]["pathwise"][3].update(kind=None),
    lambda told: told["result"]["directional"].pop(),
    lambda told: told["result"]["directional"][0]["ratio"].update(value=[1]),
    lambda told: told["result"]["directional"][1]["value"].update(low=None),
    lambda told: told["result"]["pathwise"][0]["value"].update(value=math.nan),
    lambda told: told["result"]["steps"][2]["share"].update(low="x"),
    lambda told: told["result"]["steps"][1].update(step=7),
    lambda told: told["result"]["costs"].update(grpo=3),
    lambda told: told["result"]["agreement"].update(slope=1),
)


def test_checkpoints_are_named_by_run_and_update() -> None:
    experiment = Path("results/demo")
    for name, label, weights in (
        ("base", "base", None),
        ("grpo-s0", "grpo-s0", experiment / "runs/grpo-s0/weights"),
        ("k1.5-s3@12", "k1.5-s3-u12", experiment / "runs/k1.5-s3/updates/000012"),
    ):
        assert measured_weights(name, experiment) == weights
        assert measurement_label(name) == label == checkpoint_label(weights)
        assert MeterConfig(checkpoints=[name]).checkpoints == (name,)
    for wrong in ("grpo", "grpo-s0@", "../x-s0", "grpo-s0@0"):
        with pytest.raises(ValueError, match="checkpoints"):
            MeterConfig(checkpoints=[wrong])
    saved = {"grpo-s0": (12,)}
    check_checkpoints(MeterConfig(checkpoints=["base", "grpo-s0", "grpo-s0@12"]), saved)
    with pytest.raises(ConfigError, match="no run 'vipo-s0' is trained; one of grpo-s0"):
        check_checkpoints(MeterConfig(checkpoints=["vipo-s0"]), saved)
    with pytest.raises(ConfigError, match=r"update 8 of it is not kept \(12 are\)"):
        check_checkpoints(MeterConfig(checkpoints=["grpo-s0@8"]), saved)
