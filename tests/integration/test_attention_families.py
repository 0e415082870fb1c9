"""The source `attention` on each family's own network: words, keys, layers, and the same bits with and without it."""

from pathlib import Path

import pytest
import torch
from families import FAMILIES
from family import Family
from torch import Tensor, nn

from vipo.config.compose import load_config
from vipo.config.credit import CreditConfig
from vipo.conformance.stock import training_chain
from vipo.conformance.subject import PROMPTS
from vipo.credit import Context, Samples, assign_credit, load_sources
from vipo.credit.attention import matching_layers
from vipo.generators import Generator, load_generator
from vipo.generators.configured import resolve_class
from vipo.prompts import Prompt
from vipo.sampling.noise import keyed_normal
from vipo.sampling.rollout import rollout

ROOT = Path(__file__).resolve().parents[2]
# The text of these is mixed before the attention is called: what one word changes is found in others' keys as well.
MIXED = ("z_image", "hunyuan_video")
NAMES = [
    "flux", "sd3", "qwen_image", "qwen_image_21", "flux2_klein", "flux2_dev", "z_image", "cogvideox", "hunyuan_video",
    "sd", "sdxl", "sana", "wan", "ltx2",
]  # fmt: skip


@pytest.fixture(scope="module", params=NAMES)
def drawn(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple:
    row: Family = FAMILIES[request.param]
    config = row.config(row.write(tmp_path_factory.mktemp("attention") / request.param))
    rows = resolve_class(config).encode_prompts(config, ROOT, PROMPTS)
    return load_generator(config, ROOT), {name: torch.stack([each[name] for each in rows]) for name in rows[0]}


def _keys(generator: Generator, conditioning: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """``(2, heads, keys, d)`` of the first layer's first call, of the samples and not of the negative prompt."""
    name = matching_layers(generator.network, generator.text_attention.layers)[0]
    inside, found, plain = [], [], nn.functional.scaled_dot_product_attention

    def recorded(query: Tensor, key: Tensor, *args: object, **options: object) -> Tensor:
        found.extend([key] if inside else [])
        return plain(query, key, *args, **options)

    layer = generator.network.get_submodule(name)
    hooks = [layer.register_forward_pre_hook(lambda *_: inside.append(1)),
             layer.register_forward_hook(lambda *_: inside.clear())]  # fmt: skip
    noise = keyed_normal([(0, "x", n) for n in range(2)], generator.latent_shape)
    with monkeypatch.context() as patched, torch.no_grad():
        patched.setattr(nn.functional, "scaled_dot_product_attention", recorded)
        generator.predict(noise, torch.full((2,), 0.5), conditioning)
    for hook in hooks:
        hook.remove()
    return found[0][-2:]


def test_words_are_the_keys_that_change_with_them(drawn: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    generator, conditioning = drawn
    where, family = generator.text_attention, generator.config.family
    words = where.words(generator.config, ROOT, PROMPTS)
    (name,) = {"encoder_hidden_states", "cap_feats"} & conditioning.keys()
    before = _keys(generator, conditioning, monkeypatch)
    # Of HunyuanVideo, the quoted words stand before the prompt's.
    quoted = conditioning.get("encoder_attention_mask_2", torch.zeros(2, 1)).sum(dim=1).long().tolist()
    changed = conditioning | {name: conditioning[name].clone()}
    for row, places in enumerate(words):
        assert places == sorted(set(places))
        changed[name][row, [place - quoted[row] for place in places]] += 1.0
    moved = (_keys(generator, changed, monkeypatch) - before).abs().amax(dim=(1, 3)) > 1e-6
    count = moved.shape[1]
    height, width = generator.grid
    frames = 1 if generator.frame_groups is None else len(generator.frame_groups)
    picture = frames * (height // where.patch) * (width // where.patch)
    picture += -picture % where.multiple
    start = picture if where.keys == "last" else 0
    for row, places in enumerate(words):
        found = moved[row].nonzero().flatten().tolist()
        expected = [start + place for place in places]
        if family in MIXED:
            assert set(expected) <= set(found)
            assert min(found) >= start
        else:
            assert found == expected
    assert count > max(map(max, words)) + start


def test_the_words_are_those_of_the_prompt_alone(drawn: tuple) -> None:
    """Another first word: rows before the words' first stay, and as many are words as the bare prompt has tokens."""
    generator, conditioning = drawn
    where, family = generator.text_attention, generator.config.family
    if family in ("flux", "cogvideox", "wan", "ltx2"):
        pytest.skip("their encoders look ahead; the keys that change with the words say it of them")
    config, texts = generator.config, [PROMPTS[0], "b" + PROMPTS[0][1:]]
    one, other = resolve_class(config).encode_prompts(config, ROOT, texts)
    (name,) = {"encoder_hidden_states", "cap_feats"} & conditioning.keys()
    words = where.words(config, ROOT, texts)
    assert words[0] == words[1]
    differ = (one[name] != other[name]).any(dim=1).nonzero().flatten().tolist()
    assert min(differ) == words[0][0]


def test_the_map_is_drawn_beside_predictions_that_keep_their_bits(drawn: tuple) -> None:
    generator, conditioning = drawn
    prompts = [Prompt(text, text, {}) for text in PROMPTS]
    sources = load_sources(CreditConfig(sources=[{"name": "attention", "layers": 2}]))
    perception = load_config(["experiment=demo"]).perception
    sources["attention"].set_up(Context(generator, prompts, {}, perception, ROOT))
    chain, keys = training_chain(generator, 3), [(0, "key", n) for n in range(2)]
    plain = rollout(generator, conditioning, chain, chain.trainable, keys, keys)
    sources["attention"].before_rollout(generator, prompts)
    found = rollout(generator, conditioning, chain, chain.trainable, keys, keys)
    seen = sources["attention"].after_rollout(generator)
    assert torch.equal(found.latents, plain.latents)
    assert torch.equal(found.clean, plain.clean)
    assert seen.shape == (2, 3, *generator.latent_shape[1:])
    assert ((seen > 0) & (seen < 1)).all()
    # The prompts differ, and so do steps and positions.
    assert float((seen[0] - seen[1]).abs().max()) > 0
    samples = Samples(
        pictures=torch.zeros(2, 3, 8, 8), clean=found.clean, groups=torch.tensor([0, 1]), prompts=prompts,
        numbers=[0, 0], trajectories=[found],
    )  # fmt: skip
    weights = assign_credit(sources, samples, seen={"attention": [seen]}).weights
    assert weights.shape == (2, 2, *generator.latent_shape[1:])
    torch.testing.assert_close(weights.flatten(2).mean(dim=2), torch.ones(2, 2))
    assert float(weights.std()) > 0


def test_the_map_follows_its_words(drawn: tuple) -> None:
    """Of one word of a guided or plain batch: as many keys as are words add up to what all of them get."""
    generator, conditioning = drawn
    source = load_sources(CreditConfig(sources=[{"name": "attention"}]))["attention"]
    prompts = [Prompt(text, text, {}) for text in PROMPTS]
    source.set_up(Context(generator, prompts, {}, load_config(["experiment=demo"]).perception, ROOT))
    whole, noise = dict(source.words), keyed_normal([(0, "x", n) for n in range(2)], generator.latent_shape)

    def maps(words: dict[str, list[int]]) -> Tensor:
        source.words = words
        source.before_rollout(generator, prompts)
        with torch.no_grad():
            generator.predict(noise, torch.full((2,), 0.5), conditioning)
        return source.after_rollout(generator)

    halves = [{key: places[part] for key, places in whole.items()} for part in (slice(0, 1), slice(1, None))]
    torch.testing.assert_close(sum(map(maps, halves)), maps(whole))
