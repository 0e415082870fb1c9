rule compare:
    input:
        config=config_file(FIRST),
        prompts=rules.prepare.output,
        scores=expand(rules.score.output.scores, run=RUNS),
        samples=expand(rules.sample.output.pictures, run=RUNS),
    output:
        expand(
            f"{EXPERIMENT_DIR}/comparison/{{table}}.csv",
            table=["categories", "win_rates", "metrics", "totals", "diversity"],
        ),
    log:
        f"{EXPERIMENT_DIR}/logs/compare.log",
    resources:
        **job_resources(RUNS[FIRST], "report"),
    params:
        identity=identity(FIRST, "report"),
    shell:
        "vipo compare --config {input.config} > {log} 2>&1"


rule summarize:
    input:
        config=config_file(FIRST),
        prompts=rules.prepare.output,
        configs=expand(rules.score.output.config, run=RUNS),
        scores=expand(rules.score.output.scores, run=RUNS),
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
        samples=expand(rules.sample.output.pictures, run=RUNS),
        maps=expand(rules.score.output.maps, run=RUNS),
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
        compared=rules.compare.output,
        measured=MEASURED,
    output:
        f"{EXPERIMENT_DIR}/ro-crate-metadata.json",
    log:
        f"{EXPERIMENT_DIR}/logs/crate.log",
    resources:
        **job_resources(RUNS[FIRST], "crate"),
    shell:
        "vipo crate --config {input.config} > {log} 2>&1"
