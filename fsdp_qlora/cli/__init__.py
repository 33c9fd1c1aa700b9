"""The door: the only code that knows Hydra. One module per verb, imported after the settings are composed and checked."""
