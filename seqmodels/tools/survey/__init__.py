"""Every mixer of the registry beside the others: does it train, does it decode in constant memory, is it precise."""
