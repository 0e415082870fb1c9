"""The shipped generator of clips films what its captions say; nothing but the drawing's own checker tells."""

import itertools

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vipo.config.compose import load_config, repository_root
from vipo.demo import motion, scenes
from vipo.demo.seen import check, foreground, read_scenes
from vipo.generators import load_generator
from vipo.generators.embeddings import stack_conditioning
from vipo.generators.wan import WanGenerator
from vipo.sampling.chain import sampling_chain
from vipo.sampling.noise import keyed_normal
from vipo.sampling.rollout import sample_ode

ROOT = repository_root()
FRAMES = (0, 4, 8)
KINDS = ("shape", "color", "background", "direction")


def read(clip: Tensor, claim: motion.MovingShape) -> list[bool]:
    """Whether a clip ``(9, 3, 32, 32)`` shows in its first, middle and last frame what it should, and moves there."""
    seen = read_scenes(F.interpolate(clip[list(FRAMES)], scale_factor=2, mode="bilinear"))
    wanted = {"objects": [{"shape": claim.shape, "color": claim.color}], "background": claim.background}
    checks = [check(frame, wanted) for frame in seen]
    mask = foreground(clip).float()
    axis = torch.arange(float(motion.SIZE))
    across, along = ((mask.sum(dim=dim) @ axis / mask.sum(dim=(1, 2))) for dim in (1, 2))
    way = np.array([across[-1] - across[0], along[-1] - along[0]])
    moved = max(motion.DIRECTIONS, key=lambda name: float(np.dot(motion.DIRECTIONS[name], way)))
    return [*(all(check[kind] for check in checks) for kind in KINDS[:3]), moved == claim.direction]


def test_the_checker_reads_what_is_drawn() -> None:
    rng = np.random.default_rng(0)
    items = [motion.sample_clip(rng) for _ in range(20)]
    assert all(all(read(torch.from_numpy(motion.draw(item)).transpose(0, 1), item)) for item in items)


def test_clips_show_what_their_captions_say() -> None:
    """Every fifth caption with a colour, trained on or held out, by the experiment's own steps."""
    config = load_config(["experiment=demo_video"])
    generator = load_generator(config.generator, ROOT)
    named = itertools.product(scenes.SHAPES, scenes.COLORS, scenes.BACKGROUNDS, motion.DIRECTIONS)
    claims = [motion.MovingShape(*names, 0.0, 0.0, 7.0) for names in itertools.islice(named, 0, None, 5)]
    texts = [motion.caption(claim.shape, claim.direction, claim.background, claim.color) for claim in claims]
    encoded = dict(zip(texts, WanGenerator.encode_prompts(config.generator, ROOT, texts), strict=True))
    chain = sampling_chain(config.sampling, "velocity", steps=config.evaluation.steps)
    noise = keyed_normal([(0, "quality", number) for number in range(len(texts))], generator.latent_shape)
    clips = generator.decode(sample_ode(generator, stack_conditioning(encoded, texts), chain, noise))
    right = np.array([read(clip, claim) for clip, claim in zip(clips, claims, strict=True)])
    shares = dict(zip(KINDS, right.mean(axis=0), strict=True)) | {"all": right.all(axis=1).mean()}
    # Of all 288 captions .96; of these 58 a few more or less.
    assert shares.pop("all") > 0.88, shares
    assert shares.pop("shape") > 0.88, shares
    assert min(shares.values()) > 0.95, shares
