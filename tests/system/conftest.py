"""What the tests of pages in a browser share."""

from system.browsing import browser

__all__ = ["browser"]
