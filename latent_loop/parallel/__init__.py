"""Devices: the mesh, and which axis of which array goes where."""
