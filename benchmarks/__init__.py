"""What vipo costs, as ratios measured in one run."""
