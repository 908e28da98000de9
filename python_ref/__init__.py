"""Self-Forcing in readable PyTorch: reference ops, Wan-style models, rollout pipelines, objectives and training."""
