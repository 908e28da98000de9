"""Rollouts: block by block from noise to video, in training and in inference."""
