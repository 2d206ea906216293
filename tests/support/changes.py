"""Strategies that change one place of a JSON content into anything."""

from hypothesis import strategies as st

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
anything = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
)
places = st.lists(st.integers(0, 20), min_size=1, max_size=4)


def replace_somewhere(content, place, value):
    """Replaces what one comes to by taking, at each level, the place-th key or element."""
    for step, last in zip(place, [False] * (len(place) - 1) + [True], strict=True):
        keys = list(content) if isinstance(content, dict) else list(range(len(content)))
        key = keys[step % len(keys)]
        if last or not isinstance(content[key], dict | list) or not content[key]:
            content[key] = value
            return
        content = content[key]
