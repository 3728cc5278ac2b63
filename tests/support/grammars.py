"""Grammars of the kinds that llama.cpp's users write, with texts that belong to them and texts that don't."""

from __future__ import annotations

JSON = r"""
root   ::= object
value  ::= object | array | string | number | ("true" | "false" | "null") ws   # anything

object ::=
  "{" ws (
    member
    ("," ws member)*
  )? "}" ws
member ::= string ":" ws value
array  ::=
  "[" ws (
    value
    ("," ws value)*
  )? "]" ws

string ::= "\"" ( [^"\\\x7F\x00-\x1F] | "\\" (["\\bfnrt/] | "u" [0-9a-fA-F]{4}) )* "\"" ws
number ::= "-"? ("0" | [1-9] [0-9]{0,15}) ("." [0-9]+)? ([eE] [-+]? [0-9]{1,3})? ws
ws ::= | " " | "\n" [ \t]{0,20}
"""

JSON_ARRAY = r"""
# objects in an array, one a line; spaces by a rule that ends with itself
root ::= "[\n" object (",\n" object)* "\n]"
object ::= "{" ws pair ("," ws pair)* ws "}"
pair ::= text ":" ws (text | int)
text ::= "\"" [^"\\\n]* "\""
int ::= "-"? [0-9]+
ws ::= ([ \t] ws)?
"""

LIST = r"""
root ::= item+

# Excludes line breaks.
item ::= "- " [^\r\n\x0b\x0c\x85\u2028\u2029]+ "\n"
"""

ARITHMETIC = r"""
root  ::= (expr "=" ws term "\n")+
expr  ::= term ([-+*/] term)*
term  ::= ident | num | "(" ws expr ")" ws
ident ::= [a-z] [a-z0-9_]* ws
num   ::= [0-9]+ ws
ws    ::= [ \t\n]*
"""

CHESS = r"""
root ::= "1. " move " " move "\n" ([1-9] [0-9]? ". " move " " move "\n")+
move ::= (pawn | piece | castle) [+#]?
piece ::= [NBKQR] [a-h]? [1-8]? "x"? [a-h] [1-8]
pawn ::= ([a-h] "x")? [a-h] [1-8] ("=" [NBKQR])?
castle ::= "O-O" "-O"?
"""

C_LIKE = r"""
root ::= (declaration)*
declaration ::= type name "(" parameter? ")" "{" statement* "}"
type ::= ("int" | "float" | "char") ws
name ::= [a-zA-Z_] [a-zA-Z_0-9]*
parameter ::= type name
statement ::=
    ( type name ws "=" ws sum ";" ) |
    ( "return" ws sum ";" ) |
    ( "while" "(" condition ")" "{" statement* "}" ) |
    ( "//" [^\n]* "\n" )
condition ::= sum ("<=" | "<" | "==" | "!=") sum
sum ::= term (("+" | "-") term)*
term ::= factor (("*" | "/") factor)*
factor ::= name | [0-9]+ | "(" sum ")"
ws ::= ([ \t\n]+)
"""

JAPANESE = r"""
# kana, kanji and punctuation, a question or a statement
root ::= jp-char+ ([ \t\n] jp-char+)*
jp-char ::= hiragana | katakana | punctuation | cjk
hiragana ::= [ぁ-ゟ]
katakana ::= [\u30A1-\u30FF]
punctuation ::= [、-〾]
cjk ::= [一-\u9FFF]
"""

#: name -> grammar, texts of its language, texts that are not
GRAMMARS: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "json": (
        JSON,
        ("{}", '{"a": 1}', '{"a":[true,null,-0.5e+3,"\\u00e9é"]}', '{\n\t"a": {"b": {"c": [1, 2]}}\n}'),
        ("[]", '{"a"}', '{"a": 01}', '{"a": "\n"}', "{} {}", '{"a": 1,}', '{"a": +1}'),
    ),
    "json_arr": (
        JSON_ARRAY,
        ('[\n{"a":1}\n]', '[\n{"a": "x",  "b": -12},\n{"c":"" }\n]'),
        ("[\n\n]", '[{"a":1}]', '[\n{"a":1},\n]', '[\n{"a":[1]}\n]'),
    ),
    "list": (LIST, ("- a\n", "- eins\n- zwei é\n"), ("", "- \n", "a\n", "- a", "- a\u2028b\n")),
    "arithmetic": (
        ARITHMETIC,
        ("a=1\n", "x_1 +2*(3 -y) = 7\n", "((1))=z\n(a)=b\n"),
        ("a=", "1=1", "(a=1\n", "=1\n", "a++b=1\n", "A=1\n"),
    ),
    "chess": (
        CHESS,
        ("1. e4 e5\n2. Nf3 Nc6\n", "1. d4 d5\n2. exd5 O-O-O\n3. Qh5# a8=Q+\n", "1. b4 c5\n22. R1e2 Kd1\n"),
        ("1. e4 e5\n", "2. e4 e5\n2. a1 a2\n", "1. e9 e5\n2. a1 a2\n", "1. e4 e5\n0. a1 a2\n"),
    ),
    "c": (
        C_LIKE,
        ("", "int f(){return 1;}", "float g(int x){int y = x*(x+1);while(x<=10){return y/2;}//end\n}"),
        ("int f(){return 1}", "intf(){}", "int 1(){}", "int f(int x, int y){}", "int f(){return ;}"),
    ),
    "japanese": (JAPANESE, ("こんにちは", "ラーメン、日本 語。"), ("", "hello", "日本x", " 日", "日  本")),
}
