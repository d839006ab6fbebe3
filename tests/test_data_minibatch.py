r"""Minibatches: every image once, reproducible orders, fair flips."""

import pytest
import torch
from image_files import rows

from pyro_vaediff.data import batches

# Minibatches


def numbered(count, width=2, device="cpu"):
    r"""Images whose left column is their number and whose other columns are 255."""

    images = torch.full((count, 1, 2, width), 255, dtype=torch.uint8, device=device)
    images[..., 0] = torch.arange(count, device=device)[:, None, None]
    return images


@pytest.mark.parametrize("count, batch_size", [(10, 3), (9, 3), (2, 5), (1, 1)])
@pytest.mark.parametrize("shuffle", [False, True])
def test_batches_hold_every_image_once(device, count, batch_size, shuffle):
    images = numbered(count)
    found = list(batches(images, batch_size, shuffle=shuffle, device=device))
    assert all(b.device.type == device.type and b.dtype == torch.uint8 for b in found)
    expected = [batch_size] * (count // batch_size) + [count % batch_size] * (
        count % batch_size > 0
    )
    assert [len(b) for b in found] == expected
    joined = torch.cat(found).cpu()
    assert rows(joined) == rows(images)
    if not shuffle:
        assert torch.equal(joined, images)


def test_batches_drop_last(device):
    images = numbered(10)
    found = list(batches(images, 4, shuffle=True, device=device, drop_last=True))
    assert [len(b) for b in found] == [4, 4]
    assert len(set(rows(*(b.cpu() for b in found)))) == 8
    (only,) = batches(images, 16, shuffle=True, device=device, drop_last=True)
    assert rows(only.cpu()) == rows(images)
    assert len(list(batches(images, 5, shuffle=True, device=device, drop_last=True))) == 2


@pytest.mark.parametrize("own_generator", [False, True])
def test_batches_resume(device, own_generator):
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0) if own_generator else torch.default_generator
    images = numbered(100)

    def epoch(disturb=False):
        found = []
        options = {"generator": generator if own_generator else None, "device": device}
        for batch in batches(images, 7, shuffle=True, flip=True, **options):
            found.append(batch)
            if disturb:
                torch.rand(3)
        return torch.cat(found)

    epoch()
    state = generator.get_state()
    second = epoch()
    third = epoch()
    assert not torch.equal(second, third)
    generator.set_state(state)
    assert torch.equal(epoch(disturb=True), second)
    if own_generator:
        assert torch.equal(epoch(), third)


def test_batches_flip_each_image_with_probability_one_half(device):
    torch.manual_seed(0)
    images = numbered(200, width=3).repeat(200, 1, 1, 1)
    size = 100
    found = torch.cat(list(batches(images, size, shuffle=False, device=device, flip=True))).cpu()
    flipped = (found == images.flip(-1)).flatten(1).all(-1)
    kept = (found == images).flatten(1).all(-1)
    assert (flipped ^ kept).all()

    # The flips are independent coins: mean 1/2, and the variance of a batch's number is size / 4.
    coins = flipped.double()
    se = 0.5 / len(coins) ** 0.5
    assert se < 0.003
    assert abs(coins.mean() - 0.5) < 5 * se
    number = coins.reshape(-1, size).sum(1)
    variance, variance_se = number.var(), size / 4 * (2 / len(number)) ** 0.5
    assert variance_se < 2
    assert abs(variance - size / 4) < 5 * variance_se

    again = torch.cat(list(batches(images, size, shuffle=False, device=device, flip=True))).cpu()
    assert not torch.equal(found, again)


@pytest.mark.parametrize("flip", [False, True])
def test_labels_go_with_their_images(device, flip):
    images, labels = numbered(23, width=3), torch.arange(23) + 100
    options = {"shuffle": True, "device": device, "flip": flip}

    def epoch(**more):
        generator = torch.Generator().manual_seed(1)
        return list(batches(images, 7, generator=generator, **options, **more))

    for alone, (batch, told) in zip(epoch(), epoch(labels=labels), strict=True):
        assert torch.equal(alone, batch)
        assert told.device == batch.device
        assert torch.equal(batch.amin(dim=(1, 2, 3)).long() + 100, told)


def test_batches_do_not_flip_unless_asked(device):
    images = numbered(50)
    found = torch.cat(list(batches(images, 8, shuffle=False, device=device)))
    assert torch.equal(found.cpu(), images)
    found[:] = 0
    assert images[1, 0, 0, 0] == 1  # Batches are copies.


def test_batches_of_images_on_the_device(device):
    images = numbered(20, device=device)
    found = torch.cat(list(batches(images, 6, shuffle=True, device=device, flip=True)))
    assert found.device == images.device
    assert sorted(found.cpu().amin(dim=(1, 2, 3)).tolist()) == list(range(20))


def test_batches_check_their_arguments_at_once(device):
    with pytest.raises(ValueError, match="batch_size must be a whole number >= 1, got 0"):
        batches(numbered(3), 0, shuffle=False, device=device)
    with pytest.raises(ValueError, match="at least one image"):
        batches(numbered(0), 2, shuffle=False, device=device)


@pytest.mark.parametrize("size", [2, 3, 5])
def test_batches_are_shared_by_processes(device, size):
    images = numbered(23, width=3)
    options = {"shuffle": True, "device": device, "drop_last": True, "flip": True}

    def epoch(**share):
        return list(
            batches(images, 7, generator=torch.Generator().manual_seed(1), **options, **share)
        )

    whole = epoch()
    parts = [epoch(rank=rank, size=size) for rank in range(size)]
    assert len(whole) == 3
    for batch, *shares in zip(whole, *parts, strict=True):
        assert torch.equal(torch.cat(shares), batch)
        assert {len(share) for share in shares} <= {7 // size, 7 // size + 1}
