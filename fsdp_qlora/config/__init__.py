"""The settings of a run as frozen dataclasses, and the rules across them, without torch or Hydra."""
