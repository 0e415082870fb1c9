"""The DAG's stages: each reads files of ``results/<experiment>`` and writes files there (`base_stage`: a generator's).

A stage holds the lock of the folder that it writes. Where another process has it, the stage waits for up to `wait`
seconds (0: not at all) and then raises `RunLocked`; where it gets the lock in time it does its work again on top of the
other's, from the newest checkpoint if it trains, and ends with the same bytes.
"""

from vipo.stages.credit import MEASURED, credit_stage
from vipo.stages.evaluation import compare_stage, evaluate_stage, sample_stage, score_stage
from vipo.stages.inputs import encode_stage, prepare_stage
from vipo.stages.names import checkpoint_label, experiment_folder, run_names
from vipo.stages.results import crate_stage, report_stage, study_stage, summarize_stage, watch_stage
from vipo.stages.training import base_stage, train_stage

__all__ = [
    "MEASURED",
    "base_stage",
    "checkpoint_label",
    "compare_stage",
    "crate_stage",
    "credit_stage",
    "encode_stage",
    "evaluate_stage",
    "experiment_folder",
    "prepare_stage",
    "report_stage",
    "run_names",
    "sample_stage",
    "score_stage",
    "study_stage",
    "summarize_stage",
    "train_stage",
    "watch_stage",
]
