"""Tiny budgets: of a demo generator, of one update, and of experiments on another family's random checkpoint."""

TINY_PRETRAIN = {
    "threads": 1,
    "scenes": 96,
    "autoencoder_width": 8,
    "latent_channels": 4,
    "autoencoder_steps": 30,
    "text_width": 32,
    "double_blocks": 1,
    "single_blocks": 1,
    "heads": 1,
    "head_width": 32,
    "steps": 20,
    "batch_size": 8,
    "warmup": 5,
}

ONE_UPDATE = (
    "sampling.steps=3",
    "training.updates=1",
    "training.group_size=4",
    "training.micro_batch=4",
    "training.trained_transitions=1",
    "training.save_at=[]",
    "tracking.trackers=[]",
)
"""Overrides of an experiment on a demo generator."""

OTHER_FAMILY = (
    "experiment=demo",
    "generator.device=cpu",
    "generator.height=32",
    "generator.width=48",
    "prompts=file",
    "prompts.eval_share=0.4",
    "reward=redness",
    "perception.input_size=64",
    "sampling.steps=4",
    "training.prompts_per_update=2",
    "training.trained_transitions=2",
    "training.save_at=[]",
    "evaluation.prompts=2",
    "evaluation.rewards=[redness]",
    "evaluation.bootstrap=100",
    "evaluation.shown_prompts=1",
)
"""Overrides; the family, its checkpoint and ``prompts.source`` are still to be given."""
