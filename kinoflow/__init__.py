"""Text to video by flow matching, from a laptop to a cluster."""

__version__ = "0.1.0"
