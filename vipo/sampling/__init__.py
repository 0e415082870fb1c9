"""Noise, sigma schedules, transitions with log-probabilities, rollouts."""
