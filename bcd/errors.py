"""Exceptions that a user can correct. Any other is a bug, and keeps its stack trace.

BcdError              jobs print its sentence and exit with code 2
├── ConfigError
├── DataError
├── LeakageError
├── BundleError
├── DivergedError
├── ResourceError
├── BusyError
├── StorageError
│   ├── MissingError
│   └── TooLargeError
├── IncompleteError   exit code 1
├── LostError         exit code 1
├── AuditError        exit code 1
└── DiagnosisError    exit code 1
"""

# What to do about a transient `StorageError`.
ASK_AGAIN = "check the network, the credentials and the free space, and run the same command again"
# Code and message of an image error.
NOT_FINITE = "not_finite"
NOT_FINITE_MESSAGE = "the model's logits are not finite numbers; use --precision float32, or another model"


class BcdError(Exception):
    """One readable sentence: what failed, what was expected, what to do."""

    exit_code = 2


class ConfigError(BcdError, ValueError):
    """Settings contradict each other, or those of the run that they would continue.

    A `ValueError`, too, so that the command-line parser shows it as a usage error.
    """


class DataError(BcdError):
    """An input is missing, empty or invalid."""


class LeakageError(BcdError):
    """The same patient, case, slide or image is in more than one part of a split."""


class BundleError(BcdError):
    """Weights or a model bundle cannot be used."""


class DivergedError(BcdError):
    """The loss or the weights of a training are no longer finite."""


class ResourceError(BcdError):
    """The cluster has fewer CPUs or GPUs than the settings require."""


class BusyError(BcdError):
    """Another job writes into the same output, or may have taken it over."""


class StorageError(BcdError):
    """A URI cannot be read or written.

    `lasting` marks a permanent error: there is no such file, or access is denied. Others are transient, such
    as an expired token, a throttling store or a full disk: another run may succeed.
    """

    def __init__(self, message: str, lasting: bool = False) -> None:
        super().__init__(message, lasting)
        self.lasting = lasting

    def __str__(self) -> str:
        return str(self.args[0])


class MissingError(StorageError):
    """There is no such file, or no such folder: perhaps no longer, where another job works too."""

    def __init__(self, message: str) -> None:
        super().__init__(message, True)
        self.args = (message,)


class IncompleteError(BcdError):
    """A job ended with inputs that have neither a result nor an error: the same command resumes it."""

    exit_code = 1


class LostError(BcdError):
    """Ray lost a process of the job for good, killed or with its host: the same command resumes it."""

    exit_code = 1


class AuditError(BcdError):
    """A completed audit found a leak in the given split."""

    exit_code = 1


class DiagnosisError(BcdError):
    """A completed diagnosis found a fault that would break the job."""

    exit_code = 1


class TooLargeError(StorageError):
    """A file has more bytes than are read."""


class ImageError(Exception):
    """One image cannot be used. It becomes a row or an answer and ends no job, so it is no `BcdError`.

    Programs may rely on `code`, not on the message.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(code, message)
        self.code, self.message = code, message
