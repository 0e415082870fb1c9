"""Handing a run over: a folder that is ready for the Hub, its model card, and the difference of two runs."""
