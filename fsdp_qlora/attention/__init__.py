"""How tokens see each other."""
