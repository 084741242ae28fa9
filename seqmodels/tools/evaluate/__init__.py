"""Evaluation of finished runs: `python -m seqmodels.tools.evaluate RUN --suite NAME`."""
