"""Lesson 8's model: how many cycles a step of `hopper`'s loop takes, and what a forward or backward of a whole problem does then.

What is known of a multiprocessor is read from the emulator's cost model (cuda/emulator/model.h), tile sizes from the kernels. Three numbers are
fitted, each to one figure (`FITTED`); nothing else is. Cycles are of one multiprocessor; a step is one tile of keys against one tile of queries.
"""

import math
import re
from typing import NamedTuple

from sources import constants, source

MODEL = {name: float(value) for name, value in re.findall(r"X\((\w+), ([\d.]+), ", source("emulator/model.h"))}

MULTIPROCESSORS = 132
GHZ = {}  # filled below
