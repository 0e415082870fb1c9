rule summarize:
    input:
        config=config_file(FIRST),
        prompts=rules.prepare.output,
        configs=expand(rules.evaluate.output.config, run=RUNS),
        scores=expand(rules.evaluate.output.scores, run=RUNS),
        metrics=expand(rules.train.output.metrics, run=TRAINED),
    output:
        data=f"{EXPERIMENT_DIR}/report/data/report.json",
        tables=directory(f"{EXPERIMENT_DIR}/report/data/tables"),
        figures=directory(f"{EXPERIMENT_DIR}/report/data/figures"),
    log:
        f"{EXPERIMENT_DIR}/logs/summarize.log",
    resources:
        **job_resources(RUNS[FIRST], "report"),
    params:
        identity=identity(FIRST, "report"),
    shell:
        "vipo summarize --config {input.config} > {log} 2>&1"


# The page and the crate also show times and records of this machine: what they are made of is no output of any rule.
rule report:
    input:
        config=config_file(FIRST),
        data=rules.summarize.output.data,
        samples=expand(rules.evaluate.output.samples, run=RUNS),
        maps=expand(rules.evaluate.output.maps, run=RUNS),
        measured=MEASURED,
    output:
        page=f"{EXPERIMENT_DIR}/report/index.html",
    log:
        f"{EXPERIMENT_DIR}/logs/report.log",
    resources:
        **job_resources(RUNS[FIRST], "report"),
    params:
        identity=identity(FIRST, "report"),
    shell:
        "vipo report --config {input.config} > {log} 2>&1"


rule crate:
    input:
        config=config_file(FIRST),
        page=rules.report.output.page,
        data=rules.summarize.output.data,
        measured=MEASURED,
    output:
        f"{EXPERIMENT_DIR}/ro-crate-metadata.json",
    log:
        f"{EXPERIMENT_DIR}/logs/crate.log",
    resources:
        **job_resources(RUNS[FIRST], "crate"),
    shell:
        "vipo crate --config {input.config} > {log} 2>&1"
