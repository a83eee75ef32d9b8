"""The API pages, which pdoc makes from docstrings: `make docs` writes them to build/api/.

python docs/build_api.py [FOLDER]
"""

import sys
from pathlib import Path

import pdoc

from flash_attention import __version__

# What users import, then the algorithms that they read.
MODULES = (
    "flash_attention",
    "flash_attention.spans",
    "flash_attention.scores",
    "flash_attention.cache",
    "flash_attention.parallel",
    "flash_attention.integrations.sdpa",
    "flash_attention.integrations.hugging_face",
    "flash_attention.integrations.hugging_face_alibi",
    "flash_attention.integrations.flash_attn",
    "flash_attention.integrations.earlier",
    "flash_attention.reference",
)


def build(folder: Path) -> None:
    """One HTML page a module, an index and a search."""
    pdoc.render.configure(docformat="google", footer_text=f"flash_attention {__version__}")
    pdoc.pdoc(*MODULES, output_directory=folder)


if __name__ == "__main__":
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "build/api")
    build(folder)
    print(f"{folder / 'index.html'}")
