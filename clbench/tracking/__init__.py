"""Experiment trackers: readers of a run's events for TensorBoard, MLflow and Weights & Biases."""
