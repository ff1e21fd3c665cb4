"""The room of trials: what a run promises, tried many times on purpose-made accidents."""
