"""What Wan2.1 and Self-Forcing publish: their checkpoints and configuration files."""
