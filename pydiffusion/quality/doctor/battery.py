"""Texts in many scripts, for round trips through a tokenizer."""

from __future__ import annotations

#: By name. U+2581 is not among them: this tokenizer decodes it as a space, as the reference does.
TEXTS = {
    "English": "The quick brown fox jumps over the lazy dog; it's 3.14% \u201cdone\u201d \u2014 really?",
    "German": "Zw\u00f6lf Boxk\u00e4mpfer jagen Viktor quer \u00fcber den gro\u00dfen Sylter Deich.",
    "French": "D\u00e8s No\u00ebl o\u00f9 un z\u00e9phyr ha\u00ef me v\u00eat de gla\u00e7ons w\u00fcrmiens.",
    "Vietnamese": "Ch\u00fang t\u00f4i \u0111\u00e3 \u0111\u1ebfn \u0111\u00e2y t\u1eeb h\u00f4m qua.",
    "Turkish": "P\u0131jamal\u0131 hasta ya\u011f\u0131z \u015fof\u00f6re \u00e7abucak g\u00fcvendi.",
    "Greek": "\u039e\u03b5\u03c3\u03ba\u03b5\u03c0\u03ac\u03b6\u03c9 \u03c4\u1f74\u03bd \u03c8\u03c5\u03c7\u03bf\u03c6\u03b8\u03cc\u03c1\u03b1 \u03b2\u03b4\u03b5\u03bb\u03c5\u03b3\u03bc\u03af\u03b1.",
    "Russian": "\u0421\u044a\u0435\u0448\u044c \u0436\u0435 \u0435\u0449\u0451 \u044d\u0442\u0438\u0445 \u043c\u044f\u0433\u043a\u0438\u0445 \u0444\u0440\u0430\u043d\u0446\u0443\u0437\u0441\u043a\u0438\u0445 \u0431\u0443\u043b\u043e\u043a.",
    "Arabic": "\u0646\u0635 \u062d\u0643\u064a\u0645 \u0644\u0647 \u0633\u0631 \u0642\u0627\u0637\u0639 \u0648\u0630\u0648 \u0634\u0623\u0646 \u0639\u0638\u064a\u0645",
    "Hebrew": "\u05d3\u05d2 \u05e1\u05e7\u05e8\u05df \u05e9\u05d8 \u05d1\u05d9\u05dd \u05de\u05d0\u05d5\u05db\u05d6\u05d1",
    "Hindi": "\u090b\u0937\u093f\u092f\u094b\u0902 \u0915\u094b \u0938\u0924\u093e\u0928\u0947 \u0935\u093e\u0932\u0947 \u0926\u0941\u0937\u094d\u091f",
    "Tamil": "\u0baf\u0bbe\u0bae\u0bb1\u0bbf\u0ba8\u0bcd\u0ba4 \u0bae\u0bca\u0bb4\u0bbf\u0b95\u0bb3\u0bbf\u0bb2\u0bc7",
    "Thai": "\u0e40\u0e1b\u0e47\u0e19\u0e21\u0e19\u0e38\u0e29\u0e22\u0e4c\u0e2a\u0e38\u0e14\u0e1b\u0e23\u0e30\u0e40\u0e2a\u0e23\u0e34\u0e10\u0e40\u0e25\u0e34\u0e28\u0e04\u0e38\u0e13\u0e04\u0e48\u0e32",
    "Chinese": "\u6211\u80fd\u541e\u4e0b\u73bb\u7483\u800c\u4e0d\u4f24\u8eab\u4f53\u3002\u300c\u7e41\u9ad4\u4e2d\u6587\u300d",
    "Japanese": "\u3044\u308d\u306f\u306b\u307b\u3078\u3068 \u30a4\u30ed\u30cf \u6f22\u5b57\u304b\u306a\u4ea4\u3058\u308a\u6587",
    "Korean": "\ub2e4\ub78c\uc950 \ud5cc \uccc7\ubc14\ud034\uc5d0 \ud0c0\uace0\ud30c",
    "Georgian": "\u10d5\u10d4\u10de\u10ee\u10d8\u10e1 \u10e2\u10e7\u10d0\u10dd\u10e1\u10d0\u10dc\u10d8",
    "emoji": "\U0001f600\U0001f44d\U0001f3fd \U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466 \U0001f1f3\U0001f1f4 \u2764\ufe0f 1\ufe0f\u20e3",
    "rare characters": "\U00010348\U0001f9ff\U000e0041 \u0000\u0001\u007f\u00a0\u2028\ufeff e\u0301",
    "mathematics": "\u2200x\u2208\u211d: \u2211\u1d62 x\u1d62\u00b2 \u2265 0 \u21d2 \u221a2 \u2248 1.41421 \U0001d54f",
    "whitespace": "  two\tand\n\nthree\r\n   \t\t\n\n\n\n    trailing  ",
    "spaces": " " * 37 + "x" + "\n" * 11 + "\t" * 9,
    "numbers": "0 12 345 6789 1234567890 0x1F 1e-10 3,141.59 2026-07-09T12:00:00Z",
    "Python": "def f(x: int) -> str:\n    return f'{x!r:>10}'  # \"comment\"\n\n\tif not x:\n\t\tpass\n",
    "C": '#include <stdio.h>\nint main(void) { return printf("%d\\n", a[i] ? b->c : *d++ & ~0x7fUL); }',
    "JSON": '{"key": [1, 2.5e3, null, true], "\u00fc": "a\\"b\\\\c\\u00e9"}',
    "HTML": '<a href="https://example.org/?q=1&amp;r=%20">link</a><!-- comment --></body>',
    "Markdown": "# Title\n\n- **bold** `code`\n\n| a | b |\n|---|---|\n```sh\n$ ls -la | grep '^d'\n```",
    "almost markers": "<bos <|turn > < |turn|> <turn| <0x0A> [PAD] <|im_start|>",
    "empty": "",
}
