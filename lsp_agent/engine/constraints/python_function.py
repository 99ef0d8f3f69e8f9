"""A Python function with a given header, as a grammar: what it lets through can be parsed by Python.

Left out, so never written: `type` statements, `except*`, parentheses around the items of `with`, inside of f-strings
`lambda`, displays and f-strings, tabs, and blocks nested deeper than `DEPTH`. Names consist of ASCII and Latin-1
letters. Nothing promises that the function compiles (`break` outside of a loop does not) or does what it should.
"""

from __future__ import annotations

import ast
import json
import keyword
from string import Template

from lsp_agent.errors import UserError

DEPTH = 12
"""Most blocks in each other, the function's own included."""
MAX_HEADER_CHARACTERS = 1 << 14

_PLAIN = r"\x00-\x08\x0a-\x1f"  # characters that stand in no line of source
_COMMENT = f"#[^{_PLAIN}]*"
_ESCAPE = rf"\\(?:[^{_PLAIN}xuUN]|x[0-9a-fA-F]{{2}}|u[0-9a-fA-F]{{4}}|U000[0-9a-fA-F]{{5}})"
_CONTINUED = r" {0,40}\\\n {0,80}"
_MANY = f"(?: {{0,40}}|{_CONTINUED})"
_SOME = f"(?: {{1,9}}|{_CONTINUED})"


def _string(quote: str, inside: str, escape: str) -> str:
    """A regular expression: a string of one line and one of several. Line breaks are written as such."""
    line = f"{quote}(?:[^{quote}\\\\{inside}]|{escape})*{quote}"
    triple = f"{quote}{{3}}(?:{quote}{{0,2}}(?:[^{quote}\\\\{inside}]|\\n|{escape}|\\\\\\n))*{quote}{{3}}"
    return f"{line}|{triple}"


def _both(inside: str, escape: str) -> str:
    return "(?:" + _string('"', inside, escape) + "|" + _string("'", inside, escape) + ")"


_TERMINALS = Template(
    r"""
NAME: /[A-Za-z_À-ÖØ-öø-ÿ][A-Za-z0-9_À-ÖØ-öø-ÿ]*/ & ~/(?:$keywords)/
DIGITS: /[0-9](?:_?[0-9]){0,40}/
EXPONENT: /[eE][+-]?[0-9]{1,3}/
DECIMAL: /0|[1-9](?:_?[0-9]){0,40}/
BASED: /0[xX][0-9a-fA-F]{1,32}|0[bB][01]{1,64}|0[oO][0-7]{1,32}/
NUMBER: BASED | (DECIMAL ("." DIGITS?)? | "." DIGITS) EXPONENT? /[jJ]?/
STRING: /[uU]?$string|[rR]$raw/
BYTES: /[bB]$bytes|(?:[bB][rR]|[rR][bB])$raw_bytes/
FCHARS_D: /(?:[^"\\{}$plain]|$escape)+/
FCHARS_S: /(?:[^'\\{}$plain]|$escape)+/
FCHARS_DD: /(?:[^"\\{}$plain]|\n|$escape)+/
FCHARS_SS: /(?:[^'\\{}$plain]|\n|$escape)+/
RAW_FCHARS_D: /(?:[^"\\{}$plain]|\\[^{}$plain])+/
RAW_FCHARS_S: /(?:[^'\\{}$plain]|\\[^{}$plain])+/
SPEC: /[^{}'"\\$plain]+/
UNARY: /[-+~] {0,9}/
SP: /$some/
LAST_COMMA: / {0,40}, {0,40}/
AS: / {1,9}as {1,9}/
IMPORT: / {1,9}import {1,9}/
RAISE_FROM: / {1,9}from {1,9}/
FROM: /from {1,9}/
DOTS: /\.+/
ASSIGN: /$many=$many/
AUGMENTED: /$many(?:\*\*|\/\/|<<|>>|[-+*\/%@&|^])=$many/
ANNOTATED: / {0,9}: {0,9}/
WALRUS: / {0,9}:= {0,9}/
ARROW: / {0,9}-> {0,9}/
SEMICOLON: / {0,9}; {0,9}/
BEGIN: / {0,9}:/
ONE_LINE: / {1,9}/
END: / {0,80}(?:$comment)?(?:\n(?: {0,80}| {4,80}$comment)){1,8}| {0,80}$comment| {1,80}/
"""
)

