"""Reports: numbers in, files out."""
