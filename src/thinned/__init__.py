"""Training networks with dropout, and uncertainty from Monte-Carlo dropout that can be trusted."""

__version__ = "0.1.0"
