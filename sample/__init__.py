"""Prompt to video: time grids, solvers, guidance, releases and their evaluation."""