# Expressions are written four times: `o` outside of brackets, `i` inside, where lines may break, and `d` and `s` inside
# of f-strings in double and in single quotes, which hold no quotes of their own kind, no backslashes and no comments.
# `k` is what an opened bracket changes to.
_EXPRESSIONS = Template(
    r"""
ARITHMETIC_$C: /$w(?:\*\*|\/\/|<<|>>|[-+*\/%@&|^])$w/
COMPARE_$C: /$w(?:==|!=|<=|>=|<|>)$w/
IS_$C: /${W}is$W/
IN_$C: /${W}in$W/
NOT_IN_$C: /${W}not${W}in$W/
NOT_$C: /not$W/
BOOLEAN_$C: /$W(?:and|or)$W/
IF_$C: /${W}if$W/
ELSE_$C: /${W}else$W/
FOR_$C: /${W}for$W/
COMMA_$C: /$w,$w/
COLON_$C: /$w:$w/
EQUALS_$C: /$w=$w/
DOT_$C: /$dot\./
OPEN_$C: /\($w/
CLOSE_$C: /$w\)/
OPEN_INDEX_$C: /\[$w/
CLOSE_INDEX_$C: /$w\]/
AND_STRING_$C: /$W/
test_$c: or_$c (IF_$C or_$c ELSE_$C test_$c)? $functions
or_$c: not_$c (BOOLEAN_$C not_$c)*
not_$c: NOT_$C* comparison_$c
comparison_$c: sum_$c ((COMPARE_$C | IS_$C NOT_$C? | IN_$C | NOT_IN_$C) sum_$c)*
sum_$c: factor_$c (ARITHMETIC_$C factor_$c)*
factor_$c: UNARY* "await "? primary_$c
primary_$c: atom_$c trailer_$c*
trailer_$c: attribute_$c | call_$c | index_$c
attribute_$c: DOT_$C NAME
call_$c: OPEN_$K arguments_$k? CLOSE_$K
index_$c: OPEN_INDEX_$K subscripts_$k CLOSE_INDEX_$K
atom_$c: NAME | NUMBER | "True" | "False" | "None" | "..." | strings_$c | group_$k | list_$k $displays
group_$c: OPEN_$C (elements_$c | test_$c comprehension_$c | NAME WALRUS test_$c)? CLOSE_$C
list_$c: OPEN_INDEX_$C (elements_$c | star_$c | test_$c comprehension_$c)? CLOSE_INDEX_$C
elements_$c: test_$c COMMA_$C? | element_$c (COMMA_$C element_$c)+ COMMA_$C? | star_$c COMMA_$C
element_$c: test_$c | star_$c
star_$c: "*" sum_$c
comprehension_$c: (FOR_$C loop_names_$c IN_$C or_$c (IF_$C or_$c)*)+
loop_names_$c: loop_name_$c (COMMA_$C loop_name_$c)* COMMA_$C?
loop_name_$c: NAME | "*" NAME | OPEN_$C loop_names_$c CLOSE_$C
subscripts_$c: subscript_$c (COMMA_$C subscript_$c)* COMMA_$C?
subscript_$c: test_$c | test_$c? COLON_$C test_$c? (COLON_$C test_$c?)?
arguments_$c: test_$c comprehension_$c
    | positional_$c (COMMA_$C positional_$c)* (COMMA_$C named_$c)* COMMA_$C?
    | named_$c (COMMA_$C named_$c)* COMMA_$C?
positional_$c: test_$c | NAME WALRUS test_$c | "*" test_$c
named_$c: NAME EQUALS_$C test_$c | "**" test_$c
strings_$c: $strings
"""
)
# What follows a string may be `for` as well as an f-string, so that the spaces before belong to the terminal.
_STRINGS = Template(
    r"""string next_string_$c* | BYTES (AND_STRING_$C BYTES)*
next_string_$c: AND_STRING_$C STRING | /$W[fF]"/ rest_d | /$W[fF]'/ rest_s | /$W[fF]"{3}/ rest_dd
    | /$W[fF]'{3}/ rest_ss | /$W(?:[fF][rR]|[rR][fF])"/ raw_rest_d | /$W(?:[fF][rR]|[rR][fF])'/ raw_rest_s"""
)
_OUTSIDE = r"""
string: STRING | /[fF]"/ rest_d | /[fF]'/ rest_s | /[fF]"{3}/ rest_dd | /[fF]'{3}/ rest_ss
    | /[fF][rR]"|[rR][fF]"/ raw_rest_d | /[fF][rR]'|[rR][fF]'/ raw_rest_s
rest_d: (FCHARS_D | braces | field_d)* "\""
rest_s: (FCHARS_S | braces | field_s)* "'"
rest_dd: (FCHARS_DD | braces | field_d | "\"" | "\"\"")* "\"\"\""
rest_ss: (FCHARS_SS | braces | field_s | "'" | "''")* "'''"
raw_rest_d: (RAW_FCHARS_D | braces | field_d)* "\""
raw_rest_s: (RAW_FCHARS_S | braces | field_s)* "'"
braces: "{{" | "}}"
field_d: "{" test_d "="? /![rsa]/? specification? "}"
field_s: "{" test_s "="? /![rsa]/? specification? "}"
specification: ":" (SPEC | "{" NAME "}")*
OPEN_BRACE: /\{$w/
CLOSE_BRACE: /$w\}/
display: OPEN_BRACE (pairs | elements_i | star_i | test_i (COLON_I test_i)? comprehension_i)? CLOSE_BRACE
pairs: pair (COMMA_I pair)* COMMA_I?
pair: test_i COLON_I test_i | "**" sum_i
lambda_o: "lambda" (SP lambda_names_o)? COLON_O test_o
lambda_i: "lambda" (SP lambda_names_i)? COLON_I test_i
"""
# Parameters in their order: without a default, with one, starred. `p` is one parameter's name, perhaps annotated.
_PARAMETERS = Template(
    r"""
$n: $p (COMMA_$C $p)* (COMMA_$C $p EQUALS_$C test_$c)* (COMMA_$C ${n}_starred)? COMMA_$C?
    | $p EQUALS_$C test_$c (COMMA_$C $p EQUALS_$C test_$c)* (COMMA_$C ${n}_starred)? COMMA_$C?
    | ${n}_starred COMMA_$C?
${n}_starred: "*" $p (COMMA_$C ${n}_last)* (COMMA_$C "**" $p)? | "*" (COMMA_$C ${n}_last)+ (COMMA_$C "**" $p)? | "**" $p
${n}_last: $p (EQUALS_$C test_$c)?
"""
)
_STATEMENTS = r"""
simple: statement (SEMICOLON statement)*
statement: values | (targets ASSIGN)+ assigned | place AUGMENTED assigned
    | place ANNOTATED test_o (ASSIGN assigned)? | yield | "return" (SP values)?
    | "raise" (SP test_o (RAISE_FROM test_o)?)? | "pass" | "break" | "continue"
    | "assert" SP test_o (COMMA_O test_o)? | "del" SP place (COMMA_O place)*
    | ("global" | "nonlocal") SP NAME (COMMA_O NAME)* | "import" SP module (COMMA_O module)*
    | FROM (dotted | DOTS dotted?) IMPORT (imported_o | OPEN_I imported_i COMMA_I? CLOSE_I)
values: test_o (COMMA_O test_o)* LAST_COMMA? | "*" sum_o (COMMA_O (test_o | "*" sum_o))+
assigned: values | yield
yield: "yield" (SP values | SP FROM test_o)?
targets: target (COMMA_O target)* LAST_COMMA?
target: place | "*" place | OPEN_I inner_targets CLOSE_I | OPEN_INDEX_I inner_targets CLOSE_INDEX_I
inner_targets: inner_target (COMMA_I inner_target)* COMMA_I?
inner_target: NAME | "*" NAME | OPEN_I inner_targets CLOSE_I
place: NAME | atom_o trailer_o* (attribute_o | index_o)
dotted: NAME ("." NAME)*
module: dotted (AS NAME)?
imported_o: NAME (AS NAME)? (COMMA_O NAME (AS NAME)?)*
imported_i: NAME (AS NAME)? (COMMA_I NAME (AS NAME)?)*
parameter: NAME (COLON_I test_i)?
condition: test_o | NAME WALRUS test_o
item: test_o (AS target)?
"""
# A block deeper than the rest, whose lines are the cases.
_MATCH = Template(
    r"""
match_$k: "match" SP values BEGIN (LINE_$next case_$next)+
case_$next: "case" SP (pattern | patterns_o) (IF_O condition)? suite_$next
"""
)
_PATTERNS = r"""
pattern: choice (AS CAPTURE)?
choice: closed (BAR closed)*
closed: "-"? NUMBER | STRING | BYTES | "None" | "True" | "False" | dotted | classes
    | OPEN_I patterns_i? CLOSE_I | OPEN_INDEX_I patterns_i? CLOSE_INDEX_I | OPEN_BRACE mapping? CLOSE_BRACE
classes: dotted OPEN_I (pattern (COMMA_I pattern)* (COMMA_I keyed)* COMMA_I? | keyed (COMMA_I keyed)* COMMA_I?)? CLOSE_I
keyed: NAME EQUALS_I pattern
mapping: entry (COMMA_I entry)* (COMMA_I "**" CAPTURE)? COMMA_I? | "**" CAPTURE COMMA_I?
entry: ("-"? NUMBER | STRING | BYTES | "None" | "True" | "False" | NAME ("." NAME)+) COLON_I pattern
patterns_o: element_pattern (COMMA_O element_pattern)* LAST_COMMA?
patterns_i: element_pattern (COMMA_I element_pattern)* COMMA_I?
element_pattern: pattern | "*" NAME
BAR: / {0,9}\| {0,9}/
CAPTURE: NAME & ~/_/
"""
# A comment at the margin would go on after the function.
_BLOCK = Template(
    r"""
LINE_$k: / {0,80}(?:$comment)?\n(?:(?: {0,80}\n){0,3} {4,80}$comment\n)*(?: {0,80}\n){0,3} {$spaces}/
block_$k: LINE_$k statement_$k (LINE_$k statement_$k)*
statement_$k: simple | if_$k | while_$k | for_$k | try_$k | with_$k $match
    | ("@" test_o LINE_$k)* (function_$k | class_$k)
if_$k: "if" SP condition suite_$k (LINE_$k "elif" SP condition suite_$k)* else_$k?
while_$k: "while" SP condition suite_$k else_$k?
for_$k: "async "? "for" SP targets IN_O values suite_$k else_$k?
else_$k: LINE_$k "else" suite_$k
try_$k: "try" suite_$k (except_$k+ bare_$k? else_$k? finally_$k? | bare_$k else_$k? finally_$k? | finally_$k)
except_$k: LINE_$k "except" SP test_o (AS NAME)? suite_$k
bare_$k: LINE_$k "except" suite_$k
finally_$k: LINE_$k "finally" suite_$k
with_$k: "async "? "with" SP item (COMMA_O item)* suite_$k
function_$k: "async "? "def" SP NAME OPEN_I parameters? CLOSE_I (ARROW test_o)? suite_$k
class_$k: "class" SP NAME (OPEN_I arguments_i? CLOSE_I)? suite_$k
suite_$k: BEGIN (ONE_LINE simple $block)
"""
)


