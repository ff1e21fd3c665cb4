"""Evaluations: what a trained model does as a function of depth."""
