# The whole workflow is in workflow/Snakefile; this file lets `snakemake` find it from the repository root.
include: "workflow/Snakefile"
