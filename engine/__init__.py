"""The one place that knows scheduler, pool and store."""
