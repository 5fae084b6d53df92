"""Formulas of the pages as MathML, made while the site is built: `$...$` in a line, `$$...$$` on lines of their own.

A browser shows MathML without a script and without a network. mkdocs.yml and Zensical both load this as an extension of
Python-Markdown; it is found when they are started from the repository's root as `python -m mkdocs` or `python -m
zensical`.
"""

from re import DOTALL, Match, compile
from typing import Any

from latex2mathml.converter import convert
from markdown import Extension, Markdown
from markdown.inlinepatterns import InlineProcessor

__all__ = ["MathMLExtension", "makeExtension"]

# After code in backticks (190), and before backslashes (180) and emphasis, which formulas are full of.
_PRIORITY = 185


class _Formula(InlineProcessor):
    def __init__(self, pattern: str, md: Markdown, display: str) -> None:
        super().__init__(pattern, md)
        self.compiled_re = compile(pattern, DOTALL)
        self.display = display

    def handleMatch(self, m: Match[str], data: str) -> tuple[str, int, int]:  # type: ignore[override]
        mathml = convert(m.group(1).strip(), display=self.display)
        if self.display == "block":  # a wide formula scrolls, and not the page
            mathml = f'<div class="formula">{mathml}</div>'
        return self.md.htmlStash.store(mathml), m.start(0), m.end(0)


class MathMLExtension(Extension):
    """Formulas in dollars become MathML; a formula that is no LaTeX stops the build."""

    def extendMarkdown(self, md: Markdown) -> None:
        md.inlinePatterns.register(_Formula(r"\$\$(.+?)\$\$", md, "block"), "formula", _PRIORITY + 1)
        md.inlinePatterns.register(_Formula(r"\$([^$\n]+)\$", md, "inline"), "inline formula", _PRIORITY)


def makeExtension(**kwargs: Any) -> MathMLExtension:
    """What Python-Markdown calls."""
    return MathMLExtension(**kwargs)
