"""The errors a caller can act on; every job prints one of these as its one-line reason."""


class MtlError(Exception):
    """Something the person at the keyboard can put right; the message says what, where and how."""


class ConfigError(MtlError):
    """A setting is unknown or has a bad value: correct the configuration."""


class InputError(MtlError):
    """A file or table that was offered cannot be read as asked: correct the file or the call."""


class StateError(MtlError):
    """The tables are not in the state that the job needs: run the job that the message names."""


class LockedError(StateError):
    """Another process holds what only one may: stop that one, or wait for it."""


class OracleError(MtlError):
    """An oracle raised, or returned values that are no predictions: correct the oracle."""


class ReplayError(MtlError):
    """A stream was asked to repeat a batch and met another one: follow the recovery in the message."""
