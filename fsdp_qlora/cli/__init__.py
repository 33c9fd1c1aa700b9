"""The door: the only code that knows Hydra. One module a verb, imported once the settings are checked."""
