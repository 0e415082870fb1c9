"""The sampling chain: what it refuses, its levels, windows, and rollouts on a network that is a formula."""

import itertools

import pytest
import torch
from diffusers import DDIMScheduler
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vipo.config.sampling import SamplingConfig, WindowConfig
from vipo.generators.base import Conditioning, Generator
from vipo.sampling.chain import Chain, ChainError, sampling_chain, stochastic_steps
from vipo.sampling.noise import keyed_normal
from vipo.sampling.rollout import rollout, sample_ode
from vipo.sampling.transitions import position_log_prob

STOCK = DDIMScheduler(
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule="scaled_linear",
    clip_sample=False,
    set_alpha_to_one=True,
    steps_offset=1,
)


class Formula(Generator):
    """A network that is a closed form of latents, time and conditioning; no weights."""

    network_folder = "none"

    def __init__(self, shape: tuple[int, ...] = (2, 3, 4), precision: str = "fp32") -> None:
        self.latent_shape = shape
        self.device = torch.device("cpu")
        self.calls: list[Tensor] = []
        self.config = type("Config", (), {"precision": precision})()

    def _predict(self, latents: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        self.calls.append(time)
        column = (-1, *([1] * (latents.ndim - 1)))
        return torch.sin(latents + conditioning["shift"].reshape(column)) + torch.cos(time).reshape(column)

    def _absent(self, *_: object, **__: object) -> None:
        raise NotImplementedError

    load = encode_prompts = decode = add_lora = save_network = load_network = _absent


def _chain(transition: str, steps: int = 6, eta: float = 0.5, shift: float = 3.0) -> Chain:
    config = SamplingConfig(steps=steps, shift=shift, transition=transition, eta=eta)
    if transition == "ddim":
        return sampling_chain(config, "noise", STOCK.alphas_cumprod)
    return sampling_chain(config, "velocity")


TRANSITIONS = ["dance", "flow", "cps", "ddim"]


@pytest.mark.parametrize(
    ("transition", "prediction", "alphas", "steps", "told"),
    [
        ("dance", "noise", STOCK.alphas_cumprod, 5, "sampling.transition: 'dance' .* predicts noise; use ddim"),
        ("ddim", "velocity", None, 5, "sampling.transition: 'ddim' .* predicts velocity; use dance, flow or cps"),
        ("ddim", "noise", None, 5, "names no alphas_cumprod"),
        ("ddim", "noise", STOCK.alphas_cumprod[:4], 5, "sampling.steps: 5 exceeds the 4 training timesteps"),
    ],
)
def test_what_does_not_fit_is_named(
    transition: str, prediction: str, alphas: Tensor | None, steps: int, told: str
) -> None:
    with pytest.raises(ChainError, match=told):
        sampling_chain(SamplingConfig(transition=transition, steps=steps, eta=0.5), prediction, alphas)


@pytest.mark.parametrize("transition", TRANSITIONS)
def test_the_last_step_is_the_estimate_of_x0_and_cannot_be_trained(transition: str) -> None:
    chain = _chain(transition)
    assert chain.steps == 6
    assert chain.trainable == range(5)
    assert chain.levels.shape == (7,)
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(3, 2, 4, 4, generator=generator), torch.randn(3, 2, 4, 4, generator=generator)
    level = chain.levels[5]
    if transition == "ddim":
        found = chain.ode(level.sqrt() * clean + (1 - level).sqrt() * noise, noise, 5)
    else:
        found = chain.ode((1 - level) * clean + level * noise, noise - clean, 5)
    torch.testing.assert_close(found, clean, atol=2e-6, rtol=0)
    # Every trainable step draws noise, so that it has a density; later levels are less noisy.
    for step in chain.trainable:
        _, std = chain.gaussian(clean, noise, torch.full((3,), step))
        assert float(std.min()) > 0
    assert bool((chain.levels.diff() > 0).all() if transition == "ddim" else (chain.levels.diff() < 0).all())


@pytest.mark.parametrize("steps", [1, 4, 20, 50, 999])
def test_ddim_times_are_the_stock_schedulers(steps: int) -> None:
    STOCK.set_timesteps(steps)
    config = SamplingConfig(transition="ddim", eta=1.0)
    chain = sampling_chain(config, "noise", STOCK.alphas_cumprod, steps=steps)
    assert chain.times.tolist() == STOCK.timesteps.tolist()
    torch.testing.assert_close(chain.levels[:-1], STOCK.alphas_cumprod[STOCK.timesteps])


def test_as_many_ddim_steps_as_training_timesteps_each_go_somewhere() -> None:
    chain = sampling_chain(SamplingConfig(transition="ddim", eta=1.0, steps=1000), "noise", STOCK.alphas_cumprod)
    assert bool((chain.levels.diff() > 0).all())
    assert chain.times.tolist() == list(range(999, -1, -1))


def test_ddim_chain_samples_as_the_stock_scheduler() -> None:
    network, conditioning = Formula(), {"shift": torch.tensor([0.1, 0.7])}
    noise = keyed_normal([(0,), (1,)], network.latent_shape)
    chain = sampling_chain(SamplingConfig(transition="ddim", eta=0.5), "noise", STOCK.alphas_cumprod, steps=10)
    found = sample_ode(network, conditioning, chain, noise)
    # To alpha 1 the chain's last step goes alone: the stock scheduler as well, with set_alpha_to_one.
    STOCK.set_timesteps(10)
    x = noise
    for time in STOCK.timesteps:
        x = STOCK.step(network.predict(x, time.float().expand(2), conditioning), time, x).prev_sample
    torch.testing.assert_close(found, x, atol=2e-5, rtol=1e-5)


def test_flow_chain_knows_its_second_level() -> None:
    chain = _chain("flow", eta=0.7)
    x = torch.ones(1, 1, 2, 2)
    _, std = chain.gaussian(x, x, torch.zeros(1, dtype=torch.int64))
    second = float(chain.levels[1])
    assert float(std) == pytest.approx(0.7 * (1 / (1 - second)) ** 0.5 * (1 - second) ** 0.5, rel=1e-5)


@pytest.mark.parametrize("shape", [(2, 3, 4), (2, 2, 3, 4)])
@pytest.mark.parametrize("transition", TRANSITIONS)
def test_rollout_obeys_window_and_keys(transition: str, shape: tuple[int, ...]) -> None:
    """Inside the window a state is mean + std * keyed noise, outside it the ODE's; the policy has ratio one."""
    chain, network = _chain(transition), Formula(shape)
    conditioning = {"shift": torch.tensor([0.1, 0.7, 0.3])}
    initial = [(0, "initial", i) for i in range(3)]
    keys = [(0, "step", i) for i in range(3)]
    window = range(1, 4)
    path = rollout(network, conditioning, chain, window, initial, keys)
    assert path.latents.shape == (3, 6, *shape)
    assert path.means.shape == (3, 5, *shape)
    assert [float(call[0]) for call in network.calls] == pytest.approx(chain.times.tolist())
    torch.testing.assert_close(path.latents[:, 0], keyed_normal(initial, shape), atol=0, rtol=0)
    for step in chain.trainable:
        x, after = path.latents[:, step], path.latents[:, step + 1]
        prediction = network.predict(x, chain.times[step].expand(3), conditioning)
        if step in window:
            mean, std = chain.gaussian(x, prediction, torch.full((3,), step))
            drawn = keyed_normal([(*key, step) for key in keys], shape)
            torch.testing.assert_close(after, mean + std * drawn, atol=1e-6, rtol=0)
        else:
            torch.testing.assert_close(after, chain.ode(x, prediction, step), atol=0, rtol=0)
            torch.testing.assert_close(after, path.means[:, step], atol=0, rtol=0)
    last = network.predict(path.latents[:, 5], chain.times[5].expand(3), conditioning)
    torch.testing.assert_close(path.clean, chain.ode(path.latents[:, 5], last, 5), atol=0, rtol=0)
    # Each sample at another step, as the update does it: the stored mean is the policy's own.
    steps = torch.tensor([3, 1, 2])
    latents, value, old_mean = path.at(steps)
    mean, std = chain.gaussian(latents, network.predict(latents, chain.times[steps], conditioning), steps)
    torch.testing.assert_close(mean, old_mean, atol=1e-6, rtol=0)
    for row, step in enumerate(steps.tolist()):
        assert torch.equal(latents[row], path.latents[row, step])
        assert torch.equal(value[row], path.latents[row, step + 1])
    new, old = (position_log_prob(value, each, std) for each in (mean, old_mean))
    assert float((new - old).abs().max()) < 1e-4
    # A chain of its own: without its neighbours in the batch the same states.
    alone = rollout(network, {"shift": torch.tensor([0.7])}, chain, window, initial[1:2], keys[1:2])
    torch.testing.assert_close(alone.latents[0], path.latents[1], atol=1e-6, rtol=0)


def test_rollout_without_stochastic_steps_is_the_ode() -> None:
    chain, network, conditioning = _chain("cps"), Formula(), {"shift": torch.tensor([0.1])}
    path = rollout(network, conditioning, chain, range(0), [(3,)], [(4,)])
    ode = sample_ode(network, conditioning, chain, keyed_normal([(3,)], network.latent_shape))
    torch.testing.assert_close(path.clean, ode, atol=0, rtol=0)
    with pytest.raises(ValueError, match="step_keys: expected 1 keys as initial_keys, got 2"):
        rollout(network, conditioning, chain, range(0), [(3,)], [(4,), (5,)])


def test_predict_checks_shapes() -> None:
    network = Formula()
    with pytest.raises(ValueError, match=r"latents: expected shape \(2, 2, 3, 4\) .*, got \(1, 2, 3, 4\)"):
        network.predict(torch.zeros(1, 2, 3, 4), torch.ones(2), {"shift": torch.zeros(2)})


@given(
    available=st.integers(1, 30),
    data=st.data(),
    move=st.sampled_from(["fixed", "random", "slide"]),
    every=st.integers(1, 5),
    stride=st.integers(1, 7),
    update=st.integers(1, 500),
)
def test_a_window_is_always_inside_and_of_its_size(
    available: int, data: st.DataObject, move: str, every: int, stride: int, update: int
) -> None:
    size = data.draw(st.integers(1, available))
    within = data.draw(st.none() | st.integers(size, available))
    start = data.draw(st.integers(0, (within or available) - size))
    window = WindowConfig(size=size, move=move, start=start, every=every, stride=stride, within=within)
    steps = stochastic_steps(window, available, seed=3, update=update)
    assert len(steps) == size
    assert steps.start >= 0
    assert steps.stop <= (within or available)
    assert steps == stochastic_steps(window, available, seed=3, update=update)
    if move == "fixed":
        assert steps.start == start


def test_windows_move_as_named() -> None:
    assert stochastic_steps(None, 7, 0, 5) == range(7)
    slide = WindowConfig(size=2, move="slide", start=1, every=3, stride=2)
    starts = [stochastic_steps(slide, 6, 0, update).start for update in range(1, 16)]
    # Five places: 1, 3, then 5 wraps to 0, 2, 4.
    assert starts == [1, 1, 1, 3, 3, 3, 0, 0, 0, 2, 2, 2, 4, 4, 4]
    drawn = WindowConfig(size=2, move="random")
    by_seed = [[stochastic_steps(drawn, 6, seed, update).start for update in range(1, 200)] for seed in (0, 1)]
    assert by_seed[0] != by_seed[1]
    for starts in by_seed:
        assert set(starts) == set(range(5))
        assert all(20 <= starts.count(place) <= 60 for place in range(5))
    assert any(a != b for a, b in itertools.pairwise(by_seed[0]))
