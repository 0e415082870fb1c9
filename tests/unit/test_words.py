"""Drawn words: captions, what is held out, tokens, and that reward `ocr` reads what was drawn where it was drawn."""

import numpy as np
import pytest
import torch
from tiny import TINY_PRETRAIN

from vipo.config.compose import load_config
from vipo.config.pretrain import PretrainConfig
from vipo.demo import words
from vipo.rewards import load_rewards
from vipo.training.pretrain_parts import build_pool, build_tokenizers, vocabulary


def test_a_caption_says_what_is_drawn() -> None:
    item = words.DrawnWord("cat", "red", "white", 5, 8)
    assert words.captions(item) == ('the word "cat" on white', 'the word "cat" in red on white')


def test_ink_lies_on_paper_where_the_word_begins() -> None:
    picture = words.draw(words.DrawnWord("hat", "blue", "yellow", 5, 8), words.typeface())
    assert picture.shape == (3, words.HEIGHT, words.WIDTH)
    paper, ink = (np.round(255 * np.array(color)) for color in (words.PAPERS["yellow"], words.INKS["blue"]))
    written = (picture != paper[:, None, None]).any(axis=0)
    rows, columns = (np.flatnonzero(written.any(axis=axis)) for axis in (1, 0))
    # Capitals are 16 pixels high; the first letter's stem begins a pixel or two after its cell.
    assert (rows[0], rows[-1] - rows[0] + 1) == (8, 16)
    assert 5 <= columns[0] <= 7
    # Three cells of 13 pixels, of the four for which there is room.
    assert 5 + 2 * 13 < columns[-1] < 5 + 3 * 14
    assert (picture == ink[:, None, None]).all(axis=0).any()


def test_held_out_words_are_in_the_held_out_prompts_alone() -> None:
    pool = build_pool(PretrainConfig(drawn="words", scenes=3000))
    assert pool.images.shape == (3000, 3, words.HEIGHT, words.WIDTH)
    drawn = {texts[0].split('"')[1] for texts in pool.captions}
    assert {len(word) for word in drawn} == {2, 3, 4}
    held_out = {word for word in words.WORDS if words.is_held_out(word)}
    assert not drawn & held_out
    # Every other word of the prompts, and many that nobody uses.
    assert set(words.WORDS) - held_out < drawn
    assert 0.2 < len(held_out) / len(words.WORDS) < 0.3
    for wanted in (False, True):
        rows = list(words.word_captions(held_out=wanted))
        assert {claims["text"] for _, claims in rows} == (held_out if wanted else set(words.WORDS) - held_out)
        assert all(f'"{claims["text"]}"' in text for text, claims in rows)


def test_quoted_words_are_spelled_and_all_others_are_one_token() -> None:
    config = PretrainConfig(**{**TINY_PRETRAIN, "drawn": "words"})
    clip, t5 = build_tokenizers(config, vocabulary(build_pool(config)))
    text = 'the word "jump" in red on white'
    named = ["▁the", "▁word", "▁", '"', "j", "u", "m", "p", '"', "▁in", "▁red", "▁on", "▁white"]
    assert t5.tokenize(text) == named
    # A drawn word that is a word of captions too is spelled all the same.
    assert t5.tokenize('the word "red" on mint')[3:8] == ['"', "r", "e", "d", '"']
    assert t5.unk_token_id not in t5(text).input_ids
    assert clip.unk_token_id not in clip(text).input_ids[1:-1]
    assert max(len(t5(text).input_ids), len(clip(text).input_ids)) <= config.max_sequence_length


def test_long_words_are_a_letter_longer_than_any_that_is_trained_on() -> None:
    longest = max(map(len, words.WORDS))
    assert {len(word) for word in words.LONG_WORDS} == {longest + 1}
    assert len(set(words.LONG_WORDS)) == len(words.LONG_WORDS)
    held_out = {claims["text"] for _, claims in words.word_captions(True, words.LONG_WORDS)}
    assert 0.2 < len(held_out) / len(words.LONG_WORDS) < 0.3


@pytest.fixture(scope="module")
def read() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scores and boxes of a dozen words as the experiment's own reward has them, and where ink is."""
    config = load_config(["experiment=demo_text"])
    (reward,) = load_rewards(config.reward.terms).values()
    rng, font = np.random.default_rng(0), words.typeface()
    chosen = [word for word in words.WORDS if words.is_held_out(word)][:12]
    drawn = [
        words.DrawnWord(word, *(str(rng.choice(list(names))) for names in (words.INKS, words.PAPERS)), 5, 8)
        for word in chosen
    ]
    pictures = np.stack([words.draw(item, font) for item in drawn])
    papers = np.stack([np.round(255 * np.array(words.PAPERS[item.paper])) for item in drawn])
    ink = torch.from_numpy((pictures != papers[:, :, None, None]).any(axis=1))
    prompts, claims = [words.captions(item)[0] for item in drawn], [{"text": word} for word in chosen]
    found = reward(torch.from_numpy(pictures).float() / 255, prompts, claims)
    assert not isinstance(found, torch.Tensor)
    assert found.where is not None
    return found.scores, found.where, ink


def test_the_reward_reads_drawn_words(read: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    assert read[0].tolist() == [1.0] * 12


def test_the_reward_reads_long_words_where_they_fit() -> None:
    """A generator can reach what the experiment rewards: five letters from the left edge on."""
    (reward,) = load_rewards(load_config(["experiment=demo_text"]).reward.terms).values()
    font, chosen = words.typeface(), words.LONG_WORDS[::10]
    pictures = np.stack([words.draw(words.DrawnWord(word, "red", "white", 0, 8), font) for word in chosen])
    found = reward(torch.from_numpy(pictures).float() / 255, [""] * len(chosen), [{"text": word} for word in chosen])
    assert not isinstance(found, torch.Tensor)
    assert found.scores.tolist() == [1.0] * len(chosen)


def test_its_boxes_hold_the_letters(read: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    _, boxes, ink = read
    covered = (boxes.bool() & ink).sum(dim=(1, 2)) / ink.sum(dim=(1, 2))
    assert covered.min() > 0.9
    # And not the whole picture.
    assert boxes.mean() < 0.75
