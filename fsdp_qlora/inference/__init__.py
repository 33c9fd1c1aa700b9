"""Text generation with a base or tuned model."""
