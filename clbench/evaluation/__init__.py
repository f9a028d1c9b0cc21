"""Evaluation of one model: sliding window, scores of a case, stored predictions, metrics, cost."""
