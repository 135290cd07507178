"""What several test files call."""

import pytest

from data import UserError


@pytest.fixture
def mistake(capsys):
    """(exit status, what stderr shows) of a program called with these flags, as its last lines would have it."""
    def call(main, flags):
        try:
            main(list(map(str, flags)))
        except SystemExit as stop:
            return stop.code, capsys.readouterr().err
        except UserError as error:
            return 1, f"error: {error}\n"
        return 0, ""
    return call
