"""Runs batches: one process per device, its channel to the master, and the supervision that keeps it alive."""
