"""Fast paths of a CPU, put on a model from outside."""
