"""The source `attention`: an advantage goes where the generator's own picture attends to the prompt's words.

It is read while samples are drawn, of the very queries and keys that the network's attention is called with; the call
itself is left as it is, so that every prediction keeps its bits.
"""

import contextlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from vipo.config.credit import AttentionCreditConfig
from vipo.credit.contrast import normalized
from vipo.credit.costs import Costs
from vipo.credit.source import Context, CreditError, CreditSource, Samples, Weights
from vipo.generators import Generator
from vipo.generators.attention import TextAttention
from vipo.perception.allocator import resize
from vipo.prompts import Prompt

# Of one piece of the attention matrix that is made, in numbers: 64 MiB.
_PIECE = 2**24


class AttentionCredit(CreditSource):
    """Of each transition, how much of its attention a position pays to the words of the prompt.

    ``W_t(p)``: the attention's probability, from the query at p to the words' keys, summed over the words and averaged
    over heads and layers, in the network call that the transition was drawn by. Words are tokens of the prompt's own
    text: no padding, no special token, nothing of a template around it. Layers are `layers` of those in which the
    picture attends to the text, evenly spaced over the middle half of them (`chosen_layers`).

    Source: STAR (arXiv 2606.17979) for the idea; which words and which layers is our rule.
    """

    options: AttentionCreditConfig
    where: TextAttention
    words: Mapping[str, Sequence[int]]
    capture: "Capture | None" = None

    def set_up(self, context: Context) -> None:
        """Find the layers, and the words of every prompt.

        Raises:
            CreditError: it is not known where this generator attends to the prompt, or a prompt has no word there.
            GeneratorError: a tokenizer cannot be read.
        """
        generator = context.generator
        family = generator.config.family
        if generator.text_attention is None:
            raise CreditError(
                f"credit source 'attention': generator.family {family!r} does not say where its network attends to the "
                "prompt (Generator.text_attention); take another source"
            )
        self.where = generator.text_attention
        if not matching_layers(generator.network, self.where.layers):
            raise CreditError(
                f"credit source 'attention': {type(generator.network).__name__} has no layer of the names that family "
                f"{family!r} gives, {', '.join(self.where.layers)}"
            )
        texts = [prompt.text for prompt in context.prompts]
        found = self.where.words(generator.config, context.root, texts)
        if without := [text for text, places in zip(texts, found, strict=True) if not places]:
            raise CreditError(
                f"credit source 'attention': the network reads no word of {without[0]!r}; shorten it, or raise "
                "generator.max_sequence_length"
            )
        self.words = {prompt.id: places for prompt, places in zip(context.prompts, found, strict=True)}

    def before_rollout(self, generator: Generator, prompts: Sequence[Prompt]) -> None:
        """Begin to listen to the chosen layers."""
        names = chosen_layers(matching_layers(generator.network, self.where.layers), self.options.layers)
        modules = [generator.network.get_submodule(name) for name in names]
        self.capture = Capture(modules, self.where, [self.words[p.id] for p in prompts], generator.latent_shape[1:])

    def after_rollout(self, generator: Generator) -> Tensor:
        """End it; gives the map of every network call, ``(b, calls, [T,] H, W)`` float32.

        Raises:
            CreditError: a layer's attention could not be read.
        """
        capture, self.capture = self.capture, None
        if capture is None:
            raise CreditError("credit source 'attention': nothing was listened to")
        return capture.finish()

    def __call__(self, samples: Samples) -> Weights:
        """Weights ``(n, S, [T,] H, W)``, each transition's normalised by itself.

        Raises:
            CreditError: the network was called more or less than once a step.
        """
        maps, steps = torch.cat(list(samples.seen)), samples.trajectories[0].means.shape[1]
        if maps.shape[1] != steps + 1:
            raise CreditError(
                f"credit source 'attention': {maps.shape[1]} network calls of a chain of {steps + 1} steps: this "
                "generator calls its network more than once a step"
            )
        # The last step is no transition.
        own = maps[:, :-1].double().flatten(0, 1)
        weights = normalized(own**self.options.exponent, self.options.normalize).float().unflatten(0, (-1, steps))
        kept = Costs(bytes_kept=maps[0].nbytes)
        return Weights(weights, mean_one=self.options.normalize == "mean", costs=kept)


