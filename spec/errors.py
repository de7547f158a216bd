"""The one error type for input a user can correct: a file, a field, a command line."""


class InputError(ValueError):
    """Bad input, told in one line: which file, which field, which rule, which value.

    The command line prints it without a traceback and exits with status 2. Every loader turns the exceptions of
    the libraries it calls into this type, by an explicit list.

    Args:
        rule: what must hold, for example ``must be a power of two in 2..64``.
        source: file (or command-line word) that the value came from, if known.
        field: dotted path of the field inside the source, if known.
        value: the offending value; its ``repr`` is cut at 60 characters.
    """

    def __init__(self, rule, *, source=None, field=None, value=...):
        self.rule, self.source, self.field = rule, source, field
        parts = [str(source)] if source is not None else []
        text = f"{field} {rule}" if field else rule
        if value is not ...:
            shown = repr(value)
            text += f", not {shown if len(shown) <= 60 else shown[:57] + '...'}"
        super().__init__(": ".join([*parts, text]))

    def within(self, source):
        """The same error with its source named (a loader adds the file to an error of a checker)."""
        if self.source is None:
            self.source = source
            self.args = (f"{source}: {self.args[0]}",)
        return self

    def inside(self, prefix):
        """The same error with ``prefix`` before its field (a checker of a part does not know where the part stands)."""
        text = f"{prefix}.{self.args[0]}" if self.field else f"{prefix} {self.args[0]}"
        self.field = f"{prefix}.{self.field}" if self.field else prefix
        self.args = (text,)
        return self
