"""Animations with buttons, in a notebook without a kernel or the network; and as a GIF."""

import base64
import hashlib
import io
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.animation import FuncAnimation, PillowWriter
from matplotlib.figure import Figure
from PIL import Image


class Player(FuncAnimation):
    """matplotlib's animation, shown in a notebook as a player that needs neither a kernel nor the network.

    The same frames give the same text: the player's id is a hash of them, where matplotlib's is random.
    """

    def to_jshtml(self, *arguments, **options) -> str:
        html = super().to_jshtml(*arguments, **options)
        html = re.sub(r"<link rel=\"stylesheet\"\s+href=\"https://maxcdn[^>]*>", "", html)  # icons from the network: text instead
        html = re.sub(r'base64,([^"]*)"', lambda frame: f'base64,{_fewer_colours(frame[1])}"', html)
        for icon, text in PLAYER_SIGNS.items():
            html = html.replace(f'<i class="fa {icon}"></i>', text)
        identity = re.search(r'id="_anim_img([0-9a-f]{32})"', html).group(1)
        html = html.replace(identity, hashlib.sha256(html.replace(identity, "").encode()).hexdigest()[:32])
        first = re.search(r'frames\[0\] = ("data:[^"]*")', html).group(1)  # shown by a viewer that runs no scripts
        return html.replace('<img id="_anim_img', f'<img alt="step by step" src={first} id="_anim_img')

    def _repr_html_(self) -> str:
        return self.to_jshtml()


PLAYER_SIGNS = {
    "fa-minus": "−",
    "fa-fast-backward": "|◀",
    "fa-step-backward": "◀|",
    "fa-play fa-flip-horizontal": "◀",
    "fa-pause": "||",
    "fa-play": "▶",
    "fa-step-forward": "|▶",
    "fa-fast-forward": "▶|",
    "fa-plus": "+",
}


def _fewer_colours(frame: str) -> str:
    """A PNG in base64 (in JavaScript's broken lines) with a palette instead of three bytes a pixel: half the size."""
    file = io.BytesIO()
    Image.open(io.BytesIO(base64.b64decode(frame.replace("\\\n", "")))).convert("RGB").quantize(256).save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def animate(
    frames: Sequence[Any],
    draw: Callable[[Figure, Any], None],
    *,
    figsize: tuple[float, float] = (6, 4),
    dpi: int = 80,
    seconds: float = 1.0,
) -> Player:
    """One picture for each frame: `draw(figure, frame)` is called with an empty figure. In a notebook: with buttons to step and play.

    figsize: inches (`draw` may set its own, the same for every frame). seconds: how long a frame lasts when played. Drawing takes longer
    than all else in some lessons; a check that only wants to see them run sets LESSON_FRAMES, the most frames that are drawn.
    """
    frames = list(frames)[: int(os.environ.get("LESSON_FRAMES", "0")) or None]
    figure = Figure(figsize=figsize, dpi=dpi)

    def redraw(frame: Any) -> None:
        figure.clear()
        draw(figure, frame)

    return Player(figure, redraw, frames=frames, init_func=lambda: None, interval=1000 * seconds, repeat=True)


def save_gif(animation: FuncAnimation, file: str | Path, seconds: float = 1.0) -> None:
    """Write the animation as a GIF that shows each frame for that long."""
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    animation.save(str(file), writer=PillowWriter(fps=1 / seconds))
