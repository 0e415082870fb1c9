"""The sources `contrast` and `reward` as plug-ins."""

from pathlib import Path

import pytest
import torch
from scipy.ndimage import gaussian_filter
from toy_generator import ToyGenerator, left_redness

from vipo.config.compose import load_config
from vipo.config.credit import CreditConfig
from vipo.credit import Context, Costs, CreditError, Samples, assign_credit, load_sources, source_inputs
from vipo.credit.contrast import group_contrast
from vipo.credit.occlusion import occlusion_map
from vipo.credit.uniform import UniformCredit
from vipo.generators.attention import TextAttention
from vipo.prompts import Prompt
from vipo.rewards import Scored

GROUPS = torch.tensor([0, 0, 1, 1])


def _samples(generator: ToyGenerator, rows: list[int] | None = None) -> Samples:
    clean = torch.randn(4, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    own = [0, 1, 2, 3] if rows is None else rows

    def gather(local: torch.Tensor) -> torch.Tensor:
        return clean if local.shape == clean[own].shape else GROUPS

    return Samples(
        pictures=generator.pictures(clean[own]),
        clean=clean[own],
        groups=GROUPS[own],
        prompts=[Prompt("a", "a", {}) for _ in own],
        numbers=own,
        batch=2,
        **({} if rows is None else {"gather": gather}),
    )


def _context(generator: ToyGenerator, rewards: dict) -> Context:
    return Context(generator, [Prompt("a", "a", {})], rewards, load_config(["experiment=demo"]).perception, Path())


def _loaded(section: dict, rewards: dict | None = None):
    generator = ToyGenerator()
    sources = load_sources(CreditConfig(sources=[section]))
    for source in sources.values():
        source.set_up(_context(generator, {"left": left_redness} if rewards is None else rewards))
    return generator, sources


def test_names_of_inputs_are_taken_once() -> None:
    """Two files of one name would be one in the run's identity."""

    class Reads(UniformCredit):
        def __init__(self, inputs: object) -> None:
            super().__init__()
            self.read = inputs

        @property
        def inputs(self) -> object:
            return self.read

    one, other = Reads({"map": Path("a")}), Reads({"mask": Path("b")})
    assert source_inputs({"one": one, "other": other}) == {"map": Path("a"), "mask": Path("b")}
    assert source_inputs({"one": one, "one 2": Reads({"map": Path("a")})}) == {"map": Path("a")}
    with pytest.raises(CreditError, match="'again': inputs: 'map' is the name of something else"):
        source_inputs({"one": one, "again": Reads({"map": Path("b")})})
    with pytest.raises(CreditError, match="'one': inputs: 'map' is the name of something else"):
        source_inputs({"one": one}, taken=["map"])
    with pytest.raises(CreditError, match=r"'text': inputs: expected pathlib\.Path by name, got {'map': 'a'}"):
        source_inputs({"text": Reads({"map": "a"})})


def test_contrast_is_that_of_the_clean_latents() -> None:
    generator, sources = _loaded({"name": "contrast"})
    samples = _samples(generator)
    found = assign_credit(sources, samples)
    assert torch.equal(found.weights, group_contrast(samples.clean, GROUPS).weights)
    assert found.metrics["map/mean"] == pytest.approx(1)


def test_siblings_may_be_on_other_processes() -> None:
    generator, sources = _loaded({"name": "contrast"})
    whole = assign_credit(sources, _samples(generator)).weights
    own = sources["contrast"](_samples(generator, [1, 2])).values
    assert torch.equal(own, whole[[1, 2]])


def test_features_of_a_backbone_are_compared_on_the_latents_grid() -> None:
    config = load_config(["experiment=demo", "arm=contrast", "credit.sources=[{name: contrast, of: features}]"])
    assert config.credit.reads_backbone
    assert not load_config(["experiment=demo", "arm=contrast"]).credit.reads_backbone
    _, sources = _loaded({"name": "contrast", "of": "features"})
    pictures = torch.full((2, 3, 64, 64), 0.5)
    pictures[0, :, :32, :32] = 1.0
    samples = Samples(
        pictures=pictures, clean=torch.zeros(2, 2, 16, 16), groups=torch.zeros(2, dtype=torch.int64),
        prompts=[Prompt("a", "a", {})] * 2, numbers=[0, 1],
    )  # fmt: skip
    weights = sources["contrast"](samples).values
    assert weights.shape == (2, 16, 16)
    assert float(weights[0, :8, :8].mean()) > 1.5 * float(weights[0, 8:, 8:].mean())
    found = sources["contrast"](samples)
    assert found.costs == Costs(backbone_calls=1, bytes_kept=sources["contrast"].backbone(pictures)[0].nbytes)


def test_features_of_videos_are_averaged_as_the_latents_cover_the_frames() -> None:
    """A backbone that is the picture: features of each frame, their mean over a latent frame's frames."""
    _, sources = _loaded({"name": "contrast"})
    source = sources["contrast"]
    source.backbone = lambda pictures: pictures
    clips = torch.rand(3, 5, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    groups = torch.tensor([0, 0, 0])
    samples = Samples(
        pictures=clips, clean=torch.zeros(3, 2, 2, 4, 4), groups=groups, prompts=[Prompt("a", "a", {})] * 3,
        numbers=[0, 1, 2], frame_groups=(range(0, 1), range(1, 5)), batch=2,
    )  # fmt: skip
    found = source(samples)
    means = torch.stack([clips[:, 0], clips[:, 1:].mean(dim=1)], dim=2)
    torch.testing.assert_close(found.values, group_contrast(means, groups).weights)
    assert found.costs == Costs(backbone_calls=5, bytes_kept=3 * 2 * 16 * 4)


def test_a_mixture_is_the_mean_by_shares() -> None:
    generator = ToyGenerator()
    sources = load_sources(CreditConfig(sources=[{"name": "contrast"}, {"name": "reward"}]))
    for source in sources.values():
        source.set_up(_context(generator, {"left": left_redness}))
    samples = _samples(generator)
    contrast, reward = (assign_credit({name: sources[name]}, samples).weights for name in sources)
    found = assign_credit(sources, samples, mixture=(1.0, 3.0))
    torch.testing.assert_close(found.weights, 0.25 * contrast + 0.75 * reward)
    assert found.metrics["map/mean"] == pytest.approx(1)
    assert found.costs == Costs(decodes=1, reward_calls=1)
    config = CreditConfig(sources=[{"name": "contrast"}, {"name": "uniform"}], mixture=[1, 2])
    assert config.mixture == (1.0, 2.0)
    with pytest.raises(ValueError, match="mixture has 1 shares of 2 sources"):
        CreditConfig(sources=[{"name": "contrast"}, {"name": "uniform"}], mixture=[1])
    with pytest.raises(ValueError, match="greater than 0"):
        CreditConfig(sources=[{"name": "contrast"}, {"name": "uniform"}], mixture=[1, 0])


def test_the_rewards_gradient_is_finite_differences() -> None:
    generator, sources = _loaded({"name": "reward"})
    samples = _samples(generator)
    weights = assign_credit(sources, samples).weights
    sizes = torch.zeros(4, 4, dtype=torch.float64)
    for y in range(4):
        for x in range(4):
            for c in range(2):
                step = torch.zeros(2, 4, 4)
                step[c, y, x] = 1e-2
                up, down = (
                    left_redness(generator.decode((samples.clean[1] + sign * step)[None]), [], []).double()
                    for sign in (1, -1)
                )
                sizes[y, x] += float((up - down) / 2e-2) ** 2 / 2
    sizes = sizes.sqrt()
    torch.testing.assert_close(weights[1].double(), sizes / sizes.mean(), rtol=0.02, atol=2e-3)
    # The reward reads the left half alone.
    assert weights[..., 2:].count_nonzero() == 0


def test_a_reward_without_gradient_is_refused_before_training() -> None:
    with pytest.raises(CreditError, match="'steps' has no gradient"):
        _loaded({"name": "reward"}, {"steps": lambda images, *_: images.detach().mean(dim=(1, 2, 3))})
    with pytest.raises(CreditError, match=r"set term to one of reward\.terms, one, other"):
        _loaded({"name": "reward"}, {"one": left_redness, "other": left_redness})
    with pytest.raises(CreditError, match="it is third"):
        _loaded({"name": "reward", "term": "third"}, {"one": left_redness})
    _loaded({"name": "reward", "term": "other"}, {"one": left_redness, "other": left_redness})


@pytest.mark.parametrize("arm", ["contrast", "product", "shuffled_contrast"])
def test_arms(arm: str) -> None:
    config = load_config(["experiment=demo", f"arm={arm}"])
    assert "contrast" in config.credit.names
    assert config.objective.ratio == "position"


def _right(images: torch.Tensor, *_: object) -> Scored:
    """Nothing is said of the first sample; of the others, where they are in the right half, by their row."""
    where = torch.zeros(images[:, 0].shape)
    where[..., where.shape[-1] // 2 :] = images.mean(dim=(1, 2, 3))[:, None, None] + 0.1
    where[images.mean(dim=(1, 2, 3)) == images.mean(dim=(1, 2, 3)).max()] = 0
    return Scored(images.mean(dim=(1, 2, 3)), where)


def test_a_reward_says_where() -> None:
    generator, sources = _loaded({"name": "reward", "reads": "where"}, {"right": _right})
    samples = _samples(generator)
    found = sources["reward"](samples)
    brightest = [piece.mean(dim=(1, 2, 3)).argmax().item() + 2 * n for n, piece in enumerate(samples.pieces())]
    assert found.constant.nonzero().flatten().tolist() == brightest
    assert torch.equal(found.values[brightest], torch.ones(2, 4, 4))
    others = [row for row in range(4) if row not in brightest]
    told = found.values[others]
    # Antialiased at the edge between both halves.
    assert told[..., 0].count_nonzero() == 0
    torch.testing.assert_close(told.mean(dim=(1, 2)), torch.ones(2))
    assert (told[..., 3] > told[..., 1]).all()
    with pytest.raises(CreditError, match="'left' does not say where; set reads to gradient"):
        _loaded({"name": "reward", "reads": "where"})


def test_frames_are_averaged_as_the_latents_cover_them() -> None:
    frames = torch.arange(5.0).reshape(1, 5, 1, 1).expand(2, 5, 4, 4).clone()

    def told(images: torch.Tensor, *_: object) -> Scored:
        return Scored(images.flatten(1).mean(dim=1), frames[: len(images)])

    _, sources = _loaded(
        {"name": "reward", "reads": "where"}, {"told": lambda i, *_: Scored(i.mean((1, 2, 3)), i[:, 0])}
    )
    source = sources["reward"]
    source.reward = told
    clips = Samples(
        pictures=torch.rand(2, 5, 3, 4, 4),
        clean=torch.zeros(2, 2, 2, 4, 4),
        groups=torch.tensor([0, 0]),
        prompts=[Prompt("a", "a", {})] * 2,
        numbers=[0, 1],
        frame_groups=(range(0, 1), range(1, 5)),
    )
    # Frame 0 is told nothing of; frames 1 to 4 have the mean 2.5, over a mean of 1.25.
    assert torch.equal(source(clips).values[:, :, 0, 0], torch.tensor([[0.0, 2.0]] * 2))


def test_the_gradient_of_a_reward_that_says_where_is_its_scores() -> None:
    _, plain = _loaded({"name": "reward"})
    generator, sources = _loaded(
        {"name": "reward"}, {"left": lambda *given: Scored(left_redness(*given), torch.ones(len(given[0]), 4, 4))}
    )
    samples = _samples(generator)
    assert torch.equal(sources["reward"](samples).values, plain["reward"](samples).values)


def _steps(images: torch.Tensor, *_: object) -> torch.Tensor:
    """A reward without gradient, which reads the left half: how many of its pixels are bright."""
    return (images[..., : images.shape[-1] // 2].detach() > 0.5).float().mean(dim=(1, 2, 3))


def test_occlusion_is_the_change_by_each_patch_blurred() -> None:
    generator, sources = _loaded({"name": "reward", "reads": "occlusion", "patches": 4}, {"steps": _steps})
    samples = _samples(generator)
    found = sources["reward"](samples)
    expected = torch.zeros(4, 4, 4, dtype=torch.float64)
    for row in range(4):
        picture = samples.pictures[row]
        # Scipy's Gaussian: of half a patch, which is two pixels wide, cut off at two of them; borders as torchvision's.
        blurred = torch.stack(
            [torch.from_numpy(gaussian_filter(channel.numpy(), 1.0, mode="mirror", radius=2)) for channel in picture]
        )
        for y in range(4):
            for x in range(4):
                shown = picture.clone()
                place = (slice(None), slice(2 * y, 2 * y + 2), slice(2 * x, 2 * x + 2))
                shown[place] = blurred[place]
                expected[row, y, x] = (_steps(shown[None]) - _steps(picture[None])).abs().double()
    weights = expected / expected.mean(dim=(1, 2), keepdim=True)
    torch.testing.assert_close(found.values.double(), weights, rtol=1e-5, atol=1e-6)
    assert found.values[..., 2:].count_nonzero() == 0
    assert found.costs == Costs(reward_calls=17)
    with pytest.raises(CreditError, match="9 patches a side of 8x8 pixels; lower it"):
        _loaded({"name": "reward", "reads": "occlusion", "patches": 9}, {"steps": _steps})


def test_a_patch_of_a_video_is_blurred_in_all_frames() -> None:
    clips = torch.rand(2, 3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    seen: list[torch.Tensor] = []

    def reward(shown: torch.Tensor) -> torch.Tensor:
        seen.append(shown)
        return shown.mean(dim=(1, 2, 3, 4))

    assert occlusion_map(reward, clips, 2).shape == (2, 2, 2)
    assert len(seen) == 5
    for place, shown in enumerate(seen[1:]):
        differs = (shown != clips).any(dim=2).all(dim=1)
        y, x = divmod(place, 2)
        assert differs.sum() == 2 * 16
        assert differs[:, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4].all()


def test_attention_that_cannot_be_read_is_refused_by_name_before_the_run() -> None:
    source, generator = load_sources(CreditConfig(sources=[{"name": "attention"}]))["attention"], ToyGenerator()
    with pytest.raises(CreditError, match=r"generator\.family 'toy' does not say where its network attends"):
        source.set_up(_context(generator, {}))
    generator.text_attention = TextAttention((r"blocks\.\d+",), "cross", lambda config, root, texts: [[0]])
    with pytest.raises(CreditError, match="ToyNetwork has no layer of the names that family 'toy' gives"):
        source.set_up(_context(generator, {}))
    # The network itself stands for a layer.
    generator.text_attention = TextAttention(("",), "cross", lambda config, root, texts: [[]])
    with pytest.raises(CreditError, match="the network reads no word of 'a'"):
        source.set_up(_context(generator, {}))
