"""The one exception that means: the command line asked for something that cannot be."""


class UsageError(ValueError):
  """Asks the caller to change an argument; ``train_lm.main`` prints it without a traceback."""
