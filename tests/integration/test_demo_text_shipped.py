"""The shipped generator of words writes those that it knows, longer ones in part; with its recipe, within its size."""

import json

from vipo.config.compose import load_config, repository_root
from vipo.config.pretrain import PretrainConfig
from vipo.demo import words
from vipo.generators import load_generator
from vipo.generators.embeddings import stack_conditioning
from vipo.generators.flux import FluxGenerator
from vipo.rewards import load_rewards, score
from vipo.sampling.chain import sampling_chain
from vipo.sampling.noise import keyed_normal
from vipo.sampling.rollout import sample_ode

ROOT = repository_root()
FOLDER = ROOT / "data/demo-text-generator"


def test_short_words_are_read_and_long_ones_in_part() -> None:
    """Thirty words of each kind, by the experiment's own reward and steps."""
    config = load_config(["experiment=demo_text"])
    generator = load_generator(config.generator, ROOT)
    (reward,) = load_rewards(config.reward.terms).values()
    chain = sampling_chain(config.sampling, "velocity", steps=config.evaluation.steps)
    read = {}
    for kind, pool, held_out in (
        ("trained", words.WORDS, False),
        ("held out", words.WORDS, True),
        ("long", words.LONG_WORDS, True),
    ):
        rows = list(words.word_captions(held_out, pool))
        rows = rows[:: len(rows) // 30][:30]
        texts, claims = [text for text, _ in rows], [claim for _, claim in rows]
        encoded = dict(zip(texts, FluxGenerator.encode_prompts(config.generator, ROOT, texts), strict=True))
        noise = keyed_normal([(0, "quality", number) for number in range(len(rows))], generator.latent_shape)
        clean = sample_ode(generator, stack_conditioning(encoded, texts), chain, noise)
        read[kind] = float(score("ocr", reward, generator.decode(clean), texts, claims).mean())
    assert min(read["trained"], read["held out"]) > 0.9, read
    # Something is left to learn, and there is something to start from.
    assert 0.4 < read["long"] < 0.65, read


def test_ships_with_its_recipe_within_its_size() -> None:
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 12e6
    assert {path.suffix for path in files} <= {".json", ".jsonl", ".safetensors", ".md"}
    recorded = PretrainConfig.model_validate(json.loads((FOLDER / "training_config.json").read_text()))
    assert recorded == load_config(["experiment=demo_text"]).pretrain
