"""The text that `distill align` looks at when it is given none: what reasoning traces are made of, a little of each.

Written for this purpose. Each kind is its own text, because two tokenizers that agree on sums may differ on code.
"""

from __future__ import annotations

SAMPLE: dict[str, str] = {
    "sums": (
        "<think>\nShe has 3 boxes of 12 pencils, so 3 * 12 = 36. She gives away 7 of them: 36 - 7 = 29.\n"
        "Half of 29 is 14.5, which is no number of pencils. Let me read the question again.\n"
        "Wait, she gives away 8: 36 - 8 = 28, and 28 / 2 = 14.\n</think>\n\n"
        "Each of them gets 28 / 2 = $14. The answer is \\boxed{14}.\n#### 14"
    ),
    "numbers": (
        "7 42 365 1024 65536 123456 3141592 27182818 987654321 1000000007\n"
        "1,234,567.89 + 0.001 = 1,234,567.891; -17 % 5 = 3; 6.022e23; 50%; 12:30; 2026-11-21; 3/4; 0x1F4A9\n"
    ),
    "LaTeX": (
        "The sum is $\\sum_{k=1}^{n} k^2 = \\frac{n(n+1)(2n+1)}{6}$, so for $n = 201$ we get\n"
        "\\[ \\frac{201 \\cdot 202 \\cdot 403}{6} = 2{,}727{,}101. \\]\n"
        "Let $\\alpha \\le \\sqrt{2}$ and $f'(x) \\neq 0$; then $\\mathbb{E}[X \\mid Y] \\to \\infty$.\n"
    ),
    "code": (
        "def collatz(n: int) -> list[int]:\n"
        '    """Return the way of n down to 1."""\n'
        "    steps = [n]\n"
        "    while n != 1:\n"
        "        if n % 2 == 0:\n"
        "            n //= 2\n"
        "        else:\n"
        "            n = 3 * n + 1\n"
        "        steps.append(n)\n"
        "    return steps\n\n\n"
        "for key, value in {'a': 1, 'b': [2, 3]}.items():\n"
        "\tprint(f\"{key!r:>8}\", value, sep='\\t')  # a tab\n"
    ),
    "Chinese": "小明有12个苹果，他给了小红3个，还剩多少个？\n解：12 − 3 = 9，所以还剩9个苹果。答案是 9。\n",
    "accents and emoji": (
        "Où est le café de Zoë? Größe: 5 µm, naïve façade, 10 °C, ½ ≤ ¾.\n🎉👍🏽 👩\u200d👩\u200d👧 🇩🇪 ✅ → done…\n"
    ),
    "spaces": "a  b   c    d        e\n\n  two\n   three\n        eight\n\n\n\tone tab\n\t\ttwo tabs \n trailing   \n",
}
