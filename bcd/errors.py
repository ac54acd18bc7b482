"""Everything that a user can put right, as one tree of exceptions.

    BcdError              one readable sentence; jobs print it and exit with code 2
    ├── ConfigError       settings that contradict each other or a finished run
    ├── DataError         an input that is missing, empty or not what it should be
    ├── LeakageError      the same patient, case, slide or picture on two sides of a split
    ├── BundleError       weights or a model bundle that cannot be used
    ├── DivergedError     a training whose loss or weights stopped being finite numbers
    ├── ResourceError     more CPUs or GPUs asked for than there are
    ├── StorageError      a place that cannot be read or written
    │   └── TooLargeError a file of more bytes than are read
    ├── IncompleteError   inputs that ended in neither a result nor an error; exit code 1
    ├── AuditError        a finished audit found that a given split leaks; exit code 1
    └── DiagnosisError    a finished diagnosis found what would break the job; exit code 1

Anything else is a fault of ours and keeps its stack trace.
"""


class BcdError(Exception):
    """A sentence for the user: names the offender and says what was expected."""

    exit_code = 2


class ConfigError(BcdError, ValueError):
    """Settings contradict each other, or those of the run they would continue.

    A `ValueError` too, so that the command-line parser shows it as a usage error.
    """


class DataError(BcdError):
    """An input is missing, empty, or breaks the form it should have."""


class LeakageError(BcdError):
    """A group or a picture stands on more than one side of a split."""


class BundleError(BcdError):
    """Weights or a model bundle cannot be used as asked."""


class DivergedError(BcdError):
    """The loss or the weights of a training stopped being finite numbers."""


class ResourceError(BcdError):
    """The cluster does not have what was asked for."""


class StorageError(BcdError):
    """A URI cannot be read or written.

    `lasting` where another try would fail too: there is no such file, or it is not for us. All else, such as
    an expired token, a store that asks to slow down or a full disk, may be over when the job runs again.
    """

    def __init__(self, message: str, lasting: bool = False) -> None:
        super().__init__(message, lasting)
        self.lasting = lasting

    def __str__(self) -> str:
        return str(self.args[0])


class IncompleteError(BcdError):
    """A job ran to its end and its books do not balance: the same command goes on."""

    exit_code = 1


class AuditError(BcdError):
    """An audit ran to its end, and a split that it was given leaks."""

    exit_code = 1


class DiagnosisError(BcdError):
    """A diagnosis ran to its end, and found what would break the job."""

    exit_code = 1


class TooLargeError(StorageError):
    """A file has more bytes than are read into memory."""


class ImageError(Exception):
    """One image that cannot be used: a row or an answer, and no end of anything, so no `BcdError`.

    `code` is stable and typed, the message is for people.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(code, message)
        self.code, self.message = code, message
