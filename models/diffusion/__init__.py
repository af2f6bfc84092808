"""Diffusion pipelines as models of the server."""
