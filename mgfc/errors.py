"""What can go wrong, as a handful of exceptions. Every message says what was expected, what was found and what to do."""


class MGFCError(Exception):
    """Base of every error that this library raises on purpose."""


class UnsupportedBackboneError(MGFCError, ValueError):
    """The model is not a vision transformer whose blocks and patch grid can be told, or it cannot be wrapped now."""


class ConfigError(MGFCError, ValueError):
    """A configuration has an unknown key, a wrong type or a value that cannot work."""


class CalibrationError(MGFCError, RuntimeError):
    """A wrapped model was run in a way that its calibrators cannot follow."""


class LabelError(MGFCError, ValueError):
    """Labels of a wrong shape, dtype or class id were given to a loss."""


class AdapterFileError(MGFCError, ValueError):
    """A file of an adapter is damaged, incomplete, oversized or of a format from the future."""


class AdapterMismatchError(MGFCError, ValueError):
    """An adapter was made for another backbone or another configuration."""


class AdapterNotFoundError(MGFCError, OSError):
    """An adapter could not be reached: no such directory, repository, revision or file, no permission, or no network."""
