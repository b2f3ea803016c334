"""Attention kernels, chosen when a model is built."""
