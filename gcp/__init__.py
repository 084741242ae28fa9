"""Training jobs on TPU pods: checked, compiled, printed, sent, watched, taken down. See gcp/README.md."""
