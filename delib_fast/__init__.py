"""A fast, exact training core for deliberative alignment and model spec midtraining."""

__version__ = "0.1.0"
