import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from veda_compile.kernels.errors import LayoutError
from veda_compile.kernels.layout import Extra, Layout, Video

videos = st.builds(Video, *[st.integers(1, 9)] * 3)
extras = st.builds(Extra, st.integers(1, 40))
layouts = st.lists(videos | extras, min_size=1, max_size=5).filter(
    lambda found: any(isinstance(segment, Video) for segment in found)
)


def test_lengths_and_offsets():
    layout = Layout.of(Extra(5), Video(2, 3, 4), Extra(1), Video(1, 1, 2))
    assert layout.length == 5 + 24 + 1 + 2
    assert layout.videos == ((5, Video(2, 3, 4)), (30, Video(1, 1, 2)))
    assert Video(2, 3, 4).grid == (2, 3, 4)


def test_encoding_is_four_integers_a_segment():
    assert Layout.of(Video(21, 45, 80), Extra(512)).encode() == [1, 21, 45, 80, 0, 512, 1, 1]


@settings(deadline=None, derandomize=True, max_examples=50)
@given(layouts)
def test_decode_inverts_encode(segments):
    layout = Layout(tuple(segments))
    again = Layout.decode(layout.encode())
    assert again == layout
    assert hash(again) == hash(layout)


@pytest.mark.parametrize("sides", [(0, 4, 4), (4, 0, 4), (4, 4, 0), (-1, 4, 4)])
def test_empty_video_is_refused(sides):
    with pytest.raises(LayoutError, match="at least 1"):
        Video(*sides)


@pytest.mark.parametrize("length", [0, -3])
def test_empty_extra_is_refused(length):
    with pytest.raises(LayoutError, match=f"length {length}: leave out"):
        Extra(length)


@pytest.mark.parametrize("segments", [(), (Extra(3),)])
def test_a_layout_needs_a_video(segments):
    with pytest.raises(LayoutError, match="at least one video"):
        Layout(segments)


@pytest.mark.parametrize("flat", [[], [1, 2, 3], [1, 2, 3, 4, 0], [2, 1, 1, 1], [0, 5, 2, 1]])
def test_malformed_encodings_are_refused(flat):
    with pytest.raises(LayoutError):
        Layout.decode(flat)


def test_length_check_names_layout_and_tokens():
    layout = Layout.of(Video(2, 3, 4), Extra(6))
    layout.check_length(30)
    with pytest.raises(LayoutError, match=r"\[video 2x3x4, extra 6\] holds 30 .* has 31"):
        layout.check_length(31)
