"""Commands that sample, score and compare: `vipo evaluate`, `compare`, `sample` and `credit`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from vipo.commands.options import RESULTS, ConfigFile, Overrides, Results, Wait, checked, say
from vipo.config.compose import configuration, repository_root
from vipo.config.validation import ConfigError


def evaluate(
    overrides: Overrides = None,
    file: ConfigFile = None,
    results: Results = RESULTS,
    wait: Wait = 0,
    weights: Annotated[
        Path | None,
        typer.Option(help="Other weights of the generator: a run's weights/, one of its updates/, a LoRA's folder."),
    ] = None,
    only: Annotated[
        Literal["sample", "score"] | None,
        typer.Option(help="This stage alone, of this run alone: sample (the base with arm=base), or score."),
    ] = None,
    share: Annotated[
        str | None,
        typer.Option(metavar="N/COUNT", help="With --only: this part of its work; without it, what is missing."),
    ] = None,
) -> None:
    """Sample the held-out prompts with one run's weights and score them: `sample`, of the base too, then `score`."""
    if only is None and share is not None:
        raise ConfigError(f"--share {share}: is of one stage; add --only sample or --only score")
    if only is not None and weights is not None:
        raise ConfigError(f"--weights {weights}: is sampled and scored in one go; leave out --only")
    from vipo.stages import evaluate_stage, sample_stage, score_stage

    chosen, root = checked(overrides, file), repository_root()
    if only is None:
        evaluate_stage(chosen, root, results, wait, weights)
    else:
        (sample_stage if only == "sample" else score_stage)(chosen, root, results, wait, share=share)


def compare(
    overrides: Overrides = None,
    file: ConfigFile = None,
    results: Results = RESULTS,
    wait: Wait = 0,
    also: Annotated[
        list[str] | None,
        typer.Option(metavar="RUN", help="A further run, as 'vipo evaluate --weights' called it; may come twice."),
    ] = None,
) -> None:
    """Compare all scored runs: by category, wins, all metrics together (Holm), totals of a set, diversity."""
    from vipo.stages import compare_stage

    for path in compare_stage(configuration(overrides, file), repository_root(), results, wait, also or ()):
        say(path)


def sample(
    run: Annotated[Path, typer.Argument(help="Folder results/<experiment>/runs/<arm>-s<seed>, trained.")],
    prompts: Annotated[list[str], typer.Argument(help="Prompts, each in quotes.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="A .png file; default: <arm>-s<seed>.png here.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, max=64, help="Pictures a prompt.")] = 4,
    seed: Annotated[int | None, typer.Option(min=0, max=2**63 - 1, help="Of the noise; default: evaluation's.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, max=1000, help="Of the sampler; default: evaluation's.")] = None,
) -> None:
    """Draw prompts with the base and with a run's trained weights, from the same noise, into one picture."""
    target = Path(f"{run.resolve().name}.png") if output is None else output
    if target.suffix.lower() != ".png":
        raise ConfigError(f"--output {target}: must end in .png")
    from vipo.evaluation.side_by_side import draw_side_by_side

    say(draw_side_by_side(run, prompts, target, repository_root(), samples=samples, seed=seed, steps=steps))


def credit(
    overrides: Overrides = None,
    file: ConfigFile = None,
    results: Results = RESULTS,
    wait: Wait = 0,
    weights: Annotated[
        Path | None,
        typer.Option(help="A run's weights/, or one of its updates/; default: the generator as it is."),
    ] = None,
) -> None:
    """Measure, before any training, which arm's credit raises the reward most per unit of change (resumable).

    What is measured is section experiment.meter (experiment.meter.arms=[grpo,contrast], experiment.meter.updates=40).
    """
    from vipo.config.experiment import configured_arms
    from vipo.config.meter import MeterConfig

    chosen = checked(overrides, file)
    meter = chosen.experiment.meter or MeterConfig()
    if file is None:
        rest = [text for text in overrides or [] if not text.startswith("arm=")]
        configs = {name: checked([*rest, f"arm={name}"], None) for name in meter.arms}
    else:
        configs = configured_arms(file, chosen, meter.arms)
    from vipo.stages import credit_stage

    say(credit_stage(configs, meter, repository_root(), results, weights, wait))
