"""Text in filter expressions: it can only ever be data."""

from __future__ import annotations

from llama_index_milvus_async_ext._milvus.errors import QueryError

# The only escapes that both parsers know, and the only ones they need: every other character stands for itself.
_ESCAPES = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n", "\r": r"\r", "\t": r"\t"})


def string_literal(value: str) -> str:
    r"""Quote text for a filter expression.

        string_literal('say "hi"')  # "say \"hi\""

    Milvus and Milvus Lite read back exactly `value`, whatever it contains: quotes, backslashes, line ends, NUL.

    Raises:
        QueryError: `value` has a lone surrogate, which UTF-8, and so the wire, has no form for.
    """
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise QueryError(
            f"{shown(value)} cannot be sent to Milvus: {value[error.start]!r} at position {error.start} is half of a "
            "surrogate pair, which has no form in UTF-8"
        ) from None
    return f'"{value.translate(_ESCAPES)}"'


def shown(value: object) -> str:
    """A value as an error message shows it, cut short."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
