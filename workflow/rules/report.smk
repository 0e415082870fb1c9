rule report:
    input:
        config=[config_file(run) for run in RUNS],
        scores=expand(rules.evaluate.output.scores, run=RUNS),
        metrics=expand(rules.train.output.metrics, run=TRAINED),
    output:
        page=f"{EXPERIMENT_DIR}/report/index.html",
        data=f"{EXPERIMENT_DIR}/report/report.json",
        provenance=f"{EXPERIMENT_DIR}/report/provenance.json",
    log:
        f"{EXPERIMENT_DIR}/logs/report.log",
    params:
        sections=[report_sections(run) for run in RUNS],
    shell:
        "vipo report --config {input.config[0]} 2>&1 | tee {log}"


rule crate:
    input:
        config=config_file(FIRST),
        page=rules.report.output.page,
        data=rules.report.output.data,
    output:
        f"{EXPERIMENT_DIR}/ro-crate-metadata.json",
    log:
        f"{EXPERIMENT_DIR}/logs/crate.log",
    shell:
        "vipo crate --config {input.config} 2>&1 | tee {log}"
