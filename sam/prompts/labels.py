"""Labels of points: what a click, a padding point or a corner of a box is to the prompt encoder."""

from __future__ import annotations

LABEL_ABSENT = -2  # fills the token list of a shorter prompt; masked out of every attention
LABEL_PADDING = -1  # the "not a point" token
LABEL_BACKGROUND = 0
LABEL_FOREGROUND = 1
LABEL_BOX_TOP_LEFT = 2
LABEL_BOX_BOTTOM_RIGHT = 3
POINT_LABELS = (LABEL_PADDING, LABEL_BACKGROUND, LABEL_FOREGROUND)
CORNER_LABELS = (LABEL_BOX_TOP_LEFT, LABEL_BOX_BOTTOM_RIGHT)
