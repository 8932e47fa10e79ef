"""The stages of the workflow: configuration, files in, files out."""
