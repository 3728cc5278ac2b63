"""Texts in many scripts, for round trips through a tokenizer."""

from __future__ import annotations

#: By name. U+2581 is not among them: this tokenizer decodes it as a space, as the reference does.
TEXTS = {
    "English": "The quick brown fox jumps over the lazy dog; it's 3.14% “done” — really?",
    "German": "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich.",
    "French": "Dès Noël où un zéphyr haï me vêt de glaçons würmiens.",
    "Vietnamese": "Chúng tôi đã đến đây từ hôm qua.",
    "Turkish": "Pıjamalı hasta yağız şoföre çabucak güvendi.",
    "Greek": "Ξεσκεπάζω τὴν ψυχοφθόρα βδελυγμία.",
    "Russian": "Съешь же ещё этих мягких французских булок.",
    "Arabic": "نص حكيم له سر قاطع وذو شأن عظيم",
    "Hebrew": "דג סקרן שט בים מאוכזב",
    "Hindi": "ऋषियों को सताने वाले दुष्ट",
    "Tamil": "யாமறிந்த மொழிகளிலே",
    "Thai": "เป็นมนุษย์สุดประเสริฐเลิศคุณค่า",
    "Chinese": "我能吞下玻璃而不伤身体。「繁體中文」",
    "Japanese": "いろはにほへと イロハ 漢字かな交じり文",
    "Korean": "다람쥐 헌 쳇바퀴에 타고파",
    "Georgian": "ვეპხის ტყაოსანი",
    "emoji": "😀👍🏽 👨\u200d👩\u200d👧\u200d👦 🇳🇴 ❤\ufe0f 1\ufe0f⃣",
    "rare characters": "\U00010348\U0001f9ff\U000e0041 \u0000\u0001\u007f\u00a0\u2028\ufeff e\u0301",
    "mathematics": "∀x∈ℝ: ∑ᵢ xᵢ² ≥ 0 ⇒ √2 ≈ 1.41421 𝕏",
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
