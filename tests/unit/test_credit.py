"""Credit sources: products, what is refused of them, draws, and the loading of others' by import path."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vipo.config.credit import CreditConfig
from vipo.config.validation import ConfigError
from vipo.credit import CreditError, CreditSource, Samples, Weights, assign_credit, load_sources
from vipo.prompts import Prompt
from vipo.sampling.noise import keyed_generator
from vipo.sampling.rollout import Trajectory

N, STEPS, GRID = 4, 3, (5, 6)


def _samples(**changed: Any) -> Samples:
    clean = torch.zeros(N, 2, *GRID)
    chains = [Trajectory(torch.zeros(2, STEPS + 1, 2, *GRID), torch.zeros(2, STEPS, 2, *GRID), clean[:2])] * 2
    prompts = [Prompt(str(i // 2), "ab"[i // 2], {}) for i in range(N)]
    given = {"pictures": torch.zeros(N, 3, 20, 24), "clean": clean, "groups": torch.tensor([0, 0, 1, 1])}
    given |= {"prompts": prompts, "numbers": [0, 1, 0, 1], "trajectories": chains, "batch": 2, "seed": 3, "update": 7}
    return Samples(**(given | changed))


class Given(CreditSource):
    """Weights that a test made."""

    def __init__(self, found: Any) -> None:
        super().__init__()
        self.found = found

    def __call__(self, samples: Samples) -> Tensor | Weights:
        found: Tensor | Weights = self.found
        return found


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) + 0.1


def test_sources_are_multiplied() -> None:
    """Position by position; where one has weights for each transition, so has the product."""
    one, two = _random(N, *GRID), _random(N, *GRID, seed=1)
    product = assign_credit({"one": Given(one), "two": Given(two)}, _samples()).weights
    assert product is not None
    assert torch.equal(product, one * two)
    stepwise = _random(N, STEPS, *GRID, seed=2)
    wide = assign_credit({"one": Given(one), "steps": Given(stepwise)}, _samples()).weights
    assert wide is not None
    for step in range(STEPS):
        assert torch.equal(wide[:, step], one * stepwise[:, step])
    # Of weights that are all divided by their mean, the product is again; of others it is not.
    means = [Weights(w / w.mean(dim=(1, 2), keepdim=True), mean_one=True) for w in (one, two)]
    again = assign_credit({"one": Given(means[0]), "two": Given(means[1])}, _samples()).weights
    assert again is not None
    torch.testing.assert_close(again, one * two / (one * two).mean(dim=(1, 2), keepdim=True))
    other = assign_credit({"one": Given(means[0]), "two": Given(two)}, _samples()).weights
    assert other is not None
    assert torch.equal(other, means[0].values * two)


def test_only_what_no_source_speaks_of_is_constant() -> None:
    flags = [torch.tensor([True, True, False, False]), torch.tensor([True, False, True, False])]
    sources = {str(i): Given(Weights(torch.ones(N, *GRID), flag)) for i, flag in enumerate(flags)}
    found = assign_credit(sources, _samples())
    assert found.metrics["map/constant_share"] == 0.25
    assert found.metrics["map/entropy"] == pytest.approx(1)


def test_without_sources_the_advantage_is_a_scalar() -> None:
    assert assign_credit({}, _samples()).weights is None


def test_a_sample_without_any_weight_is_not_an_error() -> None:
    weights = _random(N, *GRID)
    weights[1] = 0
    found = assign_credit({"own": Given(weights)}, _samples())
    assert torch.equal(found.weights, weights)
    assert 0 < found.metrics["map/entropy"] < 0.75


def test_shuffling_follows_the_sample_wherever_it_is() -> None:
    weights = _random(N, *GRID)
    shuffled = assign_credit({"own": Given(weights)}, _samples(), "shuffled").weights
    assert shuffled is not None
    for row, (prompt, number) in enumerate([("0", 0), ("0", 1), ("1", 0), ("1", 1)]):
        places = torch.randperm(30, generator=keyed_generator(3, "shuffle", 7, prompt, number))
        assert torch.equal(shuffled[row].flatten(), weights[row].flatten()[places])


WRONG: dict[str, tuple[Any, str]] = {
    "shape": (torch.ones(N, 6, 5), r"expected weights of shape \(4, 5, 6\), or \(4, 3, 5, 6\) .*, got \(4, 6, 5\)"),
    "other steps": (torch.ones(N, 2, *GRID), r"got \(4, 2, 5, 6\)"),
    "a number": (1.0, "got a float"),
    "integers": (torch.ones(N, *GRID, dtype=torch.int64), "floating point weights, got torch.int64"),
    "sparse": (torch.ones(N, *GRID).to_sparse(), "dense tensor .* got torch.float32 .*, torch.sparse"),
    "flags": (Weights(torch.ones(N, *GRID), torch.ones(N)), r"expected flags torch.bool of \(4,\), got torch.float32"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_weights_is_refused(name: str) -> None:
    found, told = WRONG[name]
    with pytest.raises(CreditError, match=rf"^credit source 'own': .*{told}"):
        assign_credit({"own": Given(found)}, _samples())


@pytest.mark.parametrize("value", [-0.5, float("nan"), float("inf")])
def test_a_wrong_weight_is_named_with_its_place(value: float) -> None:
    weights = _random(N, *GRID)
    weights[2, 3, 4] = value
    told = rf"^credit source 'own': weights must be finite and not negative, but {value} stands at \(3, 4\) of sample 0"
    with pytest.raises(CreditError, match=rf"{told} of 'b'"):
        assign_credit({"own": Given(weights)}, _samples())


OTHERS = """
from vipo.config.section import Section
from vipo.credit import CreditSource


