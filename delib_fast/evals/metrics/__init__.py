"""Metrics: functions from a model and rows, or from texts, to figures with intervals."""
