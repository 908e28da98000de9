"""What models are trained for: losses on clean videos and on generated ones."""
