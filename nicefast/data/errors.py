"""The error of whoever reads a file's content without knowing where the file is."""


class FileFormatError(ValueError):
    """What is wrong with the content of a file. Whoever knows the path puts it in front."""
