"""What is printed, as a terminal may show it."""

import contextlib
import sys

import files
import stopping


class Shown:
    """A stream to write on, on which control characters and what it has no letters for are escaped.

    A model's text, a file's, a config's value or a file's name may hold what clears a screen, moves
    the cursor or changes a window's title.
    """

    def __init__(self, stream):
        self.stream = stream

    def write(self, text):
        code = getattr(self.stream, "encoding", None) or "utf-8"
        shown = files.escaped(text).encode(code, "backslashreplace").decode(code)
        try:
            self.stream.write(shown)
        except OSError as error:
            stopping.give_up(self.stream)
            raise OSError(f"the standard output: {error.strerror}") from None
        return len(text)

    def __getattr__(self, name):
        return getattr(self.stream, name)


@contextlib.contextmanager
def shown():
    """Inside, all that is printed is escaped. Progress bars, on the standard error, are not."""
    with contextlib.redirect_stdout(Shown(sys.stdout)):
        yield
