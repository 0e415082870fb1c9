"""Weights in files that hold a number for every parameter."""

from pathlib import Path

from safetensors import SafetensorError, safe_open

from vipo.generators.base import GeneratorError
from vipo.provenance.records import checkpoint_files


def check_finite(folder: Path) -> None:
    """Read all weights below `folder` (safetensors), one tensor at a time.

    Raises:
        GeneratorError: a file cannot be read, or a tensor holds a value that is not finite; the message names both.
    """
    for file in checkpoint_files(folder, (".safetensors",)):
        try:
            with safe_open(file, "pt") as stored:
                for name in stored.keys():  # noqa: SIM118
                    tensor = stored.get_tensor(name)
                    if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                        raise GeneratorError(
                            f"{file}: tensor {name!r} holds values that are not finite (NaN or infinite), so that no "
                            "picture can come of it; train the run again, with a lower optimizer.learning_rate or "
                            "generator.precision=fp32"
                        )
        except (OSError, SafetensorError) as error:
            raise GeneratorError(f"{file}: weights cannot be read ({error}); restore it, or train again") from error
