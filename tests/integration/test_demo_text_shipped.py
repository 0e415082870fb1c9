"""The shipped generator of words writes those that it knows, longer ones in part."""

from vipo.config.compose import load_config, repository_root
from vipo.demo import words
from vipo.generators import load_generator
from vipo.generators.embeddings import stack_conditioning
from vipo.generators.flux import FluxGenerator
from vipo.rewards import load_rewards, score
from vipo.sampling.chain import sampling_chain
from vipo.sampling.noise import keyed_normal
from vipo.sampling.rollout import sample_ode

ROOT = repository_root()


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
        # Words and papers in turn.
        rows = [rows[index * len(rows) // 30] for index in range(30)]
        texts, claims = [text for text, _ in rows], [claim for _, claim in rows]
        encoded = dict(zip(texts, FluxGenerator.encode_prompts(config.generator, ROOT, texts), strict=True))
        noise = keyed_normal([(0, "quality", number) for number in range(len(rows))], generator.latent_shape)
        clean = sample_ode(generator, stack_conditioning(encoded, texts), chain, noise)
        read[kind] = float(score("ocr", reward, generator.decode(clean), texts, claims).mean())
    assert min(read["trained"], read["held out"]) > 0.9, read
    # Something is left to learn, and there is something to start from.
    assert 0.4 < read["long"] < 0.65, read
