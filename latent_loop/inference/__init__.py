"""Test-time use of a trained model."""