def function_grammar(header: str) -> str:
    """Lark of a function that begins with exactly `header`, `def name(…) -> …:`, and a body indented by 4.

    Whatever it lets through, up to where it may end, `ast.parse` takes, within Python's own limits on depth. Raises
    `UserError` when `header` is not the header of one function.
    """
    header = header.strip()
    _check(header)
    inside = rf"(?:[ \n]|{_COMMENT}\n|\\\n)"
    parts = [f"start: {json.dumps(header, ensure_ascii=False)} block_1 END?", _terminals()]
    for c, k, many, some, strings in (
        ("o", "i", _MANY, _SOME, _STRINGS.substitute(c="o", C="O", W=_SOME)),
        ("i", "i", f"{inside}*", f"{inside}+", _STRINGS.substitute(c="i", C="I", W=f"{inside}+")),
        ("d", "d", " {0,9}", " {1,9}", rf"/'[^'\"\\{_PLAIN}]*'/"),
        ("s", "s", " {0,9}", " {1,9}", rf"/\"[^'\"\\{_PLAIN}]*\"/"),
    ):
        outside_fields = c in "oi"
        expressions = _EXPRESSIONS.substitute(
            c=c,
            C=c.upper(),
            k=k,
            K=k.upper(),
            w=many,
            W=some,
            dot=many if c in "oi" else "",
            strings=strings,
            displays="| display" if outside_fields else "",
            functions=f"| lambda_{c}" if outside_fields else "",
        )
        parts.append(expressions)
    parts.append(_OUTSIDE.replace("$w", f"{inside}*"))
    for n, c, p in (("lambda_names_o", "o", "NAME"), ("lambda_names_i", "i", "NAME"), ("parameters", "i", "parameter")):
        parts.append(_PARAMETERS.substitute(n=n, c=c, C=c.upper(), p=p))
    parts += [_STATEMENTS, _PATTERNS]
    for depth in range(1, DEPTH + 1):
        match = block = ""
        if depth < DEPTH:
            match, block = f"| match_{depth}", f"| block_{depth + 1}"
            parts.append(_MATCH.substitute(k=depth, next=depth + 1))
        parts.append(_BLOCK.substitute(k=depth, spaces=4 * depth, comment=_COMMENT, match=match, block=block))
    return "\n".join(parts)


