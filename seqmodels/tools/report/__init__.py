"""Tables and pictures of a sweep: `python -m seqmodels.tools.report DIR`."""
