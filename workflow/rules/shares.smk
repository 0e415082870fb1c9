"""Where cluster.shares is above 1: the jobs that share one run's samples, and then their scores."""


rule sample_share:
    input:
        unpack(sampled_from),
    output:
        temp(touch(share_file("samples", "{run}", "{share}"))),
    log:
        f"{EXPERIMENT_DIR}/logs/sample-{{run}}-{{share}}.log",
    priority: 1
    threads: RUNS[FIRST].training.threads
    resources:
        **job_resources(RUNS[FIRST], "evaluate"),
    params:
        identity=lambda wildcards: identity(wildcards.run, "sampling"),
        shares=SHARES,
    shell:
        "vipo evaluate --only sample --config {input.config} --share {wildcards.share}/{params.shares} > {log} 2>&1"


rule score_share:
    input:
        unpack(scored_from),
    output:
        temp(touch(share_file("evaluation", "{run}", "{share}"))),
    log:
        f"{EXPERIMENT_DIR}/logs/score-{{run}}-{{share}}.log",
    threads: RUNS[FIRST].training.threads
    resources:
        **job_resources(RUNS[FIRST], "evaluate"),
    params:
        identity=lambda wildcards: identity(wildcards.run, "evaluation"),
        shares=SHARES,
    shell:
        "vipo evaluate --only score --config {input.config} --share {wildcards.share}/{params.shares} > {log} 2>&1"
