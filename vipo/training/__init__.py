"""Training: the loop, an update as plain functions, checkpoints, and the pre-training of the demo generator."""
