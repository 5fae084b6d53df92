"""Formulas as MathML, made while the site is built: `$...$` and `$$...$$`.

A browser shows MathML without a script and without a network. mkdocs.yml names
this as an extension of Python-Markdown. It is found when `python -m mkdocs` or
`python -m zensical` is started from the repository's root.
"""

import re
from typing import Any

from latex2mathml.converter import convert
from markdown import Extension, Markdown
from markdown.inlinepatterns import InlineProcessor

__all__ = ["MathMLExtension", "makeExtension"]

# After code in backticks (190), before backslashes (180) and emphasis, which
# formulas are full of.
_PRIORITY = 185


class _Formula(InlineProcessor):
    def __init__(self, pattern: str, md: Markdown, display: str) -> None:
        super().__init__(pattern, md)
        self.compiled_re = re.compile(pattern, re.DOTALL)
        self.display = display

    def handleMatch(  # type: ignore[override]
        self, m: re.Match[str], data: str
    ) -> tuple[str, int, int]:
        mathml = convert(m.group(1).strip(), display=self.display)
        if "\\" in mathml:  # it leaves a command that it does not know
            raise ValueError(f"a formula has an unknown command: {m.group(0)}")
        if self.display == "block":  # a wide formula scrolls, not the page
            mathml = f'<div class="formula">{mathml}</div>'
        return self.md.htmlStash.store(mathml), m.start(0), m.end(0)


class MathMLExtension(Extension):
    """Formulas in dollars become MathML; one that cannot stops the build."""

    def extendMarkdown(self, md: Markdown) -> None:
        block = _Formula(r"\$\$(.+?)\$\$", md, "block")
        inline = _Formula(r"\$([^$\n]+)\$", md, "inline")
        md.inlinePatterns.register(block, "block formula", _PRIORITY + 1)
        md.inlinePatterns.register(inline, "inline formula", _PRIORITY)


def makeExtension(**kwargs: Any) -> MathMLExtension:
    """Return the extension, as Python-Markdown asks for it."""
    return MathMLExtension(**kwargs)
