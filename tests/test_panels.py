r"""Panels of images side by side, read back from the file."""

from __future__ import annotations

import pytest
import torch
from errors import one_line_value_error
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from pyro_vaediff.plotting import save_panels

pytestmark = pytest.mark.usefixtures("no_global_state")


def read(path):
    with Image.open(path) as image:
        return pil_to_tensor(image.convert("RGB"))


@pytest.mark.parametrize("channels", [1, 3])
def test_panels_are_where_their_labels_are(tmp_path, channels):
    shades = torch.tensor([[40, 80, 120], [160, 200, 240]])
    panels = [
        [torch.full((4, channels, 8, 8), s / 255, dtype=torch.float64) for s in row]
        for row in shades.tolist()
    ]
    save_panels(panels, tmp_path / "x.png", ["a", "b", "c"], ["D = 2", "D = 4"], "Title")
    pixels = read(tmp_path / "x.png")
    assert (pixels[0] == pixels[1]).all()  # all is grey
    # Each panel has 4 images of 8 x 8 pixels, enlarged 6 times.
    centers = []
    for shade in shades.flatten().tolist():
        ys, xs = (pixels[0] == shade).nonzero().T
        assert len(ys) >= 4 * 48 * 48
        centers.append((ys.double().mean().item(), xs.double().mean().item()))
    y, x = torch.tensor(centers).T.reshape(2, 2, 3)
    assert (x.diff(dim=1) > 96).all() and (y.diff(dim=0) > 96).all()
    assert (x - x.mean(0)).abs().max() < 4 and (y.T - y.mean(1)).abs().max() < 4
    # There is a title.
    assert (pixels[0, : int(y.min()) - 60] < 128).any()


def test_a_missing_panel_is_said_to_be_missing(tmp_path):
    images = torch.zeros(4, 3, 32, 32)
    save_panels([[images, None]], tmp_path / "x.png", ["a", "b"], ["row"], "Title")
    save_panels([[images, images]], tmp_path / "y.png", ["a", "b"], ["row"], "Title")
    missing, whole = read(tmp_path / "x.png"), read(tmp_path / "y.png")
    assert missing.shape == whole.shape
    right = missing.shape[-1] // 2 + 60
    assert 20 < (missing[0, 60:, right:] < 200).sum() < (whole[0, 60:, right:] < 200).sum() / 2


def test_long_labels_and_titles_are_wrapped(tmp_path):
    images = torch.zeros(4, 1, 8, 8)
    names = ["flow (3 affine autoregressive steps)", "b"]
    save_panels([[images] * 2], tmp_path / "x.png", names, ["a row"], "A very long title " * 6)
    pixels = read(tmp_path / "x.png")
    # Nothing touches the border.
    edge = torch.cat(
        [pixels[:, :3].flatten(), pixels[..., :3].flatten(), pixels[..., -3:].flatten()]
    )
    assert (edge == 255).all()


def test_errors(tmp_path):
    images, path = torch.zeros(4, 1, 8, 8), tmp_path / "x.png"
    with one_line_value_error("panels must be 1 rows of 2 panels"):
        save_panels([[images]], path, ["a", "b"], ["row"], "")
    with one_line_value_error("panels must be 0 rows of 1 panels"):
        save_panels([], path, ["a"], [], "")
    with one_line_value_error("panels must have one shape"):
        save_panels([[images, images[:2]]], path, ["a", "b"], ["row"], "")
    with one_line_value_error("panels must have one shape"):
        save_panels([[None]], path, ["a"], ["row"], "")
    with one_line_value_error(r"panels\[0\]\[0\] must be finite and in \[0, 1\]"):
        save_panels([[images - 1]], path, ["a"], ["row"], "")
    with one_line_value_error("images_per_row must be a whole number >= 1, got 0"):
        save_panels([[images]], path, ["a"], ["row"], "", images_per_row=0)
    with one_line_value_error("path must end in .png"):
        save_panels([[images]], tmp_path / "x.pdf", ["a"], ["row"], "")
    assert not list(tmp_path.iterdir())
