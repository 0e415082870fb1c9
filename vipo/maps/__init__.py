"""What shows and measures allocation maps: overlays, pictures and clips, photographs and scenes with true masks."""
