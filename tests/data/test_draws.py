import itertools

from timm_lt import create_sampler
from timm_lt.data.loader import NumberedSampler


def test_draws_are_images_and_numbers_that_never_come_again():
    labels = [0] * 7 + [1] * 3
    sampler = create_sampler("class_balanced", labels, num_samples=12, seed=4)
    numbered = NumberedSampler(sampler, 10, 9)
    seen = []
    for epoch in (0, 1, 5):
        numbered.set_epoch(epoch)
        draws = list(numbered)
        assert len(draws) == len(numbered) == 9
        images = sampler.epoch_indices(epoch)[:9].tolist()
        assert [divmod(draw, 10) for draw in draws] == [
            (9 * epoch + place, image) for place, image in enumerate(images)
        ]
        seen.append(set(draws))
    assert not any(a & b for a, b in itertools.combinations(seen, 2))
