"""What is asked: the settings of a run as frozen dataclasses, and the rules between them. Standard library only."""
