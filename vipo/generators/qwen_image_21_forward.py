"""Qwen-Image 2.1's network as vipo calls it: text to picture, prompts of several lengths in one call.

The stock forward pass takes one layout for a whole batch: of prompts of several lengths it puts every picture where the
longest prompt ends, so that a prediction depends on the prompts beside it. And it reads values on the host eight times
a call. Here each sample's picture stands where its own prompt ends, as in the stock pipeline with that prompt alone,
and nothing is read.
"""

from typing import Any

import torch
from diffusers import QwenImage21Transformer2DModel
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor

from vipo.generators.packing import flat_tokens, from_flat_tokens

Rotation = tuple[Tensor, Tensor]
"""Cosines and sines, ``(B, S, 1, d / 2)``, of what each token's pairs of channels are turned by."""


def as_text_to_picture(network: QwenImage21Transformer2DModel) -> QwenImage21Transformer2DModel:
    """Let a network be called as `_TextToPicture` says; its weights, its file and the name of its class stay."""
    network.set_attn_processor(PrefixAttention())
    network.__class__ = _TextToPicture
    return network


class _TextToPicture(QwenImage21Transformer2DModel):
    def forward(
        self, latents: Tensor, sigma: Tensor, encoder_hidden_states: Tensor, encoder_hidden_states_mask: Tensor
    ) -> tuple[Tensor]:
        """The velocity of a picture, by its prompt.

        Text and picture are one sequence. A word attends to the words before it, the picture to its own words and to
        itself whole. Words are modulated as at noise level 0, so that they have no part in the picture's.

        Args:
            latents: ``(B, C, H, W)``; a latent pixel is a token.
            sigma: ``(B,)``, noise level.
            encoder_hidden_states: ``(B, L, D)``.
            encoder_hidden_states_mask: ``(B, L)``, 1 where a token is the prompt's, then 0.

        Returns:
            ``(B, C, H, W)``, alone in a tuple.
        """
        height, width = latents.shape[-2:]
        text = self.txt_in(encoder_hidden_states)
        picture = self.img_in(flat_tokens(latents))
        words, tokens = text.shape[1], picture.shape[1]
        joint = torch.cat([text, picture], dim=1)
        # The last row is that of the words, at noise level 0.
        embedded = self.time_text_embed(torch.cat([sigma, sigma.new_zeros(1)]), joint)
        modulation = self.modulation(embedded)
        of_picture = torch.arange(words + tokens, device=joint.device) >= words
        valid = torch.nn.functional.pad(encoder_hidden_states_mask.bool(), (0, tokens), value=True)
        rotation = _rotation(self, encoder_hidden_states_mask.sum(dim=1), words, (height, width))
        for block in self.transformer_blocks:
            given = (joint, modulation, rotation, None, of_picture, None, None, None, [(0, words, True)], valid)
            if self.gradient_checkpointing and torch.is_grad_enabled():
                joint = self._gradient_checkpointing_func(block, *given)
            else:
                joint = block(*given)
        velocity = self.proj_out(self.norm_out(joint[:, words:], embedded[:-1]))
        return (from_flat_tokens(velocity, (*velocity.shape[::2], height, width)),)


# As it stands in files.
_TextToPicture.__name__ = QwenImage21Transformer2DModel.__name__


def _rotation(network: Any, lengths: Tensor, words: int, size: tuple[int, int]) -> Rotation:
    # Frame, row and column of each token. Words count through on all three; a picture has the frame at which its words
    # end, and its rows and columns are counted from its middle.
    device, (height, width) = lengths.device, size
    count = torch.arange(words, device=device).expand(len(lengths), words)
    row, column = (torch.arange(side, device=device) - (side - side // 2) for side in size)
    places = (
        lengths[:, None].expand(-1, height * width),
        row.repeat_interleave(width, output_size=height * width).expand(len(lengths), -1),
        column.repeat(height).expand(len(lengths), -1),
    )
    angles = [
        torch.cat([count, place], dim=1)[:, :, None] * _frequencies(network.pos_embed.theta, channels, device)
        for place, channels in zip(places, network.pos_embed.axes_dim, strict=True)
    ]
    whole = torch.cat(angles, dim=-1)[:, :, None]
    return whole.cos(), whole.sin()


def _frequencies(theta: int, channels: int, device: torch.device) -> Tensor:
    exponents = torch.arange(0, channels, 2, device=device).float() / channels
    return 1.0 / torch.pow(theta, exponents)


class PrefixAttention:
    """Attention of words to the words before them, and of the picture to its words and itself: two calls of diffusers'
    dispatcher, of whose backends it takes the one that is set.

    Like diffusers' own processor, which asks for the default backend whatever is set, and turns all samples alike.
    """

    _attention_backend: Any = None
    _parallel_config: Any = None

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        rotary_emb: Rotation,
        segments: list[tuple[int, int, bool]],
        key_valid: Tensor,
        **unused: object,
    ) -> Tensor:
        """Attend.

        Args:
            attn: the module, with its projections and norms.
            hidden_states: ``(B, S, D)``, words first.
            rotary_emb: of every token.
            segments: of the words, where they begin and end.
            key_valid: ``(B, S)``, whether a token is one of the prompt's, or of the picture.
            unused: what a block hands on beside.
        """
        [(_, words, _)] = segments
        head = attn.inner_dim // attn.heads
        query, key, value = (
            project(hidden_states).unflatten(-1, (-1, head)) for project in (attn.to_q, attn.to_k, attn.to_v)
        )
        query, key = (
            _turned(norm(each).to(value.dtype), rotary_emb) for norm, each in ((attn.norm_q, query), (attn.norm_k, key))
        )
        # What fills a prompt up stands behind it, where no word of it looks.
        text = self._attend(query[:, :words], key[:, :words], value[:, :words], is_causal=True)
        picture = self._attend(query[:, words:], key, value, attn_mask=key_valid[:, None, None])
        attended = torch.cat([text, picture], dim=1).flatten(2).type_as(query)
        mixed: Tensor = attn.to_out[1](attn.to_out[0](attended))
        return mixed

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, **options: object) -> Tensor:
        attended: Tensor = dispatch_attention_fn(
            query, key, value, backend=self._attention_backend, parallel_config=self._parallel_config, **options
        )
        return attended


def _turned(value: Tensor, rotation: Rotation) -> Tensor:
    cosine, sine = rotation
    first, second = value.float().unflatten(-1, (-1, 2)).unbind(dim=-1)
    turned = torch.stack([first * cosine - second * sine, first * sine + second * cosine], dim=-1)
    return turned.flatten(-2).type_as(value)
