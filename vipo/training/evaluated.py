"""What an evaluation at a size, or with a guidance, of its own would refuse, before anything is trained."""

from collections.abc import Callable
from pathlib import Path

from torch._subclasses.fake_tensor import FakeTensorMode

from vipo.config.run import Config
from vipo.generators import Generator
from vipo.generators.base import GeneratorError
from vipo.generators.outline import outline
from vipo.generators.pipeline import PipelineGenerator


def evaluated_shift(config: Config, root: Path, generator: Generator) -> float | Callable[[int], float] | None:
    """`Generator.flow_shift` at the size that is evaluated; no weights are read.

    Args:
        config: the run.
        root: repository root, for relative paths.
        generator: of the training. An adapter that is no `PipelineGenerator` shows its other sizes when it is loaded
            for them, in the `sample` stage; the shift is then not known here.

    Raises:
        GeneratorError: the generator does not make samples of that size.
    """
    if config.evaluated == config.generator:
        return generator.flow_shift
    if not isinstance(generator, PipelineGenerator):
        return None
    try:
        return outline(config.evaluated, root, FakeTensorMode(allow_non_fake_inputs=True), None).flow_shift
    except GeneratorError as error:
        raise GeneratorError(f"section evaluation, what it sets of section generator: {error}") from error
