"""What comes after the decoder: output heads and their log-probabilities."""
