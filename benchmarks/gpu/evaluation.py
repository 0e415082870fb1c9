"""What samples of an evaluation cost, at training's size and at one of its own; their memory against `vipo plan`."""

import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch

from benchmarks.gpu.planned import over_plan
from benchmarks.gpu.prepared import prepared_config
from benchmarks.gpu.real_size import GIB
from benchmarks.gpu.record import Record
from benchmarks.gpu.size import Size, family_overrides
from benchmarks.timing import seconds_of
from vipo.config.compose import load_config, repository_root
from vipo.config.run import Config
from vipo.determinism import prepare_process
from vipo.evaluation.held_out import held_out_batches
from vipo.evaluation.sample import draw, evaluation_chain
from vipo.generators import load_generator
from vipo.generators.embeddings import load_embeddings
from vipo.prompts import read_prompts

_SAME = ("evaluation.height=null", "evaluation.width=null")


def measure_evaluation(record: Record, size: Size, device: str, planned: Mapping[str, int]) -> None:
    """Note what one batch of samples costs that the stage `sample` draws, at training's size and at the evaluation's.

    Args:
        planned: bytes, as `vipo plan` counts them.

    Raises:
        RuntimeError: samples of another size than asked for came.
    """
    root = repository_root()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        overrides = family_overrides(size, folder, device)
        cases = {"at_training_size": load_config([*overrides, *_SAME]), "at_its_own_size": load_config(overrides)}
        experiment = folder / cases["at_its_own_size"].experiment.name
        # As the stage does: other kernels have other seconds and other memory.
        prepare_process(device, cases["at_its_own_size"].training.threads)
        prepared_config(overrides, folder)
        for case, config in cases.items():
            peak = _draw(record, case, config, root, experiment)
    for share in over_plan({} if peak is None else {"evaluation": peak}, planned, 0).values():
        record.put("at_its_own_size.memory_over_plan", round(share, 4))


def _draw(record: Record, case: str, config: Config, root: Path, experiment: Path) -> int | None:
    """Note what a batch costs after one has been drawn; gives the device's peak in bytes."""
    held_out, embedded = experiment / "prompts" / "eval.jsonl", experiment / "embeddings" / "eval.safetensors"
    generator, target = load_generator(config.evaluated, root), torch.device(config.generator.device)
    chain, batch = evaluation_chain(generator, config), held_out_batches(held_out, config)[0]
    widths = generator.conditioning_widths(config.generator, root)
    embeddings = load_embeddings(embedded, read_prompts(held_out), target, widths)
    draw(generator, chain, batch, embeddings, config)
    if target.type == "cuda":
        torch.cuda.reset_peak_memory_stats(target)
    shapes: list[tuple[int, ...]] = []
    seconds = seconds_of(lambda: shapes.append(tuple(draw(generator, chain, batch, embeddings, config).shape)), target)
    record.put(f"{case}.samples", list(shapes[0]))
    record.put(f"{case}.seconds_a_sample", round(seconds / len(batch), 4))
    if shapes[0] != (len(batch), *config.evaluated.sample_shape):
        raise RuntimeError(f"{case}: samples are {shapes[0]}, {config.evaluated.sample_shape} was asked for")
    if target.type != "cuda":
        return None
    peak = torch.cuda.max_memory_allocated(target)
    record.put(f"{case}.memory_gib", round(peak / GIB, 2))
    return peak
