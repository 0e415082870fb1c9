"""The DAG of one experiment: prepare, encode, train, sample and score per run, compare, report, crate.

Choose an experiment and change it with `--config experiment=demo overrides="[training.updates=8]"`.
Every configuration is composed and validated while this file is read, so a wrong key stops everything first.
"""

from snakemake.settings.types import DeploymentMethod
from snakemake.utils import min_version

from vipo.workflow_log import show_plainly

min_version("9.5")
if workflow.is_main_process:
    show_plainly(workflow.output_settings)


IMAGE = "containers/vipo.sif"


# Read only with `--sdm apptainer`; `make sif` builds it.
container: IMAGE


include: "workflow/rules/common.smk"
include: "workflow/rules/configurations.smk"
include: "workflow/rules/slurm.smk"
include: "workflow/rules/finished.smk"


if DeploymentMethod.APPTAINER in workflow.deployment_settings.deployment_method:
    export_image_digest(IMAGE)


onstart:
    check_cluster()
    keep_finished_results()
    write_configurations()
    wake_when_something_ended()


localrules:
    all,


rule all:
    input:
        f"{EXPERIMENT_DIR}/report/index.html",
        f"{EXPERIMENT_DIR}/ro-crate-metadata.json",
        MEASURED,


include: "workflow/rules/prompts.smk"
include: "workflow/rules/runs.smk"
include: "workflow/rules/report.smk"


if SHARES > 1:

    include: "workflow/rules/shares.smk"


if MEASURED:

    include: "workflow/rules/credit.smk"
