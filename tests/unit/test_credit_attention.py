"""The source `attention` on attention set by hand: softmax, words, layouts, layers; nothing else is touched."""

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import _len_torch_function_stack

from vipo.credit import CreditError
from vipo.credit.attention import Capture, chosen_layers, matching_layers, words_attention
from vipo.generators.attention import TextAttention

POSITIONS = (2, 3)
HEADS, WIDTH = 2, 4


def _where(keys: str, **more: int) -> TextAttention:
    return TextAttention((r"blocks\.\d+\.attn",), keys, lambda *_: [], **more)


def _drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _by_loops(query: Tensor, key: Tensor, words: Sequence[Sequence[int]], picture: int, text: int) -> Tensor:
    """``[b, position]``, each probability by itself, in double."""
    found = torch.zeros(len(words), math.prod(POSITIONS), dtype=torch.float64)
    for row, places in enumerate(words):
        for position in range(math.prod(POSITIONS)):
            for head in range(query.shape[1]):
                own = query[row, head, picture + position].double()
                powers = [math.exp(float(own @ each.double()) / math.sqrt(WIDTH)) for each in key[row, head]]
                found[row, position] += sum(powers[text + place] for place in places) / sum(powers) / query.shape[1]
    return found.reshape(len(words), *POSITIONS)


@pytest.mark.parametrize(("keys", "picture", "text"), [("cross", 0, 0), ("first", 5, 0), ("last", 0, 6)])
def test_the_map_is_the_attention_to_the_words_by_explicit_loops(keys: str, picture: int, text: int) -> None:
    count = 6 if keys == "cross" else 11
    query = _drawn(2, HEADS, count, WIDTH)
    key = _drawn(2, HEADS, 5 if keys == "cross" else 11, WIDTH, seed=1)
    words = [[1, 2], [4]]
    found = words_attention(query, key, words=words, where=_where(keys), positions=POSITIONS)
    torch.testing.assert_close(found.double(), _by_loops(query, key, words, picture, text), rtol=1e-5, atol=1e-6)
    # Of guided samples, the negative prompt's half comes first and is not read.
    both = [torch.cat([_drawn(*value.shape, seed=7), value]) for value in (query, key)]
    assert torch.equal(words_attention(*both, words=words, where=_where(keys), positions=POSITIONS), found)


def test_masked_keys_take_no_share_and_pieces_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key = _drawn(2, HEADS, 6, WIDTH), _drawn(2, HEADS, 5, WIDTH, seed=1)
    mask = torch.tensor([[True] * 5, [True, True, True, False, False]])[:, None, None]
    words, given = [[1, 3], [1]], {"where": _where("cross"), "positions": POSITIONS}
    found = words_attention(query, key, mask, words=words, **given)
    alone = words_attention(query[1:], key[1:, :, :3], words=words[1:], **given)
    torch.testing.assert_close(found[1:], alone)
    added = torch.zeros(2, 1, 1, 5).masked_fill(~mask, -torch.inf)
    assert torch.equal(words_attention(query, key, added, words=words, **given), found)
    every = mask.expand(2, 1, 6, 5)
    monkeypatch.setattr("vipo.credit.attention._PIECE", 1)
    torch.testing.assert_close(words_attention(query, key, every, words=words, **given), found)


def test_one_word_that_one_token_attends_to_alone_is_a_map_of_that_token() -> None:
    query = torch.zeros(1, 1, 6, WIDTH)
    query[0, 0, 4, 0] = 100.0
    key = torch.zeros(1, 1, 3, WIDTH)
    key[0, 0, 2, 0] = 100.0
    found = words_attention(query, key, words=[[2]], where=_where("cross"), positions=POSITIONS)
    torch.testing.assert_close(found, torch.tensor([[[1 / 3, 1 / 3, 1 / 3], [1 / 3, 1.0, 1 / 3]]]))


