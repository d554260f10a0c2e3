"Figures of images: which tiles are drawn, and what is refused."

import pytest
import torch

from restore_lib.plots import show_images


@pytest.fixture
def plt(monkeypatch):
    plt = pytest.importorskip('matplotlib.pyplot')
    plt.switch_backend('agg')
    monkeypatch.setattr(plt, 'show', lambda: None)
    yield plt
    plt.close('all')


def test_numpy_images_are_named(plt):
    image = torch.rand(3, 8, 8)
    for wrong in ([image.numpy()], [image, image[0].numpy()], image[None].numpy()):
        with pytest.raises(TypeError, match=r'images\[.\] is ndarray; expected a float tensor'):
            show_images(wrong)
    with pytest.raises(TypeError, match=r'truth\[0\] is ndarray'):
        show_images([image], truth=[image.numpy()])


def test_one_image_is_not_taken_for_three_maps(plt):
    image = torch.rand(3, 8, 8)
    for wrong in (image, image[:1]):
        with pytest.raises(ValueError, match=r'images has shape .*\[image\] for one image'):
            show_images(wrong)
    maps = torch.rand(8, 9, 9)
    for right, tiles in (([image], 1), (list(image), 3), (image[None], 1), (maps, 8)):
        show_images(right)
        assert len([ax for ax in plt.gcf().axes if ax.images]) == tiles


@pytest.mark.parametrize('scores', [(), ('PSNR',)])
def test_errors_are_shown_with_and_without_scores(plt, scores):
    x = torch.full((1, 8, 8), 0.5)
    show_images([x + 0.1, x, x - 0.05], truth=x, scores=scores, errors=4)
    below = plt.gcf().axes[3:]
    assert [bool(ax.images) for ax in below] == [True, False, True]
    drawn = [ax.images[0].get_array().max() for ax in (below[0], below[2])]
    assert drawn == pytest.approx([0.4, 0.2], abs=1e-6)
    assert below[0].get_xlabel() == 'error times 4'
