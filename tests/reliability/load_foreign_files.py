"""Offers files that run code when they are loaded carelessly, wherever a file is taken.

    python tests/reliability/load_foreign_files.py

Each file would leave a mark if its code ran; that it can is shown first. Each must be
refused with status 2 and a message that names it, or rebuilt (a cache), without a mark.
"""

from __future__ import annotations
