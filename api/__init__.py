"""The door: one dialect per file, each parse -> engine -> shape. Imports the engine and core, nothing below."""
