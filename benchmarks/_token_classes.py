"""What kind of token is it? Classes of prose and of Python code, by the characters that a token stands for."""

import io
import keyword
import re
import tokenize
from collections import Counter
from collections.abc import Iterator, Sequence

WHITE_SPACE = "white space"
COMMENT, STRING, IDENTIFIER, KEYWORD, OPERATOR = "comments", "strings", "identifiers", "keywords", "operators"
FUNCTION_WORD, CONTENT_WORD, NAME = "function words", "content words", "names"
NUMBER, PUNCTUATION, REFERENCE = "numbers", "punctuation", "verse marks"

CODE_CLASSES = (COMMENT, STRING, WHITE_SPACE, IDENTIFIER, KEYWORD, OPERATOR, NUMBER)
PROSE_CLASSES = (FUNCTION_WORD, CONTENT_WORD, NAME, NUMBER, PUNCTUATION, REFERENCE, WHITE_SPACE)

# Articles, pronouns, prepositions, conjunctions, auxiliaries; those of 1611 among them.
_FUNCTION_WORDS = frozenset(
    re.findall(
        r"\w+",
        """
    a an the this that these those such same other another each every all any both either neither no none some
    i me my mine we us our ours thou thee thy thine ye you your yours he him his she her hers it its they them their
    theirs myself thyself himself herself itself ourselves yourselves themselves who whom whose which what whoso
    whosoever whatsoever one
    of in to for with on at by from into unto upon over under about after before against among amongst between
    through throughout toward towards within without above below beneath beside besides behind beyond during until
    till since out off up down as like than concerning round
    and or nor but if because lest though although while whether yet so then therefore wherefore when where whence
    whither wherein whereof whereby thereof therein thereon hereby there here thence hence how why not also even too
    is am are art was were wert be been being have hath has had hast having do doth does did dost didst done
    shall shalt will wilt would wouldest should shouldest may mayest might mightest can canst could couldest must let
    """,
    )
)
_PROSE = re.compile(
    r"(?P<reference>^\w+?\d+:\d+)|(?P<word>[^\W\d_]+(?:['’][^\W\d_]+)*)|(?P<number>\d+)|(?P<punctuation>[^\w\s]|_)",
    re.MULTILINE,
)
_SENTENCE_ENDS = ".?!:;"


def token_classes(pieces: Sequence[bytes], class_of_character: Sequence[str], text: str) -> list[str]:
    """The class of each token: that of most of its bytes that are no white space between words.

    Args:
        pieces: The tokens' bytes; together they begin `text`.
        class_of_character: Of each character of `text`.
    """
    class_of_byte = [kind for character, kind in zip(text, class_of_character, strict=True) for _ in character.encode()]
    found, start = [], 0
    for piece in pieces:
        end = start + len(piece)
        counts = Counter(class_of_byte[start:end])
        if len(counts) > 1:
            del counts[WHITE_SPACE]
        found.append(counts.most_common(1)[0][0])
        start = end
    return found


def code_classes(source: str) -> list[str]:
    """The class of each character of a Python source."""
    line_starts = [0]
    for line in source.splitlines(keepends=True):
        line_starts.append(line_starts[-1] + len(line))
    classes = [WHITE_SPACE] * len(source)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if kind := _code_class(token):
            (first_line, first_column), (last_line, last_column) = token.start, token.end
            start, end = line_starts[first_line - 1] + first_column, line_starts[last_line - 1] + last_column
            classes[start:end] = [kind] * (end - start)
    return classes


def _code_class(token: tokenize.TokenInfo) -> str | None:
    name = tokenize.tok_name[token.type]
    if name == "NAME":
        return KEYWORD if keyword.iskeyword(token.string) else IDENTIFIER
    if name == "STRING" or name.startswith(("FSTRING_", "TSTRING_")):
        return STRING
    return {"COMMENT": COMMENT, "OP": OPERATOR, "NUMBER": NUMBER}.get(name)


def prose_classes(text: str) -> list[str]:
    """The class of each character of an English text, whose lines may begin with a verse mark (`Ge1:1`)."""
    names = _names(text)
    classes = [WHITE_SPACE] * len(text)
    for match in _PROSE.finditer(text):
        word = match["word"]
        if match["reference"]:
            kind = REFERENCE
        elif word:
            is_function_word = word.lower() in _FUNCTION_WORDS
            kind = FUNCTION_WORD if is_function_word else NAME if word in names else CONTENT_WORD
        else:
            kind = NUMBER if match["number"] else PUNCTUATION
        classes[match.start() : match.end()] = [kind] * len(match[0])
    return classes


def _names(text: str) -> set[str]:
    """Words that are capitalised inside of a sentence, and nowhere in small letters."""
    words = list(_words(text))
    small = {word for word, _ in words if word[0].islower()}
    return {word for word, is_first in words if word[0].isupper() and not is_first and word.lower() not in small}


def _words(text: str) -> Iterator[tuple[str, bool]]:
    """Each word, and whether it is a sentence's first."""
    is_first = True
    for match in _PROSE.finditer(text):
        if match["word"]:
            yield match["word"], is_first
            is_first = False
        elif match["reference"] or match[0] in _SENTENCE_ENDS:
            is_first = True
