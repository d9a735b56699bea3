"""Texts on which tokenizer libraries disagree, or might."""

from __future__ import annotations

import unicodedata

_SPACES = (
    " \t\n\r\x0b\x0c\x1c\x1d\x1e\x1f\x85\xa0\u1680\u180e\u2000\u2003\u200a\u200b\u2028\u2029\u202f\u205f\u3000\ufeff"
)
_ACCENTED = "Ångström naïve café ﬁn ① Ⅳ ½ ² ㎏ ｆｕｌｌ ｱｲｳ 각 ẛ̣ İ ı ß ẞ ǆ"

PROBES: tuple[str, ...] = (
    # nothing, and next to nothing
    "",
    " ",
    "\n",
    "a",
    "\0",
    "\0a\0\0b\x01\x7f",
    # white space: runs, ends, every kind, before and after each sort of word
    "  a   b    c     ",
    "\n\n\na\n \n  b\n\n",
    "a\r\nb\rc\n\r\r\n\n d",
    "\t\tx = 1\n\t\t\treturn  x\n    # four\n",
    "".join(f"a{space}b {space}c{space} d{space}{space}e" for space in _SPACES),
    "".join(f"{space}1{space}{space}!{space}x" for space in _SPACES),
    " " * 200 + "a" + " " * 201 + "\n" * 100 + "b",
    "trailing spaces   \nand tabs\t\t\n",
    # contractions in either case, curly and straight, and what only looks like one
    "it's I'm you're we've he'll she'd don't 's 't 're 've 'm 'll 'd",
    "IT'S I'M YOU'RE WE'VE HE'LL SHE'D DON'T 'S 'T 'RE 'VE 'M 'LL 'D 'Ll 'rE",
    "it’s ‘quoted’ rock'n'roll o'clock 'twas ''s '''d' 'ſ",
    # digits: long, grouped, other scripts', and numbers that are no digits
    "0 1 12 123 1234 12345 1234567890123456789012345 007 3.14159 1,000,000 1e-9 0x1F",
    "a1b22c333 4d 5 6 7  8   9 x²y³ ½cup ⅷ ٣٤٥ १२३ 一二三 𝟘𝟙𝟚 ①②",
    # Unicode forms: composed, decomposed, compatibility
    _ACCENTED,
    unicodedata.normalize("NFD", _ACCENTED),
    unicodedata.normalize("NFKC", _ACCENTED),
    unicodedata.normalize("NFKD", _ACCENTED),
    # combining marks with and without a letter before them
    "\u0301a\u0301\u0302\u0303 \u0301 e\u0327\u0301\u20dd \u0e33\u0e49",
    "Z\u0351\u036b\u0343a\u0363\u0340l\u0321\u0353g\u0321\u0332o\u0322" * 5,
    # scripts that write vowels with marks, with joiners, digits, and marks where no letter is
    "हिन्दी में क्षत्रिय ज्ञान १२३, र्\u200dय क्\u200cष।",
    "বাংলা ক্ষুদ্র ৎ தமிழ்நாடு க்ஷ ศรี น้ำใจ ๑๒ ភាសាខ្មែរ ស្ត្រី မြန်မာ",
    "בְּרֵאשִׁית בָּרָא אֱלֹהִים אֵת־הַשָּׁמַיִם ٱلْعَرَبِيَّةُ مُحَمَّدٌ، لُغَةٌ\nབོད་སྐད་ සිංහල తెలుగు ಕನ್ನಡ മലയാളം",
    "ि \u0941\n\u0e31a 1\u0301 .\u093f! \t\u064eب\r\n\u0f71 \u093c\u094d'\u0301s '\u0e34",
    "\u200d\u0d4d_\u0300 \u20e3#\u20e3",
    # emoji: joined, with skin, flags, keycaps, presentation selectors
    "👩\u200d👩\u200d👧\u200d👦 👍🏽 🏳️\u200d🌈 🇩🇪🇫🇷 1️⃣ ❤️❤︎ 🧑🏿\u200d🚀x",
    # outside the first plane, private use, noncharacters, the last character
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𐍈 𠜎𠜱 \U000f0000 \ue000\uf8ff \ufffe\uffff \U0010ffff \ufffd",
    # scripts with and without spaces, and all in one word
    "Привет, мир! Γειά σου Κόσμε. שלום עולם مرحبا بالعالم नमस्ते दुनिया สวัสดีชาวโลก",
    "日本語の文章です。中文没有空格，한국어 띄어쓰기 ｶﾀｶﾅ、「引用」",
    "abcдефγδε日本한글123ابت_x-y",
    "\u202eright to left\u202c \u200e\u200f \u00adsoft\u00adhyphen\u2060",
    # case that changes length or depends on neighbors
    "ΣΊΣΥΦΟΣ ΟΔΟΣ σς Straße STRASSE İstanbul ıŞIK ŉ ﬀ ǅ",
    # punctuation and code
    "!!! ... ??? --- *** ___ \"'`~ @#$%^&*()[]{}<>|\\/+=-_;:,.",
    "if (a[i] != b->c) { return &x / *y; } // done\n#include <stdio.h>\n",
    "https://example.org/a?b=c&d=%20#e user.name+tag@example.co.uk C:\\dir\\file.txt",
    "## heading\n### third\n###### sixth\n\n* item\n- [ ] todo\n```py\nprint('x')\n```\n",
    # what other tokenizers write inside their own files
    "▁a ▁▁b▁ Ġc Ċd ĉ ##e #f ⁀g </w> <0x41><0xE6><0x0A> @@ Â Ã",
    # spellings of special tokens
    "<|endoftext|><|pad|><|mask|> a<|endoftext|>b <|endoftext|",
    "<s></s><unk><pad><mask>[CLS][SEP][PAD][MASK][UNK] <eos><bos>",
    "<|im_start|>user<|im_end|><|system|><|user|><|assistant|><|end_of_turn|><|fim_prefix|><|fim_middle|>",
    # long words and long runs
    "a" * 5000,
    "ab" * 2500 + " " + "abc" * 1000,
    "日本" * 1500,
    "é" * 1000 + "e\u0301" * 1000,
    "9" * 3000,
    "=" * 3000 + "\n" + "-_" * 1000,
    "".join(chr(97 + (n * n + 3 * n) % 26) for n in range(5000)),
    "".join(chr(0x4E00 + (n * 7919) % 20000) for n in range(2000)),
    # every character of Latin-1, and one of every 997 that are no surrogates
    "".join(map(chr, range(256))),
    " ".join(chr(code) for code in range(0, 0x110000, 997) if not 0xD800 <= code < 0xE000),
)
