"""Encoding and decoding with each codec, against the packet of all bands and against a copy of the
tensor; one thread. VQ-f4, the autoencoder that they replace, once."""

import torch
from diffusers import VQModel
from harness import compare
from restore_lib.codecs import CODECS, PacketCodec, make_codec


def trip(codec, x):
    with torch.no_grad():
        return codec.decode(*codec.encode(x))


def vq_f4():
    "The published size, random weights; RGB only."
    torch.manual_seed(0)
    return VQModel(
        down_block_types=('DownEncoderBlock2D',) * 3,
        up_block_types=('UpDecoderBlock2D',) * 3,
        block_out_channels=(128, 256, 512),
        layers_per_block=2,
        latent_channels=3,
        num_vq_embeddings=8192,
    ).eval()


def through(model, x):
    x = x.expand(-1, 3, -1, -1)
    with torch.no_grad():
        return model.decode(model.encode(x).latents).sample


def measured():
    for batch in (1, 16):
        torch.manual_seed(0)
        x, packet = torch.rand(batch, 1, 256, 256), PacketCodec()
        for name in CODECS:
            codec = make_codec(name)
            subject = f'{name}, encode and decode {batch}x1x256x256'
            few = 5 if name in ('vq', 'hybrid') and batch > 1 else 15
            error = f'error {(trip(codec, x) - x).abs().max():.0e}' if codec.lossless else 'lossy'
            if name != 'packet':
                yield compare(
                    subject, lambda: trip(codec, x), 'packet', lambda: trip(packet, x), few, error
                )
            yield compare(
                subject, lambda: trip(codec, x), 'a copy of the tensor', x.clone, few, error
            )
    model, x = vq_f4(), torch.rand(1, 1, 256, 256)
    yield compare(
        'packet, encode and decode 1x1x256x256',
        lambda: trip(packet, x),
        'VQ-f4 of diffusers, RGB',
        lambda: through(model, x),
        1,
        'random weights, one turn',
    )


def rows():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield from measured()
    finally:
        torch.set_num_threads(threads)
