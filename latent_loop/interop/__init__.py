"""Models of other codebases: their files to our parameters and back, and proof that both compute the same."""
