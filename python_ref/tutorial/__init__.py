"""Self-Forcing to learn from: docs/tutorial.md walks through it."""
