"""What several test files call."""

import pytest

import emoji
from cli import UserError


@pytest.fixture(scope="session")
def emoji_set():
    """(records, pictures (7572, 3, 64, 64) uint8) of the whole set."""
    return emoji.load()


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
