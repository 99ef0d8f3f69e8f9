"""Prompts of the parity suite: plain code, chats and gaps, in several languages."""

from __future__ import annotations

PLAIN = [
    "def quicksort(xs):\n",
    "class LinkedList:\n    def __init__(self):\n        self.head = None\n\n    def append(self, value):\n",
    'import re\n\ndef parse_duration(text: str) -> int:\n    """\'1h30m\' -> 5400 seconds."""\n',
    "#include <stdio.h>\n\nint main(void) {\n    for (int i = 0; i < 10; i++) {\n",
    "fn fibonacci(n: u64) -> u64 {\n",
    "SELECT customer.name, COUNT(*) FROM orders JOIN customer ON",
    "The three laws of thermodynamics are",
    "def test_add():\n    assert add(1, 2) == 3\n\n\ndef test_add_negative():\n",
    "# Überprüft, ob die Eingabe ein Palindrom ist\ndef ist_palindrom(text):\n",
    "export function debounce<T extends (...args: any[]) => void>(fn: T, ms: number) {\n",
]

CHATS = [
    "Write a Python function that merges two sorted lists.",
    "Why does `0.1 + 0.2 == 0.3` evaluate to False in Python?",
    "用中文解释什么是递归。",
    "Fix the bug: `def mean(xs): return sum(xs) / len(x)`",
    "Give me a bash one-liner that counts the lines of all *.py files.",
    "Name five sorting algorithms and their complexity. 🙂",
]

GAPS = [
    ("def is_even(n):\n    return ", "\n\n\ndef is_odd(n):\n    return not is_even(n)\n"),
    ("def area(width, height):\n    ", "\n\nprint(area(2, 3))  # 6\n"),
    ("for i in range(10):\n    if ", ":\n        continue\n    print(i)\n"),
    ("def binary_search(xs, x):\n    lo, hi = 0, len(xs)\n    while lo < hi:\n", "    return lo\n"),
    ("try:\n    value = int(text)\nexcept ", ":\n    value = None\n"),
    (
        "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def pop(self):\n",
        "\n\n    def peek(self):\n",
    ),
]
