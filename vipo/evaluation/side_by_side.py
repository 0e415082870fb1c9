"""`vipo sample`: pictures of a trained run beside the base's, from the same prompts and noise."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from tqdm import tqdm

from vipo.config.compose import load_config_file
from vipo.config.run import Config
from vipo.determinism import prepare_process
from vipo.evaluation.held_out import HeldOut, save_sample
from vipo.evaluation.sample import draw, evaluation_chain, trained_weights
from vipo.generators import Generator, load_generator
from vipo.generators.compiler import check_compiler
from vipo.generators.configured import check_device, held_to_sample
from vipo.generators.embeddings import encode_prompts
from vipo.generators.lora import check_adapted
from vipo.memory import memory_errors
from vipo.prompts import Prompt
from vipo.prompts.prompt import PromptError, clean_text, is_blank, prompt_id
from vipo.provenance.files import atomic_file
from vipo.text import visible
from vipo.tracking.progress import progress_bar

_LEAST_SIDE = 192
_GAP = 8
_LINE = 20
_NAMES = 72


def draw_side_by_side(
    run: Path, texts: Sequence[str], output: Path, root: Path, *, samples: int, seed: int | None, steps: int | None
) -> Path:
    """Draw prompts with the base and with a run's final weights, below each other, and write one picture.

    A sample is keyed by the seed, its prompt and its number, as in the evaluation: a held-out prompt gives the very
    pictures that the evaluation scored.

    Args:
        run: ``results/<experiment>/runs/<arm>-s<seed>``, trained.
        texts: the prompts; cleaned as `prepare` cleans them.
        output: ``.png``; of a generator of videos it is animated.
        root: repository root, for relative paths.
        samples: pictures a prompt.
        seed: of the noise; None: the evaluation's.
        steps: of the sampler; None: the evaluation's.

    Raises:
        EvaluationError, ConfigError: no finished run is there, or it is the base's.
        PromptError: a prompt is blank.
        GeneratorError: the generator or the run's weights cannot be loaded.
    """
    config = load_config_file(run / "config.yaml")
    changed = {key: value for key, value in (("seed", seed), ("steps", steps)) if value is not None}
    config = config.model_copy(update={"evaluation": config.evaluation.model_copy(update=changed)})
    check_device(config.generator)
    check_compiler(config.generator)
    prompts = _prompts(texts)
    folder = list(trained_weights(config, run, root).values())[-1]
    prepare_process(config.generator.device, config.training.threads)
    drawn = [HeldOut(prompt, number) for prompt in prompts for number in range(samples)]
    names = ("base", config.run_name)
    with memory_errors(f"samples of {config.run_name}", "Ask for fewer prompts, or lower evaluation.batch"):
        encoded, device = encode_prompts(config.generator, root, prompts), config.generator.device
        embeddings = {key: {name: value.to(device) for name, value in row.items()} for key, row in encoded.items()}
        generator = load_generator(held_to_sample(config.evaluated), root)
        pictures = []
        with progress_bar(total=2 * len(drawn), description=f"{config.run_name}: samples", unit="sample") as progress:
            pictures.append(_drawn(generator, drawn, embeddings, config, progress))
            generator.load_network(folder)
            if config.training.lora is not None:
                check_adapted(generator, config.training.lora.targets, folder)
            pictures.append(_drawn(generator, drawn, embeddings, config, progress))
    sheet = side_by_side([prompt.text for prompt in prompts], names, torch.stack(pictures))
    with atomic_file(output) as path:
        save_sample(sheet, path, generator.frame_rate)
    return output


def _drawn(
    generator: Generator,
    samples: Sequence[HeldOut],
    embeddings: dict[str, dict[str, Tensor]],
    config: Config,
    progress: "tqdm[Any]",
) -> Tensor:
    chain, batch, images = evaluation_chain(generator, config), config.evaluation.batch, []
    for start in range(0, len(samples), batch):
        images.append(draw(generator, chain, samples[start : start + batch], embeddings, config))
        progress.update(len(images[-1]))
    return torch.cat(images)


def _prompts(texts: Sequence[str]) -> list[Prompt]:
    cleaned = dict.fromkeys(clean_text(text) for text in texts)
    if any(is_blank(text) for text in cleaned):
        raise PromptError("a prompt is blank: give text that can be seen")
    return [Prompt(prompt_id(text), text, {}) for text in cleaned]


def side_by_side(texts: Sequence[str], names: Sequence[str], pictures: Tensor) -> Tensor:
    """A sheet: of each prompt its text, and a row of samples for each of `names`.

    Args:
        texts: P prompts.
        names: R, what each row was drawn with.
        pictures: ``(R, P * samples, [T,] 3, H, W)`` in [0, 1], prompt by prompt.

    Returns:
        ``([T,] 3, height, width)`` in [0, 1], multiples of 1/255. Small pictures are enlarged by a whole factor.
    """
    rows, count = len(names), pictures.shape[1] // len(texts)
    scale = max(1, -(-_LEAST_SIDE // min(pictures.shape[-2:])))
    cells = (pictures * 255).round().to(torch.uint8).repeat_interleave(scale, -1).repeat_interleave(scale, -2)
    clips = cells if cells.ndim == 6 else cells[:, :, None]
    height, width = clips.shape[-2:]
    block = _LINE + rows * (height + _GAP)
    size = (_NAMES + count * (width + _GAP) + _GAP, len(texts) * (block + _GAP) + _GAP)
    sheet = Image.new("RGB", size, "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for number, text in enumerate(texts):
        top = _GAP + number * (block + _GAP)
        pen.text((_GAP, top), _fitting(visible(text), pen, font, size[0] - 2 * _GAP), "black", font)
        for row, name in enumerate(names):
            pen.text((_GAP, top + _LINE + row * (height + _GAP)), _fitting(name, pen, font, _NAMES), "dimgray", font)
    frames = torch.from_numpy(np.array(sheet)).movedim(-1, 0).repeat(clips.shape[2], 1, 1, 1)
    for row in range(rows):
        for position in range(len(texts) * count):
            number, column = divmod(position, count)
            top = _GAP + number * (block + _GAP) + _LINE + row * (height + _GAP)
            left = _NAMES + _GAP + column * (width + _GAP)
            frames[:, :, top : top + height, left : left + width] = clips[row, position]
    made = frames.float() / 255
    return made if cells.ndim == 6 else made[0]


def _fitting(text: str, pen: ImageDraw.ImageDraw, font: object, width: int) -> str:
    if pen.textlength(text, font) <= width:  # type: ignore[arg-type]
        return text
    while text and pen.textlength(f"{text}…", font) > width:  # type: ignore[arg-type]
        text = text[:-1]
    return f"{text}…"
