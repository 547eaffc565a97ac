"""The main example comes first in the gallery, the others by name."""

FIRST = ("plot_tv_denoising.py",)


class MainFirst:
    """A key to sort file names by; sphinx-gallery makes it from the folder."""

    def __init__(self, folder: str):
        self.folder = folder

    def __call__(self, filename: str) -> tuple[bool, str]:
        name = str(filename)
        return name not in FIRST, name
