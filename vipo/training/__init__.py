"""The trainer, its checkpoints, and the flow-matching pre-training of the demo generator."""
