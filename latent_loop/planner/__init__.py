"""What a run will cost on hardware that is not here: memory, collectives, time."""
