"""Separates the reasoning of a model, up to `</think>`, from its answer."""

from dataclasses import dataclass

START, END = "<think>", "</think>"


@dataclass(frozen=True)
class SplitText:
    """A generated text in parts.

    answer: the text after the last `</think>` and the newlines behind it; empty for reasoning that does not end.
    reasoned: whether the text holds reasoning. unclosed: whether that does not end.
    """

    answer: str
    reasoned: bool
    unclosed: bool


def split_reasoning(text: str, opened: bool = False) -> SplitText:
    """Split a generated text. opened: whether the prompt already ends in `<think>`."""
    _, end, answer = text.rpartition(END)
    if end:
        return SplitText(answer.lstrip("\n"), reasoned=True, unclosed=False)
    if opened or text.lstrip().startswith(START):
        return SplitText("", reasoned=True, unclosed=True)
    return SplitText(text, reasoned=False, unclosed=False)


def opens_reasoning(prompt_end: str) -> bool:
    """Return whether a prompt that ends in this text asks for reasoning, as some chat templates do."""
    return prompt_end.rstrip().endswith(START)
