"""Clips: read, written, listed, cut to buckets; the toy world; latents on disk."""
