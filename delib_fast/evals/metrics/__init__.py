"""Metrics: functions from a model and rows to figures with intervals."""
