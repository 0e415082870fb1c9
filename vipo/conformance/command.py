"""What `vipo check-generator` does with a configuration."""

from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from vipo.config.generator import GeneratorConfig
from vipo.config.training import LoraConfig, TrainingConfig
from vipo.config.validation import validate_section
from vipo.conformance.checks import Finding
from vipo.conformance.subject import PROMPTS, subject
from vipo.conformance.table import line, run_checks
from vipo.generators.base import GeneratorError
from vipo.generators.configured import resolve_class


def compare(
    generator: GeneratorConfig,
    learning: TrainingConfig,
    root: Path,
    *,
    size: tuple[int, int, int],
    steps: int,
    prompts: Sequence[str] | None,
    without: Collection[str],
    said: Callable[[str], object],
) -> list[Finding]:
    """Compare the configured generator with its stock pipeline.

    Args:
        generator: section of that name, but for size.
        learning: section `training`, for LoRA's targets.
        root: repository root, for relative paths.
        size: height and width of the compared samples in pixels, and their frames where the family makes videos.
        steps: of the compared sample.
        prompts: two or more; None: short ones of vipo's.
        without: names of comparisons that are left out.
        said: is given each line of the table as it comes.

    Raises:
        ConfigError: such samples are too large.
        GeneratorError: the checkpoint cannot be loaded or encode the prompts, or the stock pipeline cannot sample.
    """
    if prompts is not None and len(prompts) < 2:
        raise GeneratorError("--prompt: give two or more, for what is compared depends on the batch")
    height, width, frames = size
    video = resolve_class(generator).frame_rate is not None
    changes = {"height": height, "width": width, "frames": frames if video else None}
    generator = validate_section(GeneratorConfig, generator.model_dump() | changes, "generator.")
    # A scale other than 1 shows whether an export keeps it.
    lora = LoraConfig(rank=2, alpha=6.0, targets=(learning.lora or LoraConfig()).targets)
    shown = f"{height} x {width}" + (f" x {frames}" if video else "")
    said(f"{generator.family} at {generator.path}: {shown}, {steps} steps, on {generator.device}")
    compared = subject(generator, root, lora=lora, steps=steps, prompts=prompts or PROMPTS)
    found = []
    for each in run_checks(compared, without):
        said(line(each))
        found.append(each)
    return found
