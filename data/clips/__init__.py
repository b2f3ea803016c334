"""Lists of clips: what is in them, which buckets they fill, in which order they come."""
