"SSIM against torchmetrics and scikit-image."

import torch
from harness import compare
from restore_lib.metrics import ssim


def rows():
    from skimage.metrics import structural_similarity
    from torchmetrics.functional.image import structural_similarity_index_measure as tm

    torch.manual_seed(0)
    for b, c, h, w in ((8, 1, 256, 256), (4, 3, 512, 512)):
        x = torch.rand(b, c, h, w)
        y = (x + 0.1 * torch.randn_like(x)).clamp(0, 1)
        name, xs, ys = f'SSIM, ({b}, {c}, {h}, {w})', x.numpy(), y.numpy()
        yield compare(
            name,
            lambda: ssim(y, x),
            'torchmetrics',
            lambda: tm(y, x, data_range=1.0, gaussian_kernel=True, sigma=1.5, reduction='none'),
        )
        yield compare(
            name,
            lambda: ssim(y, x),
            'scikit-image',
            lambda: [
                structural_similarity(
                    q,
                    p,
                    data_range=1.0,
                    gaussian_weights=True,
                    sigma=1.5,
                    use_sample_covariance=False,
                    channel_axis=0,
                )
                for p, q in zip(xs, ys)
            ],
            repeats=7,
        )