def matching_layers(network: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Names of the modules that the patterns match, in the patterns' and then the network's order.

    A pattern stands for the end of a name, so that a wrapper's names match as well.
    """
    names = [name for name, _ in network.named_modules()]
    return [name for pattern in patterns for name in names if re.fullmatch(rf"(?:.*\.)?{pattern}", name)]


def chosen_layers(names: Sequence[str], count: int) -> list[str]:
    """`count` of the names, evenly spaced over their middle half; all of that half where it has no more."""
    quarter = len(names) // 4
    middle = names[quarter : len(names) - quarter]
    taken = min(count, len(middle))
    return [middle[(2 * place + 1) * len(middle) // (2 * taken)] for place in range(taken)]


class Capture:
    """Listens to attention modules while a piece of samples is drawn; keeps one map a network call.

    Only while a module runs are its calls of `scaled_dot_product_attention` looked at, which then run as they were
    called.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        where: TextAttention,
        words: Sequence[Sequence[int]],
        positions: Sequence[int],
    ) -> None:
        """Begin.

        Args:
            modules: attention modules, in the order in which they are called.
            where: how their keys are laid out.
            words: of each of the b samples, places of its words among the text's keys.
            positions: ``([T,] H, W)`` of the latents.
        """
        self._where, self._words, self._positions = where, words, tuple(positions)
        self._maps: list[Tensor] = []
        self._calls = [0] * len(modules)
        self._hooks = [hook for place, module in enumerate(modules) for hook in self._listen(module, place)]

    def _listen(self, module: nn.Module, place: int) -> list[RemovableHandle]:
        listener, call = _Listener(lambda *given: self._note(place, *given)), contextlib.ExitStack()

        def begin(*_: Any) -> None:
            call.enter_context(listener)

        def end(*_: Any) -> None:
            call.close()

        # The end comes whatever the call raises, and that of a later listener first.
        return [
            module.register_forward_pre_hook(begin),
            module.register_forward_hook(end, prepend=True, always_call=True),
        ]

    def _note(self, place: int, query: Tensor, key: Tensor, mask: Tensor | None, scale: float | None) -> None:
        found = words_attention(
            query, key, mask, scale, words=self._words, where=self._where, positions=self._positions
        )
        if found is None:
            return
        call = self._calls[place]
        self._calls[place] += 1
        if call == len(self._maps):
            self._maps.append(found)
        else:
            self._maps[call] = self._maps[call] + found

    def finish(self) -> Tensor:
        """The mean over the layers, ``(b, calls, [T,] H, W)`` float32; the modules have no hook left.

        Raises:
            CreditError: a layer's attention was not seen, or not as often as the others'.
        """
        for hook in self._hooks:
            hook.remove()
        if set(self._calls) != {len(self._maps)} or not self._maps:
            raise CreditError(
                "credit source 'attention': the attention of this network cannot be read: a layer's call of "
                "torch.nn.functional.scaled_dot_product_attention with keys of picture and text was not seen "
                f"({self._calls} calls by layer); take another source, or the network's default attention"
            )
        return torch.stack(self._maps, dim=1) / len(self._calls)


class _Listener(TorchFunctionMode):
    def __init__(self, note: Callable[[Tensor, Tensor, Tensor | None, float | None], None]) -> None:
        super().__init__()
        self._note = note

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        if func is scaled_dot_product_attention:
            names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
            named = dict(zip(names, args, strict=False)) | options
            # A picture sees all of itself: what looks back alone is the text's.
            if not named.get("is_causal"):
                # In fp32, whatever the network runs in.
                with torch.no_grad(), torch.autocast(named["query"].device.type, enabled=False):
                    self._note(named["query"], named["key"], named.get("attn_mask"), named.get("scale"))
        return func(*args, **options)


def words_attention(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
    *,
    words: Sequence[Sequence[int]],
    where: TextAttention,
    positions: Sequence[int],
) -> Tensor | None:
    """How much of its attention each position pays to the words: ``softmax(q k' scale + mask)`` over all keys, summed
    over the words' and averaged over heads.

    Args:
        query: ``(B, heads, queries, d)``; where b samples are guided, B is 2 b, theirs the last b.
        key: ``(B, heads, keys, d)``.
        mask: as of `torch.nn.functional.scaled_dot_product_attention`: bool, True where a key is read, or added.
        scale: None: ``1 / sqrt(d)``.
        words: of each of the b samples, places of its words among the text's keys.
        where: how queries and keys are laid out.
        positions: ``([T,] H, W)`` of the latents.

    Returns:
        ``(b, [T,] H, W)`` float32, resized from the tokens' grid (bilinear, antialiased); None where these are no
        queries of a picture to keys with its text.
    """
    batch, *_, queries, width = query.shape
    keys = key.shape[2]
    grid = _grid(queries if where.keys == "cross" else None, where, positions)
    if grid is None or batch % len(words):
        return None
    count = math.prod(grid)
    filled = count + -count % where.multiple
    # The text's keys in front, or behind the picture's.
    text = {"cross": 0, "first": 0, "last": filled}[where.keys]
    picture = keys - count if where.keys == "first" else 0
    longest = max(place for own in words for place in own)
    if text + longest >= (keys if where.keys != "first" else picture):
        return None
    if where.keys != "cross" and queries not in (keys, count):
        return None
    # Those of joint attention are all tokens', or the picture's alone.
    picture = picture if queries == keys else 0
    own = slice(batch - len(words), None)
    q, k = query[own, :, picture : picture + count].float(), key[own].float()
    chosen = torch.zeros(len(words), keys)
    for row, places in enumerate(words):
        chosen[row, [text + place for place in places]] = 1.0
    chosen = chosen.to(key.device)
    whole = None if mask is None else mask.expand(batch, *mask.shape[1:-2], queries, keys)[own]
    if whole is not None and whole.ndim == 3:
        whole = whole[:, None]
    size = max(1, _PIECE // (len(words) * q.shape[1] * keys))
    found = []
    for start in range(0, count, size):
        logits = q[:, :, start : start + size] @ k.mT * (width**-0.5 if scale is None else scale)
        if whole is not None:
            piece = whole[:, :, picture + start : picture + min(count, start + size)]
            logits = logits.masked_fill(~piece, -math.inf) if piece.dtype == torch.bool else logits + piece.float()
        found.append((logits.softmax(dim=-1) @ chosen[:, None, :, None])[..., 0].mean(dim=1))
    maps = torch.cat(found, dim=1).unflatten(1, grid)
    frames = maps.reshape(-1, *grid[-2:])
    resized = resize(frames, (positions[-2], positions[-1]))
    return resized.reshape(len(words), *positions)


def _grid(queries: int | None, where: TextAttention, positions: Sequence[int]) -> tuple[int, ...] | None:
    """``([T,] h, w)`` of the picture's tokens: by their number, or where it is not known by itself, by their patch."""
    *frames, height, width = positions
    if queries is None:
        return (*frames, height // where.patch, width // where.patch)
    factor = 1
    while factor <= max(height, width):
        # A UNet's levels round up.
        grid = (*frames, -(-height // factor), -(-width // factor))
        if math.prod(grid) == queries:
            return grid
        factor *= 2
    return None
