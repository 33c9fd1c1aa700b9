"""How it moves: optimizers on local shards, learning-rate schedules as pure functions of the step."""
