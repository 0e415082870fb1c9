"""Everything that only a GPU can show: `run.sh` proves and measures it in one go."""
