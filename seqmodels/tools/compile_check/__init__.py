"""Compile a job's own training step for a TPU slice on any machine, and say what became of it: see `__main__`."""
