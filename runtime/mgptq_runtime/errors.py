"""The closed set of errors. Every one carries what was found, what is allowed and the way out.

Whatever a file holds, reading it raises one of these and nothing else; the commands print its text, one message on
standard error, and exit with 1. Strangers' files lead to five of them: ContainerError and PackageError, the file is to
be copied or exported again; UnsupportedModelError, another version of this program may run it; CheckError, it holds
nothing to check; NumericalError, it is sound, and its model computes NaN or infinity.
"""

__all__ = [
    "BadInputError",
    "BudgetError",
    "CalibrationError",
    "CheckError",
    "ContainerError",
    "DistributedError",
    "MgptqError",
    "NumericalError",
    "OutOfMemoryError",
    "OutputExistsError",
    "PackageError",
    "UnsupportedModelError",
]


class MgptqError(Exception):
    """Base of all errors that a user can meet; the commands print its text and exit with 1."""


class BadInputError(MgptqError):
    """A path, an option or a text that cannot be used: what the user gave, not what a package holds."""


class UnsupportedModelError(MgptqError):
    """A model family, or a part of a model, that this version does not know."""


class BudgetError(MgptqError):
    """A stored-bit budget that the target cannot meet."""


class CalibrationError(MgptqError):
    """Calibration text that is too short or otherwise unusable."""


class NumericalError(MgptqError):
    """NaN or infinity in weights, activations or scores; a Hessian that no damping makes definite."""


class OutOfMemoryError(MgptqError):
    """The machine, or its GPU, has too little memory for what was asked."""


class DistributedError(MgptqError):
    """Another process of a run that several share has ended, hangs or cannot be reached."""


class OutputExistsError(MgptqError):
    """The output exists and replacing it was not asked for."""


class ContainerError(MgptqError):
    """A container file that cannot be read or breaks its specification (FORMAT.md)."""


class PackageError(MgptqError):
    """A package whose files are missing, changed, broken or inconsistent: manifest, ONNX model, tokenizer and all."""


class CheckError(MgptqError):
    """A package that holds nothing to check against."""