def _terminals() -> str:
    raw = rf"\\[^{_PLAIN}]"
    ascii_only = rf"{_PLAIN}\x7f-\U0010ffff"
    ascii_escape = rf"\\(?:[^{ascii_only}x]|x[0-9a-fA-F]{{2}})"
    return _TERMINALS.substitute(
        keywords="|".join(keyword.kwlist),
        string=_both(_PLAIN, _ESCAPE),
        raw=_both(_PLAIN, raw),
        bytes=_both(ascii_only, ascii_escape),
        raw_bytes=_both(ascii_only, rf"\\[^{ascii_only}]"),
        plain=_PLAIN,
        escape=_ESCAPE.replace("xuUN", "xuUN{}"),
        comment=_COMMENT,
        many=_MANY,
        some=_SOME,
    )


def _check(header: str) -> None:
    """Raise `UserError` when the text is not one function's header."""
    wrong = UserError("The signature must be that of one Python function, such as `def name(count: int) -> str:`.")
    if len(header) > MAX_HEADER_CHARACTERS or not header.endswith(":") or "\r" in header:
        raise wrong
    try:
        body = ast.parse(f"{header}\n    pass\n").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise wrong from error
    (function, *others) = body
    if others or not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef) or function.decorator_list:
        raise wrong
    if len(function.body) != 1 or not isinstance(function.body[0], ast.Pass):
        raise wrong
