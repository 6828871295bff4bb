"""One run and what it leaves: checkpoints, parameters, identity, history and metrics. Below train, rl and hf."""
