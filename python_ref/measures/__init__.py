"""Objective measures of generated moving digits, each as a function of the frame index; no network of ours judges."""
