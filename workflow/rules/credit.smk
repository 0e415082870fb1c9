"""What the credit of the experiment's arms is worth at the checkpoints that section experiment.meter names."""

from vipo.config.comparable import check_comparable
from vipo.config.meter import check_checkpoints

ARMS = RUNS[FIRST].experiment.arms
if absent := [arm for arm in METER.arms if arm not in ARMS]:
    raise WorkflowError(
        f"experiment {EXPERIMENT}: experiment.meter.arms: {', '.join(absent)}: not among experiment.arms; add them there"
    )
COMPARED = {arm: RUNS[f"{arm}-s{ARMS[arm].seeds[0]}"] for arm in METER.arms}
# All arms are measured by the networks of the first.
MEASURING = COMPARED[METER.arms[0]]
try:
    check_checkpoints(METER, {run: RUNS[run].training.save_at for run in TRAINED})
    # `vipo credit` measures all arms at the first run's seed.
    check_comparable(
        {
            arm: own.model_copy(update={"seed": RUNS[FIRST].seed})
            for arm, own in COMPARED.items()
        }
    )
except ConfigError as error:
    raise WorkflowError(f"experiment {EXPERIMENT}: {error}") from error
WEIGHTS = {
    measurement_label(name): measured_weights(name, Path(EXPERIMENT_DIR))
    for name in METER.checkpoints
}


def measured_run(wildcards):
    """The finished run whose weights are measured; the generator as it is needs none."""
    weights = WEIGHTS[wildcards.checkpoint]
    return (
        []
        if weights is None
        else f"{EXPERIMENT_DIR}/runs/{weights.relative_to(f'{EXPERIMENT_DIR}/runs').parts[0]}/weights"
    )


def weights_option(wildcards):
    """How `vipo credit` is told of them."""
    weights = WEIGHTS[wildcards.checkpoint]
    return "" if weights is None else f"--weights {weights}"


rule credit:
    input:
        config=config_file(FIRST),
        prompts=rules.prepare.output,
        embeddings=rules.encode.output,
        generator=generator_files(),
        backbone=backbone_files(MEASURING.run_name),
        rewards=reward_files(MEASURING.reward.terms),
        run=measured_run,
    output:
        data=f"{EXPERIMENT_DIR}/credit/{{checkpoint}}/credit.json",
        figure=f"{EXPERIMENT_DIR}/credit/{{checkpoint}}/credit.svg",
    log:
        f"{EXPERIMENT_DIR}/logs/credit-{{checkpoint}}.log",
    wildcard_constraints:
        checkpoint="|".join(map(re.escape, WEIGHTS)),
    threads: RUNS[FIRST].training.threads
    resources:
        **job_resources(RUNS[FIRST], "train", alone=True),
    params:
        identity=json.dumps(
            {
                "meter": METER.model_dump(mode="json", exclude={"checkpoints"}),
                "arms": {
                    arm: own.training_identity() for arm, own in COMPARED.items()
                },
            },
            sort_keys=True,
        ),
        weights=weights_option,
    shell:
        "vipo credit --config {input.config} {params.weights} > {log} 2>&1"
