"""The error of a model that cannot be trained exactly."""


class UnsupportedModelError(ValueError):
    """The model does something that packed training cannot reproduce exactly. The message says what, and the remedy."""
