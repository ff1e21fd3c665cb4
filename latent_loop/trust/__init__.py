"""The room of trust: what keeps a run from being lost or poisoned."""
