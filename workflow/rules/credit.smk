"""What the credit of the experiment's arms is worth at the generator as it is, where section experiment.meter asks."""

METER = RUNS[FIRST].experiment.meter
ARMS = RUNS[FIRST].experiment.arms
if absent := [arm for arm in METER.arms if arm not in ARMS]:
    raise WorkflowError(
        f"experiment {EXPERIMENT}: experiment.meter.arms: {', '.join(absent)}: not among experiment.arms; add them there"
    )


rule credit:
    input:
        config=config_file(FIRST),
        prompts=rules.prepare.output,
        embeddings=rules.encode.output,
        generator=generator_files(),
    output:
        data=MEASURED[0],
        figure=f"{EXPERIMENT_DIR}/credit/base/credit.svg",
    log:
        f"{EXPERIMENT_DIR}/logs/credit.log",
    threads: RUNS[FIRST].training.threads
    resources:
        **job_resources(RUNS[FIRST], "train"),
    params:
        identity=json.dumps(
            [
                METER.model_dump(mode="json"),
                *(
                    identity(f"{arm}-s{ARMS[arm].seeds[0]}", "training")
                    for arm in METER.arms
                ),
            ]
        ),
    shell:
        "vipo credit --config {input.config} > {log} 2>&1"
