"""Configuration: schemas and sources, errors, files, model folders; and the YAML files."""