class Sound(CreditSource):
    class Options(Section):
        power: int = 1

    def __call__(self, samples):
        return samples.pictures.mean(dim=1)[:, :5, :6] + self.options.power


class Raises(Sound):
    def __call__(self, samples):
        raise IndexError("beyond the last")


class Fails(Sound):
    def __init__(self, options):
        raise ValueError("no licence")


class Plain:
    pass
"""


@pytest.fixture
def others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "others_credit.py").write_text(OTHERS)
    monkeypatch.syspath_prepend(tmp_path)
    return "others_credit"


def test_a_source_of_others_has_its_options(others: str) -> None:
    config = CreditConfig.model_validate({"sources": [{"name": f"{others}:Sound", "power": 3}]})
    assert config.model_dump(mode="json")["sources"] == [{"name": f"{others}:Sound", "power": 3}]
    found = assign_credit(load_sources(config), _samples()).weights
    assert torch.equal(found, torch.full((N, *GRID), 3.0))


def test_a_source_may_stand_twice_with_other_options(others: str) -> None:
    sources = [{"name": f"{others}:Sound", "power": power} for power in (3, 2)]
    config = CreditConfig.model_validate({"sources": sources})
    assert list(load_sources(config)) == [f"{others}:Sound", f"{others}:Sound 2"]
    product = assign_credit(load_sources(config), _samples()).weights
    assert torch.equal(product, torch.full((N, *GRID), 6.0))
    mixed = assign_credit(load_sources(config), _samples(), mixture=[1.0, 3.0]).weights
    assert torch.equal(mixed, torch.full((N, *GRID), 2.25))
    with pytest.raises(ValueError, match="named twice with the same options"):
        CreditConfig.model_validate({"sources": [*sources, sources[0]]})


@pytest.mark.parametrize(
    ("name", "options", "kind", "told"),
    [
        ("Sound", {"powr": 3}, ConfigError, r"^credit.sources.0.powr: unknown key; did you mean 'power'\?"),
        ("Sound", {"power": "x"}, ConfigError, r"^credit.sources.0.power: .*integer.*'x'"),
        ("Plain", {}, CreditError, "is no class that derives from vipo.credit.source.CreditSource"),
        ("Nothing", {}, CreditError, "cannot be imported"),
        ("Fails", {}, CreditError, "^credit source 'others_credit:Fails' raised ValueError: no licence"),
        ("Raises", {}, CreditError, "^credit source 'others_credit:Raises' raised IndexError: beyond the last"),
    ],
)
def test_what_is_wrong_with_a_source_of_others_is_told(
    others: str, name: str, options: dict[str, Any], kind: type[Exception], told: str
) -> None:
    config = CreditConfig.model_validate({"sources": [{"name": f"{others}:{name}", **options}]})
    with pytest.raises(kind, match=told):
        assign_credit(load_sources(config), _samples())
