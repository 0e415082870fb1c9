rule train:
    input:
        config=lambda wildcards: config_file(wildcards.run),
        prompts=rules.prepare.output.train,
        manifest=rules.prepare.output.manifest,
        embeddings=rules.encode.output.train,
        generator=generator_files(),
        backbone=lambda wildcards: backbone_files(wildcards.run),
        rewards=lambda wildcards: reward_files(RUNS[wildcards.run].reward.terms),
    output:
        config=f"{EXPERIMENT_DIR}/runs/{{run}}/config.yaml",
        metrics=f"{EXPERIMENT_DIR}/runs/{{run}}/metrics.jsonl",
        weights=directory(f"{EXPERIMENT_DIR}/runs/{{run}}/weights"),
    log:
        f"{EXPERIMENT_DIR}/logs/train-{{run}}.log",
    # The longest jobs first, or the last of them runs alone while a core is idle.
    priority: 2
    threads: RUNS[FIRST].training.threads
    resources:
        **job_resources(RUNS[FIRST], "train"),
    params:
        identity=lambda wildcards: identity(wildcards.run, "training"),
    shell:
        "{resources.launch}vipo train --config {input.config} > {log} 2>&1"


rule sample:
    input:
        unpack(sampled_from),
        shares=lambda wildcards: shares("samples", wildcards.run),
    output:
        facts=f"{EXPERIMENT_DIR}/samples/{{run}}/samples.json",
        pictures=directory(f"{EXPERIMENT_DIR}/samples/{{run}}/pictures"),
    log:
        f"{EXPERIMENT_DIR}/logs/sample-{{run}}.log",
    priority: 1
    threads: RUNS[FIRST].training.threads
    resources:
        **job_resources(RUNS[FIRST], "evaluate"),
    params:
        identity=lambda wildcards: identity(wildcards.run, "sampling"),
    shell:
        "vipo evaluate --only sample --config {input.config} > {log} 2>&1"


rule score:
    input:
        unpack(scored_from),
        shares=lambda wildcards: shares("evaluation", wildcards.run),
    output:
        config=f"{EXPERIMENT_DIR}/evaluation/{{run}}/config.yaml",
        scores=f"{EXPERIMENT_DIR}/evaluation/{{run}}/scores.parquet",
        summary=f"{EXPERIMENT_DIR}/evaluation/{{run}}/summary.json",
        maps=f"{EXPERIMENT_DIR}/evaluation/{{run}}/maps.safetensors",
    log:
        f"{EXPERIMENT_DIR}/logs/score-{{run}}.log",
    threads: RUNS[FIRST].training.threads
    resources:
        **job_resources(RUNS[FIRST], "evaluate"),
    params:
        identity=lambda wildcards: identity(wildcards.run, "evaluation"),
    shell:
        "vipo evaluate --only score --config {input.config} > {log} 2>&1"
