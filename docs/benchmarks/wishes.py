"""A wish that many have and that cannot work, for docs/does-it-make-sense.md."""


def more_contrast(images, /):
    """Minus the variance of each image: there is always an image with more of it."""
    return -images.flatten(1).var(1)