def test_tokens_of_several_positions_and_levels_that_round_up_are_resized() -> None:
    query, key = torch.zeros(1, 1, 6, WIDTH), torch.zeros(1, 1, 4, WIDTH)
    for positions in ((4, 6), (3, 5), (2, 3)):
        found = words_attention(query, key, words=[[0]], where=_where("cross"), positions=positions)
        torch.testing.assert_close(found, torch.full((1, *positions), 0.25))
    video = words_attention(
        torch.zeros(1, 1, 12, WIDTH), key, words=[[0, 1]], where=_where("cross"), positions=(2, 4, 6)
    )
    torch.testing.assert_close(video, torch.full((1, 2, 4, 6), 0.5))
    joint = words_attention(
        torch.zeros(1, 1, 10, WIDTH), torch.zeros(1, 1, 10, WIDTH),
        words=[[1]], where=_where("last", patch=2, multiple=8), positions=(4, 6),
    )  # fmt: skip
    torch.testing.assert_close(joint, torch.full((1, 4, 6), 0.1))


def test_calls_of_other_shapes_are_not_the_pictures() -> None:
    query = torch.zeros(1, 1, 11, WIDTH)
    for keys, count in (("cross", 7), ("first", 6), ("last", 6), ("last", 3)):
        key = torch.zeros(1, 1, count, WIDTH)
        found = words_attention(query[:, :, :count], key, words=[[0]], where=_where(keys), positions=POSITIONS)
        assert found is None, keys


@pytest.mark.parametrize(
    ("count", "wanted", "chosen"),
    [(16, 4, [5, 7, 9, 11]), (3, 4, [0, 1, 2]), (1, 4, [0]), (8, 1, [4]), (57, 4, [17, 24, 32, 39])],
)
def test_layers_are_spread_over_the_middle_half(count: int, wanted: int, chosen: list[int]) -> None:
    assert chosen_layers([str(place) for place in range(count)], wanted) == [str(place) for place in chosen]


class _Attention(nn.Module):
    def forward(self, query: Tensor, key: Tensor) -> Tensor:
        return scaled_dot_product_attention(query=query, key=key, value=key)


class _Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({"attn": _Attention(), "attn2": _Attention()}) for _ in range(2))

    def forward(self, query: Tensor, key: Tensor) -> Tensor:
        return sum(own(query * (n + 1), key) for n, block in enumerate(self.blocks) for own in block.values())


def test_a_capture_averages_layers_call_by_call_keeps_bits_and_leaves_nothing() -> None:
    network, where = _Network(), _where("cross")
    assert matching_layers(nn.ModuleDict({"module": network}), where.layers) == [
        "module.blocks.0.attn", "module.blocks.1.attn",
    ]  # fmt: skip
    modules = [network.get_submodule(name) for name in matching_layers(network, where.layers)]
    queries, key = [_drawn(1, HEADS, 6, WIDTH, seed=n) for n in range(3)], _drawn(1, HEADS, 5, WIDTH, seed=9)
    before = [network(query, key) for query in queries]
    capture = Capture(modules, where, [[1]], POSITIONS)
    after = [network(query, key) for query in queries]
    found = capture.finish()
    assert all(map(torch.equal, before, after))
    assert found.shape == (1, 3, *POSITIONS)
    for call, query in enumerate(queries):
        layers = [
            words_attention(query * (n + 1), key, words=[[1]], where=where, positions=POSITIONS) for n in range(2)
        ]
        torch.testing.assert_close(found[:, call], (layers[0] + layers[1]) / 2)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())
    with pytest.raises(CreditError, match=r"cannot be read: .* \(\[0, 0\] calls by layer\)"):
        Capture(modules, where, [[1]], POSITIONS).finish()


def test_two_captures_at_once_and_a_call_that_raises_leave_nothing_behind() -> None:
    """Two arms of a measurement that read attention; they end in the order in which they began."""
    network, where = _Network(), _where("cross")
    modules = [network.get_submodule(name) for name in matching_layers(network, where.layers)]
    query, key = _drawn(1, HEADS, 6, WIDTH), _drawn(1, HEADS, 5, WIDTH, seed=1)
    first, second = Capture(modules, where, [[1]], POSITIONS), Capture(modules[:1], where, [[2]], POSITIONS)
    network(query, key)
    found, other = first.finish(), second.finish()
    alone = words_attention(query, key, words=[[2]], where=where, positions=POSITIONS)
    torch.testing.assert_close(other[:, 0], alone)
    assert not torch.equal(found, other)
    broken = Capture(modules, where, [[1]], POSITIONS)
    with pytest.raises(RuntimeError):
        network(query, key[..., :2])
    assert _len_torch_function_stack() == 0
    with pytest.raises(CreditError, match="cannot be read"):
        broken.finish()
