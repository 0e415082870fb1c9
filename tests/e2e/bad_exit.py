"""A module that ends the process as it is imported."""

import os
import sys

os.environ["BAD_EXIT"] = "left behind"
sys.exit(0)
