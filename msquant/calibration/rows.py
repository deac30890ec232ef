"""Rows of a dataset to texts: conversations through the chat template, and columns through a template."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from msquant.errors import CalibrationError

TEXT_COLUMNS = ("text", "content", "inputs_pretokenized")
CHAT_COLUMNS = ("messages", "conversations", "conversation")
PAIRS = (
    ("question", "answer"),
    ("prompt", "completion"),
    ("prompt", "response"),
    ("instruction", "output"),
    ("inputs_pretokenized", "targets_pretokenized"),
)
"""Columns that are a question and its answer, as the data of the field's examples have them."""
THINKING = ("enable_thinking", "thinking")
"""What chat templates call the switch for thoughts before the answer: Qwen3's, DeepSeek-V3.1's."""

Message = dict[str, str]

_ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "tool": "tool",
    "function": "tool",
}
_FIELD = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")


@dataclass(frozen=True)
class Template:
    """A text with the names of columns in braces, for example `{question}\\n{answer}`.

    A dot goes into a column that holds an object or a list (`{answers.text.0}`); `{{` is a brace.

    Attributes:
        text: the template; in it `\\n` is a line's end.

    Raises:
        CalibrationError: a brace is open, or no column is named.
    """

    text: str

    def __post_init__(self) -> None:
        fields = list(_FIELD.finditer(self.text))
        problem = "" if any(match[1] for match in fields) else "names no column"
        if any(match[0] in "{}" or match[1] == "" for match in fields):
            problem = "has a brace that is open"
        if problem:
            raise CalibrationError(
                f"{self.text!r} {problem}",
                where="--template",
                remedy="write columns in braces, for example '{question}\\n{answer}'; "
                "a brace itself is {{ or }}",
            )

    def fill(self, row: Mapping[str, Any], where: str) -> str:
        """The text of a row. Raises CalibrationError: there is no such column, or it holds no text."""

        def replace(match: re.Match[str]) -> str:
            return match[0][0] if match[1] is None else _value(row, match[1], where)

        return _FIELD.sub(replace, self.text.replace("\\n", "\n"))


@dataclass(frozen=True)
class Exchange:
    """Templates of a question and of its answer, which make a conversation of two turns.

    Attributes:
        question: what the user says.
        answer: what the assistant says.
    """

    question: Template
    answer: Template

    def messages(self, row: Mapping[str, Any], where: str) -> list[Message]:
        """The two turns. Raises as `Template.fill`."""
        return [
            {"role": "user", "content": self.question.fill(row, where).rstrip()},
            {"role": "assistant", "content": self.answer.fill(row, where)},
        ]


_EXCHANGES: dict[tuple[str, ...], Exchange] = {
    # Alpaca's form: what an instruction is about stands in a column of its own, and may be empty.
    ("instruction", "input", "output"): Exchange(Template("{instruction}\n\n{input}"), Template("{output}")),
    **{pair: Exchange(*(Template(f"{{{name}}}") for name in pair)) for pair in PAIRS},
}


