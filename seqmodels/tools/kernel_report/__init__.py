"""What the TPU compiler says of our kernels, without a TPU: `python -m seqmodels.tools.kernel_report --help`."""
