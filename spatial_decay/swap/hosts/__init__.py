"""Attention modules of other libraries, known by the names of their classes: one file a library, and the table."""