class RowText:
    """Makes texts of rows, each by the columns that it has.

    Args:
        template: of the text, in place of the columns that are known.
        tokenizer: a Hugging Face tokenizer, whose chat template conversations go through; without one, or
            where it has none, the turns are joined by blank lines.
    """

    def __init__(self, template: Template | Exchange | None = None, tokenizer: Any = None) -> None:
        self._template = template
        self._tokenizer = tokenizer if getattr(tokenizer, "chat_template", None) else None
        known = "" if self._tokenizer is None else str(self._tokenizer.chat_template)
        self._switches = [name for name in THINKING if re.search(rf"\b{name}\b", known)]

    def text(self, row: Mapping[str, Any], number: int, where: str) -> tuple[str, bool]:
        """The text of a row, and whether the chat template wrote it.

        Where the template has a switch for thoughts, rows have them on and off in turn.

        Args:
            row: column to value.
            number: of the row, from 1.
            where: for messages, the source and the row.

        Raises:
            CalibrationError: no column is known, one holds something else, or the chat template refuses it.
        """
        if isinstance(self._template, Template):
            return self._template.fill(row, where), False
        messages: list[Message] | None = None
        if isinstance(self._template, Exchange):
            messages = self._template.messages(row, where)
        elif chat := next((name for name in CHAT_COLUMNS if row.get(name)), None):
            messages = _conversation(row[chat], chat, where)
        elif pair := next((pair for pair in _EXCHANGES if all(name in row for name in pair)), None):
            messages = _EXCHANGES[pair].messages(row, where)
        if messages is None:
            # A conversation without turns is an empty text, as a missing one is.
            name = next((name for name in (*TEXT_COLUMNS, *CHAT_COLUMNS) if name in row), None)
            if name is None:
                raise CalibrationError(
                    f"no column is known to hold text; the columns are {', '.join(map(repr, row))}",
                    where=where,
                    remedy="say how a row becomes text, for example --template '{question}\\n{answer}'",
                )
            text = row[name] if row[name] not in (None, []) else ""
            if not isinstance(text, str):
                raise _no_text(name, text, where)
            return text, False
        if self._tokenizer is None:
            return "\n\n".join(message["content"] for message in messages), False
        return self._render(messages, thoughts=number % 2 == 1, where=where), True

    def _render(self, messages: Sequence[Message], *, thoughts: bool, where: str) -> str:
        """A whole conversation as the model reads and continues it.

        What the template puts before an answer depends on the switch only where it asks for the next turn.
        So the last answer is put behind that, and behind it what closes it in the whole conversation.
        """
        switches = dict.fromkeys(self._switches, thoughts)
        try:
            whole = self._apply(messages, **switches)
            answer = messages[-1]["content"].strip()
            before, _, close = whole.rpartition(answer)
            if not self._switches or messages[-1]["role"] != "assistant" or not (answer and before):
                return whole
            asked = self._apply(messages[:-1], add_generation_prompt=True, **switches)
        # A template is a program from the model's folder, in jinja's sandbox: it may raise anything.
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            roles = ", ".join(message["role"] for message in messages)
            raise CalibrationError(
                f"the chat template refuses this conversation ({roles}): {reason}",
                where=where,
                remedy="leave this row out, or calibrate on plain text with --no-chat-template",
            ) from error
        return asked + answer + close

    def _apply(self, messages: Sequence[Message], **options: bool) -> str:
        assert self._tokenizer is not None
        return str(self._tokenizer.apply_chat_template(list(messages), tokenize=False, **options))


def _conversation(turns: Any, column: str, where: str) -> list[Message]:
    """Turns in OpenAI's form (`role`, `content`) or ShareGPT's (`from`, `value`)."""
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise CalibrationError(
            f"the column {column!r} holds no list of turns",
            where=where,
            remedy='a turn is {"role": "user", "content": "..."} or {"from": "human", "value": "..."}',
        )
    messages = []
    for number, turn in enumerate(turns, 1):
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if _ROLES.get(str(role).lower()) is None or not isinstance(content, str):
            raise CalibrationError(
                f"turn {number} of the column {column!r} has the role {role!r} and as content "
                f"{type(content).__name__}",
                where=where,
                remedy=f"roles are {', '.join(_ROLES)}, and the content is text",
            )
        messages.append({"role": _ROLES[str(role).lower()], "content": content})
    return messages


def _value(row: Mapping[str, Any], name: str, where: str) -> str:
    """What a column holds, as text; nothing is empty."""
    value: Any = row
    for part in name.split("."):
        if isinstance(value, Mapping) and part in value:
            value = value[part]
        elif isinstance(value, list) and part.isdigit() and int(part) < len(value):
            value = value[int(part)]
        else:
            raise CalibrationError(
                f"there is no column {name!r}; the columns are {', '.join(map(repr, row))}",
                where=where,
                remedy="name one of these in --template, in braces",
            )
    if isinstance(value, list | Mapping | bytes):
        raise _no_text(name, value, where)
    return "" if value is None else str(value)


def _no_text(name: str, value: Any, where: str) -> CalibrationError:
    return CalibrationError(
        f"the column {name!r} holds {type(value).__name__}, not text",
        where=where,
        remedy="name a column of text in --template; {column.0} and {column.key} go into one",
    )
