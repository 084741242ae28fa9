"""What long sequences cost when devices share them: see `__main__`."""
