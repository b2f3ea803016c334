"""Probability paths and flow matching."""
