"""Read what a user types as the model reads it: in the letters and words of its training."""

import sys

from common.cli import require
from dataset.questions import question_prompt
from inference.parts import Parts


def read_text(parts: Parts, text: str, name: str) -> str:
    """Lower the case of words that no training caption capitalises, with a note on stderr.

    Warn of words that no training text had or, where that is unknown, that the tokenizer has no
    piece for.  name: how messages call the text."""
    lowered = parts.tokenizer.lowered(text)
    if lowered != text:
        print(f"note: {name} is read as {lowered!r}, as captions were written in training",
              file=sys.stderr)
    # a [MASK] takes the space before it along
    warn_of_words(parts, lowered.replace(" [MASK]", "[MASK]").split("[MASK]"), name)
    return lowered


def read_prompt(parts: Parts, prompt: str, name: str = "prompt") -> str:
    """Read a text, and raise UserError if it has no room for its end."""
    count = len(parts.tokenizer.pieces(parts.tokenizer.lowered(prompt)))
    require((count < parts.length, f"{name} {prompt[:40]!r} has {count} tokens, expected at most "
             f"{parts.length - 1}; cut it"))
    return read_text(parts, prompt, name)


def check_question(parts: Parts, question: str) -> None:
    """Warn of unknown words; a question keeps its capitals."""
    warn_of_words(parts, [question_prompt(question)], "question")


def warn_of_words(parts: Parts, texts: list[str], name: str) -> None:
    """Print one warning that names the unknown words of these texts."""
    words = [word for text in texts for word in parts.tokenizer.strange(text)]
    if words:
        reason = "the tokenizer has no piece for"
        if parts.tokenizer.seen is not None:
            reason = "no text in training had"
        print(f"warning: {name}: {reason} {' '.join(words)}", file=sys.stderr)
