rule prepare:
    input:
        config=config_file(FIRST),
        source=prompt_files(),
    output:
        train=f"{EXPERIMENT_DIR}/prompts/train.jsonl",
        eval=f"{EXPERIMENT_DIR}/prompts/eval.jsonl",
        manifest=f"{EXPERIMENT_DIR}/prompts/manifest.json",
    log:
        f"{EXPERIMENT_DIR}/logs/prepare.log",
    resources:
        **job_resources(RUNS[FIRST], "prepare"),
    params:
        identity=identity(FIRST, "prompts"),
    shell:
        "vipo prepare --config {input.config} > {log} 2>&1"


rule encode:
    input:
        config=config_file(FIRST),
        train=rules.prepare.output.train,
        eval=rules.prepare.output.eval,
        manifest=rules.prepare.output.manifest,
        generator=generator_files(),
    output:
        train=f"{EXPERIMENT_DIR}/embeddings/train.safetensors",
        eval=f"{EXPERIMENT_DIR}/embeddings/eval.safetensors",
    log:
        f"{EXPERIMENT_DIR}/logs/encode.log",
    resources:
        **job_resources(RUNS[FIRST], "encode"),
    params:
        identity=identity(FIRST, "embeddings"),
    shell:
        "vipo encode --config {input.config} > {log} 2>&1"
