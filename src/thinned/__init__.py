"""Trains networks with dropout, and measures the uncertainty of Monte-Carlo dropout before it is trusted."""

__version__ = "0.1.0"
