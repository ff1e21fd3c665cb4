"""The exceptions that are no bug of ours, each with an exit code of its own."""


class BadInput(ValueError):
  """A user gave something that cannot work: a config, flag, file, checkpoint or prompt.

  The message is one sentence or two with the path, the value, the rule and the remedy. The programs
  in launch/ print it and end with exit code 2; anything else that escapes is a bug (exit code 1).
  """


class SaveFailed(RuntimeError):
  """A checkpoint could not be written: a full disk, a lost connection. One sentence or two; exit code 13."""


class StoreFault(OSError):
  """An object store did not do what it was asked: exit code 2, or 13 when it was asked to write."""

  def __init__(self, message: str, writing: bool = False):
    super().__init__(message)
    self.writing = writing
