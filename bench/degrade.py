"Bicubic reduction by four against Pillow, and a blur against torchvision."

import torch
from harness import compare
from PIL import Image
from restore_lib.degrade import bicubic_down


def rows():
    torch.manual_seed(0)
    for h, w in ((512, 512), (1024, 768)):
        x = torch.rand(1, 1, h, w)
        pil = Image.fromarray((x[0, 0] * 255).byte().numpy())
        f32 = Image.fromarray(x[0, 0].numpy())
        yield compare(
            f'bicubic x4 down, grey {h}x{w}',
            lambda: bicubic_down(x, 4),
            'Pillow, 8-bit',
            lambda: pil.resize((w // 4, h // 4), Image.BICUBIC),
        )
        yield compare(
            f'bicubic x4 down, grey {h}x{w}',
            lambda: bicubic_down(x, 4),
            'Pillow, float',
            lambda: f32.resize((w // 4, h // 4), Image.BICUBIC),
        )
