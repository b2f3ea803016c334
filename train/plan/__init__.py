"""Memory, FLOPs and days of a run before a cluster is rented."""
