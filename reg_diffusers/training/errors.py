"""The one exception that is the user's to mend."""


class UsageError(ValueError):
    """A setting or input that cannot work; the message is one line that names the flag and the fix.

    train_reg.py prints it without a traceback and ends with exit status 2.
    """
