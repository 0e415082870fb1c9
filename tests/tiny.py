"""The budget of the tiny generator that most tests train."""

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
