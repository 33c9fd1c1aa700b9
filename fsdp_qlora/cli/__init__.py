"""The command line, and the only code that knows Hydra: one module per verb, imported once the settings are checked."""
