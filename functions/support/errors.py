"""Errors whose message is for users: what is wrong and what to do. Scripts print it, without a traceback."""


class TrainingError(RuntimeError):
    """A run that must not go on; the message says why and what to do."""


class SamplingError(ValueError):
    """Images were asked for that cannot be made; the message says what can."""
