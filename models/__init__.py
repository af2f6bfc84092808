"""Model adapters: the only floor (with the worker child) that imports torch. Imported in worker processes alone."""
