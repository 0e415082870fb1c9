"""Before training: which credit source raises the reward most per unit of change."""
