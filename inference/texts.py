"""Prepare the text that a user types: lower case as in training, and warn of unknown words."""

import sys

from common.cli import require, warn
from dataset.sources import question_prompt
from inference.parts import Parts


def read_text(parts: Parts, text: str, name: str) -> str:
    """Lower the case of words that no training caption capitalises, with a note on stderr.

    Warn of words that no training text had or, if the training texts are unknown, of words that the
    tokenizer has no piece for.  name: the name of the text in messages."""
    lowered = parts.tokenizer.lowered(text)
    if lowered != text:
        print(f"note: {name} is read as {lowered!r}, as captions were written in training",
              file=sys.stderr)
    # the space before a [MASK] belongs to it
    warn_of_words(parts, lowered.replace(" [MASK]", "[MASK]").split("[MASK]"), name)
    return lowered


def read_prompt(parts: Parts, prompt: str, name: str = "prompt") -> str:
    """Return `read_text` of a prompt.  Raises UserError if it leaves no room for the end token."""
    count = len(parts.tokenizer.pieces(parts.tokenizer.lowered(prompt)))
    require((count < parts.length, f"{name} {prompt[:40]!r} has {count} tokens, expected at most "
             f"{parts.length - 1}; cut it"))
    return read_text(parts, prompt, name)


def check_question(parts: Parts, question: str) -> None:
    """Warn of unknown words in a question.  Unlike a prompt, it keeps its capitals."""
    warn_of_words(parts, [question_prompt(question)], "question")


def warn_of_words(parts: Parts, texts: list[str], name: str) -> None:
    """Print one warning that names the unknown words of these texts."""
    words = [word for text in texts for word in parts.tokenizer.strange(text)]
    if words:
        reason = "the tokenizer has no piece for"
        if parts.tokenizer.seen is not None:
            reason = "no text in training had"
        warn(f"{name}: {reason} {' '.join(words)}")
